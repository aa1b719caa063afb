//! The types of GGUF files: runs of a row, each with its own scales.

use super::fit::{self, nearest};
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
    /// Makes the block that is nearest to given values; only for types that aoji can write.
    pub(super) encode: Option<Encode>,
}

/// Makes one block from its values; the square of an error counts as much as the weight beside the value.
type Encode = fn(values: &[f32], weights: &[f32], block: &mut [u8]);

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

impl Block {
    /// Makes blocks from finite values: the nearest ones, by least squares. With `inputs`, one for each value, the square of an
    /// error counts that much, and no block has a larger sum than without them.
    ///
    /// # Panics
    /// For a type that is not written, and when `out` has not `bytes` for each `weights` values.
    pub(crate) fn encode(&self, values: &[f32], inputs: Option<&[f32]>, out: &mut [u8]) {
        let encode = self.encode.expect("a type that is written");
        let n = self.weights;
        assert_eq!(values.len() / n, out.len() / self.bytes, "blocks in and out");
        let (ones, mut other, mut back) = (vec![1.0; n], vec![0; self.bytes], vec![0.0; n]);
        for (i, (x, block)) in values.chunks_exact(n).zip(out.chunks_exact_mut(self.bytes)).enumerate() {
            encode(x, &ones, block);
            let Some(w) = inputs.map(|w| &w[i * n..][..n]) else { continue };
            encode(x, w, &mut other);
            let mut error = |block: &[u8]| {
                (self.values)(block, &mut back);
                fit::error(x, w, back.iter().copied())
            };
            if error(&other) < error(block) {
                block.copy_from_slice(&other);
            }
        }
    }

