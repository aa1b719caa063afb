//! The formats of quantized Hugging Face checkpoints: codes in one tensor, scales and zero points in others.

use super::{awq, e4m3, fit, gptq, int8, packed, words::words};
use crate::files::config::Dtype;
use std::{fmt, slice};

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
    /// Their zero points; `None` when all of them are 0.
    pub zeros: Option<&'a [u8]>,
    /// The group of each column, as i32 in range; without them consecutive columns form the groups.
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

    /// Whether scales and zero points have a row for each group instead of a row for each row of the matrix.
    pub(crate) fn is_transposed(self) -> bool {
        matches!(self, Layout::Gptq { .. } | Layout::Awq)
    }

    pub(crate) fn row_bytes(self, cols: usize) -> Option<usize> {
        match self {
            Layout::E4m3 | Layout::Int8 => Some(cols),
            Layout::Packed { bits } => cols.checked_mul(bits as usize)?.checked_div(32)?.checked_mul(4),
            Layout::Gptq { .. } | Layout::Awq => None,
        }
    }
}

impl Grouped {
    /// The codes of as many rows as `out` holds, from row `first` on, of a matrix `[rows, cols]`.
    pub(in crate::files) fn codes(&self, [rows, cols]: [usize; 2], parts: Parts, first: usize, out: &mut [f32]) {
        match self.layout {
            Layout::E4m3 => e4m3::codes(parts.codes, cols, first, out),
            Layout::Int8 => int8::codes(parts.codes, cols, first, out),
            Layout::Packed { bits } => packed::codes(bits, parts.codes, cols, first, out),
            Layout::Gptq { bits, .. } => gptq::codes(bits, parts.codes, [rows, cols], first, out),
            Layout::Awq => awq::codes(parts.codes, [rows, cols], first, out),
        }
    }

