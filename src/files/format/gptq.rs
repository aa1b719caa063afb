//! GPTQ: a word has codes of consecutive columns of one row, from the lowest bits up; words of neighbouring rows lie side by
//! side. Zero points lie along the rows. The first version of the format stores them minus 1, modulo their range.

use super::words::word;

pub fn codes(bits: u32, bytes: &[u8], [rows, cols]: [usize; 2], first: usize, out: &mut [f32]) {
    let (per_word, mask) = ((32 / bits) as usize, (1u32 << bits) - 1);
    for w in 0..cols / per_word {
        for (j, row) in out.chunks_exact_mut(cols).enumerate() {
            let word = word(bytes, w * rows + first + j);
            let codes = row[w * per_word..].iter_mut().zip((0..32).step_by(bits as usize));
            codes.for_each(|(x, shift)| *x = (word >> shift & mask) as f32);
        }
    }
}

pub fn zero(bits: u32, add: u32, zeros: &[u8], rows: usize, row: usize, group: usize) -> f32 {
    let (per_word, mask) = ((32 / bits) as usize, (1u32 << bits) - 1);
    let stored = word(zeros, group * (rows / per_word) + row / per_word) >> (row % per_word * bits as usize);
    (((stored & mask) + add) & mask) as f32
}
