//! The header of a GGUF file: read once, checked in full, then trusted.
//!
//! Everything is little endian (github.com/ggml-org/ggml, docs/gguf.md): magic, version, counts, keys with values, tensors, then
//! the data from the next multiple of `general.alignment` on.

use crate::{
    error::{Error, Result},
    files::format::{BLOCKS, Format},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    path::Path,
};

use crate::files::config::Dtype;

/// Most keys of a file: real ones have some dozens.
const MAX_KEYS: u64 = 1 << 12;
/// Most tensors of a file: those of a model with the most layers that aoji reads are 9 thousand.
const MAX_TENSORS: u64 = 1 << 16;
/// Alignment of the data where no key says so.
pub(super) const ALIGNMENT: usize = 32;
/// Dimensions that the format allows.
const MAX_DIMS: u32 = 4;

/// A header that was checked.
#[derive(Debug)]
pub struct Header {
    /// By their names.
    pub keys: BTreeMap<String, Value>,
    /// In the order of the file.
    pub tensors: Vec<Entry>,
}

/// The value of a key.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any unsigned type, or a signed one that is not negative.
    Uint(u64),
    /// A negative integer.
    Int(i64),
    /// f32 or f64.
    Float(f64),
    /// True or false.
    Bool(bool),
    /// UTF-8.
    Str(String),
    /// Elements of one type: the type, how many there are, and where in the file.
    Array(Kind, usize, Range<usize>),
}

/// Type of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Unsigned, 8 bits.
    U8,
    /// Signed, 8 bits.
    I8,
    /// Unsigned, 16 bits.
    U16,
    /// Signed, 16 bits.
    I16,
    /// Unsigned, 32 bits.
    U32,
    /// Signed, 32 bits.
    I32,
    /// binary32.
    F32,
    /// A byte, 0 or 1.
    Bool,
    /// A u64 length and as many bytes.
    Str,
    /// A type, a u64 length and as many elements.
    Array,
    /// Unsigned, 64 bits.
    U64,
    /// Signed, 64 bits.
    I64,
    /// binary64.
    F64,
}

impl Kind {
    const ALL: [Kind; 13] = {
        use Kind::*;
        [U8, I8, U16, I16, U32, I32, F32, Bool, Str, Array, U64, I64, F64]
    };

    /// Bytes of an element; of a string or an array, the fewest.
    fn bytes(self) -> usize {
        match self {
            Kind::U8 | Kind::I8 | Kind::Bool => 1,
            Kind::U16 | Kind::I16 => 2,
            Kind::U32 | Kind::I32 | Kind::F32 => 4,
            Kind::U64 | Kind::I64 | Kind::F64 | Kind::Str => 8,
            Kind::Array => 12,
        }
    }
}

/// One tensor as a file's header describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// How its weights are stored: [`Format::Plain`] or [`Format::Block`].
    pub format: Format,
    /// Its dimensions, the last one contiguous; the file has them the other way round.
    pub shape: Vec<usize>,
    /// Where its data lies, in bytes from the start of the file.
    pub range: Range<usize>,
}

/// Reads and checks the header of the GGUF file whose whole content is `bytes`; `path` is named in errors.
///
/// # Errors
/// [`Error::File`] when it is no GGUF file of version 2 or 3, is cut short, or a key is not what the format allows;
/// [`Error::Tensor`] when a tensor is of a type that aoji does not read, or its shape, type and offset contradict each other, the
/// file or another tensor. Never panics, whatever the bytes; what it allocates is bounded by the length of the file.
pub fn read_header(path: &Path, bytes: &[u8]) -> Result<Header> {
    let mut at = Cursor { path, bytes, at: 0 };
    if bytes.get(..4) != Some(b"GGUF") {
        return Err(Error::file(path, "is not a GGUF file: it does not begin with `GGUF`"));
    }
    at.at = 4;
    match at.u32("the version")? {
        2 | 3 => {} // 3 only added files for big-endian machines
        version if matches!(version.swap_bytes(), 2 | 3) => {
            return Err(Error::file(path, "is a GGUF file for big-endian machines; aoji reads little-endian ones"));
        }
        version => return Err(Error::file(path, format!("is GGUF of version {version}; aoji reads 2 and 3"))),
    }
    let tensors = at.count("tensors", MAX_TENSORS, 8 + 4 + 4 + 8)?;
    let keys = at.count("keys", MAX_KEYS, 8 + 4 + 1)?;
    let keys = at.keys(keys)?;
    let alignment = match keys.get("general.alignment") {
        None => ALIGNMENT,
        Some(&Value::Uint(n)) if n.is_power_of_two() && n <= 1 << 16 => n as usize,
        Some(other) => {
            let what = format!("general.alignment is {}, expected a power of 2 up to 65536", other.brief());
            return Err(Error::file(path, what));
        }
    };
    let tensors = at.tensors(tensors, alignment)?;
    Ok(Header { keys, tensors })
}

