//! Messages of a conversation, and how they become a prompt.

use super::{
    error::ApiError,
    state::State,
    tools::{ToolKind, Tools},
};
use crate::{AOG_INSTRUCTION, Message, Template, ToolCall, text::json_line};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::collections::{HashMap, HashSet};
use utoipa::ToSchema;

/// A message of a conversation.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub(super) struct ChatMessage {
    role: Role,
    /// A text, or parts of type text, which are joined by line ends. Only a message with calls may be without.
    #[schema(value_type = Option<ContentShape>)]
    content: Option<Content>,
    /// The functions that the assistant called.
    tool_calls: Option<Vec<MessageCall>>,
    /// In a message of the role `tool`: the call whose result it is.
    tool_call_id: Option<String>,
}

/// A call of a function.
#[derive(Debug, Clone, Deserialize, ToSchema)]
struct MessageCall {
    id: String,
    /// `function`
    #[serde(rename = "type")]
    #[allow(dead_code)] // only one kind exists
    kind: ToolKind,
    function: CalledFunction,
}

/// The function that was called, and its arguments.
#[derive(Debug, Clone, Deserialize, ToSchema)]
struct CalledFunction {
    name: String,
    /// A JSON object as text.
    #[schema(value_type = String)]
    arguments: Arguments,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "String")]
pub(super) struct Arguments(pub Map<String, Value>);

impl TryFrom<String> for Arguments {
    type Error = String;
    fn try_from(text: String) -> Result<Arguments, String> {
        match serde_json::from_str(&text) {
            _ if text.trim().is_empty() => Ok(Arguments(Map::new())),
            Ok(Value::Object(map)) => Ok(Arguments(map)),
            Ok(_) => Err("expected the text of a JSON object, found other JSON".into()),
            Err(e) => Err(format!("expected the text of a JSON object, found no JSON: {e}")),
        }
    }
}

/// Who the message is from; `developer` is the same as `system`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Role {
    System,
    Developer,
    User,
    Assistant,
    /// The result of a call.
    Tool,
}

/// The text of a message.
#[derive(ToSchema)]
#[serde(untagged)]
#[allow(dead_code)]
pub(super) enum ContentShape {
    Text(String),
    Parts(Vec<TextPart>),
}

/// A part of a message.
#[derive(ToSchema)]
#[allow(dead_code)]
pub(super) struct TextPart {
    /// `text`
    #[schema(rename = "type")]
    kind: String,
    text: String,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "Value")]
pub(super) struct Content(pub String);

impl TryFrom<Value> for Content {
    type Error = String;
    fn try_from(value: Value) -> Result<Content, String> {
        // A hint for caches, which changes nothing.
        joined(&value, &["text"], &["cache_control"]).map(Content)
    }
}

/// A text, or parts of these types, joined by line ends. A part may have the keys `more` beside its type and text.
pub(super) fn joined(value: &Value, types: &[&str], more: &[&str]) -> Result<String, String> {
    let parts = match value {
        Value::String(text) => return Ok(text.clone()),
        Value::Array(parts) => parts,
        _ => return Err("expected a text or a list of parts".into()),
    };
    let known = |key: &str| matches!(key, "type" | "text") || more.contains(&key);
    let text = |(i, part): (usize, &Value)| match part.get("type").and_then(Value::as_str) {
        None => Err(format!("part {i} has no type")),
        Some(kind) if !types.contains(&kind) => Err(format!("part {i} is of type {kind:?}: aoji reads text only")),
        Some(_) => match part.as_object().and_then(|o| o.keys().find(|key| !known(key))) {
            Some(key) => Err(format!("part {i} has {key:?}: expected type and text only")),
            None => {
                let text = part.get("text").and_then(Value::as_str).map(str::to_string);
                text.ok_or_else(|| format!("part {i} has no text"))
            }
        },
    };
    let texts: Result<Vec<String>, String> = parts.iter().enumerate().map(text).collect();
    texts.map(|texts| texts.join("\n"))
}

impl ChatMessage {
    /// A text.
    pub fn text(role: Role, text: String) -> ChatMessage {
        ChatMessage { role, content: Some(Content(text)), tool_calls: None, tool_call_id: None }
    }

