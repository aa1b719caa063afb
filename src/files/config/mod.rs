//! `config.json` and `generation_config.json` of a Hugging Face checkpoint, checked once.
//!
//! Hugging Face names appear here and in [`crate::files::weights`] only. Absent keys mean what they mean to transformers'
//! class for the architecture; sizes without which there is no model (`hidden_size`, `vocab_size`, ...) must be there.

mod arch;
mod dtype;
mod keys;
mod rope;
mod sampling;

use std::path::Path;

pub use arch::Arch;
pub use dtype::Dtype;
use keys::{Keys, object};
pub use rope::RopeScaling;
pub use sampling::SamplingDefaults;

use super::json;
use crate::error::Result;

/// No size of a model exceeds this. It keeps every product of sizes in range (three of them times the bytes of an
/// element stay below 2^63) and refuses absurd files before anything is allocated.
const MAX_SIZE: usize = 1 << 24;
/// No model has more layers than this.
const MAX_LAYERS: usize = 1 << 10;

/// Sizes and constants of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Its architecture, and what that has beside the parts of all.
    pub arch: Arch,
    /// Width of the residual stream (`hidden_size`).
    pub dim: usize,
    /// Width of the feed-forward layer (`intermediate_size`).
    pub ffn_dim: usize,
    /// Number of layers (`num_hidden_layers`).
    pub n_layers: usize,
    /// Number of query heads (`num_attention_heads`).
    pub n_heads: usize,
    /// Number of key/value heads (`num_key_value_heads`); divides `n_heads`. Absent: `n_heads`, of
    /// Mistral 8, of Qwen 32.
    pub n_kv_heads: usize,
    /// Width of a head (`head_dim`); even. Absent: `dim / n_heads`, of Qwen3 128.
    pub head_dim: usize,
    /// Number of token ids (`vocab_size`).
    pub vocab: usize,
    /// Longest context in tokens: `max_position_embeddings` (absent: 2048, of Mistral 131072, of Qwen 32768), or what `rope_scaling` makes of it: times its
    /// factor for `linear` and `dynamic`, the original length times its factor for `yarn`.
    pub max_seq: usize,
    /// Added to the mean square in RMSNorm (`rms_norm_eps`). Absent: 1e-6.
    pub norm_eps: f32,
    /// Base of the rotary frequencies (`rope_theta`, or the same key in `rope_parameters`). Absent: 10000.
    pub rope_theta: f64,
    /// Change of the rotary frequencies for long contexts; `None` for type `default`.
    pub rope_scaling: Option<RopeScaling>,
    /// Each rotary frequency is finally divided by its element here, `[head_dim / 2]`. Empty for a `config.json`; a
    /// GGUF file may have it in place of `rope_scaling`.
    pub rope_factors: Vec<f32>,
    /// Whether the output head is the embedding (`tie_word_embeddings`). Absent: no.
    pub tied: bool,
    /// Token that begins a text, where the checkpoint names one.
    pub bos: Option<u32>,
    /// Tokens that end a text, without repeats; possibly none. They come from `generation_config.json` where it names
    /// any (as in transformers' `generate`), else from `config.json`. Ids outside the vocabulary are left out with a
    /// warning. Opening a model with a tokenizer replaces these, and `bos`, by the special tokens that its files name.
    pub eos: Vec<u32>,
    /// The declared element type (`torch_dtype`, newer `dtype`); f32 when it is absent or is a type that tensors here
    /// cannot have. Nothing is computed from it: every tensor carries its own type.
    pub dtype: Dtype,
    /// What `generation_config.json` recommends for sampling.
    pub sampling: SamplingDefaults,
}

impl Config {
    /// Reads `config.json`, and `generation_config.json` where there is one, of a model directory.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) when `config.json` cannot be read, else those of [`Config::from_json`].
    pub fn from_dir(dir: &Path) -> Result<Config> {
        let path = dir.join("config.json");
        let config = json::read(&path)?;
        let generation = json::read_optional(&dir.join("generation_config.json"))?;
        Config::from_json(&path, &config, generation.as_deref())
    }

