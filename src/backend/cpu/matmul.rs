//! Matrix products: threads take blocks of weight rows, and compute each with [`Product`].

use super::{
    Cpu, rows as each, scratch,
    simd::{DIRECT, Product, lines, room},
    weight::Weight,
};
use crate::{
    backend::{Buffer, Out, Shaped},
    ops::Act,
};

/// Lines of an unpacked block: a quarter of a second-level cache of 1 MiB.
const PACKED: usize = 1 << 12;

impl<A: Act> Out<'_, Cpu<A>> {
    pub(super) fn len(&self) -> usize {
        match self {
            Out::Store(out) | Out::Add(out) => Buffer::len(*out),
            Out::F32(out) => Buffer::len(*out),
        }
    }
}

impl<A: Act> Cpu<A> {
    /// Weight rows that a thread takes at a time: for few rows of `x`, long runs of memory; for many, what fits the
    /// second-level cache.
    fn block(&self, rows: usize, n: usize, k: usize) -> usize {
        let (shares, most) = match rows <= DIRECT {
            true => (4, 4096),
            false => (8, (PACKED / lines(self.level, k)).max(16)),
        };
        n.div_ceil(shares * self.pool.threads()).clamp(16, most).next_multiple_of(4)
    }

    /// `out (+)= x w^T`, and the bias of w, for the first `rows` rows; sizes were checked.
    pub(super) fn product(&self, rows: usize, out: Out<'_, Self>, x: &[A], w: &Weight) {
        match out {
            Out::Store(out) => self.product_to(rows, out, x, w, |out, y| each::store(self.level, out, y)),
            Out::Add(out) => self.product_to(rows, out, x, w, |out, y| each::add(self.level, out, y)),
            Out::F32(out) => self.product_to(rows, out, x, w, |out, y| out.copy_from_slice(y)),
        }
    }

    /// `finish` stores a part of a row of the product.
    pub(super) fn product_to<T: Send + Sync>(
        &self,
        rows: usize,
        out: &mut [T],
        x: &[A],
        w: &Weight,
        finish: impl Fn(&mut [T], &[f32]) + Sync,
    ) {
        let (n, k) = w.shape();
        let level = if rows == 1 && w.has_bytes() { self.level.of_f32() } else { self.level };
        let row = lines(level, k);
        scratch::with(&scratch::X, rows * row, |prepared| {
            let height = Self::height(rows, k);
            self.pool.tiles(prepared, [rows, row], [height, row], |first, _, mut tile| {
                for r in 0..tile.rows() {
                    each::prepare(level, &x[(first + r) * k..][..k], tile.row(r));
                }
            });
            let (x, block) = (&*prepared, self.block(rows, n, k));
            self.pool.tiles(out, [rows, n], [rows, block], |_, first, mut tile| {
                let width = tile.width();
                scratch::with(&scratch::Y, rows * width, |y| {
                    for (at, cols, w) in w.rows(first, width) {
                        let room = room(level, &w, [rows, cols, k]);
                        scratch::with(&scratch::PACKED, room, |packed| {
                            Product { x, rows, w, cols, k, y: &mut y[at..], y_stride: width, packed }.run(level);
                        });
                    }
                    for r in 0..rows {
                        if let Some(bias) = w.bias() {
                            each::add_bias(level, &mut y[r * width..][..width], &bias[first..][..width]);
                        }
                        finish(tile.row(r), &y[r * width..][..width]);
                    }
                });
            });
        });
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
        let (rows, n, k) = (5, 67, 40);
        let (x, w) = (noise(rows * k, 1), noise(n * k, 2).into_iter().map(bf16::from_f32).collect::<Vec<_>>());
        let mut want = vec![0f32; rows * n];
        Gemv { rows, n, k }.reference(&mut want, &x, &w);
        let cpu = Cpu::<f32>::new().unwrap();
        let w = cpu.weight_from(n, k, &w).unwrap();
        let mut out = vec![1f32; rows * n];
        cpu.product(rows, Out::Add(&mut out), &x, &w);
        for (out, want) in out.iter().zip(&want) {
            assert!((out - 1.0 - want).abs() < 1e-5, "{out} - 1 is not {want}");
        }
    }

    #[test]
    fn a_row_has_the_same_bits_beside_any_others() {
        let cpu = Cpu::<bf16>::new().unwrap();
        for (n, k) in [(32, 768), (3, 256), (33, 40)] {
            let bf16s = |len, seed| noise(len, seed).into_iter().map(bf16::from_f32).collect::<Vec<_>>();
            let (x, w) = (bf16s(150 * k, 1), cpu.weight_from(n, k, &bf16s(n * k, 2)).unwrap());
            let run = |first: usize, rows: usize| {
                let mut out = vec![0f32; rows * n];
                cpu.product(rows, Out::F32(&mut out), &x[first * k..], &w);
                out
            };
            let many = run(0, 150);
            for (first, rows) in [(0, 1), (3, 5), (0, 9), (7, 64), (20, 130), (133, 17), (134, 16)] {
                assert_eq!(run(first, rows), many[first * n..][..rows * n], "rows {first} and {rows} more, {n} x {k}");
            }
        }
    }
}