    /// The result of the call `id`.
    pub fn result(id: String, text: String) -> ChatMessage {
        ChatMessage { tool_call_id: Some(id), ..ChatMessage::text(Role::Tool, text) }
    }

    /// Appends what the same role said next. `false` when this message cannot go on: after calls, their results must
    /// come.
    pub fn go_on(&mut self, role: Role, more: &str) -> bool {
        let goes_on = self.role == role && role != Role::Tool && self.tool_calls.is_none();
        if goes_on {
            let text = &mut self.content.get_or_insert_with(|| Content(String::new())).0;
            text.push_str(if text.is_empty() { "" } else { "\n" });
            text.push_str(more);
        }
        goes_on
    }

    /// Whether it is a text of the assistant.
    pub fn is_answer(&self) -> bool {
        self.role == Role::Assistant && self.tool_calls.is_none()
    }
}

/// Adds a message of `role` to a conversation; consecutive messages of one role become one.
pub(super) fn say(messages: &mut Vec<ChatMessage>, role: Role, text: String) {
    if !messages.last_mut().is_some_and(|last| last.go_on(role, &text)) {
        messages.push(ChatMessage::text(role, text));
    }
}

/// Adds a call to a conversation: to the assistant's message just before, or to a new one.
pub(super) fn call(messages: &mut Vec<ChatMessage>, id: String, name: String, arguments: Map<String, Value>) {
    if !matches!(messages.last(), Some(last) if last.role == Role::Assistant) {
        let empty = ChatMessage { content: None, ..ChatMessage::text(Role::Assistant, String::new()) };
        messages.push(empty);
    }
    let function = CalledFunction { name, arguments: Arguments(arguments) };
    if let Some(last) = messages.last_mut() {
        last.tool_calls.get_or_insert_default().push(MessageCall { id, kind: ToolKind::Function, function });
    }
}

/// The prompt for a conversation in which these functions can be called. The last message may be the beginning of the
/// answer.
pub(super) fn encode(
    state: &State,
    messages: &[ChatMessage],
    begun: bool,
    tools: Option<&Tools>,
) -> Result<Vec<u32>, ApiError> {
    if let Some(other) = messages.last().filter(|m| begun && m.role != Role::Assistant) {
        let message =
            format!("the last message is one of the role {:?}: only the assistant's is continued", other.role);
        return Err(ApiError::invalid("continue_final_message", message.to_lowercase()));
    }
    let mut messages = conversation(messages)?;
    messages.last_mut().into_iter().for_each(|last| last.begun = begun);
    let mut template = state.template.clone();
    match (&state.template, tools) {
        (Template::Jinja(jinja), Some(tools)) if tools.format.in_template => {
            template = Template::Jinja(jinja.with_tools(tools.for_template()));
        }
        (_, tools) if !state.calls.is_some_and(|format| format.in_template) => {
            messages = in_words(messages);
            if let Some(tools) = tools {
                instruct(&template, &mut messages, tools.in_words());
            }
        }
        _ => {}
    }
    template.encode(&state.tokenizer, &messages, None).map_err(|e| ApiError::from_library(e, "messages"))
}

/// The messages in the form that templates get, checked.
fn conversation(messages: &[ChatMessage]) -> Result<Vec<Message>, ApiError> {
    let mut ids: HashSet<&str> = HashSet::new();
    let mut all = Vec::with_capacity(messages.len());
    for (i, m) in messages.iter().enumerate() {
        let wrong = |field: &str, what: &str| Err(ApiError::invalid(format!("messages[{i}].{field}"), what));
        let (role, calls) = (m.role, m.tool_calls.as_deref().unwrap_or_default());
        if !calls.is_empty() && role != Role::Assistant {
            return wrong("tool_calls", "only the assistant calls functions");
        }
        match (&m.tool_call_id, role) {
            (None, Role::Tool) => return wrong("tool_call_id", "a result needs the id of its call"),
            (Some(id), Role::Tool) if !ids.contains(&id.as_str()) => {
                return wrong("tool_call_id", &format!("no call before this message has the id {id:?}"));
            }
            (Some(_), Role::System | Role::Developer | Role::User | Role::Assistant) => {
                return wrong("tool_call_id", "only a message of the role tool has one");
            }
            _ => {}
        }
        if m.content.is_none() && calls.is_empty() {
            return wrong("content", "expected a text or a list of parts");
        }
        for (k, call) in calls.iter().enumerate() {
            if call.id.is_empty() || !ids.insert(&call.id) {
                return wrong(&format!("tool_calls[{k}].id"), "expected an id that no other call has");
            }
        }
        let role = match role {
            Role::System | Role::Developer => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
        };
        let call =
            |c: &MessageCall| ToolCall::new(&c.id, &c.function.name, Value::from(c.function.arguments.0.clone()));
        let text = m.content.as_ref().map_or("", |content| &content.0);
        let tool_calls = calls.iter().map(call).collect();
        all.push(Message { tool_calls, tool_call_id: m.tool_call_id.clone(), ..Message::new(role, text) });
    }
    Ok(all)
}

