//! The `config.json` that the keys of a GGUF file stand for.

use super::{Gguf, Kind, Value};
use crate::{
    error::{Error, Result},
    files::{
        config::{Config, Dtype},
        format::Format,
    },
};
use serde_json::{Map, Value as Json, json};

/// Keys of sizes and numbers, and what `config.json` calls them.
const NAMES: [(&str, &str); 9] = [
    ("llama.embedding_length", "hidden_size"),
    ("llama.feed_forward_length", "intermediate_size"),
    ("llama.block_count", "num_hidden_layers"),
    ("llama.attention.head_count_kv", "num_key_value_heads"),
    ("llama.attention.head_count", "num_attention_heads"),
    ("llama.attention.key_length", "head_dim"),
    ("llama.context_length", "max_position_embeddings"),
    ("llama.attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ("llama.rope.freq_base", "rope_theta"),
];

/// Keys that would make another model of it, and the values with which they do not.
const PLAIN: [(&str, f64); 4] = [
    ("llama.expert_count", 0.0),
    ("llama.attention.sliding_window", 0.0),
    ("llama.logit_scale", 1.0),
    ("llama.attention.clamp_kqv", 0.0),
];

/// Factors that the rotary frequencies are divided by.
pub(in crate::files) const ROPE_FREQS: &str = "rope_freqs.weight";

impl Gguf {
    /// The configuration.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another architecture than `llama`, and for what a Llama here does not compute;
    /// [`Error::File`] for keys that are missing, malformed or contradictory.
    pub fn config(&self) -> Result<Config> {
        match self.text("general.architecture")? {
            Some("llama") => {}
            Some(other) => return self.unsupported(format!("architecture {other:?}; supported: \"llama\"")),
            None => return self.wrong("general.architecture is missing, expected \"llama\"".into()),
        }
        for (key, plain) in PLAIN {
            if let Some(found) = self.number(key)?.filter(|found| *found != plain) {
                return self.unsupported(format!("{key} is {found}; supported: {plain}, or no such key"));
            }
        }
        let mut map = Map::from_iter([("model_type".into(), json!("llama"))]);
        for (key, name) in NAMES {
            if let Some(value) = self.json(key)? {
                map.insert(name.into(), value);
            }
        }
        map.insert("vocab_size".into(), json!(self.vocab()?));
        map.insert("tie_word_embeddings".into(), json!(self.entry("output.weight").is_none()));
        map.insert("rope_scaling".into(), self.rope_scaling()?);
        map.insert("bos_token_id".into(), json!(self.bos()?));
        map.insert("eos_token_id".into(), json!(self.ends()?));
        map.insert("torch_dtype".into(), json!(self.dtype().hf_name()));

        let mut config = Config::from_json(&self.path, &Json::Object(map).to_string(), None).map_err(|e| match e {
            // in the words of this file
            Error::File { path, what } => Error::File { path, what: renamed(what) },
            Error::Unsupported { path, what } => Error::Unsupported { path, what: renamed(what) },
            other => other,
        })?;
        self.warn_of_ids()?;
        for key in ["llama.rope.dimension_count", "llama.attention.value_length"] {
            if let Some(n) = self.whole(key)?.filter(|n| *n != config.head_dim as u64) {
                return self.unsupported(format!("{key} is {n}; supported: that of a head, {}", config.head_dim));
            }
        }
        if let Some((shard, entry)) = self.entry(ROPE_FREQS) {
            let n = config.head_dim / 2;
            let wrong = |found: String| {
                Error::tensor(shard.path(), ROPE_FREQS, format!("f32 [{n}], one for each pair of a head"), found)
            };
            if entry.format != Format::Plain(Dtype::F32) || entry.shape != [n] {
                return Err(wrong(format!("{} {:?}", entry.format, entry.shape)));
            }
            let factors = Dtype::F32.to_f32(&shard.bytes()[entry.range.clone()]);
            if let Some(factor) = factors.iter().find(|f| !f.is_finite() || **f <= 0.0) {
                return Err(wrong(format!("{factor} among them, where all are positive")));
            }
            config.rope_factors = factors;
        }
        Ok(config)
    }

    /// Rows of the embedding; without one, what the keys say.
    fn vocab(&self) -> Result<Option<u64>> {
        match self.entry("token_embd.weight") {
            Some((_, entry)) => Ok(entry.shape.first().map(|n| *n as u64)),
            None => self.whole("llama.vocab_size"),
        }
    }

    /// The token that begins a text.
    fn bos(&self) -> Result<Option<u32>> {
        match self.get("tokenizer.ggml.tokens") {
            Some(Value::Array(_, tokens, _)) => self.special("bos", *tokens),
            _ => self.special("bos", usize::MAX), // the configuration says what is out of range
        }
    }

    /// Type of the matrices where they are plain.
    fn dtype(&self) -> Dtype {
        match self.entry("blk.0.attn_q.weight").map(|(_, entry)| entry.format) {
            Some(Format::Plain(dtype)) => dtype,
            _ => Dtype::Bf16,
        }
    }

    /// A number, as JSON has it; an array with one for each layer is that number when they are all the same.
    fn json(&self, key: &str) -> Result<Option<Json>> {
        match self.get(key) {
            Some(Value::Uint(n)) => Ok(Some(json!(n))),
            Some(Value::Array(..)) => {
                let what = "a number, or one for each layer";
                let all = self.words(key, what, &[Kind::U32, Kind::I32], u32::from_le_bytes)?.unwrap_or_default();
                let layers = self.whole("llama.block_count")?.unwrap_or_default();
                match all.split_first() {
                    _ if all.len() as u64 != layers => {
                        self.wrong(format!("{key} has {} numbers, expected one for each of {layers} layers", all.len()))
                    }
                    Some((first, rest)) if rest.iter().all(|n| n == first) => Ok(Some(json!(first))),
                    _ => {
                        let some: Vec<String> = all.iter().take(8).map(u32::to_string).collect();
                        let more = if all.len() > some.len() { ", ..." } else { "" };
                        self.unsupported(format!("{key} differs between layers: {}{more}", some.join(", ")))
                    }
                }
            }
            _ => Ok(self.number(key)?.map(|x| json!(x))),
        }
    }

    fn rope_scaling(&self) -> Result<Json> {
        let number = |name: &str| self.number(&format!("llama.rope.scaling.{name}"));
        let factor = match number("factor")? {
            None => self.number("llama.rope.scale_linear")?, // its older name
            some => some,
        };
        let factor = factor.filter(|factor| *factor != 0.0);
        let attention = number("attn_factor")?.filter(|x| *x != 0.0).unwrap_or(1.0);
        match self.text("llama.rope.scaling.type")? {
            Some("none") => Ok(Json::Null),
            None | Some("linear") => match factor {
                None | Some(1.0) => Ok(Json::Null),
                Some(factor) => Ok(json!({"rope_type": "linear", "factor": factor})),
            },
            Some("yarn") => {
                let factor = factor.unwrap_or(1.0);
                let mut map = Map::from_iter([
                    ("rope_type".into(), json!("yarn")),
                    ("factor".into(), json!(factor)),
                    // there it is a factor of YaRN's own
                    ("attention_factor".into(), json!(attention * (1.0 + 0.1 * factor.ln()))),
                ]);
                let original = self.whole("llama.rope.scaling.original_context_length")?;
                map.insert("original_max_position_embeddings".into(), json!(original));
                for (key, name) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")] {
                    map.insert(name.into(), json!(number(key)?));
                }
                Ok(Json::Object(map))
            }
            Some(other) => Ok(json!({"rope_type": other})),
        }
    }
}

fn renamed(what: String) -> String {
    NAMES.iter().fold(what, |what, (key, name)| what.replace(name, key)).replace("vocab_size", "the vocabulary")
}
