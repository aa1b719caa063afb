//! `out[r, j] = ln softmax(logits[r])[target[r, j]]`; `greedy[r, j]` says whether that target is the greedy choice, the lowest id
//! of the largest logit.
//!
//! Shapes: `out`, `greedy` and `target` [rows, targets], `logits` [at least rows, vocab] f32. NaN counts as smaller than
//! everything for `greedy` and makes the row's log-probabilities NaN.
//! Rounding: the definition sums in f64, the kernel in f32.

use super::{Cost, Grid, Op, Tolerance, expect, noise, noise_ids};
use crate::{backend::train::TrainBackend, error::Result, tiles::LOG_PROB_THREADS};

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct LogProb {
    /// Rows of logits.
    pub rows: usize,
    /// Targets of each row.
    pub targets: usize,
    /// Logits of a row; the caller proves that each target is below.
    pub vocab: usize,
}

impl LogProb {
    /// Buffer lengths fit the sizes.
    pub fn check(&self, out: usize, greedy: usize, logits: usize, target: usize) -> Result<()> {
        let limit = LOG_PROB_THREADS as usize;
        expect(Self::STEM, self.rows > 0 && (1..=limit).contains(&self.targets), || {
            format!("{self:?}: expected a row and 1 to {limit} targets")
        })?;
        expect(Self::STEM, self.vocab > 0 && logits >= self.rows * self.vocab, || {
            format!("logits has {logits} elements, {self:?}")
        })?;
        let n = self.rows * self.targets;
        expect(Self::STEM, out >= n && greedy >= n && target >= n, || {
            format!("out has {out} elements, greedy {greedy} and target {target}, {self:?}")
        })
    }

    /// One block per row.
    pub fn grid(&self) -> Grid {
        Grid { blocks: [self.rows as u32, 1, 1], threads: LOG_PROB_THREADS, shared: 0 }
    }

    /// The definition.
    pub fn reference(&self, out: &mut [f32], greedy: &mut [u32], logits: &[f32], target: &[u32]) {
        let rows = out.chunks_exact_mut(self.targets).zip(greedy.chunks_exact_mut(self.targets));
        let rows = rows.zip(target.chunks_exact(self.targets)).zip(logits.chunks_exact(self.vocab));
        for (((out, greedy), target), x) in rows.take(self.rows) {
            let mut best = 0;
            for (i, y) in x.iter().enumerate() {
                if *y > x[best] || x[best].is_nan() && !y.is_nan() {
                    best = i;
                }
            }
            let log_sum = x.iter().map(|y| f64::from(y - x[best]).exp()).sum::<f64>().ln();
            for ((out, greedy), &t) in out.iter_mut().zip(greedy).zip(target) {
                *out = (f64::from(x[t as usize] - x[best]) - log_sum) as f32;
                *greedy = u32::from(t as usize == best);
            }
        }
    }

    /// The kernel.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        cu: &crate::backend::cuda::Cuda,
        out: &mut crate::backend::cuda::Buffer<f32>,
        greedy: &mut crate::backend::cuda::Buffer<u32>,
        logits: &crate::backend::cuda::Buffer<f32>,
        target: &crate::backend::cuda::Buffer<u32>,
    ) -> Result<()> {
        self.check(out.len(), greedy.len(), logits.len(), target.len())?;
        super::expect_ints(Self::STEM, &[self.rows, self.vocab])?;
        // SAFETY: check() proved that rows * targets elements of out, greedy and target and rows * vocab logits exist, and that
        // a block has a thread for each target; each target is below vocab by the caller's promise. The arguments are those of
        // the kernel, in order.
        unsafe {
            cu.launch(
                "log_prob_f32",
                self,
                self.grid(),
                &[
                    out.into(),
                    greedy.into(),
                    logits.into(),
                    target.into(),
                    self.targets.into(),
                    self.vocab.into(),
                    cu.trace(self, self.grid()),
                ],
            )
        }
    }
}

impl Op for LogProb {
    const STEM: &'static str = "log_prob";
    type Io<B: TrainBackend> = (B::Buf<f32>, B::Buf<u32>, B::Buf<f32>, B::Buf<u32>);

