//! The tensors of a checkpoint: memory-mapped, checked once against one table, then trusted.
//!
//! Hugging Face tensor names appear here only ([`Weights::table`]).

mod header;
mod layout;
mod quantization;
#[cfg(unix)]
pub mod reader;
mod stored;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

pub use header::{Entry, read_header};
pub(crate) use layout::Layout;
use quantization::Quantization;
pub(in crate::files) use quantization::quantization_key;
pub(in crate::files) use stored::Stored;

use crate::{
    error::{Error, Result},
    files::{
        config::{Config, Dtype},
        gguf,
        model_files::INDEX,
    },
};

const EMBED: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// All tensors of a model. `T` is what is known of each: [`Tensor`], its data in a checkpoint.
#[derive(Clone, Debug)]
pub struct Weights<T = Tensor> {
    /// One row per token, `[vocab, dim]`.
    pub embed: T,
    /// The layers, first to last.
    pub layers: Vec<LayerTensors<T>>,
    /// Gain of the last RMSNorm, `[dim]`.
    pub final_norm: T,
    /// From the residual stream to logits, `[vocab, dim]`; the embedding when the configuration ties them.
    pub lm_head: T,
}

/// The tensors of one layer. A matrix is `[out, in]`, row-major.
#[derive(Clone, Debug)]
pub struct LayerTensors<T = Tensor> {
    /// Gain of the RMSNorm before attention, `[dim]`.
    pub attn_norm: T,
    /// Queries, `[q_dim, dim]`; rows of a head in half-split rotary order.
    pub wq: T,
    /// Keys, `[kv_dim, dim]`; rows of a head in half-split rotary order.
    pub wk: T,
    /// Values, `[kv_dim, dim]`.
    pub wv: T,
    /// Attention output, `[dim, q_dim]`.
    pub wo: T,
    /// Gain of the RMSNorm before the feed-forward layer, `[dim]`.
    pub ffn_norm: T,
    /// Gate (the side that SiLU is applied to), `[ffn_dim, dim]`.
    pub w_gate: T,
    /// Up projection, `[ffn_dim, dim]`.
    pub w_up: T,
    /// Down projection, `[dim, ffn_dim]`.
    pub w_down: T,
}

/// One tensor of a checkpoint. Cloning shares the file's mapping.
#[derive(Clone)]
pub struct Tensor {
    shard: Arc<Shard>,
    name: Arc<str>,
    dtype: Dtype,
    rows: usize,
    cols: usize,
    range: Range<usize>,
    /// Where its bytes are something else than its elements in order.
    stored: Option<Arc<Stored>>,
}

impl Tensor {
    /// Its name in the file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Type of its elements; of a quantized one, whose values are computed, f32.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Rows of a matrix; 1 for a vector.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of a matrix (contiguous); the length of a vector.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Its elements, `rows * cols * dtype.bytes()` bytes in little-endian order.
    ///
    /// Not necessarily aligned to the element: the format allows a header of odd length. View them with
    /// `bytemuck::try_cast_slice` and copy when that fails.
    ///
    /// Of a tensor that is not [plain](Tensor::is_plain) they are what its [format](Tensor::format) says.
    pub fn bytes(&self) -> &[u8] {
        &self.shard.bytes()[self.range.clone()]
    }

    /// Its elements as f32.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0f32; self.rows * self.cols];
        self.values(0, &mut values);
        values
    }

    /// The same tensor with other elements, in memory of its own.
    pub(crate) fn with_bytes(&self, dtype: Dtype, bytes: Vec<u8>) -> Tensor {
        let range = 0..bytes.len();
        let shard =
            Arc::new(Shard { path: self.shard.path.clone(), index: self.shard.index, data: Data::Owned(bytes) });
        Tensor { shard, dtype, range, stored: None, ..self.clone() }
    }

    /// Number of its file among the checkpoint's files, in the order of their names.
    pub fn shard(&self) -> usize {
        self.shard.index
    }

    /// Its file.
    pub fn file(&self) -> &Path {
        &self.shard.path
    }

    /// Where its data begins, in bytes from the start of its file.
    pub fn offset(&self) -> usize {
        self.range.start
    }

    /// Both are in one file.
    #[cfg(unix)]
    fn same_file(&self, other: &Tensor) -> bool {
        Arc::ptr_eq(&self.shard, &other.shard)
    }

    /// Reads its file from byte `at` on, not through the mapping.
    #[cfg(unix)]
    fn read_file(&self, at: usize, buf: &mut [u8]) -> Result<()> {
        self.shard.read(at, buf)
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} [{}, {}]", self.name, self.format(), self.rows, self.cols)
    }
}

