//! `token[0] = argmax_i logits[i]`, the lowest id of equals; `pos[0] += 1`: the greedy choice, fed back on the device.
//!
//! Shapes: `token`, `pos` [at least 1], a [place](crate::model::kv), whose sequence's outbox gets the token; `logits` [at least vocab] f32. NaN counts as smaller than everything. Exact.

use super::{Cost, Grid, Op, Tolerance, expect, noise, sample};
use crate::{
    backend::{Backend, SamplerState},
    error::Result,
    tiles::{ARGMAX_BLOCKS, ARGMAX_THREADS},
};

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct Argmax {
    /// Logits.
    pub vocab: usize,
    /// Positions of a sequence; the caller proves that the place's sequence has an outbox.
    pub max_seq: usize,
}

impl Argmax {
    /// Buffer lengths fit the sizes.
    pub fn check(&self, token: usize, pos: usize, scratch: usize, logits: usize) -> Result<()> {
        expect(Self::STEM, token > 0 && pos > 0 && self.max_seq > 0, || {
            format!("token has {token} elements and pos {pos}, {self:?}")
        })?;
        expect(Self::STEM, self.vocab > 0 && logits >= self.vocab && scratch >= Self::scratch(), || {
            format!("logits has {logits} elements and scratch {scratch}, {self:?}")
        })
    }

    /// Words of scratch that the kernel needs: four that are 0 before and after each call, a counter of arrived blocks first,
    /// and two a block.
    pub fn scratch() -> usize {
        4 + 2 * ARGMAX_BLOCKS as usize
    }

    /// As many blocks as have work, up to the limit.
    pub fn grid(&self) -> Grid {
        let blocks = self.vocab.div_ceil(4 * ARGMAX_THREADS as usize).min(ARGMAX_BLOCKS as usize);
        Grid { blocks: [blocks as u32, 1, 1], threads: ARGMAX_THREADS, shared: 0 }
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
        pos[0] = pos[0].wrapping_add(1);
    }

    /// The kernel.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        cu: &crate::backend::cuda::Cuda,
        token: &mut crate::backend::cuda::Buffer<u32>,
        pos: &mut crate::backend::cuda::Buffer<u32>,
        scratch: &mut crate::backend::cuda::Buffer<f32>,
        outbox: &mut crate::backend::cuda::Outbox,
        logits: &crate::backend::cuda::Buffer<f32>,
    ) -> Result<()> {
        self.check(token.len(), pos.len(), scratch.len(), logits.len())?;
        super::expect_ints(Self::STEM, &[self.vocab, self.max_seq])?;
        let [serial, ring] = outbox.args();
        let args = [
            token.into(),
            pos.into(),
            scratch.into(),
            serial,
            ring,
            logits.into(),
            self.vocab.into(),
            self.max_seq.into(),
            cu.trace(self, self.grid()),
        ];
        // SAFETY: check() proved that a token, a position, scratch() words and vocab logits exist, and the outbox of
        // the place's sequence exists by the caller's promise; the arguments are those of the kernel, in order; it waits for its predecessor before it reads anything.
        unsafe { cu.launch_dependent("argmax_f32", self, self.grid(), &args) }
    }
}

impl Op for Argmax {
    const STEM: &'static str = "argmax";
    type Io<B: Backend> = (B::Buf<u32>, B::Buf<u32>, SamplerState<B>, B::Buf<f32>);

    fn cases() -> Vec<Self> {
        [1, 7, 1025, 49152, 128256].into_iter().map(|vocab| Argmax { vocab, max_seq: 50 }).collect()
    }

    fn cost(&self) -> Cost {
        Cost { read: 4 * self.vocab as u64, write: 8, flops: 0 }
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance::EXACT
    }

    /// The largest logit comes three times, among NaN.
    fn setup<B: Backend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>> {
        let mut logits = noise(self.vocab, seed);
        let at = |part: usize| (seed as usize * 7 + self.vocab * part / 5) % self.vocab;
        [at(0), at(4)].iter().for_each(|&i| logits[i] = f32::NAN);
        [at(3), at(1), at(2)].iter().for_each(|&i| logits[i] = 2.0);
        let state = sample::state(b, &sample::Params::default(), &vec![0; self.vocab], &vec![0.0; self.vocab])?;
        Ok((b.upload(&[u32::MAX])?, b.upload(&[41])?, state, b.upload(&logits)?))
    }

    fn run<B: Backend>(&self, b: &B, (token, pos, state, logits): &mut Self::Io<B>) -> Result<()> {
        b.argmax(self, token, pos, &mut state.scratch, &mut state.outbox, logits)
    }

    /// Token, position, and the counter of arrived blocks, which must be 0 again. `tests/sampler.rs` looks at the outbox.
    fn outputs<B: Backend>(&self, b: &B, (token, pos, state, _): &Self::Io<B>) -> Result<Vec<f32>> {
        let mut counter = [f32::NAN];
        b.read(&mut counter, &state.scratch, 0)?;
        Ok(vec![b.download(token)?[0] as f32, b.download(pos)?[0] as f32, counter[0]])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn argmax(logits: &[f32]) -> u32 {
        let (mut token, mut pos) = ([9], [5]);
        Argmax { vocab: logits.len(), max_seq: 50 }.reference(&mut token, &mut pos, logits);
        assert_eq!(pos, [6]);
        token[0]
    }

    #[test]
    fn the_lowest_id_of_the_largest() {
        let nan = f32::NAN;
        assert_eq!(argmax(&[1.0, 3.0, 3.0, 2.0]), 1);
        assert_eq!(argmax(&[-0.0, 0.0]), 0);
        assert_eq!(argmax(&[nan, f32::NEG_INFINITY, nan]), 1);
        assert_eq!(argmax(&[nan, nan]), 0);
    }

    #[test]
    fn check_and_grid() {
        let op = Argmax { vocab: 128256, max_seq: 50 };
        assert!(op.check(1, 1, 132, 128256).is_ok());
        assert!(op.check(1, 1, 131, 128256).unwrap_err().to_string().contains("scratch 131"));
        assert_eq!(op.grid().blocks, [64, 1, 1]);
        assert_eq!(Argmax { vocab: 1025, max_seq: 50 }.grid().blocks, [2, 1, 1]);
    }
}
