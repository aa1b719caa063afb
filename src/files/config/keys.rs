//! Typed access to a JSON object of a checkpoint.

use super::Dtype;
use crate::{
    error::{Error, Result},
    files::json,
};
use serde_json::{Map, Value};
use std::path::Path;

/// Parses a JSON object.
pub(super) fn object(path: &Path, text: &str) -> Result<Map<String, Value>> {
    match json::parse(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::file(path, "is not a JSON object")),
        Err(e) => Err(Error::file(path, format!("is not valid JSON: {e}"))),
    }
}

/// Typed access to a JSON object; an error names the file, the key, the value found and what was expected. A key
/// that is `null` counts as absent, as in transformers.
pub(super) struct Keys<'a> {
    pub path: &'a Path,
    pub map: &'a Map<String, Value>,
}

impl Keys<'_> {
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|v| !v.is_null())
    }

    pub fn wrong<T>(&self, what: String) -> Result<T> {
        Err(Error::file(self.path, what))
    }

    pub fn unsupported<T>(&self, what: String) -> Result<T> {
        Err(Error::Unsupported { path: self.path.to_path_buf(), what })
    }

    pub fn optional_size(&self, name: &str, max: usize) -> Result<Option<usize>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if n >= 1 && n <= max as u64 => Ok(Some(n as usize)),
            _ => self.wrong(format!("{name} is {}, expected a whole number from 1 to {max}", brief(value))),
        }
    }

    pub fn size(&self, name: &str, max: usize) -> Result<usize> {
        match self.optional_size(name, max)? {
            Some(n) => Ok(n),
            None => self.wrong(format!("{name} is missing, expected a whole number from 1 to {max}")),
        }
    }

    pub fn number(&self, name: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x.is_finite() => Ok(Some(x)),
            _ => self.wrong(format!("{name} is {}, expected a number", brief(value))),
        }
    }

    pub fn flag(&self, name: &str) -> Result<bool> {
        match self.get(name) {
            None => Ok(false),
            Some(Value::Bool(b)) => Ok(*b),
            Some(value) => self.wrong(format!("{name} is {}, expected true or false", brief(value))),
        }
    }

    pub fn text(&self, name: &str) -> Result<Option<&str>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(value) => self.wrong(format!("{name} is {}, expected a string", brief(value))),
        }
    }

    /// A token id or a list of ids, without repeats; empty when absent. An id outside the vocabulary is left out with a
    /// warning: files are copied from model to model, and some programs write -1 for "none".
    pub fn token_ids(&self, name: &str, vocab: usize) -> Result<Vec<u32>> {
        let values = match self.get(name) {
            None => &[],
            Some(Value::Array(values)) => values.as_slice(),
            Some(value) => std::slice::from_ref(value),
        };
        let mut ids = Vec::new();
        for value in values {
            match (value.as_i64(), brief(value)) {
                // vocab <= MAX_SIZE, so the id fits.
                (Some(id), _) if (0..vocab as i64).contains(&id) => {
                    if !ids.contains(&(id as u32)) {
                        ids.push(id as u32);
                    }
                }
                (Some(_), id) => {
                    let path = self.path.display();
                    tracing::warn!("{path}: {name} {id} is no token, vocab_size is {vocab}: it is ignored");
                }
                (None, found) => {
                    return self.wrong(format!("{name} is {found}, expected token ids below vocab_size ({vocab})"));
                }
            }
        }
        Ok(ids)
    }

    pub fn dtype(&self) -> Result<Dtype> {
        // transformers 5 writes `dtype`, before that it was `torch_dtype`.
        let name = match self.text("dtype")? {
            Some(name) => Some(name),
            None => self.text("torch_dtype")?,
        };
        let known = [Dtype::Bf16, Dtype::F16, Dtype::F32].into_iter().find(|d| Some(d.hf_name()) == name);
        Ok(known.unwrap_or(Dtype::F32))
    }

    /// Refuses settings that would silently compute something other than what the model's author meant.
    pub fn check_supported(&self) -> Result<()> {
        if let Some(act) = self.text("hidden_act")?.filter(|&act| act != "silu") {
            return self.unsupported(format!("hidden_act {act:?}; supported: \"silu\""));
        }
        if let Some(part) = self.number("partial_rotary_factor")?.filter(|&part| part != 1.0) {
            return self.unsupported(format!("partial_rotary_factor {part}; supported: 1"));
        }
        Ok(())
    }
}

/// A JSON value for an error message, cut when long.
pub(super) fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
