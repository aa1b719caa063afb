//! Draws `token[0]` from `logits`, feeds it back: `pos[0] += 1`, `history[token] += 1`, one more draw.
//!
//! The same choice on every backend, by construction: what is compared is ordered bits of f32, what is added are integers
//! (sums of integers do not depend on their order), and the few f32 operations before that are rounded one by one. In order:
//!
//! 1. `y = logits + bias`; the stop ids are forbidden for the first `min_tokens` draws; repetition penalty (Keskar et al. 2019)
//!    over prompt and answer, frequency and presence penalty over the answer.
//! 2. Temperature 0: the largest `y`, the lowest id of equals. Otherwise `w = floor(2^40 exp((y - max y) / temperature))`.
//! 3. In the order of falling `y`, rising id of equals: the first `top_k`; of these the shortest prefix that holds `top_p` of
//!    their weight; of these the ones with at least `min_p` of the largest weight.
//! 4. `r` uniform below the sum of the kept weights, from Philox4x32-10 (Salmon et al. 2011) with the seed as key and the number
//!    of the draw as counter; the token is the first in the order of ids at which the running sum of weights exceeds `r`.
//!
//! Shapes: `token`, `pos` [at least 1]; `params` [SAMPLE_PARAMS]; `history`, `bias`, `scratch`, `logits` [at least vocab].

use super::expect;
use crate::{error::Result, tiles::SAMPLE_PARAMS};

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

/// `floor(2^40 exp(x))` for `x <= 0`, to about 2e-7: the polynomial is a least-maximum fit of `2^f` over [0, 1).
fn weight(x: f32) -> u64 {
    let e = x * std::f32::consts::LOG2_E;
    if e <= -41.0 {
        return 0; // also for -inf
    }
    let n = e.floor();
    let f = e - n;
    let p = [0.0018671300_f32, 0.0090170298, 0.0557999127, 0.2401644439, 0.6931512952, 1.0];
    let p = p.into_iter().reduce(|acc, c| acc * f + c).unwrap_or(1.0);
    let (mantissa, shift) = ((p * 8_388_608.0) as u64, n as i32 + 17); // p in [1, 2): 23 bits after the point
    if shift >= 0 { mantissa << shift } else { mantissa >> -shift }
}

/// `floor(share * total)` with the share cut to 24 bits; exact in integers.
fn share_of(share: f32, total: u64) -> u64 {
    let share = (share.clamp(0.0, 1.0) * 16_777_216.0) as u64;
    (total >> 24) * share + (((total & 0xff_ffff) * share) >> 24)
}

/// The first 64 bits of Philox4x32-10 for a key and a counter.
pub fn philox(seed: u64, counter: u32) -> u64 {
    let (mut c, mut k) = ([counter, 0, 0, 0], [seed as u32, (seed >> 32) as u32]);
    for _ in 0..10 {
        let (a, b) = (u64::from(c[0]) * 0xD251_1F53, u64::from(c[2]) * 0xCD9E_8D57);
        c = [(b >> 32) as u32 ^ c[1] ^ k[0], b as u32, (a >> 32) as u32 ^ c[3] ^ k[1], a as u32];
        k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
    }
    u64::from(c[0]) | u64::from(c[1]) << 32
}

impl Sample {
    const STEM: &'static str = "sample";

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
        expect(Self::STEM, self.vocab > 0 && [history, bias, scratch, logits].iter().all(|n| *n >= self.vocab), || {
            format!("history has {history} elements, bias {bias}, scratch {scratch} and logits {logits}, {self:?}")
        })
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
        pos[0] += 1;
        params[9] = p.draws + 1;
        history[chosen] += 1;
    }

    /// Steps 2 to 4.
    fn choose(&self, p: &Params, y: &[f32]) -> usize {
        let best = (0..y.len()).rev().max_by_key(|&i| key(y[i])).unwrap_or(0); // rev: max_by_key takes the last of equals
        if p.temperature == 0.0 || y[best] == f32::NEG_INFINITY {
            return best;
        }
        let max = y[best];
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
        let r = ((u128::from(philox(p.seed, p.draws)) * u128::from(total)) >> 64) as u64;
        let mut sum = 0;
        order
            .into_iter()
            .find(|&i| {
                sum += w[i];
                sum > r
            })
            .unwrap_or(best)
    }

    /// The kernel.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        _cu: &crate::cuda::Cuda,
        _token: &mut crate::cuda::Buffer<u32>,
        _pos: &mut crate::cuda::Buffer<u32>,
        _state: &mut crate::backend::SamplerState<crate::cuda::Cuda>,
        _logits: &crate::cuda::Buffer<f32>,
    ) -> Result<()> {
        Err(crate::error::Error::Op { op: Self::STEM, what: "has no kernel yet".into() })
    }
}
