//! What of a command line may leave the container: no passwords, tokens, e-mail addresses or telephone numbers, no control
//! characters, and at most 256 bytes. Errs on the side of hiding.

/// What stands for something hidden.
const DOTS: &str = "••••";

/// The longest result, in bytes.
const MAX_BYTES: usize = 256;

/// More of a command line than this is not looked at: what is cut is not shown either.
const MAX_INPUT: usize = 4096;

/// `text` without what must not leave the container.
pub fn mask(text: &str) -> String {
    let start = cut(text, MAX_INPUT);
    let words = hide_secrets(start);
    let shown = escape(&hide_phone_numbers(&words));
    if shown.len() <= MAX_BYTES && start.len() == text.len() {
        return shown;
    }
    format!("{}…", cut(&shown, MAX_BYTES - '…'.len_utf8()))
}

/// `text` with control characters told instead of sent, and cut to the same length. For what holds no secrets.
pub fn plain(text: &str) -> String {
    let shown = escape(cut(text, MAX_INPUT));
    if shown.len() <= MAX_BYTES { shown } else { format!("{}…", cut(&shown, MAX_BYTES - '…'.len_utf8())) }
}

fn cut(text: &str, bytes: usize) -> &str {
    let mut end = bytes.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// What is expected of the words that follow.
#[derive(Clone, Copy)]
enum Next {
    Plain,
    /// The next word is a secret.
    Secret,
    /// All words are, up to one that ends with this quote.
    SecretUntil(char),
    /// The next word is `user:password`.
    UserAndSecret,
}

fn hide_secrets(text: &str) -> String {
    let mut out: Vec<String> = Vec::new();
    let mut next = Next::Plain;
    let mut database = false;
    for word in text.split_whitespace() {
        database |= is_database_client(word);
        let (shown, then) = match next {
            Next::Plain => plain_word(word, database),
            Next::Secret if is_scheme(word) => (word.to_owned(), Next::Secret),
            Next::Secret => (DOTS.to_owned(), after_secret(word)),
            Next::SecretUntil(quote) if word.contains(quote) => (String::new(), Next::Plain),
            Next::SecretUntil(_) => (String::new(), next),
            Next::UserAndSecret => match word.split_once(':') {
                Some((user, _)) => (format!("{}:{DOTS}", personal(user)), Next::Plain),
                None => (personal(word), Next::Plain),
            },
        };
        next = then;
        if !shown.is_empty() {
            out.push(shown);
        }
    }
    out.join(" ")
}

fn plain_word(word: &str, database: bool) -> (String, Next) {
    if let Some(at) = secret_value(word) {
        let value = &word[at..];
        let then = if value.trim_matches(['"', '\'']).is_empty() { Next::Secret } else { after_secret(value) };
        return (format!("{}{}", &word[..at], if value.is_empty() { "" } else { DOTS }), then);
    }
    match word {
        "-u" | "--user" => (word.to_owned(), Next::UserAndSecret),
        "-a" | "-p" if database => (word.to_owned(), Next::Secret),
        _ if database && word.starts_with("-p") && word.len() > 2 => (format!("-p{DOTS}"), Next::Plain),
        _ if word.starts_with('-') && is_secret_name(word) => (word.to_owned(), Next::Secret),
        _ => (personal(word), Next::Plain),
    }
}

/// A quoted secret may have blanks in it.
fn after_secret(value: &str) -> Next {
    match value.chars().next() {
        Some(quote @ ('"' | '\'')) if value.len() == 1 || !value[1..].contains(quote) => Next::SecretUntil(quote),
        _ => Next::Plain,
    }
}

fn is_database_client(word: &str) -> bool {
    let program = word.rsplit('/').next().unwrap_or(word);
    ["mysql", "mariadb", "sshpass", "redis-cli", "mongo"].iter().any(|client| program.starts_with(client))
}

fn is_scheme(word: &str) -> bool {
    ["bearer", "basic", "token", "digest"].iter().any(|scheme| word.eq_ignore_ascii_case(scheme))
}

/// Where the value begins in `password=…`, `--token=…`, `Authorization:…`, `{"secret":"…`, `a=b&token=…`.
fn secret_value(word: &str) -> Option<usize> {
    let mut name_start = 0;
    for (at, c) in word.char_indices() {
        match c {
            '=' | ':' if is_secret_name(&word[name_start..at]) => return Some(at + 1),
            '=' | ':' | '&' | '?' | ';' | ',' | '{' => name_start = at + c.len_utf8(),
            _ => {}
        }
    }
    None
}

fn is_secret_name(name: &str) -> bool {
    let name = name.trim_matches(['-', '"', '\'', '$']).to_ascii_lowercase();
    let parts = ["password", "passwd", "passphrase", "secret", "token", "apikey", "api_key", "api-key", "accesskey"];
    let more = [
        "access_key",
        "access-key",
        "privatekey",
        "private_key",
        "private-key",
        "credential",
        "_pass",
        "-pass",
        "_pwd",
    ];
    let whole = ["pass", "passin", "passout", "pwd", "pw", "authorization", "auth", "cookie", "requirepass", "key"];
    parts.iter().chain(&more).any(|part| name.contains(part)) || whole.contains(&name.as_str())
}

/// A word without the password of an address, and without e-mail addresses.
fn personal(word: &str) -> String {
    if let Some((scheme, rest)) = word.split_once("://") {
        let host_ends = rest.find('/').unwrap_or(rest.len());
        if let Some(at) = rest[..host_ends].rfind('@') {
            return format!("{scheme}://{DOTS}{}", &rest[at..]);
        }
    }
    if has_mail_address(word) { DOTS.to_owned() } else { word.to_owned() }
}

fn has_mail_address(word: &str) -> bool {
    word.match_indices('@').any(|(at, _)| {
        let local = word[..at].chars().next_back().is_some_and(|c| c.is_alphanumeric() || "._%+-".contains(c));
        let domain: String = word[at + 1..].chars().take_while(|c| c.is_alphanumeric() || ".-".contains(*c)).collect();
        local && domain.trim_end_matches('.').contains('.')
    })
}

/// Numbers with 9 to 15 digits that begin as telephone numbers do: with `+`, with `0` or with an area code and dashes.
fn hide_phone_numbers(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let mut before = ' ';
    while let Some(c) = rest.chars().next() {
        let boundary = !before.is_alphanumeric() && !"./:-_".contains(before);
        match boundary.then(|| phone_number(rest)).flatten() {
            Some(length) => {
                out.push_str(DOTS);
                rest = &rest[length..];
                before = '0';
            }
            None => {
                out.push(c);
                rest = &rest[c.len_utf8()..];
                before = c;
            }
        }
    }
    out
}

/// How long the number at the start of `text` is, if there is one.
fn phone_number(text: &str) -> Option<usize> {
    let length = text.bytes().take_while(|b| b.is_ascii_digit() || b"+ -/()".contains(b)).count();
    let run = text[..length].trim_end_matches([' ', '-', '/', '(']);
    let digits = run.bytes().filter(u8::is_ascii_digit).count();
    let continues = text[run.len()..].chars().next().is_some_and(|c| c.is_alphanumeric() || c == '.' || c == ':');
    let begins = run.trim_start_matches('(');
    let international = begins.starts_with('+') && begins[1..].starts_with(|c: char| c.is_ascii_digit());
    let national = begins.starts_with('0') && begins[1..].starts_with(|c: char| c.is_ascii_digit() && c != '0');
    let area_code = digits == 10 && is_area_code(run);
    ((9..=15).contains(&digits) && (international || national || area_code) && !continues).then_some(run.len())
}

/// `555-123-4567`, `(555) 123-4567`.
fn is_area_code(run: &str) -> bool {
    let groups: Vec<usize> = run.split(|c: char| !c.is_ascii_digit()).map(str::len).filter(|n| *n > 0).collect();
    groups == [3, 3, 4]
}

fn escape(text: &str) -> String {
    // Besides control characters, those that turn the direction of writing: they make a line read as another one.
    let turns = |c: char| matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{2028}' | '\u{2029}');
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() || turns(c) { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn secrets_do_not_leave() {
        let rows = [
            ("nginx -g daemon off;", "nginx -g daemon off;"),
            ("app --password=hunter2 --port=80", "app --password=•••• --port=80"),
            ("app --password hunter2 run", "app --password •••• run"),
            ("app --password=\"two words\" run", "app --password=•••• run"),
            ("mysql -uroot -phunter2 shop", "mysql -uroot -p•••• shop"),
            ("/usr/bin/mysqldump -p hunter2 shop", "/usr/bin/mysqldump -p •••• shop"),
            ("ssh -p2222 host", "ssh -p2222 host"),
            ("curl -H Authorization: Bearer abc.def https://x", "curl -H Authorization: Bearer •••• https://x"),
            ("curl -u bob:hunter2 https://x", "curl -u bob:•••• https://x"),
            ("curl https://x/?a=1&token=abc", "curl https://x/?a=1&token=••••"),
            ("psql postgres://bob:hunter2@db/shop", "psql postgres://••••@db/shop"),
            ("DB_PASSWORD=hunter2 ./run", "DB_PASSWORD=•••• ./run"),
            ("post {\"secret\":\"a b c\"} now", "post {\"secret\":•••• now"),
            ("redis-cli -a hunter2 ping", "redis-cli -a •••• ping"),
            ("openssl rsa -passin pass:hunter2", "openssl rsa -passin ••••"),
        ];
        for (text, expected) in rows {
            assert_eq!(mask(text), expected, "{text}");
        }
    }

    #[test]
    fn people_do_not_leave() {
        let rows = [
            ("mail alice@example.org now", "mail •••• now"),
            ("--to=<alice.b+c@mail.example.org>", "••••"),
            ("user@host stays", "user@host stays"),
            ("call +49 170 1234567 now", "call •••• now"),
            ("call 0170/1234567", "call ••••"),
            ("call (555) 123-4567", "call ••••"),
            ("listen 192.168.100.200:8080", "listen 192.168.100.200:8080"),
            ("on 2026-11-22 at 10:00:00", "on 2026-11-22 at 10:00:00"),
            ("pid 1234567 of 4194304", "pid 1234567 of 4194304"),
        ];
        for (text, expected) in rows {
            assert_eq!(mask(text), expected, "{text}");
        }
    }

    #[test]
    fn control_characters_are_told_and_long_lines_cut() {
        assert_eq!(mask("a\u{1b}[31mb\u{202e}c"), "a\\u{1b}[31mb\\u{202e}c");
        let long = mask(&"ä".repeat(4000));
        assert!(long.len() <= MAX_BYTES && long.ends_with('…'));
        let cut_secret = mask(&format!("{} --password=hunter2", "x".repeat(250)));
        assert!(!cut_secret.contains("hunter") && cut_secret.len() <= MAX_BYTES);
    }

    proptest! {
        #[test]
        fn any_text_is_masked_within_the_limit(text in "\\PC{0,600}|[ -~]{0,300}|(password=|-p|'|\"|[+0-9 ()@.:/-]){0,80}") {
            let masked = mask(&text);
            prop_assert!(masked.len() <= MAX_BYTES);
            prop_assert!(!masked.chars().any(char::is_control));
        }

        #[test]
        fn a_password_is_never_shown(value in "[a-zA-Z0-9]{12,20}", before in "[a-z ]{0,40}") {
            let masked = mask(&format!("{before} --password={value}"));
            prop_assert!(!masked.contains(&value));
        }
    }
}