impl Value {
    /// For an error message, cut when long.
    pub fn brief(&self) -> String {
        match self {
            Value::Uint(n) => n.to_string(),
            Value::Int(n) => n.to_string(),
            Value::Float(x) => x.to_string(),
            Value::Bool(b) => b.to_string(),
            Value::Str(s) => match s.char_indices().nth(60) {
                Some((end, _)) => format!("{:?}...", &s[..end]),
                None => format!("{s:?}"),
            },
            Value::Array(kind, n, _) => format!("an array of {n} {kind:?}"),
        }
    }
}

/// The strings of an array of them that [`read_header`] has checked.
pub fn strings<'a>(bytes: &'a [u8], range: &Range<usize>) -> impl Iterator<Item = &'a str> {
    let mut rest = &bytes[range.clone()];
    std::iter::from_fn(move || {
        let (length, after) = rest.split_first_chunk::<8>()?;
        let (text, after) = after.split_at_checked(u64::from_le_bytes(*length) as usize)?;
        rest = after;
        str::from_utf8(text).ok()
    })
}

/// A place in the file. Every read is checked against its end.
struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn wrong<T>(&self, what: impl Into<String>) -> Result<T> {
        Err(Error::file(self.path, what))
    }

    fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    /// The next `n` bytes, which are `what`.
    fn take(&mut self, n: u64, what: &str) -> Result<&'a [u8]> {
        if n > self.left() {
            let (at, left) = (self.at, self.left());
            return self.wrong(format!("is truncated: {what} at byte {at} needs {n} bytes, but {left} are left"));
        }
        let taken = &self.bytes[self.at..][..n as usize];
        self.at += n as usize;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        self.take(N as u64, what).map(|bytes| bytes.try_into().expect("so many were taken"))
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A number of things that take at least `bytes` each.
    fn count(&mut self, things: &str, most: u64, bytes: u64) -> Result<u64> {
        let n = self.u64(&format!("the number of {things}"))?;
        if n > most {
            return self.wrong(format!("claims {n} {things}; aoji reads up to {most}"));
        }
        if n * bytes > self.left() {
            return self.wrong(format!("is truncated: it claims {n} {things}, {} bytes are left", self.left()));
        }
        Ok(n)
    }

    fn string(&mut self, what: &str) -> Result<&'a str> {
        let at = self.at;
        let length = self.u64(what)?;
        let bytes = self.take(length, what)?;
        str::from_utf8(bytes).or_else(|_| self.wrong(format!("{what} at byte {at} is not UTF-8")))
    }

    fn kind(&mut self, what: &str) -> Result<Kind> {
        let id = self.u32(what)?;
        match Kind::ALL.get(id as usize) {
            Some(kind) => Ok(*kind),
            None => self.wrong(format!("{what} has type {id}, which GGUF does not have")),
        }
    }

    fn keys(&mut self, count: u64) -> Result<BTreeMap<String, Value>> {
        let mut keys = BTreeMap::new();
        for i in 0..count {
            let name = self.string(&format!("the name of key {i}"))?;
            let what = format!("key {name:?}");
            let kind = self.kind(&what)?;
            let value = self.value(kind, &what)?;
            if keys.insert(name.to_string(), value).is_some() {
                return self.wrong(format!("has the {what} twice"));
            }
        }
        Ok(keys)
    }

    fn value(&mut self, kind: Kind, what: &str) -> Result<Value> {
        let signed = |n: i64| u64::try_from(n).map_or(Value::Int(n), Value::Uint);
        Ok(match kind {
            Kind::U8 => Value::Uint(self.array::<1>(what)?[0].into()),
            Kind::I8 => signed(i8::from_le_bytes(self.array(what)?).into()),
            Kind::U16 => Value::Uint(u16::from_le_bytes(self.array(what)?).into()),
            Kind::I16 => signed(i16::from_le_bytes(self.array(what)?).into()),
            Kind::U32 => Value::Uint(self.u32(what)?.into()),
            Kind::I32 => signed(i32::from_le_bytes(self.array(what)?).into()),
            Kind::U64 => Value::Uint(self.u64(what)?),
            Kind::I64 => signed(i64::from_le_bytes(self.array(what)?)),
            Kind::F32 => Value::Float(f32::from_le_bytes(self.array(what)?).into()),
            Kind::F64 => Value::Float(f64::from_le_bytes(self.array(what)?)),
            Kind::Bool => match self.array::<1>(what)? {
                [b @ 0..=1] => Value::Bool(b == 1),
                [other] => return self.wrong(format!("{what} is {other}, expected 0 or 1 for a bool")),
            },
            Kind::Str => Value::Str(self.string(what)?.to_string()),
            Kind::Array => {
                let kind = self.kind(what)?;
                if kind == Kind::Array {
                    return self.wrong(format!("{what} is an array of arrays, which aoji does not read"));
                }
                let length = self.u64(what)?;
                if length > self.left() / kind.bytes() as u64 {
                    let left = self.left();
                    return self.wrong(format!("{what} claims {length} elements of {kind:?}, {left} bytes are left"));
                }
                let start = self.at;
                match kind {
                    Kind::Str => (0..length).try_for_each(|_| self.string(what).map(drop))?,
                    _ => drop(self.take(length * kind.bytes() as u64, what)?),
                }
                Value::Array(kind, length as usize, start..self.at)
            }
        })
    }

    fn tensors(&mut self, count: u64, alignment: usize) -> Result<Vec<Entry>> {
        let mut entries = Vec::with_capacity(count as usize);
        let mut names = BTreeSet::new();
        for i in 0..count {
            let name = self.string(&format!("the name of tensor {i}"))?;
            if !names.insert(name) {
                return Err(self.tensor(name, "each tensor once", "two of this name"));
            }
            let what = format!("tensor {name:?}");
            let dims = self.u32(&what)?;
            if dims > MAX_DIMS {
                return Err(self.tensor(name, format!("up to {MAX_DIMS} dimensions"), dims.to_string()));
            }
            let mut shape = Vec::with_capacity(dims as usize);
            for _ in 0..dims {
                shape.push(self.u64(&what)?);
            }
            shape.reverse();
            let format = self.u32(&what)?;
            let format = format_of(format).ok_or_else(|| self.tensor(name, supported(), type_name(format)))?;
            let offset = self.u64(&what)?;
            let shape: Option<Vec<usize>> = shape.iter().map(|n| usize::try_from(*n).ok()).collect();
            let shape = shape.ok_or_else(|| self.tensor(name, "a shape that fits the file", "a larger one"))?;
            let (&cols, rows) = shape.split_last().unwrap_or((&1, &[]));
            let bytes = format
                .row_bytes(cols)
                .and_then(|bytes| rows.iter().try_fold(bytes, |n, rows| n.checked_mul(*rows)))
                .ok_or_else(|| {
                    self.tensor(name, format!("a shape of whole blocks of {format}"), format!("{shape:?}"))
                })?;
            let start = usize::try_from(offset).ok().filter(|at| at.is_multiple_of(alignment));
            let start = start.ok_or_else(|| {
                self.tensor(name, format!("an offset that is a multiple of {alignment}"), offset.to_string())
            })?;
            let Some(end) = start.checked_add(bytes) else {
                return Err(self.tensor(name, format!("{bytes} bytes in the file"), format!("offset {offset}")));
            };
            entries.push(Entry { name: name.into(), format, shape, range: start..end });
        }
        // no data, no padding before it
        let start = if entries.iter().all(|e| e.range.is_empty()) { 0 } else { self.at.next_multiple_of(alignment) };
        let data = self.bytes.len().saturating_sub(start);
        let mut order: Vec<usize> = (0..entries.len()).collect();
        order.sort_by_key(|&i| (entries[i].range.start, entries[i].range.end));
        let (mut taken, mut last) = (0, "");
        for i in order {
            let Entry { name, range, .. } = &entries[i];
            if range.end > data {
                let found = format!("{data} bytes of data in the file: it is truncated, or its header is wrong");
                return Err(self.tensor(name, format!("data at {range:?}"), found));
            }
            if range.start < taken {
                let found = format!("offset {}, which overlaps {last}", range.start);
                return Err(self.tensor(name, format!("data from offset {taken} on"), found));
            }
            (taken, last) = (range.end, name);
        }
        for entry in &mut entries {
            entry.range = start + entry.range.start..start + entry.range.end;
        }
        Ok(entries)
    }

    fn tensor(&self, tensor: &str, expected: impl Into<String>, found: impl Into<String>) -> Error {
        Error::tensor(self.path, tensor, expected, found)
    }
}

