//! `POST /v1/chat/completions`: continues a conversation.

use super::{
    answer::{Delta, End, StopReason},
    body::Body,
    calls::{CallReader, Found, call_id},
    choices::{Choices, Reply, Shape},
    error::{ApiError, ErrorReply},
    fields::{Common, parse},
    log::RequestLog,
    logprobs::{self, ChatLogprobs, PromptToken},
    messages::{ChatMessage, begun, encode, only},
    policy::Refused,
    prepare::{Prepared, Prompt, Wishes},
    state::{Server, State},
    tools::{Tool, ToolChoice, ToolChoiceShape, ToolKind, Tools},
};
use crate::{TokenStream, Tokenizer};
use axum::{Extension, extract, response::Response};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, sync::Arc};
use utoipa::ToSchema;

/// The fields that only this route has.
#[derive(Debug, Deserialize, ToSchema)]
struct ChatFields {
    /// The messages so far.
    messages: Vec<ChatMessage>,
    /// Log-probabilities of the answer's tokens.
    logprobs: Option<bool>,
    /// With `logprobs`: this many of the most likely ones too, 0 to 20.
    #[schema(maximum = 20)]
    top_logprobs: Option<u32>,
    /// Functions that the model may ask the client to call.
    tools: Option<Vec<Tool>>,
    /// `auto`, the model decides; `none`; `required`, at least one; or the one that must be called. `auto` when absent.
    #[schema(value_type = Option<ToolChoiceShape>)]
    tool_choice: Option<ToolChoice>,
    /// Whether an answer may have several calls; true when absent.
    parallel_tool_calls: Option<bool>,
    /// Only false beside `continue_final_message`: then the prompt ends inside the last message.
    add_generation_prompt: Option<bool>,
    /// The last message is the beginning of the answer, and the reply continues it.
    continue_final_message: Option<bool>,
    /// Only false: the template decides where BOS is.
    add_special_tokens: Option<bool>,
}

/// The body of a request.
#[derive(ToSchema)]
#[allow(dead_code)] // only for the description of the API: `parse` reads the body as two structs
struct ChatRequest {
    #[serde(flatten)]
    common: Common,
    #[serde(flatten)]
    own: ChatFields,
}

/// Fields that belong to other routes or to other servers.
const REFUSED: &[Refused] = &[
    ("best_of", "1", "it belongs to /v1/completions"),
    ("chat_template", "", "the template is chosen when the server starts, with --chat-template"),
    ("chat_template_kwargs", "", "templates get messages only"),
    ("echo", "", "it belongs to /v1/completions"),
    ("messages[].audio", "", "aoji reads and writes text only"),
    ("messages[].function_call", "", "use tool_calls"),
    ("prompt", "", "it belongs to /v1/completions; a chat has messages"),
];

/// An answer.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct ChatChoice {
    index: usize,
    message: Answer,
    logprobs: Option<ChatLogprobs>,
    /// `stop`, `length` or `tool_calls`.
    finish_reason: Option<&'static str>,
    /// The stop string or the id of `stop_token_ids` that ended it.
    stop_reason: Option<StopReason>,
    #[serde(flatten)]
    extras: Extras,
}

/// The message that answers.
#[derive(Debug, Clone, Serialize, ToSchema)]
struct Answer {
    role: &'static str,
    /// The text; `null` where there are calls only.
    content: Option<String>,
    /// Always absent: models here refuse in the text of the answer.
    refusal: Option<()>,
    /// The functions that are to be called.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<CallDelta>,
}

/// A call of a function, or what is new of one.
#[derive(Debug, Clone, Serialize, ToSchema)]
struct CallDelta {
    /// Its place among the calls of the answer; in a stream only.
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
    /// Nine letters and digits. In a stream it comes with the beginning of the call.
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    /// `function`
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<ToolKind>,
    function: FunctionDelta,
}