    /// Reads the text of `config.json` and of `generation_config.json`; `path` is named in errors.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) for another architecture, an activation or rotary scaling
    /// that aoji does not compute; [`Error::File`](crate::Error::File) for anything malformed, missing or contradictory.
    pub fn from_json(path: &Path, config: &str, generation: Option<&str>) -> Result<Config> {
        let map = object(path, config)?;
        let keys = Keys { path, map: &map };
        let known = keys.known()?;
        keys.check_supported()?;

        let dim = keys.size("hidden_size", MAX_SIZE)?;
        let n_heads = keys.size("num_attention_heads", MAX_SIZE)?;
        let absent = known.kv_heads.filter(|_| !map.contains_key("num_key_value_heads")); // null is as many as there are heads
        let n_kv_heads = keys.optional_size("num_key_value_heads", MAX_SIZE)?.or(absent).unwrap_or(n_heads);
        if n_heads % n_kv_heads != 0 {
            return keys.wrong(format!(
                "num_attention_heads ({n_heads}) is not a multiple of num_key_value_heads ({n_kv_heads})"
            ));
        }
        let head_dim = match keys.optional_size("head_dim", MAX_SIZE)?.or(known.head_dim) {
            Some(head_dim) => head_dim,
            None if dim % n_heads == 0 => dim / n_heads,
            None => {
                return keys.wrong(format!(
                    "hidden_size ({dim}) is not a multiple of num_attention_heads ({n_heads}) and there is no head_dim"
                ));
            }
        };
        if head_dim % 2 != 0 {
            return keys.wrong(format!("head_dim is {head_dim}; rotary embedding needs an even number"));
        }
        if n_heads.saturating_mul(head_dim) > MAX_SIZE {
            return keys.wrong(format!("num_attention_heads ({n_heads}) x head_dim ({head_dim}) exceeds {MAX_SIZE}"));
        }
        let vocab = keys.size("vocab_size", MAX_SIZE)?;

        let generation_path = path.with_file_name("generation_config.json");
        let generation = generation.map(|text| object(&generation_path, text)).transpose()?.unwrap_or_default();
        let generation = Keys { path: &generation_path, map: &generation };
        let ids = |name| match generation.token_ids(name, vocab)? {
            ids if ids.is_empty() => keys.token_ids(name, vocab),
            ids => Ok(ids),
        };

        let norm_eps = keys.number("rms_norm_eps")?.unwrap_or(1e-6);
        if !(0.0..1.0).contains(&norm_eps) {
            return keys.wrong(format!("rms_norm_eps is {norm_eps}, expected a number from 0 to 1"));
        }
        let max_position = keys.optional_size("max_position_embeddings", MAX_SIZE)?.unwrap_or(known.max_position);
        let n_layers = keys.size("num_hidden_layers", MAX_LAYERS)?;
        let (rope_theta, rope_scaling) = keys.rope(max_position, head_dim)?;
        Ok(Config {
            arch: keys.arch(known, n_layers)?,
            dim,
            ffn_dim: keys.size("intermediate_size", MAX_SIZE)?,
            n_layers,
            n_heads,
            n_kv_heads,
            head_dim,
            vocab,
            max_seq: rope_scaling.map_or(max_position, |s| s.max_seq(max_position)),
            norm_eps: norm_eps as f32,
            rope_theta,
            rope_scaling,
            rope_factors: Vec::new(),
            tied: keys.flag("tie_word_embeddings")?,
            bos: ids("bos_token_id")?.first().copied(),
            eos: ids("eos_token_id")?,
            dtype: keys.dtype()?,
            sampling: SamplingDefaults::read(&generation),
        })
    }

    /// Width of all query heads together.
    pub fn q_dim(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn kv_dim(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }

    /// Query heads per key/value head.
    pub fn group(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }

    /// Number of parameters; a tied head is counted once.
    pub fn params(&self) -> u64 {
        let [dim, ffn, q, kv, vocab] =
            [self.dim, self.ffn_dim, self.q_dim(), self.kv_dim(), self.vocab].map(|n| n as u64);
        let of = |has: bool, n: u64| if has { n } else { 0 };
        let biases =
            of(self.arch.qkv_bias, q + 2 * kv) + of(self.arch.o_bias, dim) + of(self.arch.ffn_bias, 2 * ffn + dim);
        let norms = 2 * dim + of(self.arch.qk_norm, 2 * self.head_dim as u64);
        let layer = norms + dim * (2 * q + 2 * kv) + 3 * dim * ffn + biases;
        let ends = dim + vocab * dim * if self.tied { 1 } else { 2 };
        self.n_layers as u64 * layer + ends
    }

    /// Bytes of all parameters in bf16, the format of the device.
    pub fn weight_bytes(&self) -> u64 {
        self.params() * Dtype::Bf16.bytes() as u64
    }
}
