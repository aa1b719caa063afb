//! The parameters of a sequence's sampler, as values and as the words that lie on the device.

use super::IN_PROMPT;
use crate::tiles::SAMPLE_PARAMS;

/// Stop ids that `min_tokens` can hold back.
pub const MAX_STOP_IDS: usize = 8;
/// Word of [`Params::draws`].
pub(crate) const DRAWS: usize = 9;
/// First word of [`Params::stop_ids`].
const STOP_IDS: usize = 11;
/// Word of [`Params::masked`].
const MASKED: usize = STOP_IDS + MAX_STOP_IDS;

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
    /// Whether the mask is used.
    pub masked: bool,
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
            masked: false,
        }
    }
}

impl Params {
    /// As the device holds it.
    pub fn words(&self) -> [u32; SAMPLE_PARAMS as usize] {
        let mut words = [0; SAMPLE_PARAMS as usize];
        words[..STOP_IDS].copy_from_slice(&[
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
        words[STOP_IDS..MASKED].copy_from_slice(&self.stop_ids);
        words[MASKED] = self.masked.into();
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
            draws: w[DRAWS],
            min_tokens: w[10],
            stop_ids: std::array::from_fn(|i| w[STOP_IDS + i]),
            masked: w[MASKED] != 0,
        }
    }

    /// Step 1 of [`super`] for one token.
    pub(crate) fn adjust(&self, id: usize, logit: f32, bias: f32, history: u32, mask: &[u32]) -> f32 {
        if self.masked && mask[id / 32] >> (id % 32) & 1 == 0 {
            return f32::NEG_INFINITY;
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn params_survive_their_words() {
        let p = Params {
            temperature: 0.7,
            seed: 0x0123_4567_89AB_CDEF,
            draws: 5,
            stop_ids: [9; 8],
            masked: true,
            ..Params::default()
        };
        assert_eq!(Params::from_words(&p.words()), p);
    }
}
