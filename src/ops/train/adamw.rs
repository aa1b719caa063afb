//! A step of AdamW (Loshchilov & Hutter 2019) as PyTorch's `AdamW` takes it, with the gradient clipped as `clip_grad_norm_` does:
//! `g *= min(1, max_norm / (norm + 1e-6))`; `w -= lr decay w`; `m += (1 - beta1) (g - m)`; `v = beta2 v + (1 - beta2) g^2`;
//! `w -= lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)`. Then `grads` is 0, for the next step.
//!
//! Shapes: `params`, `m`, `v` and `grads` [len] f32, `norm` [1] f32 of [`super::GradNorm`].

use super::{Real, noise_f32};
use crate::{
    backend::train::TrainBackend,
    error::Result,
    ops::{Cost, Grid, Op, Tolerance, expect, noise},
};

/// Sizes of one call, and the numbers of the step.
#[derive(Debug, Clone, PartialEq)]
pub struct AdamW {
    /// Parameters.
    pub len: usize,
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the mean.
    pub beta1: f64,
    /// Decay of the mean square.
    pub beta2: f64,
    /// Added to the root of the mean square.
    pub eps: f64,
    /// Weight decay.
    pub decay: f64,
    /// Longest gradient; 0 does not clip.
    pub max_norm: f64,
    /// Updates with this one, `t`.
    pub step: u32,
}

/// What a step multiplies by, in f32.
#[derive(Debug, Clone, Copy)]
pub struct Factors {
    /// `1 - lr decay`
    pub keep: f32,
    /// `1 - beta1`
    pub mix1: f32,
    /// `beta2`
    pub beta2: f32,
    /// `1 - beta2`
    pub mix2: f32,
    /// `sqrt(1 - beta2^t)`
    pub root: f32,
    /// `eps`
    pub eps: f32,
    /// `lr / (1 - beta1^t)`
    pub rate: f32,
}

impl AdamW {
    /// Buffer lengths fit the sizes.
    ///
    /// # Errors
    /// `Op` names what does not.
    pub fn check(&self, params: usize, m: usize, v: usize, grads: usize, norm: usize) -> Result<()> {
        let least = params.min(m).min(v).min(grads);
        expect(Self::STEM, least >= self.len && self.len > 0 && norm > 0 && self.step > 0, || {
            format!("a buffer has {least} elements, norm {norm}: too few for {self:?}")
        })
    }

    /// What a gradient of length `norm` is multiplied by.
    pub fn clip(&self, norm: f32) -> f32 {
        if self.max_norm == 0.0 { 1.0 } else { (self.max_norm / (f64::from(norm) + 1e-6)).min(1.0) as f32 }
    }

    /// The numbers of the step.
    pub fn factors(&self) -> Factors {
        Factors {
            keep: (1.0 - self.lr * self.decay) as f32,
            mix1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            mix2: (1.0 - self.beta2) as f32,
            root: (1.0 - self.beta2.powi(self.step as i32)).sqrt() as f32,
            eps: self.eps as f32,
            rate: (self.lr / (1.0 - self.beta1.powi(self.step as i32))) as f32,
        }
    }

    /// Four parameters a thread.
    pub fn grid(&self) -> Grid {
        let threads = crate::tiles::ADAMW_THREADS;
        Grid { blocks: [self.len.div_ceil(4 * threads as usize) as u32, 1, 1], threads, shared: 0 }
    }

    /// The definition.
    pub fn reference<P: Real>(&self, params: &mut [P], m: &mut [P], v: &mut [P], grads: &mut [P], norm: &[P]) {
        let clip = if self.max_norm == 0.0 { 1.0 } else { (self.max_norm / (norm[0].get() + 1e-6)).min(1.0) };
        let (b1, b2, t) = (self.beta1, self.beta2, self.step as i32);
        for i in 0..self.len {
            let g = grads[i].get() * clip;
            let mean = m[i].get() + (1.0 - b1) * (g - m[i].get());
            let square = b2 * v[i].get() + (1.0 - b2) * g * g;
            let w = params[i].get() * (1.0 - self.lr * self.decay);
            let step = mean / (1.0 - b1.powi(t)) / ((square / (1.0 - b2.powi(t))).sqrt() + self.eps);
            (m[i], v[i], params[i], grads[i]) =
                (P::put(mean), P::put(square), P::put(w - self.lr * step), P::default());
        }
    }

    /// The kernel.
    ///
    /// # Errors
    /// As `check`; those of the launch.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        cu: &crate::backend::cuda::Cuda,
        params: &mut crate::backend::cuda::Buffer<f32>,
        m: &mut crate::backend::cuda::Buffer<f32>,
        v: &mut crate::backend::cuda::Buffer<f32>,
        grads: &mut crate::backend::cuda::Buffer<f32>,
        norm: &crate::backend::cuda::Buffer<f32>,
    ) -> Result<()> {
        use crate::backend::cuda::Arg;
        self.check(params.len(), m.len(), v.len(), grads.len(), norm.len())?;
        crate::ops::expect_ints(Self::STEM, &[self.len])?;
        let Factors { keep, mix1, beta2, mix2, root, eps, rate } = self.factors();
        let factors = [self.max_norm as f32, keep, mix1, beta2, mix2, root, eps, rate].map(Arg::from);
        let buffers: [Arg; 6] = [params.into(), m.into(), v.into(), grads.into(), norm.into(), self.len.into()];
        // SAFETY: check() proved that the buffers hold len elements and norm one; the arguments are those of the kernel, in order.
        unsafe { cu.launch("adamw_f32", self, self.grid(), &[&buffers[..], &factors].concat()) }
    }
}

impl Op for AdamW {
    const STEM: &'static str = "adamw";
    /// `params`, `m`, `v`, `grads`, `norm`
    type Io<B: TrainBackend> = (B::Buf<f32>, B::Buf<f32>, B::Buf<f32>, B::Buf<f32>, B::Buf<f32>);

    fn cases() -> Vec<Self> {
        let step = AdamW { len: 1, lr: 2e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, decay: 0.0, max_norm: 1.0, step: 1 };
        vec![
            step.clone(),
            AdamW { len: 1003, decay: 0.1, lr: 0.01, step: 7, ..step },
            AdamW { len: 20_000, max_norm: 0.0, step: 100_000, ..step },
            AdamW { len: 83_886_080, step: 3, ..step },
        ]
    }

    fn cost(&self) -> Cost {
        let n = self.len as u64;
        Cost { read: 16 * n, write: 16 * n, flops: 13 * n }
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance { l2: 1e-6, worst: 1e-5 }
    }

    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>> {
        let square: Vec<f32> = noise(self.len, seed + 2).into_iter().map(|x| x * x).collect();
        Ok((
            noise_f32(b, self.len, seed, 1.0)?,
            noise_f32(b, self.len, seed + 1, 1.0)?,
            b.upload(&square)?,
            noise_f32(b, self.len, seed + 3, 1.0)?,
            b.upload(&[3.5])?,
        ))
    }

    fn run<B: TrainBackend>(&self, b: &B, (params, m, v, grads, norm): &mut Self::Io<B>) -> Result<()> {
        b.adamw(self, params, m, v, grads, norm)
    }

    fn outputs<B: TrainBackend>(&self, b: &B, (params, m, v, grads, _): &Self::Io<B>) -> Result<Vec<f32>> {
        Ok([b.download(params)?, b.download(m)?, b.download(v)?, b.download(grads)?].concat())
    }
}
