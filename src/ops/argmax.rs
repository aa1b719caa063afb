//! `token[r] = argmax_i logits[r, i]`, the lowest id of several equals; `pos[r] += 1`: the greedy choice, fed back on
//! the device.
//!
//! Rows of one sequence are side by side; each but the first has computed a guess, `token[r]`, of the token that the row before it
//! chooses. Only rows up to the first wrong guess count, and the others change nothing.
//!
//! Shapes: `token`, `pos` [at least rows], where `pos` are [places](crate::model::kv) (sequence and position in one
//! number), to whose sequences' outboxes (where the host waits for tokens) the tokens go; `logits` [at least rows, vocab] f32. NaN
//! counts as smaller than everything. Exact.

use super::{Cost, Grid, Op, Tolerance, expect, guesses::Counted, noise};
use crate::{
    backend::{DECODE_ROWS, SamplerState, train::TrainBackend},
    error::Result,
    tiles::{ARGMAX_BLOCKS, ARGMAX_THREADS, BEST_WORDS},
};

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct Argmax {
    /// Tokens to choose.
    pub rows: usize,
    /// Logits of each.
    pub vocab: usize,
    /// Positions of a sequence. The caller ensures that the sequence of each place has an outbox.
    pub max_seq: usize,
}

impl Argmax {
    /// Buffer lengths fit the sizes.
    pub fn check(&self, token: usize, pos: usize, scratch: usize, logits: usize) -> Result<()> {
        let rows = self.rows;
        expect(Self::STEM, (1..=DECODE_ROWS).contains(&rows), || format!("{self:?}: 1 to {DECODE_ROWS} rows"))?;
        expect(Self::STEM, token >= rows && pos >= rows && self.max_seq > 0, || {
            format!("token has {token} elements and pos {pos}, {self:?}")
        })?;
        let fits = logits >= rows * self.vocab && scratch >= Self::scratch(rows);
        expect(Self::STEM, self.vocab > 0 && fits, || {
            format!("logits has {logits} elements and scratch {scratch}, {self:?}")
        })
    }

    /// Words of scratch that the kernel needs: 0 before and after each call, see `kernels/common/best.cuh`.
    pub fn scratch(rows: usize) -> usize {
        rows * BEST_WORDS as usize
    }

    /// As many blocks a row as have work, up to the limit.
    pub fn grid(&self) -> Grid {
        let blocks = self.vocab.div_ceil(4 * ARGMAX_THREADS as usize).min(ARGMAX_BLOCKS as usize);
        Grid { blocks: [blocks as u32, self.rows as u32, 1], threads: ARGMAX_THREADS, shared: 0 }
    }

    /// The definition.
    pub fn reference(&self, token: &mut [u32], pos: &mut [u32], logits: &[f32]) {
        let mut counted = Counted::default();
        for (r, logits) in logits.chunks_exact(self.vocab).take(self.rows).enumerate() {
            if !counted.next(pos[r] as usize / self.max_seq, token[r]) {
                continue;
            }
            let mut best = 0;
            for (i, x) in logits.iter().enumerate() {
                if *x > logits[best] || logits[best].is_nan() && !x.is_nan() {
                    best = i;
                }
            }
            counted.chose(best as u32);
            token[r] = best as u32;
            pos[r] = pos[r].wrapping_add(1);
        }
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
        // SAFETY: check() proved that tokens, places, scratch and logits have `rows` rows; the outboxes of the places'
        // sequences exist by the caller's promise; the arguments are those of the kernel, in order; it waits for its
        // predecessor before it reads anything.
        unsafe { cu.launch_dependent("argmax_f32", self, self.grid(), &args) }
    }
}

impl Op for Argmax {
    const STEM: &'static str = "argmax";
    type Io<B: TrainBackend> = (B::Buf<u32>, B::Buf<u32>, SamplerState<B>, B::Buf<f32>);

