//! The vocabulary of a GGUF file: its tokens with their kinds, and those that begin and end a text.

use super::{Gguf, Kind, Value};
use crate::error::Result;
use serde_json::{Map, Value as Json, json};

/// What `tokenizer.ggml.token_type` says of a token.
pub(super) mod kind {
    pub const NORMAL: u32 = 1;
    pub const UNKNOWN: u32 = 2;
    pub const CONTROL: u32 = 3;
    pub const USER_DEFINED: u32 = 4;
    pub const UNUSED: u32 = 5;
    pub const BYTE: u32 = 6;
}

/// Most bytes of a token. Published vocabularies have tokens of a few hundred bytes at most (runs of blanks or of box
/// drawings); reading a SentencePiece vocabulary takes time that grows with the square of this.
const MAX_TOKEN: usize = 1024;

/// The keys of single tokens: `tokenizer.ggml.NAME_token_id`.
const SPECIAL: [&str; 6] = ["bos", "eos", "eot", "eom", "unknown", "padding"];

/// Tokens that end an answer whether or not a key says so: files have a key for one, but models use several. They count
/// as control tokens whatever their type says: some converters give them the type of a word or of a user's token.
const ENDS: [&str; 5] = ["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>"];

impl Gguf {
    /// The tokens, id by id, and their kinds.
    pub(super) fn tokens(&self) -> Result<(Vec<&str>, Vec<u32>)> {
        let Some(tokens) = self.strings("tokenizer.ggml.tokens")? else {
            return self.wrong("tokenizer.ggml.tokens is missing, expected the vocabulary".into());
        };
        let key = "tokenizer.ggml.token_type";
        let kinds = self.words(key, "a number for each token", &[Kind::I32, Kind::U32], u32::from_le_bytes)?;
        let mut kinds = kinds.unwrap_or_else(|| vec![kind::NORMAL; tokens.len()]);
        if kinds.len() != tokens.len() {
            let (n, found) = (tokens.len(), kinds.len());
            return self.wrong(format!("{key} has {found} numbers, tokenizer.ggml.tokens {n} tokens"));
        }
        if let Some((id, token)) = tokens.iter().enumerate().find(|(_, token)| token.len() > MAX_TOKEN) {
            let len = token.len();
            return self
                .wrong(format!("token {id} of tokenizer.ggml.tokens has {len} bytes, expected up to {MAX_TOKEN}"));
        }
        for (token, kind) in tokens.iter().zip(&mut kinds) {
            if ENDS.contains(token) {
                *kind = kind::CONTROL;
            }
        }
        Ok((tokens, kinds))
    }

    /// The id under `tokenizer.ggml.{name}_token_id`, when there is such a token. An id that no token has is not an
    /// error: files are made from files with other vocabularies, and some programs write -1 for "none".
    pub(super) fn special(&self, name: &str, tokens: usize) -> Result<Option<u32>> {
        let id = self.typed(&format!("tokenizer.ggml.{name}_token_id"), "a whole number", |value| match value {
            Value::Uint(id) => Some(Some(*id)),
            Value::Int(_) => Some(None),
            _ => None,
        })?;
        Ok(id.flatten().filter(|id| *id < tokens as u64).map(|id| id as u32))
    }

    /// Warns of keys whose id no token has.
    pub(super) fn warn_of_ids(&self) -> Result<()> {
        let Some(Value::Array(_, tokens, _)) = self.get("tokenizer.ggml.tokens") else { return Ok(()) };
        for name in SPECIAL {
            let key = format!("tokenizer.ggml.{name}_token_id");
            if let (Some(value), None) = (self.get(&key), self.special(name, *tokens)?) {
                let (path, id) = (self.path.display(), value.brief());
                tracing::warn!("{path}: {key} {id} is no token, there are {tokens} tokens: it is ignored");
            }
        }
        Ok(())
    }

    /// Ids that end a text: those of the keys, and those of tokens in [`ENDS`].
    pub(super) fn ends(&self) -> Result<Vec<u32>> {
        if self.get("tokenizer.ggml.tokens").is_none() {
            return Ok(Vec::new());
        }
        let (tokens, _) = self.tokens()?;
        let mut ids = Vec::new();
        for name in ["eos", "eot", "eom"] {
            ids.extend(self.special(name, tokens.len())?);
        }
        ids.extend((0..).zip(&tokens).filter_map(|(id, token)| ENDS.contains(token).then_some(id)));
        Ok(ids)
    }

    /// Makes a `tokenizer_config.json` of the keys.
    ///
    /// # Errors
    /// [`Error::File`](crate::Error::File) when a key is not what it should be.
    pub fn tokenizer_config(&self) -> Result<Json> {
        let mut map = Map::new();
        if self.get("tokenizer.ggml.tokens").is_some() {
            let (tokens, _) = self.tokens()?;
            for (name, own) in [("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")] {
                if let Some(id) = self.special(own, tokens.len())? {
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
