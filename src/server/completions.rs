//! `POST /v1/completions`: continues a text.

use super::{
    answer::{Delta, StopReason},
    body::Body,
    choices::{Choices, Reply, Shape},
    error::{ApiError, ErrorReply},
    fields::{Common, parse},
    log::RequestLog,
    logprobs::{self, Legacy, LegacyLogprobs, PromptToken, Scored},
    prepare::{Prepared, Prompt, Wishes},
    state::{Server, State},
};
use crate::{TokenStream, Tokenizer};
use axum::{Extension, extract, response::Response};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{collections::BTreeMap, sync::Arc};
use utoipa::ToSchema;

/// The fields that only this route has.
#[derive(Debug, Deserialize, ToSchema)]
struct CompletionFields {
    /// What is continued: a text, a list of texts, token ids, or a list of lists of token ids.
    #[schema(value_type = PromptShape)]
    prompt: Prompts,
    /// Whether the text of the answer begins with the prompt.
    echo: Option<bool>,
    /// Log-probabilities of the answer's tokens, and this many of the most likely ones, 0 to 20.
    #[schema(maximum = 20)]
    logprobs: Option<u32>,
    /// As many as `n`: all answers are returned.
    best_of: Option<u64>,
    /// Put BOS in front of a text; true when absent. A BOS that is there already is not doubled.
    add_special_tokens: Option<bool>,
}

/// The body of a request.
#[derive(ToSchema)]
#[allow(dead_code)] // only for the description of the API: `parse` reads the body as two structs
struct CompletionRequest {
    #[serde(flatten)]
    common: Common,
    #[serde(flatten)]
    own: CompletionFields,
}

/// What is continued.
#[derive(ToSchema)]
#[serde(untagged)]
#[allow(dead_code)]
pub(super) enum PromptShape {
    Text(String),
    Texts(Vec<String>),
    Ids(Vec<u32>),
    Lists(Vec<Vec<u32>>),
}

/// What is continued, one or several.
#[derive(Debug, Deserialize)]
#[serde(try_from = "Value")]
pub(super) enum Prompts {
    Texts(Vec<String>),
    Ids(Vec<Vec<u32>>),
}

impl TryFrom<Value> for Prompts {
    type Error = String;
    fn try_from(value: Value) -> Result<Prompts, String> {
        let list = match value {
            Value::String(text) => return Ok(Prompts::Texts(vec![text])),
            Value::Array(list) if !list.is_empty() => list,
            _ => return Err("expected a text, a list of texts, token ids, or a list of lists of token ids".into()),
        };
        let id = |i: usize, value: &Value| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| format!("element {i}: {value} is no token id"))
        };
        match list[0] {
            Value::String(_) => {
                let text = |(i, value): (usize, Value)| match value {
                    Value::String(text) => Ok(text),
                    _ => Err(format!("element {i} is no text, the first one is")),
                };
                list.into_iter().enumerate().map(text).collect::<Result<_, _>>().map(Prompts::Texts)
            }
            Value::Array(_) => {
                let ids = |(i, value): (usize, &Value)| {
                    let ids = value.as_array().ok_or_else(|| format!("element {i} is no list, the first one is"))?;
                    ids.iter().map(|value| id(i, value)).collect::<Result<Vec<u32>, _>>()
                };
                list.iter().enumerate().map(ids).collect::<Result<_, _>>().map(Prompts::Ids)
            }
            _ => {
                let ids = list.iter().enumerate().map(|(i, value)| id(i, value));
                Ok(Prompts::Ids(vec![ids.collect::<Result<_, _>>()?]))
            }
        }
    }
}

/// An answer, or what is new of one.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub(super) struct CompletionChoice {
    /// Its index: first the answers to the first prompt, then those to the second, and so on.
    index: usize,
    text: String,
    logprobs: Option<LegacyLogprobs>,
    /// `stop` or `length`.
    finish_reason: Option<&'static str>,
    /// The stop string or the id of `stop_token_ids` that ended it.
    stop_reason: Option<StopReason>,
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

