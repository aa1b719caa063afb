//! Quantized weights as products take them: blocks of GGUF and bytes of e4m3 and integers where they lie in the mapped file, words
//! of GPTQ and AWQ in memory of their own, and scales in f32.

use super::simd::{Coded, Kind, Rows};
use crate::files::{
    format::{Format, Grouped, Layout},
    weights::Tensor,
};
use rayon::prelude::*;

/// Columns of the products' chunks: what a scale is for, or some of it.
const CHUNK: usize = 32;
/// Rows whose codes are brought together at once: words of GPTQ and AWQ lie across rows.
const ROWS: usize = 32;

/// A quantized matrix.
pub(super) struct Quantized {
    tensor: Tensor,
    codes: Option<Codes>,
}

/// What a matrix of codes has beside its tensor.
struct Codes {
    kind: Kind,
    /// Where they are not the tensor's bytes as they are.
    own: Option<Vec<u8>>,
    /// [rows, groups]
    scales: Vec<f32>,
    /// Zero points, where there are any. [rows, groups]
    zeros: Vec<u8>,
    groups: usize,
    /// Chunks of a group, as a power of 2.
    shift: u32,
}

/// How codes are multiplied, and what a stored one is above those that its zero points are for.
fn kind(grouped: Grouped) -> (Kind, f32) {
    match (grouped.layout, grouped.layout.bits()) {
        (Layout::E4m3, _) => (Kind::E4m3, 0.0),
        (Layout::Packed { bits }, 4) => (Kind::Int4, (1 << (bits - 1)) as f32),
        (Layout::Packed { bits }, _) => (Kind::Int8, (1 << (bits - 1)) as f32),
        (_, 4) => (Kind::Int4, 0.0),
        _ => (Kind::Int8, 0.0),
    }
}

/// Chunks of a group, as a power of 2.
fn shift(grouped: Grouped, cols: usize) -> Option<u32> {
    match grouped.group[1] {
        wide if wide >= cols => Some(usize::BITS - 1),
        wide if wide.is_multiple_of(CHUNK) && wide.is_power_of_two() => Some((wide / CHUNK).ilog2()),
        _ => None,
    }
}

impl Quantized {
    /// Whether products take a tensor as it is: its rows are whole chunks, groups are powers of 2, columns are in their order, and codes
    /// less their zero points are exact in bf16.
    pub(super) fn takes(t: &Tensor) -> bool {
        match t.format() {
            Format::Plain(_) => false,
            Format::Block(_) => true,
            Format::Grouped(g) => {
                let whole = t.cols().is_multiple_of(CHUNK) && shift(g, t.cols()).is_some();
                let signed = if matches!(g.layout, Layout::Gptq { .. }) { 128.0 } else { 0.0 };
                let exact = |row: usize| {
                    let (_, zeros) = t.scales(row)?;
                    (kind(g).0 != Kind::Int8 || zeros.iter().all(|z| *z == signed)).then_some(())
                };
                // without zero points and columns that are elsewhere one row says it
                let rows = if t.has_zeros() { t.rows() } else { 1 };
                whole && (0..rows).into_par_iter().all(|row| exact(row).is_some())
            }
        }
    }

    /// Bytes in memory of a tensor that is [taken](Quantized::takes).
    pub(super) fn bytes(t: &Tensor) -> u64 {
        let (rows, cols) = (t.rows(), t.cols());
        match t.format() {
            Format::Grouped(g) => {
                let groups = cols.div_ceil(g.group[1]);
                let beside = if kind(g).0 == Kind::E4m3 { 4 } else { 5 };
                (rows * (cols * g.layout.bits() as usize / 8 + groups * beside)) as u64
            }
            _ => t.file_bytes(),
        }
    }

    /// Those of them that are read in the mapped file.
    pub(super) fn in_file(t: &Tensor) -> u64 {
        match t.format() {
            Format::Grouped(g) if g.layout.is_transposed() => 0,
            Format::Grouped(g) => (t.rows() * t.cols() * g.layout.bits() as usize / 8) as u64,
            _ => t.file_bytes(),
        }
    }

