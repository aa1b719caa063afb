//! Functions in a conversation, their calls and their results, in the form that chat templates expect.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A call of a function by the assistant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolCall {
    /// The id by which the result refers to the call.
    pub id: String,
    /// `function`
    #[serde(rename = "type")]
    pub kind: String,
    /// The function that is called, and its arguments.
    pub function: CalledFunction,
}

/// A function and its arguments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CalledFunction {
    /// Its name.
    pub name: String,
    /// The arguments by their names, an object.
    pub arguments: Value,
}

impl ToolCall {
    /// A call of `name`.
    pub fn new(id: impl Into<String>, name: impl Into<String>, arguments: Value) -> Self {
        let function = CalledFunction { name: name.into(), arguments };
        Self { id: id.into(), kind: "function".into(), function }
    }

    pub(super) fn map_texts(&self, f: &dyn Fn(&str) -> String) -> Self {
        let CalledFunction { name, arguments } = &self.function;
        Self::new(f(&self.id), f(name), map_texts(arguments, f))
    }
}

/// Calls `f` with every text in `value`, names too.
pub(super) fn each_text<'a>(value: &'a Value, f: &mut dyn FnMut(&'a str)) {
    match value {
        Value::String(text) => f(text),
        Value::Array(list) => list.iter().for_each(|value| each_text(value, f)),
        Value::Object(map) => map.iter().for_each(|(name, value)| {
            f(name);
            each_text(value, f);
        }),
        _ => {}
    }
}

/// `value` with each of its texts, names too, replaced by `f` of it.
pub(super) fn map_texts(value: &Value, f: &dyn Fn(&str) -> String) -> Value {
    match value {
        Value::String(text) => f(text).into(),
        Value::Array(list) => list.iter().map(|value| map_texts(value, f)).collect(),
        Value::Object(map) => map.iter().map(|(name, value)| (f(name), map_texts(value, f))).collect(),
        other => other.clone(),
    }
}

/// One line of JSON with a blank after each colon and comma, as templates write functions and their calls.
#[cfg(feature = "server")]
pub(crate) fn json_line(value: &Value) -> String {
    use minijinja::value::{Rest, Serde, Value as Jinja};
    let written = super::python::tojson(&Jinja::from(Serde(value)), Rest(Vec::new()));
    written.unwrap_or_else(|_| value.to_string()) // writing JSON cannot fail
}
