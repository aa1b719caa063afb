//! Random checkpoints in Hugging Face layout: the sizes, files and headers of a real model without its training.
//!
//! The statistics keep a forward pass finite and its logits spread, at any size. A matrix has normal elements with
//! standard deviation 1/sqrt(in), so that it keeps the scale of its input. The two that add to the residual stream are
//! smaller by sqrt(2 n_layers) (GPT-2's rule), so that the stream grows by a constant factor over all layers. Norm
//! gains lie around 1, except those of the last norm, which set the spread of the logits.

use std::path::Path;

use half::{bf16, f16};
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::{
    error::{Error, Result},
    files::{
        config::{Config, Dtype},
        json,
        model_files::{self, CONFIG},
        output::{Output, Target},
        shards::{self, Item},
        weights::{self, Weights},
    },
};

pub use crate::files::shards::SHARD_BYTES;

/// Standard deviation of the norm gains around 1.
const NORM_STD: f32 = 0.05;
/// Standard deviation of the logits, set by the gain of the last norm, so that the best tokens stand out as in a
/// trained model.
const LOGIT_STD: f32 = 3.0;
/// Scale of the embedding. Below 1, so that the layers outweigh it: where the embedding is the head as well, every
/// token would otherwise predict itself.
const EMBED_SCALE: f32 = 0.5;
/// Elements that one task generates.
const BLOCK: usize = 1 << 16;
/// Elements in one write; two such buffers alternate between being filled and being written.
const BATCH: usize = 1 << 24;
/// Of biases, beside products of standard deviation 1.
const BIAS_STD: f32 = 0.5;

/// Names that [`preset`] knows.
pub const PRESETS: [&str; 5] = ["llama3-8b", "llama3.2-1b", "mistral-7b", "qwen2.5-7b", "qwen3-8b"];

/// `config.json` of a known model by its short name: `llama3-8b` (Meta-Llama-3-8B, and so the Korean models made from
/// it), `llama3.2-1b`, `mistral-7b` (v0.1, with its window), `qwen2.5-7b` or `qwen3-8b`.
pub fn preset(name: &str) -> Option<String> {
    let other = match name {
        "mistral-7b" => json!({
            "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
            "max_position_embeddings": 32768, "sliding_window": 4096, "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
            "bos_token_id": 1, "eos_token_id": 2
        }),
        "qwen2.5-7b" => json!({
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
            "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
            "max_position_embeddings": 32768, "use_sliding_window": false, "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6,
            "bos_token_id": 151643, "eos_token_id": 151645
        }),
        "qwen3-8b" => json!({
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
            "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "vocab_size": 151936, "max_position_embeddings": 40960, "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6,
            "bos_token_id": 151643, "eos_token_id": 151645
        }),
        _ => Value::Null,
    };
    if let Value::Object(mut config) = other {
        config.extend([("hidden_act".into(), json!("silu")), ("tie_word_embeddings".into(), json!(false))]);
        config.insert("torch_dtype".into(), json!("bfloat16"));
        return Some(format!("{:#}\n", Value::Object(config)));
    }
    let (dim, ffn_dim, n_layers, max_seq, tied, rope_scaling) = match name {
        "llama3-8b" => (4096, 14336, 32, 8192, false, Value::Null),
        "llama3.2-1b" => {
            let scaling = json!({
                "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3"
            });
            (2048, 8192, 16, 131072, true, scaling)
        }
        _ => return None,
    };
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": false,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "head_dim": dim / 32,
        "hidden_act": "silu",
        "hidden_size": dim,
        "intermediate_size": ffn_dim,
        "max_position_embeddings": max_seq,
        "mlp_bias": false,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": n_layers,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_scaling": rope_scaling,
        "rope_theta": 500000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256
    });
    Some(format!("{config:#}\n"))
}

/// Writes a random checkpoint to the directory `out`, which must be absent or empty; see [`write_to`].
///
/// # Errors
/// Those of [`write_to`] and of [`Output::begin`].
pub fn write(
    config_json: &str,
    seed: u64,
    dtype: Dtype,
    shard_bytes: u64,
    out: &Path,
    progress: impl Fn(u64, u64) + Sync,
) -> Result<()> {
    write_to(config_json, seed, dtype, shard_bytes, Output::begin(out)?, progress)
}

