//! A session: one timeline of tokens with its KV cache.

use crate::{
    engine::{Score, scores},
    options::{continuation, encode, options, prompt},
    stream::{Generation, Stream, Talk, start},
    wait::{lock, wait},
};
use aoji::{Engine, Message, Result};
use pyo3::{
    prelude::*,
    types::{PyByteArray, PyDict},
};
use std::sync::{Arc, Mutex, Weak};

/// One timeline of tokens with its KV cache, and a conversation. A call on it ends the generation that still runs in it.
#[pyclass(frozen, module = "aoji")]
pub struct Session {
    engine: Engine,
    session: Arc<Mutex<aoji::Session>>,
    max_tokens: usize,
    /// The generation that runs in it.
    current: Mutex<Weak<Mutex<Stream>>>,
    talk: Talk,
    system: Option<String>,
}

impl Session {
    pub fn new(py: Python, engine: &Engine, max_tokens: Option<usize>, system: Option<String>) -> PyResult<Session> {
        let (own, max_tokens) = (engine.clone(), max_tokens.unwrap_or(engine.max_context()));
        let session = wait(py, move |_| own.session(max_tokens))?;
        Ok(Session {
            engine: engine.clone(),
            session: Arc::new(Mutex::new(session)),
            max_tokens,
            current: Mutex::default(),
            talk: Talk::default(),
            system,
        })
    }

    /// Calls `work` with the session, in which nothing runs any more.
    fn with<T: Send + 'static>(
        &self,
        py: Python,
        work: impl FnOnce(&mut aoji::Session) -> Result<T> + Send + 'static,
    ) -> PyResult<T> {
        self.end();
        let session = self.session.clone();
        wait(py, move |_| work(&mut lock(&session)))
    }

    fn end(&self) {
        let current = lock(&self.current).upgrade();
        if let Some(stream) = current {
            lock(&stream).end();
        }
    }

    pub fn begin(
        &self,
        py: Python,
        prompt: Vec<u32>,
        given: Option<&Bound<PyDict>>,
        turn: Option<(Talk, String)>,
    ) -> PyResult<Generation> {
        let options = options(given)?;
        self.end();
        let generation = start(py, &self.session, prompt, options, turn)?;
        *lock(&self.current) = Arc::downgrade(&generation.0);
        Ok(generation)
    }
}

#[pymethods]
impl Session {
    /// The next question of the session's conversation. What is asked and what came of the answer are added to `messages`.
    #[pyo3(signature = (text, **options))]
    fn chat(&self, py: Python, text: String, options: Option<&Bound<PyDict>>) -> PyResult<Generation> {
        self.end(); // what is still being said belongs to the conversation
        let mut messages = lock(&self.talk).clone();
        messages.push(Message::new("user", &text));
        let prompt = encode(&self.engine, &messages, self.system.as_deref())?;
        self.begin(py, prompt, options, Some((self.talk.clone(), text)))
    }

    /// Continues a text or token ids.
    #[pyo3(signature = (prompt, **options))]
    fn generate(&self, py: Python, prompt: &Bound<PyAny>, options: Option<&Bound<PyDict>>) -> PyResult<Generation> {
        let prompt = self::prompt(&self.engine, prompt)?;
        self.begin(py, prompt, options, None)
    }

    /// Makes the timeline equal to a text or token ids; how many tokens did not have to be computed.
    fn sync(&self, py: Python, prompt: &Bound<PyAny>) -> PyResult<usize> {
        let tokens = self::prompt(&self.engine, prompt)?;
        self.end();
        let session = self.session.clone();
        wait(py, move |cancelled| lock(&session).sync_with(&tokens, &mut |_, _| !cancelled.get()).map(|(same, _)| same))
    }

    /// Adds a token to the timeline.
    fn step(&self, py: Python, token: u32) -> PyResult<()> {
        self.with(py, move |session| session.step(token))
    }

    /// The logits after the last token, as a numpy array of float32.
    fn logits<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let logits = self.with(py, aoji::Session::logits)?;
        let bytes: Vec<u8> = logits.iter().flat_map(|logit| logit.to_ne_bytes()).collect();
        let bytes = PyByteArray::new(py, &bytes); // unlike bytes, what an array may write to
        py.import("numpy")?.call_method1("frombuffer", (bytes, "float32"))
    }

    /// How likely each continuation is after a prefix, which is computed once.
    fn score(&self, py: Python, prefix: &Bound<PyAny>, continuations: Vec<Bound<PyAny>>) -> PyResult<Vec<Score>> {
        let prefix = self::prompt(&self.engine, prefix)?;
        let continuations: Vec<_> =
            continuations.iter().map(|c| continuation(&self.engine, c)).collect::<PyResult<_>>()?;
        self.with(py, move |session| session.score(&prefix, &continuations).map(scores))
    }

    /// The conversation so far.
    #[getter]
    fn messages<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        let message = |message: &Message| {
            let dict = PyDict::new(py);
            dict.set_item("role", &message.role)?;
            dict.set_item("content", &message.content)?;
            Ok(dict)
        };
        lock(&self.talk).iter().map(message).collect()
    }

    /// Tokens of the timeline.
    #[getter]
    fn tokens(&self, py: Python) -> PyResult<Vec<u32>> {
        self.with(py, |session| Ok(session.tokens().to_vec()))
    }

    /// Most tokens of the timeline.
    #[getter]
    fn max_tokens(&self) -> usize {
        self.max_tokens
    }
}
