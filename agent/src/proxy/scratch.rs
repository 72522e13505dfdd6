//! The memory in which each thread seals and opens: one for all its connections, so that none at rest holds any.

use std::cell::RefCell;

use super::record::{LINE, SLOT};

/// Records of one batch: 256 KiB was the knee of the curve (research/performance.md, lesson 2).
pub const BATCH: usize = 16;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::new());
}

/// Room for a batch of records of the greatest length.
struct Scratch {
    bytes: Box<[u8]>,
    /// Where the first line begins.
    start: usize,
}

impl Scratch {
    fn new() -> Scratch {
        let bytes = vec![0; LINE + LINE + BATCH * SLOT].into_boxed_slice();
        let start = bytes.as_ptr().align_offset(LINE);
        Scratch { bytes, start }
    }
}

/// Lends this thread's scratch, which begins at a line of memory. Not to be nested, nor held while anything waits.
pub fn with_scratch<T>(work: impl FnOnce(&mut [u8]) -> T) -> T {
    SCRATCH.with_borrow_mut(|scratch| work(&mut scratch.bytes[scratch.start..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_begins_at_a_line_and_holds_a_batch() {
        with_scratch(|scratch| {
            assert_eq!(scratch.as_ptr() as usize % LINE, 0);
            assert!(scratch.len() >= LINE + BATCH * SLOT);
        });
    }
}
