//! How tokens are chosen: the user's options, checked, and turned into what [`crate::ops::Sample`] reads.

use crate::{
    error::{Error, Result},
    files::config::SamplingDefaults,
    ops::sample::{MAX_STOP_IDS, Params},
};

/// Lower temperatures count as this one. Here a token whose logit is lower by a hundredth is already e^10 times rarer,
/// so lower temperatures would hardly differ from greedy sampling, and their quotients would leave the range of f32.
const MIN_TEMPERATURE: f32 = 1e-3;

/// Sampling options. The default is greedy.
///
/// The same seed and prompt give the same text, whatever else the process does, on the same device; other devices round
/// the logits differently.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Divides the logits. 0 takes the most likely token; anything else below 0.001 counts as 0.001.
    pub temperature: f32,
    /// Only the `top_k` most likely tokens; 0 is off.
    pub top_k: u32,
    /// Only the most likely tokens that together have this probability; 1 is off, and 0 leaves the most likely token.
    pub top_p: f32,
    /// Only tokens with at least this share of the most likely token's probability; 0 is off.
    pub min_p: f32,
    /// Divides (multiplies, when negative) the logits of tokens in prompt and answer; 1 is off.
    pub repetition_penalty: f32,
    /// Taken from a token's logit for each time that it is in the answer; 0 is off.
    pub frequency_penalty: f32,
    /// Taken from the logit of each token in the answer; 0 is off.
    pub presence_penalty: f32,
    /// Added to the logits of single tokens; `-inf` forbids a token.
    pub logit_bias: Vec<(u32, f32)>,
    /// Key of the random generator.
    pub seed: u64,
    /// Stop ids are forbidden, and stop strings do not count, until the text has this many tokens; at most `max_tokens`.
    pub min_tokens: u32,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            min_tokens: 0,
        }
    }
}

impl Sampling {
    /// The sampling that the author of a model recommends, with defaults for what is not said.
    pub fn recommended(by: &SamplingDefaults) -> Sampling {
        let default = Sampling::default();
        Sampling {
            temperature: by.temperature.unwrap_or(default.temperature),
            top_k: by.top_k.unwrap_or(default.top_k),
            top_p: by.top_p.unwrap_or(default.top_p),
            min_p: by.min_p.unwrap_or(default.min_p),
            repetition_penalty: by.repetition_penalty.unwrap_or(default.repetition_penalty),
            ..default
        }
    }

    /// Checks that each option is in its range and ids are below `vocab`; the error names the option.
    pub fn check(&self, vocab: usize) -> Result<()> {
        let range = |name: &str, x: f32, ok: bool, allowed: &str| match ok {
            true => Ok(()),
            false => Err(Error::Input(format!("{name} is {x}, allowed is {allowed}"))),
        };
        let t = self.temperature;
        range("temperature", t, (0.0..=100.0).contains(&t), "0 to 100")?;
        range("top_p", self.top_p, (0.0..=1.0).contains(&self.top_p), "0 to 1")?;
        range("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "0 to 1")?;
        let r = self.repetition_penalty;
        range("repetition_penalty", r, (0.01..=100.0).contains(&r), "0.01 to 100")?;
        for (name, x) in [("frequency_penalty", self.frequency_penalty), ("presence_penalty", self.presence_penalty)] {
            range(name, x, (-100.0..=100.0).contains(&x), "-100 to 100")?;
        }
        for &(id, bias) in &self.logit_bias {
            if id as usize >= vocab {
                return Err(Error::Input(format!("logit_bias: token {id} is not below the vocabulary's {vocab}")));
            }
            range("logit_bias", bias, !bias.is_nan() && bias != f32::INFINITY, "a number or -inf")?;
        }
        Ok(())
    }

    /// Whether the token is simply the one with the largest logit, so that [`crate::ops::Argmax`] is enough.
    pub(crate) fn is_plain_greedy(&self) -> bool {
        self.temperature == 0.0
            && self.repetition_penalty == 1.0
            && self.frequency_penalty == 0.0
            && self.presence_penalty == 0.0
            && self.logit_bias.is_empty()
            && self.min_tokens == 0
    }

    /// Whether the logits of some tokens depend on which tokens came before.
    pub(crate) fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }

    /// The parameters for the device. `min_tokens` holds back at most [`MAX_STOP_IDS`] stop ids.
    pub(crate) fn params(&self, stop_ids: &[u32]) -> Result<Params> {
        if self.min_tokens > 0 && stop_ids.len() > MAX_STOP_IDS {
            return Err(Error::Input(format!("min_tokens works with at most {MAX_STOP_IDS} stop ids")));
        }
        Ok(Params {
            temperature: if self.temperature > 0.0 { self.temperature.max(MIN_TEMPERATURE) } else { 0.0 },
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            seed: self.seed,
            draws: 0,
            min_tokens: self.min_tokens,
            stop_ids: std::array::from_fn(|i| stop_ids.get(i).copied().unwrap_or(u32::MAX)),
            masked: false,
        })
    }
}
