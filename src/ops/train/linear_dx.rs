//! `dx[r, j] = sum_i dy[r, i] w[i, j]`: the gradient of the input of `y = x w^T`. A frozen `w` has none.
//!
//! Shapes: `dx` [rows, k], `dy` [at least rows, n], `w` [n, k].
//! Rounding: sums in f32, one rounding at the store.

use super::Real;
use crate::{
    backend::train::TrainBackend,
    error::Result,
    ops::{Cost, Gemm, Op, Tolerance, download, expect, noise_buf, noise_weight, poison},
};

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearDx {
    /// Tokens.
    pub rows: usize,
    /// Rows of `w`.
    pub n: usize,
    /// Columns of `w`.
    pub k: usize,
}

impl LinearDx {
    /// Buffer lengths fit the sizes.
    ///
    /// # Errors
    /// `Op` names what does not.
    pub fn check(&self, dx: usize, dy: usize, w: (usize, usize)) -> Result<()> {
        let LinearDx { rows, n, k } = *self;
        expect(Self::STEM, w == (n, k), || format!("w is [{}, {}], expected [{n}, {k}]", w.0, w.1))?;
        expect(Self::STEM, dx >= rows * k && dy >= rows * n, || {
            format!("dx has {dx} elements and dy {dy}: too few for {self:?}")
        })
    }

    /// The product that it is, with `w` turned.
    pub fn product(&self) -> Gemm {
        Gemm { rows: self.rows, n: self.k, k: self.n }
    }

    /// The definition.
    pub fn reference<X: Real, W: Real>(&self, dx: &mut [X], dy: &[X], w: &[W]) {
        for (dx, dy) in dx.chunks_exact_mut(self.k).zip(dy.chunks_exact(self.n)).take(self.rows) {
            for (j, dx) in dx.iter_mut().enumerate() {
                *dx = X::put(dy.iter().enumerate().map(|(i, dy)| dy.get() * w[i * self.k + j].get()).sum());
            }
        }
    }

    /// The kernel, or cuBLAS where [`GemmBy`](crate::backend::cuda::GemmBy) says so. It is a [`Gemm`] with `w` turned.
    ///
    /// # Errors
    /// As `check`; sizes that the kernel does not take; those of the launch.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        cu: &crate::backend::cuda::Cuda,
        dx: &mut crate::backend::cuda::Buffer<half::bf16>,
        dy: &crate::backend::cuda::Buffer<half::bf16>,
        w: &crate::backend::cuda::Weight,
    ) -> Result<()> {
        use crate::backend::cuda::Arg;
        self.check(dx.len(), dy.len(), (w.rows, w.cols))?;
        let LinearDx { rows, n, k } = *self;
        if let Some(blas) = cu.blas_for(rows)? {
            return cu.timed("cublas", || blas.linear_dx(self, dx, dy, w));
        }
        super::expect_chunks(Self::STEM, self, &[n, k], &[])?;
        crate::ops::expect_ints(Self::STEM, &[rows, n, k])?;
        let gemm = self.product();
        let tile = gemm.tile(cu.info().sm_count);
        let (grid, (sums, counters)) = (gemm.grid(tile), gemm.workspace(tile));
        expect(Self::STEM, grid.blocks[1] <= 0xffff, || {
            format!("{self:?}: k is above the kernel's limit of 4 million")
        })?;
        let kernel =
            if tile.side == crate::tiles::GEMM_LARGE_SIDE { "linear_dx_bf16_large" } else { "linear_dx_bf16_small" };
        cu.with_workspace(sums, counters, |sums, arrived| {
            let [rows, n, k, part] = [rows, k, n, gemm.part()].map(Arg::from);
            let (dx, w, bias) = (Arg::from(&mut *dx), Arg::from(&w.data), Arg::from(0usize));
            let args = [dx, sums.into(), arrived.into(), dy.into(), w, bias, rows, n, k, part];
            // SAFETY: check() proved that dy holds [rows, n], w [n, k] and dx [rows, k] elements; workspace() is what the kernel needs
            // of sums and counters, which are 0 and which no kernel uses at the same time, since the stream runs one after the
            // other; the sizes fit an int; the arguments are those of the kernel, in order.
            unsafe { cu.launch(kernel, self, grid, &args) }
        })
    }
}

impl Op for LinearDx {
    const STEM: &'static str = "linear_dx";
    type Io<B: TrainBackend> = (B::Buf<B::Act>, B::Buf<B::Act>, B::Weight);

    fn cases() -> Vec<Self> {
        let case = |rows, n, k| LinearDx { rows, n, k };
        let mut cases = vec![
            case(1, 8, 8),
            case(3, 16, 24),
            case(2, 304, 64),
            case(65, 96, 136),   // just past small tiles
            case(300, 136, 200), // large tiles, the last ones not full
            case(17, 1096, 72),  // four parts of small tiles
            case(200, 520, 184), // two parts of large tiles
        ];
        cases.extend([(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)].map(|(n, k)| case(4096, n, k)));
        cases
    }

    fn odd() -> Vec<Self> {
        let case = |rows, n, k| LinearDx { rows, n, k };
        vec![case(1, 1, 1), case(3, 7, 17), case(65, 96, 100), case(300, 130, 70)]
    }

    fn cost(&self) -> Cost {
        let (x, y, w) = ((self.rows * self.k) as u64, (self.rows * self.n) as u64, (self.n * self.k) as u64);
        Cost { read: 2 * (y + w), write: 2 * x, flops: 2 * self.rows as u64 * w }
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance::BF16
    }

    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>> {
        Ok((
            poison(b, self.rows * self.k)?,
            noise_buf(b, self.rows * self.n, seed, 2.0)?,
            noise_weight(b, self.n, self.k, seed + 1, 0.5)?,
        ))
    }

    fn run<B: TrainBackend>(&self, b: &B, (dx, dy, w): &mut Self::Io<B>) -> Result<()> {
        b.linear_dx(self, dx, dy, w)
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
    fn is_the_gradient_of_the_product() {
        let op = LinearDx { rows: 3, n: 4, k: 5 };
        let (x, w, dy) = (values(15, 1, 1.0), values(20, 2, 1.0), values(12, 3, 1.0));
        let mut dx = vec![f64::NAN; 15];
        op.reference(&mut dx, &dy, &w);
        let loss = |x: &[f64]| {
            let y: Vec<f64> = (0..12).map(|i| dot(&x[i / 4 * 5..][..5], &w[i % 4 * 5..][..5])).collect();
            dot(&y, &dy)
        };
        gradient("linear_dx", loss, &x, &dx);
    }
}
