//! Rotary frequencies: `rope_theta` and `rope_scaling`, which transformers 5 calls `rope_parameters`.

use super::{Config, MAX_SIZE, keys::Keys};
use crate::error::Result;
use serde::Serialize;
use serde_json::{Map, Value};
use std::{
    f64::consts::{PI, TAU},
    fmt,
};

/// How rotary frequencies are changed for contexts longer than those of the training. In JSON the fields have Hugging
/// Face's names.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
pub enum RopeScaling {
    /// All frequencies divided by `factor` (Chen et al. 2023).
    Linear {
        /// Above 0.
        factor: f64,
    },
    /// NTK-aware: beyond the trained length, the base of the frequencies grows with the length (bloc97 and emozilla
    /// 2023).
    ///
    /// A token gets the frequencies for the text that ends with it, and keeps them. Transformers does the same when
    /// tokens are fed one by one: its cache keeps earlier keys as they were. But where transformers reads a prompt
    /// beyond the trained length at once, all of the prompt gets the frequencies of its last token. Here a token's
    /// frequencies depend on its position alone, so a prompt may be cut anywhere.
    Dynamic {
        /// Above 0.
        factor: f64,
        /// Context length of the training.
        #[serde(rename = "max_position_embeddings")]
        trained: usize,
    },
    /// YaRN (Peng et al. 2023): low frequencies divided, high ones left alone, a ramp between; cosines and sines multiplied.
    Yarn {
        /// Low frequencies are divided by this.
        factor: f64,
        /// Context length of the training.
        #[serde(rename = "original_max_position_embeddings")]
        original_max_seq: usize,
        /// Multiplies cosines and sines, and so the logits of attention by its square.
        attention_factor: f64,
        /// A frequency that turns at least this often within the trained length is left alone.
        beta_fast: f64,
        /// A frequency that turns at most this often within the trained length is divided in full.
        beta_slow: f64,
        /// Whether the ends of the ramp are rounded to whole dimensions.
        truncate: bool,
    },
    /// Llama 3.1: low frequencies divided, high ones left alone, a blend between.
    Llama3 {
        /// Low frequencies are divided by this; at least 1.
        factor: f64,
        /// Wavelengths above `original_max_seq / low_freq_factor` are divided in full.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_seq / high_freq_factor` are left alone; greater than `low_freq_factor`.
        high_freq_factor: f64,
        /// Context length of the training.
        #[serde(rename = "original_max_position_embeddings")]
        original_max_seq: usize,
    },
}

/// As in `scaled by 32 beyond 8192 tokens (llama3, low 1, high 4)`.
impl fmt::Display for RopeScaling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Linear { factor } => write!(f, "scaled by {factor} (linear)"),
            Self::Dynamic { factor, trained } => write!(f, "scaled by {factor} beyond {trained} tokens (dynamic)"),
            Self::Yarn { factor, original_max_seq, attention_factor, beta_fast, beta_slow, .. } => write!(
                f,
                "scaled by {factor} beyond {original_max_seq} tokens (yarn, fast {beta_fast}, slow {beta_slow}, attention \
                 factor {attention_factor:.4})"
            ),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_seq } => write!(
                f,
                "scaled by {factor} beyond {original_max_seq} tokens (llama3, low {low_freq_factor}, high \
                 {high_freq_factor})"
            ),
        }
    }
}

impl RopeScaling {
    /// The longest context that it is made for, of a model with this `max_position_embeddings`: what vLLM takes for it.
    pub(super) fn max_seq(&self, max_position: usize) -> usize {
        let (trained, factor) = match *self {
            Self::Linear { factor } | Self::Dynamic { factor, .. } => (max_position, factor),
            Self::Yarn { factor, original_max_seq, .. } => (original_max_seq, factor),
            Self::Llama3 { .. } => return max_position,
        };
        ((trained as f64 * factor) as usize).clamp(max_position.min(trained), MAX_SIZE)
    }
}

