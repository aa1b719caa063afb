//! `dx (+)= s * (g * w - xhat * mean_i(g_i w_i xhat_i))` with `s = 1 / sqrt(mean(x^2) + eps)` and `xhat = s x`: the gradient of the
//! input of [`crate::ops::RmsNorm`] from `g = dy`, that of its output. A frozen `w` has none.
//!
//! Shapes: `dx`, `dy` and `x` [at least rows, dim], `w` [1, dim].

use super::{Real, TrainOp};
use crate::{
    backend::{cpu::Cpu, train::TrainBackend},
    error::Result,
    ops::{Act, Cost, Tolerance, download, expect, expect_len, noise_buf, noise_weight},
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
}

impl TrainOp for RmsNormBwd {
    const STEM: &'static str = "rms_norm_bwd";
    type Io<B: TrainBackend> = (B::Buf<B::Act>, B::Buf<B::Act>, B::Buf<B::Act>, B::Weight);

    fn cases() -> Vec<Self> {
        let case = |rows, dim, add| RmsNormBwd { rows, dim, eps: 1e-5, add };
        // with one column, the gradient is what eps leaves of a difference of equal numbers: nothing to test in f32
        vec![case(1, 2, false), case(3, 17, true), case(40, 576, true), case(2, 1000, false)]
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

    fn define<A: Act + Real>(&self, (dx, dy, x, w): &mut Self::Io<Cpu<A>>) {
        self.reference(dx, dy, x, &w.to_f32());
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