/// Writes a random checkpoint: safetensors of at most `shard_bytes` each (a larger tensor has one to itself), their index when
/// there are several, and `config.json`, and finishes the output.
///
/// Every element is a function of the seed, the tensor's name and the element's index, so the same call writes the same
/// bytes on any machine and with any number of threads. `progress` gets the bytes written and those to be written.
///
/// # Errors
/// Those of [`Config::from_json`]; [`Error::Io`](crate::Error::Io) when writing fails.
pub fn write_to(
    config_json: &str,
    seed: u64,
    dtype: Dtype,
    shard_bytes: u64,
    mut output: Output,
    progress: impl Fn(u64, u64) + Sync,
) -> Result<()> {
    let config_path = output.dir().join(CONFIG);
    let config = Config::from_json(&config_path, config_json, None)?;
    let value: Value = json::parse(config_json).expect("Config::from_json has parsed it");
    if let Some(key) = weights::quantization_key(&value) {
        let what = format!("is that of a quantized checkpoint, and random weights are not quantized: remove {key}");
        return Err(Error::Unsupported { path: config_path, what });
    }
    let layout = Layout::new(&config, dtype, shard_bytes);
    let mut done = 0;
    for shard in &layout.shards {
        let report = |bytes| {
            done += bytes;
            progress(done, layout.total_bytes);
        };
        write_shard(output.create(&shard.file)?, shard, seed, dtype, report)?;
    }
    if layout.shards.len() > 1 {
        output.write(model_files::INDEX, layout.index_json().as_bytes())?;
    }
    let mut text = config_json.to_string();
    if config.dtype != dtype {
        let mut value = value;
        value["torch_dtype"] = json!(dtype.hf_name());
        if value.get("dtype").is_some() {
            value["dtype"] = json!(dtype.hf_name());
        }
        text = format!("{value:#}\n");
    }
    output.write(CONFIG, text.as_bytes())?;
    output.finish()
}

/// Copies what a model directory has besides `config.json` and its weights: the tokenizer, the chat template,
/// `generation_config.json`. Returns the names of the files that were there.
///
/// # Errors
/// [`Error::Io`](crate::Error::Io) with the file.
pub fn copy_small(from: &Path, output: &mut Output) -> Result<Vec<&'static str>> {
    let mut copied = Vec::new();
    for file in model_files::SMALL.into_iter().filter(|file| *file != CONFIG) {
        let source = from.join(file);
        if json::exists(&source)? {
            output.copy(&source)?;
            copied.push(file);
        }
    }
    Ok(copied)
}

/// Which tensor lies in which file, as transformers' `save_pretrained` decides it.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The files, in order.
    pub shards: Vec<ShardLayout>,
    /// Bytes of all tensors (without headers).
    pub total_bytes: u64,
}

/// One safetensors file to be written.
#[derive(Clone, Debug)]
pub struct ShardLayout {
    /// Its name.
    pub file: String,
    /// Everything before its data: length, JSON, padding to 8 bytes.
    pub header: Vec<u8>,
    /// Its tensors in the order of their data, sorted by name.
    tensors: Vec<Planned>,
}

impl ShardLayout {
    /// Size of the file.
    pub fn bytes(&self) -> u64 {
        self.header.len() as u64 + self.tensors.iter().map(|t| t.item.bytes).sum::<u64>()
    }
}

/// A tensor to be generated.
#[derive(Clone, Debug)]
struct Planned {
    item: Item,
    mean: f32,
    std: f32,
}

impl Layout {
    /// Plans the files of a checkpoint of `config`; nothing is written.
    pub fn new(config: &Config, dtype: Dtype, shard_bytes: u64) -> Layout {
        let tensors = plan(config, dtype);
        let total_bytes = tensors.iter().map(|t| t.item.bytes).sum();
        let shard = |(file, mut tensors): (String, Vec<Planned>)| {
            tensors.sort_by(|a, b| a.item.name.cmp(&b.item.name));
            ShardLayout { file, header: shards::header(tensors.iter().map(|t| &t.item)), tensors }
        };
        let files = shards::split(tensors, shard_bytes, |t| &t.item);
        Layout { shards: files.into_iter().map(shard).collect(), total_bytes }
    }

    /// The text of `model.safetensors.index.json`.
    pub fn index_json(&self) -> String {
        shards::index_json(self.shards.iter().flat_map(|s| s.tensors.iter().map(|t| (&t.item, s.file.as_str()))))
    }
}

