//! `norm[0] = sqrt(sum_i grads[i]^2)`: the gradient's length, by which it is clipped.
//!
//! Shapes: `norm` [1] f32, `grads` [len] f32.
//! Order: the squares of each [`GradNorm::PART`] elements are summed, and then these sums.

use super::{Real, noise_f32, poison_f32};
use crate::{
    backend::train::TrainBackend,
    error::Result,
    ops::{Cost, Grid, Op, Tolerance, expect},
    tiles,
};

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct GradNorm {
    /// Parameters.
    pub len: usize,
}

impl GradNorm {
    /// Elements of a first sum.
    pub const PART: usize = tiles::GRAD_NORM_PART as usize;

    /// Buffer lengths fit the sizes.
    ///
    /// # Errors
    /// `Op` names what does not.
    pub fn check(&self, norm: usize, grads: usize) -> Result<()> {
        expect(Self::STEM, norm > 0 && self.len > 0 && grads >= self.len, || {
            format!("norm has {norm} elements and grads {grads}: too few for {self:?}")
        })
    }

    /// One block for each part.
    pub fn grid(&self) -> Grid {
        Grid { blocks: [self.len.div_ceil(Self::PART) as u32, 1, 1], threads: tiles::GRAD_NORM_THREADS, shared: 0 }
    }

    /// The definition.
    pub fn reference<P: Real>(&self, norm: &mut [P], grads: &[P]) {
        norm[0] = P::put(grads[..self.len].iter().map(|g| g.get() * g.get()).sum::<f64>().sqrt());
    }

    /// The kernels: the sums of the parts, and their root.
    ///
    /// # Errors
    /// As `check`; those of the launches.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        cu: &crate::backend::cuda::Cuda,
        norm: &mut crate::backend::cuda::Buffer<f32>,
        grads: &crate::backend::cuda::Buffer<f32>,
    ) -> Result<()> {
        self.check(norm.len(), grads.len())?;
        crate::ops::expect_ints(Self::STEM, &[self.len])?;
        let (parts, grid) = (self.len.div_ceil(Self::PART), self.grid());
        let one = Grid { blocks: [1; 3], ..grid };
        cu.with_workspace(parts, 0, |sums, _| {
            // SAFETY: check() proved that grads holds len elements and norm one; sums holds one for each part, and no other kernel
            // uses it at the same time, since the stream runs one after the other; the arguments are those of the kernels, in order.
            unsafe {
                let args = [sums.into(), grads.into(), self.len.into()];
                cu.launch("grad_norm_parts_f32", self, grid, &args)?;
                cu.launch("grad_norm_root_f32", self, one, &[norm.into(), sums.into(), parts.into()])
            }
        })
    }
}

impl Op for GradNorm {
    const STEM: &'static str = "grad_norm";
    type Io<B: TrainBackend> = (B::Buf<f32>, B::Buf<f32>);

    fn cases() -> Vec<Self> {
        [1, 4096, 10_001, 83_886_080].map(|len| GradNorm { len }).into()
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

    fn outputs<B: TrainBackend>(&self, b: &B, (norm, _): &Self::Io<B>) -> Result<Vec<f32>> {
        b.download(norm)
    }
}
