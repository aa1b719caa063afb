//! Quantizes weights: into checkpoints, written as GGUF files, which llama.cpp reads too, or as compressed-tensors directories, which
//! vLLM and transformers read too; and one tensor at a time while a model is loaded.
//!
//! Scales are fitted by least squares, for each group or block separately: to the weights alone, or with the square of each error
//! weighed by what its column is multiplied with ([`Inputs`]).

mod compressed;
mod gguf;
mod inputs;

pub use inputs::Inputs;

use super::{
    checkpoint::ModelFiles,
    config::Dtype,
    format::{Block, Format, Layout},
    lora::{self, Lora},
    output::Output,
    weights::{Tensor, Weights},
};
use crate::error::{Error, Result};
use std::{collections::BTreeMap, fmt, num::NonZeroUsize, path::Path, str::FromStr};

/// Weights that are quantized between two writes.
const BATCH: usize = 1 << 24;
/// Columns that share a scale of int4 where nothing else is asked for.
const GROUP: usize = 128;

/// What weights become.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// A GGUF file of this type.
    Gguf(&'static Block),
    /// compressed-tensors' `pack-quantized`: integers of 4 or 8 bits.
    Int(u32),
    /// compressed-tensors' `float-quantized`: e4m3 with a scale a row.
    Fp8,
}

/// Names of the targets.
pub const TARGETS: [&str; 7] = ["q8_0", "q4_0", "q4_k", "q6_k", "int8", "int4", "fp8"];

/// Reads a name of [`TARGETS`].
impl FromStr for Target {
    type Err = String;
    fn from_str(s: &str) -> Result<Target, String> {
        let block = |block: &&&'static Block| block.name.eq_ignore_ascii_case(s) && TARGETS.contains(&s);
        match s {
            "int8" => Ok(Target::Int(8)),
            "int4" => Ok(Target::Int(4)),
            "fp8" => Ok(Target::Fp8),
            _ => super::format::BLOCKS
                .iter()
                .find(block)
                .map(|block| Target::Gguf(block))
                .ok_or_else(|| format!("{s:?}: expected {}", TARGETS.join(", "))),
        }
    }
}

impl Target {
    /// It is one file, not a directory.
    pub fn is_file(self) -> bool {
        matches!(self, Target::Gguf(_))
    }
}

/// How a model is to be quantized.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// The format.
    pub target: Target,
    /// Columns that share a scale, of int4 and int8; 128 and the whole row when absent.
    pub group: Option<usize>,
    /// Matrices that stay as they are: whole names of modules (`lm_head`, `model.layers.0.mlp.down_proj`), or their last parts
    /// (`down_proj`: that of each layer).
    pub ignore: Vec<String>,
    /// By which the errors of weights are weighed; a matrix that is not among them has all columns alike.
    pub inputs: Inputs,
}

/// `FORMAT` as in [`TARGETS`], or `FORMAT:GROUP` of int4 and int8.
impl FromStr for Options {
    type Err = String;
    fn from_str(s: &str) -> Result<Options, String> {
        let (target, group) = match s.split_once(':') {
            None => (s, None),
            Some((target, group)) => {
                let columns = group.parse::<NonZeroUsize>();
                (target, Some(columns.map_err(|_| format!("{group:?} is no number of columns, as in int4:64"))?.get()))
            }
        };
        let target = target.parse()?;
        if group.is_some() && !matches!(target, Target::Int(_)) {
            return Err(format!("{s:?}: int4 and int8 alone have groups to choose"));
        }
        Ok(Options { target, group, ignore: Vec::new(), inputs: Inputs::default() })
    }
}

impl Options {
    /// What a tensor of a model becomes.
    ///
    /// # Errors
    /// `Tensor` for a matrix whose columns are no whole groups or blocks.
    fn format(&self, weights: &Weights, t: &Tensor) -> Result<Format> {
        let ignored = self.ignore.iter().any(|name| is_named(t, name));
        if !is_matrix(t) || ignored {
            return Ok(Format::Plain(t.dtype()));
        }
        match self.target {
            Target::Gguf(block) => gguf::format(t, block, t.name() == weights.lm_head.name()).map(Format::Block),
            Target::Int(bits) => compressed::format(t, Layout::Packed { bits }, self.columns()),
            Target::Fp8 => compressed::format(t, Layout::E4m3, None),
        }
    }

