//! An engine: a loaded model.

use crate::{
    error::exception,
    options::{continuation, encode, messages, named, options, prompt, tokenize},
    session::Session,
    stream::{Generation, name, timings},
    wait::wait,
};
use aoji::{
    Activations, BatchOptions, Device, Finish, Job, JobEvent, KvDtype, Options, Tokenizer,
    score::{Request, Scores, first_token},
};
use pyo3::{
    prelude::*,
    types::{PyDict, PyString},
};
use std::num::NonZeroUsize;

/// How likely a continuation is.
#[pyclass(frozen, get_all, module = "aoji")]
pub struct Score {
    /// Natural logarithm of its probability.
    logprob: f64,
    /// The same of each of its tokens, given those before.
    logprobs: Vec<f32>,
    /// Whether it is what the model itself would have written.
    greedy: bool,
}

#[pymethods]
impl Score {
    fn __repr__(&self) -> String {
        let greedy = if self.greedy { "True" } else { "False" };
        format!("Score(logprob={:?}, tokens={}, greedy={greedy})", self.logprob, self.logprobs.len())
    }
}

pub fn scores(scores: Scores) -> Vec<Score> {
    let score = |c: &aoji::score::Continuation| Score {
        logprob: c.sum(),
        logprobs: c.0.iter().map(|token| token.logprob).collect(),
        greedy: c.greedy(),
    };
    scores.continuations.iter().map(score).collect()
}

/// An answer of a batch.
#[pyclass(frozen, module = "aoji")]
#[derive(Default)]
pub struct Answer {
    #[pyo3(get)]
    text: String,
    #[pyo3(get)]
    tokens: Vec<u32>,
    finish: Option<Finish>,
}

#[pymethods]
impl Answer {
    /// `"stop"` or `"length"`.
    #[getter]
    fn finish_reason(&self) -> Option<&'static str> {
        self.finish.as_ref().map(|finish| name(finish.reason))
    }

    /// Times and counts.
    #[getter]
    fn timings<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        self.finish.as_ref().map(|finish| timings(py, &finish.timings)).transpose()
    }

    fn __str__(&self) -> &str {
        &self.text
    }
}

/// A loaded model, which any number of threads may use.
#[pyclass(frozen, module = "aoji")]
pub struct Engine(aoji::Engine);

#[pymethods]
impl Engine {
    #[new]
    #[allow(clippy::too_many_arguments)] // keywords in Python
    #[pyo3(signature = (model = "demo", *, device = "auto", context = None, threads = None, activations = "bf16", sequences = 1, cache_tokens = None, kv = "auto", widen = false, quantize = None, draft = None))]
    fn open(
        py: Python,
        model: &str,
        device: &str,
        context: Option<usize>,
        threads: Option<NonZeroUsize>,
        activations: &str,
        sequences: usize,
        cache_tokens: Option<usize>,
        kv: &str,
        widen: bool,
        quantize: Option<&str>,
        draft: Option<String>,
    ) -> PyResult<Engine> {
        let device: Device = named("device", device)?;
        let activations: Activations = named("activations", activations)?;
        let kv: KvDtype = named("kv", kv)?;
        let quantize = quantize.map(|format| named("quantize", format)).transpose()?;
        let options = Options {
            device,
            activations,
            context,
            sequences,
            cache_tokens,
            kv,
            threads,
            widen,
            quantize,
            draft: None,
        };
        let model = model.to_string();
        let open = move || match draft {
            None => aoji::Engine::open(&model, &options),
            Some(draft) => aoji::Engine::open(&model, &options.with_draft(&draft, &model)?),
        };
        wait(py, move |_| open()).map(Engine)
    }

    /// Answers a question, or the last of some messages.
    #[pyo3(signature = (question, *, system = None, **options))]
    fn chat(
        &self,
        py: Python,
        question: &Bound<PyAny>,
        system: Option<&str>,
        options: Option<&Bound<PyDict>>,
    ) -> PyResult<Generation> {
        self.continued(py, encode(&self.0, &messages(question)?, system)?, options)
    }

    /// Continues a text or token ids.
    #[pyo3(signature = (prompt, **options))]
    fn generate(&self, py: Python, prompt: &Bound<PyAny>, options: Option<&Bound<PyDict>>) -> PyResult<Generation> {
        self.continued(py, self::prompt(&self.0, prompt)?, options)
    }

    /// An empty session with room for `max_tokens` tokens: as many as the model allows, where nothing is said.
    #[pyo3(signature = (max_tokens = None, *, system = None))]
    fn session(&self, py: Python, max_tokens: Option<usize>, system: Option<String>) -> PyResult<Session> {
        Session::new(py, &self.0, max_tokens, system)
    }

    /// How likely each continuation is after a context. Texts are divided into tokens as lm-evaluation-harness does, with the model's
    /// BOS in front if `bos`.
    #[pyo3(signature = (context, continuations, *, bos = true))]
    fn score(
        &self,
        py: Python,
        context: &Bound<PyAny>,
        continuations: Vec<Bound<PyAny>>,
        bos: bool,
    ) -> PyResult<Vec<Score>> {
        let texts: PyResult<Vec<String>> = continuations.iter().map(|c| c.extract()).collect();
        let request = match (context.cast::<PyString>(), texts) {
            (Ok(context), Ok(texts)) => {
                let first = first_token(&self.0).map_err(exception)?;
                let tokenizer = self.0.tokenizer().map_err(exception)?;
                Request::encode(tokenizer, context.to_str()?, &texts, bos, first).map_err(exception)?
            }
            _ => Request {
                context: prompt(&self.0, context)?,
                continuations: continuations.iter().map(|c| continuation(&self.0, c)).collect::<PyResult<_>>()?,
            },
        };
        let engine = self.0.clone();
        wait(py, move |_| engine.score(&request.context, &request.continuations).map(scores))
    }

