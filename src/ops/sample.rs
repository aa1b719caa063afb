//! Draws `token[r]` from `logits[r]` as the parameters of the row's sequence say, and feeds it back: `pos[r] += 1`,
//! `history[token] += 1`, one more draw. The sequence of a row is that of its [place](crate::model::kv) `pos[r]` (sequence and
//! position in one number).
//!
//! Rows of one sequence are side by side and drawn one after the other; each but the first has computed a guess, `token[r]`, of the
//! token that the row before it draws. Only rows up to the first wrong guess count, and the others change nothing.
//!
//! The choice is the same on every backend, by construction: comparisons are of the ordered bits of f32, sums are of
//! integers (which do not depend on the order), and the few f32 operations before that are rounded one by one. In
//! order:
//!
//! 1. `y = logits + bias`. Forbidden are tokens that the mask does not allow, where there is a mask, and the stop ids for the
//!    first `min_tokens` draws. Then the repetition penalty (Keskar et al. 2019) over prompt and answer, and frequency and
//!    presence penalty over the answer. NaN becomes `-inf`, which is forbidden.
//! 2. With temperature 0, or if the largest `y` is infinite (a token is certain, or all are forbidden): the token of the
//!    largest `y`, the lowest id of several equals. Otherwise `w = floor(2^40 exp((y - max y) / temperature))`, which is 0
//!    for tokens that are less likely than 2^-40 of the most likely one.
//! 3. In the order of falling `y`, equals by rising id: the first `top_k` tokens; of these the shortest prefix that holds
//!    `top_p` of their weight; of these the tokens with at least `min_p` of the largest weight.
//! 4. `r` is uniform below the sum of the remaining weights, from Philox4x32-10 (Salmon et al. 2011) with the seed as key
//!    and the number of the draw as counter. The token is the first in the order of ids at which the running sum of weights
//!    exceeds `r`.
//!
//! Shapes: `token`, `pos` [at least rows]; `params` [sequences, SAMPLE_PARAMS]; `history`, `bias` [sequences, vocab]; `mask`
//! [sequences, ceil(vocab / 32)], a bit for each token; `scratch` [[`Sample::scratch`]]; `logits` [at least rows, vocab].
//! Up to [`DECODE_ROWS`] rows.

mod params;

pub(crate) use params::DRAWS;
pub use params::{MAX_STOP_IDS, Params};

use super::{Cost, Grid, Op, Tolerance, expect, guesses::Counted, noise};
use crate::{
    backend::{Backend, DECODE_ROWS, SamplerState, train::TrainBackend},
    error::Result,
    tiles::{BEST_WORDS, SAMPLE_BINS, SAMPLE_MAX_VOCAB, SAMPLE_PARAMS, SAMPLE_STATE, SAMPLE_THREADS, SAMPLE_TILE},
};

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Tokens to draw.
    pub rows: usize,
    /// Logits of each.
    pub vocab: usize,
    /// Positions of a sequence. The caller ensures that the sequence of each place has a state and an outbox.
    pub max_seq: usize,
}

/// In `history`: the token is in the prompt.
pub const IN_PROMPT: u32 = 1 << 31;
/// `w` of the largest logit.
pub(crate) const ONE: u64 = 1 << 40;

