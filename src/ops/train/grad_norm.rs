//! `norm[0] = sqrt(sum_i grads[i]^2)`: the gradient's length, by which it is clipped.
//!
//! Shapes: `norm` [1] f32, `grads` [len] f32.
//! Order: the squares of each [`GradNorm::PART`] elements are summed, and then these sums.

use super::{Real, TrainOp, noise_f32, poison_f32};
use crate::{
    backend::{cpu::Cpu, train::TrainBackend},
    error::Result,
    ops::{Act, Cost, Tolerance, expect},
};

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct GradNorm {
    /// Parameters.
    pub len: usize,
}

impl GradNorm {
    /// Elements of a first sum.
    pub const PART: usize = 4096;

    /// Buffer lengths fit the sizes.
    ///
    /// # Errors
    /// `Op` names what does not.
    pub fn check(&self, norm: usize, grads: usize) -> Result<()> {
        expect(Self::STEM, norm > 0 && grads >= self.len, || {
            format!("norm has {norm} elements and grads {grads}: too few for {self:?}")
        })
    }

    /// The definition.
    pub fn reference<P: Real>(&self, norm: &mut [P], grads: &[P]) {
        norm[0] = P::put(grads[..self.len].iter().map(|g| g.get() * g.get()).sum::<f64>().sqrt());
    }
}

impl TrainOp for GradNorm {
    const STEM: &'static str = "grad_norm";
    type Io<B: TrainBackend> = (B::Buf<f32>, B::Buf<f32>);

    fn cases() -> Vec<Self> {
        [1, 4096, 10_000].map(|len| GradNorm { len }).into()
    }

    fn cost(&self) -> Cost {
        Cost { read: 4 * self.len as u64, write: 4, flops: 2 * self.len as u64 }
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance { l2: 1e-6, worst: 1e-6 }
    }

    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>> {
        Ok((poison_f32(b, 1)?, noise_f32(b, self.len, seed, 0.01)?))
    }

    fn run<B: TrainBackend>(&self, b: &B, (norm, grads): &mut Self::Io<B>) -> Result<()> {
        b.grad_norm(self, norm, grads)
    }

    fn define<A: Act + Real>(&self, (norm, grads): &mut Self::Io<Cpu<A>>) {
        self.reference(norm, grads);
    }

    fn outputs<B: TrainBackend>(&self, b: &B, (norm, _): &Self::Io<B>) -> Result<Vec<f32>> {
        b.download(norm)
    }
}
