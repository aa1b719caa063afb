//! `pack-quantized` of compressed-tensors: integers with sign, stored plus half their range, from the lowest bits of a word up:
//! codes along the columns, zero points along the rows.

use super::grouped::{word, words};

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

fn code(bits: u32, word: u32) -> f32 {
    let range = 1u32 << bits;
    (word & (range - 1)) as f32 - (range / 2) as f32
}
