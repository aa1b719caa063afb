//! Matrix products of the reference: blocks of weight rows are widened to f32 and multiplied by the gemm crate, in parallel.

use super::{Cpu, weight::Elements, weight::Weight};
use crate::{
    backend::{Buffer, DECODE_ROWS, Out, Shaped},
    ops::Act,
};
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

/// Weight rows that one task takes: their f32 copy stays in the cache (64 rows of 4096 are 1 MiB).
const BLOCK: usize = 64;
/// Rows of `x` in each call of gemm, where there are more than [`DECODE_ROWS`]; the last call's are filled up with zeros.
const ROWS: usize = 64;

impl<A: Act> Out<'_, Cpu<A>> {
    pub(super) fn len(&self) -> usize {
        match self {
            Out::Store(out) | Out::Add(out) => Buffer::len(*out),
            Out::F32(out) => Buffer::len(*out),
        }
    }
}

/// `out (+)= x w^T` for the first `rows` rows; sizes were checked.
pub(super) fn matmul<A: Act>(rows: usize, out: Out<'_, Cpu<A>>, x: &[A], w: &Weight) {
    let (n, k) = w.shape();
    let x: Vec<f32> = x[..rows * k].iter().map(|x| x.to_f32()).collect();
    // blocks of output columns: (first column, weight rows of the block)
    let mut blocks = Vec::new();
    let mut first = 0;
    for (part_rows, elements) in w.parts() {
        for at in (0..part_rows).step_by(BLOCK) {
            let len = BLOCK.min(part_rows - at);
            let range = at * k..(at + len) * k;
            blocks.push((
                first + at,
                match elements {
                    Elements::Bf16(w) => Elements::Bf16(&w[range]),
                    Elements::F32(w) => Elements::F32(&w[range]),
                },
            ));
        }
        first += part_rows;
    }
    let products: Vec<(usize, Vec<f32>)> =
        blocks.into_par_iter().map(|(column, w)| (column, product(rows, k, &x, w))).collect();
    let mut y = vec![0f32; rows * n];
    for (column, block) in products {
        let len = block.len() / rows;
        for (y, block) in y.chunks_exact_mut(n).zip(block.chunks_exact(len)) {
            y[column..column + len].copy_from_slice(block);
        }
    }
    match out {
        Out::Store(out) => out.iter_mut().zip(y).for_each(|(out, y)| *out = A::from_f32(y)),
        Out::Add(out) => out.iter_mut().zip(y).for_each(|(out, y)| *out = A::from_f32(out.to_f32() + y)),
        Out::F32(out) => out[..y.len()].copy_from_slice(&y),
    }
}

/// `x w^T` [rows, rows of w] for a block of weight rows.
///
/// The gemm crate chooses its kernels, and so the order of its sums, by the sizes of a call. So that the bits of a row depend on
/// neither the other rows nor their number, as on the device, all calls have the same sizes: one row each for up to
/// [`DECODE_ROWS`], else [`ROWS`].
fn product(rows: usize, k: usize, x: &[f32], w: Elements<'_>) -> Vec<f32> {
    let widened: Vec<f32>;
    let w = match w {
        Elements::F32(w) => w,
        Elements::Bf16(w) => {
            let mut f32s = vec![0f32; w.len()];
            w.convert_to_f32_slice(&mut f32s);
            widened = f32s;
            &widened
        }
    };
    let n = w.len() / k;
    let size = if rows <= DECODE_ROWS { 1 } else { ROWS };
    let mut y = vec![0f32; rows.next_multiple_of(size) * n];
    let (whole, rest) = x.split_at(rows / size * size * k);
    let calls = whole.chunks_exact(size * k).zip(y.chunks_exact_mut(size * n));
    calls.for_each(|(x, y)| call(size, n, k, y, x, w));
    if !rest.is_empty() {
        let mut filled = vec![0f32; size * k];
        filled[..rest.len()].copy_from_slice(rest);
        call(size, n, k, &mut y[rows / size * size * n..], &filled, w);
    }
    y.truncate(rows * n);
    y
}

/// `y = x w^T`: `y` [rows, n], `x` [rows, k], `w` [n, k].
fn call(rows: usize, n: usize, k: usize, y: &mut [f32], x: &[f32], w: &[f32]) {
    assert!(y.len() == rows * n && x.len() == rows * k && w.len() == n * k, "{rows} rows, {n} x {k}");
    // SAFETY: y is [rows, n], x is [rows, k] and w is [n, k] (asserted), all row-major and contiguous, and y is borrowed mutably:
    // each stride below addresses within its slice.
    unsafe {
        gemm::gemm(
            rows,
            n,
            k,
            y.as_mut_ptr(),
            1,
            n as isize,
            false,
            x.as_ptr(),
            1,
            k as isize,
            w.as_ptr(),
            k as isize,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        backend::Backend,
        ops::{Gemv, noise},
    };
    use half::bf16;

    #[test]
    fn agrees_with_the_definition() {
        let (rows, n, k) = (5, 2 * BLOCK + 3, 40);
        let (x, w) = (noise(rows * k, 1), noise(n * k, 2).into_iter().map(bf16::from_f32).collect::<Vec<_>>());
        let mut want = vec![0f32; rows * n];
        Gemv { rows, n, k }.reference(&mut want, &x, &w);
        let cpu = Cpu::<f32>::new();
        let w = cpu.weight_from(n, k, &w).unwrap();
        let mut out = vec![1f32; rows * n];
        matmul(rows, Out::Add(&mut out), &x, &w);
        for (out, want) in out.iter().zip(&want) {
            assert!((out - 1.0 - want).abs() < 1e-5, "{out} - 1 is not {want}");
        }
    }

    #[test]
    fn a_row_has_the_same_bits_beside_any_others() {
        for (n, k) in [(BLOCK, 768), (3, 256), (BLOCK + 1, 40)] {
            let (x, w) = (noise(150 * k, 1), noise(n * k, 2));
            let run = |first: usize, rows: usize| product(rows, k, &x[first * k..][..rows * k], Elements::F32(&w));
            let many = run(0, 150);
            for (first, rows) in [(0, 9), (7, 64), (20, 130), (141, 9)] {
                assert_eq!(run(first, rows), many[first * n..][..rows * n], "rows {first} and {rows} more, {n} x {k}");
            }
            let few = run(0, DECODE_ROWS);
            for rows in 1..DECODE_ROWS {
                assert_eq!(run(1, rows), few[n..][..rows * n], "{rows} rows, {n} x {k}");
            }
        }
    }
}
