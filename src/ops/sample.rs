//! Draws `token[0]` from `logits`, feeds it back: `pos[0] += 1`, `history[token] += 1`, one more draw.
//!
//! The same choice on every backend, by construction: what is compared is ordered bits of f32, what is added are integers
//! (sums of integers do not depend on their order), and the few f32 operations before that are rounded one by one. In order:
//!
//! 1. `y = logits + bias`; the stop ids are forbidden for the first `min_tokens` draws; repetition penalty (Keskar et al. 2019)
//!    over prompt and answer, frequency and presence penalty over the answer.
//!    NaN becomes `-inf`, which is forbidden.
//! 2. Temperature 0, or the largest `y` is infinite (a certain token, or all are forbidden): the largest `y`, the lowest id of
//!    equals. Otherwise `w = floor(2^40 exp((y - max y) / temperature))`: 0 for what is less likely than 2^-40 of the largest.
//! 3. In the order of falling `y`, rising id of equals: the first `top_k`; of these the shortest prefix that holds `top_p` of
//!    their weight; of these the ones with at least `min_p` of the largest weight.
//! 4. `r` uniform below the sum of the kept weights, from Philox4x32-10 (Salmon et al. 2011) with the seed as key and the number
//!    of the draw as counter; the token is the first in the order of ids at which the running sum of weights exceeds `r`.
//!
//! Shapes: `token`, `pos` [at least 1]; `params` [SAMPLE_PARAMS]; `history`, `bias`, `scratch`, `logits` [at least vocab].

use super::{Argmax, Cost, Grid, Op, Tolerance, expect, noise};
use crate::{
    backend::{Backend, SamplerState},
    error::Result,
    tiles::{SAMPLE_MAX_VOCAB, SAMPLE_PARAMS, SAMPLE_THREADS},
};

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Logits.
    pub vocab: usize,
}

/// Stop ids that `min_tokens` can hold back.
pub const MAX_STOP_IDS: usize = 8;
/// In `history`: the token is in the prompt.
pub const IN_PROMPT: u32 = 1 << 31;
/// `w` of the largest logit.
const ONE: u64 = 1 << 40;

/// What the sampler reads from the device, in the order of its words.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Params {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 is off.
    pub top_k: u32,
    /// 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub min_p: f32,
    /// 1 is off.
    pub repetition_penalty: f32,
    /// 0 is off.
    pub frequency_penalty: f32,
    /// 0 is off.
    pub presence_penalty: f32,
    /// Key of the generator.
    pub seed: u64,
    /// Draws so far: its counter.
    pub draws: u32,
    /// Draws before which the stop ids are forbidden.
    pub min_tokens: u32,
    /// Ids, then `u32::MAX`.
    pub stop_ids: [u32; MAX_STOP_IDS],
}

impl Default for Params {
    /// Everything off: greedy.
    fn default() -> Self {
        Params {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            seed: 0,
            draws: 0,
            min_tokens: 0,
            stop_ids: [u32::MAX; MAX_STOP_IDS],
        }
    }
}

impl Params {
    /// As the device holds it.
    pub fn words(&self) -> [u32; SAMPLE_PARAMS as usize] {
        let mut words = [0; SAMPLE_PARAMS as usize];
        words[..11].copy_from_slice(&[
            self.temperature.to_bits(),
            self.top_k,
            self.top_p.to_bits(),
            self.min_p.to_bits(),
            self.repetition_penalty.to_bits(),
            self.frequency_penalty.to_bits(),
            self.presence_penalty.to_bits(),
            self.seed as u32,
            (self.seed >> 32) as u32,
            self.draws,
            self.min_tokens,
        ]);
        words[11..11 + MAX_STOP_IDS].copy_from_slice(&self.stop_ids);
        words
    }

    /// The inverse of [`Params::words`].
    pub fn from_words(w: &[u32]) -> Params {
        let f = |i: usize| f32::from_bits(w[i]);
        Params {
            temperature: f(0),
            top_k: w[1],
            top_p: f(2),
            min_p: f(3),
            repetition_penalty: f(4),
            frequency_penalty: f(5),
            presence_penalty: f(6),
            seed: u64::from(w[7]) | u64::from(w[8]) << 32,
            draws: w[9],
            min_tokens: w[10],
            stop_ids: std::array::from_fn(|i| w[11 + i]),
        }
    }

