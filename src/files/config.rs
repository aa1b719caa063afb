//! `config.json` and `generation_config.json` of a Hugging Face checkpoint, checked once.
//!
//! Hugging Face names appear here and in [`crate::files::weights`] only. Absent keys mean what they mean to transformers'
//! `LlamaConfig`; sizes without which there is no model (`hidden_size`, `vocab_size`, ...) must be there.

use std::fmt;
use std::path::Path;

use half::{bf16, f16};
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// No size of a model exceeds this. It keeps every product of sizes in range (three of them times the bytes of an
/// element stay below 2^63) and refuses absurd files before anything is allocated.
const MAX_SIZE: usize = 1 << 24;
/// No model has more layers than this.
const MAX_LAYERS: usize = 1 << 10;

/// Element type of a tensor in a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// bfloat16, the upper half of an f32.
    Bf16,
    /// IEEE 754 binary16.
    F16,
    /// IEEE 754 binary32.
    F32,
}

impl Dtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::F32 => 4,
        }
    }

    /// Elements in little-endian order as f32, exactly. `bytes` is whole elements of any alignment.
    pub fn to_f32(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            Dtype::Bf16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Dtype::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        }
    }

    /// Rounds `values` into `out`, elements in little-endian order.
    pub fn round(self, values: &[f32], out: &mut [u8]) {
        match self {
            Dtype::Bf16 => {
                let rounded = values.iter().map(|x| bf16::from_f32(*x).to_le_bytes());
                out.chunks_exact_mut(2).zip(rounded).for_each(|(o, b)| o.copy_from_slice(&b));
            }
            Dtype::F16 => {
                let rounded = values.iter().map(|x| f16::from_f32(*x).to_le_bytes());
                out.chunks_exact_mut(2).zip(rounded).for_each(|(o, b)| o.copy_from_slice(&b));
            }
            Dtype::F32 => out.chunks_exact_mut(4).zip(values).for_each(|(o, x)| o.copy_from_slice(&x.to_le_bytes())),
        }
    }

    /// The name in `config.json` (`torch_dtype`).
    pub fn hf_name(self) -> &'static str {
        match self {
            Dtype::Bf16 => "bfloat16",
            Dtype::F16 => "float16",
            Dtype::F32 => "float32",
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Dtype::Bf16 => "bf16",
            Dtype::F16 => "f16",
            Dtype::F32 => "f32",
        })
    }
}

/// Llama-3.1's stretching of the low rotary frequencies (`rope_scaling` of type `llama3`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeScaling {
    /// Low frequencies are divided by this; at least 1.
    pub factor: f64,
    /// Wavelengths above `original_max_seq / low_freq_factor` are divided in full.
    pub low_freq_factor: f64,
    /// Wavelengths below `original_max_seq / high_freq_factor` are left alone; greater than `low_freq_factor`.
    pub high_freq_factor: f64,
    /// Context length that the model was trained with before the stretch.
    pub original_max_seq: usize,
}

/// Sizes and constants of a Llama model.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Width of the residual stream (`hidden_size`).
    pub dim: usize,
    /// Width of the feed-forward layer (`intermediate_size`).
    pub ffn_dim: usize,
    /// Number of layers (`num_hidden_layers`).
    pub n_layers: usize,
    /// Number of query heads (`num_attention_heads`).
    pub n_heads: usize,
    /// Number of key/value heads (`num_key_value_heads`); divides `n_heads`. Absent: `n_heads`.
    pub n_kv_heads: usize,
    /// Width of a head (`head_dim`); even. Absent: `dim / n_heads`.
    pub head_dim: usize,
    /// Number of token ids (`vocab_size`).
    pub vocab: usize,
    /// Longest context in tokens (`max_position_embeddings`). Absent: 2048.
    pub max_seq: usize,
    /// Added to the mean square in RMSNorm (`rms_norm_eps`). Absent: 1e-6.
    pub norm_eps: f32,
    /// Base of the rotary frequencies (`rope_theta`, or the same key in `rope_parameters`). Absent: 10000.
    pub rope_theta: f64,
    /// Stretching of the rotary frequencies; `None` for type `default`.
    pub rope_scaling: Option<RopeScaling>,
    /// Whether the output head is the embedding (`tie_word_embeddings`). Absent: no.
    pub tied: bool,
    /// Token that begins a text, where the checkpoint names one.
    pub bos: Option<u32>,
    /// Tokens that end a text, without repeats: those of `generation_config.json` where it names any (as
    /// transformers' `generate` does), else those of `config.json`; possibly none. Opening a model with a tokenizer
    /// replaces them, and `bos`, by the special tokens that its files name.
    pub eos: Vec<u32>,
    /// The declared element type (`torch_dtype`, newer `dtype`). Absent: f32. Every tensor carries its own.
    pub dtype: Dtype,
}