impl Config {
    /// Rotary frequencies in radians per position, `[head_dim / 2]`: `theta^(-2i / head_dim)`, then changed as
    /// `rope_scaling` says. With [`RopeScaling::Dynamic`] these hold up to the trained length; see
    /// [`Config::rope_inv_freq_at`].
    ///
    /// Every step is rounded to f32 as transformers does (`modeling_rope_utils.py` of 5.2), because an angle is this number
    /// times a position of up to 10^5 and an error of one unit in the last place would show there.
    pub fn rope_inv_freq(&self) -> Vec<f32> {
        let freqs = match self.rope_scaling {
            None => self.powers(self.rope_theta as f32).map(|x| 1.0 / x).collect(),
            Some(RopeScaling::Linear { factor }) => {
                self.powers(self.rope_theta as f32).map(|x| 1.0 / x / factor as f32).collect()
            }
            Some(RopeScaling::Dynamic { trained, .. }) => return self.rope_inv_freq_at(trained - 1),
            Some(RopeScaling::Yarn { factor, original_max_seq, beta_fast, beta_slow, truncate, .. }) => {
                let (low, high) = self.correction_range(original_max_seq, beta_fast, beta_slow, truncate);
                let span = (if low == high { 0.001 } else { high - low }) as f32;
                let ramp = |(i, power): (usize, f32)| {
                    let kept = 1.0 - ((i as f32 - low as f32) / span).clamp(0.0, 1.0);
                    1.0 / (factor as f32 * power) * (1.0 - kept) + 1.0 / power * kept
                };
                self.powers(self.rope_theta as f32).enumerate().map(ramp).collect()
            }
            Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_seq }) => {
                let original = original_max_seq as f64;
                let (low_wavelen, high_wavelen) =
                    ((original / low_freq_factor) as f32, (original / high_freq_factor) as f32);
                let stretch = |power: f32| {
                    let freq = 1.0 / power;
                    let (factor, wavelen) = (factor as f32, TAU as f32 / freq);
                    if wavelen < high_wavelen {
                        freq
                    } else if wavelen > low_wavelen {
                        freq / factor
                    } else {
                        let smooth = (original as f32 / wavelen - low_freq_factor as f32)
                            / (high_freq_factor - low_freq_factor) as f32;
                        (1.0 - smooth) * freq / factor + smooth * freq
                    }
                };
                self.powers(self.rope_theta as f32).map(stretch).collect()
            }
        };
        self.divided(freqs)
    }

    /// Applies the last change: `rope_factors`.
    fn divided(&self, mut freqs: Vec<f32>) -> Vec<f32> {
        freqs.iter_mut().zip(&self.rope_factors).for_each(|(freq, factor)| *freq /= factor);
        freqs
    }

    /// The rotary frequencies of the token at `position`: those of [`Config::rope_inv_freq`] below
    /// [`Config::rope_fixed_until`].
    pub fn rope_inv_freq_at(&self, position: usize) -> Vec<f32> {
        let Some(RopeScaling::Dynamic { factor, trained }) = self.rope_scaling else { return self.rope_inv_freq() };
        // In f32, in which transformers has the length by then.
        let (factor, trained, len) = (factor as f32, trained as f32, (position + 1).max(trained) as f32);
        let exponent = self.head_dim as f64 / (self.head_dim as f64 - 2.0);
        let growth = f64::from(factor * len / trained - (factor - 1.0)).powf(f64::from(exponent as f32)) as f32;
        self.divided(self.powers(self.rope_theta as f32 * growth).map(|x| 1.0 / x).collect())
    }

    /// All positions below this have the same rotary frequencies.
    pub fn rope_fixed_until(&self) -> usize {
        match self.rope_scaling {
            Some(RopeScaling::Dynamic { trained, .. }) => trained,
            _ => usize::MAX,
        }
    }

    /// What cosines and sines are multiplied by; 1 for all but [`RopeScaling::Yarn`].
    pub fn rope_attention_factor(&self) -> f32 {
        match self.rope_scaling {
            Some(RopeScaling::Yarn { attention_factor, .. }) => attention_factor as f32,
            _ => 1.0,
        }
    }

    /// `theta^(2i / head_dim)`: in f64 and rounded once, the same f32 whatever the platform's `powf`.
    fn powers(&self, theta: f32) -> impl Iterator<Item = f32> {
        let dim = self.head_dim as f32;
        (0..self.head_dim / 2).map(move |i| f64::from(theta).powf(f64::from((2 * i) as f32 / dim)) as f32)
    }

    /// The dimensions between which YaRN's ramp runs.
    fn correction_range(&self, original: usize, fast: f64, slow: f64, truncate: bool) -> (f64, f64) {
        let dim = self.head_dim as f64;
        let turns = |n: f64| dim * (original as f64 / (n * 2.0 * PI)).ln() / (2.0 * self.rope_theta.ln());
        let (low, high) = if truncate { (turns(fast).floor(), turns(slow).ceil()) } else { (turns(fast), turns(slow)) };
        (low.max(0.0), high.min(dim - 1.0))
    }
}

