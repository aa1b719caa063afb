//! The gradients of an adapter's factors, from that of its output: `du[r, t] = scale * sum_j dy[r, at + j] Bt[t, j]`,
//! `dA[t, j] += sum_r du[r, t] drop(x)[r, j]` and `dBt[t, j] += scale * sum_r u[r, t] dy[r, at + j]`.
//!
//! Shapes: `du` and `u` [rows, rank] f32; `dy` [at least rows, stride], of which `n` columns from `at` on are the adapted matrix's; `x` [at least
//! rows, k]; `A` [rank, k] and `Bt` [rank, n] f32 at `a` and `b` of `params`, and their gradients at the same places of `grads`.

use super::{Dropout, Real, noise_f32, poison_f32};
use crate::{
    backend::train::TrainBackend,
    error::Result,
    ops::{Cost, Grid, Op, Tolerance, expect, noise_buf},
    tiles,
};

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraGrad {
    /// Tokens.
    pub rows: usize,
    /// Columns of the adapted matrix.
    pub k: usize,
    /// Rows of the adapted matrix.
    pub n: usize,
    /// Rank of the adapter.
    pub rank: usize,
    /// Where `A` begins.
    pub a: usize,
    /// Where `Bt` begins.
    pub b: usize,
    /// Columns of `dy`.
    pub stride: usize,
    /// Column of `dy` that is the matrix's first.
    pub at: usize,
    /// `alpha / r`
    pub scale: f32,
    /// Dropout as in the forward pass.
    pub dropout: Dropout,
}

impl LoraGrad {
    /// Buffer lengths fit the sizes.
    ///
    /// # Errors
    /// `Op` names what does not.
    pub fn check(&self, du: usize, grads: usize, dy: usize, x: usize, u: usize, params: usize) -> Result<()> {
        let LoraGrad { rows, k, n, rank, a, b, stride, at, .. } = *self;
        expect(Self::STEM, at + n <= stride, || format!("columns {at} to {} of {stride}", at + n))?;
        let end = (a + rank * k).max(b + rank * n);
        expect(Self::STEM, du >= rows * rank && u >= rows * rank && grads >= end && params >= end, || {
            format!("du has {du} elements, u {u}, grads {grads} and params {params}: too few for {self:?}")
        })?;
        expect(Self::STEM, dy >= rows * stride && x >= rows * k, || {
            format!("dy has {dy} elements and x {x}: too few for {self:?}")
        })
    }

    /// The definition.
    pub fn reference<X: Real, P: Real>(&self, du: &mut [P], grads: &mut [P], dy: &[X], x: &[X], u: &[P], params: &[P]) {
        let LoraGrad { rows, k, n, rank, a, b, stride, at, .. } = *self;
        let scale = f64::from(self.scale);
        for r in 0..rows {
            let dy = &dy[r * stride + at..][..n];
            for t in 0..rank {
                let bt = &params[b + t * n..][..n];
                du[r * rank + t] = P::put(scale * dy.iter().zip(bt).map(|(dy, b)| dy.get() * b.get()).sum::<f64>());
            }
        }
        for t in 0..rank {
            for j in 0..k {
                let term = |r: usize| {
                    let i = r * k + j;
                    du[r * rank + t].get() * x[i].get() * f64::from(self.dropout.factor(i))
                };
                let to = &mut grads[a + t * k + j];
                *to = P::put(to.get() + (0..rows).map(term).sum::<f64>());
            }
            for j in 0..n {
                let term = |r: usize| u[r * rank + t].get() * dy[r * stride + at + j].get();
                let to = &mut grads[b + t * n + j];
                *to = P::put(to.get() + scale * (0..rows).map(term).sum::<f64>());
            }
        }
    }

    /// Launch for the gradient of a factor of `n` columns: blocks over columns, ranks and parts of the rows.
    fn factor_grid(&self, n: usize) -> Grid {
        let (columns, depth, ranks) = (tiles::LORA_GRAD_COLS, tiles::LORA_GRAD_DEPTH, tiles::LORA_RANKS);
        let count = |n: usize, of: u32| n.div_ceil(of as usize) as u32;
        Grid {
            blocks: [count(n, columns), count(self.rank, ranks), count(self.rows, tiles::LORA_GRAD_PART)],
            threads: tiles::LORA_THREADS,
            shared: tiles::LORA_GRAD_STAGES * (2 * depth * columns + 4 * depth * (ranks + 4)),
        }
    }

    /// How many elements of scratch are needed: f32 sums, and counters. None if there is one part.
    pub fn workspace(&self) -> (usize, usize) {
        let [x, y, parts] = self.factor_grid(self.k.max(self.n)).blocks.map(|n| n as usize);
        let tile = (tiles::LORA_GRAD_COLS * tiles::LORA_RANKS) as usize;
        if parts == 1 { (0, 0) } else { (parts * x * y * tile, x * y) }
    }

