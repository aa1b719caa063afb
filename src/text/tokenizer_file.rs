//! What `tokenizer.json` says, checked where the crate `tokenizers` does not. That crate panics on some files, and with some that it
//! reads on some texts: here both are errors.

use serde::Deserialize;
use serde_json::{Value, json};
use std::{
    any::Any,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
};
use tokenizers::{DecoderWrapper, Error, Tokenizer};

/// Ids are below this. Lists are made with a place for each id, and the largest published vocabularies have some hundred thousand.
const MAX_IDS: u32 = 1 << 24;

/// The parts of a file besides its model, and what the crate expects of each without saying so.
const PARTS: [(&str, &str); 4] = [
    ("normalizer", "for Precompiled, the precompiled_charsmap of a SentencePiece model"),
    ("pre_tokenizer", "for FixedLength, a length of at least 1"),
    ("post_processor", "a template `single` of Sequence A and tokens that special_tokens has"),
    ("decoder", "a known type with all of its fields"),
];

/// What the crate panicked with.
#[derive(Debug)]
struct Panicked(String);

impl fmt::Display for Panicked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the library `tokenizers` fails: {}", self.0)
    }
}

impl std::error::Error for Panicked {}

/// Makes a call into the crate, whose panic is an error. The message of the panic is also written to stderr, unless the program has
/// another hook for that.
pub(super) fn guarded<T>(call: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    // No call changes a tokenizer that is still used after it failed.
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|panic| Err(Panicked(message(&*panic)).into()))
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| text.to_string());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
}

/// The content of a file. An error is what is wrong with it.
pub(super) fn read(bytes: &[u8]) -> Result<Tokenizer, String> {
    // first: it says the line of a syntax error, on which the crate may panic
    let listed: Listed = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    let hf = guarded(|| Tokenizer::from_bytes(bytes)).map_err(|e| explain(bytes, e))?;
    // The crate numbers added tokens itself, and only logs when its id differs from the file's.
    for Added { id, content } in listed.added_tokens {
        let found = hf.token_to_id(&content);
        if found != Some(id) {
            let found = found.map_or("none".into(), |id| id.to_string());
            return Err(format!("added token {content:?} is listed with id {id}, its place gives {found}"));
        }
    }
    check_ids(&hf)?;
    match hf.get_decoder().is_some_and(strips_ends) {
        // where a text is shorter than that, the crate subtracts beyond 0
        true => {
            Err("its decoder has Strip with a `stop` above 0, expected 0: aoji strips a text at its beginning only"
                .into())
        }
        false => Ok(hf),
    }
}

/// No added token has an id for which no vocabulary is large enough.
pub(super) fn check_ids(hf: &Tokenizer) -> Result<(), String> {
    let added = hf.get_added_vocabulary().get_added_tokens_decoder();
    match added.iter().find(|(id, _)| **id >= MAX_IDS) {
        Some((id, token)) => Err(format!("token {:?} has id {id}, expected ids below {MAX_IDS}", token.content)),
        None => Ok(()),
    }
}

fn strips_ends(decoder: &DecoderWrapper) -> bool {
    match decoder {
        DecoderWrapper::Strip(strip) => strip.stop > 0,
        DecoderWrapper::Sequence(sequence) => sequence.get_decoders().iter().any(strips_ends),
        _ => false,
    }
}

/// What is wrong with a file that the crate cannot read or apply: the part of it with which it panics, or else what it says itself.
pub(super) fn explain(bytes: &[u8], error: Error) -> String {
    if !error.is::<Panicked>() {
        return error.to_string();
    }
    let file: Value = match serde_json::from_slice(bytes) {
        Ok(file) => file,
        Err(e) => return e.to_string(), // nested too deeply
    };
    if let Some(merge) = merge_of_no_token(&file["model"]) {
        return format!("its model has the merge {merge:?}, which makes no token of its vocabulary");
    }
    let fails = |part: &str| {
        let alone = json!({"model": {"type": "BPE", "vocab": {}, "merges": []}, part: file[part]}).to_string();
        guarded(|| Tokenizer::from_bytes(alone.as_bytes())?.encode_fast("a", true)).is_err_and(|e| e.is::<Panicked>())
    };
    match PARTS.into_iter().find(|(part, _)| fails(part)) {
        Some((part, expected)) => format!("its {part} cannot be applied, expected {expected}; {error}"),
        None => format!("its model cannot be applied; {error}"),
    }
}

/// A merge of BPE that the vocabulary has no token for.
fn merge_of_no_token(model: &Value) -> Option<String> {
    let vocab = model["vocab"].as_object()?;
    let prefix = model["continuing_subword_prefix"].as_str().unwrap_or_default().len();
    model["merges"].as_array()?.iter().find_map(|merge| {
        let (a, b) = match merge.as_str() {
            Some(both) => both.split_once(' ')?,
            None => (merge[0].as_str()?, merge[1].as_str()?),
        };
        let known = b.get(prefix..).is_some_and(|b| vocab.contains_key(&format!("{a}{b}")));
        (!known).then(|| format!("{a} {b}"))
    })
}

/// The part of the file that the crate does not check.
#[derive(Deserialize)]
struct Listed {
    #[serde(default)]
    added_tokens: Vec<Added>,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
}

/// One more than the highest id: that of the next added token.
pub(super) fn vocab(hf: &Tokenizer) -> usize {
    let added = hf.get_added_vocabulary().get_added_tokens_decoder();
    let highest = added.keys().max().map_or(0, |&id| id as usize + 1);
    hf.get_vocab_size(false).max(highest)
}
