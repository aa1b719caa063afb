//! `POST /v1/chat/completions`: a conversation is continued.

use super::{
    answer::{Delta, StopReason},
    body::{Body, work},
    error::{ApiError, ErrorReply},
    fields::{Common, parse},
    log::RequestLog,
    logprobs::{self, ChatLogprobs, PromptToken},
    messages::{ChatMessage, begun, encode, only},
    policy::Refused,
    prepare::{Prepared, Prompt, Wishes},
    reply::{Reply, Shape},
    state::{Server, State},
};
use crate::{TokenLogprobs, TokenStream, Tokenizer};
use axum::{Extension, extract, response::Response};
use serde::{Deserialize, Serialize};
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
    /// False only beside `continue_final_message`: the prompt ends where an answer begins.
    add_generation_prompt: Option<bool>,
    /// The last message is the beginning of the answer, and the reply goes on where it ends.
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
    let begun = begun(own.add_generation_prompt, own.continue_final_message)?;
    only("add_special_tokens", own.add_special_tokens, false, "the template says where BOS is")?;
    let logprobs = own.logprobs.unwrap_or(false);
    let top = own.top_logprobs.unwrap_or(0);
    if top > 0 && !logprobs {
        return Err(ApiError::invalid("top_logprobs", "top_logprobs needs logprobs to be true"));
    }
    let prompt = Prompt { ids: encode(state, &own.messages, begun)?, text: None };
    let wishes = Wishes {
        default_tokens: None,
        logprobs: logprobs.then_some(top),
        prompt_logprobs: common.prompt_logprobs,
        field: "messages",
    };
    let return_ids = common.return_token_ids.unwrap_or(false);
    let prompt_logprobs = common.prompt_logprobs.is_some();
    let tokenizer = state.tokenizer.clone();
    let stream = if common.skip_special() { tokenizer.stream() } else { tokenizer.stream_with_special() };
    let pending = Pending { begun: false, whole: Delta::default(), stream: stream.after(&prompt.ids) };
    let request = state.prepare(common, parsed.ignored, std::slice::from_ref(&prompt), &wishes)?;
    let pending = vec![pending; request.n];
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

#[derive(Clone)]
struct Pending {
    begun: bool,
    whole: Delta,
    /// What the tokens so far make of the next one's text.
    stream: TokenStream,
}

impl Chat {
    fn logprobs(&self, stream: &mut TokenStream, delta: &Delta) -> Option<ChatLogprobs> {
        self.logprobs.then(|| ChatLogprobs::of(stream, &delta.tokens))
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
        let choice = |(index, mut p): (usize, Pending)| {
            let (logprobs, extras) = (self.logprobs(&mut p.stream, &p.whole), self.extras(&p.whole, true));
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
            let mut stream = self.pending[index].stream.clone();
            let (logprobs, extras) = (self.logprobs(&mut stream, &delta), self.extras(&delta, first));
            self.pending[index].stream = stream;
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
