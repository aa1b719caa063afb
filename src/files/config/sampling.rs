//! What the author of a checkpoint recommends for sampling, in `generation_config.json`.

use super::keys::{Keys, brief};
use serde::Serialize;
use serde_json::{Value, json};
use std::fmt;

/// Keys of transformers' `GenerationConfig` that change an answer and that aoji does not support, with the value that
/// turns each off.
const UNKNOWN: [(&str, f64); 14] = [
    ("num_beams", 1.0),
    ("typical_p", 1.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
    ("no_repeat_ngram_size", 0.0),
    ("encoder_repetition_penalty", 1.0),
    ("diversity_penalty", 0.0),
    ("penalty_alpha", 0.0),
    ("guidance_scale", 1.0),
    ("min_length", 0.0),
    ("min_new_tokens", 0.0),
    ("bad_words_ids", 0.0),
    ("suppress_tokens", 0.0),
    ("sequence_bias", 0.0),
];

/// Sampling as the author of a checkpoint recommends it; `None` where the file says nothing.
///
/// With `do_sample: false` the temperature is 0 and options that would only shape a random choice are left out; with
/// `do_sample: true` and no temperature it is 1. A value that is out of range is left out with a warning.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct SamplingDefaults {
    /// Divides the logits; 0 is greedy.
    pub temperature: Option<f32>,
    /// Only the most likely tokens; 0 is off.
    pub top_k: Option<u32>,
    /// Only the most likely tokens that together have this probability.
    pub top_p: Option<f32>,
    /// Only tokens with at least this share of the most likely token's probability.
    pub min_p: Option<f32>,
    /// Divides the logits of tokens in prompt and answer.
    pub repetition_penalty: Option<f32>,
    /// Most tokens of an answer.
    pub max_new_tokens: Option<usize>,
    /// Keys that are set and that aoji does not support.
    pub left_out: Vec<&'static str>,
}

impl SamplingDefaults {
    pub(super) fn read(keys: &Keys) -> SamplingDefaults {
        let number = |name: &str, low: f64, high: f64| {
            let value = keys.get(name)?;
            let number = value.as_f64().filter(|x| (low..=high).contains(x));
            if number.is_none() {
                let (path, found) = (keys.path.display(), brief(value));
                tracing::warn!("{path}: {name} is {found}, expected a number from {low} to {high}; it is left out");
            }
            number
        };
        let samples = keys.get("do_sample").and_then(Value::as_bool);
        let shaping = |name, high| number(name, 0.0, high).filter(|_| samples != Some(false)).map(|x| x as f32);
        let temperature = match samples {
            Some(false) => Some(0.0),
            Some(true) => Some(shaping("temperature", 100.0).unwrap_or(1.0)),
            None => shaping("temperature", 100.0),
        };
        let is_set = |name: &str, off: f64| {
            keys.get(name).is_some_and(|v| v.as_f64() != Some(off) && *v != json!([]) && *v != json!({}))
        };
        SamplingDefaults {
            temperature,
            top_k: shaping("top_k", f64::from(u32::MAX)).map(|k| k as u32),
            top_p: shaping("top_p", 1.0),
            min_p: shaping("min_p", 1.0),
            repetition_penalty: number("repetition_penalty", 0.01, 100.0).map(|x| x as f32),
            max_new_tokens: number("max_new_tokens", 1.0, f64::from(u32::MAX)).map(|n| n as usize),
            left_out: UNKNOWN.iter().filter(|(name, off)| is_set(name, *off)).map(|(name, _)| *name).collect(),
        }
    }

    /// Nothing is recommended that aoji can follow.
    pub fn is_empty(&self) -> bool {
        *self == SamplingDefaults { left_out: self.left_out.clone(), ..SamplingDefaults::default() }
    }
}

/// `temperature 0.6, top_p 0.9`
impl fmt::Display for SamplingDefaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let float = |x: Option<f32>| x.map(|x| x.to_string());
        let named = [
            ("temperature", float(self.temperature)),
            ("top_k", self.top_k.map(|k| k.to_string())),
            ("top_p", float(self.top_p)),
            ("min_p", float(self.min_p)),
            ("repetition_penalty", float(self.repetition_penalty)),
            ("max_new_tokens", self.max_new_tokens.map(|n| n.to_string())),
        ];
        let named: Vec<String> = named.into_iter().filter_map(|(name, x)| Some(format!("{name} {}", x?))).collect();
        f.write_str(if named.is_empty() { "none" } else { "" })?;
        f.write_str(&named.join(", "))?;
        match &self.left_out[..] {
            [] => Ok(()),
            keys => write!(f, " ({} not supported)", keys.join(", ")),
        }
    }
}