impl<T> Weights<T> {
    /// The one table of the architecture: field, Hugging Face name, shape. Calls `bind` once for every tensor that
    /// a checkpoint of `config` must have, in the order of transformers' modules (which decides what falls into which
    /// shard).
    ///
    /// # Errors
    /// The first that `bind` returns.
    pub fn table(config: &Config, mut bind: impl FnMut(String, &[usize]) -> Result<T>) -> Result<Weights<T>>
    where
        T: Clone,
    {
        let &Config { dim, ffn_dim, vocab, .. } = config;
        let (q_dim, kv_dim) = (config.q_dim(), config.kv_dim());

        let embed = bind(EMBED.into(), &[vocab, dim])?;
        let mut layers = Vec::with_capacity(config.n_layers);
        for l in 0..config.n_layers {
            let mut bind = |name, shape: &[usize]| bind(format!("model.layers.{l}.{name}.weight"), shape);
            layers.push(LayerTensors {
                wq: bind("self_attn.q_proj", &[q_dim, dim])?,
                wk: bind("self_attn.k_proj", &[kv_dim, dim])?,
                wv: bind("self_attn.v_proj", &[kv_dim, dim])?,
                wo: bind("self_attn.o_proj", &[dim, q_dim])?,
                w_gate: bind("mlp.gate_proj", &[ffn_dim, dim])?,
                w_up: bind("mlp.up_proj", &[ffn_dim, dim])?,
                w_down: bind("mlp.down_proj", &[dim, ffn_dim])?,
                attn_norm: bind("input_layernorm", &[dim])?,
                ffn_norm: bind("post_attention_layernorm", &[dim])?,
            });
        }
        let final_norm = bind("model.norm.weight".into(), &[dim])?;
        let lm_head = if config.tied { embed.clone() } else { bind(HEAD.into(), &[vocab, dim])? };
        Ok(Weights { embed, layers, final_norm, lm_head })
    }
}

impl Weights {
    /// Maps the safetensors of a model directory and checks them against `config`: `model.safetensors`, or else the
    /// files that `model.safetensors.index.json` lists. Nothing is copied and no data page is read. For the path of a
    /// GGUF file, the same of that file and its other pieces.
    ///
    /// Where `config.json` has a `quantization_config`, a matrix is what that method stores in place of it.
    ///
    /// Tolerated beside the table's tensors: `rotary_emb.inv_freq` (old checkpoints store what is computed), and
    /// with tied embeddings a `lm_head.weight` that repeats the embedding. Every other extra tensor is an error,
    /// since ignoring it would compute another model. `metadata.total_size` of the index is not looked at, nor are entries of
    /// the index for tensors that the table has not.
    ///
    /// The files must not be changed while the `Weights`, or a `Tensor` of it, lives: the memory is the file. A
    /// program that truncates one of them meanwhile makes this process end with `SIGBUS` when it touches the memory;
    /// a GPU's weights are read from the file itself, where that is an error.
    ///
    /// # Errors
    /// Each names the file, the tensor, what was expected and what was found: [`Error::Io`] for a file that is
    /// missing or unreadable, [`Error::File`] for one that is not a whole safetensors file or a bad index,
    /// [`Error::Tensor`] for tensors that are missing, superfluous, doubled, or of another shape or dtype.
    pub fn open(dir: &Path, config: &Config) -> Result<Weights> {
        if dir.is_file() {
            return gguf::Gguf::open(dir)?.weights(config);
        }
        let (layout, quantization) = (Layout::of(dir)?, Quantization::of(dir)?);
        let Some(index_path) = &layout.index else {
            let mut found = Found::new(&layout.files[0]);
            found.add(&Arc::new(Shard::map(layout.files[0].clone(), 0)?))?;
            return found.bind(config, quantization.as_ref());
        };
        let mut found = Found::new(index_path);
        for (i, path) in layout.files.iter().enumerate() {
            found.add(&Arc::new(Shard::map(path.clone(), i)?))?;
        }
        let mut table = BTreeSet::new();
        Weights::table(config, |name, _| {
            table.insert(name);
            Ok(())
        })?;
        let needed = |name: &str| {
            let matrix = quantization.as_ref().and_then(|_| quantization::matrix(name));
            table.contains(name) || matrix.is_some_and(|matrix| table.contains(&matrix))
        };
        for (name, file) in layout.placed.iter().filter(|(name, _)| needed(name)) {
            let path = dir.join(file);
            match found.tensors.get(name) {
                Some((shard, _)) if shard.path == path => {}
                _ if !path.exists() => {
                    let placed = layout.placed.iter().filter(|(name, f)| *f == file && needed(name)).count();
                    return Err(Error::file(path, format!("is missing; {INDEX} places {placed} tensors in it")));
                }
                other => {
                    let found = other.map_or("no such tensor".into(), |(s, _)| format!("it in {}", s.path.display()));
                    return Err(Error::tensor(&path, name, format!("it here, says {INDEX}"), found));
                }
            }
        }
        found.bind(config, quantization.as_ref())
    }

