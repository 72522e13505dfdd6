//! How far each collector has this chain, so that what one of them lacks is known to be lost, or to lie with another.
//!
//! ```text
//! collectors:  epoch in hex, space, the collector of the last session
//!              seq, space, hash in hex, space, collector          one line each
//! ```
//! A collector is known by the address in the settings. The file is written when a session begins and when it ends; after
//! a crash the last collector counts as having what the spool has let go of, for nobody else can have acknowledged it.
//! What cannot be read counts as nothing: then a collector that lacks something is said to have lost it.

use std::collections::BTreeMap;

use sidewarden_proto::batch::{Cursor, Epoch, LossReason};

/// Collectors that are remembered; the one that is furthest behind is forgotten first.
const MOST: usize = 32;

/// Where each collector stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places {
    current: String,
    at: BTreeMap<String, Cursor>,
}

impl Places {
    /// Reads what [`Places::text`] wrote; nothing of another epoch counts.
    pub fn read(text: &str, epoch: Epoch) -> Places {
        let mut lines = text.lines();
        let Some((_, current)) =
            lines.next().and_then(|head| head.split_once(' ')).filter(|(of, _)| *of == epoch.to_string())
        else {
            return Places::default();
        };
        let at: Option<BTreeMap<String, Cursor>> = lines.take(MOST).map(line).collect();
        at.map_or_else(Places::default, |at| Places { current: current.to_owned(), at })
    }

    /// The file.
    pub fn text(&self, epoch: Epoch) -> String {
        let line = |(name, at): (&String, &Cursor)| format!("{} {} {name}\n", at.seq, at.hash);
        format!("{epoch} {}\n", self.current) + &self.at.iter().map(line).collect::<String>()
    }

    /// A session with `collector` begins, which says to have everything up to `cursor`.
    pub fn meet(&mut self, collector: &str, cursor: Cursor) {
        self.current = collector.to_owned();
        self.acknowledged(cursor);
        while self.at.len() > MOST {
            let behind = self.at.iter().filter(|(name, _)| **name != self.current).min_by_key(|(_, at)| at.seq);
            let Some(behind) = behind.map(|(name, _)| name.clone()) else { return };
            self.at.remove(&behind);
        }
    }

    /// The collector of this session has everything up to `cursor`.
    pub fn acknowledged(&mut self, cursor: Cursor) {
        if self.current.is_empty() {
            return;
        }
        let at = self.at.entry(self.current.clone()).or_insert(cursor);
        if cursor.seq > at.seq {
            *at = cursor;
        }
    }

    /// After a start the spool begins after `cursor`: what nobody is noted to have, the last collector acknowledged.
    pub fn found(&mut self, cursor: Cursor) {
        if self.at.values().all(|at| at.seq < cursor.seq) {
            self.acknowledged(cursor);
        }
    }

    /// Why the collector of this session lacks what follows `cursor`, up to where that is the reason.
    ///
    /// What it once had, it has lost. What it never had was acknowledged by another one.
    pub fn missing(&self, cursor: Cursor, until: Cursor) -> (LossReason, Cursor) {
        match self.at.get(&self.current) {
            Some(had) if self.at.len() > 1 && had.seq <= cursor.seq => (LossReason::Elsewhere, until),
            Some(had) if self.at.len() > 1 && had.seq < until.seq => (LossReason::CollectorRewound, *had),
            _ => (LossReason::CollectorRewound, until),
        }
    }
}

fn line(line: &str) -> Option<(String, Cursor)> {
    let mut fields = line.splitn(3, ' ');
    let (seq, hash, name) = (fields.next()?, fields.next()?, fields.next()?);
    let cursor = Cursor { seq: seq.parse().ok()?, hash: hash.parse().ok()? };
    (!name.is_empty()).then(|| (name.to_owned(), cursor))
}

#[cfg(test)]
mod tests {
    use sidewarden_proto::identity::Sha256;

    use super::*;

    const EPOCH: Epoch = Epoch([7; 16]);

    fn at(seq: u64) -> Cursor {
        Cursor { seq, hash: if seq == 0 { Sha256::ZERO } else { Sha256([seq as u8; 32]) } }
    }