    /// The scales and zero points of a row: one for each group of columns.
    pub(in crate::files) fn scales(
        &self,
        rows: usize,
        parts: Parts,
        row: usize,
        scales: &mut [f32],
        zeros: &mut [f32],
    ) {
        let (high, width, groups) = (self.group[0], self.scale.bytes(), scales.len());
        for (g, scale) in scales.iter_mut().enumerate() {
            let at = if self.layout.is_transposed() { g * rows + row } else { row / high * groups + g };
            self.scale.read(&parts.scales[at * width..(at + 1) * width], slice::from_mut(scale));
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
    }

    /// The values of as many rows as `out` holds, from row `first` on, of a matrix `[rows, cols]`.
    ///
    /// # Panics
    /// When the parts are smaller than their layout says, or a column's group is out of range.
    pub fn values(&self, [rows, cols]: [usize; 2], parts: Parts, first: usize, out: &mut [f32]) {
        self.codes([rows, cols], parts, first, out);
        let wide = self.group[1];
        let (mut scales, mut zeros) = (vec![0f32; cols.div_ceil(wide)], vec![0f32; cols.div_ceil(wide)]);
        for (row, out) in (first..).zip(out.chunks_exact_mut(cols)) {
            self.scales(rows, parts, row, &mut scales, &mut zeros);
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

impl Grouped {
    /// Fits the scales of one row of finite values, and writes them to `out` as they are stored; 0 where all values of
    /// a group are 0. With `inputs`, one for each value, the square of an error counts that much, and no group has a larger sum
    /// than without them.
    ///
    /// # Panics
    /// For a layout that is not written, and for groups of several rows.
    pub(crate) fn fit(&self, row: &[f32], inputs: Option<&[f32]>, out: &mut [u8]) {
        assert_eq!(self.group[0], 1, "a group of one row");
        let scale = |x: &[f32], w: &[f32]| {
            let scale = match self.layout {
                Layout::E4m3 => e4m3::scale(x, w),
                Layout::Packed { bits } => packed::scale(bits, x, w),
                other => panic!("{other:?} is not written"),
            };
            self.stored(scale)
        };
        let wide = self.group[1].min(row.len());
        let ones = vec![1.0; wide];
        let one = |(g, x): (usize, &[f32])| {
            let plain = scale(x, &ones[..x.len()]);
            let Some(w) = inputs.map(|w| &w[g * wide..][..x.len()]) else { return plain };
            let weighted = scale(x, w);
            if self.error(x, w, weighted) < self.error(x, w, plain) { weighted } else { plain }
        };
        let scales: Vec<f32> = row.chunks(wide).enumerate().map(one).collect();
        self.scale.round(&scales, out);
    }

    /// A scale as it is read again.
    fn stored(&self, scale: f32) -> f32 {
        let mut bytes = [0; 4];
        let bytes = &mut bytes[..self.scale.bytes()];
        self.scale.round(&[scale], bytes);
        self.scale.to_f32(bytes)[0]
    }

    /// The sum of squared errors of a group with this scale, each `w` times.
    fn error(&self, x: &[f32], w: &[f32], scale: f32) -> f64 {
        match self.layout {
            Layout::E4m3 => fit::error(x, w, e4m3::nearest_values(x, scale)),
            Layout::Packed { bits } => fit::error(x, w, packed::nearest_values(bits, x, scale)),
            other => panic!("{other:?} is not written"),
        }
    }

    /// The codes of one row of finite values, nearest to them with the scales that [`Grouped::fit`] gave.
    ///
    /// # Panics
    /// As [`Grouped::fit`].
    pub(crate) fn encode(&self, row: &[f32], scales: &[u8], out: &mut [u8]) {
        let scales = self.scale.to_f32(scales);
        match self.layout {
            Layout::E4m3 => {
                let codes = row.chunks(self.group[1]).zip(scales).flat_map(|(x, scale)| e4m3::nearest_codes(x, scale));
                out.iter_mut().zip(codes).for_each(|(out, q)| *out = q);
            }
            Layout::Packed { bits } => packed::encode(bits, row, self.group[1], &scales, out),
            other => panic!("{other:?} is not written"),
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What is written, the columns of a group, and how far it may be from what was given.
    const LAYOUTS: [(Layout, usize, f64); 4] = [
        (Layout::E4m3, 96, 0.03),
        (Layout::Packed { bits: 8 }, 96, 0.01),
        (Layout::Packed { bits: 4 }, 32, 0.10),
        (Layout::Packed { bits: 4 }, 96, 0.12),
    ];

    /// Values like those of weights.
    fn samples(n: usize) -> Vec<f32> {
        let mut state = 3u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| 0.05 * (next() + next() + next())).collect()
    }

    /// What counts by its inputs is nearer with them than without, in every group.
    #[test]
    fn inputs_say_what_counts() {
        let cols = 96;
        let inputs: Vec<f32> = (0..cols).map(|i| if i % 8 == 3 { 50.0 } else { 0.1 + (i % 5) as f32 }).collect();
        for (layout, wide, _) in LAYOUTS {
            let grouped = Grouped { layout, scale: Dtype::Bf16, group: [1, wide] };
            let (mut with, mut without) = (0.0, 0.0);
            for row in samples(40 * cols).chunks_exact(cols) {
                let errors = |given: Option<&[f32]>| -> Vec<f64> {
                    let (mut scales, mut codes) = (vec![0; cols / wide * 2], vec![0; layout.row_bytes(cols).unwrap()]);
                    grouped.fit(row, given, &mut scales);
                    grouped.encode(row, &scales, &mut codes);
                    let parts = Parts { codes: &codes, scales: &scales, zeros: None, groups: None };
                    let mut back = vec![f32::NAN; cols];
                    grouped.values([1, cols], parts, 0, &mut back);
                    let groups = row.chunks(wide).zip(inputs.chunks(wide)).zip(back.chunks(wide));
                    groups.map(|((x, w), back)| fit::error(x, w, back.iter().copied())).collect()
                };
                for (ours, plain) in errors(Some(&inputs)).into_iter().zip(errors(None)) {
                    assert!(ours <= plain, "{grouped}: {ours} {plain}");
                    (with, without) = (with + ours, without + plain);
                }
            }
            assert!(with < 0.98 * without, "{grouped}: {with} of {without}");
        }
    }

    /// What is written is read as the values nearest to those that were given.
    #[test]
    fn rows_hold_their_values() {
        let (rows, cols) = (5, 96);
        let mut x = samples(rows * cols);
        x[..cols].fill(0.0);
        for (layout, wide, limit) in LAYOUTS {
            let grouped = Grouped { layout, scale: Dtype::Bf16, group: [1, wide] };
            let (width, groups) = (layout.row_bytes(cols).unwrap(), cols / wide);
            let (mut codes, mut scales) = (vec![0; rows * width], vec![0; rows * groups * 2]);
            for (i, row) in x.chunks_exact(cols).enumerate() {
                let scales = &mut scales[i * groups * 2..(i + 1) * groups * 2];
                grouped.fit(row, None, scales);
                grouped.encode(row, scales, &mut codes[i * width..(i + 1) * width]);
            }
            let parts = Parts { codes: &codes, scales: &scales, zeros: None, groups: None };
            let mut back = vec![f32::NAN; rows * cols];
            grouped.values([rows, cols], parts, 0, &mut back);
            assert_eq!(back[..cols], x[..cols], "zeros stay zeros");
            let sum = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x * x)).sum::<f64>();
            let error = sum(&mut x.iter().zip(&back).map(|(a, b)| a - b)) / sum(&mut x.iter().copied());
            assert!(error.sqrt() < limit && error.sqrt() > limit / 5.0, "{grouped}: {}", error.sqrt());
        }
    }
}
