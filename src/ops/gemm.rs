//! `out[r, i] (+)= sum_j x[r, j] * w[i, j]`, for many rows (prefill): tensor cores.
//!
//! Shapes: `out` [rows, n], `x` [rows, k], `w` [n, k]. The epilogue is the kind of [`Out`](crate::backend::Out).
//! Rounding: sums in f32, one rounding at the store; the residual is added before it.

use super::expect;
use crate::error::Result;

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct Gemm {
    /// Rows of `x` and `out`.
    pub rows: usize,
    /// Rows of `w`, columns of `out`.
    pub n: usize,
    /// Columns of `x` and `w`: what is summed over.
    pub k: usize,
}

impl Gemm {
    const STEM: &'static str = "gemm";

    /// Buffer lengths fit the sizes.
    pub fn check(&self, out: usize, x: usize, w: (usize, usize)) -> Result<()> {
        expect(Self::STEM, w == (self.n, self.k), || format!("w is {w:?}, {self:?}"))?;
        expect(Self::STEM, self.rows > 0 && x >= self.rows * self.k && out >= self.rows * self.n, || {
            format!("x has {x} elements and out {out}, {self:?}")
        })
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
