//! Which links go when the spool is over its limit. Pure.
//!
//! Lowest severity first, oldest first; what is under way to the collector goes last, because it will most likely be
//! acknowledged in a moment. A link counts by the highest severity in it.

/// What matters of a link here, in the order of the chain.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    /// What its going gives back.
    pub size: u64,
    /// Rank of its highest severity; `None` for a tombstone, which never goes.
    pub rank: Option<usize>,
    /// It was handed out and is not acknowledged.
    pub under_way: bool,
}

/// Positions of those that go so that at least `need` bytes are given back, or all that may go; ascending.
pub fn choose(candidates: &[Candidate], need: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..candidates.len()).filter(|i| candidates[*i].rank.is_some()).collect();
    order.sort_by_key(|i| (candidates[*i].under_way, candidates[*i].rank, *i));
    let mut freed = 0;
    let mut chosen: Vec<usize> = order
        .into_iter()
        .take_while(|i| {
            let wanted = freed < need;
            freed += candidates[*i].size;
            wanted
        })
        .collect();
    chosen.sort_unstable();
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(links: &[(u64, Option<usize>, bool)], need: u64, expected: &[usize]) {
        let candidates: Vec<Candidate> = links
            .iter()
            .map(|(size, rank, under_way)| Candidate { size: *size, rank: *rank, under_way: *under_way })
            .collect();
        assert_eq!(choose(&candidates, need), expected, "{links:?}, {need} bytes");
    }

    #[test]
    fn the_lowest_and_oldest_go_first_and_what_is_under_way_last() {
        check(&[], 10, &[]);
        check(&[(5, Some(0), false), (5, Some(0), false)], 0, &[]);
        check(&[(5, Some(3), false), (5, Some(0), false), (5, Some(0), false)], 5, &[1]);
        check(&[(5, Some(3), false), (5, Some(0), false), (5, Some(1), false)], 9, &[1, 2]);
        check(&[(5, Some(0), true), (5, Some(3), false)], 5, &[1]);
        check(&[(5, None, false), (5, Some(2), false)], 100, &[1]);
    }
}