    /// Step 1 for one token.
    fn adjust(&self, id: usize, logit: f32, bias: f32, history: u32) -> f32 {
        if self.draws < self.min_tokens && self.stop_ids.contains(&(id as u32)) {
            return f32::NEG_INFINITY;
        }
        let mut y = logit + bias;
        if history != 0 {
            y = if y > 0.0 { y / self.repetition_penalty } else { y * self.repetition_penalty };
            let count = history & !IN_PROMPT;
            if count > 0 {
                y = (y - self.frequency_penalty * count as f32) - self.presence_penalty;
            }
        }
        if y.is_nan() { f32::NEG_INFINITY } else { y }
    }
}

/// Order of f32 as an order of integers; -0 and 0 are one value.
fn key(y: f32) -> u32 {
    let bits = (y + 0.0).to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// `floor(2^40 exp(x))` for `x <= 0`: the polynomial is a least-maximum fit of `2^f` over [0, 1).
fn weight(x: f32) -> u64 {
    let e = x * std::f32::consts::LOG2_E;
    if e <= -41.0 || e.is_nan() {
        return 0; // also for -inf
    }
    let n = e.floor();
    let f = e - n;
    let p = [0.001_867_13_f32, 0.009_017_03, 0.055_799_913, 0.240_164_44, 0.693_151_3, 1.0];
    let p = p.into_iter().reduce(|acc, c| acc * f + c).unwrap_or(1.0);
    let (mantissa, shift) = ((p * 8_388_608.0) as u64, n as i32 + 17); // p in [1, 2): 23 bits after the point
    if shift >= 0 { mantissa << shift } else { mantissa >> -shift }
}

/// `floor(share * total)` with the share cut to 24 bits; exact in integers.
fn share_of(share: f32, total: u64) -> u64 {
    let share = (share.clamp(0.0, 1.0) * 16_777_216.0) as u64;
    (total >> 24) * share + (((total & 0xff_ffff) * share) >> 24)
}

/// Philox4x32-10 (Salmon et al. 2011) of a counter and a key.
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let (mut c, mut k) = (counter, key);
    for _ in 0..10 {
        let (a, b) = (u64::from(c[0]) * 0xD251_1F53, u64::from(c[2]) * 0xCD9E_8D57);
        c = [(b >> 32) as u32 ^ c[1] ^ k[0], b as u32, (a >> 32) as u32 ^ c[3] ^ k[1], a as u32];
        k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

/// 64 random bits for a draw.
fn random(seed: u64, draw: u32) -> u64 {
    let [a, b, ..] = philox([draw, 0, 0, 0], [seed as u32, (seed >> 32) as u32]);
    u64::from(a) | u64::from(b) << 32
}

/// A sampler's buffers with the given content.
pub(crate) fn state<B: Backend>(b: &B, p: &Params, history: &[u32], bias: &[f32]) -> Result<SamplerState<B>> {
    Ok(SamplerState {
        params: b.upload(&p.words())?,
        history: b.upload(history)?,
        bias: b.upload(bias)?,
        scratch: b.alloc(history.len().max(Argmax::scratch()))?,
        outbox: b.outbox()?,
    })
}

impl Sample {
    /// Buffer lengths fit the sizes.
    #[expect(clippy::too_many_arguments, reason = "one argument a buffer")]
    pub fn check(
        &self,
        token: usize,
        pos: usize,
        params: usize,
        history: usize,
        bias: usize,
        scratch: usize,
        logits: usize,
    ) -> Result<()> {
        expect(Self::STEM, token > 0 && pos > 0 && params >= SAMPLE_PARAMS as usize, || {
            format!("token has {token} elements, pos {pos} and params {params}, {self:?}")
        })?;
        expect(Self::STEM, self.vocab <= SAMPLE_MAX_VOCAB as usize, || {
            format!("{self:?}: sums of weights need vocab <= {SAMPLE_MAX_VOCAB}")
        })?;
        expect(Self::STEM, self.vocab > 0 && [history, bias, scratch, logits].iter().all(|n| *n >= self.vocab), || {
            format!("history has {history} elements, bias {bias}, scratch {scratch} and logits {logits}, {self:?}")
        })
    }

    /// One block; a small vocabulary leaves a full one without work.
    pub fn grid(&self) -> Grid {
        let threads = self.vocab.div_ceil(4).next_power_of_two().clamp(32, SAMPLE_THREADS as usize);
        Grid { blocks: [1, 1, 1], threads: threads as u32, shared: 0 }
    }

    /// The definition.
    pub fn reference(
        &self,
        token: &mut [u32],
        pos: &mut [u32],
        params: &mut [u32],
        history: &mut [u32],
        bias: &[f32],
        logits: &[f32],
    ) {
        let p = Params::from_words(params);
        let y: Vec<f32> = (0..self.vocab).map(|i| p.adjust(i, logits[i], bias[i], history[i])).collect();
        let chosen = self.choose(&p, &y);
        token[0] = chosen as u32;
        pos[0] = pos[0].wrapping_add(1);
        params[9] = p.draws.wrapping_add(1);
        history[chosen] = history[chosen].wrapping_add(1);
    }

    /// Steps 2 to 4.
    fn choose(&self, p: &Params, y: &[f32]) -> usize {
        let best = (0..y.len()).rev().max_by_key(|&i| key(y[i])).unwrap_or(0); // rev: max_by_key takes the last of equals
        let max = y[best];
        if !(p.temperature > 0.0 && max.is_finite()) {
            return best;
        }
        let w: Vec<u64> = y.iter().map(|y| weight((y - max) / p.temperature)).collect();
        let mut order: Vec<usize> = (0..y.len()).collect();
        if p.top_k > 0 && (p.top_k as usize) < order.len() {
            order.select_nth_unstable_by_key(p.top_k as usize, |&i| (!key(y[i]), i));
            order.truncate(p.top_k as usize);
        }
        if p.top_p < 1.0 {
            order.sort_unstable_by_key(|&i| (!key(y[i]), i));
            let target = share_of(p.top_p, order.iter().map(|&i| w[i]).sum()).max(1);
            let mut sum = 0;
            let reached = order.iter().position(|&i| {
                sum += w[i];
                sum >= target
            });
            order.truncate(reached.map_or(order.len(), |n| n + 1));
        }
        let cut = share_of(p.min_p, ONE);
        order.retain(|&i| w[i] >= cut);
        order.sort_unstable();
        let total: u64 = order.iter().map(|&i| w[i]).sum();
        let r = ((u128::from(random(p.seed, p.draws)) * u128::from(total)) >> 64) as u64;
        let mut sum = 0;
        order
            .into_iter()
            .find(|&i| {
                sum += w[i];
                sum > r
            })
            .unwrap_or(best) // not reached: best is kept, so r < total
    }

    /// The kernel.
    #[cfg(feature = "cuda")]
    #[expect(clippy::too_many_arguments, reason = "one argument a buffer, named as in the kernel")]
    pub fn launch(
        &self,
        cu: &crate::cuda::Cuda,
        token: &mut crate::cuda::Buffer<u32>,
        pos: &mut crate::cuda::Buffer<u32>,
        params: &mut crate::cuda::Buffer<u32>,
        history: &mut crate::cuda::Buffer<u32>,
        scratch: &mut crate::cuda::Buffer<f32>,
        outbox: &mut crate::cuda::Outbox,
        bias: &crate::cuda::Buffer<f32>,
        logits: &crate::cuda::Buffer<f32>,
    ) -> Result<()> {
        let lens = [params.len(), history.len(), bias.len(), scratch.len()];
        self.check(token.len(), pos.len(), lens[0], lens[1], lens[2], lens[3], logits.len())?;
        let [serial, ring] = outbox.args();
        let state = [token.into(), pos.into(), params.into(), history.into(), scratch.into(), serial, ring];
        let args = [&state[..], &[bias.into(), logits.into(), self.vocab.into(), cu.trace(self, self.grid())]].concat();
        // SAFETY: check() proved that a token, a position, all params and vocab words of the rest exist, and an outbox has its
        // words; the kernel writes history at an id below vocab. The arguments are those of the kernel, in order; it waits
        // for its predecessor before it reads anything.
        unsafe { cu.launch_dependent("sample_f32", self, self.grid(), &args) }
    }
}

impl Op for Sample {
    const STEM: &'static str = "sample";
    type Io<B: Backend> = (B::Buf<u32>, B::Buf<u32>, SamplerState<B>, B::Buf<f32>);

    fn cases() -> Vec<Self> {
        [1, 7, 129, 1000, 4099, 49152, 128256].into_iter().map(|vocab| Sample { vocab }).collect()
    }

    fn is_small(&self) -> bool {
        self.vocab < 10_000
    }

    fn cost(&self) -> Cost {
        let n = self.vocab as u64;
        Cost { read: 12 * n, write: 4 * n, flops: 12 * n } // 10 for a weight, 2 for its place
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance::EXACT
    }

    /// All filters and penalties at once; `tests/sampler.rs` tries them one by one.
    fn setup<B: Backend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>> {
        let p = Params {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.01,
            repetition_penalty: 1.1,
            frequency_penalty: 0.2,
            presence_penalty: 0.1,
            seed,
            draws: 3,
            ..Params::default()
        };
        let scaled = |scale: f32, seed| noise(self.vocab, seed).into_iter().map(move |x| x * scale);
        let history: Vec<u32> = scaled(4.0, seed + 1).map(|x| x.max(0.0) as u32 | u32::from(x > 3.0) << 31).collect();
        let bias: Vec<f32> = scaled(1.0, seed + 2).collect();
        let logits: Vec<f32> = scaled(8.0, seed).collect();
        Ok((b.upload(&[u32::MAX])?, b.upload(&[41])?, state(b, &p, &history, &bias)?, b.upload(&logits)?))
    }

    fn run<B: Backend>(&self, b: &B, (token, pos, s, logits): &mut Self::Io<B>) -> Result<()> {
        let SamplerState { params, history, bias, scratch, outbox } = s;
        b.sample(self, token, pos, params, history, scratch, outbox, bias, logits)
    }

    /// Token, position, draws and the token's count.
    fn outputs<B: Backend>(&self, b: &B, (token, pos, state, _): &Self::Io<B>) -> Result<Vec<f32>> {
        let (token, draws) = (b.download(token)?[0], Params::from_words(&b.download(&state.params)?).draws);
        let count = b.download(&state.history)?.get(token as usize).map_or(f32::NAN, |h| (h & !IN_PROMPT) as f32);
        Ok(vec![token as f32, b.download(pos)?[0] as f32, draws as f32, count])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_its_published_values() {
        let pi = ([0x243F_6A88, 0x85A3_08D3, 0x1319_8A2E, 0x0370_7344], [0xA409_3822, 0x299F_31D0]);
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8]);
        assert_eq!(philox([!0; 4], [!0; 2]), [0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD]);
        assert_eq!(philox(pi.0, pi.1), [0xD16C_FE09, 0x94FD_CCEB, 0x5001_E420, 0x2412_6EA1]);
    }

    #[test]
    fn weights_are_exponentials_and_fall() {
        assert_eq!(weight(0.0), ONE);
        assert_eq!(weight(-0.0), ONE);
        assert_eq!([weight(-28.5), weight(f32::NEG_INFINITY), weight(f32::NAN)], [0; 3]);
        let (mut last, mut worst) = (0, 0f64);
        for i in 0..400_000 {
            let x = -28.0 + i as f32 * 7e-5;
            let (w, want) = (weight(x), f64::from(x).exp() * ONE as f64);
            assert!(w >= last && w <= ONE, "{x}: {w} after {last}");
            last = w;
            worst = worst.max(((w as f64 - want).abs() - 1.0) / want); // 1: the floor
        }
        assert!(worst < 3e-6, "relative error {worst:.2e}"); // x log2(e) is rounded: 40 * 2^-24 at the far end
    }

    #[test]
    fn shares_are_exact() {
        assert_eq!(share_of(0.5, ONE + 3), ONE / 2 + 1);
        assert_eq!(share_of(1.0, u64::MAX), u64::MAX);
        assert_eq!([share_of(0.0, ONE), share_of(f32::NAN, ONE), share_of(-1.0, ONE)], [0; 3]);
        assert_eq!(share_of(2.0, 77), 77);
    }

    #[test]
    fn params_survive_their_words() {
        let p =
            Params { temperature: 0.7, seed: 0x0123_4567_89AB_CDEF, draws: 5, stop_ids: [9; 8], ..Params::default() };
        assert_eq!(Params::from_words(&p.words()), p);
    }

    #[test]
    fn check_and_grid() {
        let op = Sample { vocab: 100 };
        assert!(op.check(1, 1, 20, 100, 100, 100, 100).is_ok());
        assert!(op.check(1, 1, 20, 100, 99, 100, 100).unwrap_err().to_string().contains("bias 99"));
        assert!(op.check(1, 1, 19, 100, 100, 100, 100).unwrap_err().to_string().contains("params 19"));
        assert!(Sample { vocab: 1 << 24 }.check(1, 1, 20, 1 << 24, 1 << 24, 1 << 24, 1 << 24).is_err());
        assert_eq!([1, 100, 300, 128256].map(|vocab| Sample { vocab }.grid().threads), [32, 32, 128, 1024]);
    }
}
