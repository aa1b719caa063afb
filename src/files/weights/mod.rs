//! The tensors of a checkpoint: memory-mapped, and checked once against one table; after that they are trusted.
//!
//! Hugging Face tensor names appear here only ([`Weights::table`]).

mod header;
mod layout;
mod quantization;
#[cfg(unix)]
pub mod reader;
mod shard;
mod stored;
mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use header::{Entry, read_header};
pub(crate) use layout::Layout;
use quantization::Quantization;
pub(in crate::files) use quantization::quantization_key;
pub(in crate::files) use shard::Shard;
pub(in crate::files) use stored::Stored;
pub use table::{Biases, LayerTensors, Weights};
use table::{EMBED, HEAD};

use crate::{
    error::{Error, Result},
    files::{
        config::{Config, Dtype},
        gguf,
        model_files::INDEX,
    },
};

/// One tensor of a checkpoint. Cloning shares the file's mapping.
#[derive(Clone)]
pub struct Tensor {
    shard: Arc<Shard>,
    name: Arc<str>,
    dtype: Dtype,
    rows: usize,
    cols: usize,
    range: Range<usize>,
    /// Set where its bytes are not simply its elements in order.
    stored: Option<Arc<Stored>>,
}

impl Tensor {
    /// Its name in the file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Type of its elements; f32 for a quantized tensor, whose values are computed.
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
    /// For a tensor that is not [plain](Tensor::is_plain), the meaning of the bytes is that of its
    /// [format](Tensor::format).
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
        let shard = Arc::new(self.shard.owned(bytes));
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

impl Weights {
    /// The same with what `f` makes of each matrix; of a tied head what it made of the embedding.
    pub(in crate::files) fn map_matrices(&self, mut f: impl FnMut(&Tensor) -> Result<Tensor>) -> Result<Weights> {
        let embed = f(&self.embed)?;
        let mut layer = |l: &LayerTensors| {
            let (wq, wk, wv, wo) = (f(&l.wq)?, f(&l.wk)?, f(&l.wv)?, f(&l.wo)?);
            let (w_gate, w_up, w_down) = (f(&l.w_gate)?, f(&l.w_up)?, f(&l.w_down)?);
            Ok(LayerTensors { wq, wk, wv, wo, w_gate, w_up, w_down, ..l.clone() })
        };
        let layers = self.layers.iter().map(&mut layer).collect::<Result<_>>()?;
        let lm_head = if self.lm_head.name == self.embed.name { embed.clone() } else { f(&self.lm_head)? };
        Ok(Weights { embed, layers, final_norm: self.final_norm.clone(), lm_head })
    }

    /// Maps the safetensors of a model directory and checks them against `config`: `model.safetensors`, or else the
    /// files that `model.safetensors.index.json` lists. Nothing is copied and no page of data is read. Given the path
    /// of a GGUF file, it does the same with that file and its other pieces.
    ///
    /// Where `config.json` has a `quantization_config`, a matrix is read from the tensors that this method stores for
    /// it.
    ///
    /// Tolerated beside the table's tensors: `rotary_emb.inv_freq` (old checkpoints store what is computed), biases of zeros
    /// beside quantized matrices (some programs write one for each), and with tied embeddings a `lm_head.weight` that repeats the
    /// embedding. Every other extra tensor is an error,
    /// since ignoring it would compute another model. `metadata.total_size` of the index is not looked at, nor are entries of
    /// the index for tensors that the table has not.
    ///
    /// The files must not be changed while the `Weights`, or a `Tensor` of it, lives: the memory is the file. If
    /// another program truncates one of them meanwhile, this process ends with `SIGBUS` when it touches the memory. A
    /// GPU's weights are read from the file itself, where that is an error.
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
        found.add(&Arc::new(Shard::embedded(path.clone(), bytes)))?;
        found.bind(config, None)
    }

    /// Every tensor once, in the order in which data flows through them; a tied head is not repeated.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let layers = self.layers.iter().flat_map(|l| {
            [&l.attn_norm, &l.wq, &l.wk, &l.wv, &l.wo, &l.ffn_norm, &l.w_gate, &l.w_up, &l.w_down]
                .into_iter()
                .chain(l.head_norms.iter().flatten())
                .chain(l.biases.iter())
        });
        let head = (self.lm_head.name != self.embed.name).then_some(&self.lm_head);
        [&self.embed].into_iter().chain(layers).chain([&self.final_norm]).chain(head)
    }

    /// Bytes of all tensors as stored.
    pub fn bytes(&self) -> u64 {
        self.tensors().map(Tensor::file_bytes).sum()
    }
}

/// The tensors that the files of a checkpoint have, before they are checked against a configuration.
struct Found {
    /// The file to name in the error for a missing tensor: the only file, or the index.
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

    /// Takes every tensor of the table; an error when one is left over.
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
        self.check_extra(config, &weights, quantization.is_some())?;
        Ok(weights)
    }

    fn check_extra(&self, config: &Config, weights: &Weights, quantized: bool) -> Result<()> {
        for (name, (shard, entry)) in &self.tensors {
            let zeros = || shard.bytes()[entry.range.clone()].iter().all(|byte| *byte == 0);
            if name.ends_with(".rotary_emb.inv_freq") || quantized && name.ends_with("_proj.bias") && zeros() {
                continue;
            }
            let expected = if name != HEAD {
                config.arch.no_such_tensor(config.n_layers)
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

/// Compares the lengths, and the beginning, middle and end of two tensors: enough to tell a separate head from a copy
/// of the embedding without reading a gigabyte.
fn same_where_sampled(a: &[u8], b: &[u8]) -> bool {
    const WINDOW: usize = 64 << 10;
    let window = a.len().min(WINDOW);
    a.len() == b.len()
        && [0, (a.len() - window) / 2, a.len() - window].into_iter().all(|s| a[s..s + window] == b[s..s + window])
}
