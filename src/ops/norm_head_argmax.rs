//! `token[0] = argmax_i (norm(x) w^T)[i]`, the lowest id of equals; `pos[0] += 1`: the end of a greedy step, fed back on the
//! device.
//!
//! Fused of `norm_head` and `argmax`, which are its definition ([`crate::backend::definition`]).
//! Shapes: `token`, `pos` [at least 1], a [place](crate::model::kv), whose sequence's outbox gets the token; `x` [1, dim]; `gain` [dim]; `w` [vocab, dim]. The kernel stores no logits.
//! Rounding: that of [`super::NormHead`]'s kernel, with which it agrees bit for bit.

use super::{Argmax, Cost, Grid, NormHead, Op, Tolerance, expect, gemv::product_grid, noise, poison, sample};
use crate::{
    backend::{Backend, SamplerState},
    error::Result,
};
use half::bf16;

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct NormHeadArgmax {
    /// Width of `x`.
    pub dim: usize,
    /// Rows of `w`.
    pub vocab: usize,
    /// Positions of a sequence; the caller proves that the place's sequence has an outbox.
    pub max_seq: usize,
    /// Added to the mean square.
    pub eps: f32,
}

impl NormHeadArgmax {
    /// The first op of the definition.
    pub fn head(&self) -> NormHead {
        NormHead { rows: 1, first: 0, dim: self.dim, vocab: self.vocab, eps: self.eps }
    }

    /// The other.
    pub fn argmax(&self) -> Argmax {
        Argmax { vocab: self.vocab, max_seq: self.max_seq }
    }

    /// Buffer lengths fit the sizes, and the sizes the kernel.
    pub fn check(
        &self,
        token: usize,
        pos: usize,
        scratch: usize,
        x: usize,
        gain: usize,
        w: (usize, usize),
    ) -> Result<()> {
        expect(Self::STEM, token > 0 && pos > 0 && self.max_seq > 0 && scratch >= Argmax::scratch(), || {
            format!("token has {token} elements, pos {pos} and scratch {scratch}, {self:?}")
        })?;
        self.head().check(self.vocab, x, gain, w)
    }

    /// A block owns 16 rows of `w`.
    pub fn grid(&self) -> Grid {
        product_grid(self.vocab, 1, true)
    }

    /// The kernel.
    #[cfg(feature = "cuda")]
    #[expect(clippy::too_many_arguments, reason = "one argument a buffer, named as in the kernel")]
    pub fn launch(
        &self,
        cu: &crate::backend::cuda::Cuda,
        token: &mut crate::backend::cuda::Buffer<u32>,
        pos: &mut crate::backend::cuda::Buffer<u32>,
        scratch: &mut crate::backend::cuda::Buffer<f32>,
        outbox: &mut crate::backend::cuda::Outbox,
        x: &crate::backend::cuda::Buffer<bf16>,
        gain: &crate::backend::cuda::Weight,
        w: &crate::backend::cuda::Weight,
    ) -> Result<()> {
        self.check(token.len(), pos.len(), scratch.len(), x.len(), gain.data.len(), (w.rows, w.cols))?;
        super::expect_ints(Self::STEM, &[self.dim, self.vocab, self.max_seq])?;
        let [serial, ring] = outbox.args();
        let state = [token.into(), pos.into(), scratch.into(), serial, ring];
        let inputs = [x.into(), (&gain.data).into(), (&w.data).into()];
        let sizes = [self.dim, self.vocab, self.max_seq].map(crate::backend::cuda::Arg::from);
        let scalars = [self.eps.into(), cu.trace(self, self.grid())];
        let args = [&state[..], &inputs, &sizes, &scalars].concat();
        // SAFETY: check() proved that a token, a position, the words of scratch, and what the sizes say of the rest exist,
        // that rows of w and x are 16-byte aligned and that w has the rows of a block; the outbox of the place's sequence exists by the caller's promise; the arguments
        // are those of the kernel, in order; it waits for its predecessor before it reads what that wrote.
        unsafe { cu.launch_dependent("norm_head_argmax_bf16", self, self.grid(), &args) }
    }
}