impl Config {
    /// Reads `config.json`, and `generation_config.json` where there is one, of a model directory.
    ///
    /// # Errors
    /// [`Error::Io`] when `config.json` cannot be read, else those of [`Config::from_json`].
    pub fn from_dir(dir: &Path) -> Result<Config> {
        let path = dir.join("config.json");
        let config = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        let generation_path = dir.join("generation_config.json");
        let generation = match std::fs::read_to_string(&generation_path) {
            Ok(text) => Some(text),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(Error::io(&generation_path)(e)),
        };
        Config::from_json(&path, &config, generation.as_deref())
    }

    /// Reads the text of `config.json` and of `generation_config.json`; `path` is named in errors.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another architecture, biases, an activation or rotary scaling that aoji does not
    /// compute, or a quantized checkpoint; [`Error::File`] for anything malformed, missing or contradictory.
    pub fn from_json(path: &Path, config: &str, generation: Option<&str>) -> Result<Config> {
        let map = object(path, config)?;
        let keys = Keys { path, map: &map };
        keys.check_supported()?;

        let dim = keys.size("hidden_size", MAX_SIZE)?;
        let n_heads = keys.size("num_attention_heads", MAX_SIZE)?;
        let n_kv_heads = keys.optional_size("num_key_value_heads", MAX_SIZE)?.unwrap_or(n_heads);
        if n_heads % n_kv_heads != 0 {
            return keys.wrong(format!(
                "num_attention_heads ({n_heads}) is not a multiple of num_key_value_heads ({n_kv_heads})"
            ));
        }
        let head_dim = match keys.optional_size("head_dim", MAX_SIZE)? {
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
        let (rope_theta, rope_scaling) = keys.rope()?;
        Ok(Config {
            dim,
            ffn_dim: keys.size("intermediate_size", MAX_SIZE)?,
            n_layers: keys.size("num_hidden_layers", MAX_LAYERS)?,
            n_heads,
            n_kv_heads,
            head_dim,
            vocab,
            max_seq: keys.optional_size("max_position_embeddings", MAX_SIZE)?.unwrap_or(2048),
            norm_eps: norm_eps as f32,
            rope_theta,
            rope_scaling,
            tied: keys.flag("tie_word_embeddings")?,
            bos: ids("bos_token_id")?.first().copied(),
            eos: ids("eos_token_id")?,
            dtype: keys.dtype()?,
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
        let layer = 2 * dim + dim * (2 * q + 2 * kv) + 3 * dim * ffn;
        let ends = dim + vocab * dim * if self.tied { 1 } else { 2 };
        self.n_layers as u64 * layer + ends
    }

    /// Bytes of all parameters in bf16, the format of the device.
    pub fn weight_bytes(&self) -> u64 {
        self.params() * Dtype::Bf16.bytes() as u64
    }

    /// Rotary frequencies in radians per position, `[head_dim / 2]`: `theta^(-2i / head_dim)`, then stretched as
    /// Llama-3.1 does where `rope_scaling` says so.
    ///
    /// Every step is rounded to f32 as transformers does (`modeling_rope_utils.py`), because an angle is this number
    /// times a position of up to 10^5 and an error of one unit in the last place would show there.
    pub fn rope_inv_freq(&self) -> Vec<f32> {
        let theta = f64::from(self.rope_theta as f32);
        (0..self.head_dim / 2)
            .map(|i| {
                let exponent = (2 * i) as f32 / self.head_dim as f32;
                // f64 and one rounding: the same f32 whatever the platform's powf.
                let freq = 1.0 / theta.powf(f64::from(exponent)) as f32;
                self.rope_scaling.map_or(freq, |s| s.stretch(freq))
            })
            .collect()
    }
}

impl RopeScaling {
    /// The stretched frequency: untouched for short wavelengths, divided by `factor` for long ones, blended between.
    fn stretch(&self, freq: f32) -> f32 {
        let (factor, original) = (self.factor as f32, self.original_max_seq as f32);
        let low_freq_wavelen = (self.original_max_seq as f64 / self.low_freq_factor) as f32;
        let high_freq_wavelen = (self.original_max_seq as f64 / self.high_freq_factor) as f32;
        let wavelen = std::f64::consts::TAU as f32 / freq;
        if wavelen < high_freq_wavelen {
            freq
        } else if wavelen > low_freq_wavelen {
            freq / factor
        } else {
            let smooth = (original / wavelen - self.low_freq_factor as f32)
                / (self.high_freq_factor - self.low_freq_factor) as f32;
            (1.0 - smooth) * freq / factor + smooth * freq
        }
    }
}

/// Parses a JSON object.
fn object(path: &Path, text: &str) -> Result<Map<String, Value>> {
    match serde_json::from_str(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::file(path, "is not a JSON object")),
        Err(e) => Err(Error::file(path, format!("is not valid JSON: {e}"))),
    }
}

/// Typed access to a JSON object; an error names the file, the key, the value found and what was expected. A key
/// that is `null` counts as absent, as in transformers.
struct Keys<'a> {
    path: &'a Path,
    map: &'a Map<String, Value>,
}

impl Keys<'_> {
    fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|v| !v.is_null())
    }

    fn wrong<T>(&self, what: String) -> Result<T> {
        Err(Error::file(self.path, what))
    }

    fn unsupported<T>(&self, what: String) -> Result<T> {
        Err(Error::Unsupported { path: self.path.to_path_buf(), what })
    }

    fn optional_size(&self, name: &str, max: usize) -> Result<Option<usize>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if n >= 1 && n <= max as u64 => Ok(Some(n as usize)),
            _ => self.wrong(format!("{name} is {}, expected a whole number from 1 to {max}", brief(value))),
        }
    }

    fn size(&self, name: &str, max: usize) -> Result<usize> {
        match self.optional_size(name, max)? {
            Some(n) => Ok(n),
            None => self.wrong(format!("{name} is missing, expected a whole number from 1 to {max}")),
        }
    }

    fn number(&self, name: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x.is_finite() => Ok(Some(x)),
            _ => self.wrong(format!("{name} is {}, expected a number", brief(value))),
        }
    }

    fn flag(&self, name: &str) -> Result<bool> {
        match self.get(name) {
            None => Ok(false),
            Some(Value::Bool(b)) => Ok(*b),
            Some(value) => self.wrong(format!("{name} is {}, expected true or false", brief(value))),
        }
    }

    fn text(&self, name: &str) -> Result<Option<&str>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(value) => self.wrong(format!("{name} is {}, expected a string", brief(value))),
        }
    }

    /// A token id or a list of them, without repeats; empty when absent.
    fn token_ids(&self, name: &str, vocab: usize) -> Result<Vec<u32>> {
        let values = match self.get(name) {
            None => &[],
            Some(Value::Array(values)) => values.as_slice(),
            Some(value) => std::slice::from_ref(value),
        };
        let mut ids = Vec::new();
        for value in values {
            match value.as_u64() {
                // vocab <= MAX_SIZE, so the id fits.
                Some(id) if id < vocab as u64 => {
                    if !ids.contains(&(id as u32)) {
                        ids.push(id as u32);
                    }
                }
                _ => {
                    let found = brief(value);
                    return self.wrong(format!("{name} is {found}, expected token ids below vocab_size ({vocab})"));
                }
            }
        }
        Ok(ids)
    }

    fn dtype(&self) -> Result<Dtype> {
        // transformers 5 writes `dtype`, before that it was `torch_dtype`.
        let name = match self.text("dtype")? {
            Some(name) => name,
            None => self.text("torch_dtype")?.unwrap_or("float32"),
        };
        match [Dtype::Bf16, Dtype::F16, Dtype::F32].into_iter().find(|d| d.hf_name() == name) {
            Some(dtype) => Ok(dtype),
            None => self.unsupported(format!("torch_dtype {name:?}; supported: bfloat16, float16, float32")),
        }
    }

    /// Refuses what would silently compute something else than the model's author meant.
    fn check_supported(&self) -> Result<()> {
        const SUPPORTED: &str = "supported: LlamaForCausalLM (model_type \"llama\")";
        match self.get("architectures") {
            None => {}
            Some(Value::Array(list)) if list.iter().any(|a| a == "LlamaForCausalLM") => {}
            Some(other) => return self.unsupported(format!("architecture {}; {SUPPORTED}", brief(other))),
        }
        match self.text("model_type")? {
            Some("llama") => {}
            None if self.get("architectures").is_some() => {}
            None => return self.unsupported(format!("neither architectures nor model_type is given; {SUPPORTED}")),
            Some(other) => return self.unsupported(format!("model_type {other:?}; {SUPPORTED}")),
        }
        for bias in ["attention_bias", "mlp_bias"] {
            if self.flag(bias)? {
                return self.unsupported(format!("{bias} is true; supported: projections without biases"));
            }
        }
        if let Some(act) = self.text("hidden_act")?.filter(|&act| act != "silu") {
            return self.unsupported(format!("hidden_act {act:?}; supported: \"silu\""));
        }
        if let Some(part) = self.number("partial_rotary_factor")?.filter(|&part| part != 1.0) {
            return self.unsupported(format!("partial_rotary_factor {part}; supported: 1"));
        }
        if let Some(quantization) = self.get("quantization_config") {
            let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unnamed");
            return self.unsupported(format!(
                "the checkpoint is quantized (quantization_config, method {method:?}); supported: bf16, f16 and f32 \
                 tensors"
            ));
        }
        Ok(())
    }

    /// The base of the rotary frequencies and their scaling.
    fn rope(&self) -> Result<(f64, Option<RopeScaling>)> {
        // transformers 5 moved both into `rope_parameters`; `rope_scaling` is the older place.
        let section = if self.get("rope_parameters").is_some() { "rope_parameters" } else { "rope_scaling" };
        let empty = Map::new();
        let map = match self.get(section) {
            None => &empty,
            Some(Value::Object(map)) => map,
            Some(value) => return self.wrong(format!("{section} is {}, expected an object or null", brief(value))),
        };
        let rope = Keys { path: self.path, map };

        let theta = match rope.number("rope_theta")? {
            Some(theta) => theta,
            None => self.number("rope_theta")?.unwrap_or(10000.0),
        };
        if !(1.0..=f64::from(f32::MAX)).contains(&theta) {
            return self.wrong(format!("rope_theta is {theta}, expected a number of at least 1"));
        }

        let kind = match rope.text("rope_type")? {
            Some(kind) => kind,
            None => rope.text("type")?.unwrap_or("default"),
        };
        let scaling = match kind {
            "default" => None,
            "llama3" => {
                let number = |name: &str| match rope.number(name)? {
                    Some(x) => Ok(x),
                    None => self.wrong(format!("{section}.{name} is missing, expected a number for type llama3")),
                };
                let scaling = RopeScaling {
                    factor: number("factor")?,
                    low_freq_factor: number("low_freq_factor")?,
                    high_freq_factor: number("high_freq_factor")?,
                    original_max_seq: rope.size("original_max_position_embeddings", MAX_SIZE)?,
                };
                let RopeScaling { factor, low_freq_factor: low, high_freq_factor: high, .. } = scaling;
                // As f32, in which they are used: neither may become infinite, nor their difference zero.
                if !(1.0..=1e6).contains(&factor) || !(1e-6..1e6).contains(&low) || high - low < 1e-6 || high > 1e6 {
                    return self.wrong(format!(
                        "{section} has factor {factor}, low_freq_factor {low}, high_freq_factor {high}; expected \
                         factor >= 1 and 0 < low_freq_factor < high_freq_factor"
                    ));
                }
                Some(scaling)
            }
            other => {
                return self.unsupported(format!("{section} of type {other:?}; supported: \"default\", \"llama3\""));
            }
        };
        Ok((theta, scaling))
    }
}

/// A JSON value for an error message, cut when long.
fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