/// The function that is called, and its arguments.
#[derive(Debug, Clone, Serialize, ToSchema)]
struct FunctionDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    /// A JSON object as text; in a stream in pieces.
    arguments: String,
}

impl CallDelta {
    fn begin(index: usize, name: String) -> CallDelta {
        let function = FunctionDelta { name: Some(name), arguments: String::new() };
        CallDelta { index: Some(index), id: Some(call_id()), kind: Some(ToolKind::Function), function }
    }

    fn more(index: usize, arguments: String) -> CallDelta {
        CallDelta { index: Some(index), id: None, kind: None, function: FunctionDelta { name: None, arguments } }
    }
}

/// What the request asked for in addition.
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
    #[schema(value_type = Option<Vec<Option<BTreeMap<String, PromptToken>>>>)] // in JSON, keys are texts
    prompt_logprobs: Option<Vec<Option<BTreeMap<u32, PromptToken>>>>,
}

/// What is added to an answer.
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

/// The part of an answer that is new.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
struct AnswerDelta {
    /// In the first event of each answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<CallDelta>,
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
    server.reply(body, log, read).await
}

fn read(state: &State, body: &[u8]) -> Result<(Prepared, Choices<Chat>), ApiError> {
    let parsed = parse::<ChatFields>(body, &state.options, REFUSED)?;
    let (common, own) = (parsed.common, parsed.own);
    let begun = begun(own.add_generation_prompt, own.continue_final_message)?;
    only("add_special_tokens", own.add_special_tokens, false, "the template says where BOS is")?;
    let logprobs = own.logprobs.unwrap_or(false);
    let top = own.top_logprobs.unwrap_or(0);
    if top > 0 && !logprobs {
        return Err(ApiError::invalid("top_logprobs", "top_logprobs needs logprobs to be true"));
    }
    let functions = own.tools.unwrap_or_default().into_iter().map(|tool| tool.function).collect();
    let tools = Tools::new(functions, own.tool_choice, own.parallel_tool_calls, state.calls)?;
    let prompt = Prompt { ids: encode(state, &own.messages, begun, tools.as_ref())?, ..Prompt::default() };
    let wishes = Wishes {
        logprobs: logprobs.then_some(top),
        prompt_logprobs: common.prompt_logprobs,
        field: "messages",
        tools: tools.as_ref(),
        ..Wishes::default()
    };
    let return_ids = common.return_token_ids.unwrap_or(false);
    let prompt_logprobs = common.prompt_logprobs;
    let tokenizer = state.tokenizer.clone();
    let stream = if common.skip_special() { tokenizer.stream() } else { tokenizer.stream_with_special() };
    let request = state.prepare(common, parsed.ignored, std::slice::from_ref(&prompt), &wishes)?;
    let (stream, reader) = (stream.after(&prompt.ids), request.reader.clone());
    let pending = Pending { begun: false, whole: Delta::default(), stream, reader };
    let pending = vec![pending; request.n];
    let chat = Chat { tokenizer, pending, prompt: prompt.ids, logprobs, prompt_logprobs, return_ids };
    let choices = Choices::new(state, &request, chat);
    Ok((request, choices))
}

/// The answers, as this API reports them.
struct Chat {
    tokenizer: Tokenizer,
    pending: Vec<Pending>,
    prompt: Vec<u32>,
    logprobs: bool,
    prompt_logprobs: Option<u32>,
    return_ids: bool,
}

#[derive(Clone)]
struct Pending {
    begun: bool,
    whole: Delta,
    /// Gives each token its text, which depends on the tokens before it.
    stream: TokenStream,
    /// Finds calls, if there may be any.
    reader: Option<CallReader>,
}

