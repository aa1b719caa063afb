//! `pack-quantized` of compressed-tensors: integers with sign, stored plus half their range, from the lowest bits of a word up:
//! codes along the columns, zero points along the rows.

use super::{
    block::codes as nearest_codes,
    fit::symmetric,
    words::{word, words},
};

pub fn codes(bits: u32, bytes: &[u8], cols: usize, first: usize, out: &mut [f32]) {
    let per_word = (32 / bits) as usize;
    for (out, word) in out.chunks_exact_mut(per_word).zip(words(&bytes[first * cols / per_word * 4..])) {
        out.iter_mut().zip((0..).step_by(bits as usize)).for_each(|(x, shift)| *x = code(bits, word >> shift));
    }
}

pub fn zero(bits: u32, zeros: &[u8], groups: usize, row: usize, group: usize) -> f32 {
    let per_word = (32 / bits) as usize;
    code(bits, word(zeros, row / per_word * groups + group) >> (row % per_word * bits as usize))
}

/// The scale of codes near `x`; 0 when all are. The square of an error counts `w` times.
pub fn scale(bits: u32, x: &[f32], w: &[f32]) -> f32 {
    let half = (1u32 << (bits - 1)) as f32;
    symmetric(x, w, -half, half - 1.0)
}

/// The values of the codes nearest to `x`.
pub fn nearest_values(bits: u32, x: &[f32], scale: f32) -> impl Iterator<Item = f32> {
    let half = (1u32 << (bits - 1)) as f32;
    nearest_codes(x, scale, -half, half - 1.0).map(move |q| q as f32 * scale)
}

/// The words of a row, whose groups of `wide` columns have these scales.
pub fn encode(bits: u32, x: &[f32], wide: usize, scales: &[f32], out: &mut [u8]) {
    let (per_word, half) = ((32 / bits) as usize, 1i32 << (bits - 1));
    let codes = |(x, d): (_, &f32)| nearest_codes(x, *d, -half as f32, (half - 1) as f32);
    let mut codes = x.chunks(wide).zip(scales).flat_map(codes).map(|q| (q + half) as u32);
    for word in out.as_chunks_mut::<4>().0 {
        let shifts = (0..).step_by(bits as usize).take(per_word);
        *word = shifts.zip(codes.by_ref()).fold(0u32, |word, (shift, q)| word | q << shift).to_le_bytes();
    }
}

fn code(bits: u32, word: u32) -> f32 {
    let range = 1u32 << bits;
    (word & (range - 1)) as f32 - (range / 2) as f32
}
