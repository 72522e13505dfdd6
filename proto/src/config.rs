//! How both programs read their configuration: TOML, then the environment, every fault at once.
//!
//! A program says once what it reads, key by key, with the default beside it. From that come the names of the
//! environment (`SIDEWARDEN_ADMIN_LISTEN` for `admin.listen`), the complaint about a key nobody reads with the nearest
//! one that exists, and a list of all that is wrong rather than the first thing.

mod lines;

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use toml::Table;
pub use toml::Value;

use crate::event::{Protocol, Severity};
use crate::identity::{InstanceId, SpiffeId, TrustDomain};
use crate::secret::Secret;
use crate::tls::Group;
use lines::Lines;

/// Everything that is wrong with a configuration, one line each.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Faults(pub Vec<String>);

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<String> = self.0.iter().map(|fault| format!("  - {fault}")).collect();
        write!(
            f,
            "{} {} in the configuration:\n{}",
            self.0.len(),
            if self.0.len() == 1 { "fault" } else { "faults" },
            lines.join("\n")
        )
    }
}

/// Looks a variable of the environment up.
pub type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Reads `text` as `read` says, each key overridden by the environment. An empty text means: defaults only.
pub fn load<T>(text: &str, env: Env<'_>, read: impl FnOnce(&mut Reader<'_>) -> T) -> Result<T, Faults> {
    let mut reader = Reader::of(text, env)?;
    let config = read(&mut reader);
    let faults = reader.finish();
    if faults.is_empty() { Ok(config) } else { Err(Faults(faults)) }
}

/// Reads a document that no environment changes: each fault with its line, in their order.
pub fn load_document<T>(text: &str, read: impl FnOnce(&mut Reader<'_>) -> T) -> Result<T, Faults> {
    let lines = Lines::of(text).map_err(|error| Faults(vec![lines::with_line(text, &error)]))?;
    let mut reader = Reader { lines: Some(Arc::new(lines)), ..Reader::of(text, &|_| None)? };
    let document = read(&mut reader);
    let mut faults = reader.finish();
    faults.sort_by_key(|fault| lines::line_in(fault));
    if faults.is_empty() { Ok(document) } else { Err(Faults(faults)) }
}

/// Reads of `text` no more than `read` asks for; what else is in it may be as wrong as it likes.
pub fn load_part<T>(text: &str, env: Env<'_>, read: impl FnOnce(&mut Reader<'_>) -> T) -> Result<T, Faults> {
    let mut reader = Reader::of(text, env)?;
    let part = read(&mut reader);
    if reader.faults.is_empty() { Ok(part) } else { Err(Faults(reader.faults)) }
}

/// What is wrong with the syntax, without the excerpt that may hold a secret.
fn syntax_fault(error: &toml::de::Error) -> String {
    error.message().replace('\n', " ")
}

/// One level of a configuration being read.
pub struct Reader<'a> {
    path: String,
    table: Table,
    env: Env<'a>,
    known: BTreeSet<&'static str>,
    faults: Vec<String>,
    /// Within a list of tables there are no names for the environment.
    in_list: bool,
    /// Where everything stands, if that is told.
    lines: Option<Arc<Lines>>,
}

impl<'a> Reader<'a> {
    fn of(text: &str, env: Env<'a>) -> Result<Reader<'a>, Faults> {
        let table: Table = text.parse().map_err(|e: toml::de::Error| Faults(vec![syntax_fault(&e)]))?;
        let (known, faults) = (BTreeSet::new(), Vec::new());
        Ok(Reader { path: String::new(), table, env, known, faults, in_list: false, lines: None })
    }
}

impl Reader<'_> {
    /// The value of `key`, or `default`.
    pub fn value<V: FromValue>(&mut self, key: &'static str, default: V) -> V {
        self.optional(key).unwrap_or(default)
    }

    /// The value of `key`; a fault if it is nowhere.
    pub fn required<V: FromValue>(&mut self, key: &'static str) -> Option<V> {
        let before = self.faults.len();
        let found = self.optional(key);
        if found.is_none() && self.faults.len() == before {
            let env =
                if self.in_list { String::new() } else { format!(" (or {} in the environment)", self.env_name(key)) };
            self.report(&self.name(key), format!("`{}` is missing{env}", self.name(key)));
        }
        found
    }