    /// Checks a safetensors file that is part of the program against `config`.
    ///
    /// # Errors
    /// As [`Weights::open`], with `<embedded>` for the file.
    pub fn embedded(bytes: &'static [u8], config: &Config) -> Result<Weights> {
        let path = PathBuf::from("<embedded>");
        let mut found = Found::new(&path);
        found.add(&Arc::new(Shard { path: path.clone(), index: 0, data: Data::Static(bytes) }))?;
        found.bind(config, None)
    }

    /// Every tensor once, in the order in which data flows through them; a tied head is not repeated.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let layers = self
            .layers
            .iter()
            .flat_map(|l| [&l.attn_norm, &l.wq, &l.wk, &l.wv, &l.wo, &l.ffn_norm, &l.w_gate, &l.w_up, &l.w_down]);
        let head = (self.lm_head.name != self.embed.name).then_some(&self.lm_head);
        [&self.embed].into_iter().chain(layers).chain([&self.final_norm]).chain(head)
    }

    /// Bytes of all tensors as stored.
    pub fn bytes(&self) -> u64 {
        self.tensors().map(Tensor::file_bytes).sum()
    }
}

/// One file with tensors.
pub(in crate::files) struct Shard {
    path: PathBuf,
    index: usize,
    data: Data,
}

enum Data {
    Mapped {
        map: Mmap,
        #[cfg_attr(not(unix), expect(dead_code))]
        file: File,
    },
    Static(&'static [u8]),
    Owned(Vec<u8>),
}

impl Shard {
    pub(in crate::files) fn map(path: PathBuf, index: usize) -> Result<Shard> {
        // Opening a pipe would block, and a directory opens but does not map.
        if !std::fs::metadata(&path).map_err(Error::io(&path))?.is_file() {
            return Err(Error::file(path, "is not a regular file"));
        }
        let file = File::open(&path).map_err(Error::io(&path))?;
        // SAFETY: the mapping is read-only and private to this struct. That nobody changes the file while it lives
        // cannot be enforced on any system; it is the documented contract of `Weights::open`, and the file is one
        // that the user named as the model to run.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(&path))?;
        Ok(Shard { path, index, data: Data::Mapped { map, file } })
    }

    pub(in crate::files) fn bytes(&self) -> &[u8] {
        match &self.data {
            Data::Mapped { map, .. } => map,
            Data::Static(bytes) => bytes,
            Data::Owned(bytes) => bytes,
        }
    }

    pub(in crate::files) fn path(&self) -> &Path {
        &self.path
    }

