//! GGUF: a model in one file, or in pieces that are named `NAME-00001-of-0000N.gguf`.
//!
//! A GGUF file has keys for what a Hugging Face checkpoint keeps in `config.json`, `tokenizer.json` and
//! `tokenizer_config.json`. The keys are turned into these files, so that one check and one reader serve both. GGUF's
//! names appear here only.
mod config;
mod export;
mod find;
mod header;
mod tokenizer;
mod vocabulary;
mod weights;
mod writer;

pub use header::{Entry, Header, Kind, Value, read_header};

pub(in crate::files) use config::ROPE_FREQS;
pub(in crate::files) use export::export;
pub(crate) use find::choose;
pub(in crate::files) use weights::{gguf_name, pairs};
pub(in crate::files) use writer::Writer;

use super::weights::Shard;
use crate::error::{Error, Result};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

/// A GGUF file with its other pieces, mapped; the headers are checked.
pub struct Gguf {
    /// The first has the keys.
    files: Vec<(Arc<Shard>, Header)>,
    path: PathBuf,
}

impl Gguf {
    /// Maps the file at `path`, and the other pieces when it is one of several. No page of data is read.
    ///
    /// # Errors
    /// Those of [`read_header`]; [`Error::File`] when a piece is missing or does not belong to this model.
    pub fn open(path: &Path) -> Result<Gguf> {
        let mut files = Vec::new();
        for (i, path) in find::pieces(path)?.into_iter().enumerate() {
            let shard = Arc::new(Shard::map(path.clone(), i)?);
            let header = read_header(&path, shard.bytes())?;
            files.push((shard, header));
        }
        let gguf = Gguf { path: path.to_path_buf(), files };
        for (i, (shard, header)) in gguf.files.iter().enumerate() {
            let number = |key: &str| match header.keys.get(key) {
                Some(Value::Uint(n)) => *n,
                _ => 0,
            };
            let (no, count, n) = (number("split.no"), number("split.count").max(1), gguf.files.len() as u64);
            if (no, count) != (i as u64, n) {
                let what = format!(
                    "is piece {} of {count} by its keys and {} of {n} by its name: the pieces of a model are \
                     NAME-00001-of-0000N.gguf and so on, in one directory",
                    no + 1,
                    i + 1
                );
                return Err(Error::file(shard.path(), what));
            }
        }
        Ok(gguf)
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the first file before its data: keys, and what the tensors are.
    pub(crate) fn header_bytes(&self) -> u64 {
        let (shard, header) = &self.files[0];
        header.tensors.iter().map(|t| t.range.start).min().unwrap_or(shard.bytes().len()) as u64
    }

    fn wrong<T>(&self, what: String) -> Result<T> {
        Err(Error::file(&self.path, what))
    }

    fn unsupported<T>(&self, what: String) -> Result<T> {
        Err(Error::Unsupported { path: self.path.clone(), what })
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.files[0].1.keys.get(key)
    }

    /// A key that is `what`, as `of` takes it.
    fn typed<'a, T>(&'a self, key: &str, what: &str, of: impl FnOnce(&'a Value) -> Option<T>) -> Result<Option<T>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match of(value) {
                Some(value) => Ok(Some(value)),
                None => self.wrong(format!("{key} is {}, expected {what}", value.brief())),
            },
        }
    }

    fn text(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", |value| match value {
            Value::Str(text) => Some(text.as_str()),
            _ => None,
        })
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", |value| match value {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    fn whole(&self, key: &str) -> Result<Option<u64>> {
        self.typed(key, "a whole number", |value| match value {
            Value::Uint(n) => Some(*n),
            _ => None,
        })
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", |value| match value {
            Value::Uint(n) => Some(*n as f64),
            Value::Int(n) => Some(*n as f64),
            Value::Float(x) if x.is_finite() => Some(*x),
            _ => None,
        })
    }

    fn strings(&self, key: &str) -> Result<Option<Vec<&str>>> {
        let bytes = self.files[0].0.bytes();
        self.typed(key, "a list of strings", |value| match value {
            Value::Array(Kind::Str, _, range) => Some(header::strings(bytes, range).collect()),
            _ => None,
        })
    }

    /// An array of elements of 4 bytes.
    fn words<T>(&self, key: &str, what: &str, kinds: &[Kind], of: fn([u8; 4]) -> T) -> Result<Option<Vec<T>>> {
        let bytes = self.files[0].0.bytes();
        self.typed(key, what, |value| match value {
            Value::Array(kind, _, range) if kinds.contains(kind) => {
                Some(bytes[range.clone()].as_chunks().0.iter().copied().map(of).collect())
            }
            _ => None,
        })
    }

    /// A tensor's entry, whichever piece has it.
    fn entry(&self, name: &str) -> Option<(&Arc<Shard>, &Entry)> {
        let mut files = self.files.iter();
        files.find_map(|(shard, header)| Some((shard, header.tensors.iter().find(|t| t.name == name)?)))
    }
}