/// Order of f32 as an order of integers; -0 and 0 are one value.
pub(crate) fn key(y: f32) -> u32 {
    let bits = (y + 0.0).to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// `floor(2^40 exp(x))` for `x <= 0`: the polynomial is a least-maximum fit of `2^f` over [0, 1).
pub(crate) fn weight(x: f32) -> u64 {
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
pub(crate) fn share_of(share: f32, total: u64) -> u64 {
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

/// Uniform below `total`, for a draw.
pub(crate) fn random_below(total: u64, p: &Params) -> u64 {
    let [a, b, ..] = philox([p.draws, 0, 0, 0], [p.seed as u32, (p.seed >> 32) as u32]);
    let random = u64::from(a) | u64::from(b) << 32;
    ((u128::from(random) * u128::from(total)) >> 64) as u64
}

/// The buffers of one sequence's sampler with the given content.
pub(crate) fn state<B: Backend>(b: &B, p: &Params, history: &[u32], bias: &[f32]) -> Result<SamplerState<B>> {
    let mut state = SamplerState::new(b, history.len(), 1)?;
    b.write(&mut state.params, 0, &p.words())?;
    b.write(&mut state.history, 0, history)?;
    b.write(&mut state.bias, 0, bias)?;
    Ok(state)
}

/// Lengths of the buffers of one call, for [`Sample::check`].
#[derive(Debug, Clone, Copy)]
#[expect(missing_docs, reason = "one field a buffer, named as in the kernel")]
pub struct Lengths {
    pub token: usize,
    pub pos: usize,
    pub params: usize,
    pub history: usize,
    pub scratch: usize,
    pub bias: usize,
    pub mask: usize,
    pub logits: usize,
}

/// Blocks of a row.
fn blocks(vocab: usize) -> usize {
    vocab.div_ceil(SAMPLE_TILE as usize)
}

impl Sample {
    /// Words of a mask.
    pub fn mask_len(&self) -> usize {
        self.vocab.div_ceil(32)
    }

    /// Buffer lengths fit the sizes.
    pub fn check(&self, n: Lengths) -> Result<()> {
        let Sample { rows, vocab, max_seq } = *self;
        expect(Self::STEM, (1..=DECODE_ROWS).contains(&rows) && vocab > 0 && max_seq > 0, || {
            format!("{self:?}: sizes must be positive, and at most {DECODE_ROWS} rows")
        })?;
        expect(Self::STEM, vocab <= SAMPLE_MAX_VOCAB as usize, || {
            format!("{self:?}: sums of weights need vocab <= {SAMPLE_MAX_VOCAB}")
        })?;
        let rows_fit =
            n.token >= rows && n.pos >= rows && n.scratch >= Self::scratch(rows, vocab) && n.logits >= rows * vocab;
        let [params, mask] = [SAMPLE_PARAMS as usize, self.mask_len()];
        let state_fits = n.params >= params && n.history >= vocab && n.bias >= vocab && n.mask >= mask;
        expect(Self::STEM, rows_fit && state_fits, || format!("{n:?} do not fit {self:?}"))
    }

    /// Words of scratch for this many rows. First, for every row that a step may have, its best candidate, which is 0
    /// before and after a call. Then for each of these rows: where its filters end, its histogram, a weight for each
    /// block, logits and a list of ids.
    pub fn scratch(rows: usize, vocab: usize) -> usize {
        let of_row = SAMPLE_STATE as usize + 3 * SAMPLE_BINS as usize + 2 * blocks(vocab) + 2 * vocab;
        DECODE_ROWS * BEST_WORDS as usize + rows * of_row
    }

    /// The grid of each of the kernels: a block for every [`SAMPLE_TILE`] ids of a row.
    pub fn grid(&self) -> Grid {
        Grid { blocks: [blocks(self.vocab) as u32, self.rows as u32, 1], threads: SAMPLE_THREADS, shared: 0 }
    }

    /// Sequence of a row's place.
    pub fn sequence(&self, pos: u32) -> usize {
        pos as usize / self.max_seq
    }

    /// The definition.
    #[expect(clippy::too_many_arguments, reason = "one argument a buffer")]
    pub fn reference(
        &self,
        token: &mut [u32],
        pos: &mut [u32],
        params: &mut [u32],
        history: &mut [u32],
        bias: &[f32],
        mask: &[u32],
        logits: &[f32],
    ) {
        let (vocab, mut counted) = (self.vocab, Counted::default());
        for (r, logits) in logits.chunks_exact(vocab).take(self.rows).enumerate() {
            let s = self.sequence(pos[r]);
            if !counted.next(s, token[r]) {
                continue;
            }
            let (p, mask) = (self.params_of(params, s), &mask[s * self.mask_len()..][..self.mask_len()]);
            let y: Vec<f32> =
                (0..vocab).map(|i| p.adjust(i, logits[i], bias[s * vocab + i], history[s * vocab + i], mask)).collect();
            let chosen = self.choose(&p, &y);
            counted.chose(chosen as u32);
            self.advance(r, chosen, token, pos, params, history);
        }
    }

    /// Everything that the choice for row `r` changes.
    pub(crate) fn advance(
        &self,
        r: usize,
        chosen: usize,
        token: &mut [u32],
        pos: &mut [u32],
        params: &mut [u32],
        history: &mut [u32],
    ) {
        let s = self.sequence(pos[r]);
        for count in
            [&mut pos[r], &mut params[s * SAMPLE_PARAMS as usize + DRAWS], &mut history[s * self.vocab + chosen]]
        {
            *count = count.wrapping_add(1);
        }
        token[r] = chosen as u32;
    }

    /// The parameters of a sequence.
    pub(crate) fn params_of(&self, params: &[u32], sequence: usize) -> Params {
        Params::from_words(&params[sequence * SAMPLE_PARAMS as usize..][..SAMPLE_PARAMS as usize])
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
        let r = random_below(total, p);
        let mut sum = 0;
        order
            .into_iter()
            .find(|&i| {
                sum += w[i];
                sum > r
            })
            .unwrap_or(best) // not reached: best is kept, so r < total
    }

    /// The kernels, one after the other.
    #[cfg(feature = "cuda")]
    #[expect(clippy::too_many_arguments, reason = "one argument a buffer, named as in the kernel")]
    pub fn launch(
        &self,
        cu: &crate::backend::cuda::Cuda,
        token: &mut crate::backend::cuda::Buffer<u32>,
        pos: &mut crate::backend::cuda::Buffer<u32>,
        params: &mut crate::backend::cuda::Buffer<u32>,
        history: &mut crate::backend::cuda::Buffer<u32>,
        scratch: &mut crate::backend::cuda::Buffer<f32>,
        outbox: &mut crate::backend::cuda::Outbox,
        bias: &crate::backend::cuda::Buffer<f32>,
        mask: &crate::backend::cuda::Buffer<u32>,
        logits: &crate::backend::cuda::Buffer<f32>,
    ) -> Result<()> {
        use crate::backend::cuda::Arg;
        self.check(Lengths {
            token: token.len(),
            pos: pos.len(),
            params: params.len(),
            history: history.len(),
            scratch: scratch.len(),
            bias: bias.len(),
            mask: mask.len(),
            logits: logits.len(),
        })?;
        super::expect_ints(Self::STEM, &[self.rows, self.max_seq])?;
        let [serial, ring] = outbox.args();
        let [token, pos, params, history] = [token, pos, params, history].map(Arg::from);
        let (scratch, sizes) = (Arg::from(scratch), [self.vocab.into(), self.max_seq.into()]);
        let row = [scratch, pos, params];
        let adjust = [&[token], &row[..], &[history, bias.into(), mask.into(), logits.into()]].concat();
        let draw = [token, pos, params, history, scratch, serial, ring];
        // what the others read comes from the L2 cache
        let kernels = [
            ("sample_adjust_f32", &adjust[..], self.cost()),
            ("sample_histogram_f32", &row, Cost::default()),
            ("sample_select_f32", &row, Cost::default()),
            ("sample_draw_f32", &draw, Cost::default()),
        ];
        for (kernel, buffers, cost) in kernels {
            let args = [buffers, &sizes, &[cu.trace_part(cost, self.grid())]].concat();
            // SAFETY: check() proved that tokens, places, scratch and logits have `rows` rows and that the rest has a sequence;
            // that each place's sequence is in the rest, and in the outbox, is the caller's promise; ids in scratch, and that
            // of history, are below vocab. The arguments are those of the kernel, in order; it waits for
            // its predecessor before it reads anything.
            unsafe { cu.launch_dependent(kernel, self, self.grid(), &args)? }
        }
        Ok(())
    }
}

impl Op for Sample {
    const STEM: &'static str = "sample";
    type Io<B: TrainBackend> = (B::Buf<u32>, B::Buf<u32>, SamplerState<B>, B::Buf<f32>);

    fn cases() -> Vec<Self> {
        let shapes = [(1, 1), (1, 7), (3, 7), (1, 129), (16, 129), (1, 1000), (5, 4099), (1, 49152), (1, 128_256)];
        shapes.into_iter().map(|(rows, vocab)| Sample { rows, vocab, max_seq: 50 }).collect()
    }

    fn is_small(&self) -> bool {
        self.vocab < 10_000
    }

    fn cost(&self) -> Cost {
        let n = (self.rows * self.vocab) as u64;
        Cost { read: 12 * n, write: 4 * n, flops: 12 * n } // 10 for a weight, 2 for its place
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance::EXACT
    }

    /// All filters and penalties at once; `tests/device/sampler.rs` tries them one by one. Rows are of one sequence, and their
    /// guesses are right but for the one before the last.
    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>> {
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
        let logits: Vec<f32> = noise(self.rows * self.vocab, seed).into_iter().map(|x| x * 8.0).collect();
        let places: Vec<u32> = (30..).take(self.rows).collect();
        let (mut guesses, mut pos) = (vec![u32::MAX; self.rows], places.clone());
        let (mut words, mut counts, mask) = (p.words().to_vec(), history.clone(), vec![0; self.mask_len()]);
        for (r, logits) in logits.chunks_exact(self.vocab).enumerate().take(self.rows - 1) {
            let (one, mut token) = (Sample { rows: 1, ..self.clone() }, [0]);
            one.reference(&mut token, &mut pos[r..], &mut words, &mut counts, &bias, &mask, logits);
            guesses[r + 1] = token[0] + u32::from(r + 2 == self.rows - 1);
        }
        Ok((b.upload(&guesses)?, b.upload(&places)?, state(b, &p, &history, &bias)?, b.upload(&logits)?))
    }

    fn run<B: TrainBackend>(&self, b: &B, (token, pos, s, logits): &mut Self::Io<B>) -> Result<()> {
        let SamplerState { params, history, bias, mask, scratch, outbox } = s;
        b.sample(self, token, pos, params, history, scratch, outbox, bias, mask, logits)
    }

    /// Draws, and of each row the token, its count, and the place.
    fn outputs<B: TrainBackend>(&self, b: &B, (token, pos, state, _): &Self::Io<B>) -> Result<Vec<f32>> {
        let (draws, history) = (Params::from_words(&b.download(&state.params)?).draws, b.download(&state.history)?);
        let count = |token: u32| history.get(token as usize).map_or(f32::NAN, |h| (h & !IN_PROMPT) as f32);
        let rows = b.download(token)?.into_iter().zip(b.download(pos)?);
        let rows = rows.flat_map(|(token, pos)| [token as f32, count(token), pos as f32]);
        Ok(std::iter::once(draws as f32).chain(rows).collect())
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
    fn check_and_grid() {
        let op = Sample { rows: 2, vocab: 100, max_seq: 9 };
        let scratch = Sample::scratch(2, 100);
        let n = Lengths { token: 2, pos: 2, params: 20, history: 100, scratch, bias: 100, mask: 4, logits: 200 };
        assert!(op.check(n).is_ok());
        let scratch = scratch - 1;
        for short in
            [Lengths { bias: 99, ..n }, Lengths { params: 19, ..n }, Lengths { mask: 3, ..n }, Lengths { scratch, ..n }]
        {
            assert!(op.check(short).unwrap_err().to_string().contains("do not fit Sample { rows: 2, vocab: 100"));
        }
        assert!(op.check(Lengths { logits: 199, ..n }).is_err());
        let big = Sample { rows: 1, vocab: 1 << 24, max_seq: 9 };
        assert!(big.check(n).unwrap_err().to_string().contains("sums of weights"));
        let many = Sample { rows: DECODE_ROWS + 1, vocab: 1, max_seq: 9 };
        assert!(many.check(n).unwrap_err().to_string().contains(&format!("at most {DECODE_ROWS} rows")));
        let blocks = |vocab| Sample { rows: 3, vocab, max_seq: 9 }.grid().blocks;
        assert_eq!([1, 1024, 1025, 128_256].map(blocks), [[1, 3, 1], [1, 3, 1], [2, 3, 1], [126, 3, 1]]);
    }
}