    fn cases() -> Vec<Self> {
        let case = |rows, targets, vocab| LogProb { rows, targets, vocab };
        vec![
            case(1, 1, 1),
            case(3, 2, 7),
            case(2, 4, 2050),
            case(5, 3, 49152),
            case(1, 1, 128256),
            case(16, 1, 128256),
            case(16, 8, 128256),
        ]
    }

    fn cost(&self) -> Cost {
        let (n, targets) = ((self.rows * self.vocab) as u64, (self.rows * self.targets) as u64);
        Cost { read: 4 * n + 8 * targets, write: 8 * targets, flops: 3 * n }
    }

    /// f32 sums of at most 128256 terms: off by some 1e-7 where log-probabilities are about 10.
    fn tolerance(&self) -> Tolerance {
        Tolerance { l2: 1e-6, worst: 2e-6 }
    }

    /// The largest logit of a row comes twice. Targets are the first of them, the second, and others, in turn.
    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>> {
        let mut logits: Vec<f32> = noise(self.rows * self.vocab, seed).into_iter().map(|x| 8.0 * x).collect();
        let at = |r: usize, part: usize| (r * 7 + self.vocab * part / 5) % self.vocab;
        for (r, row) in logits.chunks_exact_mut(self.vocab).enumerate() {
            (row[at(r, 1)], row[at(r, 3)]) = (9.0, 9.0);
        }
        let mut target = noise_ids(self.rows * self.targets, self.vocab, seed + 1);
        for (i, t) in target.iter_mut().enumerate() {
            let (r, tied) = (i / self.targets, [at(i / self.targets, 1), at(i / self.targets, 3)]);
            match (r + i % self.targets) % 3 {
                0 => *t = tied[0].min(tied[1]) as u32,
                1 => *t = tied[0].max(tied[1]) as u32,
                _ => {}
            }
        }
        let n = self.rows * self.targets;
        Ok((b.upload(&vec![f32::NAN; n])?, b.upload(&vec![u32::MAX; n])?, b.upload(&logits)?, b.upload(&target)?))
    }

    fn run<B: TrainBackend>(&self, b: &B, (out, greedy, logits, target): &mut Self::Io<B>) -> Result<()> {
        b.log_prob(self, out, greedy, logits, target)
    }

    /// Log-probabilities, then flags.
    fn outputs<B: TrainBackend>(&self, b: &B, (out, greedy, ..): &Self::Io<B>) -> Result<Vec<f32>> {
        let mut v = b.download(out)?;
        v.extend(b.download(greedy)?.into_iter().map(|g| g as f32));
        Ok(v)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(logits: &[f32], target: &[u32]) -> (Vec<f32>, Vec<u32>) {
        let op = LogProb { rows: 1, targets: target.len(), vocab: logits.len() };
        let (mut out, mut greedy) = (vec![0.0; target.len()], vec![9; target.len()]);
        op.reference(&mut out, &mut greedy, logits, target);
        (out, greedy)
    }

    #[test]
    fn of_equal_logits_the_first_is_greedy() {
        let (out, greedy) = run(&[3.0, 5.0, 5.0, f32::NEG_INFINITY], &[1, 2, 3]);
        let expected = -(2.0 + (-2f32).exp()).ln();
        assert!((out[0] - expected).abs() < 1e-6 && out[0] == out[1], "{out:?}, expected {expected}");
        assert_eq!((out[2], greedy), (f32::NEG_INFINITY, vec![1, 0, 0]));
    }

    #[test]
    fn large_logits_do_not_overflow_and_nan_shows() {
        assert_eq!(run(&[1e30, -1e30], &[0, 1]).0, [0.0, -2e30]);
        let (out, greedy) = run(&[1.0, f32::NAN], &[0]);
        assert!(out[0].is_nan() && greedy == [1], "{out:?} {greedy:?}");
    }

    #[test]
    fn check_names_what_is_too_short() {
        let op = LogProb { rows: 2, targets: 3, vocab: 10 };
        assert!(op.check(6, 6, 20, 6).is_ok());
        assert!(op.check(6, 6, 19, 6).unwrap_err().to_string().contains("logits has 19"));
        assert!(op.check(6, 5, 20, 6).unwrap_err().to_string().contains("greedy 5"));
        assert!(LogProb { targets: 0, ..op }.check(6, 6, 20, 6).is_err());
    }
}
