//! The messages of a conversation.

use serde::{Deserialize, Serialize};

use super::tool::{ToolCall, each_text};

/// A question that was asked and the answer that was given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    /// What the user said.
    pub question: String,
    /// What the model answered.
    pub answer: String,
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`; templates may know others.
    pub role: String,
    /// What is said.
    pub content: String,
    /// The functions that the assistant called.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    /// In a message of the role `tool`: the call whose result it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
    /// Whether the model continues this message, which must be the last one, where it ends.
    #[serde(skip)]
    pub begun: bool,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), tool_calls: Vec::new(), tool_call_id: None, begun: false }
    }

    /// An answer that the model is to finish.
    pub fn begun(content: impl Into<String>) -> Self {
        Self { begun: true, ..Self::new("assistant", content) }
    }

    /// The messages of earlier `turns`, then `question`.
    pub fn conversation(turns: &[Turn], question: &str) -> Vec<Message> {
        let turn = |t: &Turn| [Message::new("user", &t.question), Message::new("assistant", &t.answer)];
        turns.iter().flat_map(turn).chain([Message::new("user", question)]).collect()
    }

    /// Calls `f` with every text that a template may show.
    pub(super) fn each_text<'a>(&'a self, f: &mut dyn FnMut(&'a str)) {
        f(&self.content);
        self.tool_call_id.iter().for_each(|id| f(id));
        for call in &self.tool_calls {
            f(&call.id);
            f(&call.function.name);
            each_text(&call.function.arguments, f);
        }
    }

    /// The message with each of these texts replaced by `f` of it.
    pub(super) fn map_texts(&self, f: &dyn Fn(&str) -> String) -> Self {
        Self {
            content: f(&self.content),
            tool_calls: self.tool_calls.iter().map(|call| call.map_texts(f)).collect(),
            tool_call_id: self.tool_call_id.as_deref().map(f),
            ..self.clone()
        }
    }
}
