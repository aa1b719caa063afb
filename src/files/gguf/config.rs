//! Makes a `config.json` of the keys of a GGUF file.

use super::{Gguf, Kind, Value};
use crate::{
    error::{Error, Result},
    files::{
        config::{Config, Dtype},
        format::Format,
    },
};
use serde_json::{Map, Value as Json, json};

/// Names of architectures, which are those of `model_type`; a Mistral is a "llama" too.
const ARCHS: [&str; 3] = ["llama", "qwen2", "qwen3"];

/// Keys of sizes and numbers after the architecture's name, and what `config.json` calls them.
const NAMES: [(&str, &str); 9] = [
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("block_count", "num_hidden_layers"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.key_length", "head_dim"),
    ("context_length", "max_position_embeddings"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ("rope.freq_base", "rope_theta"),
];

/// Keys after the architecture's name that would make another model of it, and the values with which they do not.
const PLAIN: [(&str, f64); 3] = [("expert_count", 0.0), ("logit_scale", 1.0), ("attention.clamp_kqv", 0.0)];

/// Of the architecture "llama" it makes a Mistral.
pub(super) const WINDOW: &str = "attention.sliding_window";

/// Factors that the rotary frequencies are divided by.
pub(in crate::files) const ROPE_FREQS: &str = "rope_freqs.weight";

impl Gguf {
    /// Makes the configuration.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for an architecture that there is none of here, and for what is not computed here;
    /// [`Error::File`] for keys that are missing, malformed or contradictory.
    pub fn config(&self) -> Result<Config> {
        let known = ARCHS.map(|name| format!("{name:?}")).join(", ");
        let arch = match self.text("general.architecture")? {
            Some(name) if ARCHS.contains(&name) => name,
            Some(name) => return self.unsupported(format!("architecture {name:?}; supported: {known}")),
            None => return self.wrong(format!("general.architecture is missing, expected one of {known}")),
        };
        for (name, plain) in PLAIN {
            if let Some(found) = self.number(&self.key(name)?)?.filter(|found| *found != plain) {
                return self.unsupported(format!("{arch}.{name} is {found}; supported: {plain}, or no such key"));
            }
        }
        let mut map = Map::from_iter([("model_type".into(), json!(arch))]);
        for (key, name) in NAMES {
            if let Some(value) = self.json(&self.key(key)?)? {
                map.insert(name.into(), value);
            }
        }
        let has_bias = |name: &str| self.entry(&format!("blk.0.{name}.bias")).is_some();
        map.insert("attention_bias".into(), json!(has_bias("attn_q")));
        map.insert("mlp_bias".into(), json!(has_bias("ffn_gate")));
        if let Some(window) = self.whole(&self.key(WINDOW)?)?.filter(|window| *window != 0) {
            if arch != "llama" || has_bias("attn_q") || has_bias("ffn_gate") {
                let what = format!("{arch}.{WINDOW} is {window}; supported: a window in \"llama\" without biases");
                return self.unsupported(what);
            }
            map.insert("model_type".into(), json!("mistral"));
            map.insert("sliding_window".into(), json!(window));
        }
        map.insert("vocab_size".into(), json!(self.vocab()?));
        map.insert("tie_word_embeddings".into(), json!(self.entry("output.weight").is_none()));
        map.insert("rope_scaling".into(), self.rope_scaling()?);
        map.insert("bos_token_id".into(), json!(self.bos()?));
        map.insert("eos_token_id".into(), json!(self.ends()?));
        map.insert("torch_dtype".into(), json!(self.dtype().hf_name()));

        let mut config = Config::from_json(&self.path, &Json::Object(map).to_string(), None).map_err(|e| match e {
            // in the words of this file
            Error::File { path, what } => Error::File { path, what: renamed(arch, what) },
            Error::Unsupported { path, what } => Error::Unsupported { path, what: renamed(arch, what) },
            other => other,
        })?;
        self.warn_of_ids()?;
        for key in ["rope.dimension_count", "attention.value_length"] {
            let key = self.key(key)?;
            if let Some(n) = self.whole(&key)?.filter(|n| *n != config.head_dim as u64) {
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

    /// A key of the architecture.
    fn key(&self, name: &str) -> Result<String> {
        Ok(format!("{}.{name}", self.text("general.architecture")?.unwrap_or_default()))
    }

    /// Rows of the embedding; without one, what the keys say.
    fn vocab(&self) -> Result<Option<u64>> {
        match self.entry("token_embd.weight") {
            Some((_, entry)) => Ok(entry.shape.first().map(|n| *n as u64)),
            None => self.whole(&self.key("vocab_size")?),
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

    /// A number as JSON. An array with one number for each layer becomes that number when all are the same.
    fn json(&self, key: &str) -> Result<Option<Json>> {
        match self.get(key) {
            Some(Value::Uint(n)) => Ok(Some(json!(n))),
            Some(Value::Array(..)) => {
                let what = "a number, or one for each layer";
                let all = self.words(key, what, &[Kind::U32, Kind::I32], u32::from_le_bytes)?.unwrap_or_default();
                let layers = self.whole(&self.key("block_count")?)?.unwrap_or_default();
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
        let key = |name: &str| self.key(&format!("rope.scaling.{name}"));
        let number = |name: &str| self.number(&key(name)?);
        let factor = match number("factor")? {
            None => self.number(&self.key("rope.scale_linear")?)?, // its older name
            some => some,
        };
        let factor = factor.filter(|factor| *factor != 0.0);
        let attention = number("attn_factor")?.filter(|x| *x != 0.0).unwrap_or(1.0);
        match self.text(&key("type")?)? {
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
                    // in GGUF this key is YaRN's own factor
                    ("attention_factor".into(), json!(attention * (1.0 + 0.1 * factor.ln()))),
                ]);
                let original = self.whole(&key("original_context_length")?)?;
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

fn renamed(arch: &str, what: String) -> String {
    NAMES
        .iter()
        .fold(what, |what, (key, name)| what.replace(name, &format!("{arch}.{key}")))
        .replace("vocab_size", "the vocabulary")
}
