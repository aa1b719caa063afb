//! `dx[r, j] += drop(sum_t du[r, t] A[t, j])`: what an adapter adds to the gradient of its input, with the dropout mask
//! of its forward pass.
//!
//! Shapes: `dx` [at least rows, k], `du` [rows, rank] f32 of [`super::LoraGrad`], `A` [rank, k] f32 at `a` of `params`.

use super::{Dropout, Real, noise_f32};
use crate::{
    backend::train::TrainBackend,
    error::Result,
    ops::{Cost, Grid, Op, Tolerance, download, expect, noise_buf},
};

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraDx {
    /// Tokens.
    pub rows: usize,
    /// Columns of the adapted matrix.
    pub k: usize,
    /// Rank of the adapter.
    pub rank: usize,
    /// Where `A` begins.
    pub a: usize,
    /// Dropout as in the forward pass.
    pub dropout: Dropout,
}

impl LoraDx {
    /// Buffer lengths fit the sizes.
    ///
    /// # Errors
    /// `Op` names what does not.
    pub fn check(&self, dx: usize, du: usize, params: usize) -> Result<()> {
        let LoraDx { rows, k, rank, a, .. } = *self;
        expect(Self::STEM, dx >= rows * k && du >= rows * rank && params >= a + rank * k, || {
            format!("dx has {dx} elements, du {du} and params {params}: too few for {self:?}")
        })
    }

    /// Blocks over rows and columns.
    pub fn grid(&self) -> Grid {
        super::wide_grid(self.rows, self.k)
    }

    /// The definition.
    pub fn reference<X: Real, P: Real>(&self, dx: &mut [X], du: &[P], params: &[P]) {
        let a = &params[self.a..];
        for (r, (dx, du)) in dx.chunks_exact_mut(self.k).zip(du.chunks_exact(self.rank)).take(self.rows).enumerate() {
            for (j, dx) in dx.iter_mut().enumerate() {
                let sum: f64 = du.iter().enumerate().map(|(t, du)| du.get() * a[t * self.k + j].get()).sum();
                *dx = X::put(dx.get() + f64::from(self.dropout.factor(r * self.k + j)) * sum);
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
        dx: &mut crate::backend::cuda::Buffer<half::bf16>,
        du: &crate::backend::cuda::Buffer<f32>,
        params: &crate::backend::cuda::Buffer<f32>,
    ) -> Result<()> {
        use crate::backend::cuda::Arg;
        self.check(dx.len(), du.len(), params.len())?;
        let LoraDx { rows, k, rank, a, dropout } = *self;
        super::expect_chunks(Self::STEM, self, &[k, rank], &[a])?;
        crate::ops::expect_ints(Self::STEM, &[rows, k, rank])?;
        let [threshold, seed, step, site] = dropout.args();
        let a = Arg::from(params).after(4 * a);
        let args = [dx.into(), du.into(), a, rows.into(), k.into(), rank.into(), dropout.scale().into()];
        // SAFETY: check() proved that dx holds [rows, k], du [rows, rank] and params [rank, k] elements from a on, which
        // expect_chunks() proved to be aligned to 16 bytes; the arguments are those of the kernel, in order.
        unsafe {
            let args = [&args[..], &[threshold, seed, step, site]].concat();
            cu.launch("lora_dx_bf16", self, self.grid(), &args)
        }
    }
}

impl Op for LoraDx {
    const STEM: &'static str = "lora_dx";
    type Io<B: TrainBackend> = (B::Buf<B::Act>, B::Buf<f32>, B::Buf<f32>);

    fn cases() -> Vec<Self> {
        let dropout = Dropout { p: 0.3, seed: 1 << 40 | 5, step: 3, site: 9 };
        let case = |rows, k, rank, a, p| LoraDx { rows, k, rank, a, dropout: Dropout { p, ..dropout } };
        vec![
            case(1, 8, 8, 0, 0.0),
            case(3, 40, 8, 8, 0.3),
            case(300, 72, 16, 100, 0.05),
            case(65, 72, 40, 4, 0.3), // just past a block in each direction
            case(4096, 4096, 32, 0, 0.05),
            case(4096, 14336, 32, 0, 0.0),
        ]
    }

    fn odd() -> Vec<Self> {
        let dropout = Dropout { p: 0.3, seed: 1 << 40 | 5, step: 3, site: 9 };
        vec![
            LoraDx { rows: 1, k: 1, rank: 1, a: 0, dropout: Dropout::NONE },
            LoraDx { rows: 3, k: 33, rank: 5, a: 7, dropout },
            LoraDx { rows: 300, k: 70, rank: 16, a: 100, dropout: Dropout { p: 0.05, ..dropout } },
        ]
    }

    fn cost(&self) -> Cost {
        let (x, a, u) = ((self.rows * self.k) as u64, (self.rank * self.k) as u64, (self.rows * self.rank) as u64);
        Cost { read: 2 * x + 4 * a + 4 * u, write: 2 * x, flops: 2 * x * self.rank as u64 }
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance::BF16
    }

    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>> {
        Ok((
            noise_buf(b, self.rows * self.k, seed, 2.0)?,
            noise_f32(b, self.rows * self.rank, seed + 1, 1.0)?,
            noise_f32(b, self.a + self.rank * self.k + 3, seed + 2, 0.7)?,
        ))
    }

    fn run<B: TrainBackend>(&self, b: &B, (dx, du, params): &mut Self::Io<B>) -> Result<()> {
        b.lora_dx(self, dx, du, params)
    }

    fn outputs<B: TrainBackend>(&self, b: &B, (dx, ..): &Self::Io<B>) -> Result<Vec<f32>> {
        download(b, dx)
    }
}
