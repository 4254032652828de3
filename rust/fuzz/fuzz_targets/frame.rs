//! Any bytes, cut anywhere: the decoder yields events or an error, and never panics or takes memory on trust.
#![no_main]

use libfuzzer_sys::fuzz_target;
use skyward_lite::wire::Decoder;

fuzz_target!(|data: &[u8]| {
    // The first byte says how the rest is cut.
    let Some((&step, data)) = data.split_first() else { return };
    let mut decoder = Decoder::new(1 << 20);
    for piece in data.chunks(usize::from(step) + 1) {
        decoder.buffer().extend_from_slice(piece);
        loop {
            match decoder.next() {
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(error) => {
                    assert!(!error.to_string().is_empty());
                    return;
                }
            }
        }
    }
});