/// Continues texts.
#[utoipa::path(
    post, path = "/v1/completions", tag = "openai", security((), ("key" = [])), request_body = CompletionRequest,
    responses(
        (status = 200, description = "The answers; with `stream` server-sent events", content(
            (Reply<CompletionChoice> = "application/json"), (Reply<CompletionChoice> = "text/event-stream")
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

fn read(state: &State, body: &[u8]) -> Result<(Prepared, Choices<Completions>), ApiError> {
    const CHAT: &str = "it belongs to /v1/chat/completions";
    let refused = [
        ("parallel_tool_calls", "true", CHAT),
        ("suffix", "\"\"", "the models here continue a text, and do not fill gaps in it"),
        ("tool_choice", "\"none\"", CHAT),
        ("tools", "", CHAT),
    ];
    let parsed = parse::<CompletionFields>(body, &state.options, &refused)?;
    let (common, own) = (parsed.common, parsed.own);
    let n = common.n()?;
    if let Some(best_of) = own.best_of.filter(|b| *b != n as u64) {
        let message = format!("best_of is {best_of} and n is {n}: aoji returns all answers that it makes");
        return Err(ApiError::invalid("best_of", message));
    }
    state.admit(n.saturating_mul(own.prompt.len()))?;
    let special = own.add_special_tokens.unwrap_or(true);
    let prompts = own.prompt.encode(&state.tokenizer, special, "prompt")?;
    let echo = own.echo.unwrap_or(false);
    let asked = common.prompt_logprobs;
    let echoed = own.logprobs.filter(|_| echo);
    let wishes = Wishes {
        default_tokens: Some(16),
        logprobs: own.logprobs,
        prompt_logprobs: asked.max(echoed),
        field: "prompt",
        ..Wishes::default()
    };
    let return_ids = common.return_token_ids.unwrap_or(false);
    let skip_special = common.skip_special();
    let request = state.prepare(common, parsed.ignored, &prompts, &wishes)?;
    let stream = || stream(&state.tokenizer, skip_special);
    let choice = |index: usize| {
        let Prompt { ids, text, bos } = &prompts[index / n];
        let (echo, stream) = match text {
            _ if !echo => (String::new(), stream().after(ids)),
            // It comes back as it was sent, with the special tokens that it names.
            Some(text) => (text.clone(), state.tokenizer.stream_with_special()),
            None => {
                let text = state.tokenizer.decode(ids, skip_special);
                (text.map_err(|e| ApiError::from_library(e, "prompt"))?, stream())
            }
        };
        let (of_ids, legacy) = (text.is_none(), Legacy::new(stream));
        Ok(Pending { prompt: ids.clone(), bos: *bos, echo, of_ids, legacy, choice: None })
    };
    let pending = (0..prompts.len() * n).map(choice).collect::<Result<_, ApiError>>()?;
    let tokenizer = state.tokenizer.clone();
    let shape = Completions {
        tokenizer,
        pending,
        logprobs: own.logprobs,
        echo,
        prompt_logprobs: asked,
        return_ids,
        skip_special,
    };
    let choices = Choices::new(state, &request, shape);
    Ok((request, choices))
}

/// Turns an answer's tokens into text, and with `echo` also the prompt's.
fn stream(tokenizer: &Tokenizer, skip_special: bool) -> TokenStream {
    if skip_special { tokenizer.stream() } else { tokenizer.stream_with_special() }
}

impl Prompts {
    pub fn len(&self) -> usize {
        match self {
            Prompts::Texts(list) => list.len(),
            Prompts::Ids(lists) => lists.len(),
        }
    }

    /// The tokens of the prompts; `field` names the field that they came in.
    pub fn encode(self, tokenizer: &Tokenizer, special: bool, field: &str) -> Result<Vec<Prompt>, ApiError> {
        let text = |text: String| {
            let mut ids = tokenizer.encode(&text, false).map_err(|e| ApiError::from_library(e, field))?;
            let bos = tokenizer.bos().filter(|bos| special && ids.first() != Some(bos));
            ids.splice(0..0, bos);
            Ok(Prompt { ids, text: Some(text), bos: bos.is_some() })
        };
        match self {
            Prompts::Texts(list) => list.into_iter().map(text).collect(),
            Prompts::Ids(lists) => Ok(lists.into_iter().map(|ids| Prompt { ids, ..Prompt::default() }).collect()),
        }
    }
}

/// The answers, as this API reports them.
struct Completions {
    tokenizer: Tokenizer,
    pending: Vec<Pending>,
    logprobs: Option<u32>,
    echo: bool,
    prompt_logprobs: Option<u32>,
    return_ids: bool,
    skip_special: bool,
}

struct Pending {
    prompt: Vec<u32>,
    /// Whether it begins with a BOS that `echo` does not have.
    bos: bool,
    /// The text in front of the answer.
    echo: String,
    /// Whether that is the text of ids, and not the client's own.
    of_ids: bool,
    legacy: Legacy,
    choice: Option<CompletionChoice>,
}

impl Completions {
    /// What is new of answer `index`. The first piece begins with what was asked for of the prompt.
    fn piece(&mut self, index: usize, delta: Delta, first: bool) -> CompletionChoice {
        let pending = &mut self.pending[index];
        let mut piece = CompletionChoice { index, ..CompletionChoice::default() };
        let mut lists = LegacyLogprobs::default();
        if first {
            piece.text = std::mem::take(&mut pending.echo);
            if self.echo && pending.of_ids {
                let all = pending.prompt.iter().copied().chain(delta.tokens.iter().map(|(id, _)| *id));
                cut(&mut piece.text, self.tokenizer.decode(&all.collect::<Vec<u32>>(), self.skip_special));
            }
            let scored = delta.prompt.unwrap_or_default();
            piece.prompt_logprobs = self.prompt_logprobs.map(|top| logprobs::prompt(&self.tokenizer, &scored, top));
            if let Some(top) = self.logprobs.filter(|_| self.echo) {
                let scores = [None].into_iter().chain(scored.into_iter().map(|mut scored| {
                    scored.top.truncate(top as usize); // `prompt_logprobs` may have asked for more
                    Some(scored)
                }));
                let ids: Vec<Scored> = pending.prompt.iter().copied().zip(scores).collect();
                let (bos, text) = ids.split_at(usize::from(pending.bos));
                lists = pending.legacy.without_text(bos);
                lists.extend(pending.legacy.add(text));
                let stream = stream(&self.tokenizer, self.skip_special).after(&pending.prompt);
                pending.legacy.go_on(piece.text.chars().count(), stream);
            }
            piece.prompt_token_ids = self.return_ids.then(|| std::mem::take(&mut pending.prompt));
        }
        piece.text.push_str(&delta.text);
        if self.logprobs.is_some() {
            lists.extend(pending.legacy.add(&delta.tokens));
            piece.logprobs = Some(lists);
        }
        piece.token_ids = self.return_ids.then(|| delta.tokens.iter().map(|(id, _)| *id).collect());
        if let Some(end) = delta.end {
            piece.finish_reason = Some(end.reason);
            piece.stop_reason = end.stop_reason;
        }
        piece
    }
}

/// Cuts off a prompt's text what the answer changes of it; `whole` is the text of both. If the prompt ends within a
/// character, its own text has U+FFFD there, and the answer's begins with the whole character.
fn cut(text: &mut String, whole: crate::Result<String>) {
    if let Ok(whole) = whole {
        let same = text.chars().zip(whole.chars()).take_while(|(a, b)| a == b);
        text.truncate(same.map(|(a, _)| a.len_utf8()).sum());
    }
}

impl Shape for Completions {
    type Choice = CompletionChoice;
    type Chunk = CompletionChoice;
    const PREFIX: &'static str = "cmpl";
    const OBJECTS: [&'static str; 2] = ["text_completion"; 2];

    fn add(&mut self, index: usize, delta: Delta) {
        let first = self.pending[index].choice.is_none();
        let piece = self.piece(index, delta, first);
        match &mut self.pending[index].choice {
            none @ None => *none = Some(piece),
            Some(whole) => {
                whole.text.push_str(&piece.text);
                if let (Some(lists), Some(later)) = (&mut whole.logprobs, piece.logprobs) {
                    lists.extend(later);
                }
                if let (Some(ids), Some(later)) = (&mut whole.token_ids, piece.token_ids) {
                    ids.extend(later);
                }
                whole.finish_reason = piece.finish_reason;
                whole.stop_reason = piece.stop_reason;
            }
        }
    }

    fn choices(self) -> Vec<CompletionChoice> {
        self.pending.into_iter().filter_map(|p| p.choice).collect()
    }

    fn chunks(&mut self, index: usize, delta: Delta) -> Vec<CompletionChoice> {
        let first = self.pending[index].choice.is_none();
        if first {
            self.pending[index].choice = Some(CompletionChoice::default()); // marks that the choice has begun
        }
        vec![self.piece(index, delta, first)]
    }
}
