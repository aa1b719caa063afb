//! Routes of the tokenizer, in vLLM's shape, which lm-evaluation-harness also uses.

use super::{
    body::{Body, work},
    error::{ApiError, ErrorReply},
    fields::parse_alone,
    logprobs::name,
    messages::{self, ChatMessage, begun, only},
    reply::ignored_header,
    state::Server,
    tools::{Tool, Tools},
};
use crate::{Message, Template};
use axum::{
    Json,
    extract::State,
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

/// What is to be tokenized: a text, or a conversation.
#[derive(Deserialize, ToSchema)]
struct TokenizeRequest {
    /// One of the names of `/v1/models`.
    model: Option<String>,
    /// A text.
    prompt: Option<String>,
    /// A conversation, which becomes a prompt as for a chat.
    messages: Option<Vec<ChatMessage>>,
    /// Functions that a conversation may call.
    tools: Option<Vec<Tool>>,
    /// Put BOS in front of a text; true when absent.
    add_special_tokens: Option<bool>,
    /// For a conversation, false only beside `continue_final_message`: the prompt ends where an answer begins.
    add_generation_prompt: Option<bool>,
    /// For a conversation: its last message is the beginning of the answer, and the prompt ends with it.
    continue_final_message: Option<bool>,
    /// Also say what the tokens are.
    return_token_strs: Option<bool>,
}

/// Token ids.
#[derive(Serialize, ToSchema)]
struct TokenizeReply {
    count: usize,
    /// Most tokens of prompt and answer together.
    max_model_len: usize,
    tokens: Vec<u32>,
    /// With `return_token_strs`: their texts, `bytes:\x..` for a part of a character.
    token_strs: Option<Vec<String>>,
}

/// Text or a conversation to token ids.
#[utoipa::path(
    post, path = "/tokenize", tag = "tokenizer", security((), ("key" = [])), request_body = TokenizeRequest,
    responses((status = 200, description = "Ids", body = TokenizeReply), (status = "4XX", description = "The request is wrong", body = ErrorReply))
)]
pub(super) async fn tokenize(State(server): State<Server>, Body(body): Body) -> Result<Response, ApiError> {
    let state = server.0.clone();
    let bytes = body.len();
    let reply = move || {
        let (request, ignored) = parse_alone::<TokenizeRequest>(&body, state.options.unknown_fields, &[])?;
        state.model(request.model.as_deref())?;
        let tokenizer = &state.tokenizer;
        let tokens = match (&request.prompt, &request.messages) {
            (Some(text), None) => match request.add_special_tokens.unwrap_or(true) {
                true => Template::Raw.encode(tokenizer, &[Message::new("user", text)], None),
                false => tokenizer.encode(text, false),
            }
            .map_err(|e| ApiError::from_library(e, "prompt"))?,
            (None, Some(messages)) => {
                only("add_special_tokens", request.add_special_tokens, false, "the template says where BOS is")?;
                let begun = begun(request.add_generation_prompt, request.continue_final_message)?;
                let functions = request.tools.unwrap_or_default().into_iter().map(|tool| tool.function).collect();
                let tools = Tools::new(functions, None, None, state.calls)?;
                messages::encode(&state, messages, begun, tools.as_ref())?
            }
            _ => {
                return Err(ApiError::invalid("prompt", "expected either prompt, a text, or messages, a conversation"));
            }
        };
        let names = || tokens.iter().map(|&id| name(tokenizer, id)).collect();
        let token_strs = request.return_token_strs.unwrap_or(false).then(names);
        let max_model_len = state.engine.max_context();
        Ok((TokenizeReply { count: tokens.len(), max_model_len, tokens, token_strs }, ignored))
    };
    let (reply, ignored) = work(bytes, reply).await?;
    Ok((ignored_header(&ignored), Json(reply)).into_response())
}

/// Token ids that are to be text.
#[derive(Deserialize, ToSchema)]
struct DetokenizeRequest {
    /// One of the names of `/v1/models`.
    model: Option<String>,
    tokens: Vec<u32>,
}

/// The text.
#[derive(Serialize, ToSchema)]
struct DetokenizeReply {
    prompt: String,
}

/// Token ids to text, special tokens included.
#[utoipa::path(
    post, path = "/detokenize", tag = "tokenizer", security((), ("key" = [])), request_body = DetokenizeRequest,
    responses((status = 200, description = "The text", body = DetokenizeReply), (status = "4XX", description = "The request is wrong", body = ErrorReply))
)]
pub(super) async fn detokenize(State(server): State<Server>, Body(body): Body) -> Result<Response, ApiError> {
    let state = server.0.clone();
    let bytes = body.len();
    let reply = move || {
        let (request, ignored) = parse_alone::<DetokenizeRequest>(&body, state.options.unknown_fields, &[])?;
        state.model(request.model.as_deref())?;
        let vocab = state.engine.config().vocab;
        if let Some(id) = request.tokens.iter().find(|&&id| id as usize >= vocab) {
            return Err(ApiError::invalid("tokens", format!("token {id} is not below the vocabulary's {vocab}")));
        }
        let prompt = state.tokenizer.decode(&request.tokens, false).map_err(|e| ApiError::from_library(e, "tokens"))?;
        Ok((DetokenizeReply { prompt }, ignored))
    };
    let (reply, ignored) = work(bytes, reply).await?;
    Ok((ignored_header(&ignored), Json(reply)).into_response())
}

/// What the checkpoint's `tokenizer_config.json` says, with the special tokens as they are used here.
#[utoipa::path(
    get, path = "/tokenizer_info", tag = "tokenizer", security((), ("key" = [])),
    responses((status = 200, description = "bos_token, eos_token, vocab_size, max_model_len, and the file's own fields", body = Object))
)]
pub(super) async fn tokenizer_info(State(server): State<Server>) -> Json<Map<String, Value>> {
    let state = &server.0;
    let mut info = state.options.tokenizer_config.clone();
    let text = |id: Option<u32>| id.and_then(|id| state.tokenizer.token(id));
    if !matches!(state.template, Template::Jinja(_)) {
        info.remove("chat_template"); // chats here do not use it
    }
    info.entry("tokenizer_class").or_insert_with(|| json!("PreTrainedTokenizerFast"));
    info.insert("bos_token".into(), json!(text(state.tokenizer.bos())));
    info.insert("eos_token".into(), json!(text(state.engine.config().eos.first().copied())));
    info.insert("vocab_size".into(), json!(state.tokenizer.vocab()));
    info.insert("max_model_len".into(), json!(state.engine.max_context()));
    Json(info)
}
