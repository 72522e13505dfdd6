//! Whether a text holds a secret: by well-known forms, by the name it stands under, and by how random it looks. Only the kind
//! is told, never the text. Pure.

/// Shorter than this, and random only by chance.
const MIN_RANDOM: usize = 32;
/// Bits in a character of random base64 are close to 6; those of words and paths are below 4.5.
const RANDOM_BITS: f64 = 4.6;
/// More of a text than this is not looked at: no real variable or instruction is longer.
const MAX_TEXT: usize = 64 << 10;

/// Beginnings of tokens, how long the token is at least, and what it is.
const TOKENS: [(&str, usize, &str); 14] = [
    ("AKIA", 20, "an access key of AWS"),
    ("ASIA", 20, "an access key of AWS"),
    ("ghp_", 30, "a token of GitHub"),
    ("gho_", 30, "a token of GitHub"),
    ("ghs_", 30, "a token of GitHub"),
    ("github_pat_", 30, "a token of GitHub"),
    ("glpat-", 20, "a token of GitLab"),
    ("xoxb-", 20, "a token of Slack"),
    ("xoxp-", 20, "a token of Slack"),
    ("AIza", 35, "an API key of Google"),
    ("sk_live_", 20, "a key of Stripe"),
    ("npm_", 36, "a token of npm"),
    ("dckr_pat_", 20, "a token of Docker"),
    ("eyJ", 40, "a JSON web token"),
];

/// What kind of secret `value`, under `name`, is.
pub(super) fn in_value(name: &str, value: &str) -> Option<&'static str> {
    if is_secret_name(name) && is_given(value) {
        return Some("a value under the name of a secret");
    }
    let random = || (!is_public_name(name) && looks_random(value)).then_some("a value that looks random");
    in_words(value).next().or_else(random)
}

/// What kinds of secrets stand in a text of many words.
pub(super) fn in_text(text: &str) -> impl Iterator<Item = &'static str> {
    let text = cut(text);
    let assigned = text.split_whitespace().filter_map(|word| word.split_once('='));
    let named = assigned.filter(|(name, value)| is_secret_name(name) && is_given(value));
    let mut found: Vec<&str> = named.map(|_| "a value under the name of a secret").chain(in_words(text)).collect();
    found.sort_unstable();
    found.dedup();
    found.into_iter()
}

