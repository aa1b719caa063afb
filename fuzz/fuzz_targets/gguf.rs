//! Arbitrary bytes as a GGUF file: never a panic, and what is accepted is consistent.
#![no_main]

#[path = "../../src/files/config/mod.rs"]
#[allow(dead_code)]
mod config;
#[path = "../../src/error.rs"]
#[allow(dead_code)]
mod error;
#[path = "../../src/files/json.rs"]
#[allow(dead_code)]
mod json;
#[path = "../../src/files/format/mod.rs"]
#[allow(dead_code)]
mod format;
#[path = "../../src/files/gguf/header.rs"]
#[allow(dead_code)]
mod header;

mod files {
    pub(crate) use crate::{config, format, json};
}

use std::path::Path;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(header) = header::read_header(Path::new("fuzz"), bytes) else { return };
    let mut ranges: Vec<_> = header.tensors.iter().map(|t| t.range.clone()).collect();
    ranges.sort_by_key(|r| (r.start, r.end));
    assert!(ranges.windows(2).all(|w| w[0].end <= w[1].start) && ranges.iter().all(|r| r.end <= bytes.len()));
    for tensor in &header.tensors {
        let (cols, rows) = tensor.shape.split_last().map_or((1, 1), |(cols, rows)| (*cols, rows.iter().product()));
        assert_eq!(tensor.format.row_bytes(cols).map(|row| row * rows), Some(tensor.range.len()));
        if let format::Format::Block(block) = tensor.format {
            let mut values = vec![0f32; tensor.range.len() / block.bytes * block.weights];
            block.values(&bytes[tensor.range.clone()], &mut values);
        }
    }
    for value in header.keys.values() {
        if let header::Value::Array(header::Kind::Str, n, range) = value {
            assert_eq!(header::strings(bytes, range).count(), *n);
        }
    }
});
