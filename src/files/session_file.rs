//! A session in a file: its tokens, and their keys and values.
//!
//! A safetensors file with two tensors: `tokens` U32 [n], and `keys_values` BF16 or F32 [n_layers, 2, n_kv_heads, n, head_dim], of each
//! layer the keys and then the values; in fp8 it is U8 [n_layers, 2, n_kv_heads, n, head_dim + 1], of each row the codes and then the
//! scale. Its metadata say of what model, device and version they are; with any other the answers would not
//! have the bits that they have without the file, so it is refused.

use super::{
    lora::Lora,
    output::Output,
    shards::{self, Item},
    weights::{Shard, Tensor, Weights, read_header},
};
use crate::{
    error::{Error, Result},
    files::config::{Config, SamplingDefaults},
    ops::KvDtype,
};
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use std::{ops::Range, path::Path, sync::Arc};

/// Version of the format.
const VERSION: &str = "1";
const TOKENS: &str = "tokens";
const CACHE: &str = "keys_values";

/// What keys and values depend on besides their tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Origin {
    /// Version of the format.
    session: String,
    /// Version of the program.
    aoji: String,
    /// See [`fingerprint`].
    model: String,
    /// Name of the GPU, or `CPU`: all CPUs compute the same bits.
    device: String,
    /// A [`KvDtype`]; files of before there were several have none.
    #[serde(default = "auto")]
    kv: String,
}

fn auto() -> String {
    KvDtype::Auto.to_string()
}

impl Origin {
    /// Of what this program computes.
    pub fn new(model: String, device: String, kv: KvDtype) -> Origin {
        Origin { session: VERSION.into(), aoji: env!("CARGO_PKG_VERSION").into(), model, device, kv: kv.to_string() }
    }

    /// Nothing else than `ours`.
    fn check(&self, path: &Path, ours: &Origin) -> Result<()> {
        let named = [
            ("format version", &self.session, &ours.session),
            ("aoji", &self.aoji, &ours.aoji),
            ("model", &self.model, &ours.model),
            ("device", &self.device, &ours.device),
            ("format of keys and values", &self.kv, &ours.kv),
        ];
        match named.into_iter().find(|(_, theirs, ours)| theirs != ours) {
            None => Ok(()),
            Some((what, theirs, ours)) => Err(Error::file(
                path,
                format!(
                    "is a session of another {what}: {theirs}, and this is {ours}; compute it again, in a new file"
                ),
            )),
        }
    }
}

/// The metadata of a file; all are strings.
#[derive(Serialize, Deserialize)]
struct Metadata {
    #[serde(flatten)]
    origin: Origin,
    note: String,
}

/// 64 bits, in hexadecimal, by which models are told apart: of the configuration, and of each tensor name, shape, format and three
/// samples (FNV-1a). To read all weights would take as long as to load them.
pub(crate) fn fingerprint(config: &Config, weights: &Weights, widened: bool, lora: u64) -> String {
    // what no key or value depends on
    let computes = Config { bos: None, eos: Vec::new(), sampling: SamplingDefaults::default(), ..config.clone() };
    let mut hash = fnv(FNV, format!("{computes:?} {widened} {lora}").as_bytes());
    for t in weights.tensors() {
        hash = fnv(hash, format!("{t:?}").as_bytes());
        let (bytes, n) = (t.bytes(), 256.min(t.bytes().len()));
        for at in [0, (bytes.len() - n) / 2, bytes.len() - n] {
            hash = fnv(hash, &bytes[at..at + n]);
        }
    }
    format!("{hash:016x}")
}

/// The same of adapters: of what they add to the first rows of each matrix.
pub(crate) fn lora_fingerprint(weights: &Weights, lora: &[Lora]) -> u64 {
    let of = |t: &Tensor| lora.iter().flat_map(|l| l.sample(t.name())).fold(FNV, |h, x| fnv(h, &x.to_le_bytes()));
    weights.tensors().filter(|_| !lora.is_empty()).fold(0, |hash, t| hash ^ fnv(of(t), t.name().as_bytes()))
}

const FNV: u64 = 0xcbf2_9ce4_8422_2325;

fn fnv(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3))
}

/// Type and shape of the keys and values of `n` tokens; `act_bytes` are those of an activation.
fn cache_of(config: &Config, kv: KvDtype, act_bytes: usize, n: usize) -> (Dtype, [usize; 5]) {
    let (dtype, row) = match kv {
        KvDtype::Auto if act_bytes == 4 => (Dtype::F32, config.head_dim),
        KvDtype::Auto => (Dtype::BF16, config.head_dim),
        KvDtype::Fp8 => (Dtype::U8, kv.row_bytes(config.head_dim, act_bytes)),
    };
    (dtype, [config.n_layers, 2, config.n_kv_heads, n, row])
}

