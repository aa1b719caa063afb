//! Messages of a conversation, and the prompt that they become.

use super::{error::ApiError, state::State};
use crate::Message;
use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

/// A message of a conversation.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub(super) struct ChatMessage {
    role: Role,
    /// A text, or parts that are texts and are joined by line ends.
    #[schema(value_type = ContentShape)]
    content: Content,
}

/// Who said it; `developer` is the same as `system`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Role {
    System,
    Developer,
    User,
    Assistant,
}

/// What is said.
#[derive(ToSchema)]
#[serde(untagged)]
#[allow(dead_code)]
enum ContentShape {
    Text(String),
    Parts(Vec<TextPart>),
}

/// A part of a message.
#[derive(ToSchema)]
#[allow(dead_code)]
struct TextPart {
    /// `text`
    #[schema(rename = "type")]
    kind: String,
    text: String,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "Value")]
struct Content(String);

impl TryFrom<Value> for Content {
    type Error = String;
    fn try_from(value: Value) -> Result<Content, String> {
        let parts = match value {
            Value::String(text) => return Ok(Content(text)),
            Value::Array(parts) => parts,
            _ => return Err("expected a text or a list of parts".into()),
        };
        let text = |(i, part): (usize, &Value)| {
            let kind = part.get("type").and_then(Value::as_str);
            match (kind, part.get("text").and_then(Value::as_str)) {
                (Some("text"), Some(text)) => match part.as_object().and_then(|o| o.keys().find(|k| !known(k))) {
                    Some(key) => Err(format!("part {i} has {key:?}: expected type and text only")),
                    None => Ok(text.to_string()),
                },
                (Some("text"), None) => Err(format!("part {i} has no text")),
                (Some(kind), _) => Err(format!("part {i} is of type {kind:?}: aoji reads text only")),
                (None, _) => Err(format!("part {i} has no type")),
            }
        };
        let texts: Result<Vec<String>, String> = parts.iter().enumerate().map(text).collect();
        texts.map(|texts| Content(texts.join("\n")))
    }
}

/// Keys of a part; a hint for caches changes nothing.
fn known(key: &str) -> bool {
    matches!(key, "type" | "text" | "cache_control")
}

/// The prompt of a conversation, whose last message may be the beginning of the answer.
pub(super) fn encode(state: &State, messages: &[ChatMessage], begun: bool) -> Result<Vec<u32>, ApiError> {
    if let Some(other) = messages.last().filter(|m| begun && m.role != Role::Assistant) {
        let message =
            format!("the last message is one of the role {:?}: only the assistant's is continued", other.role);
        return Err(ApiError::invalid("continue_final_message", message.to_lowercase()));
    }
    let message = |m: &ChatMessage| {
        let role = match m.role {
            Role::System | Role::Developer => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        };
        Message::new(role, &m.content.0)
    };
    let mut messages: Vec<Message> = messages.iter().map(message).collect();
    messages.last_mut().into_iter().for_each(|last| last.begun = begun);
    state.template.encode(&state.tokenizer, &messages, None).map_err(|e| ApiError::from_library(e, "messages"))
}

/// Whether the last message is the beginning of the answer, by the two fields that transformers has for it.
pub(super) fn begun(add_generation_prompt: Option<bool>, continue_final: Option<bool>) -> Result<bool, ApiError> {
    let begun = continue_final.unwrap_or(false);
    match add_generation_prompt {
        Some(true) if begun => {
            let message = "it is true beside continue_final_message: an answer that was begun does not begin again";
            Err(ApiError::invalid("add_generation_prompt", format!("add_generation_prompt: {message}")))
        }
        Some(false) if !begun => Err(ApiError::unsupported(
            "add_generation_prompt",
            "false goes with continue_final_message: a chat is for an answer",
        )),
        _ => Ok(begun),
    }
}

/// Refuses what no template here can do.
pub(super) fn only(field: &str, value: Option<bool>, allowed: bool, why: &str) -> Result<(), ApiError> {
    match value {
        Some(other) if other != allowed => Err(ApiError::unsupported(field, why)),
        _ => Ok(()),
    }
}
