//! `POST /v1/chat/completions`: a conversation is continued.

use super::{
    Server, State,
    answer::{Delta, StopReason},
    error::{ApiError, ErrorReply},
    fields::{Common, parse},
    log::RequestLog,
    logprobs::{self, ChatLogprobs, PromptToken},
    policy::Refused,
    prepare::{Prepared, Prompt, Wishes},
    reply::{Reply, Shape},
    router::{Body, work},
};
use crate::{Message, TokenLogprobs, Tokenizer};
use axum::{Extension, extract, response::Response};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{collections::BTreeMap, sync::Arc};
use utoipa::ToSchema;

/// ChatFields that only this route has.
#[derive(Debug, Deserialize, ToSchema)]
struct ChatFields {
    /// What was said.
    messages: Vec<ChatMessage>,
    /// Log-probabilities of the answer's tokens.
    logprobs: Option<bool>,
    /// With `logprobs`: this many of the most likely ones too, 0 to 20.
    #[schema(maximum = 20)]
    top_logprobs: Option<u32>,
    /// Only true: the prompt ends where an answer begins.
    add_generation_prompt: Option<bool>,
    /// Only false: the last message is complete.
    continue_final_message: Option<bool>,
    /// Only false: the template says where BOS is.
    add_special_tokens: Option<bool>,
}

/// The body of a request.
#[derive(ToSchema)]
#[allow(dead_code)] // it describes what `parse` reads in two parts
struct ChatRequest {
    #[serde(flatten)]
    common: Common,
    #[serde(flatten)]
    own: ChatFields,
}

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

/// ChatFields that are other routes' or other servers'.
const REFUSED: &[Refused] = &[
    ("best_of", "1", "it belongs to /v1/completions"),
    ("chat_template", "", "templates are chosen at the start, by --chat-template"),
    ("chat_template_kwargs", "", "templates get messages only"),
    ("echo", "", "it belongs to /v1/completions"),
    ("messages[].audio", "", "aoji reads and writes text only"),
    ("messages[].function_call", "", "aoji calls no tools"),
    ("messages[].tool_call_id", "", "aoji calls no tools"),
    ("messages[].tool_calls", "", "aoji calls no tools"),
    ("prompt", "", "it belongs to /v1/completions; a chat has messages"),
];

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

/// An answer.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct ChatChoice {
    index: usize,
    message: Answer,
    logprobs: Option<ChatLogprobs>,
    /// `stop` or `length`.
    finish_reason: Option<&'static str>,
    /// The stop string or the id of `stop_token_ids` that ended it.
    stop_reason: Option<StopReason>,
    #[serde(flatten)]
    extras: Extras,
}

/// What was answered.
#[derive(Debug, Clone, Serialize, ToSchema)]
struct Answer {
    role: &'static str,
    content: String,
    /// Always absent: aoji's models refuse in words.
    refusal: Option<()>,
}

/// What was asked for besides.
#[derive(Debug, Default, Clone, Serialize, ToSchema)]
struct Extras {
    /// With `return_token_ids`.
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    /// With `return_token_ids`.
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
    /// With `prompt_logprobs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Option<BTreeMap<String, PromptToken>>>>)] // a name in JSON is a text
    prompt_logprobs: Option<Vec<Option<BTreeMap<u32, PromptToken>>>>,
}

/// What is new of an answer.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub(super) struct ChatChunk {
    index: usize,
    delta: AnswerDelta,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<StopReason>,
    #[serde(flatten)]
    extras: Extras,
}

/// What is new.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
struct AnswerDelta {
    /// In the first event of each answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

/// Continues a conversation.
#[utoipa::path(
    post, path = "/v1/chat/completions", tag = "openai", security((), ("key" = [])), request_body = ChatRequest,
    responses(
        (status = 200, description = "The answers; with `stream` server-sent events", content(
            (Reply<ChatChoice> = "application/json"), (Reply<ChatChunk> = "text/event-stream")
        )),
        (status = "4XX", description = "The request is wrong, or not let in", body = ErrorReply),
        (status = 503, description = "Not answering now", body = ErrorReply),
    )
)]
pub(super) async fn create(
    extract::State(server): extract::State<Server>,
    Extension(log): Extension<Arc<RequestLog>>,
    Body(body): Body,
) -> Result<Response, ApiError> {
    let state = server.0.clone();
    state.admit(1)?;
    let (request, shape) = work(body.len(), move || read(&state, &body)).await?;
    server.0.reply(request, shape, log).await
}

