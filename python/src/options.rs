//! How a text goes on: the keyword arguments that all calls share, and what may be given as a prompt.

use crate::error::{InputError, exception};
use aoji::{Engine, GenerateOptions, Message, Sampling, Speculate};
use pyo3::{
    exceptions::PyTypeError,
    prelude::*,
    types::{PyDict, PyString},
};
use std::collections::BTreeMap;

/// Texts, of which one may come alone.
#[derive(FromPyObject)]
enum Texts {
    One(String),
    Many(Vec<String>),
}

/// Whether there are guesses, or where they come from.
#[derive(FromPyObject)]
enum Guesses {
    Whether(bool),
    Of(String),
}

/// Takes an argument out of `rest`; `None` is one that is not given.
fn take<'py, T>(rest: &Bound<'py, PyDict>, name: &str) -> PyResult<Option<T>>
where
    T: for<'a> FromPyObject<'a, 'py, Error = PyErr>,
{
    let Some(value) = rest.get_item(name)? else { return Ok(None) };
    rest.del_item(name)?;
    if value.is_none() {
        return Ok(None);
    }
    value.extract().map_err(|error: PyErr| {
        let (py, kind) = (rest.py(), error.get_type(rest.py()));
        PyErr::from_type(kind, format!("{name}: {}", error.value(py)))
    })
}

/// What the keyword arguments of a call ask for.
pub fn options(given: Option<&Bound<PyDict>>) -> PyResult<GenerateOptions> {
    let Some(given) = given else { return Ok(GenerateOptions::default()) };
    let (rest, default) = (&given.copy()?, Sampling::default());
    let options = GenerateOptions {
        sampling: Sampling {
            temperature: take(rest, "temperature")?.unwrap_or(default.temperature),
            top_k: take(rest, "top_k")?.unwrap_or(default.top_k),
            top_p: take(rest, "top_p")?.unwrap_or(default.top_p),
            min_p: take(rest, "min_p")?.unwrap_or(default.min_p),
            repetition_penalty: take(rest, "repetition_penalty")?.unwrap_or(default.repetition_penalty),
            frequency_penalty: take(rest, "frequency_penalty")?.unwrap_or(default.frequency_penalty),
            presence_penalty: take(rest, "presence_penalty")?.unwrap_or(default.presence_penalty),
            logit_bias: take::<BTreeMap<u32, f32>>(rest, "logit_bias")?.unwrap_or_default().into_iter().collect(),
            seed: take(rest, "seed")?.unwrap_or(default.seed),
            min_tokens: take(rest, "min_tokens")?.unwrap_or(default.min_tokens),
        },
        max_tokens: take(rest, "max_tokens")?,
        stop: match take(rest, "stop")? {
            None => Vec::new(),
            Some(Texts::One(text)) => vec![text],
            Some(Texts::Many(texts)) => texts,
        },
        stop_ids: take(rest, "stop_ids")?.unwrap_or_default(),
        include_stop: take(rest, "include_stop")?.unwrap_or(false),
        keep_special: take(rest, "keep_special")?.unwrap_or(false),
        ignore_eos: take(rest, "ignore_eos")?.unwrap_or(false),
        speculate: match take(rest, "speculate")? {
            None | Some(Guesses::Whether(false)) => Speculate::Off,
            Some(Guesses::Whether(true)) => Speculate::Ngram,
            Some(Guesses::Of(name)) => name.parse().map_err(exception)?,
        },
        prediction: take(rest, "prediction")?.unwrap_or_default(),
        earlier: Vec::new(),
    };
    match rest.keys().iter().next() {
        Some(name) => Err(PyTypeError::new_err(format!("{name} is no option of a generation"))),
        None => Ok(options),
    }
}

/// The tokens of a text: the text of special tokens becomes them if `special`, and the model's BOS stands in front, once, if `bos`.
pub fn tokenize(engine: &Engine, text: &str, special: bool, bos: bool) -> PyResult<Vec<u32>> {
    let tokenizer = engine.tokenizer().map_err(exception)?;
    let mut ids =
        if special { tokenizer.encode(text, false) } else { tokenizer.encode_plain(text) }.map_err(exception)?;
    let bos = tokenizer.bos().filter(|first| bos && ids.first() != Some(first));
    ids.splice(..0, bos);
    Ok(ids)
}

/// A prompt: a text as it is, with BOS, or token ids.
pub fn prompt(engine: &Engine, given: &Bound<PyAny>) -> PyResult<Vec<u32>> {
    match given.cast::<PyString>() {
        Ok(text) => tokenize(engine, text.to_str()?, true, true),
        Err(_) => ids(given, "a text or token ids"),
    }
}

fn ids(given: &Bound<PyAny>, expected: &str) -> PyResult<Vec<u32>> {
    given.extract().map_err(|_| PyTypeError::new_err(format!("a {} where {expected} was expected", kind(given))))
}

fn kind(given: &Bound<PyAny>) -> String {
    given.get_type().name().map_or_else(|_| "value".into(), |name| name.to_string())
}

/// Token ids, or a text's tokens without anything added: what may follow a prefix.
pub fn continuation(engine: &Engine, given: &Bound<PyAny>) -> PyResult<Vec<u32>> {
    match given.cast::<PyString>() {
        Ok(text) => tokenize(engine, text.to_str()?, false, false),
        Err(_) => ids(given, "a text or token ids"),
    }
}

/// A message as clients of OpenAI's API write it.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct Said {
    role: String,
    content: String,
}

/// A conversation: a question, or messages whose last one is to be answered.
pub fn messages(given: &Bound<PyAny>) -> PyResult<Vec<Message>> {
    if let Ok(text) = given.cast::<PyString>() {
        return Ok(vec![Message::new("user", text.to_str()?)]);
    }
    let wrong =
        || PyTypeError::new_err("expected a text, or messages {\"role\": .., \"content\": ..} whose values are texts");
    let messages: Vec<Said> = given.extract().map_err(|_| wrong())?;
    Ok(messages.into_iter().map(|m| Message::new(m.role, m.content)).collect())
}

/// The prompt for the answer to a conversation.
pub fn encode(engine: &Engine, messages: &[Message], system: Option<&str>) -> PyResult<Vec<u32>> {
    let tokenizer = engine.tokenizer().map_err(exception)?;
    engine.template().encode(tokenizer, messages, system).map_err(exception)
}

/// A text that names one of a few things.
pub fn named<T: std::str::FromStr<Err = String>>(argument: &str, text: &str) -> PyResult<T> {
    text.parse().map_err(|e| InputError::new_err(format!("{argument}: {e}")))
}
