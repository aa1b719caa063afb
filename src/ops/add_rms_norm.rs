//! `x[r, i] += d[r, i]`, then `out[r, i] = x[r, i] / sqrt(mean_i(x[r, i]^2) + eps) * w[i]`: a residual connection and the norm
//! that follows it in one pass.
//!
//! Shapes: `out`, `x`, `d` [rows, dim], `w` [1, dim].
//! Rounding: the sum is rounded when it is stored, and the norm is that of the rounded sum; then as [`RmsNorm`].

use super::{Act, Cost, Grid, Op, RmsNorm, Tolerance, download, expect, expect_len, noise_buf, noise_weight, poison};
use crate::{backend::train::TrainBackend, error::Result};

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct AddRmsNorm {
    /// Rows.
    pub rows: usize,
    /// Width.
    pub dim: usize,
    /// Added to the mean square.
    pub eps: f32,
}

impl AddRmsNorm {
    /// Buffer lengths fit the sizes.
    pub fn check(&self, out: usize, x: usize, d: usize, w: usize) -> Result<()> {
        let n = self.rows * self.dim;
        expect(Self::STEM, n > 0, || format!("{self:?}: no rows or no columns"))?;
        for (arg, len) in [("out", out), ("x", x), ("d", d)] {
            expect(Self::STEM, len >= n, || format!("{arg} has {len} elements, {self:?} needs {n}"))?;
        }
        expect_len(Self::STEM, "w", w, self.dim)
    }

    /// One block per row.
    pub fn grid(&self) -> Grid {
        Grid { blocks: [self.rows as u32, 1, 1], threads: crate::tiles::NORM_THREADS, shared: 0 }
    }

    /// The definition.
    pub fn reference<A: Act, W: Act>(&self, out: &mut [A], x: &mut [A], d: &[A], w: &[W]) {
        for (x, d) in x.iter_mut().zip(d).take(self.rows * self.dim) {
            *x = A::from_f32(x.to_f32() + d.to_f32());
        }
        RmsNorm { rows: self.rows, first: 0, dim: self.dim, eps: self.eps }.reference(out, x, w);
    }

    /// The kernel.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        cu: &crate::backend::cuda::Cuda,
        out: &mut crate::backend::cuda::Buffer<half::bf16>,
        x: &mut crate::backend::cuda::Buffer<half::bf16>,
        d: &crate::backend::cuda::Buffer<half::bf16>,
        w: &crate::backend::cuda::Buffer<half::bf16>,
    ) -> Result<()> {
        self.check(out.len(), x.len(), d.len(), w.len())?;
        expect(Self::STEM, self.dim.is_multiple_of(8), || format!("{self:?}: the kernel needs dim % 8 == 0"))?;
        super::expect_ints(Self::STEM, &[self.rows, self.dim])?;
        // SAFETY: check() proved that rows rows of out, x and d and dim elements of w exist; the arguments are those of the
        // kernel, in order.
        unsafe {
            cu.launch(
                "add_rms_norm_bf16",
                self,
                self.grid(),
                &[
                    out.into(),
                    x.into(),
                    d.into(),
                    w.into(),
                    self.dim.into(),
                    self.eps.into(),
                    cu.trace(self, self.grid()),
                ],
            )
        }
    }
}

impl Op for AddRmsNorm {
    const STEM: &'static str = "add_rms_norm";
    type Io<B: TrainBackend> = (B::Buf<B::Act>, B::Buf<B::Act>, B::Buf<B::Act>, B::Weight);

    fn cases() -> Vec<Self> {
        let case = |rows, dim| AddRmsNorm { rows, dim, eps: 1e-5 };
        vec![case(1, 8), case(3, 64), case(5, 576), case(1, 2056), case(1, 4096), case(512, 4096)]
    }

    fn cost(&self) -> Cost {
        let n = (self.rows * self.dim) as u64;
        Cost { read: 4 * n + 2 * self.dim as u64, write: 4 * n, flops: 5 * n }
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance::BF16
    }

    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>> {
        let n = self.rows * self.dim;
        Ok((
            poison(b, n)?,
            noise_buf(b, n, seed, 3.0)?,
            noise_buf(b, n, seed + 1, 2.0)?,
            noise_weight(b, 1, self.dim, seed + 2, 1.0)?,
        ))
    }

    fn run<B: TrainBackend>(&self, b: &B, (out, x, d, w): &mut Self::Io<B>) -> Result<()> {
        b.add_rms_norm(self, out, x, d, w)
    }

    fn outputs<B: TrainBackend>(&self, b: &B, (out, x, ..): &Self::Io<B>) -> Result<Vec<f32>> {
        Ok([download(b, out)?, download(b, x)?].concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adds_then_normalises() {
        let op = AddRmsNorm { rows: 1, dim: 2, eps: 0.0 };
        let (mut out, mut x) = ([f32::NAN; 2], [1.0f32, -5.0]);
        op.reference(&mut out, &mut x, &[2.0, 2.0], &[1.0, 10.0f32]);
        assert_eq!((x, out), ([3.0, -3.0], [1.0, -10.0]));
    }

    #[test]
    fn check_names_the_argument() {
        let op = AddRmsNorm { rows: 2, dim: 8, eps: 1e-5 };
        assert!(op.check(16, 16, 16, 8).is_ok());
        assert!(op.check(16, 16, 15, 8).unwrap_err().to_string().starts_with("add_rms_norm: d has 15 elements"));
        assert_eq!(op.check(16, 16, 16, 9).unwrap_err().to_string(), "add_rms_norm: w has 9 elements, expected 8");
    }
}
