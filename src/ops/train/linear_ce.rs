//! Cross-entropy of the labelled rows, computed through the head. For label `i` at row `r = at[i]`,
//! `loss[i] = -ln softmax(x[r] w^T)[target[i]]`; the gradient of `scale * sum(loss)` is
//! `dx[r] = scale * (softmax(x[r] w^T) - onehot(target[i])) w`, and 0 for all other rows.
//!
//! Shapes: `loss` [labels] f32, `dx` and `x` [rows, dim], `at` and `target` [labels], `w` [vocab, dim]. A row has at
//! most one label.
//! Only labelled rows are multiplied by the head, some at a time, so the logits of a whole micro-batch never exist at
//! once.

use super::{Real, poison_f32};
use crate::{
    backend::train::TrainBackend,
    error::Result,
    ops::{Cost, Op, Tolerance, download, expect, noise_buf, noise_ids, noise_weight, poison},
};

/// Most logits that are there at once, if that makes 16 labels to 512.
const LOGITS: usize = 64 << 20;

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearCe {
    /// Tokens.
    pub rows: usize,
    /// How many of them are labelled. The caller ensures that each of `at` is below `rows` and each target below
    /// `vocab`.
    pub labels: usize,
    /// Width.
    pub dim: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Weight of one label in the loss.
    pub scale: f32,
    /// Whether the gradient is computed as well as `loss`.
    pub backward: bool,
}

impl LinearCe {
    /// Buffer lengths fit the sizes.
    ///
    /// # Errors
    /// `Op` names what does not.
    pub fn check(&self, loss: usize, dx: usize, x: usize, at: usize, target: usize, w: (usize, usize)) -> Result<()> {
        let LinearCe { rows, labels, dim, vocab, .. } = *self;
        expect(Self::STEM, w == (vocab, dim), || format!("w is [{}, {}], expected [{vocab}, {dim}]", w.0, w.1))?;
        expect(Self::STEM, loss >= labels && at >= labels && target >= labels, || {
            format!("loss has {loss} elements, at {at} and target {target}: too few for {self:?}")
        })?;
        expect(Self::STEM, dx >= rows * dim && x >= rows * dim, || {
            format!("dx has {dx} elements and x {x}: too few for {self:?}")
        })
    }

    /// The definition.
    pub fn reference<X: Real, W: Real, P: Real>(
        &self,
        loss: &mut [P],
        dx: &mut [X],
        x: &[X],
        at: &[u32],
        target: &[u32],
        w: &[W],
    ) {
        let LinearCe { rows, labels, dim, vocab, .. } = *self;
        if self.backward {
            dx[..rows * dim].fill(X::default());
        }
        for i in 0..labels {
            let (r, target) = (at[i] as usize, target[i] as usize);
            let x = &x[r * dim..][..dim];
            let logit = |t: usize| w[t * dim..][..dim].iter().zip(x).map(|(w, x)| w.get() * x.get()).sum::<f64>();
            let logits: Vec<f64> = (0..vocab).map(logit).collect();
            let max = logits.iter().fold(f64::NEG_INFINITY, |m, l| m.max(*l));
            let lse = max + logits.iter().map(|l| (l - max).exp()).sum::<f64>().ln();
            loss[i] = P::put(lse - logits[target]);
            if self.backward {
                for j in 0..dim {
                    let term = |t: usize| ((logits[t] - lse).exp() - f64::from(t == target)) * w[t * dim + j].get();
                    dx[r * dim + j] = X::put(f64::from(self.scale) * (0..vocab).map(term).sum::<f64>());
                }
            }
        }
    }

    /// How many labels go through the head together.
    pub fn chunk(&self) -> usize {
        (LOGITS / self.vocab).clamp(16, 512)
    }

    /// The kernels.
    ///
    /// # Errors
    /// As `check`; sizes that the kernels do not take; those of the launches.
    #[cfg(feature = "cuda")]
    #[expect(clippy::too_many_arguments, reason = "one argument a buffer, named as in the kernel")]
    pub fn launch(
        &self,
        cu: &crate::backend::cuda::Cuda,
        loss: &mut crate::backend::cuda::Buffer<f32>,
        dx: &mut crate::backend::cuda::Buffer<half::bf16>,
        x: &crate::backend::cuda::Buffer<half::bf16>,
        at: &crate::backend::cuda::Buffer<u32>,
        target: &crate::backend::cuda::Buffer<u32>,
        w: &crate::backend::cuda::Weight,
    ) -> Result<()> {
        use super::LinearDx;
        use crate::{
            backend::{Out, cuda::Arg},
            ops::{Gemm, Grid},
        };
        self.check(loss.len(), dx.len(), x.len(), at.len(), target.len(), (w.rows, w.cols))?;
        let &LinearCe { rows, labels, dim, vocab, scale, backward } = self;
        super::expect_chunks(Self::STEM, self, &[dim, vocab], &[])?;
        crate::ops::expect_ints(Self::STEM, &[rows, labels, dim, vocab])?;
        if backward {
            cu.zero(dx, rows * dim)?;
        }
        let chunk = self.chunk().min(labels);
        cu.with_logits(self, chunk, |s| {
            for first in (0..labels).step_by(chunk.max(1)) {
                let n = chunk.min(labels - first);
                let word = |b: Arg| b.after(4 * first);
                let [at, target] = [at, target].map(|b| word(b.into()));
                let grid = Grid::of_vectors(n, dim);
                let of_row = Grid { blocks: [n as u32, 1, 1], threads: crate::tiles::CE_THREADS, shared: 0 };
                // SAFETY: check() proved that x and dx hold [rows, dim] elements, and loss, at and target one for each label, of which
                // there are n from first on; s holds chunk rows of each kind. That each of at is below rows and each target below
                // vocab is the caller's promise. The arguments are those of the kernels, in order.
                unsafe {
                    cu.launch("linear_ce_gather_bf16", self, grid, &[(&mut s.x).into(), x.into(), at, dim.into()])?;
                    Gemm { rows: n, n: vocab, k: dim }.launch(cu, Out::F32(&mut s.logits), &s.x, w, None)?;
                    let grads = if backward { Arg::from(&mut s.dlogits) } else { Arg::from(0usize) };
                    let loss = word(Arg::from(&mut *loss));
                    let args = [loss, grads, (&s.logits).into(), target, vocab.into(), scale.into()];
                    cu.launch("linear_ce_loss_f32", self, of_row, &args)?;
                    if backward {
                        LinearDx { rows: n, n: vocab, k: dim }.launch(cu, &mut s.dx, &s.dlogits, w)?;
                        let args = [Arg::from(&mut *dx), (&s.dx).into(), at, dim.into()];
                        cu.launch("linear_ce_scatter_bf16", self, grid, &args)?;
                    }
                }
            }
            Ok(())
        })
    }
}