impl Keys<'_> {
    /// The base of the rotary frequencies and their scaling, of a model with this `max_position_embeddings`.
    ///
    /// Old and new files keep these settings in different places. Where both are present, the one that transformers 5
    /// uses counts, and a warning says where they differ.
    pub fn rope(&self, max_position: usize, head_dim: usize) -> Result<(f64, Option<RopeScaling>)> {
        let section = |name: &'static str| match self.get(name) {
            None => Ok(Map::new()),
            Some(Value::Object(map)) => Ok(map.clone()),
            Some(value) => self.wrong(format!("{name} is {}, expected an object or null", super::keys::brief(value))),
        };
        let [newer, older] = [section("rope_parameters")?, section("rope_scaling")?];
        let read = |name: &'static str, map: &Map<String, Value>| {
            Section { name, all: self, own: Keys { path: self.path, map } }.read(max_position, head_dim)
        };
        if older.is_empty() {
            return read("rope_parameters", &newer);
        }
        let found = read("rope_scaling", &older)?;
        if !newer.is_empty() && read("rope_parameters", &newer).ok() != Some(found) {
            self.warn("rope_parameters and rope_scaling differ: rope_scaling is used, as transformers does");
        }
        Ok(found)
    }

    fn warn(&self, what: &str) {
        tracing::warn!("{}: {what}", self.path.display());
    }
}

/// One of the two objects that may hold the settings: `rope_parameters` or `rope_scaling`.
struct Section<'a> {
    name: &'static str,
    all: &'a Keys<'a>,
    own: Keys<'a>,
}

