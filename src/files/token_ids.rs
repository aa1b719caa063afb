//! Chooses the tokens that begin and end a text when the files of a checkpoint disagree.
//!
//! These files are copied from model to model and outlive the vocabulary that they were written for. The published
//! `generation_config.json` of Llama-3-Ko-8B-Instruct-AOG has Llama 2's ids (BOS 1, EOS 2), and token 2 of Llama 3's
//! vocabulary is `#`: taken at its word, an answer would end at its first heading and never at `<|end_of_text|>`. So
//! every file is asked, and of the ids that they name only those count that were added to the vocabulary, special or
//! not: an ordinary piece of text cannot be meant.

use std::path::Path;

use serde_json::Value;

use crate::{
    error::Result,
    files::{config::Config, json},
    text::{Tokenizer, TokenizerConfig},
};

/// Sets `bos` and `eos` of `config` to the added tokens that the files in `dir` name, those of `generation_config.json` first;
/// others are left out with a warning. Where no file names such a token, `config` keeps what it has.
///
/// # Errors
/// When `tokenizer_config.json` or `special_tokens_map.json` is not what it should be.
pub(crate) fn settle(config: &mut Config, dir: &Path, tokenizer: &Tokenizer) -> Result<()> {
    let texts = TokenizerConfig::read(dir)?.named();
    let vocab = config.vocab;
    let choose = |kind: &str| {
        let key = format!("{kind}_token_id");
        let ids = ["generation_config.json", "config.json"].map(|file| (file, ids(&dir.join(file), &key)));
        let text = texts.get(&format!("{kind}_token")).and_then(|text| tokenizer.token_id(text));
        let mut named: Vec<_> =
            ids.into_iter().chain([("tokenizer_config.json", text.into_iter().collect())]).collect();
        // The model never gives an id for which it has no row; reading the configuration has warned of it.
        named.iter_mut().for_each(|(_, ids)| ids.retain(|&id| (id as usize) < vocab));
        added(dir, &key, named.into_iter(), tokenizer)
    };
    let (bos, eos) = (choose("bos"), choose("eos"));
    config.bos = bos.first().copied().or(config.bos);
    if !eos.is_empty() {
        config.eos = eos;
    }
    Ok(())
}

/// The added tokens among those that each file names, without repeats.
fn added(
    dir: &Path,
    key: &str,
    named: impl Iterator<Item = (&'static str, Vec<u32>)>,
    tokenizer: &Tokenizer,
) -> Vec<u32> {
    let (mut chosen, mut others) = (Vec::new(), Vec::new());
    for (file, id) in named.flat_map(|(file, ids)| ids.into_iter().map(move |id| (file, id))) {
        if !tokenizer.is_added(id) {
            others.push((file, id));
        } else if !chosen.contains(&id) {
            chosen.push(id);
        }
    }
    let outcome = if chosen.is_empty() { "but no file names one" } else { "so it is ignored" };
    for (file, id) in others {
        let token = tokenizer.token(id).map_or("no token".into(), |token| format!("{token:?}"));
        let path = dir.join(file);
        tracing::warn!(
            "{}: {key} {id} is {token}, a word and not an added token of tokenizer.json, {outcome}",
            path.display()
        );
    }
    chosen
}

/// What a file of JSON has under `key`: an id, or a list of them. [`Config::from_dir`] has checked it.
fn ids(path: &Path, key: &str) -> Vec<u32> {
    let value: Option<Value> = json::read(path).ok().and_then(|text| json::parse(&text).ok());
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value.as_ref().and_then(|map| map.get(key)) {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}