    /// The kernels: `du`, then the gradients of `A` and `Bt`.
    ///
    /// # Errors
    /// As `check`; sizes that the kernels do not take; those of the launches.
    #[cfg(feature = "cuda")]
    #[expect(clippy::too_many_arguments, reason = "one argument a buffer, named as in the kernel")]
    pub fn launch(
        &self,
        cu: &crate::backend::cuda::Cuda,
        du: &mut crate::backend::cuda::Buffer<f32>,
        grads: &mut crate::backend::cuda::Buffer<f32>,
        dy: &crate::backend::cuda::Buffer<half::bf16>,
        x: &crate::backend::cuda::Buffer<half::bf16>,
        u: &crate::backend::cuda::Buffer<f32>,
        params: &crate::backend::cuda::Buffer<f32>,
    ) -> Result<()> {
        use crate::backend::cuda::Arg;
        self.check(du.len(), grads.len(), dy.len(), x.len(), u.len(), params.len())?;
        let &LoraGrad { rows, k, n, rank, a, b, stride, at, scale, dropout } = self;
        super::expect_chunks(Self::STEM, self, &[k, n, rank, stride, at], &[a, b])?;
        crate::ops::expect_ints(Self::STEM, &[rows, k, n, rank, stride])?;
        expect(Self::STEM, rows.div_ceil(tiles::LORA_GRAD_PART as usize) <= 0xffff, || {
            format!("{self:?}: rows are above the kernel's limit of 67 million")
        })?;
        let (dy, grads) = (Arg::from(dy).after(2 * at), Arg::from(grads));
        let args = [du.into(), dy, Arg::from(params).after(4 * b), rows.into(), n.into(), rank.into(), stride.into()];
        // SAFETY: check() proved that dy holds rows of stride elements, of which n from at on, du [rows, rank] and params [rank, n]
        // elements from b on; expect_chunks() proved that these places are aligned to 16 bytes; the arguments are those of the
        // kernel, in order.
        unsafe {
            let args = [&args[..], &[scale.into()]].concat();
            cu.launch("lora_grad_du_bf16", self, super::narrow_grid(rows, rank), &args)?;
        }
        let (sums, counters) = self.workspace();
        cu.with_workspace(sums, counters, |sums, arrived| {
            let factor = |grad: Arg, p: Arg, x: Arg, n: usize, stride: usize, scale: f32, dropout: Dropout| {
                let grid = self.factor_grid(n);
                let sizes = [rows, n, rank, stride].map(Arg::from);
                let buffers = [grad, sums.into(), arrived.into(), p, x];
                let args = [&buffers[..], &sizes, &[scale.into()], &dropout.args()];
                // SAFETY: grad is of [rank, n] gradients, p of [rows, rank] and x of rows of stride elements, of which n, as check()
                // proved; workspace() is what the kernel needs of sums and counters, which are 0 and which no kernel uses at the
                // same time, since the stream runs one after the other; the arguments are those of the kernel, in order.
                unsafe { cu.launch("lora_grad_factor_bf16", self, grid, &args.concat()) }
            };
            factor(grads.after(4 * a), Arg::from(&*du), x.into(), k, k, dropout.scale(), dropout)?;
            factor(grads.after(4 * b), u.into(), dy, n, stride, scale, Dropout::NONE)
        })
    }
}

impl Op for LoraGrad {
    const STEM: &'static str = "lora_grad";
    /// `du`, `grads`, `dy`, `x`, `u`, `params`
    type Io<B: TrainBackend> = (B::Buf<f32>, B::Buf<f32>, B::Buf<B::Act>, B::Buf<B::Act>, B::Buf<f32>, B::Buf<f32>);

    fn cases() -> Vec<Self> {
        let dropout = Dropout { p: 0.3, seed: 1 << 40 | 5, step: 3, site: 9 };
        let one = LoraGrad {
            rows: 1,
            k: 8,
            n: 8,
            rank: 8,
            a: 0,
            b: 64,
            stride: 8,
            at: 0,
            scale: 2.0,
            dropout: Dropout::NONE,
        };
        vec![
            one.clone(),
            LoraGrad { rows: 3, k: 40, n: 16, a: 128, b: 0, stride: 64, at: 32, dropout, ..one },
            LoraGrad { rows: 300, k: 72, n: 136, rank: 16, a: 4, b: 1200, stride: 136, scale: 0.5, dropout, ..one },
            LoraGrad { rows: 33, k: 576, n: 192, a: 0, b: 4608, stride: 960, at: 576, ..one },
            LoraGrad { rows: 70, k: 48, n: 64, rank: 40, a: 0, b: 1920, stride: 64, dropout, ..one },
            LoraGrad { rows: 2100, n: 16, b: 64, stride: 16, dropout, ..one }, // three parts, the last not full
            LoraGrad { rows: 4096, k: 4096, n: 4096, rank: 32, b: 1 << 17, stride: 6144, dropout, ..one },
            LoraGrad { rows: 4096, k: 4096, n: 14336, rank: 32, b: 1 << 17, stride: 28672, at: 14336, ..one },
        ]
    }

