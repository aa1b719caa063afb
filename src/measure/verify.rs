//! Compares this engine with Hugging Face transformers, by stored results of theirs ("goldens").
//!
//! A file of goldens (`golden.json`) holds, for each prompt, the greedy tokens of transformers with the five largest
//! logits of each step, and some texts with the log-probabilities of their tokens. The comparison is teacher-forced:
//! after each step the engine is given the token of transformers, whatever its own choice was, so that one early tie
//! does not decide everything after it.
//!
//! Two measures are reported, each as mean and 99th percentile. The *error* is how far our logit is from theirs, for
//! each of the five tokens. The *regret* is how far their logit for the token that we would choose is below their best
//! logit; it is 0 where both agree.

use crate::{
    engine::Engine,
    error::{Error, Result},
};
#[cfg(feature = "cuda")]
use crate::{engine::Options, engine::Sampling, files::ModelFiles, files::Startup, ops::KvDtype};
use serde::{Deserialize, Serialize};
use std::{fmt, fs, path::Path};

#[derive(Deserialize)]
struct Golden {
    model: String,
    /// Type in which HF computed.
    #[serde(default = "float32")]
    dtype: String,
    cases: Vec<Case>,
    #[serde(default)]
    scores: Vec<Score>,
}

fn float32() -> String {
    "float32".into()
}

#[derive(Deserialize)]
struct Case {
    prompt: String,
    prompt_ids: Vec<u32>,
    generated_ids: Vec<u32>,
    steps: Vec<Step>,
}

#[derive(Deserialize)]
struct Step {
    top5: Vec<(u32, f64)>,
    margin: f64,
}

#[derive(Deserialize)]
struct Score {
    ids: Vec<u32>,
    token_logprobs: Vec<f64>,
}

/// A step at which we would choose another token than HF.
#[derive(Debug, Clone, Serialize)]
pub struct Disagreement {
    /// Beginning of the prompt.
    pub prompt: String,
    /// Number of the generated token.
    pub step: usize,
    /// HF's choice.
    pub expected: u32,
    /// Ours.
    pub found: u32,
    /// Difference between HF's best and second-best logit.
    pub margin: f64,
    /// HF's logit of its choice minus that of ours; absent when ours is not among HF's five.
    pub regret: Option<f64>,
}

/// What the comparison found.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// As the goldens name it.
    pub model: String,
    /// Type that HF computed in.
    pub reference: String,
    /// Where the engine ran.
    pub device: String,
    /// Steps compared.
    pub steps: usize,
    /// Mean distance of our logits from HF's.
    pub mean_error: f64,
    /// 99th percentile of the distance.
    pub p99_error: f64,
    /// Mean regret.
    pub mean_regret: f64,
    /// Largest regret.
    pub max_regret: f64,
    /// Tokens of the texts.
    pub scored: usize,
    /// Mean distance of our log-probabilities from HF's.
    pub mean_logprob_error: f64,
    /// Largest distance of a text's summed log-probability, relative to HF's.
    pub max_sum_error: f64,
    /// The steps at which the engine would choose another token.
    pub disagreements: Vec<Disagreement>,
}

/// What is allowed; see [`Limits::F32`] and [`Limits::BF16`] for where the numbers come from.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// For [`Report::mean_error`].
    pub mean_error: f64,
    /// For [`Report::p99_error`].
    pub p99_error: f64,
    /// Largest margin at which another choice counts as a tie.
    pub tie: f64,
}

impl Limits {
    /// f32 against f32, where only the order of sums differs. It cannot be much tighter: two f32 implementations differ
    /// by about 1e-5 for logits of 20.
    pub const F32: Limits = Limits { mean_error: 1e-4, p99_error: 1e-3, tie: 1e-3 };
    /// bf16 activations against f32. It cannot be much tighter: the CPU reference on SmolLM2 has mean 0.092, p99 0.43
    /// and chooses another token at margins up to 0.051 (stories260K: 0.033, 0.12, 0.071). Each limit is about 1.5
    /// times that, the tie twice that.
    pub const BF16: Limits = Limits { mean_error: 0.14, p99_error: 0.65, tie: 0.15 };
}