    /// The value of `key`, if it is set.
    pub fn optional<V: FromValue>(&mut self, key: &'static str) -> Option<V> {
        self.known.insert(key);
        let in_file = self.table.remove(key);
        let (source, value) = match self.override_of(key) {
            Some(text) => (self.env_name(key), V::from_text(&text)),
            None => (self.name(key), V::from_value(&in_file?)),
        };
        value.map_err(|wrong| self.report(&self.name(key), format!("`{source}` {wrong}"))).ok()
    }

    /// The value of a variable of the environment that others have named; an empty one counts as none.
    pub fn ambient<V: FromValue>(&mut self, variable: &str) -> Option<V> {
        let text = (self.env)(variable).filter(|text| !text.is_empty())?;
        V::from_text(&text).map_err(|wrong| self.faults.push(format!("`{variable}` {wrong}"))).ok()
    }

    fn override_of(&self, key: &str) -> Option<String> {
        if self.in_list { None } else { (self.env)(&self.env_name(key)) }
    }

    /// The table `key`, read by `read`; an empty one if it is not there.
    pub fn section<T>(&mut self, key: &'static str, read: impl FnOnce(&mut Reader<'_>) -> T) -> T {
        let table = self.table(key).unwrap_or_default();
        self.descend(self.name(key), table, self.in_list, read)
    }

    /// The table `key` if there is one, read by `read`.
    pub fn optional_section<T>(&mut self, key: &'static str, read: impl FnOnce(&mut Reader<'_>) -> T) -> Option<T> {
        let table = self.table(key)?;
        Some(self.descend(self.name(key), table, self.in_list, read))
    }

    fn table(&mut self, key: &'static str) -> Option<Table> {
        self.known.insert(key);
        match self.table.remove(key)? {
            Value::Table(table) => Some(table),
            other => {
                let name = self.name(key);
                self.report(&name, format!("`{name}` must be a table, [{name}], and is {}", other.type_str()));
                None
            }
        }
    }

    /// The list of tables `key`, each read by `read`.
    pub fn list<T>(&mut self, key: &'static str, mut read: impl FnMut(&mut Reader<'_>) -> T) -> Vec<T> {
        self.known.insert(key);
        let values = match self.table.remove(key) {
            None => return Vec::new(),
            Some(Value::Array(values)) => values,
            Some(_) => {
                let name = self.name(key);
                self.report(&name, format!("`{name}` must be written as [[{name}]]"));
                return Vec::new();
            }
        };
        let mut items = Vec::new();
        for (i, value) in values.into_iter().enumerate() {
            let name = format!("{}[{i}]", self.name(key));
            match value {
                Value::Table(table) => items.push(self.descend(name, table, true, &mut read)),
                _ => self.report(&name, format!("`{name}` must be a table")),
            }
        }
        items
    }

    /// The list `key`, each item with its line; each item that is wrong is a fault of its own. None if one is.
    pub fn items<V: FromValue>(&mut self, key: &'static str, most: usize) -> Option<Vec<(usize, V)>> {
        self.known.insert(key);
        let items = match self.table.remove(key) {
            None => return Some(Vec::new()),
            Some(Value::Array(items)) => items,
            Some(other) => {
                self.fault(key, format!("must be a list, [\"…\"], not {}", other.type_str()));
                return None;
            }
        };
        if items.len() > most {
            self.fault(key, format!("has {} entries, the limit is {most}", items.len()));
            return None;
        }
        let read = |(i, item): (usize, &Value)| {
            let name = format!("{key}[{i}]");
            let line = self.line_of(&name);
            V::from_value(item).map_err(|wrong| self.fault(&name, wrong)).ok().map(|item| (line, item))
        };
        let read: Vec<Option<(usize, V)>> = items.iter().enumerate().map(read).collect();
        read.into_iter().collect()
    }

    fn descend<T>(&mut self, path: String, table: Table, in_list: bool, read: impl FnOnce(&mut Reader<'_>) -> T) -> T {
        let (known, faults) = (BTreeSet::new(), Vec::new());
        let lines = self.lines.clone();
        let mut reader = Reader { path, table, env: self.env, known, faults, in_list, lines };
        let item = read(&mut reader);
        self.faults.extend(reader.finish());
        item
    }

    /// Reports that `key` is wrong in a way that only the caller can see, with the rest of the faults.
    pub fn fault(&mut self, key: &str, wrong: impl fmt::Display) {
        self.report(&self.name(key), format!("`{}` {wrong}", self.name(key)));
    }

    /// Whether `key` stands here, and was not read yet.
    pub fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    /// The line where this table begins, from 1; 0 where lines are not told.
    pub fn line(&self) -> usize {
        self.line_of_path(&self.path)
    }

    /// The line of `key`, or of item `item[3]` of a list; where it does not stand, that of the table.
    pub fn line_of(&self, key: &str) -> usize {
        self.line_of_path(&self.name(key))
    }

    fn line_of_path(&self, path: &str) -> usize {
        self.lines.as_ref().map_or(0, |lines| lines.line(path))
    }

    fn report(&mut self, path: &str, fault: String) {
        self.faults.push(match self.line_of_path(path) {
            0 => fault,
            line => format!("line {line}: {fault}"),
        });
    }

    fn name(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    fn env_name(&self, key: &str) -> String {
        format!("SIDEWARDEN_{}", self.name(key).replace('.', "_").to_uppercase())
    }

    fn finish(mut self) -> Vec<String> {
        for key in std::mem::take(&mut self.table).keys() {
            let hint = match nearest(key, &self.known) {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("known here: {}", self.known.iter().copied().collect::<Vec<_>>().join(", ")),
            };
            self.report(&self.name(key), format!("`{}` is unknown; {hint}", self.name(key)));
        }
        self.faults
    }
}

/// The known key that is most like `key`, if one is.
fn nearest<'k>(key: &str, known: &BTreeSet<&'k str>) -> Option<&'k str> {
    let scored = known.iter().map(|candidate| (strsim::jaro_winkler(key, candidate), *candidate));
    scored.filter(|(score, _)| *score > 0.8).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, near)| near)
}

