//! `token[r] = argmax_i (norm(x[r]) w^T)[i]`, the lowest id of several equals; `pos[r] += 1`: the end of a greedy step,
//! fed back on the device.
//!
//! Fuses `norm_head` and `argmax`, which are its definition ([`crate::backend::definition`]).
//! Guesses in rows of one sequence: as [`Argmax`].
//! Shapes: `token`, `pos` [at least rows], where `pos` are [places](crate::model::kv) (sequence and position in one
//! number), to whose sequences' outboxes (where the host waits for tokens) the tokens go; `x` [rows, dim]; `gain` [dim]; `w` [vocab,
//! dim]. The kernel stores no logits.
//! Rounding: that of [`super::NormHead`]'s kernel, with which it agrees bit for bit.

use super::{Argmax, Cost, Grid, NormHead, Op, Ring, Tolerance, argmax::pairs, expect, gemv::product, noise, poison};
use crate::{
    backend::{Backend, DECODE_ROWS, SamplerState, train::TrainBackend},
    error::Result,
};
use half::bf16;

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct NormHeadArgmax {
    /// Tokens to choose.
    pub rows: usize,
    /// Width of `x`.
    pub dim: usize,
    /// Rows of `w`.
    pub vocab: usize,
    /// Positions of a sequence. The caller ensures that the sequence of each place has an outbox.
    pub max_seq: usize,
    /// Added to the mean square.
    pub eps: f32,
}

impl NormHeadArgmax {
    /// The first op of the definition.
    pub fn head(&self) -> NormHead {
        NormHead { rows: self.rows, first: 0, dim: self.dim, vocab: self.vocab, eps: self.eps }
    }

    /// The other.
    pub fn argmax(&self) -> Argmax {
        Argmax { rows: self.rows, vocab: self.vocab, max_seq: self.max_seq }
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
        let rows = self.rows;
        let fits = token >= rows && pos >= rows && scratch >= Argmax::scratch(rows);
        expect(Self::STEM, fits && self.max_seq > 0, || {
            format!("token has {token} elements, pos {pos} and scratch {scratch}, {self:?}")
        })?;
        self.head().check(rows * self.vocab, x, gain, w)
    }

    /// A block owns 16 rows of `w`.
    pub fn grid(&self, ring: Ring) -> Grid {
        product(self.vocab, self.rows, true, ring).0
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
        let sizes = [self.rows, self.dim, self.vocab, self.max_seq].map(crate::backend::cuda::Arg::from);
        let (grid, kind) = w.product(self.rows, true, cu.ring());
        let scalars = [self.eps.into(), cu.trace(self, grid)];
        let args = [&state[..], &inputs, &sizes, &scalars].concat();
        // SAFETY: check() proved that tokens, places, the words of scratch, and what the sizes say of the rest exist, that
        // rows of w and x are 16-byte aligned and that w has the rows of a block; the outboxes of the places' sequences exist
        // by the caller's promise; the arguments are those of the kernel, in order; it waits for its predecessor before it
        // reads what that wrote.
        unsafe { cu.launch_dependent(&format!("norm_head_argmax_{}_{kind}", w.kind.name()), self, grid, &args) }
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
    type Io<B: TrainBackend> = Io<B>;

    fn cases() -> Vec<Self> {
        let case = |(rows, dim, vocab)| NormHeadArgmax { rows, dim, vocab, max_seq: 50, eps: 1e-5 };
        let shapes = [
            (1, 8, 16),              // one block
            (1, 72, 33),             // the last block repeats rows
            (3, 72, 33),             // several rows
            (DECODE_ROWS, 1032, 35), // all of them
            (1, 64, 512),            // stories260K
            (1, 256, 2048),          // the demo
            (1, 576, 49152),         // SmolLM2-135M
            (1, 4096, 128_256),      // Llama-3-8B
            (DECODE_ROWS, 4096, 128_256),
        ];
        shapes.into_iter().map(case).collect()
    }

    fn cost(&self) -> Cost {
        let Cost { read, flops, .. } = self.head().cost();
        Cost { read, write: 8 * self.rows as u64, flops }
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance::EXACT
    }

    /// For each row of `x`, two rows of `w` have the signs that make their logits the largest, and they have the same
    /// bits: the lower id must win. Sequences have two rows each, the first sequence the last two; every other guess is right.
    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Io<B>> {
        let NormHeadArgmax { rows, dim, vocab, .. } = *self;
        let (x, gain, mut w) = (noise(rows * dim, seed), noise(dim, seed + 1), noise(vocab * dim, seed + 2));
        let largest = |r: usize| [0, vocab / 2].map(|first| (seed as usize * 7 + first + r) % vocab);
        for (r, x) in x.chunks_exact(dim).enumerate() {
            let best: Vec<f32> = x.iter().zip(&gain).map(|(x, g)| (x * g).signum()).collect();
            for row in largest(r) {
                w[row * dim..][..dim].copy_from_slice(&best);
            }
        }
        let best = |r: usize| largest(r).into_iter().min().unwrap_or(0) as u32;
        let guess = |r: usize| match r % 4 {
            1 => best(r - 1),
            3 => best(r - 1) + 1,
            _ => u32::MAX,
        };
        let guesses: Vec<u32> = (0..rows).map(guess).collect();
        let bits = |v: &[f32]| v.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>();
        let acts = |v: &[f32]| v.iter().map(|x| super::Act::from_f32(*x)).collect::<Vec<B::Act>>();
        Ok(Io {
            token: b.upload(&guesses)?,
            pos: b.upload(&pairs(rows, self.max_seq))?,
            state: SamplerState::new(b, vocab, rows)?,
            logits: b.upload(&vec![f32::NAN; rows * vocab])?,
            xb: poison(b, rows * dim)?,
            x: b.upload(&acts(&x))?,
            gain: b.weight_from(1, dim, &bits(&gain))?,
            w: b.weight_from(vocab, dim, &bits(&w))?,
        })
    }

    fn run<B: TrainBackend>(&self, b: &B, io: &mut Io<B>) -> Result<()> {
        let Io { token, pos, state, logits, xb, x, gain, w } = io;
        b.norm_head_argmax(self, token, pos, &mut state.scratch, &mut state.outbox, logits, xb, x, gain, w)
    }

    /// Tokens, places, and the words of scratch that must be 0 again.
    fn outputs<B: TrainBackend>(&self, b: &B, io: &Io<B>) -> Result<Vec<f32>> {
        let mut out = vec![f32::NAN; Argmax::scratch(self.rows)];
        b.read(&mut out, &io.state.scratch, 0)?;
        out.extend(b.download(&io.token)?.into_iter().chain(b.download(&io.pos)?).map(|n| n as f32));
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_names_what_is_wrong() {
        let op = NormHeadArgmax { rows: 2, dim: 64, vocab: 20, max_seq: 50, eps: 1e-5 };
        let text = |r: Result<()>| r.unwrap_err().to_string();
        assert!(op.check(2, 2, 8, 128, 64, (20, 64)).is_ok());
        assert!(
            text(op.check(2, 1, 8, 128, 64, (20, 64))).starts_with("norm_head_argmax: token has 2 elements, pos 1")
        );
        assert!(text(op.check(2, 2, 7, 128, 64, (20, 64))).contains("scratch 7"));
        assert!(text(op.check(2, 2, 8, 127, 64, (20, 64))).contains("x 127"));
    }
}