impl Report {
    /// `Ok` if everything is within the limits; otherwise the error says what is not.
    pub fn verdict(&self, limits: &Limits) -> Result<(), String> {
        let within = |what: &str, x: f64, limit: f64| match x <= limit {
            true => Ok(()),
            false => Err(format!("{what} is {x:.3e}, allowed {limit:.1e}")),
        };
        within("mean logit error", self.mean_error, limits.mean_error)?;
        within("99th percentile of the logit error", self.p99_error, limits.p99_error)?;
        within("mean log-probability error", self.mean_logprob_error, limits.mean_error)?;
        match self.disagreements.iter().find(|d| d.margin > limits.tie) {
            None => Ok(()),
            Some(d) => Err(format!(
                "step {} of {:?}: token {} instead of {}, no tie: HF's margin is {:.4}",
                d.step, d.prompt, d.found, d.expected, d.margin
            )),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} on {}, against HF transformers in {}", self.model, self.device, self.reference)?;
        writeln!(f, "  steps            {}", self.steps)?;
        writeln!(f, "  logit error      mean {:.2e}, p99 {:.2e}", self.mean_error, self.p99_error)?;
        writeln!(f, "  regret           mean {:.2e}, max {:.2e}", self.mean_regret, self.max_regret)?;
        writeln!(
            f,
            "  log-probability  mean error {:.2e} over {} tokens, sums off by at most {:.2e}",
            self.mean_logprob_error, self.scored, self.max_sum_error
        )?;
        write!(f, "  other tokens     {}", self.disagreements.len())?;
        for d in &self.disagreements {
            write!(f, "\n    {:?} step {}: {} for {}, margin {:.4}", d.prompt, d.step, d.found, d.expected, d.margin)?;
        }
        Ok(())
    }
}

/// Compares the engine with a goldens file; `progress` gets `(prompts done, prompts in all)`.
pub fn verify(engine: &Engine, golden: &Path, progress: &mut dyn FnMut(usize, usize)) -> Result<Report> {
    let text = fs::read_to_string(golden).map_err(Error::io(golden))?;
    let g: Golden = serde_json::from_str(&text).map_err(|e| Error::file(golden, format!("not a goldens file: {e}")))?;
    let longest = |n: usize, ids: usize| n.max(ids);
    let cases = g.cases.iter().map(|c| c.prompt_ids.len() + c.generated_ids.len());
    let context = cases.chain(g.scores.iter().map(|s| s.ids.len())).fold(1, longest);
    let mut session = engine.session(context)?;
    let (mut errors, mut regrets, mut disagreements) = (Vec::new(), Vec::new(), Vec::new());
    let total = g.cases.len() + g.scores.len();
    for (done, c) in g.cases.iter().enumerate() {
        progress(done, total);
        if c.steps.len() > c.generated_ids.len() || c.prompt_ids.is_empty() {
            return Err(Error::file(golden, format!("case {:?} has more steps than tokens", c.prompt)));
        }
        let vocab = engine.config().vocab;
        let mut top5 = c.steps.iter().enumerate().flat_map(|(i, step)| step.top5.iter().map(move |(id, _)| (i, *id)));
        if let Some((step, id)) = top5.find(|(_, id)| *id as usize >= vocab) {
            let what = format!(
                "case {:?}: step {step} has token {id} among its five, expected ids below {vocab}: these are the goldens of another \
                 model",
                c.prompt
            );
            return Err(Error::file(golden, what));
        }
        let ids: Vec<u32> = c.prompt_ids.iter().chain(&c.generated_ids).copied().collect();
        let first = c.prompt_ids.len() - 1; // its logits choose the first generated token
        session.logits_of(&ids[..first + c.steps.len()], first, &mut |i, logits| {
            let (step, expected) = (&c.steps[i - first], c.generated_ids[i - first]);
            errors.extend(step.top5.iter().map(|&(t, x)| (f64::from(logits[t as usize]) - x).abs()));
            let found = argmax(logits);
            let theirs = |t: u32| step.top5.iter().find(|(id, _)| *id == t).map(|(_, x)| *x);
            let regret = theirs(expected).zip(theirs(found)).map(|(best, ours)| best - ours);
            regrets.push(regret.unwrap_or(step.margin));
            if found != expected {
                let prompt = c.prompt.chars().take(30).collect();
                disagreements.push(Disagreement {
                    prompt,
                    step: i - first,
                    expected,
                    found,
                    margin: step.margin,
                    regret,
                });
            }
        })?;
    }
    let (mut logprob_errors, mut max_sum_error) = (Vec::new(), 0f64);
    for (done, s) in g.scores.iter().enumerate() {
        progress(g.cases.len() + done, total);
        let mut sum = 0.0;
        session.logits_of(&s.ids, 0, &mut |i, logits| {
            if let (Some(&next), Some(theirs)) = (s.ids.get(i + 1), s.token_logprobs.get(i)) {
                let ours = log_softmax(logits, next);
                sum += ours;
                logprob_errors.push((ours - theirs).abs());
            }
        })?;
        let theirs: f64 = s.token_logprobs.iter().sum();
        max_sum_error = max_sum_error.max((sum - theirs).abs() / theirs.abs().max(1.0));
    }
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len().max(1) as f64;
    errors.sort_by(f64::total_cmp);
    Ok(Report {
        model: g.model,
        reference: g.dtype,
        device: engine.device().to_string(),
        steps: regrets.len(),
        mean_error: mean(&errors),
        p99_error: errors.get(errors.len() * 99 / 100).copied().unwrap_or(0.0),
        mean_regret: mean(&regrets),
        max_regret: regrets.iter().copied().fold(0.0, f64::max),
        scored: logprob_errors.len(),
        mean_logprob_error: mean(&logprob_errors),
        max_sum_error,
        disagreements,
    })
}

