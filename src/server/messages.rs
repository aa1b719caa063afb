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

/// The prompt of a conversation.
pub(super) fn encode(state: &State, messages: &[ChatMessage]) -> Result<Vec<u32>, ApiError> {
    let message = |m: &ChatMessage| {
        let role = match m.role {
            Role::System | Role::Developer => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        };
        Message::new(role, &m.content.0)
    };
    let messages: Vec<Message> = messages.iter().map(message).collect();
    state.template.encode(&state.tokenizer, &messages, None).map_err(|e| ApiError::from_library(e, "messages"))
}

/// Refuses what no template here can do.
pub(super) fn only(field: &str, value: Option<bool>, allowed: bool, why: &str) -> Result<(), ApiError> {
    match value {
        Some(other) if other != allowed => Err(ApiError::unsupported(field, why)),
        _ => Ok(()),
    }
}
