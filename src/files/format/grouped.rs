//! The formats of quantized Hugging Face checkpoints: codes in one tensor, scales and zero points in others.

use super::{awq, e4m3, gptq, int8, packed};
use crate::files::config::Dtype;
use std::fmt;

/// How a quantized Hugging Face checkpoint stores a matrix: a value is `scale * (code - zero point)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grouped {
    /// How the codes lie.
    pub layout: Layout,
    /// Type of the scales.
    pub scale: Dtype,
    /// Rows and columns of the tiles that share a scale.
    pub group: [usize; 2],
}

/// How the codes of a matrix `[rows, cols]` lie, and their zero points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Floats of 8 bits `[rows, cols]`, of 4 bits exponent and 3 bits mantissa, without infinities.
    E4m3,
    /// Integers with sign `[rows, cols]`; zero points as their scales.
    Int8,
    /// compressed-tensors' `pack-quantized`: words of 32 bits `[rows, cols * bits / 32]`; zero points
    /// `[rows * bits / 32, groups]`.
    Packed {
        /// 4 or 8.
        bits: u32,
    },
    /// GPTQ: words of 32 bits `[cols * bits / 32, rows]`, scales `[groups, rows]`, zero points
    /// `[groups, rows * bits / 32]`.
    Gptq {
        /// 4 or 8.
        bits: u32,
        /// What is added to a stored zero point: 1, in version 2 of the format 0.
        zero: u32,
    },
    /// AWQ's `gemm`: words of 8 codes `[cols, rows / 8]`, scales `[groups, rows]`, zero points `[groups, rows / 8]`.
    Awq,
}

/// The bytes of a matrix's tensors.
#[derive(Clone, Copy)]
pub struct Parts<'a> {
    /// The codes.
    pub codes: &'a [u8],
    /// Their scales.
    pub scales: &'a [u8],
    /// Their zero points; none where that is all zeros.
    pub zeros: Option<&'a [u8]>,
    /// The group of each column, as i32 in range; without them the groups are one beside the other.
    pub groups: Option<&'a [u8]>,
}

impl Layout {
    /// Bits of a code.
    pub fn bits(self) -> u32 {
        match self {
            Layout::E4m3 | Layout::Int8 => 8,
            Layout::Packed { bits } | Layout::Gptq { bits, .. } => bits,
            Layout::Awq => 4,
        }
    }

    /// Scales and zero points have a row for each group, not one for each row of the matrix.
    pub(crate) fn is_transposed(self) -> bool {
        matches!(self, Layout::Gptq { .. } | Layout::Awq)
    }

    pub(super) fn row_bytes(self, cols: usize) -> Option<usize> {
        match self {
            Layout::E4m3 | Layout::Int8 => Some(cols),
            Layout::Packed { bits } => cols.checked_mul(bits as usize)?.checked_div(32)?.checked_mul(4),
            Layout::Gptq { .. } | Layout::Awq => None,
        }
    }
}

impl Grouped {
    /// The values of as many rows as `out` holds, from row `first` on, of a matrix `[rows, cols]`.
    ///
    /// # Panics
    /// When the parts are smaller than their layout says, or a column's group is out of range.
    pub fn values(&self, [rows, cols]: [usize; 2], parts: Parts, first: usize, out: &mut [f32]) {
        match self.layout {
            Layout::E4m3 => e4m3::codes(parts.codes, cols, first, out),
            Layout::Int8 => int8::codes(parts.codes, cols, first, out),
            Layout::Packed { bits } => packed::codes(bits, parts.codes, cols, first, out),
            Layout::Gptq { bits, .. } => gptq::codes(bits, parts.codes, [rows, cols], first, out),
            Layout::Awq => awq::codes(parts.codes, [rows, cols], first, out),
        }
        let [high, wide] = self.group;
        let (width, groups) = (self.scale.bytes(), cols.div_ceil(wide));
        let (mut scales, mut zeros) = (vec![0f32; groups], vec![0f32; groups]);
        for (row, out) in (first..).zip(out.chunks_exact_mut(cols)) {
            for (g, scale) in scales.iter_mut().enumerate() {
                let at = if self.layout.is_transposed() { g * rows + row } else { row / high * groups + g };
                *scale = self.scale.to_f32(&parts.scales[at * width..(at + 1) * width])[0];
            }
            if let Some(stored) = parts.zeros {
                for (g, zero) in zeros.iter_mut().enumerate() {
                    *zero = match self.layout {
                        Layout::E4m3 => 0.0,
                        Layout::Int8 => int8::zero(stored, row / high * groups + g),
                        Layout::Packed { bits } => packed::zero(bits, stored, groups, row, g),
                        Layout::Gptq { bits, zero } => gptq::zero(bits, zero, stored, rows, row, g),
                        Layout::Awq => awq::zero(stored, rows, row, g),
                    };
                }
            }
            match parts.groups {
                None => {
                    for ((out, scale), zero) in out.chunks_mut(wide).zip(&scales).zip(&zeros) {
                        out.iter_mut().for_each(|x| *x = (*x - zero) * scale);
                    }
                }
                Some(of) => {
                    for (x, g) in out.iter_mut().zip(words(of)) {
                        *x = (*x - zeros[g as usize]) * scales[g as usize];
                    }
                }
            }
        }
    }
}

impl fmt::Display for Grouped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.layout {
            Layout::E4m3 => write!(f, "e4m3")?,
            Layout::Int8 => write!(f, "int8")?,
            Layout::Packed { bits } => write!(f, "int{bits}")?,
            Layout::Gptq { bits, .. } => write!(f, "GPTQ int{bits}")?,
            Layout::Awq => write!(f, "AWQ int4")?,
        }
        match self.group {
            [1, wide] => write!(f, " of groups of {wide}"),
            [high, wide] => write!(f, " of groups of {high}x{wide}"),
        }
    }
}

/// Words of 32 bits.
pub(super) fn words(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b))
}

/// Word `i`.
pub(super) fn word(bytes: &[u8], i: usize) -> u32 {
    u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
}