/// A type that can stand in a configuration. Errors follow the key's name: "must be …".
pub trait FromValue: Sized {
    /// From TOML.
    fn from_value(value: &Value) -> Result<Self, String> {
        match value {
            Value::String(text) => Self::from_text(text),
            other => Err(format!("must be a string, not {}", other.type_str())),
        }
    }

    /// From the environment, or a TOML string.
    fn from_text(text: &str) -> Result<Self, String>;
}

impl FromValue for String {
    fn from_text(text: &str) -> Result<String, String> {
        Ok(text.to_owned())
    }
}

impl FromValue for PathBuf {
    fn from_text(text: &str) -> Result<PathBuf, String> {
        if text.is_empty() { Err("must be a path, and is empty".into()) } else { Ok(text.into()) }
    }
}

impl FromValue for Secret {
    fn from_text(text: &str) -> Result<Secret, String> {
        Ok(Secret::new(text))
    }
}

impl FromValue for bool {
    fn from_value(value: &Value) -> Result<bool, String> {
        value.as_bool().ok_or_else(|| format!("must be true or false, not {}", value.type_str()))
    }

    fn from_text(text: &str) -> Result<bool, String> {
        text.parse().map_err(|_| format!("must be true or false, not `{text}`"))
    }
}

macro_rules! whole_numbers {
    ($($number:ty),*) => {$(
        impl FromValue for $number {
            fn from_value(value: &Value) -> Result<$number, String> {
                let fault = || format!("must be a whole number from 0 to {}, not {value}", <$number>::MAX);
                value.as_integer().and_then(|n| n.try_into().ok()).ok_or_else(fault)
            }

            fn from_text(text: &str) -> Result<$number, String> {
                text.parse().map_err(|_| format!("must be a whole number from 0 to {}, not `{text}`", <$number>::MAX))
            }
        }
    )*};
}
whole_numbers!(u16, u32, u64, usize);

macro_rules! parsed {
    ($($kind:ty),*) => {$(
        impl FromValue for $kind {
            fn from_text(text: &str) -> Result<$kind, String> {
                parse(text)
            }
        }
    )*};
}
parsed!(SpiffeId, TrustDomain, InstanceId, Severity, Group);

fn parse<T: FromStr<Err: fmt::Display>>(text: &str) -> Result<T, String> {
    text.parse().map_err(|e| format!("is wrong: {e}"))
}

impl FromValue for Protocol {
    fn from_text(text: &str) -> Result<Protocol, String> {
        let named = Protocol::ALL.into_iter().find(|protocol| protocol.word() == text);
        named.ok_or_else(|| format!("must be \"tcp\" or \"udp\", not `{text}`"))
    }
}