    /// Columns that share a scale; none: the whole row.
    fn columns(&self) -> Option<usize> {
        self.group.or((self.target == Target::Int(4)).then_some(GROUP))
    }

    /// The weights of a model as they will be, of zeros, so that what they need can be said before they are made. The memory of zeros is
    /// not touched, so it is none.
    ///
    /// # Errors
    /// `Unsupported` for weights that are quantized, `Tensor` for a matrix whose columns are no whole groups or blocks.
    pub fn planned(&self, weights: &Weights) -> Result<Weights> {
        expect_plain(weights)?;
        weights.map_matrices(|t| match self.format(weights, t)? {
            Format::Plain(_) => Ok(t.clone()),
            format => Ok(zeros(t, format)),
        })
    }

    /// A tensor of a model, with the adapters added, as it will be; plain ones are not changed.
    ///
    /// # Errors
    /// As [`Options::planned`], and `Tensor` for weights that are no numbers.
    pub(crate) fn tensor(&self, weights: &Weights, adapters: &[Lora], t: &Tensor) -> Result<Tensor> {
        let format = self.format(weights, t)?;
        let Some(codes) = format.is_quantized().then(|| codes_bytes(t, format)) else { return Ok(t.clone()) };
        let inputs = self.inputs.of(t)?;
        let (t, mut codes) = (adapted(adapters, t, Dtype::F32), vec![0; codes]);
        let mut scales = Vec::new();
        match format {
            Format::Grouped(grouped) => {
                scales = compressed::fit(&t, grouped, inputs)?;
                compressed::encode(&t, grouped, &scales, 0, &mut codes)?;
            }
            _ => gguf::encode(&t, format, inputs, |row| row, &mut codes)?,
        }
        Ok(t.quantized(format, codes, scales))
    }
}

/// Bytes of the codes, or of the blocks, of a matrix.
fn codes_bytes(t: &Tensor, format: Format) -> usize {
    t.rows() * format.row_bytes(t.cols()).expect("whole blocks or words: that was checked")
}

/// A matrix of a format with nothing in it.
fn zeros(t: &Tensor, format: Format) -> Tensor {
    let scales = match format {
        Format::Grouped(grouped) => t.rows() * t.cols().div_ceil(grouped.group[1]) * grouped.scale.bytes(),
        _ => 0,
    };
    t.quantized(format, vec![0; codes_bytes(t, format)], vec![0; scales])
}

/// Nothing is quantized already.
pub(crate) fn expect_plain(weights: &Weights) -> Result<()> {
    let Some(t) = weights.tensors().find(|t| t.format().is_quantized()) else { return Ok(()) };
    let what = format!(
        "{} is {} already; quantizing it again would add the errors of both: use the model that this one was made from",
        t.name(),
        t.format()
    );
    Err(Error::Unsupported { path: t.file().into(), what })
}

/// How many matrices were written in which format.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// By the names of the formats.
    pub matrices: BTreeMap<String, usize>,
    /// Bytes of the weights, as they are written.
    pub bytes: u64,
}

/// For example `210 matrices as Q4_K, 1 as Q6_K`.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (format, n)) in self.matrices.iter().enumerate() {
            let (comma, matrices) = if i == 0 { ("", " matrices") } else { (", ", "") };
            write!(f, "{comma}{n}{matrices} as {format}")?;
        }
        write!(f, "; {:.1} MB of weights", self.bytes as f64 / 1e6)
    }
}

/// Checks that a model can be quantized so, and gives its directory.
///
/// # Errors
/// Those of [`quantize`] that do not depend on the weights' values.
pub fn check<'a>(files: &'a ModelFiles, options: &Options) -> Result<&'a Path> {
    let Some(dir) = &files.dir else {
        return Err(Error::Input("the demo model has no files: name a model directory".into()));
    };
    if dir.is_file() {
        let what = "is a GGUF file; quantize reads a model directory in Hugging Face layout: use the model that it was made from";
        return Err(Error::Unsupported { path: dir.clone(), what: what.into() });
    }
    expect_plain(&files.weights)?;
    for name in &options.ignore {
        if !files.weights.tensors().any(|t| is_named(t, name)) {
            let what = "no matrix of the model has this name, as in lm_head, down_proj or model.layers.0.mlp.down_proj";
            return Err(Error::Input(format!("--ignore {name}: {what}")));
        }
    }
    files.weights.tensors().try_for_each(|t| options.format(&files.weights, t).map(drop))?;
    Ok(dir)
}