fn cut(text: &str) -> &str {
    let mut end = text.len().min(MAX_TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

fn in_words(text: &str) -> impl Iterator<Item = &'static str> {
    let text = cut(text);
    let key = (text.contains("-----BEGIN") && text.contains("PRIVATE KEY")).then_some("a private key");
    let word = |c: char| !(c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.'));
    let tokens = text.split(word).filter_map(|word| {
        let is = |(start, length, _): &&(&str, usize, &str)| word.starts_with(start) && word.len() >= *length;
        TOKENS.iter().find(is).map(|(_, _, kind)| *kind)
    });
    let urls = text.split("://").skip(1).filter(|rest| has_password(rest)).map(|_| "a password in a URL");
    key.into_iter().chain(tokens).chain(urls)
}

/// `user:password@host…`
fn has_password(after_scheme: &str) -> bool {
    let authority = after_scheme.split(['/', ' ', '"', '\'', '?']).next().unwrap_or_default();
    let user = authority.rsplit_once('@').map(|(user, _)| user);
    user.and_then(|user| user.split_once(':')).is_some_and(|(_, password)| is_given(password))
}

fn is_secret_name(name: &str) -> bool {
    const WORDS: [&str; 13] = [
        "password",
        "passwd",
        "passphrase",
        "secret",
        "token",
        "api_key",
        "apikey",
        "api-key",
        "access_key",
        "private_key",
        "credential",
        "auth_key",
        "encryption_key",
    ];
    // What says where the secret is, or how it is treated, is none.
    const ABOUT: [&str; 12] =
        ["_file", "_path", "_dir", "_url", "_uri", "_name", "_ttl", "_length", "_policy", "_id", "_header", "_expiry"];
    let name = name.trim_start_matches('-').to_ascii_lowercase();
    let name = name.rsplit(['"', '\'', ',', '{', '(']).next().unwrap_or(&name);
    WORDS.iter().any(|word| name.contains(word)) && !ABOUT.iter().any(|about| name.ends_with(about))
}

/// Whether something stands there that is no reference to it, no path and no switch.
fn is_given(value: &str) -> bool {
    let bare = value.trim().trim_matches(['"', '\'']);
    let switch = ["true", "false", "yes", "no", "on", "off", "none", "null", "1", "0"];
    !bare.is_empty()
        && !bare.starts_with(['$', '/', '<', '%', '*', '{'])
        && !bare.starts_with("file:")
        && !switch.iter().any(|s| bare.eq_ignore_ascii_case(s))
}

/// Names under which public things stand that look random: checksums, versions, fingerprints.
fn is_public_name(name: &str) -> bool {
    const WORDS: [&str; 12] =
        ["sha", "sum", "hash", "digest", "gpg", "fingerprint", "commit", "version", "revision", "path", "md5", "build"];
    let name = name.to_ascii_lowercase();
    WORDS.iter().any(|word| name.contains(word))
}

/// Long, of letters and digits mixed, and no checksum in hex.
fn looks_random(value: &str) -> bool {
    let value = cut(value.trim().trim_matches(['"', '\'']));
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '=' | '_' | '-');
    value.len() >= MIN_RANDOM
        && value.chars().all(fits)
        && !value.chars().all(|c| c.is_ascii_hexdigit() || c == '-')
        && value.chars().any(|c| c.is_ascii_digit())
        && bits_per_character(value) >= RANDOM_BITS
}

fn bits_per_character(text: &str) -> f64 {
    let mut counts = [0_u32; 256];
    text.bytes().for_each(|b| counts[usize::from(b)] += 1);
    let length = text.len() as f64;
    let share = |count: u32| f64::from(count) / length;
    counts.iter().filter(|count| **count > 0).map(|count| -share(*count) * share(*count).log2()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_told_by_name_form_and_randomness() {
        let rows = [
            ("DB_PASSWORD", "hunter2", true),
            ("MYSQL_ROOT_PASSWORD", "x", true),
            ("MYSQL_ALLOW_EMPTY_PASSWORD", "yes", false),
            ("DB_PASSWORD_FILE", "/run/secrets/db", false),
            ("TOKEN", "$CI_TOKEN", false),
            ("TOKEN_TTL", "3600", false),
            ("DATABASE_URL", "postgres://app:s3cret@db/app", true),
            ("DATABASE_URL", "postgres://db/app", false),
            ("X", "AKIAIOSFODNN7EXAMPLE", true),
            ("X", "ghp_0123456789abcdefghijABCDEFGHIJ0123", true),
            ("SEED", "q8Zx0LmPv3Tn7RkYb2WcJd5HfGs9AeUi", true),
            ("NGINX_SHA256", "q8Zx0LmPv3Tn7RkYb2WcJd5HfGs9AeUi", false),
            ("GIT", "0123456789abcdef0123456789abcdef01234567", false),
            ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", false),
            ("LANG", "C.UTF-8", false),
            ("KEYBOARD", "de", false),
        ];
        for (name, value, expected) in rows {
            assert_eq!(in_value(name, value).is_some(), expected, "{name}={value}: {:?}", in_value(name, value));
        }
    }

    #[test]
    fn instructions_are_looked_through_word_by_word() {
        let rows = [
            ("ENV DB_PASSWORD=hunter2", 1),
            ("RUN |1 TOKEN=abcdefg /bin/sh -c make # buildkit", 1),
            ("RUN /bin/sh -c echo -----BEGIN RSA PRIVATE KEY----- > /k", 1),
            ("RUN mysql --password=\"$PW\" -e x", 0),
            ("RUN curl https://me:pw12@host/x", 1),
            ("RUN apt-get install -y passwd", 0),
            ("CMD [\"nginx\" \"-g\" \"daemon off;\"]", 0),
        ];
        for (text, expected) in rows {
            assert_eq!(in_text(text).count(), expected, "{text}: {:?}", in_text(text).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_huge_text_of_odd_characters_is_no_trouble() {
        assert_eq!(in_text(&"ä=é ".repeat(1 << 20)).count(), 0);
        assert!(in_value("x", &"é".repeat(1 << 20)).is_none());
    }
}
