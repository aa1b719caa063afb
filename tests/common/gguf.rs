//! GGUF files, made here.
#![allow(dead_code)] // each test file uses a part of it

/// The value of a metadata key.
pub enum Val<'a> {
    U32(u32),
    F32(f32),
    Bool(bool),
    Str(&'a str),
    Strs(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
}

/// A file in the making.
#[derive(Default, Clone)]
pub struct File {
    keys: Vec<(String, Vec<u8>)>,
    /// Name, shape (the last dimension contiguous), type, bytes.
    pub tensors: Vec<(String, Vec<usize>, u32, Vec<u8>)>,
}

fn text(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
}

fn list<T>(kind: u32, items: &[T], bytes: impl Fn(&T) -> Vec<u8>) -> Vec<u8> {
    let mut out = [&9u32.to_le_bytes()[..], &kind.to_le_bytes(), &(items.len() as u64).to_le_bytes()].concat();
    items.iter().for_each(|item| out.extend(bytes(item)));
    out
}

impl File {
    /// Sets a key.
    pub fn set(&mut self, name: &str, value: Val) -> &mut File {
        let one = |kind: u32, bytes: &[u8]| [&kind.to_le_bytes()[..], bytes].concat();
        let bytes = match value {
            Val::U32(n) => one(4, &n.to_le_bytes()),
            Val::F32(x) => one(6, &x.to_le_bytes()),
            Val::Bool(b) => one(7, &[b as u8]),
            Val::Str(s) => one(8, &text(s)),
            Val::Strs(v) => list(8, &v, |s| text(s)),
            Val::I32s(v) => list(5, &v, |n| n.to_le_bytes().to_vec()),
            Val::F32s(v) => list(6, &v, |x| x.to_le_bytes().to_vec()),
        };
        self.set_raw(name, bytes)
    }

    /// Sets a key to a type's number and bytes.
    pub fn set_raw(&mut self, name: &str, bytes: Vec<u8>) -> &mut File {
        self.keys.retain(|(key, _)| key != name);
        self.keys.push((name.into(), bytes));
        self
    }

    /// Leaves out a key.
    pub fn unset(&mut self, name: &str) -> &mut File {
        self.keys.retain(|(key, _)| key != name);
        self
    }

    /// Its bytes. The data of each tensor begins at a multiple of 32.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = [&b"GGUF"[..], &3u32.to_le_bytes()].concat();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (name, value) in &self.keys {
            out.extend(text(name));
            out.extend(value);
        }
        let mut at = 0u64;
        for (name, shape, kind, data) in &self.tensors {
            out.extend(text(name));
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|n| out.extend((*n as u64).to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(at.to_le_bytes());
            at = (at + data.len() as u64).next_multiple_of(32);
        }
        for (.., data) in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(data);
        }
        out
    }
}