    /// The codes of one block, and their scale and zero point, of types whose value is `scale * (code - zero point)` with one
    /// scale a block.
    pub(in crate::files) fn split(&self, block: &[u8], codes: &mut [f32]) -> Option<[f32; 2]> {
        let put =
            |codes: &mut [f32], all: &mut dyn Iterator<Item = f32>| codes.iter_mut().zip(all).for_each(|(x, q)| *x = q);
        match self.name {
            "Q8_0" => put(codes, &mut block[2..].iter().map(|q| f32::from(*q as i8))),
            "Q4_0" => put(codes, &mut nibbles(&block[2..]).map(f32::from)),
            _ => return None,
        }
        Some([half(block), if self.name == "Q4_0" { 8.0 } else { 0.0 }])
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

/// Writes the f16 nearest to `x`, and gives the number that it is.
pub(super) fn put_half(bytes: &mut [u8], x: f32) -> f32 {
    let x = f16::from_f32(x.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()));
    bytes[..2].copy_from_slice(&x.to_le_bytes());
    x.to_f32()
}

/// Codes of scale `d` from `low` to `high`, the nearest to each value.
pub(super) fn codes(x: &[f32], d: f32, low: f32, high: f32) -> impl Iterator<Item = i32> {
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    x.iter().map(move |x| nearest((x * inverse).clamp(low, high)) as i32)
}

/// Writes codes of 4 bits: the first half into the low halves of `bytes`, the others into the high ones.
pub(super) fn put_nibbles(bytes: &mut [u8], codes: &[u8]) {
    let (low, high) = codes.split_at(bytes.len());
    bytes.iter_mut().zip(low).zip(high).for_each(|((b, low), high)| *b = low & 15 | high << 4);
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

/// Writes what [`six_bits`] reads.
pub(super) fn put_six_bits(b: &mut [u8], pairs: &[(u8, u8); 8]) {
    for (j, (scale, offset)) in pairs.iter().enumerate().take(4) {
        let (high_scale, high_offset) = pairs[j + 4];
        b[j] = scale & 63 | high_scale >> 4 << 6;
        b[j + 4] = offset & 63 | high_offset >> 4 << 6;
        b[j + 8] = high_scale & 15 | high_offset << 4;
    }
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
    use super::{super::BLOCKS, *};

    /// Values like those of weights, some of them large, of a block of zeros, of one sign, and of one value.
    fn samples(n: usize) -> Vec<Vec<f32>> {
        let mut state = 7u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let normal: Vec<Vec<f32>> =
            (0..40).map(|_| (0..n).map(|_| 0.02 * (next() + next() + next())).collect()).collect();
        let mut all = normal.clone();
        all.extend(normal.iter().take(10).map(|x| x.iter().map(|x| x.abs()).collect()));
        all.extend(normal.iter().take(10).map(|x| x.iter().map(|x| if *x > 0.04 { 10.0 * x } else { *x }).collect()));
        all.extend([vec![0.0; n], vec![0.25; n], vec![-3.0; n], (0..n).map(|i| i as f32).collect()]);
        all.push((0..n).map(|i| if i == 5 { 1e-3 } else { 0.0 }).collect());
        all
    }

    /// A block holds its values as exactly as its bits allow, and is its own nearest block.
    #[test]
    fn blocks_hold_their_values() {
        for block in BLOCKS.into_iter().filter(|block| block.encode.is_some()) {
            let (mut error, mut power) = (0f64, 0f64);
            for (i, x) in samples(block.weights).iter().enumerate() {
                let (mut bytes, mut back) = (vec![0xAAu8; block.bytes], vec![0f32; block.weights]);
                block.encode(x, None, &mut bytes);
                block.values(&bytes, &mut back);
                let largest = x.iter().fold(0f32, |m, x| m.max(x.abs()));
                let step = 2.2 * largest / (1u32 << block.bits) as f32; // what one code is apart from the next, at most
                let worst = x.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
                assert!(worst <= 3.0 * step, "{block:?}, sample {i}: {worst} of {largest}");
                if i < 40 {
                    error += x.iter().zip(&back).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
                    power += x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
                }
                let mut again = vec![0f32; block.weights];
                block.encode(&back, None, &mut bytes);
                block.values(&bytes, &mut again);
                let moved = back.iter().zip(&again).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
                assert!(moved <= 0.5 * step, "{block:?}, sample {i}: moves by {moved}");
            }
            // relative error of weights like a normal distribution's: what the same types of llama.cpp have
            let limit = match block.name {
                "Q8_0" => 0.006,
                "Q6_K" => 0.021,
                "Q5_0" => 0.048,
                "Q4_K" => 0.078,
                _ => 0.092,
            };
            let relative = (error / power).sqrt();
            assert!(relative < limit && relative > limit / 4.0, "{block:?}: {relative}");
        }
    }

    /// What counts by its inputs is nearer with them than without, in every block.
    #[test]
    fn inputs_say_what_counts() {
        for block in BLOCKS.into_iter().filter(|block| block.encode.is_some()) {
            let n = block.weights;
            let inputs: Vec<f32> = (0..n).map(|i| if i % 8 == 3 { 50.0 } else { 0.1 + (i % 5) as f32 }).collect();
            let (mut with, mut without) = (0.0, 0.0);
            for (i, x) in samples(n).into_iter().enumerate() {
                let error = |inputs_given: Option<&[f32]>| {
                    let (mut bytes, mut back) = (vec![0; block.bytes], vec![0f32; n]);
                    block.encode(&x, inputs_given, &mut bytes);
                    block.values(&bytes, &mut back);
                    fit::error(&x, &inputs, back.into_iter())
                };
                let (ours, plain) = (error(Some(&inputs)), error(None));
                assert!(ours <= plain, "{block:?}: {ours} {plain}");
                if i < 40 {
                    (with, without) = (with + ours, without + plain); // of values like those of weights
                }
            }
            assert!(with < 0.95 * without, "{block:?}: {with} of {without}");
        }
    }

    #[test]
    fn descriptions() {
        for block in BLOCKS {
            let codes = block.weights * block.bits as usize / 8;
            assert!(block.bytes > codes && block.weights % block.group == 0, "{block:?}");
            assert!(BLOCKS.iter().filter(|b| b.id == block.id || b.name == block.name).count() == 1);
        }
    }
}
