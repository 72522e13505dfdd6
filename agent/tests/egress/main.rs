//! Egress with real clients: curl, openssl and squid, as they come from Debian; names from a DNS server of our own;
//! transparent redirects by nft in a network namespace of their own.
//!
//! A test whose program is missing fails and says which, unless SIDEWARDEN_ALLOW_SKIP=1.

mod explicit;
mod names;
mod scene;
mod transparent;
mod upstream;