/// All tensors in the order of the modules, with their statistics.
fn plan(config: &Config, dtype: Dtype) -> Vec<Planned> {
    let mut tensors = Vec::new();
    let number: Result<Weights<usize>> = Weights::table(config, |name, shape| {
        let (mean, std) = match *shape {
            [_, cols] => (0.0, 1.0 / (cols as f32).sqrt()),
            _ if name.ends_with(".bias") => (0.0, BIAS_STD),
            _ => (1.0, NORM_STD),
        };
        tensors.push(Planned { item: Item::new(name, dtype.safetensors(), shape), mean, std });
        Ok(tensors.len() - 1)
    });
    let number = number.expect("the closure returns no error");
    let depth = (2.0 * config.n_layers as f32).sqrt();
    for layer in &number.layers {
        tensors[layer.wo].std /= depth;
        tensors[layer.w_down].std /= depth;
    }
    tensors[number.embed].std *= EMBED_SCALE;
    let gain = LOGIT_STD / if config.tied { EMBED_SCALE } else { 1.0 };
    let final_norm = &mut tensors[number.final_norm];
    (final_norm.mean, final_norm.std) = (gain, NORM_STD * gain);
    tensors
}

/// Writes one file; `report` gets the bytes of tensors that each write adds.
fn write_shard(
    mut file: Target,
    shard: &ShardLayout,
    seed: u64,
    dtype: Dtype,
    mut report: impl FnMut(u64) + Send,
) -> Result<()> {
    file.write(&shard.header)?;
    let (mut ready, mut next) = (Vec::new(), Vec::new());
    for tensor in &shard.tensors {
        let key = key(seed, &tensor.item.name);
        let elements = tensor.item.shape.iter().product();
        for start in (0..elements).step_by(BATCH) {
            let n = BATCH.min(elements - start);
            // The last batch is written to the disk while this one is made.
            let (written, ()) = rayon::join(|| file.write(&ready), || fill(&mut next, key, start, n, tensor, dtype));
            written?;
            report(ready.len() as u64);
            std::mem::swap(&mut ready, &mut next);
        }
    }
    file.write(&ready)?;
    report(ready.len() as u64);
    Ok(())
}

/// Fills `out` with elements `start..start + n` of a tensor.
fn fill(out: &mut Vec<u8>, key: u64, start: usize, n: usize, tensor: &Planned, dtype: Dtype) {
    fn elements<const N: usize>(out: &mut [u8], start: u64, value: impl Fn(u64) -> [u8; N] + Sync) {
        out.par_chunks_mut(BLOCK * N).enumerate().for_each(|(block, out)| {
            let start = start + (block * BLOCK) as u64;
            for (element, i) in out.as_chunks_mut().0.iter_mut().zip(start..) {
                *element = value(i);
            }
        });
    }
    out.resize(n * dtype.bytes(), 0);
    let (start, mean, scale) = (start as u64, tensor.mean, tensor.std / SUM_STD);
    let value = |i| mean + scale * centred_sum(key, i) as f32;
    match dtype {
        Dtype::Bf16 => elements(out, start, |i| bf16::from_f32(value(i)).to_le_bytes()),
        Dtype::F16 => elements(out, start, |i| f16::from_f32(value(i)).to_le_bytes()),
        Dtype::F32 => elements(out, start, |i| value(i).to_le_bytes()),
    }
}

/// Standard deviation of [`centred_sum`]: sqrt(4 (2^32 - 1) / 12).
const SUM_STD: f32 = 37_837.22;

/// A nearly normal integer of mean 0: the sum of the four 16-bit numbers in a hash of (key, i). In integers, because
/// no logarithm or cosine is the same to the last bit on every machine.
fn centred_sum(key: u64, i: u64) -> i32 {
    let h = mix(key.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    let sum = (h & 0xffff) + (h >> 16 & 0xffff) + (h >> 32 & 0xffff) + (h >> 48);
    sum as i32 - 2 * 0xffff
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014).
fn mix(mut x: u64) -> u64 {
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

/// Key of a tensor's stream: FNV-1a of its name, mixed with the seed.
fn key(seed: u64, name: &str) -> u64 {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    mix(mix(seed) ^ hash)
}
