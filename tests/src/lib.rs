//! Agent and collector together.
