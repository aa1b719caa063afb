//! Arbitrary bytes as a safetensors file: never a panic, and what is accepted is consistent.
#![no_main]

#[path = "../../src/error.rs"]
#[allow(dead_code)]
mod error;
#[path = "../../src/files/weights/header.rs"]
mod header;

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use safetensors::SafeTensors;

fuzz_target!(|bytes: &[u8]| {
    let Ok(entries) = header::read_header(Path::new("fuzz"), bytes) else { return };
    // The crate can judge what we accept: then no sum of offsets exceeds the file.
    let theirs = SafeTensors::deserialize(bytes).expect("the safetensors crate accepts it as well");
    assert_eq!(entries.len(), theirs.len());
    let mut end = entries.first().map_or(bytes.len(), |e| e.range.start);
    for entry in &entries {
        assert_eq!(entry.range.start, end);
        end = entry.range.end;
        let view = theirs.tensor(&entry.name).expect("the same names");
        assert_eq!((view.shape(), view.data()), (&entry.shape[..], &bytes[entry.range.clone()]));
    }
    assert_eq!(end, bytes.len());
});
