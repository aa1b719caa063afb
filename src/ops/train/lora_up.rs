//! `y[r, at + j] += scale * sum_t u[r, t] Bt[t, j]`: an adapter's second factor, added to a product of the frozen matrix.
//!
//! Shapes: `y` [at least rows, stride], of which `n` columns from `at` on are the adapted matrix's; `u` [rows, rank] f32; `Bt` [rank, n]
//! f32 at `b` of `params`.
//! Rounding: the sum in f32, one rounding with what is there.

use super::{Real, noise_f32};
use crate::{
    backend::train::TrainBackend,
    error::Result,
    ops::{Cost, Grid, Op, Tolerance, download, expect, noise_buf},
};

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraUp {
    /// Tokens.
    pub rows: usize,
    /// Rows of the adapted matrix.
    pub n: usize,
    /// Rank of the adapter.
    pub rank: usize,
    /// Where `Bt` begins.
    pub b: usize,
    /// Columns of `y`.
    pub stride: usize,
    /// Column of `y` that is the matrix's first.
    pub at: usize,
    /// `alpha / r`
    pub scale: f32,
}

impl LoraUp {
    /// Buffer lengths fit the sizes.
    ///
    /// # Errors
    /// `Op` names what does not.
    pub fn check(&self, y: usize, u: usize, params: usize) -> Result<()> {
        let LoraUp { rows, n, rank, b, stride, at, .. } = *self;
        expect(Self::STEM, at + n <= stride, || format!("columns {at} to {} of {stride}", at + n))?;
        expect(Self::STEM, y >= rows * stride && u >= rows * rank && params >= b + rank * n, || {
            format!("y has {y} elements, u {u} and params {params}: too few for {self:?}")
        })
    }

    /// Blocks over rows and columns.
    pub fn grid(&self) -> Grid {
        super::wide_grid(self.rows, self.n)
    }

    /// The definition.
    pub fn reference<X: Real, P: Real>(&self, y: &mut [X], u: &[P], params: &[P]) {
        let b = &params[self.b..];
        for (y, u) in y.chunks_exact_mut(self.stride).zip(u.chunks_exact(self.rank)).take(self.rows) {
            for (j, y) in y[self.at..][..self.n].iter_mut().enumerate() {
                let sum: f64 = u.iter().enumerate().map(|(t, u)| u.get() * b[t * self.n + j].get()).sum();
                *y = X::put(y.get() + f64::from(self.scale) * sum);
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
        y: &mut crate::backend::cuda::Buffer<half::bf16>,
        u: &crate::backend::cuda::Buffer<f32>,
        params: &crate::backend::cuda::Buffer<f32>,
    ) -> Result<()> {
        use crate::backend::cuda::Arg;
        self.check(y.len(), u.len(), params.len())?;
        let LoraUp { rows, n, rank, b, stride, at, scale } = *self;
        super::expect_chunks(Self::STEM, self, &[n, rank, stride, at], &[b])?;
        crate::ops::expect_ints(Self::STEM, &[rows, n, rank, stride])?;
        let (y, b) = (Arg::from(y).after(2 * at), Arg::from(params).after(4 * b));
        let args = [y, u.into(), b, rows.into(), n.into(), rank.into(), stride.into(), scale.into()];
        // SAFETY: check() proved that y holds rows of stride elements, of which n from at on, u [rows, rank] and params [rank, n]
        // elements from b on; expect_chunks() proved that these places are aligned to 16 bytes; the arguments are those of the
        // kernel, in order.
        unsafe { cu.launch("lora_up_bf16", self, self.grid(), &args) }
    }
}

impl Op for LoraUp {
    const STEM: &'static str = "lora_up";
    type Io<B: TrainBackend> = (B::Buf<B::Act>, B::Buf<f32>, B::Buf<f32>);

    fn cases() -> Vec<Self> {
        let case = |rows, n, rank, b, stride, at, scale| LoraUp { rows, n, rank, b, stride, at, scale };
        vec![
            case(1, 8, 8, 0, 8, 0, 1.0),
            case(3, 24, 8, 4, 64, 40, 2.0),
            case(90, 64, 16, 100, 192, 64, 0.5),
            case(65, 72, 40, 0, 72, 0, 1.0), // just past a block in each direction
            case(33, 1000, 8, 4, 1000, 0, 1.0),
            case(4096, 4096, 32, 0, 6144, 0, 1.0),
            case(4096, 14336, 32, 0, 28672, 14336, 1.0),
        ]
    }

    fn odd() -> Vec<Self> {
        vec![
            LoraUp { rows: 1, n: 1, rank: 1, b: 0, stride: 1, at: 0, scale: 1.0 },
            LoraUp { rows: 3, n: 19, rank: 5, b: 4, stride: 40, at: 20, scale: 2.0 },
            LoraUp { rows: 33, n: 1000, rank: 8, b: 1, stride: 1000, at: 0, scale: 1.0 },
        ]
    }

    fn cost(&self) -> Cost {
        let (y, b, u) = ((self.rows * self.n) as u64, (self.rank * self.n) as u64, (self.rows * self.rank) as u64);
        Cost { read: 2 * y + 4 * b + 4 * u, write: 2 * y, flops: 2 * y * self.rank as u64 }
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance::BF16
    }

    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>> {
        Ok((
            noise_buf(b, self.rows * self.stride, seed, 2.0)?,
            noise_f32(b, self.rows * self.rank, seed + 1, 1.0)?,
            noise_f32(b, self.b + self.rank * self.n + 3, seed + 2, 0.7)?,
        ))
    }

    fn run<B: TrainBackend>(&self, b: &B, (y, u, params): &mut Self::Io<B>) -> Result<()> {
        b.lora_up(self, y, u, params)
    }

    fn outputs<B: TrainBackend>(&self, b: &B, (y, ..): &Self::Io<B>) -> Result<Vec<f32>> {
        download(b, y)
    }
}