/// Runs the model on GPU `gpu` beside the CPU reference, comparing what every op computes: a prompt of random tokens, then
/// `steps` greedy and `steps` drawn ones, with keys and values stored as `kv`. Returns the name of the GPU.
///
/// # Errors
/// `Disagree` names the first op whose output differs by more than its tolerance, with its sizes and the element; `Context` when
/// prompt and steps do not fit the model's context; and those of opening the GPU.
#[cfg(feature = "cuda")]
pub fn lockstep(files: ModelFiles, gpu: usize, kv: KvDtype, prompt: usize, steps: usize) -> Result<String> {
    let max = files.config.max_seq;
    let needed = prompt + steps;
    if prompt == 0 || needed > max {
        return Err(Error::Context { needed, max });
    }
    let vocab = files.config.vocab;
    let both = crate::backend::lockstep::Lockstep::new(crate::backend::cuda::Cuda::open(gpu)?)?;
    let name = both.device().info().name.clone();
    let options = Options { context: Some(needed), kv, ..Options::default() };
    let engine = Engine::load_on(both, files, |_| Ok(None), &options, &Startup::begin(), &mut |_, _| {})?;
    let drawn = Sampling { temperature: 0.8, top_k: 40, repetition_penalty: 1.1, seed: 1, ..Sampling::default() };
    for (seed, sampling) in [Sampling::default(), drawn].into_iter().enumerate() {
        let mut session = engine.session(needed)?;
        session.sync(&crate::measure::bench::tokens(prompt, vocab, seed as u64))?;
        session.decode(&sampling, &[])?.take(steps).try_for_each(|token| token.map(drop))?;
        let all = session.tokens().to_vec();
        session.score(&all[..prompt], &[&all[prompt..]])?;
    }
    Ok(name)
}

/// The lowest id of the largest logit.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (i, x) in logits.iter().enumerate() {
        if *x > logits[best] {
            best = i;
        }
    }
    best as u32
}

/// `ln softmax(logits)[id]`, summed in f64.
pub fn log_softmax(logits: &[f32], id: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - max).exp()).sum();
    f64::from(logits[id as usize] - max) - sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, Options};
    use serde_json::json;

    #[test]
    fn goldens_of_another_model_are_refused() {
        let engine = Engine::open("demo", &Options { device: Device::Cpu, ..Options::default() }).unwrap();
        let (file, vocab) = (tempfile::NamedTempFile::new().unwrap(), engine.config().vocab);
        let compare = |id: usize| {
            let steps = json!([{"top5": [[65, 1.0], [id, 0.5]], "margin": 0.5}]);
            let case = json!({"prompt": "A", "prompt_ids": [65], "generated_ids": [65], "steps": steps});
            fs::write(&file, json!({"model": "m", "cases": [case]}).to_string()).unwrap();
            verify(&engine, file.path(), &mut |_, _| {})
        };
        assert_eq!(compare(vocab - 1).unwrap().steps, 1);
        for id in [vocab, u32::MAX as usize] {
            let error = compare(id).unwrap_err().to_string();
            let words = [file.path().to_str().unwrap(), "case \"A\": step 0", &format!("token {id}"), "another model"];
            words.iter().for_each(|word| assert!(error.contains(word), "{error:?} lacks {word:?}"));
        }
    }
}
