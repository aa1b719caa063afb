//! `dx (+)= s * (g * w - xhat * mean_i(g_i w_i xhat_i))` with `s = 1 / sqrt(mean(x^2) + eps)` and `xhat = s x`: the gradient of the
//! input of [`crate::ops::RmsNorm`] from `g = dy`, that of its output. A frozen `w` has none.
//!
//! Shapes: `dx`, `dy` and `x` [at least rows, dim], `w` [1, dim].

use super::Real;
use crate::{
    backend::train::TrainBackend,
    error::Result,
    ops::{Cost, Grid, Op, Tolerance, download, expect, expect_len, noise_buf, noise_weight},
};

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct RmsNormBwd {
    /// Tokens.
    pub rows: usize,
    /// Width.
    pub dim: usize,
    /// Added to the mean square.
    pub eps: f32,
    /// Whether it is added to what is in `dx`, the gradient of the residual connection around the norm, or replaces it.
    pub add: bool,
}

impl RmsNormBwd {
    /// Buffer lengths fit the sizes.
    ///
    /// # Errors
    /// `Op` names what does not.
    pub fn check(&self, dx: usize, dy: usize, x: usize, w: usize) -> Result<()> {
        let least = self.rows * self.dim;
        expect(Self::STEM, dx >= least && dy >= least && x >= least, || {
            format!("dx has {dx} elements, dy {dy} and x {x}: too few for {self:?}")
        })?;
        expect_len(Self::STEM, "w", w, self.dim)
    }

    /// One block per row.
    pub fn grid(&self) -> Grid {
        Grid { blocks: [self.rows as u32, 1, 1], threads: crate::tiles::NORM_THREADS, shared: 0 }
    }

    /// The definition.
    pub fn reference<X: Real, W: Real>(&self, dx: &mut [X], dy: &[X], x: &[X], w: &[W]) {
        let n = self.dim;
        for ((dx, dy), x) in dx.chunks_exact_mut(n).zip(dy.chunks_exact(n)).zip(x.chunks_exact(n)).take(self.rows) {
            let square: f64 = x.iter().map(|x| x.get() * x.get()).sum();
            let s = 1.0 / (square / n as f64 + f64::from(self.eps)).sqrt();
            let sum: f64 = (0..n).map(|i| dy[i].get() * w[i].get() * x[i].get() * s).sum();
            for i in 0..n {
                let before = if self.add { dx[i].get() } else { 0.0 };
                let own = s * (dy[i].get() * w[i].get() - x[i].get() * s * sum / n as f64);
                dx[i] = X::put(before + own);
            }
        }
    }

    /// The kernel.
    ///
    /// # Errors
    /// As `check`; a width that the kernel does not take; those of the launch.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        cu: &crate::backend::cuda::Cuda,
        dx: &mut crate::backend::cuda::Buffer<half::bf16>,
        dy: &crate::backend::cuda::Buffer<half::bf16>,
        x: &crate::backend::cuda::Buffer<half::bf16>,
        w: &crate::backend::cuda::Buffer<half::bf16>,
    ) -> Result<()> {
        self.check(dx.len(), dy.len(), x.len(), w.len())?;
        super::expect_chunks(Self::STEM, self, &[self.dim], &[])?;
        crate::ops::expect_ints(Self::STEM, &[self.rows, self.dim])?;
        let (dim, eps, add) = (self.dim.into(), self.eps.into(), usize::from(self.add).into());
        // SAFETY: check() proved that rows rows of dx, dy and x and dim elements of w exist; the arguments are those of the
        // kernel, in order.
        unsafe {
            cu.launch(
                "rms_norm_bwd_bf16",
                self,
                self.grid(),
                &[dx.into(), dy.into(), x.into(), w.into(), dim, eps, add],
            )
        }
    }
}

impl Op for RmsNormBwd {
    const STEM: &'static str = "rms_norm_bwd";
    type Io<B: TrainBackend> = (B::Buf<B::Act>, B::Buf<B::Act>, B::Buf<B::Act>, B::Weight);

    fn cases() -> Vec<Self> {
        let case = |rows, dim, add| RmsNormBwd { rows, dim, eps: 1e-5, add };
        vec![case(1, 8, false), case(3, 24, true), case(40, 576, true), case(2, 2056, false), case(4096, 4096, true)]
    }

    fn odd() -> Vec<Self> {
        let case = |rows, dim, add| RmsNormBwd { rows, dim, eps: 1e-5, add };
        // with one column, the gradient is what eps leaves of a difference of equal numbers: nothing to test in f32
        vec![case(1, 2, false), case(3, 17, true)]
    }

    fn cost(&self) -> Cost {
        let n = (self.rows * self.dim) as u64;
        Cost { read: 2 * n * (2 + u64::from(self.add)) + 2 * self.dim as u64, write: 2 * n, flops: 9 * n }
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance::BF16
    }

    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>> {
        let n = self.rows * self.dim;
        Ok((
            noise_buf(b, n, seed, 2.0)?,
            noise_buf(b, n, seed + 1, 2.0)?,
            noise_buf(b, n, seed + 2, 3.0)?,
            noise_weight(b, 1, self.dim, seed + 3, 1.0)?,
        ))
    }

    fn run<B: TrainBackend>(&self, b: &B, (dx, dy, x, w): &mut Self::Io<B>) -> Result<()> {
        b.rms_norm_bwd(self, dx, dy, x, w)
    }

    fn outputs<B: TrainBackend>(&self, b: &B, (dx, ..): &Self::Io<B>) -> Result<Vec<f32>> {
        download(b, dx)
    }
}

#[cfg(test)]
mod tests {
    use super::super::checks::{dot, gradient, values};
    use super::*;

    #[test]
    fn is_the_gradient_of_the_norm() {
        for dim in [1, 6] {
            let op = RmsNormBwd { rows: 2, dim, eps: 1e-2, add: true };
            let (x, w, dy) = (values(2 * dim, 1, 1.0), values(dim, 2, 1.0), values(2 * dim, 3, 1.0));
            let mut dx = vec![0.0; 2 * dim];
            op.reference(&mut dx, &dy, &x, &w);
            let loss = |x: &[f64]| {
                let norm = |x: &[f64]| {
                    let s = 1.0 / (dot(x, x) / dim as f64 + f64::from(op.eps)).sqrt();
                    x.iter().zip(&w).map(|(x, w)| x * s * w).collect::<Vec<_>>()
                };
                dot(&x.chunks_exact(dim).flat_map(norm).collect::<Vec<_>>(), &dy)
            };
            gradient("rms_norm_bwd", loss, &x, &dx);
        }
    }
}
