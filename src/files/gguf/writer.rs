//! Writes GGUF files: version 3, keys in the order in which they are set.

use super::{Kind, header::ALIGNMENT};

/// What comes before the data of a file.
#[derive(Default)]
pub(in crate::files) struct Writer {
    keys: Vec<u8>,
    n_keys: u64,
    tensors: Vec<u8>,
    n_tensors: u64,
    /// Where the next tensor begins in the data.
    end: u64,
}

impl Writer {
    fn key(&mut self, name: &str, kind: Kind) {
        put_text(&mut self.keys, name);
        self.keys.extend((kind as u32).to_le_bytes());
        self.n_keys += 1;
    }

    fn list(&mut self, name: &str, kind: Kind, len: usize) {
        self.key(name, Kind::Array);
        self.keys.extend((kind as u32).to_le_bytes());
        self.keys.extend((len as u64).to_le_bytes());
    }

    /// Sets a key.
    pub fn text(&mut self, name: &str, value: &str) {
        self.key(name, Kind::Str);
        put_text(&mut self.keys, value);
    }

    /// Sets a key.
    pub fn number(&mut self, name: &str, value: u32) {
        self.key(name, Kind::U32);
        self.keys.extend(value.to_le_bytes());
    }

    /// Sets a key.
    pub fn float(&mut self, name: &str, value: f32) {
        self.key(name, Kind::F32);
        self.keys.extend(value.to_le_bytes());
    }

    /// Sets a key.
    pub fn flag(&mut self, name: &str, value: bool) {
        self.key(name, Kind::Bool);
        self.keys.push(value.into());
    }

    /// Sets a key.
    pub fn texts<T: AsRef<str>>(&mut self, name: &str, values: &[T]) {
        self.list(name, Kind::Str, values.len());
        values.iter().for_each(|value| put_text(&mut self.keys, value.as_ref()));
    }

    /// Sets a key.
    pub fn numbers(&mut self, name: &str, values: &[i32]) {
        self.list(name, Kind::I32, values.len());
        values.iter().for_each(|value| self.keys.extend(value.to_le_bytes()));
    }

    /// Sets a key.
    pub fn floats(&mut self, name: &str, values: &[f32]) {
        self.list(name, Kind::F32, values.len());
        values.iter().for_each(|value| self.keys.extend(value.to_le_bytes()));
    }

    /// The next tensor: its name, its dimensions with the contiguous one last, the number of its type, its bytes.
    pub fn tensor(&mut self, name: &str, shape: &[usize], kind: u32, bytes: u64) {
        put_text(&mut self.tensors, name);
        self.tensors.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|n| self.tensors.extend((*n as u64).to_le_bytes()));
        self.tensors.extend(kind.to_le_bytes());
        self.tensors.extend(self.end.to_le_bytes());
        self.n_tensors += 1;
        self.end = (self.end + bytes).next_multiple_of(ALIGNMENT as u64);
    }

    /// Everything before the data, which begins after it.
    pub fn header(&self) -> Vec<u8> {
        let counts = [self.n_tensors, self.n_keys].map(u64::to_le_bytes).concat();
        let mut out = [b"GGUF", &3u32.to_le_bytes()[..], &counts, &self.keys, &self.tensors].concat();
        out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
        out
    }

    /// How many zero bytes are between a tensor of `bytes` bytes and the next one.
    pub fn padding(bytes: u64) -> usize {
        (bytes.next_multiple_of(ALIGNMENT as u64) - bytes) as usize
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}
