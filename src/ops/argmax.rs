//! `token[0] = argmax_i logits[i]`, the lowest id of equals; `pos[0] += 1`: the greedy choice, fed back on the device.
//!
//! Shapes: `token`, `pos` [at least 1]; `logits` [at least vocab] f32. NaN counts as smaller than everything. Exact.

use super::expect;
use crate::error::Result;

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct Argmax {
    /// Logits.
    pub vocab: usize,
}

impl Argmax {
    const STEM: &'static str = "argmax";

    /// Buffer lengths fit the sizes.
    pub fn check(&self, token: usize, pos: usize, scratch: usize, logits: usize) -> Result<()> {
        expect(Self::STEM, token > 0 && pos > 0, || format!("token has {token} elements and pos {pos}, {self:?}"))?;
        expect(Self::STEM, self.vocab > 0 && logits >= self.vocab && scratch >= Self::scratch(), || {
            format!("logits has {logits} elements and scratch {scratch}, {self:?}")
        })
    }

    /// Words of scratch that the kernel's blocks need.
    pub fn scratch() -> usize {
        2 * crate::tiles::ARGMAX_BLOCKS as usize
    }

    /// The definition.
    pub fn reference(&self, token: &mut [u32], pos: &mut [u32], logits: &[f32]) {
        let mut best = 0;
        for (i, x) in logits[..self.vocab].iter().enumerate() {
            if *x > logits[best] || logits[best].is_nan() && !x.is_nan() {
                best = i;
            }
        }
        token[0] = best as u32;
        pos[0] += 1;
    }

    /// The kernel.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        _cu: &crate::cuda::Cuda,
        _token: &mut crate::cuda::Buffer<u32>,
        _pos: &mut crate::cuda::Buffer<u32>,
        _scratch: &mut crate::cuda::Buffer<f32>,
        _logits: &crate::cuda::Buffer<f32>,
    ) -> Result<()> {
        Err(crate::error::Error::Op { op: Self::STEM, what: "has no kernel yet".into() })
    }
}
