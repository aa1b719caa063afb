//! `out[r, i] = x[first + r, i] / sqrt(mean_i(x[first + r, i]^2) + eps) * w[i]` (Zhang & Sennrich 2019).
//!
//! Shapes: `out` [rows, dim], `x` [at least first + rows, dim], `w` [1, dim].
//! Rounding: sums in f32, one rounding at the store. Hugging Face also rounds before the multiplication by `w`: the two
//! are about 1 ulp apart.

use super::{Act, Cost, Grid, Op, Tolerance, download, expect, expect_len, noise_buf, noise_weight, poison};
use crate::{backend::train::TrainBackend, error::Result};

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct RmsNorm {
    /// Rows normalised.
    pub rows: usize,
    /// The row of `x` that is normalised first: of a chunk, only the last row needs the final norm.
    pub first: usize,
    /// Width.
    pub dim: usize,
    /// Added to the mean square.
    pub eps: f32,
}

impl RmsNorm {
    /// Buffer lengths fit the sizes.
    pub fn check(&self, out: usize, x: usize, w: usize) -> Result<()> {
        expect(Self::STEM, self.rows > 0 && self.dim > 0, || format!("{self:?}: no rows or no columns"))?;
        expect(Self::STEM, x >= (self.first + self.rows) * self.dim, || {
            format!("x has {x} elements, {self:?} reads up to {}", (self.first + self.rows) * self.dim)
        })?;
        expect(Self::STEM, out >= self.rows * self.dim, || {
            format!("out has {out} elements, {self:?} writes {}", self.rows * self.dim)
        })?;
        expect_len(Self::STEM, "w", w, self.dim)
    }

    /// One block per row.
    pub fn grid(&self) -> Grid {
        Grid { blocks: [self.rows as u32, 1, 1], threads: crate::tiles::NORM_THREADS, shared: 0 }
    }

    /// The definition.
    pub fn reference<A: Act, W: Act>(&self, out: &mut [A], x: &[A], w: &[W]) {
        for (out, x) in out.chunks_exact_mut(self.dim).zip(x.chunks_exact(self.dim).skip(self.first)).take(self.rows) {
            let mean = x.iter().map(|x| x.to_f32() * x.to_f32()).sum::<f32>() / self.dim as f32;
            let scale = 1.0 / (mean + self.eps).sqrt();
            for ((out, x), w) in out.iter_mut().zip(x).zip(w) {
                *out = A::from_f32(x.to_f32() * scale * w.to_f32());
            }
        }
    }

    /// The kernel.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        cu: &crate::backend::cuda::Cuda,
        out: &mut crate::backend::cuda::Buffer<half::bf16>,
        x: &crate::backend::cuda::Buffer<half::bf16>,
        w: &crate::backend::cuda::Buffer<half::bf16>,
    ) -> Result<()> {
        self.check(out.len(), x.len(), w.len())?;
        expect(Self::STEM, self.dim.is_multiple_of(8), || format!("{self:?}: the kernel needs dim % 8 == 0"))?;
        // SAFETY: check() proved that rows [first, first + rows) of x, rows [0, rows) of out and dim elements of w exist; the
        // arguments are those of the kernel, in order.
        unsafe {
            cu.launch(
                "rms_norm_bf16",
                self,
                self.grid(),
                &[
                    out.into(),
                    x.into(),
                    w.into(),
                    self.first.into(),
                    self.dim.into(),
                    self.eps.into(),
                    cu.trace(self, self.grid()),
                ],
            )
        }
    }
}

impl Op for RmsNorm {
    const STEM: &'static str = "rms_norm";
    type Io<B: TrainBackend> = (B::Buf<B::Act>, B::Buf<B::Act>, B::Weight);

    fn cases() -> Vec<Self> {
        let case = |rows, first, dim| RmsNorm { rows, first, dim, eps: 1e-5 };
        vec![case(1, 0, 8), case(3, 2, 64), case(5, 0, 576), case(1, 0, 2056), case(1, 0, 4096), case(512, 0, 4096)]
    }

    fn cost(&self) -> Cost {
        let n = (self.rows * self.dim) as u64;
        Cost { read: 2 * n + 2 * self.dim as u64, write: 2 * n, flops: 4 * n }
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance::BF16
    }

    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>> {
        Ok((
            poison(b, self.rows * self.dim)?,
            noise_buf(b, (self.first + self.rows) * self.dim, seed, 3.0)?,
            noise_weight(b, 1, self.dim, seed + 1, 1.0)?,
        ))
    }

    fn run<B: TrainBackend>(&self, b: &B, (out, x, w): &mut Self::Io<B>) -> Result<()> {
        b.rms_norm(self, out, x, w)
    }

    fn outputs<B: TrainBackend>(&self, b: &B, (out, ..): &Self::Io<B>) -> Result<Vec<f32>> {
        download(b, out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_of_equal_values_becomes_the_weight() {
        let op = RmsNorm { rows: 1, first: 1, dim: 4, eps: 0.0 };
        let mut out = [0f32; 4];
        op.reference(&mut out, &[9.0, 9.0, 9.0, 9.0, -2.0, -2.0, -2.0, -2.0f32], &[1.0, 2.0, 3.0, 4.0f32]);
        assert_eq!(out, [-1.0, -2.0, -3.0, -4.0]);
    }

    #[test]
    fn check_names_the_argument() {
        let op = RmsNorm { rows: 2, first: 0, dim: 8, eps: 1e-5 };
        assert!(op.check(16, 16, 8).is_ok());
        assert_eq!(op.check(16, 16, 7).unwrap_err().to_string(), "rms_norm: w has 7 elements, expected 8");
        assert!(op.check(16, 15, 8).unwrap_err().to_string().starts_with("rms_norm: x has 15 elements"));
    }
}
