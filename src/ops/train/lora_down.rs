//! `u[r, t] = sum_j drop(x)[r, j] A[t, j]`: an adapter's first factor (LoRA, Hu et al. 2021).
//!
//! Shapes: `u` [rows, rank] f32, `x` [at least rows, k], `A` [rank, k] f32 at `a` of `params`.

use super::{Dropout, Real, noise_f32, poison_f32};
use crate::{
    backend::train::TrainBackend,
    error::Result,
    ops::{Cost, Grid, Op, Tolerance, expect, noise_buf},
};

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraDown {
    /// Tokens.
    pub rows: usize,
    /// Columns of the adapted matrix.
    pub k: usize,
    /// Rank of the adapter.
    pub rank: usize,
    /// Where `A` begins.
    pub a: usize,
    /// Dropout of `x`.
    pub dropout: Dropout,
}

impl LoraDown {
    /// Buffer lengths fit the sizes.
    ///
    /// # Errors
    /// `Op` names what does not.
    pub fn check(&self, u: usize, x: usize, params: usize) -> Result<()> {
        let LoraDown { rows, k, rank, a, .. } = *self;
        expect(Self::STEM, u >= rows * rank && x >= rows * k && params >= a + rank * k, || {
            format!("u has {u} elements, x {x} and params {params}: too few for {self:?}")
        })
    }

    /// Blocks over rows and ranks.
    pub fn grid(&self) -> Grid {
        super::narrow_grid(self.rows, self.rank)
    }

    /// The definition.
    pub fn reference<X: Real, P: Real>(&self, u: &mut [P], x: &[X], params: &[P]) {
        let a = &params[self.a..];
        for (r, u) in u.chunks_exact_mut(self.rank).take(self.rows).enumerate() {
            for (t, u) in u.iter_mut().enumerate() {
                let term = |j: usize| {
                    let i = r * self.k + j;
                    x[i].get() * f64::from(self.dropout.factor(i)) * a[t * self.k + j].get()
                };
                *u = P::put((0..self.k).map(term).sum());
            }
        }
    }

    /// The kernel.
    ///
    /// # Errors
    /// As `check`; sizes that the kernel does not take; those of the launch.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        cu: &crate::backend::cuda::Cuda,
        u: &mut crate::backend::cuda::Buffer<f32>,
        x: &crate::backend::cuda::Buffer<half::bf16>,
        params: &crate::backend::cuda::Buffer<f32>,
    ) -> Result<()> {
        use crate::backend::cuda::Arg;
        self.check(u.len(), x.len(), params.len())?;
        let LoraDown { rows, k, rank, a, dropout } = *self;
        super::expect_chunks(Self::STEM, self, &[k, rank], &[a])?;
        crate::ops::expect_ints(Self::STEM, &[rows, k, rank])?;
        let [threshold, seed, step, site] = dropout.args();
        let a = Arg::from(params).after(4 * a);
        let args = [u.into(), x.into(), a, rows.into(), k.into(), rank.into(), dropout.scale().into()];
        // SAFETY: check() proved that x holds [rows, k], u [rows, rank] and params [rank, k] elements from a on, which
        // expect_chunks() proved to be aligned to 16 bytes; the arguments are those of the kernel, in order.
        unsafe {
            let args = [&args[..], &[threshold, seed, step, site]].concat();
            cu.launch("lora_down_bf16", self, self.grid(), &args)
        }
    }
}

impl Op for LoraDown {
    const STEM: &'static str = "lora_down";
    type Io<B: TrainBackend> = (B::Buf<f32>, B::Buf<B::Act>, B::Buf<f32>);

    fn cases() -> Vec<Self> {
        let dropout = Dropout { p: 0.3, seed: 1 << 40 | 5, step: 3, site: 9 };
        let case = |rows, k, rank, a, p| LoraDown { rows, k, rank, a, dropout: Dropout { p, ..dropout } };
        vec![
            case(1, 8, 8, 0, 0.0),
            case(3, 40, 8, 8, 0.3),
            case(70, 64, 16, 100, 0.05),
            case(65, 72, 40, 4, 0.3), // just past a block's rows and ranks
            case(37, 576, 8, 0, 0.0),
            case(4096, 4096, 32, 0, 0.05),
            case(4096, 14336, 32, 0, 0.0),
        ]
    }

    fn odd() -> Vec<Self> {
        let dropout = Dropout { p: 0.3, seed: 1 << 40 | 5, step: 3, site: 9 };
        vec![
            LoraDown { rows: 1, k: 1, rank: 1, a: 0, dropout: Dropout::NONE },
            LoraDown { rows: 3, k: 33, rank: 5, a: 7, dropout },
            LoraDown { rows: 37, k: 576, rank: 8, a: 1, dropout: Dropout::NONE },
        ]
    }

    fn cost(&self) -> Cost {
        let (x, a, u) = ((self.rows * self.k) as u64, (self.rank * self.k) as u64, (self.rows * self.rank) as u64);
        Cost { read: 2 * x + 4 * a, write: 4 * u, flops: 2 * x * self.rank as u64 }
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance { l2: 2e-6, worst: 1e-5 } // f32 sums of what the reference sums in f64
    }

    fn kernel_tolerance(&self) -> Tolerance {
        super::SPLIT
    }

    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>> {
        Ok((
            poison_f32(b, self.rows * self.rank)?,
            noise_buf(b, self.rows * self.k, seed, 2.0)?,
            noise_f32(b, self.a + self.rank * self.k + 3, seed + 1, 0.7)?,
        ))
    }

    fn run<B: TrainBackend>(&self, b: &B, (u, x, params): &mut Self::Io<B>) -> Result<()> {
        b.lora_down(self, u, x, params)
    }

    fn outputs<B: TrainBackend>(&self, b: &B, (u, ..): &Self::Io<B>) -> Result<Vec<f32>> {
        b.download(u)
    }
}