impl FromValue for std::net::SocketAddr {
    fn from_text(text: &str) -> Result<std::net::SocketAddr, String> {
        text.parse()
            .map_err(|_| format!("must be an address with a port, like 127.0.0.1:9901 or [::]:8443, not `{text}`"))
    }
}

impl FromValue for std::net::IpAddr {
    fn from_text(text: &str) -> Result<std::net::IpAddr, String> {
        text.parse().map_err(|_| format!("must be an IP address, not `{text}`"))
    }
}

/// A place to connect to: a host, which may be a name, and a port.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostPort {
    /// A DNS name or an IP address, without brackets.
    pub host: String,
    /// The port.
    pub port: u16,
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl FromStr for HostPort {
    type Err = String;

    fn from_str(text: &str) -> Result<HostPort, String> {
        let fault = || format!("must be host:port, like db:8443 or [fd00::7]:8443, not `{text}`");
        let (host, port) = text.rsplit_once(':').ok_or_else(fault)?;
        let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(fault)?;
        let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let host = bracketed.unwrap_or(host);
        let is_v6 = host.parse::<std::net::Ipv6Addr>().is_ok();
        let is_name = !host.is_empty()
            && host.len() <= 253
            && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if bracketed.is_some() != is_v6 || !(is_v6 || is_name) {
            return Err(fault());
        }
        Ok(HostPort { host: host.to_owned(), port })
    }
}

impl FromValue for HostPort {
    fn from_text(text: &str) -> Result<HostPort, String> {
        text.parse()
    }
}

impl FromValue for Duration {
    fn from_text(text: &str) -> Result<Duration, String> {
        let fault = || format!("must be a time with its unit, like 500ms, 30s, 5m, 12h or 1d, not `{text}`");
        let (number, unit) = split_unit(text).ok_or_else(fault)?;
        let millis = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(fault()),
        };
        number.checked_mul(millis).map(Duration::from_millis).ok_or_else(fault)
    }
}

/// A number of bytes, written with its unit: `64MiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

impl FromValue for Bytes {
    fn from_text(text: &str) -> Result<Bytes, String> {
        let fault = || format!("must be a size with its unit, like 512KiB, 16MiB or 2GiB, not `{text}`");
        let (number, unit) = split_unit(text).ok_or_else(fault)?;
        let factor = match unit {
            "B" => 1,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            "TiB" => 1 << 40,
            _ => return Err(fault()),
        };
        number.checked_mul(factor).map(Bytes).ok_or_else(fault)
    }
}

fn split_unit(text: &str) -> Option<(u64, &str)> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    Some((text[..digits].parse().ok()?, text[digits..].trim()))
}

impl<V: FromValue> FromValue for Vec<V> {
    fn from_value(value: &Value) -> Result<Vec<V>, String> {
        let Value::Array(items) = value else {
            return Err(format!("must be a list, [\"…\"], not {}", value.type_str()));
        };
        items
            .iter()
            .enumerate()
            .map(|(i, item)| V::from_value(item).map_err(|e| format!("(item {}) {e}", i + 1)))
            .collect()
    }

