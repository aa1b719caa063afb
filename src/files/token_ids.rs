//! The tokens that begin and end a text, where the files of a checkpoint disagree.
//!
//! These files are copied from model to model and outlive the vocabulary that they were written for: the published
//! `generation_config.json` of Llama-3-Ko-8B-Instruct-AOG has Llama 2's ids (BOS 1, eos 2), and token 2 of Llama 3's vocabulary
//! is `#`. Taken at its word, an answer would end at its first heading and never at `<|end_of_text|>`. So every file is asked,
//! and of what they say only special tokens count: no other token can be meant.

use std::path::Path;

use serde_json::Value;

use crate::{
    error::Result,
    files::config::Config,
    text::{Tokenizer, special_tokens},
};

/// Sets `bos` and `eos` of `config` to the special tokens that the files in `dir` name, those of `generation_config.json` first;
/// others are left out with a warning. Where no file names a special token, `config` keeps what it has.
///
/// # Errors
/// When `tokenizer_config.json` or `special_tokens_map.json` is not what it should be.
pub(crate) fn settle(config: &mut Config, dir: &Path, tokenizer: &Tokenizer) -> Result<()> {
    let texts = special_tokens(dir)?;
    let choose = |kind: &str| {
        let key = format!("{kind}_token_id");
        let ids = ["generation_config.json", "config.json"].map(|file| (file, ids(&dir.join(file), &key)));
        let text = texts.get(&format!("{kind}_token")).and_then(|text| tokenizer.token_id(text));
        let named = ids.into_iter().chain([("tokenizer_config.json", text.into_iter().collect())]);
        special(dir, &key, named, tokenizer)
    };
    let (bos, eos) = (choose("bos"), choose("eos"));
    config.bos = bos.first().copied().or(config.bos);
    if !eos.is_empty() {
        config.eos = eos;
    }
    Ok(())
}

/// The special tokens among those that each file names, without repeats.
fn special(
    dir: &Path,
    key: &str,
    named: impl Iterator<Item = (&'static str, Vec<u32>)>,
    tokenizer: &Tokenizer,
) -> Vec<u32> {
    let (mut chosen, mut others) = (Vec::new(), Vec::new());
    for (file, id) in named.flat_map(|(file, ids)| ids.into_iter().map(move |id| (file, id))) {
        if !tokenizer.is_special(id) {
            others.push((file, id));
        } else if !chosen.contains(&id) {
            chosen.push(id);
        }
    }
    let outcome = if chosen.is_empty() { "but no file names one" } else { "so it is ignored" };
    for (file, id) in others {
        let token = tokenizer.token(id).map_or("no token".into(), |token| format!("{token:?}"));
        let path = dir.join(file);
        tracing::warn!("{}: {key} {id} is {token}, not a special token of tokenizer.json, {outcome}", path.display());
    }
    chosen
}

/// What a file of JSON has under `key`: an id, or a list of them. [`Config::from_dir`] has checked it.
fn ids(path: &Path, key: &str) -> Vec<u32> {
    let value: Option<Value> = std::fs::read(path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value.as_ref().and_then(|map| map.get(key)) {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}