    fn odd() -> Vec<Self> {
        let dropout = Dropout { p: 0.3, seed: 1 << 40 | 5, step: 3, site: 9 };
        let one =
            LoraGrad { rows: 1, k: 1, n: 1, rank: 1, a: 0, b: 1, stride: 1, at: 0, scale: 2.0, dropout: Dropout::NONE };
        vec![
            one.clone(),
            LoraGrad { rows: 3, k: 33, n: 10, rank: 5, a: 60, b: 7, stride: 40, at: 20, dropout, ..one },
            LoraGrad { rows: 300, k: 70, n: 130, rank: 16, a: 3, b: 1200, stride: 130, scale: 0.5, dropout, ..one },
        ]
    }

    fn cost(&self) -> Cost {
        let (x, y) = ((self.rows * self.k) as u64, (self.rows * self.n) as u64);
        let (factors, u) = ((self.rank * (self.k + self.n)) as u64, (self.rows * self.rank) as u64);
        Cost {
            read: 2 * (x + y) + 4 * (2 * factors + u),
            write: 4 * (factors + u),
            flops: 2 * self.rank as u64 * (x + 2 * y),
        }
    }

    fn tolerance(&self) -> Tolerance {
        // f32 sums of what the reference sums in f64, whose error grows with the root of the number of rows
        Tolerance { l2: 2e-6, worst: 1e-5 * (self.rows as f32 / 1024.0).sqrt().max(1.0) }
    }

    fn kernel_tolerance(&self) -> Tolerance {
        super::SPLIT
    }

    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>> {
        let end = (self.a + self.rank * self.k).max(self.b + self.rank * self.n);
        Ok((
            poison_f32(b, self.rows * self.rank)?,
            noise_f32(b, end, seed, 1.0)?,
            noise_buf(b, self.rows * self.stride, seed + 1, 2.0)?,
            noise_buf(b, self.rows * self.k, seed + 2, 2.0)?,
            noise_f32(b, self.rows * self.rank, seed + 3, 1.0)?,
            noise_f32(b, end, seed + 4, 0.7)?,
        ))
    }

    fn run<B: TrainBackend>(&self, b: &B, (du, grads, dy, x, u, params): &mut Self::Io<B>) -> Result<()> {
        b.lora_grad(self, du, grads, dy, x, u, params)
    }

    fn outputs<B: TrainBackend>(&self, b: &B, (du, grads, ..): &Self::Io<B>) -> Result<Vec<f32>> {
        Ok([b.download(du)?, b.download(grads)?].concat())
    }
}

#[cfg(test)]
mod tests {
    use super::super::checks::{dot, gradient, values};
    use super::super::{LoraDown, LoraDx, LoraUp};
    use super::*;

    #[test]
    fn factors_and_input_have_the_gradients_of_the_adapter() {
        for op in LoraGrad::odd().into_iter().take(2) {
            let LoraGrad { rows, k, n, rank, a, b, stride, at, scale, dropout } = op;
            let (x, dy) = (values(rows * k, 1, 1.0), values(rows * stride, 2, 1.0));
            let params = values((a + rank * k).max(b + rank * n), 3, 1.0);
            let forward = |x: &[f64], params: &[f64]| {
                let (mut u, mut y) = (vec![0.0; rows * rank], vec![0.0; rows * stride]);
                LoraDown { rows, k, rank, a, dropout }.reference(&mut u, x, params);
                LoraUp { rows, n, rank, b, stride, at, scale }.reference(&mut y, &u, params);
                (u, dot(&y, &dy))
            };
            let u = forward(&x, &params).0;
            let (mut du, mut grads, mut dx) = (vec![0.0; rows * rank], vec![0.0; params.len()], vec![0.0; rows * k]);
            op.reference(&mut du, &mut grads, &dy, &x, &u, &params);
            LoraDx { rows, k, rank, a, dropout }.reference(&mut dx, &du, &params);
            gradient("A and B", |params| forward(&x, params).1, &params, &grads);
            gradient("x", |x| forward(x, &params).1, &x, &dx);
        }
    }
}