    /// Sessions one after the other: with whom, where it stood, how far it acknowledged.
    fn after(sessions: &[(&str, u64, u64)]) -> Places {
        let mut places = Places::default();
        for (collector, stood, acknowledged) in sessions {
            places.meet(collector, at(*stood));
            places.acknowledged(at(*acknowledged));
        }
        places
    }

    #[test]
    fn what_a_collector_lacks_is_lost_if_it_had_it_and_elsewhere_if_it_never_did() {
        use LossReason::{CollectorRewound, Elsewhere};
        // What was before, who comes now and where it stands, where the spool begins, why and until where.
        let rows = [
            (&[][..], ("a", 0), 9, (CollectorRewound, 9)),
            (&[("a", 0, 9)], ("a", 9), 9, (CollectorRewound, 9)),
            (&[("a", 0, 9)], ("a", 3), 9, (CollectorRewound, 9)),
            (&[("a", 0, 9)], ("b", 0), 9, (Elsewhere, 9)),
            (&[("a", 0, 9), ("b", 0, 12)], ("a", 9), 12, (Elsewhere, 12)),
            (&[("a", 0, 9), ("b", 0, 12)], ("a", 0), 12, (CollectorRewound, 9)),
            (&[("a", 0, 9), ("b", 0, 12)], ("a", 3), 12, (CollectorRewound, 9)),
            (&[("a", 0, 9), ("b", 0, 12), ("a", 9, 15)], ("b", 12), 15, (Elsewhere, 15)),
            (&[("a", 0, 9), ("b", 0, 12), ("a", 9, 15)], ("b", 2), 15, (CollectorRewound, 12)),
            (&[("a", 0, 9), ("b", 0, 12)], ("c", 0), 12, (Elsewhere, 12)),
        ];
        for (before, (collector, stands), begins, (reason, until)) in rows {
            let mut places = after(before);
            places.meet(collector, at(stands));
            let read = Places::read(&places.text(EPOCH), EPOCH);
            assert_eq!(read, places, "it survives a restart");
            assert_eq!(read.missing(at(stands), at(begins)), (reason, at(until)), "{before:?} {collector}");
        }
    }

    #[test]
    fn after_a_crash_the_last_collector_has_what_nobody_else_is_noted_to_have() {
        let mut places = after(&[("a", 0, 9), ("b", 0, 12)]);
        places.found(at(9));
        assert_eq!(places.at["b"], at(12), "the spool still holds what was acknowledged");
        places.found(at(20));
        assert_eq!((places.at["a"], places.at["b"]), (at(9), at(20)));
        let mut nobody = Places::default();
        nobody.found(at(3));
        assert_eq!(nobody, Places::default());
    }

    #[test]
    fn after_a_loss_what_another_had_is_elsewhere() {
        let mut places = after(&[("a", 0, 9), ("b", 0, 12)]);
        places.meet("a", at(3));
        assert_eq!(places.missing(at(9), at(12)), (LossReason::Elsewhere, at(12)));
    }

    #[test]
    fn what_is_no_such_file_counts_as_nothing() {
        let whole = after(&[("a:1", 0, 9), ("b:1", 0, 12)]).text(EPOCH);
        for cut in 0..whole.len() - 1 {
            let read = Places::read(&whole[..cut], EPOCH);
            assert!(read.at.len() < 2 || read.at.keys().all(|name| whole.contains(name)), "{cut}");
        }
        for text in ["", "\n", "x", &whole.replacen('9', "x", 1), &whole.replace('0', "")] {
            assert_eq!(Places::read(text, EPOCH), Places::default(), "{text}");
        }
        assert_eq!(Places::read(&whole, Epoch([8; 16])), Places::default(), "of another epoch");
        let many: String = (0..1000).map(|n| format!("{n} {} c{n}\n", Sha256::ZERO)).collect();
        assert_eq!(Places::read(&format!("{EPOCH} c1\n{many}"), EPOCH).at.len(), MOST);
    }

    #[test]
    fn the_one_that_is_furthest_behind_is_forgotten_first() {
        let mut places = Places::default();
        for n in 0..100 {
            places.meet(&format!("c{n}"), at(n % 50));
        }
        assert_eq!((places.at.len(), places.at.contains_key("c99")), (MOST, true));
        assert!(!places.at.contains_key("c50"));
    }
}