    /// Continues several prompts at once, `sequences` at a time, with memory for the keys and values of `cache_tokens`. Each gets what it
    /// would get alone.
    #[pyo3(signature = (prompts, *, sequences = 8, cache_tokens = None, **options))]
    fn batch(
        &self,
        py: Python,
        prompts: Vec<Bound<PyAny>>,
        sequences: usize,
        cache_tokens: Option<usize>,
        options: Option<&Bound<PyDict>>,
    ) -> PyResult<Vec<Answer>> {
        let options = crate::options::options(options)?;
        let prompts: Vec<_> = prompts.iter().map(|p| prompt(&self.0, p)).collect::<PyResult<_>>()?;
        let (engine, longest) = (self.0.clone(), prompts.iter().map(Vec::len).max().unwrap_or(0));
        let max_tokens = longest.saturating_add(options.max_tokens.unwrap_or(usize::MAX)).min(engine.max_context());
        let sizes = BatchOptions { sequences, max_tokens, cache_tokens, ..BatchOptions::default() };
        wait(py, move |cancelled| {
            let mut batch = engine.batch(&sizes)?;
            let mut answers: Vec<Answer> = prompts.iter().map(|_| Answer::default()).collect();
            for prompt in prompts {
                batch.submit(Job { prompt, options: options.clone(), ..Job::default() })?; // numbered in this order
            }
            let mut each = |id: aoji::JobId, event| {
                let answer = &mut answers[id.0 as usize];
                match event {
                    JobEvent::Token(token, _) => answer.tokens.push(token),
                    JobEvent::Text(piece) => answer.text += &piece,
                    JobEvent::Finish(finish) => answer.finish = Some(finish),
                    _ => {} // not asked for
                }
            };
            while !cancelled.get() && batch.step(&mut each)? {}
            Ok(answers)
        })
    }

    /// The tokens of a text. `special`: the text of a special token becomes that token, which is not for texts of somebody else.
    /// `bos`: the model's BOS stands in front, once.
    #[pyo3(signature = (text, *, special = false, bos = false))]
    fn tokenize(&self, text: &str, special: bool, bos: bool) -> PyResult<Vec<u32>> {
        tokenize(&self.0, text, special, bos)
    }

    /// The text of tokens, with special ones if `special`.
    #[pyo3(signature = (tokens, *, special = false))]
    fn detokenize(&self, tokens: Vec<u32>, special: bool) -> PyResult<String> {
        self.0.tokenizer().and_then(|tokenizer| tokenizer.decode(&tokens, !special)).map_err(exception)
    }

    /// The tokens of the prompt that asks a question, or for the answer to the last of some messages.
    #[pyo3(signature = (question, *, system = None))]
    fn prompt(&self, question: &Bound<PyAny>, system: Option<&str>) -> PyResult<Vec<u32>> {
        encode(&self.0, &messages(question)?, system)
    }

    /// The options that the model's author recommends, for `**engine.recommended`.
    #[getter]
    fn recommended<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (by, dict) = (&self.0.config().sampling, PyDict::new(py));
        let numbers = [
            ("temperature", by.temperature),
            ("top_p", by.top_p),
            ("min_p", by.min_p),
            ("repetition_penalty", by.repetition_penalty),
        ];
        for (name, value) in numbers.into_iter().filter_map(|(name, value)| Some((name, value?))) {
            dict.set_item(name, value)?;
        }
        if let Some(top_k) = by.top_k {
            dict.set_item("top_k", top_k)?;
        }
        Ok(dict)
    }

    /// Tokens of the vocabulary: ids are below, and so many are the logits.
    #[getter]
    fn vocab(&self) -> usize {
        self.0.config().vocab
    }

    /// Most tokens of a session.
    #[getter]
    fn max_context(&self) -> usize {
        self.0.max_context()
    }

    /// The device that it runs on, for people.
    #[getter]
    fn device(&self) -> &str {
        self.0.device()
    }

    /// Whether that is a GPU.
    #[getter]
    fn is_gpu(&self) -> bool {
        self.0.is_gpu()
    }

    /// The token that begins a text.
    #[getter]
    fn bos(&self) -> Option<u32> {
        self.0.tokenizer().ok().and_then(Tokenizer::bos).or(self.0.config().bos)
    }

    /// The tokens that end a text.
    #[getter]
    fn eos(&self) -> Vec<u32> {
        self.0.config().eos.clone()
    }

    fn __repr__(&self) -> String {
        format!("<aoji.Engine on {}, context {}>", self.0.device(), self.0.max_context())
    }
}

impl Engine {
    /// In a session of its own, with room for what may come.
    fn continued(&self, py: Python, prompt: Vec<u32>, given: Option<&Bound<PyDict>>) -> PyResult<Generation> {
        let most = options(given)?.max_tokens.unwrap_or(usize::MAX);
        let room = prompt.len().saturating_add(most).min(self.0.max_context());
        Session::new(py, &self.0, Some(room.max(1)), None)?.begin(py, prompt, given, None)
    }
}