    /// Of a tensor that is [taken](Quantized::takes).
    pub(super) fn new(t: &Tensor) -> Quantized {
        let Format::Grouped(grouped) = t.format() else { return Quantized { tensor: t.clone(), codes: None } };
        let ((kind, above), (rows, cols)) = (kind(grouped), (t.rows(), t.cols()));
        let groups = cols.div_ceil(grouped.group[1]);
        let (mut scales, mut zeros) = (vec![0f32; rows * groups], vec![0u8; rows * groups]);
        scales.par_chunks_mut(groups).zip(zeros.par_chunks_mut(groups)).enumerate().for_each(|(row, (to, zeros))| {
            let Some((scales, of)) = t.scales(row) else { return };
            let times = if kind == Kind::E4m3 { 256.0 } else { 1.0 }; // products have 2^-8 of it
            to.iter_mut().zip(scales).for_each(|(to, scale)| *to = times * scale);
            zeros.iter_mut().zip(of).for_each(|(to, zero)| *to = (zero + above) as u8);
        });
        let own = grouped.layout.is_transposed().then(|| rows_of_codes(t, kind));
        let shift = shift(grouped, cols).unwrap_or_default();
        Quantized { tensor: t.clone(), codes: Some(Codes { kind, own, scales, zeros, groups, shift }) }
    }

    /// Its tensor.
    pub(super) fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Rows `from..to` where they lie: `(first, last + 1, they)` of each run of them that are equally far apart.
    pub(super) fn rows(&self, from: usize, to: usize) -> impl Iterator<Item = (usize, usize, Rows<'_>)> {
        let head = self.tensor.paired();
        let half = head.map_or(usize::MAX, |head| head / 2);
        let mut next = from;
        std::iter::from_fn(move || {
            let first = next;
            next = to.min((first / half + 1).saturating_mul(half));
            (first < next).then(|| (first, next, self.run(first, next, head)))
        })
    }

    /// Rows that are neighbours, or, of a head whose halves are in turn in the file, every second one.
    fn run(&self, first: usize, to: usize, head: Option<usize>) -> Rows<'_> {
        let t = &self.tensor;
        match (t.format(), &self.codes) {
            (Format::Grouped(grouped), Some(c)) => {
                let width = t.cols() * grouped.layout.bits() as usize / 8;
                let of = first * c.groups..to * c.groups;
                Rows::Codes(Coded {
                    kind: c.kind,
                    codes: &c.own.as_deref().unwrap_or(t.bytes())[first * width..to * width],
                    width,
                    scales: &c.scales[of.clone()],
                    zeros: &c.zeros[of],
                    groups: c.groups,
                    shift: c.shift,
                })
            }
            (Format::Block(block), _) => {
                let width = t.cols() / block.weights * block.bytes;
                let (row, apart) = match head {
                    None => (first, 1),
                    Some(head) => (first / head * head + first % (head / 2) * 2 + first % head / (head / 2), 2),
                };
                Rows::Blocks { block, bytes: &t.bytes()[row * width..], stride: apart * width }
            }
            _ => unreachable!("quantized"),
        }
    }
}

/// The codes of words that lie across rows, row by row.
fn rows_of_codes(t: &Tensor, kind: Kind) -> Vec<u8> {
    let (cols, per_byte) = (t.cols(), if kind == Kind::Int4 { 2 } else { 1 });
    let mut own = vec![0u8; t.rows() * cols / per_byte];
    own.par_chunks_mut(ROWS * cols / per_byte).enumerate().for_each_init(Vec::new, |codes, (i, own)| {
        codes.resize(own.len() * per_byte, 0f32);
        t.codes(i * ROWS, codes);
        for (own, q) in own.iter_mut().zip(codes.chunks_exact(per_byte)) {
            *own = q.iter().rev().fold(0, |byte, q| byte << 4 | *q as u8);
        }
    });
    own
}