impl Section<'_> {
    fn read(&self, max_position: usize, head_dim: usize) -> Result<(f64, Option<RopeScaling>)> {
        let (all, own, name) = (self.all, &self.own, self.name);
        let theta = self.first("rope_theta", own.number("rope_theta")?, all.number("rope_theta")?);
        let theta = theta.unwrap_or(10000.0);
        if !(1.0..=f64::from(f32::MAX)).contains(&theta) {
            return all.wrong(format!("rope_theta is {theta}, expected a number of at least 1"));
        }
        if let Some(part) = own.number("partial_rotary_factor")?.filter(|&part| part != 1.0) {
            return all.unsupported(format!("{name}.partial_rotary_factor {part}; supported: 1"));
        }
        let kind = match (own.text("rope_type")?, own.text("type")?) {
            (Some(new), Some(old)) if new != old => {
                all.warn(&format!(
                    "{name} has rope_type {new:?} and type {old:?}: the first is used, as transformers does"
                ));
                new
            }
            (new, old) => new.or(old).unwrap_or("default"),
        };
        let original = || -> Result<usize> {
            let key = "original_max_position_embeddings";
            let (outer, inner) = (all.optional_size(key, MAX_SIZE)?, own.optional_size(key, MAX_SIZE)?);
            Ok(self.first(key, outer, inner).unwrap_or(max_position))
        };
        let scaling = match kind {
            "default" => return Ok((theta, None)),
            "linear" => RopeScaling::Linear { factor: self.factor(kind)? },
            "dynamic" if head_dim > 2 => RopeScaling::Dynamic { factor: self.factor(kind)?, trained: max_position },
            "dynamic" => return all.wrong(format!("{name} of type dynamic needs a head_dim above 2")),
            "yarn" if theta > 1.0 => self.yarn(max_position, original()?)?,
            "yarn" => return all.wrong(format!("{name} of type yarn needs a rope_theta above 1")),
            "llama3" => self.llama3(original()?)?,
            other => {
                return all.unsupported(format!(
                    "{name} of type {other:?}; supported: default, linear, dynamic, yarn, llama3"
                ));
            }
        };
        Ok((theta, Some(scaling)))
    }

    /// The setting from the first place where it is found; a warning when the two places differ.
    fn first<T: PartialEq + fmt::Display>(&self, key: &str, a: Option<T>, b: Option<T>) -> Option<T> {
        if let (Some(a), Some(b)) = (&a, &b)
            && a != b
        {
            self.all.warn(&format!(
                "{key} is {a} in one place and {b} in another (the file itself, {}): {a} is used, as transformers does",
                self.name
            ));
        }
        a.or(b)
    }

    /// A number that must be there.
    fn number(&self, key: &str, kind: &str) -> Result<f64> {
        match self.own.number(key)? {
            Some(x) => Ok(x),
            None => self.all.wrong(format!("{}.{key} is missing, expected a number for type {kind}", self.name)),
        }
    }

    fn positive(&self, key: &str, x: f64) -> Result<f64> {
        match (1e-3..=1e6).contains(&x) {
            true => Ok(x),
            false => self.all.wrong(format!("{}.{key} is {x}, expected a number from 0.001 to 1000000", self.name)),
        }
    }

    fn factor(&self, kind: &str) -> Result<f64> {
        self.positive("factor", self.number("factor", kind)?)
    }

    fn yarn(&self, max_position: usize, original_max_seq: usize) -> Result<RopeScaling> {
        let implied = max_position as f64 / original_max_seq as f64;
        let factor = self.positive("factor", self.own.number("factor")?.unwrap_or(implied))?;
        if implied != factor && implied != 1.0 {
            self.all.warn(&format!(
                "{}.factor is {factor}, and max_position_embeddings is {implied} times the original: {factor} is used, as \
                 transformers does",
                self.name
            ));
        }
        // Numbers that are 0 count as absent, as Python's `or` has it.
        let some = |key: &str| Ok(self.own.number(key)?.filter(|x| *x != 0.0));
        let scale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
        let attention_factor = match (self.own.number("attention_factor")?, some("mscale")?, some("mscale_all_dim")?) {
            (Some(given), ..) => given,
            (None, Some(m), Some(all)) => scale(m) / scale(all),
            _ => scale(1.0),
        };
        Ok(RopeScaling::Yarn {
            factor,
            original_max_seq,
            attention_factor: self.positive("attention_factor", attention_factor)?,
            beta_fast: self.positive("beta_fast", some("beta_fast")?.unwrap_or(32.0))?,
            beta_slow: self.positive("beta_slow", some("beta_slow")?.unwrap_or(1.0))?,
            truncate: self.own.get("truncate").is_none() || self.own.flag("truncate")?,
        })
    }

    fn llama3(&self, original_max_seq: usize) -> Result<RopeScaling> {
        let [factor, low, high] =
            ["factor", "low_freq_factor", "high_freq_factor"].map(|key| self.number(key, "llama3"));
        let (factor, low, high) = (factor?, low?, high?);
        // As f32, in which they are used: neither may become infinite, nor their difference zero.
        if !(1.0..=1e6).contains(&factor) || !(1e-6..1e6).contains(&low) || high - low < 1e-6 || high > 1e6 {
            return self.all.wrong(format!(
                "{} has factor {factor}, low_freq_factor {low}, high_freq_factor {high}; expected factor >= 1 and \
                 0 < low_freq_factor < high_freq_factor",
                self.name
            ));
        }
        Ok(RopeScaling::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original_max_seq })
    }
}