    #[cfg(unix)]
    fn read(&self, at: usize, buf: &mut [u8]) -> Result<()> {
        use std::{io, os::unix::fs::FileExt};
        let file = match &self.data {
            Data::Mapped { file, .. } => file,
            Data::Static(_) | Data::Owned(_) => {
                buf.copy_from_slice(&self.bytes()[at..at + buf.len()]);
                return Ok(());
            }
        };
        let end = at + buf.len();
        let mut from = at;
        while from < end {
            match file.read_at(&mut buf[from - at..], from as u64) {
                Ok(0) => {
                    // not `from`: this part may begin beyond the end
                    let len = file.metadata().map_err(Error::io(&self.path))?.len();
                    let what =
                        format!("ends at byte {len}, data was expected up to {end}: cut short since it was opened");
                    return Err(Error::file(&self.path, what));
                }
                Ok(n) => from += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    let e = io::Error::new(e.kind(), format!("reading at byte {from}: {e}"));
                    return Err(Error::io(&self.path)(e));
                }
            }
        }
        Ok(())
    }
}

/// The tensors that the files of a checkpoint have, before they are checked against a configuration.
struct Found {
    /// The file to name when a tensor is nowhere: the only one, or the index.
    home: PathBuf,
    tensors: BTreeMap<String, (Arc<Shard>, Entry)>,
}

impl Found {
    fn new(home: &Path) -> Found {
        Found { home: home.to_path_buf(), tensors: BTreeMap::new() }
    }

    fn add(&mut self, shard: &Arc<Shard>) -> Result<()> {
        for entry in read_header(&shard.path, shard.bytes())? {
            let name = entry.name.clone();
            if let Some((other, _)) = self.tensors.insert(name.clone(), (shard.clone(), entry)) {
                let found = format!("it in {} as well", other.path.display());
                return Err(Error::tensor(&shard.path, &name, "each tensor in one file", found));
            }
        }
        Ok(())
    }

    /// Takes every tensor of the table, and nothing may be left.
    fn bind(mut self, config: &Config, quantization: Option<&Quantization>) -> Result<Weights> {
        let weights = Weights::table(config, |name, shape| {
            if let (Some(quantization), &[rows, cols]) = (quantization, shape)
                && let Some(tensor) = quantization.bind(&mut self, &name, [rows, cols])?
            {
                return Ok(tensor);
            }
            let Some((shard, entry)) = self.tensors.remove(&name) else {
                let expected = format!("a tensor of shape {shape:?}");
                return Err(Error::tensor(&self.home, &name, expected, "no such tensor"));
            };
            if entry.shape != shape {
                let expected = format!("shape {shape:?} by config.json");
                return Err(Error::tensor(&shard.path, &name, expected, format!("shape {:?}", entry.shape)));
            }
            let dtype = Dtype::of(entry.dtype);
            let dtype = dtype.map_err(|[expected, found]| Error::tensor(&shard.path, &name, expected, found))?;
            let (rows, cols) = match *shape {
                [rows, cols] => (rows, cols),
                _ => (1, shape.iter().product()),
            };
            Ok(Tensor { shard, name: name.into(), dtype, rows, cols, range: entry.range, stored: None })
        })?;
        if let Some(quantization) = quantization {
            quantization.drop_ignored(&mut self.tensors);
        }
        self.check_extra(config, &weights)?;
        Ok(weights)
    }

    fn check_extra(&self, config: &Config, weights: &Weights) -> Result<()> {
        for (name, (shard, entry)) in &self.tensors {
            if name.ends_with(".rotary_emb.inv_freq") {
                continue;
            }
            let expected = if name != HEAD {
                format!("no such tensor in a Llama of {} layers without biases", config.n_layers)
            } else if !same_where_sampled(weights.embed.bytes(), &shard.bytes()[entry.range.clone()]) {
                format!("a copy of {EMBED}, since config.json says tie_word_embeddings")
            } else {
                continue;
            };
            return Err(Error::tensor(&shard.path, name, expected, format!("{:?} {:?}", entry.dtype, entry.shape)));
        }
        Ok(())
    }
}

/// Compares the lengths, and the beginning, middle and end of two tensors: enough to tell a head of its own from a
/// copy of the embedding without reading a gigabyte.
fn same_where_sampled(a: &[u8], b: &[u8]) -> bool {
    const WINDOW: usize = 64 << 10;
    let window = a.len().min(WINDOW);
    a.len() == b.len()
        && [0, (a.len() - window) / 2, a.len() - window].into_iter().all(|s| a[s..s + window] == b[s..s + window])
}
