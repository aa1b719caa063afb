//! How the weights of a matrix are stored. Each format has one file: its description, and the exact value of every
//! weight.
//!
//! There are two families. A GGUF type ([`Block`]) keeps the scales beside the weights that they belong to, in one
//! block. A Hugging Face checkpoint ([`Grouped`]) has codes in one tensor and their scales and offsets in others. A
//! value is computed in f32, in which each code is exact, and is rounded where the makers of the format round.

mod awq;
mod block;
pub(crate) mod e4m3;
mod fit;
mod gptq;
mod grouped;
mod int8;
mod packed;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;
mod words;

pub use block::Block;
pub use grouped::{Grouped, Layout, Parts};

use super::config::Dtype;
use std::fmt;

/// All types of GGUF files that have blocks. To add a type, write a file like `q8_0.rs` and list its unit here.
pub static BLOCKS: [&Block; 8] =
    [&q4_0::Q4_0, &q4_1::Q4_1, &q5_0::Q5_0, &q5_1::Q5_1, &q8_0::Q8_0, &q4_k::Q4_K, &q5_k::Q5_K, &q6_k::Q6_K];

/// How the weights of a matrix are stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Format {
    /// Numbers one after the other.
    Plain(Dtype),
    /// A GGUF type.
    Block(&'static Block),
    /// Codes, with scales in a tensor of their own.
    Grouped(Grouped),
}

impl Format {
    /// Its weights are codes of few bits, to be multiplied by a scale.
    pub fn is_quantized(self) -> bool {
        !matches!(self, Format::Plain(_))
    }

    /// Bits of a number or of a code.
    pub fn bits(self) -> u32 {
        match self {
            Format::Plain(dtype) => 8 * dtype.bytes() as u32,
            Format::Block(block) => block.bits,
            Format::Grouped(grouped) => grouped.layout.bits(),
        }
    }

    /// Consecutive weights of a row that share a scale; 1 of plain numbers.
    pub fn group(self) -> usize {
        match self {
            Format::Plain(_) => 1,
            Format::Block(block) => block.group,
            Format::Grouped(grouped) => grouped.group[1],
        }
    }

    /// Bytes of one row of `cols` weights. `None` where a row is not one run of bytes (words of GPTQ and AWQ hold codes
    /// of several rows), and when `cols` is not a whole number of blocks.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        match self {
            Format::Plain(dtype) => cols.checked_mul(dtype.bytes()),
            Format::Block(block) if cols.is_multiple_of(block.weights) => {
                (cols / block.weights).checked_mul(block.bytes)
            }
            Format::Block(_) => None,
            Format::Grouped(grouped) => grouped.layout.row_bytes(cols),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Format::Plain(dtype) => dtype.fmt(f),
            Format::Block(block) => f.write_str(block.name),
            Format::Grouped(grouped) => grouped.fmt(f),
        }
    }
}
