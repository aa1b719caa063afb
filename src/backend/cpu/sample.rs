//! Makes [`Sample`]'s choice without sorting the vocabulary, in memory that is kept.
//!
//! `top_k` and `top_p` each keep the first tokens in the order of falling `y`, along which weights do not rise. So a
//! histogram of the highest bits of the weights, with 41 bins, tells in which bin such a prefix ends, and only the
//! tokens of that bin are sorted. A token without weight cannot be drawn, and is left out from the beginning; a filter
//! drops a token by making its weight 0.

use super::{Cpu, scratch};
use crate::ops::{
    Act, Sample,
    sample::{ONE, Params, key, random_below, share_of, weight},
};

/// Tokens that a thread takes at a time.
const TOKENS: usize = 1 << 12;

impl<A: Act> Cpu<A> {
    /// The token of row `r`, of sequence `s`.
    #[expect(clippy::too_many_arguments, reason = "the row and one argument a buffer")]
    pub(super) fn draw(
        &self,
        op: &Sample,
        r: usize,
        s: usize,
        p: &Params,
        history: &[u32],
        bias: &[f32],
        mask: &[u32],
        logits: &[f32],
    ) -> usize {
        let n = op.vocab;
        let (history, bias, logits) = (&history[s * n..][..n], &bias[s * n..][..n], &logits[r * n..][..n]);
        let mask = &mask[s * op.mask_len()..][..op.mask_len()];
        scratch::with(&scratch::Y, n, |y| {
            self.chunks(y, TOKENS, |first, y| {
                for (i, y) in (first..).zip(y) {
                    *y = p.adjust(i, logits[i], bias[i], history[i], mask);
                }
            });
            let best = self.best(y);
            match p.temperature > 0.0 && y[best].is_finite() {
                true => self.draw_of(p, y, best),
                false => best,
            }
        })
    }

    /// Steps 2 to 4 of the definition, where there is a choice.
    fn draw_of(&self, p: &Params, y: &[f32], best: usize) -> usize {
        let (n, max) = (y.len(), y[best]);
        scratch::with(&scratch::WEIGHTS, n, |w| {
            self.chunks(w, TOKENS, |first, w| {
                for (w, y) in w.iter_mut().zip(&y[first..]) {
                    *w = weight((y - max) / p.temperature);
                }
            });
            scratch::with(&scratch::IDS, n, |ids| {
                let mut kept = 0;
                for (i, _) in w.iter().enumerate().filter(|(_, w)| **w > 0) {
                    ids[kept] = i as u32;
                    kept += 1;
                }
                if p.top_k > 0 {
                    kept = shortest_prefix(&mut ids[..kept], w, y, p.top_k.into(), |_| 1);
                }
                if p.top_p < 1.0 {
                    let total = ids[..kept].iter().map(|&i| w[i as usize]).sum();
                    shortest_prefix(&mut ids[..kept], w, y, share_of(p.top_p, total).max(1), |w| w);
                }
            });
            let least = share_of(p.min_p, ONE).max(1);
            let r = random_below(w.iter().filter(|w| **w >= least).sum(), p);
            let mut sum = 0;
            let drawn = w.iter().position(|&w| {
                sum += if w >= least { w } else { 0 };
                sum > r
            });
            drawn.unwrap_or(best) // not reached: best is kept, so r < total
        })
    }
}

/// Finds the shortest prefix of `ids`, in the order of falling `y` (equals by rising id), whose measures add up to
/// `target`, or all ids. It moves these ids to the front, makes the weights of the others 0, and returns how many there
/// are. No weight of `ids` is 0 before, and neither is `target`.
fn shortest_prefix(ids: &mut [u32], w: &mut [u64], y: &[f32], target: u64, measure: impl Fn(u64) -> u64) -> usize {
    let bin = |w: u64| w.leading_zeros() as usize; // rises as weights fall
    let mut bins = [0; 64];
    ids.iter().map(|&i| w[i as usize]).for_each(|w| bins[bin(w)] += measure(w));
    let mut sum = 0;
    let last = bins.iter().position(|&of_bin| {
        let ends = sum + of_bin >= target;
        sum += if ends { 0 } else { of_bin };
        ends
    });
    let Some(last) = last else { return ids.len() };
    let before = partition(ids, |i| bin(w[i]) < last);
    let within = partition(&mut ids[before..], |i| bin(w[i]) == last);
    ids[before..][..within].sort_unstable_by_key(|&i| (!key(y[i as usize]), i));
    let mut kept = before;
    while sum < target {
        sum += measure(w[ids[kept] as usize]);
        kept += 1;
    }
    ids[kept..].iter().for_each(|&i| w[i as usize] = 0);
    kept
}

/// Moves the ids that shall be `first` to the front. Returns how many there are.
fn partition(ids: &mut [u32], first: impl Fn(usize) -> bool) -> usize {
    let mut n = 0;
    for i in 0..ids.len() {
        if first(ids[i] as usize) {
            ids.swap(n, i);
            n += 1;
        }
    }
    n
}
