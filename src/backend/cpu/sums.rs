//! The products of the backward pass: `sum_t p[i, t] v[t, j]`, where neither factor has to be transposed.
//!
//! A block of `v`, [`TERMS`] rows of [`WIDTH`] columns, is converted to f32 in the first-level cache, and the rows of
//! `p` go over it with [`Weighted`]. An element is summed in the order of `t`, each term with one rounding; so its bits
//! depend on its row of `p` and its column of `v` alone, not on the blocks, the threads or the CPU.

use super::{
    Cpu,
    level::Level,
    rows as each, scratch,
    simd::{Product, Weighted, lines},
    train_rows as rows,
    weight::{Elements, Weight},
};
use crate::{backend::Shaped, ops::Act};

/// Columns of a block.
pub(super) const WIDTH: usize = 64;
/// Rows of `v` in a block: 32 KiB with its columns.
const TERMS: usize = 128;
/// Rows of `p` for which a block is prepared: that takes as long as 2 of them.
const HEIGHT: usize = 256;

/// `p` of a product.
#[derive(Clone, Copy)]
pub(super) struct Factor<'a> {
    /// [rows, stride]
    pub p: &'a [f32],
    pub stride: usize,
    /// Columns that count: terms of a sum.
    pub terms: usize,
}

impl<A: Act> Cpu<A> {
    /// Instructions for f32.
    pub(super) fn f32s(&self) -> Level {
        self.level.of_f32()
    }

    /// Calls `finish(i, first column, part of the row, sums)` for each row `i` of `out` [m, n] and each block of its
    /// columns. The sums are products of `p` with `v`, of which `fill(first row, rows, first column, columns, to)`
    /// makes a block.
    pub(super) fn sums<T: Send + Sync>(
        &self,
        out: &mut [T],
        [m, n]: [usize; 2],
        factor: Factor<'_>,
        fill: impl Fn(usize, usize, usize, usize, &mut [f32]) + Sync,
        finish: impl Fn(usize, usize, &mut [T], &[f32]) + Sync,
    ) {
        self.pool.tiles(out, [m, n], [HEIGHT, WIDTH], |i, j, mut tile| {
            let (rows, width) = (tile.rows(), tile.width());
            let fill = |t: usize, n: usize, to: &mut [f32]| fill(t, n, j, width, to);
            self.panel(i, rows, width, factor, fill, |r, sums| finish(i + r, j, tile.row(r), sums));
        });
    }

    /// `finish(row of the block, sums)` of the rows `first..first + rows` and `width` columns.
    pub(super) fn panel(
        &self,
        first: usize,
        rows: usize,
        width: usize,
        Factor { p, stride, terms }: Factor<'_>,
        fill: impl Fn(usize, usize, &mut [f32]),
        mut finish: impl FnMut(usize, &[f32]),
    ) {
        let level = self.f32s();
        scratch::with(&scratch::Y, rows * WIDTH, |o| {
            o.fill(0.0);
            scratch::with(&scratch::PANEL, TERMS * width, |panel| {
                for t in (0..terms).step_by(TERMS) {
                    let n = TERMS.min(terms - t);
                    let panel = &mut panel[..n * width];
                    fill(t, n, panel);
                    let (p, v) = (&p[first * stride + t..], Elements::F32(panel));
                    Weighted { p, p_stride: stride, rows, v, seen: &|_| 0..n, d: width, o: &mut *o, o_stride: WIDTH }
                        .run(level);
                }
            });
            for (r, sums) in o.chunks_exact(WIDTH).enumerate() {
                finish(r, &sums[..width]);
            }
        });
    }

    /// Some rows and columns of a weight, in f32.
    pub(super) fn fill_from(&self, w: &Weight, [t, n]: [usize; 2], [j, width]: [usize; 2], to: &mut [f32]) {
        let (_, cols) = w.shape();
        for (at, rows, part) in w.elements(t, n) {
            for r in 0..rows {
                let to = &mut to[(at + r) * width..][..width];
                match part.part(r * cols + j, width) {
                    Elements::Bf16(w) => rows::widen(self.level, to, w),
                    Elements::F32(w) => to.copy_from_slice(w),
                }
            }
        }
    }

    /// `f` of activations in f32.
    pub(super) fn wide<R>(&self, x: &[A], f: impl FnOnce(&[f32]) -> R) -> R {
        if size_of::<A>() == 4 {
            return f(bytemuck::cast_slice(x));
        }
        scratch::with(&scratch::WIDE, x.len(), |wide| {
            let len = x.len();
            self.pool.tiles(wide, [1, len], [1, 1 << 14], |_, at, mut tile| {
                let width = tile.width();
                rows::widen(self.level, tile.row(0), &x[at..][..width]);
            });
            f(wide)
        })
    }

    /// `out[r, c] = scale * sum_j x[r, j] w[c, j]` for few rows of `w` [cols, k], which are f32; `row(r, to)` makes a row of `x`.
    pub(super) fn dots(
        &self,
        out: &mut [f32],
        [rows, cols, k]: [usize; 3],
        w: &[f32],
        scale: f32,
        row: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        let (level, height) = (self.f32s(), 32);
        let line = lines(level, k);
        self.pool.tiles(out, [rows, cols], [height, cols], |first, _, mut tile| {
            let n = tile.rows();
            scratch::with(&scratch::X, n * line, |x| {
                scratch::with(&scratch::PANEL, k, |wide| {
                    for (r, x) in x.chunks_exact_mut(line).enumerate() {
                        row(first + r, wide);
                        each::prepare(level, wide, x);
                    }
                });
                scratch::with(&scratch::Y, n * cols, |y| {
                    scratch::with(&scratch::PACKED, cols * line, |packed| {
                        Product { x, rows: n, w: Elements::F32(w).into(), cols, k, y: &mut *y, y_stride: cols, packed }
                            .run(level);
                    });
                    rows::scale(level, y, scale);
                    for (r, y) in y.chunks_exact(cols).enumerate() {
                        tile.row(r).copy_from_slice(y);
                    }
                });
            });
        });
    }
}