/// The buffers of one call.
pub struct Io<B: Backend> {
    token: B::Buf<u32>,
    pos: B::Buf<u32>,
    state: SamplerState<B>,
    logits: B::Buf<f32>,
    xb: B::Buf<B::Act>,
    x: B::Buf<B::Act>,
    gain: B::Weight,
    w: B::Weight,
}

impl Op for NormHeadArgmax {
    const STEM: &'static str = "norm_head_argmax";
    type Io<B: Backend> = Io<B>;

    fn cases() -> Vec<Self> {
        let case = |(dim, vocab)| NormHeadArgmax { dim, vocab, max_seq: 50, eps: 1e-5 };
        // one block; the last block repeats rows; stories260K, the demo, SmolLM2-135M, Llama-3-8B
        let shapes = [(8, 16), (72, 33), (64, 512), (256, 2048), (576, 49152), (4096, 128_256)];
        shapes.into_iter().map(case).collect()
    }

    fn cost(&self) -> Cost {
        let Cost { read, flops, .. } = self.head().cost();
        Cost { read, write: 8, flops }
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance::EXACT
    }

    /// Two rows of `w` have the signs that make their logit the largest, and the same bits: the lower id is to win.
    fn setup<B: Backend>(&self, b: &B, seed: u64) -> Result<Io<B>> {
        let (dim, vocab) = (self.dim, self.vocab);
        let (x, gain, mut w) = (noise(dim, seed), noise(dim, seed + 1), noise(vocab * dim, seed + 2));
        let best: Vec<f32> = x.iter().zip(&gain).map(|(x, g)| (x * g).signum()).collect();
        for part in [3, 1] {
            let row = (seed as usize * 7 + vocab * part / 5) % vocab;
            w[row * dim..][..dim].copy_from_slice(&best);
        }
        let bits = |v: &[f32]| v.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>();
        let acts = |v: &[f32]| v.iter().map(|x| super::Act::from_f32(*x)).collect::<Vec<B::Act>>();
        Ok(Io {
            token: b.upload(&[u32::MAX])?,
            pos: b.upload(&[41])?,
            state: sample::state(b, &sample::Params::default(), &vec![0; vocab], &vec![0.0; vocab])?,
            logits: b.upload(&vec![f32::NAN; vocab])?,
            xb: poison(b, dim)?,
            x: b.upload(&acts(&x))?,
            gain: b.weight_from(1, dim, &bits(&gain))?,
            w: b.weight_from(vocab, dim, &bits(&w))?,
        })
    }

    fn run<B: Backend>(&self, b: &B, io: &mut Io<B>) -> Result<()> {
        let Io { token, pos, state, logits, xb, x, gain, w } = io;
        b.norm_head_argmax(self, token, pos, &mut state.scratch, &mut state.outbox, logits, xb, x, gain, w)
    }

    /// Token, position, and the words of scratch that must be 0 again.
    fn outputs<B: Backend>(&self, b: &B, io: &Io<B>) -> Result<Vec<f32>> {
        let mut counters = [f32::NAN; 4];
        b.read(&mut counters, &io.state.scratch, 0)?;
        let [token, pos] = [b.download(&io.token)?[0], b.download(&io.pos)?[0]];
        Ok([token as f32, pos as f32].into_iter().chain(counters).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_names_what_is_wrong() {
        let op = NormHeadArgmax { dim: 64, vocab: 20, max_seq: 50, eps: 1e-5 };
        let text = |r: Result<()>| r.unwrap_err().to_string();
        assert!(op.check(1, 1, Argmax::scratch(), 64, 64, (20, 64)).is_ok());
        assert!(
            text(op.check(1, 1, 9, 64, 64, (20, 64))).starts_with("norm_head_argmax: token has 1 elements, pos 1 and")
        );
        assert!(text(op.check(1, 1, 999, 63, 64, (20, 64))).contains("x 63"));
    }
}