/// What takes the bytes of keys and values, piece by piece.
pub(crate) type Sink<'a> = dyn FnMut(&[u8]) -> Result<()> + 'a;

/// Writes a session; `cache` gives the bytes of its keys and values in their order. What is at `path`
/// stays until the new file is whole.
pub(crate) fn write(
    path: &Path,
    origin: Origin,
    note: &str,
    config: &Config,
    tokens: &[u32],
    (kv, act_bytes): (KvDtype, usize),
    cache: impl FnOnce(&mut Sink<'_>) -> Result<()>,
) -> Result<()> {
    let (dtype, shape) = cache_of(config, kv, act_bytes, tokens.len());
    let items = [Item::new(TOKENS.into(), Dtype::U32, &[tokens.len()]), Item::new(CACHE.into(), dtype, &shape)];
    let metadata = serde_json::to_string(&Metadata { origin, note: note.into() }).expect("strings");
    let mut output = Output::file(path, true)?;
    let name = output.single().unwrap_or_default().to_string();
    let mut file = output.create(&name)?;
    file.write(&shards::header_with(&metadata, items.iter()))?;
    file.write(bytemuck::cast_slice(tokens))?;
    cache(&mut |bytes| file.write(bytes))?;
    drop(file);
    output.finish()
}

/// A session's file that is whole and of this model.
pub(crate) struct SessionFile {
    shard: Arc<Shard>,
    cache: Range<usize>,
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// What was written beside it.
    pub note: String,
}

impl SessionFile {
    /// Opens and checks it.
    ///
    /// # Errors
    /// `Io`; `File` and `Tensor` for what is none, is truncated, or is of another model, device or version.
    pub fn open(path: &Path, ours: &Origin, config: &Config, (kv, act_bytes): (KvDtype, usize)) -> Result<SessionFile> {
        let shard = Arc::new(Shard::map(path.to_path_buf(), 0)?);
        let bytes = shard.bytes();
        let entries = read_header(path, bytes)?;
        let none = || Error::file(path, "is a safetensors file, and no session of aoji");
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| Error::file(path, e.to_string()))?;
        let map = header.metadata().clone().ok_or_else(none)?;
        let map = serde_json::to_value(map).expect("strings");
        let Metadata { origin, note } = serde_json::from_value(map).map_err(|_| none())?;
        origin.check(path, ours)?;
        let entry = |name: &str| entries.iter().find(|e| e.name == name).ok_or_else(none);
        let (tokens, cache) = (entry(TOKENS)?, entry(CACHE)?);
        let n = tokens.shape.first().copied().unwrap_or(0);
        if n == 0 {
            return Err(Error::tensor(path, TOKENS, "at least one token, as every saved session has", "none"));
        }
        let (dtype, shape) = cache_of(config, kv, act_bytes, n);
        let expected = [(tokens, Dtype::U32, vec![n]), (cache, dtype, shape.to_vec())];
        for (entry, dtype, shape) in expected {
            if (entry.dtype, &entry.shape) != (dtype, &shape) {
                let found = format!("{:?} {:?}", entry.dtype, entry.shape);
                return Err(Error::tensor(path, &entry.name, format!("{dtype:?} {shape:?}"), found));
            }
        }
        let words = bytes[tokens.range.clone()].as_chunks::<4>().0;
        let tokens: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
        if let Some(id) = tokens.iter().find(|id| **id as usize >= config.vocab) {
            return Err(Error::tensor(path, TOKENS, format!("ids below {}", config.vocab), id.to_string()));
        }
        Ok(SessionFile { cache: cache.range.clone(), shard, tokens, note })
    }

    /// The bytes of keys and values.
    pub fn cache(&self) -> &[u8] {
        &self.shard.bytes()[self.cache.clone()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_of_no_tokens_is_refused() {
        let json = r#"{"model_type": "llama", "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 320, "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": true}"#;
        let config = Config::from_json(Path::new("config.json"), json, None).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (path, kind) = (dir.path().join("a.session"), (KvDtype::Auto, 2));
        let origin = || Origin::new("model".into(), "CPU".into(), KvDtype::Auto);
        let reads = |tokens: &[u32]| {
            let bytes = 2 * 2 * tokens.len() * 64 * 2; // keys and values of two layers
            write(&path, origin(), "", &config, tokens, kind, |to| to(&vec![0; bytes])).unwrap();
            SessionFile::open(&path, &origin(), &config, kind).map(|file| file.tokens)
        };
        assert_eq!(reads(&[3, 319]).unwrap(), [3, 319]);
        let error = reads(&[]).unwrap_err().to_string();
        assert!(error.contains("a.session: tensor tokens: expected at least one token"), "{error}");
    }
}