/// The format of a type's number.
fn format_of(id: u32) -> Option<Format> {
    match id {
        0 => Some(Format::Plain(Dtype::F32)),
        1 => Some(Format::Plain(Dtype::F16)),
        30 => Some(Format::Plain(Dtype::Bf16)),
        _ => BLOCKS.into_iter().find(|block| block.id == id).map(Format::Block),
    }
}

fn supported() -> String {
    let names: Vec<&str> = BLOCKS.iter().map(|block| block.name).collect();
    format!("type F32, F16, BF16, {}", names.join(", "))
}

/// What ggml calls the types that aoji does not read.
fn type_name(id: u32) -> String {
    const NAMES: [(u32, &str); 26] = [
        (4, "Q4_2"),
        (5, "Q4_3"),
        (9, "Q8_1"),
        (10, "Q2_K"),
        (11, "Q3_K"),
        (15, "Q8_K"),
        (16, "IQ2_XXS"),
        (17, "IQ2_XS"),
        (18, "IQ3_XXS"),
        (19, "IQ1_S"),
        (20, "IQ4_NL"),
        (21, "IQ3_S"),
        (22, "IQ2_S"),
        (23, "IQ4_XS"),
        (24, "I8"),
        (25, "I16"),
        (26, "I32"),
        (27, "I64"),
        (28, "F64"),
        (29, "IQ1_M"),
        (31, "Q4_0_4_4"),
        (32, "Q4_0_4_8"),
        (33, "Q4_0_8_8"),
        (34, "TQ1_0"),
        (35, "TQ2_0"),
        (39, "MXFP4"),
    ];
    match NAMES.iter().find(|(n, _)| *n == id) {
        Some((_, name)) => format!("type {name}"),
        None => format!("type number {id}, which aoji does not know"),
    }
}
