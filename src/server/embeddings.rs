//! `POST /v1/embeddings`: turns texts into vectors, made from the model's last hidden states.

use super::{
    answer::Answers,
    body::{Body, work},
    completions::{PromptShape, Prompts},
    error::{ApiError, ErrorReply},
    fields::{Common, parse_alone},
    log::RequestLog,
    memory::Remembering,
    policy::Refused,
    prepare::{Prepared, Wishes},
    reply::{count, ignored_header},
    state::{Server, State},
    usage::Tally,
};
use crate::{Job, Pooling};
use axum::{
    Extension, Json, extract,
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use utoipa::ToSchema;

/// Most inputs of a request, as many as OpenAI's server takes.
const MAX_INPUTS: usize = 2048;

/// The body of a request.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct EmbeddingRequest {
    /// One of the names of `/v1/models`; absent, the model that is served.
    model: Option<String>,
    /// A text, a list of texts, token ids, or a list of lists of token ids.
    #[schema(value_type = PromptShape)]
    input: Prompts,
    /// How a vector is written; `float` when absent.
    encoding_format: Option<Encoding>,
    /// Only this many of its first numbers.
    #[schema(minimum = 1)]
    dimensions: Option<usize>,
    /// How the hidden states of an input's tokens become one vector; `mean` when absent.
    pooling: Option<PoolingName>,
    /// Put BOS in front of a text; true when absent.
    add_special_tokens: Option<bool>,
}

/// How a vector is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Encoding {
    /// A list of numbers.
    Float,
    /// Its bytes as 32-bit floats, little-endian, in base64.
    Base64,
}

#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum PoolingName {
    /// Their mean.
    Mean,
    /// That of the last token.
    Last,
}

/// The vectors.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct EmbeddingReply {
    /// `list`
    object: &'static str,
    data: Vec<Embedding>,
    /// The name under which the model was asked for.
    model: String,
    usage: EmbeddingUsage,
}

/// The vector of an input, of length 1.
#[derive(Debug, Serialize, ToSchema)]
struct Embedding {
    /// `embedding`
    object: &'static str,
    /// The input's place.
    index: usize,
    embedding: Vector,
}

/// Numbers, or base64.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
enum Vector {
    Float(Vec<f32>),
    Base64(String),
}

/// Counts of tokens.
#[derive(Debug, Serialize, ToSchema)]
struct EmbeddingUsage {
    prompt_tokens: usize,
    total_tokens: usize,
}

const REFUSED: &[Refused] = &[
    ("input_type", "", "the models here know no kinds of input: put the words for it into the text"),
    ("stream", "", "vectors come as a whole"),
];

/// Makes vectors of texts.
#[utoipa::path(
    post, path = "/v1/embeddings", tag = "openai", security((), ("key" = [])), request_body = EmbeddingRequest,
    responses(
        (status = 200, description = "The vectors", body = EmbeddingReply),
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
    let reader = state.clone();
    let (request, wish) = work(body.len(), move || read(&reader, &body)).await?;
    let mut tally = Tally::new(&request.prompts, request.n);
    log.tally(&tally);
    let mut data = Vec::with_capacity(request.jobs.len());
    let mut jobs = request.jobs.into_iter();
    // At most as many at once as can run, so that a long list leaves room in the queue for other requests.
    loop {
        let some: Vec<Job> = jobs.by_ref().take(state.options.sequences).collect();
        if some.is_empty() {
            break;
        }
        let (first, n) = (data.len(), some.len());
        let running = state.worker.submit(some).await.inspect_err(|e| state.refused(e))?;
        let mut answers = Answers::new(running, Vec::new(), n, Remembering::new(state.memory.clone(), log.key(), n));
        data.extend((first..first + n).map(|index| Embedding {
            object: "embedding",
            index,
            embedding: wish.write(Vec::new()),
        }));
        while let Some(next) = answers.next().await {
            let (index, delta) = next?;
            count(&mut tally, first + index, &delta, &log);
            if let Some(vector) = delta.embedding {
                data[first + index].embedding = wish.write(vector);
            }
        }
    }
    let prompt_tokens = tally.usage().prompt_tokens;
    let usage = EmbeddingUsage { prompt_tokens, total_tokens: prompt_tokens };
    let reply = EmbeddingReply { object: "list", data, model: request.model, usage };
    Ok((ignored_header(&request.ignored), Json(reply)).into_response())
}

fn read(state: &State, body: &[u8]) -> Result<(Prepared, Wish), ApiError> {
    let (own, ignored) = parse_alone::<EmbeddingRequest>(body, state.options.unknown_fields, REFUSED)?;
    let dim = state.engine.config().dim;
    let dimensions = own.dimensions.unwrap_or(dim);
    if !(1..=dim).contains(&dimensions) {
        let message = format!("dimensions is {dimensions}, allowed is 1 to {dim}, the width of the model");
        return Err(ApiError::invalid("dimensions", message));
    }
    let n = own.input.len();
    if n > MAX_INPUTS {
        return Err(ApiError::invalid("input", format!("{n} inputs, at most {MAX_INPUTS} are allowed")));
    }
    let prompts = own.input.encode(&state.tokenizer, own.add_special_tokens.unwrap_or(true), "input")?;
    let embed = match own.pooling {
        None | Some(PoolingName::Mean) => Pooling::Mean,
        Some(PoolingName::Last) => Pooling::Last,
    };
    let wishes = Wishes { field: "input", embed: Some(embed), ..Wishes::default() };
    let common = Common { model: own.model, max_tokens: Some(0), ..Common::default() };
    let request = state.prepare(common, ignored, &prompts, &wishes)?;
    let base64 = own.encoding_format == Some(Encoding::Base64);
    Ok((request, Wish { dimensions, base64 }))
}

/// How vectors are wanted.
struct Wish {
    dimensions: usize,
    base64: bool,
}

impl Wish {
    fn write(&self, mut vector: Vec<f32>) -> Vector {
        vector.truncate(self.dimensions);
        let vector = unit(vector);
        if self.base64 { Vector::Base64(base64(&vector)) } else { Vector::Float(vector) }
    }
}

/// `vector` scaled to length 1, as OpenAI's vectors are; a vector of zeros stays.
fn unit(vector: Vec<f32>) -> Vec<f32> {
    let length = vector.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    if length == 0.0 { vector } else { vector.into_iter().map(|x| (f64::from(x) / length) as f32).collect() }
}

/// The bytes of `vector`, little-endian, in base64 (RFC 4648, section 4).
fn base64(vector: &[f32]) -> String {
    use base64::{Engine, engine::general_purpose::STANDARD};
    STANDARD.encode(vector.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())
}
