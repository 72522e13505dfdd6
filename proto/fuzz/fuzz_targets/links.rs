//! Links of an agent's chain, with what is in them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sidewarden_proto::batch::{Cursor, Link};

fuzz_target!(|bytes: &[u8]| {
    let Ok(link) = Link::decode(bytes) else { return };
    assert_eq!(Link::decode(&link.encode()).as_ref(), Ok(&link));
    let _ = Cursor::START.fit(link.clone());
    let Link::Batch(batch) = link else { return };
    let Ok(lines) = batch.open() else { return };
    for event in lines.events().unwrap_or_default() {
        let _ = event.body();
    }
});