impl Pending {
    /// The text and the calls that are new.
    fn read(&mut self, text: String, ended: bool) -> (String, Vec<CallDelta>) {
        let Some(reader) = &mut self.reader else { return (text, Vec::new()) };
        let before = reader.begun;
        let mut found = reader.push(&text);
        found.extend(ended.then(|| reader.finish()).flatten());
        let (mut text, mut calls, mut next) = (String::new(), Vec::<CallDelta>::new(), before);
        for found in found {
            match found {
                Found::Text(more) => text.push_str(&more),
                Found::Call(name) => {
                    calls.push(CallDelta::begin(next, name));
                    next += 1;
                }
                Found::Arguments(more) => match calls.last_mut() {
                    Some(call) => call.function.arguments.push_str(&more),
                    None => calls.push(CallDelta::more(next - 1, more)), // an earlier event had its beginning
                },
            }
        }
        (text, calls)
    }

    /// `tool_calls` if there are calls and neither `max_tokens` nor a stop string cut the last one off; otherwise what
    /// the engine says.
    fn reason(&self, end: &End) -> &'static str {
        match (end.reason, &self.reader) {
            ("stop", Some(reader)) if reader.called() => "tool_calls",
            (reason, _) => reason,
        }
    }
}

impl Chat {
    /// What the request asked for in addition. What concerns the prompt comes only with the `first` piece.
    fn extras(&self, delta: &Delta, first: bool) -> Extras {
        let prompt = |top: u32| logprobs::prompt(&self.tokenizer, delta.prompt.as_deref().unwrap_or_default(), top);
        Extras {
            token_ids: self.return_ids.then(|| delta.tokens.iter().map(|(id, _)| *id).collect()),
            prompt_token_ids: (self.return_ids && first).then(|| self.prompt.clone()),
            prompt_logprobs: self.prompt_logprobs.filter(|_| first).map(prompt),
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
        let choice = |(index, mut p): (usize, Pending)| {
            let logprobs = self.logprobs.then(|| ChatLogprobs::of(&mut p.stream, &p.whole.tokens));
            let extras = self.extras(&p.whole, true);
            let text = std::mem::take(&mut p.whole.text);
            let (content, mut tool_calls) = p.read(text, true);
            tool_calls.iter_mut().for_each(|call| call.index = None);
            let content = Some(content).filter(|text| !text.is_empty() || tool_calls.is_empty());
            let end = p.whole.end.take();
            ChatChoice {
                index,
                message: Answer { role: "assistant", content, refusal: None, tool_calls },
                logprobs,
                finish_reason: end.as_ref().map(|end| p.reason(end)),
                stop_reason: end.and_then(|end| end.stop_reason),
                extras,
            }
        };
        pending.into_iter().enumerate().map(choice).collect()
    }

    fn chunks(&mut self, index: usize, mut delta: Delta) -> Vec<ChatChunk> {
        let pending = &mut self.pending[index];
        let first = !std::mem::replace(&mut pending.begun, true);
        let (text, tool_calls) = pending.read(std::mem::take(&mut delta.text), delta.end.is_some());
        let end = delta.end.as_ref().map(|end| (pending.reason(end), end.stop_reason.clone()));
        let mut chunks = Vec::new();
        let news = !text.is_empty() || !tool_calls.is_empty();
        // Token ids and log-probabilities are not held back together with the text.
        let tokens =
            !delta.tokens.is_empty() && (self.logprobs || self.return_ids || self.pending[index].reader.is_none());
        if first || news || tokens {
            let stream = &mut self.pending[index].stream;
            let logprobs = self.logprobs.then(|| ChatLogprobs::of(stream, &delta.tokens));
            let extras = self.extras(&delta, first);
            let content = Some(text).filter(|text| !text.is_empty() || tool_calls.is_empty());
            let delta = AnswerDelta { role: first.then_some("assistant"), content, tool_calls };
            chunks.push(ChatChunk { index, delta, logprobs, extras, ..ChatChunk::default() });
        }
        if let Some((reason, stop_reason)) = end {
            chunks.push(ChatChunk { index, finish_reason: Some(reason), stop_reason, ..ChatChunk::default() });
        }
        chunks
    }
}