    fn from_text(text: &str) -> Result<Vec<V>, String> {
        text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(V::from_text).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq)]
    struct Sample {
        listen: std::net::SocketAddr,
        wait: Duration,
        size: Bytes,
        names: Vec<String>,
        routes: Vec<Option<HostPort>>,
    }

    fn read(reader: &mut Reader<'_>) -> Sample {
        let listen = reader.section("admin", |r| r.value("listen", "127.0.0.1:9901".parse().unwrap()));
        let routes = reader.list("route", |r| {
            let to: Option<HostPort> = r.required("to");
            if to.as_ref().is_some_and(|to| to.host == "loop") {
                r.fault("to", "leads back to this agent");
            }
            to
        });
        let wait = reader.value("wait", Duration::from_secs(5));
        let size = reader.value("size", Bytes(1 << 20));
        Sample { listen, wait, size, names: reader.value("names", vec![]), routes }
    }

    fn check(text: &str, env: &[(&str, &str)], expected: Result<fn(Sample) -> bool, &[&str]>) {
        let env = |name: &str| env.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        match (load(text, &env, read), expected) {
            (Ok(sample), Ok(holds)) => assert!(holds(sample), "{text}"),
            (Err(faults), Err(lines)) => assert_eq!(faults.0, lines, "{text}"),
            (got, _) => panic!("{text}: {got:?}"),
        }
    }

    #[test]
    fn defaults_file_and_environment_come_in_this_order() {
        check("", &[], Ok(|s| s.wait == Duration::from_secs(5) && s.names.is_empty()));
        check(
            "wait = '2m'\nsize = '3KiB'\n[[route]]\nto = 'db:1'",
            &[],
            Ok(|s| s.wait == Duration::from_secs(120) && s.size.0 == 3072),
        );
        let env = [("SIDEWARDEN_WAIT", "7ms"), ("SIDEWARDEN_ADMIN_LISTEN", "[::1]:1"), ("SIDEWARDEN_NAMES", "a, b")];
        check(
            "wait = '2m'",
            &env,
            Ok(|s| s.wait == Duration::from_millis(7) && s.listen.port() == 1 && s.names == ["a", "b"]),
        );
    }

    #[test]
    fn every_fault_is_told_at_once_with_what_to_change() {
        let text = "wiat = '1s'\nsize = 3\nnames = 'x'\n[admin]\nlisten = 'here'\n[[route]]\n[[route]]\nto = 'loop:1'\nfrm = 1";
        check(
            text,
            &[("SIDEWARDEN_WAIT", "soon")],
            Err(&[
                "`admin.listen` must be an address with a port, like 127.0.0.1:9901 or [::]:8443, not `here`",
                "`route[0].to` is missing",
                "`route[1].to` leads back to this agent",
                "`route[1].frm` is unknown; known here: to",
                "`SIDEWARDEN_WAIT` must be a time with its unit, like 500ms, 30s, 5m, 12h or 1d, not `soon`",
                "`size` must be a string, not integer",
                "`names` must be a list, [\"…\"], not string",
                "`wiat` is unknown; did you mean `wait`?",
            ]),
        );
    }

    #[test]
    fn faults_of_a_document_come_with_their_lines_in_order() {
        let told = |text: &str| load_document(text, read).map(drop).unwrap_err().0;
        let text = "# about\nwiat = '1s'\nsize = 3\n\n[[route]]\n\n[[route]]\nto = 'loop:1'\nfrm = 1\n[admin]\nlisten = 'here'";
        let lines: Vec<String> = told(text).iter().map(|fault| fault.split_once(": ").unwrap().0.to_owned()).collect();
        assert_eq!(lines, ["line 2", "line 3", "line 5", "line 8", "line 9", "line 11"], "{:#?}", told(text));
        let syntax = told("wait = '1s'\n\nsize = \n");
        assert!(syntax[0].starts_with("line 3: "), "{syntax:?}");
        assert!(told("route = [\n 1,\n 2]")[1].starts_with("line 3: `route[1]`"));
    }

    #[test]
    fn wrong_shapes_are_faults_and_not_panics() {
        check("admin = 3", &[], Err(&["`admin` must be a table, [admin], and is integer"]));
        check("[route]\nto = 'a:1'", &[], Err(&["`route` must be written as [[route]]"]));
        check("route = [1]", &[], Err(&["`route[0]` must be a table"]));
        assert!(load("wait = ", &|_| None, read).is_err());
        assert!(load(&"[".repeat(100_000), &|_| None, read).is_err());
    }

    #[test]
    fn host_and_port_are_told_apart() {
        for (text, ok) in [
            ("db:8443", true),
            ("10.0.0.1:1", true),
            ("[fd00::7]:8443", true),
            ("fd00::7:8443", false),
            ("db", false),
            ("db:0", false),
            ("db:99999", false),
            (":1", false),
            ("[db]:1", false),
            ("d b:1", false),
        ] {
            let got = text.parse::<HostPort>();
            assert_eq!(got.is_ok(), ok, "{text}: {got:?}");
            assert!(got.is_err() || got.unwrap().to_string() == text);
        }
    }

    #[test]
    fn numbers_that_do_not_fit_are_faults() {
        assert!(Duration::from_text("99999999999999999999d").is_err());
        assert!(Duration::from_text("18446744073709551615d").is_err());
        assert!(Bytes::from_text("18446744073709551615TiB").is_err());
        assert!(
            Bytes::from_text("-1MiB").is_err() && Bytes::from_text("7").is_err() && Duration::from_text("").is_err()
        );
        assert!(u16::from_text("70000").is_err());
    }
}
