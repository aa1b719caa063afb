//! `y[r, at + j] += scale * sum_t u[r, t] Bt[t, j]`: an adapter's second factor, added to a product of the frozen matrix.
//!
//! Shapes: `y` [at least rows, stride], of which `n` columns from `at` on are the adapted matrix's; `u` [rows, rank] f32; `Bt` [rank, n]
//! f32 at `b` of `params`.
//! Rounding: the sum in f32, one rounding with what is there.

use super::{Real, TrainOp, noise_f32};
use crate::{
    backend::{cpu::Cpu, train::TrainBackend},
    error::Result,
    ops::{Act, Cost, Tolerance, download, expect, noise_buf},
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
}

impl TrainOp for LoraUp {
    const STEM: &'static str = "lora_up";
    type Io<B: TrainBackend> = (B::Buf<B::Act>, B::Buf<f32>, B::Buf<f32>);

    fn cases() -> Vec<Self> {
        vec![
            LoraUp { rows: 1, n: 1, rank: 1, b: 0, stride: 1, at: 0, scale: 1.0 },
            LoraUp { rows: 3, n: 19, rank: 5, b: 4, stride: 40, at: 20, scale: 2.0 },
            LoraUp { rows: 90, n: 64, rank: 16, b: 100, stride: 192, at: 64, scale: 0.5 },
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

    fn define<A: Act + Real>(&self, (y, u, params): &mut Self::Io<Cpu<A>>) {
        self.reference(y, u, params);
    }

    fn outputs<B: TrainBackend>(&self, b: &B, (y, ..): &Self::Io<B>) -> Result<Vec<f32>> {
        download(b, y)
    }
}
