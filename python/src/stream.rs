//! A text as it comes: an iterator of its pieces.
//!
//! A thread of its own generates, into a channel of a few events. Whoever drops the iterator drops the channel, which ends the thread
//! after the next token.

use crate::{
    error::exception,
    wait::{Cancelled, Waited, bug, lock, receive, spawn, wait_for},
};
use aoji::{Event, FinishReason, GenerateOptions, Message, Result, Session, Timings};
use pyo3::{prelude::*, types::PyDict};
use std::sync::{
    Arc, Mutex,
    mpsc::{self, Receiver, SyncSender},
};

/// Events that may wait for Python; the model goes on meanwhile.
const AHEAD: usize = 16;

/// The messages of a conversation.
pub type Talk = Arc<Mutex<Vec<Message>>>;

/// One generation.
pub struct Stream {
    events: Option<Receiver<Result<Event>>>,
    text: String,
    tokens: Vec<u32>,
    finish: Option<(FinishReason, Timings)>,
    /// The conversation that question and answer are to be added to.
    turn: Option<(Talk, String)>,
}

impl Stream {
    /// Nothing more comes. What came of an answer is said in its conversation; a question without any is not.
    pub fn end(&mut self) {
        self.events = None;
        if let Some((talk, question)) = self.turn.take().filter(|_| !self.text.is_empty()) {
            lock(&talk).extend([Message::new("user", question), Message::new("assistant", self.text.clone())]);
        }
    }

    fn take(&mut self, event: Event) -> Option<String> {
        match event {
            Event::Token(token) => self.tokens.push(token),
            Event::Text(piece) => {
                self.text += &piece;
                return Some(piece);
            }
            Event::Finish(reason, timings) => {
                self.finish = Some((reason, timings));
                self.end();
            }
        }
        None
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.end();
    }
}

/// Continues `prompt` in `session` from a thread of its own, and waits until the prompt is computed.
pub fn start(
    py: Python,
    session: &Arc<Mutex<Session>>,
    prompt: Vec<u32>,
    options: GenerateOptions,
    turn: Option<(Talk, String)>,
) -> PyResult<Generation> {
    let ((started, start), (send, events)) = (mpsc::sync_channel(1), mpsc::sync_channel(AHEAD));
    let start = Mutex::new(start);
    let (session, cancelled) = (session.clone(), Cancelled::default());
    let seen = cancelled.clone();
    spawn(move || run(&mut lock(&session), &prompt, &options, &seen, &started, &send))?;
    match receive(py, || wait_for(&lock(&start))) {
        Ok(Some(result)) => result.map_err(exception)?,
        Ok(None) => return Err(bug()),
        Err(signal) => {
            cancelled.set();
            return Err(signal);
        }
    }
    let stream = Stream { events: Some(events), text: String::new(), tokens: Vec::new(), finish: None, turn };
    Ok(Generation(Arc::new(Mutex::new(stream))))
}

fn run(
    session: &mut Session,
    prompt: &[u32],
    options: &GenerateOptions,
    cancelled: &Cancelled,
    started: &SyncSender<Result<()>>,
    send: &SyncSender<Result<Event>>,
) {
    let generation = match session.generate_with(prompt, options, &mut |_, _| !cancelled.get()) {
        Ok(Some(generation)) => generation,
        Ok(None) => return, // nobody waits any more
        Err(error) => return drop(started.send(Err(error))),
    };
    if started.send(Ok(())).is_ok() {
        // An error of sending is a dropped iterator.
        let _ = generation.map(|event| send.send(event)).find(std::result::Result::is_err);
    }
}

/// A text as it comes: an iterator of its pieces.
#[pyclass(frozen, module = "aoji")]
pub struct Generation(pub Arc<Mutex<Stream>>);

#[pymethods]
impl Generation {
    fn __iter__(this: PyRef<Self>) -> PyRef<Self> {
        this
    }

    fn __next__(&self, py: Python) -> PyResult<Option<String>> {
        loop {
            let moment = || match &lock(&self.0).events {
                Some(events) => wait_for(events),
                None => Waited::Got(Ok(Event::Text(String::new()))), // ended: seen below
            };
            let event = receive(py, moment)?;
            let mut stream = lock(&self.0);
            if stream.events.is_none() {
                return Ok(None);
            }
            match event {
                Some(Ok(event)) => {
                    if let Some(piece) = stream.take(event) {
                        return Ok(Some(piece));
                    }
                }
                Some(Err(error)) => {
                    stream.end();
                    return Err(exception(error));
                }
                None => {
                    stream.end();
                    return Err(bug());
                }
            }
        }
    }

    /// All of the text, waiting for its end.
    fn read(&self, py: Python) -> PyResult<String> {
        while self.__next__(py)?.is_some() {}
        Ok(self.text())
    }

    /// Ends it.
    fn close(&self) {
        lock(&self.0).end();
    }

    fn __enter__(this: PyRef<Self>) -> PyRef<Self> {
        this
    }

    fn __exit__(&self, _kind: &Bound<PyAny>, _value: &Bound<PyAny>, _traceback: &Bound<PyAny>) {
        self.close();
    }

    /// The text so far.
    #[getter]
    fn text(&self) -> String {
        lock(&self.0).text.clone()
    }

    /// The tokens so far.
    #[getter]
    fn tokens(&self) -> Vec<u32> {
        lock(&self.0).tokens.clone()
    }

    /// `"stop"` or `"length"`; `None` as long as it has not ended by itself.
    #[getter]
    fn finish_reason(&self) -> Option<&'static str> {
        lock(&self.0).finish.map(|(reason, _)| name(reason))
    }

    /// Times and counts, after the end; else `None`.
    #[getter]
    fn timings<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let finish = lock(&self.0).finish;
        finish.map(|(_, timings)| self::timings(py, &timings)).transpose()
    }
}

pub fn name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

pub fn timings<'py>(py: Python<'py>, t: &Timings) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("prompt_tokens", t.prompt_tokens)?;
    dict.set_item("reused_tokens", t.reused_tokens)?;
    dict.set_item("tokens", t.tokens)?;
    dict.set_item("drafted_tokens", t.drafted_tokens)?;
    dict.set_item("accepted_tokens", t.accepted_tokens)?;
    dict.set_item("prompt_seconds", t.prompt_seconds)?;
    dict.set_item("first_token_seconds", t.first_token_seconds)?;
    dict.set_item("decode_seconds", t.decode_seconds)?;
    dict.set_item("tokens_per_second", t.tokens_per_second())?;
    Ok(dict)
}
