//! The header of a safetensors file: read once, checked in full, then trusted.
//!
//! The checks are the format's (github.com/huggingface/safetensors): an 8-byte little-endian length, that many bytes of
//! JSON, then the data, which the tensors cover without holes or overlaps. They are made here rather than by the
//! `safetensors` crate for the sake of errors that name the tensor and both numbers, and because its sum of offsets
//! can overflow on a hostile header (0.8.0). A property test holds the two to the same verdicts.

use std::ops::Range;
use std::path::Path;

use safetensors::tensor::TensorInfo;
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Bytes of the length that a file begins with.
const LENGTH_BYTES: usize = 8;
/// A header takes about 120 bytes a tensor, so one of this size would describe a hundred thousand. A file that claims
/// more is not safetensors, or is made to exhaust memory.
const MAX_HEADER_BYTES: u64 = 16 << 20;

/// One tensor as a file's header describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its element type as the format spells it (`BF16`, `F32`, `I64`, ...).
    pub dtype: safetensors::Dtype,
    /// Its dimensions, the last one contiguous; empty for a scalar.
    pub shape: Vec<usize>,
    /// Where its data lies, in bytes from the start of the file.
    pub range: Range<usize>,
}

/// Reads and checks the header of the safetensors file whose whole content is `bytes`; `path` is named in errors.
///
/// The entries come in the order of their data, which they cover without a hole.
///
/// # Errors
/// [`Error::File`] when it is no safetensors file (the error says what it is instead, where that is recognisable), or
/// is cut short; [`Error::Tensor`] when a tensor's shape, dtype and offsets contradict each other, the file or its
/// neighbours. Never panics, whatever the bytes.
pub fn read_header(path: &Path, bytes: &[u8]) -> Result<Vec<Entry>> {
    let (json, data_start) = split(path, bytes)?;
    let map: Map<String, Value> = serde_json::from_slice(json)
        .map_err(|e| Error::file(path, format!("is not a valid safetensors file: its header is not JSON: {e}")))?;

    let mut entries = Vec::with_capacity(map.len());
    for (name, value) in map {
        if name == "__metadata__" {
            check_metadata(path, &value)?;
            continue;
        }
        match TensorInfo::deserialize(&value) {
            Ok(info) => entries.push((name, info)),
            Err(e) => {
                return Err(Error::tensor(path, &name, "a dtype, a shape and two data_offsets", e.to_string()));
            }
        }
    }
    entries.sort_by(|(a_name, a), (b_name, b)| (a.data_offsets, a_name).cmp(&(b.data_offsets, b_name)));

    let data_bytes = bytes.len() - data_start;
    let mut end_of_last = 0;
    let mut last: Option<&String> = None;
    for (name, info) in &entries {
        let (start, end) = info.data_offsets;
        let Some(size) = byte_size(info) else {
            let expected = "a shape whose size in bytes is a whole number that fits the file";
            return Err(Error::tensor(path, name, expected, format!("{:?} {:?}", info.dtype, info.shape)));
        };
        if end.checked_sub(start) != Some(size) {
            let expected = format!("{size} bytes for {:?} {:?}", info.dtype, info.shape);
            return Err(Error::tensor(path, name, expected, format!("data_offsets {start}..{end}")));
        }
        if end > data_bytes {
            let found = format!("{data_bytes} bytes of data in the file: it is truncated, or its header is wrong");
            return Err(Error::tensor(path, name, format!("data at {start}..{end}"), found));
        }
        if start != end_of_last {
            let verdict = if start < end_of_last { "overlaps" } else { "leaves a hole after" };
            let found = format!("offset {start}, which {verdict} {}", last.map_or("the header", |name| name));
            return Err(Error::tensor(path, name, format!("data at offset {end_of_last}"), found));
        }
        (end_of_last, last) = (end, Some(name));
    }
    if end_of_last != data_bytes {
        let what = format!("has {data_bytes} bytes of data, but its tensors end at byte {end_of_last}");
        return Err(Error::file(path, what));
    }

    let place = |(start, end): (usize, usize)| data_start + start..data_start + end;
    Ok(entries
        .into_iter()
        .map(|(name, info)| Entry { name, dtype: info.dtype, shape: info.shape, range: place(info.data_offsets) })
        .collect())
}

/// The JSON of the header, and where the data starts.
fn split<'a>(path: &Path, bytes: &'a [u8]) -> Result<(&'a [u8], usize)> {
    if bytes.is_empty() {
        return Err(Error::file(path, "is empty, expected a safetensors file"));
    }
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        let what = format!("is not a safetensors file: it has {} bytes, fewer than the header's length", bytes.len());
        return Err(Error::file(path, what));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        let what = match other_format(bytes) {
            Some(other) => format!("is not a safetensors file: {other}"),
            None => format!("is not a safetensors file: it claims a header of {length} bytes"),
        };
        return Err(Error::file(path, what));
    }
    let Some(json) = rest.get(..length as usize) else {
        let what = format!("is truncated: its header has {length} bytes, but only {} follow", rest.len());
        return Err(Error::file(path, what));
    };
    if json.first() != Some(&b'{') {
        return Err(Error::file(path, "is not a safetensors file: its header does not begin with `{`"));
    }
    Ok((json, LENGTH_BYTES + json.len()))
}

/// What a file is, when its first bytes do not make a possible header length.
fn other_format(bytes: &[u8]) -> Option<&'static str> {
    const FORMATS: [(&[u8], &str); 7] = [
        (b"version https://git-lfs", "it is a Git LFS pointer; fetch the real file with `git lfs pull`"),
        (b"GGUF", "it is a GGUF file; name it with its ending .gguf in place of the directory"),
        (b"PK\x03\x04", "it is a PyTorch (zip) file; save the model with `safe_serialization=True`"),
        (b"\x80\x02", "it is a Python pickle; save the model with `safe_serialization=True`"),
        (b"\x80\x04", "it is a Python pickle; save the model with `safe_serialization=True`"),
        (b"<!", "it is an HTML page; the download saved an error or login page"),
        (b"<html", "it is an HTML page; the download saved an error or login page"),
    ];
    FORMATS.iter().find(|(magic, _)| bytes.starts_with(magic)).map(|(_, what)| *what)
}

/// `__metadata__` is a map from strings to strings.
fn check_metadata(path: &Path, value: &Value) -> Result<()> {
    match value {
        Value::Null => Ok(()),
        Value::Object(map) if map.values().all(Value::is_string) => Ok(()),
        _ => Err(Error::file(path, "is not a valid safetensors file: __metadata__ is not a map of strings")),
    }
}

/// Bytes of the tensor's data; `None` when that overflows or is no whole number (4- and 6-bit types).
fn byte_size(info: &TensorInfo) -> Option<usize> {
    let elements = info.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
    let bits = elements.checked_mul(info.dtype.bitsize())?;
    (bits % 8 == 0).then_some(bits / 8)
}