    fn cases() -> Vec<Self> {
        let shapes = [(1, 1), (1, 7), (3, 5), (16, 70), (1, 1025), (1, 49152), (5, 49152), (1, 128_256), (16, 128_256)];
        shapes.into_iter().map(|(rows, vocab)| Argmax { rows, vocab, max_seq: 50 }).collect()
    }

    fn cost(&self) -> Cost {
        Cost { read: 4 * (self.rows * self.vocab) as u64, write: 8 * self.rows as u64, flops: 0 }
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance::EXACT
    }

    /// The largest logit of a row comes three times, among NaN. Sequences have two rows each, the first sequence the last two; every
    /// other guess is right.
    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>> {
        let mut logits = noise(self.rows * self.vocab, seed);
        for (r, logits) in logits.chunks_exact_mut(self.vocab).enumerate() {
            let at = |part: usize| ((seed as usize + r) * 7 + self.vocab * part / 5) % self.vocab;
            [at(0), at(4)].iter().for_each(|&i| logits[i] = f32::NAN);
            [at(3), at(1), at(2)].iter().for_each(|&i| logits[i] = 2.0);
        }
        let best = |r: usize| logits[r * self.vocab..][..self.vocab].iter().position(|x| *x == 2.0).unwrap_or(0) as u32;
        let guess = |r: usize| match r % 4 {
            1 => best(r - 1),
            3 => best(r - 1) + 1,
            _ => u32::MAX,
        };
        let guesses: Vec<u32> = (0..self.rows).map(guess).collect();
        let state = SamplerState::new(b, self.vocab, self.rows)?;
        Ok((b.upload(&guesses)?, b.upload(&pairs(self.rows, self.max_seq))?, state, b.upload(&logits)?))
    }

    fn run<B: TrainBackend>(&self, b: &B, (token, pos, state, logits): &mut Self::Io<B>) -> Result<()> {
        b.argmax(self, token, pos, &mut state.scratch, &mut state.outbox, logits)
    }

    /// Tokens, places, and the words of scratch that must be 0 again. `tests/device/sampler.rs` looks at the outbox.
    fn outputs<B: TrainBackend>(&self, b: &B, (token, pos, state, _): &Self::Io<B>) -> Result<Vec<f32>> {
        let mut out = vec![f32::NAN; Self::scratch(self.rows)];
        b.read(&mut out, &state.scratch, 0)?;
        out.extend(b.download(token)?.into_iter().chain(b.download(pos)?).map(|n| n as f32));
        Ok(out)
    }
}

/// For cases: places of rows of which two each are of one sequence; the last ones are of the first sequence.
pub(super) fn pairs(rows: usize, max_seq: usize) -> Vec<u32> {
    (0..rows).map(|r| ((rows.div_ceil(2) - 1 - r / 2) * max_seq + 41 + r % 2) as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn argmax(logits: &[f32]) -> u32 {
        let (mut token, mut pos) = ([9], [5]);
        Argmax { rows: 1, vocab: logits.len(), max_seq: 50 }.reference(&mut token, &mut pos, logits);
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
        let op = Argmax { rows: 2, vocab: 128_256, max_seq: 50 };
        assert!(op.check(2, 2, 8, 2 * 128_256).is_ok());
        assert!(op.check(2, 2, 7, 2 * 128_256).unwrap_err().to_string().contains("scratch 7"));
        assert!(op.check(2, 1, 8, 2 * 128_256).unwrap_err().to_string().contains("pos 1"));
        let many = Argmax { rows: 17, ..op };
        assert!(many.check(17, 17, 68, 17 * 128_256).unwrap_err().to_string().ends_with("1 to 16 rows"));
        assert_eq!(op.grid().blocks, [64, 2, 1]);
        assert_eq!(Argmax { rows: 1, vocab: 1025, max_seq: 50 }.grid().blocks, [2, 1, 1]);
    }
}
