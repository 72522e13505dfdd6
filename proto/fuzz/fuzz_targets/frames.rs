//! A stream of frames, cut anywhere: whatever is read comes out again as it was.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sidewarden_proto::wire::{Decoder, Frame};

fuzz_target!(|bytes: &[u8]| {
    let mut decoder = Decoder::default();
    for piece in bytes.chunks(1 + bytes.first().map_or(0, |b| usize::from(*b))) {
        decoder.push(piece);
        while let Ok(Some(frame)) = decoder.next_frame() {
            let again = frame.encode();
            assert_eq!(Frame::decode(&again[4..]), Ok(Some(frame)));
        }
    }
});
