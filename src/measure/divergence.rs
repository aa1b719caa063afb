//! How far the predictions of one model are from those of another on a text, for example of a quantized model and its
//! original.
//!
//! At each token, the divergence is that of Kullback and Leibler between the base's distribution `p` and the model's
//! `q` over the whole vocabulary, `sum(p ln(p / q))` in nats: how much more a text of the base costs when it is
//! predicted by the model. Mean, 99th percentile and the share of tokens at which the most likely one is the same are
//! what llama.cpp's `--kl-divergence` reports.

use super::verify::argmax;
use crate::{
    engine::{Engine, score::Window},
    error::{Error, Result},
};
use serde::Serialize;
use std::fmt;

/// How many positions have their logits held at once: one row of the vocabulary each.
const ROWS: usize = 32;

/// What the comparison found.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Tokens that were predicted.
    pub tokens: usize,
    /// Windows that the text was cut into.
    pub windows: usize,
    /// Tokens of a window.
    pub window: usize,
    /// Mean divergence, in nats.
    pub mean_kl: f64,
    /// Its standard error.
    pub mean_kl_stderr: f64,
    /// 99th percentile.
    pub p99_kl: f64,
    /// Largest.
    pub max_kl: f64,
    /// Share of the tokens at which both have the same most likely one.
    pub same_top: f64,
    /// Perplexity of the text by the model.
    pub perplexity: f64,
    /// Perplexity of the text by the base.
    pub base_perplexity: f64,
}

/// Compares `model` with `base` on `tokens`, cut into windows of `window` tokens, the first of which is only given.
/// `progress` gets `(tokens done, tokens in all)`; if it returns `false`, the result is `None`.
///
/// # Errors
/// `Input` when the vocabularies differ in size or there are fewer than two tokens, `Context` when a window does not fit either.
pub fn divergence(
    model: &Engine,
    base: &Engine,
    tokens: &[u32],
    window: usize,
    progress: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Option<Report>> {
    let vocab = model.config().vocab;
    if vocab != base.config().vocab {
        let other = base.config().vocab;
        return Err(Error::Input(format!("the models have {vocab} and {other} tokens: they cannot be compared")));
    }
    let windows = Window::strided(tokens.len(), window, window);
    let total: usize = windows.iter().map(|w| w.end - w.from).sum();
    if total == 0 {
        return Err(Error::Input("the text has no token to predict: it needs at least two".into()));
    }
    let longest = window.min(tokens.len());
    let (mut of_model, mut of_base) = (model.session(longest)?, base.session(longest)?);
    let (mut kls, mut same, mut nll) = (Vec::with_capacity(total), 0, [0f64; 2]);
    let mut rows = vec![0f32; ROWS * vocab];
    for w in &windows {
        let ids = &tokens[w.begin..w.end];
        let first = w.from - w.begin - 1; // its logits predict the first token that is scored
        for from in (first..ids.len() - 1).step_by(ROWS) {
            let to = (from + ROWS).min(ids.len() - 1);
            of_base.logits_of(&ids[..to], from, &mut |i, logits| {
                rows[(i - from) * vocab..][..vocab].copy_from_slice(logits);
            })?;
            of_model.logits_of(&ids[..to], from, &mut |i, logits| {
                let base = &rows[(i - from) * vocab..][..vocab];
                kls.push(kl(base, logits));
                same += usize::from(argmax(base) == argmax(logits));
                for (nll, logits) in nll.iter_mut().zip([logits, base]) {
                    *nll += log_sum(logits) - f64::from(logits[ids[i + 1] as usize]);
                }
            })?;
            if !progress(kls.len(), total) {
                return Ok(None);
            }
        }
    }
    let n = kls.len() as f64;
    let mean = kls.iter().sum::<f64>() / n;
    let variance = kls.iter().map(|kl| (kl - mean).powi(2)).sum::<f64>() / n;
    kls.sort_by(f64::total_cmp);
    Ok(Some(Report {
        tokens: kls.len(),
        windows: windows.len(),
        window,
        mean_kl: mean,
        mean_kl_stderr: (variance / n).sqrt(),
        p99_kl: kls[kls.len() * 99 / 100],
        max_kl: kls[kls.len() - 1],
        same_top: same as f64 / n,
        perplexity: (nll[0] / n).exp(),
        base_perplexity: (nll[1] / n).exp(),
    }))
}

/// `ln sum(exp(x))`, in f64.
fn log_sum(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    f64::from(max) + logits.iter().map(|x| f64::from(x - max).exp()).sum::<f64>().ln()
}

/// Divergence between the distributions with logits `p` and `q`. Rounding may not make it negative for equal ones.
fn kl(p: &[f32], q: &[f32]) -> f64 {
    let (of_p, of_q) = (log_sum(p), log_sum(q));
    let term = |(p, q): (&f32, &f32)| {
        let (p, q) = (f64::from(*p) - of_p, f64::from(*q) - of_q);
        p.exp() * (p - q)
    };
    p.iter().zip(q).map(term).sum::<f64>().max(0.0)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ratio = self.perplexity / self.base_perplexity;
        writeln!(f, "{:>14}  tokens in {} windows of {}", self.tokens, self.windows, self.window)?;
        writeln!(f, "{:>14.6}  divergence in nats, mean (standard error {:.6})", self.mean_kl, self.mean_kl_stderr)?;
        writeln!(f, "{:>14.6}  99th percentile", self.p99_kl)?;
        writeln!(f, "{:>14.6}  largest", self.max_kl)?;
        writeln!(f, "{:>14.4}  of the tokens have the same most likely one", self.same_top)?;
        write!(f, "{:>14.4}  perplexity, the base's is {:.4}: {ratio:.4} times", self.perplexity, self.base_perplexity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, engine::Options};

    #[test]
    fn divergence_of_two_distributions() {
        // (1/2, 1/4, 1/4) from (1/4, 1/4, 1/2): ln(2) / 2 - ln(2) / 4
        let (p, q) = ([2f32.ln(), 0.0, 0.0], [5.0, 5.0, 5.0 + 2f32.ln()]);
        assert!((kl(&p, &q) - 0.25 * 2f64.ln()).abs() < 1e-7, "{}", kl(&p, &q));
        assert_eq!(kl(&q, &q), 0.0);
        assert!(kl(&[100.0, -100.0], &[-100.0, 100.0]) > 199.0);
    }

    #[test]
    fn a_model_does_not_differ_from_itself() {
        let engine = Engine::open("demo", &Options { device: Device::Cpu, ..Options::default() }).unwrap();
        let tokens: Vec<u32> = (0..101).map(|i| i * 7 % 2000).collect();
        let report = divergence(&engine, &engine, &tokens, 40, &mut |_, _| true).unwrap().unwrap();
        assert_eq!((report.tokens, report.windows), (98, 3), "the first of each window is given");
        assert_eq!((report.mean_kl, report.max_kl, report.same_top), (0.0, 0.0, 1.0));
        assert_eq!(report.perplexity, report.base_perplexity);
        let mut session = engine.session(101).unwrap();
        let sum: f64 = [&tokens[..40], &tokens[40..80], &tokens[80..]]
            .map(|part| session.score(&part[..1], &[&part[1..]]).unwrap().continuations[0].sum())
            .iter()
            .sum();
        assert!((report.perplexity / (-sum / 98.0).exp() - 1.0).abs() < 1e-5);
        assert!(divergence(&engine, &engine, &tokens, 40, &mut |_, _| false).unwrap().is_none());
        assert!(divergence(&engine, &engine, &[5], 40, &mut |_, _| true).is_err());
    }
}
