//! Until when releases of distributions are maintained: `deploy/os-releases.txt`, built in.

use std::sync::LazyLock;

use sidewarden_proto::time::Timestamp;

const LIST: &str = include_str!("../../../deploy/os-releases.txt");

static RELEASES: LazyLock<Vec<(&str, &str, Timestamp)>> = LazyLock::new(|| LIST.lines().filter_map(line).collect());

fn line(line: &'static str) -> Option<(&'static str, &'static str, Timestamp)> {
    let mut words = line.split_whitespace();
    let (id, version, end) = (words.next()?, words.next()?, words.next()?);
    Some((id, version, format!("{end}T00:00:00Z").parse().ok()?)).filter(|_| !id.starts_with('#'))
}

/// When the maintenance of release `version` of distribution `id` ends; `None` for what is not in the list.
pub(super) fn end_of(id: &str, version: &str) -> Option<Timestamp> {
    let is_of =
        |release: &str| version.strip_prefix(release).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
    RELEASES.iter().find(|(known, release, _)| *known == id && is_of(release)).map(|(_, _, end)| *end)
}

/// The day of a moment.
pub(super) fn day(at: Timestamp) -> String {
    at.to_string().split('T').next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_of_the_list_is_read() {
        let lines = LIST.lines().filter(|l| !l.starts_with('#') && !l.is_empty()).count();
        assert_eq!(RELEASES.len(), lines);
    }

    #[test]
    fn a_point_release_counts_as_its_release_and_no_other() {
        let rows = [
            ("alpine", "3.12.4", Some("2022-05-01")),
            ("alpine", "3.1", None),
            ("rhel", "9.4", Some("2032-05-31")),
            ("debian", "12", Some("2028-06-30")),
            ("debian", "120", None),
            ("wolfi", "20230201", None),
        ];
        for (id, version, expected) in rows {
            assert_eq!(end_of(id, version).map(day).as_deref(), expected, "{id} {version}");
        }
    }
}
