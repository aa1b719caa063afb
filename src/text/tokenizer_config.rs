//! Reads `tokenizer_config.json`: chat templates, and what it says about special tokens that `tokenizer.json` does not.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::tokenizer_file::vocab;
use crate::{
    error::{Error, Result},
    files::{gguf::Gguf, json},
};

/// Names of the special tokens that every tokenizer of transformers may have.
const TOKENS: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The file, empty if there is none, together with `special_tokens_map.json`, which older checkpoints have beside it.
pub(crate) struct TokenizerConfig {
    pub path: PathBuf,
    pub chat_template: Option<ChatTemplate>,
    map: Map<String, Value>,
    listed: BTreeMap<u32, Listed>,
}

/// A chat template, or several by name.
#[derive(Deserialize)]
#[serde(untagged)]
pub(crate) enum ChatTemplate {
    One(String),
    Named(Vec<Named>),
}

/// A template and its name.
#[derive(Deserialize)]
pub(crate) struct Named {
    pub name: String,
    pub template: String,
}

/// The file as it is written.
#[derive(Deserialize, Default)]
struct File {
    chat_template: Option<ChatTemplate>,
    added_tokens_decoder: Option<BTreeMap<u32, Listed>>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// An entry of `added_tokens_decoder`; what is absent means what it means to transformers.
#[derive(Deserialize)]
struct Listed {
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    normalized: Option<bool>,
    #[serde(default)]
    special: bool,
}

impl TokenizerConfig {
    /// Reads the file of the checkpoint in `dir`, or makes it of the keys if `dir` is a GGUF file.
    ///
    /// # Errors
    /// [`Error::File`] when a file is not what it should be.
    pub fn read(dir: &Path) -> Result<Self> {
        if dir.is_file() {
            return Self::of_gguf(&Gguf::open(dir)?);
        }
        let path = dir.join("tokenizer_config.json");
        let File { chat_template, added_tokens_decoder, rest } = read_json(&path)?.unwrap_or_default();
        let mut map: Map<_, _> = read_json(&dir.join("special_tokens_map.json"))?.unwrap_or_default();
        map.extend(rest.into_iter().filter(|(_, value)| !value.is_null()));
        Ok(Self { path, chat_template, map, listed: added_tokens_decoder.unwrap_or_default() })
    }

    /// Makes it of the keys of a GGUF file.
    pub fn of_gguf(gguf: &Gguf) -> Result<Self> {
        let file = serde_json::from_value(gguf.tokenizer_config()?);
        let File { chat_template, rest: map, .. } = file.map_err(|e| Error::file(gguf.path(), e.to_string()))?;
        Ok(Self { path: gguf.path().into(), chat_template, map, listed: BTreeMap::new() })
    }

    /// Texts of the special tokens by name: `bos_token`, `eos_token` and so on, and those that a model names for itself
    /// (`image_token`).
    pub fn named(&self) -> BTreeMap<String, String> {
        let usual = TOKENS.iter().filter_map(|&name| Some((name, self.map.get(name)?)));
        let own = self.map.get("extra_special_tokens").and_then(Value::as_object).into_iter().flatten();
        let all = usual.chain(own.map(|(name, value)| (name.as_str(), value)));
        all.filter_map(|(name, value)| Some((name.to_string(), text(value)?))).collect()
    }

    /// Texts of the special tokens that have no name.
    pub fn additional(&self) -> Vec<String> {
        let lists = ["additional_special_tokens", "extra_special_tokens"].map(|key| self.map.get(key));
        lists.into_iter().flatten().filter_map(Value::as_array).flatten().filter_map(text).collect()
    }

    /// The tokens to add to those of `tokenizer.json`, as transformers does: tokens that only this file lists, and
    /// tokens that only this file calls special. A name that has no entry and is not in the vocabulary is not a token:
    /// it was left over from another model, whose ids are not this model's.
    pub fn added_tokens(&self, hf: &tokenizers::Tokenizer) -> Vec<AddedToken> {
        let there = hf.get_added_vocabulary().get_added_tokens_decoder();
        let special: Vec<String> = self.named().into_values().chain(self.additional()).collect();
        let mut next = vocab(hf) as u32;
        let mut tokens: Vec<AddedToken> = Vec::new();
        for (&id, listed) in &self.listed {
            let place = hf.token_to_id(&listed.content).unwrap_or(next);
            if place != id {
                let (path, content) = (self.path.display(), &listed.content);
                tracing::warn!(
                    "{path}: {content:?} has id {id}, its place in tokenizer.json is {place}; {place} is used"
                );
            }
            next += u32::from(place == next);
            let mut token = listed.token();
            token.special |= special.contains(&token.content) || there.get(&place).is_some_and(|t| t.special);
            tokens.push(token);
        }
        for content in special {
            let Some(id) = hf.token_to_id(&content).filter(|_| tokens.iter().all(|t| t.content != content)) else {
                continue;
            };
            let token = there.get(&id).cloned().unwrap_or_else(|| AddedToken::from(content, true));
            tokens.push(token.special(true));
        }
        tokens.retain(|token| there.get(&hf.token_to_id(&token.content).unwrap_or(u32::MAX)) != Some(token));
        tokens
    }
}

impl Listed {
    fn token(&self) -> AddedToken {
        let token = AddedToken::from(self.content.as_str(), self.special);
        let normalized = self.normalized.unwrap_or(token.normalized);
        token.single_word(self.single_word).lstrip(self.lstrip).rstrip(self.rstrip).normalized(normalized)
    }
}

/// A token is written as its text, or as an object with its text and flags.
fn text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_string)
}

/// `tokenizer_config.json` of the checkpoint in `dir`, or what the keys say if `dir` is a GGUF file; empty where there
/// is no such thing.
///
/// # Errors
/// [`Error::File`] when it is no JSON object or a link that leads nowhere, [`Error::Io`] when it cannot be read.
#[cfg(feature = "server")]
pub fn tokenizer_config(dir: &Path) -> Result<Map<String, Value>> {
    if dir.is_file() {
        return Ok(Gguf::open(dir)?.tokenizer_config()?.as_object().cloned().unwrap_or_default());
    }
    Ok(read_json(&dir.join("tokenizer_config.json"))?.unwrap_or_default())
}

fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Option<T>> {
    let Some(text) = json::read_optional(path)? else { return Ok(None) };
    json::parse(&text).map(Some).map_err(|e| Error::file(path, e.to_string()))
}
