//! The vocabulary of a GGUF file: its tokens with their kinds, and those that begin and end a text.

use super::{Gguf, Kind};
use crate::error::Result;
use serde_json::{Map, Value as Json, json};

/// What `tokenizer.ggml.token_type` says of a token.
pub(super) mod kind {
    pub const UNKNOWN: u32 = 2;
    pub const CONTROL: u32 = 3;
    pub const USER_DEFINED: u32 = 4;
    pub const BYTE: u32 = 6;
}

/// Control tokens that end an answer whether or not a key says so: files have a key for one, models use several.
const ENDS: [&str; 5] = ["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>"];

impl Gguf {
    /// The tokens, id by id, and their kinds.
    pub(super) fn tokens(&self) -> Result<(Vec<&str>, Vec<u32>)> {
        let Some(tokens) = self.strings("tokenizer.ggml.tokens")? else {
            return self.wrong("tokenizer.ggml.tokens is missing, expected the vocabulary".into());
        };
        let key = "tokenizer.ggml.token_type";
        let kinds = self.words(key, "a number for each token", &[Kind::I32, Kind::U32], u32::from_le_bytes)?;
        let kinds = kinds.unwrap_or_else(|| vec![1; tokens.len()]);
        if kinds.len() != tokens.len() {
            let (n, found) = (tokens.len(), kinds.len());
            return self.wrong(format!("{key} has {found} numbers, tokenizer.ggml.tokens {n} tokens"));
        }
        Ok((tokens, kinds))
    }

    /// The id under `tokenizer.ggml.{name}_token_id`, when there is such a token.
    pub(super) fn special(&self, name: &str, tokens: &[&str]) -> Result<Option<u32>> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        match self.whole(&key)? {
            None => Ok(None),
            Some(id) if id < tokens.len() as u64 => Ok(Some(id as u32)),
            Some(id) => self.wrong(format!("{key} is {id}, there are {} tokens", tokens.len())),
        }
    }

    /// Ids that end a text: of the keys, and of tokens whose name says so.
    pub(super) fn ends(&self) -> Result<Vec<u32>> {
        if self.get("tokenizer.ggml.tokens").is_none() {
            return Ok(Vec::new());
        }
        let (tokens, kinds) = self.tokens()?;
        let mut ids = Vec::new();
        for name in ["eos", "eot", "eom"] {
            ids.extend(self.special(name, &tokens)?);
        }
        let named =
            |(id, token): (u32, &&str)| (kinds[id as usize] == kind::CONTROL && ENDS.contains(token)).then_some(id);
        ids.extend((0..).zip(&tokens).filter_map(named));
        Ok(ids)
    }

    /// The `tokenizer_config.json` that the keys stand for.
    ///
    /// # Errors
    /// [`Error::File`](crate::Error::File) when a key is not what it should be.
    pub fn tokenizer_config(&self) -> Result<Json> {
        let mut map = Map::new();
        if self.get("tokenizer.ggml.tokens").is_some() {
            let (tokens, _) = self.tokens()?;
            for (name, own) in [("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")] {
                if let Some(id) = self.special(own, &tokens)? {
                    map.insert(format!("{name}_token"), json!(tokens[id as usize]));
                }
            }
        }
        if let Some(template) = self.text("tokenizer.chat_template")? {
            map.insert("chat_template".into(), json!(template));
        }
        Ok(Json::Object(map))
    }
}
