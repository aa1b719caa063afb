//! Quantized checkpoints, written: GGUF files of block types, which llama.cpp reads too, and compressed-tensors directories, which vLLM
//! and transformers read too.
//!
//! Scales are fitted by least squares, each group's or block's by itself, from the weights alone.

mod compressed;
mod gguf;

use super::{
    checkpoint::ModelFiles,
    config::Dtype,
    format::{Block, Layout},
    lora,
    output::Output,
    weights::Tensor,
};
use crate::error::{Error, Result};
use std::{collections::BTreeMap, fmt, str::FromStr};

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

/// As in [`TARGETS`].
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

/// What is made of a model.
#[derive(Clone, Debug)]
pub struct Options {
    /// The format.
    pub target: Target,
    /// Columns that share a scale, of int4 and int8; 128 and the whole row when absent.
    pub group: Option<usize>,
    /// Matrices that stay as they are: whole names of modules (`lm_head`, `model.layers.0.mlp.down_proj`), or their last parts
    /// (`down_proj`: that of each layer).
    pub ignore: Vec<String>,
}

/// How many matrices became what.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// By the names of the formats.
    pub matrices: BTreeMap<String, usize>,
    /// Bytes of the weights, as they are written.
    pub bytes: u64,
}

/// As in `210 matrices as Q4_K, 1 as Q6_K`.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (format, n)) in self.matrices.iter().enumerate() {
            let (comma, matrices) = if i == 0 { ("", " matrices") } else { (", ", "") };
            write!(f, "{comma}{n}{matrices} as {format}")?;
        }
        write!(f, "; {:.1} MB of weights", self.bytes as f64 / 1e6)
    }
}

/// Writes the model, with its adapters added, and finishes the output, which is [a file](Output::file) where [`Target::is_file`] and
/// a directory else. `progress` gets the work done and all of it, in weights.
///
/// # Errors
/// `Unsupported` for a model whose files are quantized or no Hugging Face directory, and for what the format has no place for;
/// `Tensor` for a matrix whose columns are no whole groups or blocks, and for weights that are no numbers; `Input` for an ignored
/// name that no matrix has; `Io` when reading or writing fails.
pub fn quantize(
    files: &ModelFiles,
    options: &Options,
    output: Output,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Report> {
    let Some(dir) = &files.dir else {
        return Err(Error::Input("the demo model has no files: name a model directory".into()));
    };
    if dir.is_file() {
        let what = "is a GGUF file; quantize reads a model directory in Hugging Face layout: use the model that it was made from";
        return Err(Error::Unsupported { path: dir.clone(), what: what.into() });
    }
    if let Some(t) = files.weights.tensors().find(|t| t.format().is_quantized()) {
        let what = format!(
            "{} is {} already; quantizing it again would add the errors of both: use the model that this one was made from",
            t.name(),
            t.format()
        );
        return Err(Error::Unsupported { path: t.file().into(), what });
    }
    for name in &options.ignore {
        if !files.weights.tensors().any(|t| is_named(t, name)) {
            let what = "no matrix of the model has this name, as in lm_head, down_proj or model.layers.0.mlp.down_proj";
            return Err(Error::Input(format!("--ignore {name}: {what}")));
        }
    }
    match options.target {
        Target::Gguf(block) => gguf::write(files, dir, block, options, output, progress),
        Target::Int(bits) => {
            let group = options.group.or((bits == 4).then_some(GROUP));
            compressed::write(files, dir, Layout::Packed { bits }, group, options, output, progress)
        }
        Target::Fp8 => compressed::write(files, dir, Layout::E4m3, None, options, output, progress),
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

/// The tensor with the model's adapters added.
fn adapted(files: &ModelFiles, t: &Tensor, dtype: Dtype) -> Tensor {
    lora::merged(&files.lora, t, dtype).map_or_else(|| t.clone(), |bytes| t.with_bytes(dtype, bytes))
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
                block.encode(&vec![0.0; block.weights], &mut vec![0; block.bytes]); // is written
            }
        }
        for other in ["q5_0", "Q8_0", "q4_k_m", "int3", ""] {
            assert!(other.parse::<Target>().unwrap_err().contains("expected q8_0, q4_0"), "{other}");
        }
    }
}
