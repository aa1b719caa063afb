//! The types of GGUF files: runs of a row, each with its own scales.

use super::{q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q6_k, q8_0};
use half::f16;
use std::fmt;

/// A GGUF type whose weights come in blocks.
pub struct Block {
    /// As GGUF spells it.
    pub name: &'static str,
    /// Its number in a file.
    pub id: u32,
    /// Weights of a block, consecutive in a row.
    pub weights: usize,
    /// Bytes of a block.
    pub bytes: usize,
    /// Bits of a code.
    pub bits: u32,
    /// Consecutive weights that share a scale; divides `weights`.
    pub group: usize,
    /// There is an offset beside the scale: a value is `scale * code + offset`.
    pub offset: bool,
    /// The values of one block.
    pub(super) values: fn(block: &[u8], out: &mut [f32]),
}

/// All of them. A new one is a unit like those, and a place here.
pub static BLOCKS: [&Block; 8] =
    [&q4_0::Q4_0, &q4_1::Q4_1, &q5_0::Q5_0, &q5_1::Q5_1, &q8_0::Q8_0, &q4_k::Q4_K, &q5_k::Q5_K, &q6_k::Q6_K];

impl Block {
    /// The values of whole blocks.
    ///
    /// # Panics
    /// When `out` has not `weights` elements for each block in `bytes`.
    pub fn values(&self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(bytes.len() / self.bytes, out.len() / self.weights, "blocks in and out");
        for (block, out) in bytes.chunks_exact(self.bytes).zip(out.chunks_exact_mut(self.weights)) {
            (self.values)(block, out);
        }
    }
}

impl PartialEq for Block {
    fn eq(&self, other: &Block) -> bool {
        self.id == other.id
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// The f16 at the beginning of `bytes`.
pub(super) fn half(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// Codes of 4 bits: the low halves of `bytes`, then the high ones.
pub(super) fn nibbles(bytes: &[u8]) -> impl Iterator<Item = u8> {
    bytes.iter().map(|b| b & 15).chain(bytes.iter().map(|b| b >> 4))
}

/// Codes of 5 bits: nibbles, with bit `i` of the word `high` for code `i`.
pub(super) fn fives<'a>(high: &[u8], bytes: &'a [u8]) -> impl Iterator<Item = u8> + use<'a> {
    let high = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
    nibbles(bytes).enumerate().map(move |(i, q)| q | (((high >> i) & 1) as u8 * 16))
}

/// Eight scales and eight offsets of 6 bits each in the 12 bytes of a Q4_K or Q5_K block.
pub(super) fn six_bits(b: &[u8]) -> impl Iterator<Item = (u8, u8)> {
    (0..8).map(|j| match j {
        0..4 => (b[j] & 63, b[j + 4] & 63),
        _ => (b[j + 4] & 15 | b[j - 4] >> 6 << 4, b[j + 4] >> 4 | b[j] >> 6 << 4),
    })
}

/// Puts `d * q` in the place of each value.
pub(super) fn scaled(out: &mut [f32], d: f32, codes: impl Iterator<Item = f32>) {
    out.iter_mut().zip(codes).for_each(|(x, q)| *x = d * q);
}

/// Puts `d * q + m` in the place of each value, rounded twice.
pub(super) fn shifted(out: &mut [f32], d: f32, m: f32, codes: impl Iterator<Item = u8>) {
    out.iter_mut().zip(codes).for_each(|(x, q)| *x = d * f32::from(q) + m);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptions() {
        for block in BLOCKS {
            let codes = block.weights * block.bits as usize / 8;
            assert!(block.bytes > codes && block.weights % block.group == 0, "{block:?}");
            assert!(BLOCKS.iter().filter(|b| b.id == block.id || b.name == block.name).count() == 1);
        }
    }
}