/// Writes the model, with its adapters added, and finishes the output. That must be [a file](Output::file) where
/// [`Target::is_file`], else a directory. `progress` gets the work done and the whole work, in weights.
///
/// # Errors
/// `Unsupported` for a model whose files are quantized or no Hugging Face directory, and for what the format has no place for;
/// `Tensor` for a matrix whose columns are no whole groups or blocks, or whose inputs are of another model, and for weights that are
/// no numbers; `Input` for an ignored name that no matrix has; `Io` when reading or writing fails.
pub fn quantize(
    files: &ModelFiles,
    options: &Options,
    output: Output,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Report> {
    let dir = check(files, options)?;
    match options.target {
        Target::Gguf(block) => gguf::write(files, dir, block, options, output, progress),
        Target::Int(bits) => compressed::write(files, dir, Layout::Packed { bits }, options, output, progress),
        Target::Fp8 => compressed::write(files, dir, Layout::E4m3, options, output, progress),
    }
}

/// The module that a matrix is of.
fn module(t: &Tensor) -> &str {
    t.name().strip_suffix(".weight").unwrap_or(t.name())
}

fn is_matrix(t: &Tensor) -> bool {
    t.rows() > 1
}

/// Whether a matrix is of the module `name`, or of one that ends with it.
fn is_named(t: &Tensor, name: &str) -> bool {
    let ends = |rest: &str| rest.is_empty() || rest.ends_with('.');
    is_matrix(t) && module(t).strip_suffix(name).is_some_and(ends)
}

/// The tensor with adapters added.
fn adapted(adapters: &[Lora], t: &Tensor, dtype: Dtype) -> Tensor {
    lora::merged(adapters, t, dtype).map_or_else(|| t.clone(), |bytes| t.with_bytes(dtype, bytes))
}

/// Reads row `row` of `t`.
///
/// # Errors
/// [`Error::Tensor`] for a value that is no number or infinite.
fn read_row(t: &Tensor, row: usize, out: &mut [f32]) -> Result<()> {
    t.values(row, out);
    match out.iter().find(|x| !x.is_finite()) {
        None => Ok(()),
        Some(x) => Err(Error::tensor(t.file(), t.name(), "finite numbers", format!("{x} in row {row}"))),
    }
}

/// The columns of a matrix are not what a format needs.
fn indivisible(t: &Tensor, of: usize, what: &str) -> Error {
    let found = format!("{} columns; leave it out with --ignore {}", t.cols(), module(t));
    Error::tensor(t.file(), t.name(), format!("columns in multiples of {of}, {what}"), found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_targets() {
        for name in TARGETS {
            let target: Target = name.parse().unwrap();
            assert_eq!(target.is_file(), name.starts_with('q'), "{name}");
            if let Target::Gguf(block) = target {
                assert_eq!(block.name.to_lowercase(), name);
                block.encode(&vec![0.0; block.weights], None, &mut vec![0; block.bytes]); // is written
            }
        }
        let options = |s: &str| s.parse::<Options>();
        assert_eq!(options("int4:64").unwrap().columns(), Some(64));
        assert_eq!((options("int4").unwrap().columns(), options("int8").unwrap().columns()), (Some(GROUP), None));
        for (s, why) in
            [("q4_k:64", "int4 and int8 alone"), ("int4:0", "no number of columns"), ("q4", "expected q8_0")]
        {
            assert!(options(s).unwrap_err().contains(why), "{s}");
        }
        for other in ["q5_0", "Q8_0", "q4_k_m", "int3", ""] {
            assert!(other.parse::<Target>().unwrap_err().contains("expected q8_0, q4_0"), "{other}");
        }
    }
}
