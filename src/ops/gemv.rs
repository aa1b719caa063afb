//! `out[r, i] (+)= sum_j x[r, j] * w[i, j]`, for a few rows (decode): the weights are read once and everything else is small, so its floor is their bytes.
//!
//! Shapes: `out` [rows, n], `x` [rows, k], `w` [n, k]. The epilogue is the kind of [`Out`](crate::backend::Out).
//! Rounding: sums in f32, one rounding at the store; the residual is added before it.

use super::{Act, expect};
use crate::error::Result;

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct Gemv {
    /// Rows of `x` and `out`.
    pub rows: usize,
    /// Rows of `w`, columns of `out`.
    pub n: usize,
    /// Columns of `x` and `w`: what is summed over.
    pub k: usize,
}

impl Gemv {
    const STEM: &'static str = "gemv";

    /// Buffer lengths fit the sizes.
    pub fn check(&self, out: usize, x: usize, w: (usize, usize)) -> Result<()> {
        expect(Self::STEM, w == (self.n, self.k), || format!("w is {w:?}, {self:?}"))?;
        expect(Self::STEM, self.rows > 0 && x >= self.rows * self.k && out >= self.rows * self.n, || {
            format!("x has {x} elements and out {out}, {self:?}")
        })
    }

    /// The definition, before the epilogue: `out` [rows, n] in f32.
    pub fn reference<A: Act, W: Act>(&self, out: &mut [f32], x: &[A], w: &[W]) {
        for (r, out) in out.chunks_exact_mut(self.n).take(self.rows).enumerate() {
            let x = &x[r * self.k..][..self.k];
            for (out, w) in out.iter_mut().zip(w.chunks_exact(self.k)) {
                *out = x.iter().zip(w).map(|(x, w)| x.to_f32() * w.to_f32()).sum();
            }
        }
    }

    /// The kernel.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        _cu: &crate::cuda::Cuda,
        _out: crate::backend::Out<'_, crate::cuda::Cuda>,
        _x: &crate::cuda::Buffer<half::bf16>,
        _w: &crate::cuda::Weight,
    ) -> Result<()> {
        Err(crate::error::Error::Op { op: Self::STEM, what: "has no kernel yet".into() })
    }
}