/// Writes calls and results as text, for templates that know only questions and answers. Results become a question.
fn in_words(messages: Vec<Message>) -> Vec<Message> {
    let mut names = HashMap::new();
    let mut all: Vec<Message> = Vec::with_capacity(messages.len());
    let mut after_result = false;
    for message in messages {
        let Message { mut content, tool_calls, tool_call_id, .. } = message.clone();
        for call in tool_calls {
            let line = json_line(&json!({"name": call.function.name, "arguments": call.function.arguments}));
            content = if content.is_empty() { line } else { format!("{content}\n{line}") };
            names.insert(call.id, call.function.name);
        }
        let result =
            tool_call_id.map(|id| format!("{} returned: {content}", names.get(&id).map_or("", String::as_str)));
        let is_result = result.is_some();
        match (result, all.last_mut()) {
            (Some(text), Some(last)) if after_result => last.content = format!("{}\n{text}", last.content),
            (Some(text), _) => all.push(Message::new("user", text)),
            (None, Some(last)) if after_result && message.role == "user" => {
                last.content = format!("{}\n\n{content}", last.content);
            }
            (None, _) => all.push(Message { content, tool_calls: Vec::new(), ..message }),
        }
        after_result = is_result;
    }
    all
}

/// Adds `text` to the instruction; where the template has no place for one, it goes before the first question.
fn instruct(template: &Template, messages: &mut Vec<Message>, text: String) {
    let takes_system = match template {
        Template::Aog | Template::AogInstructionFirst => true,
        Template::Raw => false,
        Template::Jinja(jinja) => {
            let probe = [Message::new("system", "?instruction?"), Message::new("user", "?question?")];
            jinja.render(&probe).is_ok_and(|prompt| prompt.contains("?instruction?"))
        }
    };
    let default = match template {
        Template::Aog | Template::AogInstructionFirst => format!("{AOG_INSTRUCTION}\n\n"),
        _ => String::new(),
    };
    match messages.iter_mut().find(|m| if takes_system { m.role == "system" } else { m.role == "user" }) {
        Some(system) if takes_system => system.content = format!("{}\n\n{text}", system.content),
        Some(question) => question.content = format!("{text}\n\n{}", question.content),
        None => messages.insert(0, Message::new("system", default + &text)),
    }
}

/// Whether the last message is the beginning of the answer, by the two fields that transformers has for this.
pub(super) fn begun(add_generation_prompt: Option<bool>, continue_final: Option<bool>) -> Result<bool, ApiError> {
    let begun = continue_final.unwrap_or(false);
    match add_generation_prompt {
        Some(true) if begun => {
            let message = "it is true beside continue_final_message: an answer that has begun cannot begin again";
            Err(ApiError::invalid("add_generation_prompt", format!("add_generation_prompt: {message}")))
        }
        Some(false) if !begun => Err(ApiError::unsupported(
            "add_generation_prompt",
            "false is for continue_final_message only: a chat always asks for an answer",
        )),
        _ => Ok(begun),
    }
}

/// Refuses a value that no template here can follow.
pub(super) fn only(field: &str, value: Option<bool>, allowed: bool, why: &str) -> Result<(), ApiError> {
    match value {
        Some(other) if other != allowed => Err(ApiError::unsupported(field, why)),
        _ => Ok(()),
    }
}