impl Op for LinearCe {
    const STEM: &'static str = "linear_ce";
    /// `loss`, `dx`, `x`, `at`, `target`, `w`
    type Io<B: TrainBackend> = (B::Buf<f32>, B::Buf<B::Act>, B::Buf<B::Act>, B::Buf<u32>, B::Buf<u32>, B::Weight);

    fn cases() -> Vec<Self> {
        let case = |rows, labels, dim, vocab| LinearCe { rows, labels, dim, vocab, scale: 0.25, backward: true };
        vec![
            case(1, 1, 8, 8),
            case(3, 0, 8, 8), // no label
            case(7, 3, 40, 56),
            case(300, 290, 64, 136),
            case(20, 20, 96, 5000),
            case(600, 530, 8, 16), // two chunks
            LinearCe { backward: false, ..case(40, 33, 64, 104) },
            case(4096, 1024, 4096, 128_256),
        ]
    }

    fn odd() -> Vec<Self> {
        let case = |rows, labels, dim, vocab| LinearCe { rows, labels, dim, vocab, scale: 0.25, backward: true };
        vec![case(1, 1, 1, 2), case(3, 0, 8, 5), case(7, 3, 33, 50)]
    }

    fn cost(&self) -> Cost {
        let (x, w) = ((self.rows * self.dim) as u64, (self.vocab * self.dim) as u64);
        let products = if self.backward { 2 } else { 1 };
        Cost {
            read: 2 * (self.labels * self.dim) as u64 + 2 * w,
            write: 2 * x * (products - 1) + 4 * self.labels as u64,
            flops: 2 * products * self.labels as u64 * w,
        }
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance::BF16
    }

    /// The kernel rounds the gradients of the logits for the second product.
    fn kernel_tolerance(&self) -> Tolerance {
        Tolerance::FUSED
    }

    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>> {
        let LinearCe { rows, labels, dim, vocab, .. } = *self;
        let at: Vec<u32> = (0..labels).map(|i| (i * rows / labels) as u32).collect();
        let dx = if self.backward { poison(b, rows * dim)? } else { noise_buf(b, rows * dim, seed + 3, 1.0)? };
        Ok((
            poison_f32(b, labels)?,
            dx,
            noise_buf(b, rows * dim, seed, 2.0)?,
            b.upload(&at)?,
            b.upload(&noise_ids(labels, vocab, seed + 1))?,
            noise_weight(b, vocab, dim, seed + 2, 0.5)?,
        ))
    }

    fn run<B: TrainBackend>(&self, b: &B, (loss, dx, x, at, target, w): &mut Self::Io<B>) -> Result<()> {
        b.linear_ce(self, loss, dx, x, at, target, w)
    }

    fn outputs<B: TrainBackend>(&self, b: &B, (loss, dx, ..): &Self::Io<B>) -> Result<Vec<f32>> {
        Ok([b.download(loss)?, download(b, dx)?].concat())
    }
}

#[cfg(test)]
mod tests {
    use super::super::checks::{gradient, values};
    use super::*;

    #[test]
    fn is_the_gradient_of_the_loss() {
        let op = LinearCe { rows: 4, labels: 2, dim: 3, vocab: 6, scale: 0.5, backward: true };
        let (x, w) = (values(12, 1, 2.0), values(18, 2, 1.0));
        let (at, target) = ([0, 3], [5, 2]);
        let run = |x: &[f64]| {
            let (mut loss, mut dx) = (vec![f64::NAN; 2], vec![f64::NAN; 12]);
            op.reference(&mut loss, &mut dx, x, &at, &target, &w);
            (loss.iter().sum::<f64>() * 0.5, dx)
        };
        gradient("linear_ce", |x| run(x).0, &x, &run(&x).1);
    }
}
