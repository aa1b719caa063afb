//! AWQ's `gemm`: a word has 8 codes of one column, of the rows 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits up.

use super::words::word;

/// Where the code of each of 8 rows is in its word.
const SHIFT: [usize; 8] = [0, 16, 4, 20, 8, 24, 12, 28];

pub fn codes(bytes: &[u8], [rows, cols]: [usize; 2], first: usize, out: &mut [f32]) {
    for col in 0..cols {
        for (row, out) in (first..).zip(out.chunks_exact_mut(cols)) {
            out[col] = code(bytes, rows, row, col);
        }
    }
}

pub fn zero(zeros: &[u8], rows: usize, row: usize, group: usize) -> f32 {
    code(zeros, rows, row, group)
}

/// The code of `row` in line `line` of words `[lines, rows / 8]`.
fn code(bytes: &[u8], rows: usize, row: usize, line: usize) -> f32 {
    (word(bytes, line * (rows / 8) + row / 8) >> SHIFT[row % 8] & 15) as f32
}