fn read(state: &State, body: &[u8]) -> Result<(Prepared, Chat), ApiError> {
    let parsed = parse::<ChatFields>(body, &state.options, REFUSED)?;
    let (common, own) = (parsed.common, parsed.own);
    only("add_generation_prompt", own.add_generation_prompt, true, "a chat is for an answer")?;
    only("continue_final_message", own.continue_final_message, false, "use /v1/completions to continue a text")?;
    only("add_special_tokens", own.add_special_tokens, false, "the template says where BOS is")?;
    let logprobs = own.logprobs.unwrap_or(false);
    let top = own.top_logprobs.unwrap_or(0);
    if top > 0 && !logprobs {
        return Err(ApiError::invalid("top_logprobs", "top_logprobs needs logprobs to be true"));
    }
    let prompt = Prompt { ids: encode(state, &own.messages)?, text: None };
    let wishes = Wishes {
        default_tokens: None,
        logprobs: logprobs.then_some(top),
        prompt_logprobs: common.prompt_logprobs,
        field: "messages",
    };
    let return_ids = common.return_token_ids.unwrap_or(false);
    let prompt_logprobs = common.prompt_logprobs.is_some();
    let request = state.prepare(common, parsed.ignored, std::slice::from_ref(&prompt), &wishes)?;
    let pending = vec![Pending::default(); request.n];
    let tokenizer = state.tokenizer.clone();
    Ok((request, Chat { tokenizer, pending, prompt: prompt.ids, logprobs, prompt_logprobs, return_ids }))
}

/// The answers, as this API reports them.
struct Chat {
    tokenizer: Tokenizer,
    pending: Vec<Pending>,
    prompt: Vec<u32>,
    logprobs: bool,
    prompt_logprobs: bool,
    return_ids: bool,
}

#[derive(Default, Clone)]
struct Pending {
    begun: bool,
    whole: Delta,
}

impl Chat {
    fn logprobs(&self, delta: &Delta) -> Option<ChatLogprobs> {
        self.logprobs.then(|| ChatLogprobs::of(&self.tokenizer, &delta.tokens))
    }

    /// What was asked for besides; what concerns the prompt only `first`.
    fn extras(&self, delta: &Delta, first: bool) -> Extras {
        let prompt = |scored: &Option<Vec<TokenLogprobs>>| {
            logprobs::prompt(&self.tokenizer, scored.as_deref().unwrap_or_default())
        };
        Extras {
            token_ids: self.return_ids.then(|| delta.tokens.iter().map(|(id, _)| *id).collect()),
            prompt_token_ids: (self.return_ids && first).then(|| self.prompt.clone()),
            prompt_logprobs: (self.prompt_logprobs && first).then(|| prompt(&delta.prompt)),
        }
    }
}

impl Shape for Chat {
    type Choice = ChatChoice;
    type Chunk = ChatChunk;
    const PREFIX: &'static str = "chatcmpl";
    const OBJECTS: [&'static str; 2] = ["chat.completion", "chat.completion.chunk"];

    fn add(&mut self, index: usize, delta: Delta) {
        let whole = &mut self.pending[index].whole;
        whole.text.push_str(&delta.text);
        whole.tokens.extend(delta.tokens);
        whole.prompt = whole.prompt.take().or(delta.prompt);
        whole.end = delta.end;
    }

    fn choices(mut self) -> Vec<ChatChoice> {
        let pending = std::mem::take(&mut self.pending);
        let choice = |(index, p): (usize, Pending)| {
            let (logprobs, extras) = (self.logprobs(&p.whole), self.extras(&p.whole, true));
            let end = p.whole.end;
            ChatChoice {
                index,
                message: Answer { role: "assistant", content: p.whole.text, refusal: None },
                logprobs,
                finish_reason: end.as_ref().map(|end| end.reason),
                stop_reason: end.and_then(|end| end.stop_reason),
                extras,
            }
        };
        pending.into_iter().enumerate().map(choice).collect()
    }

    fn chunks(&mut self, index: usize, delta: Delta) -> Vec<ChatChunk> {
        let first = !std::mem::replace(&mut self.pending[index].begun, true);
        let mut chunks = Vec::new();
        if first || !delta.text.is_empty() || !delta.tokens.is_empty() {
            let (logprobs, extras) = (self.logprobs(&delta), self.extras(&delta, first));
            let delta = AnswerDelta { role: first.then_some("assistant"), content: Some(delta.text) };
            chunks.push(ChatChunk { index, delta, logprobs, extras, ..ChatChunk::default() });
        }
        if let Some(end) = delta.end {
            let (finish_reason, stop_reason) = (Some(end.reason), end.stop_reason);
            chunks.push(ChatChunk { index, finish_reason, stop_reason, ..ChatChunk::default() });
        }
        chunks
    }
}
