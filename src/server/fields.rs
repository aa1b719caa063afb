//! Fields that completions and chats have in common, how a body is read, and what happens to unknown fields.

use super::{
    error::ApiError,
    messages::{Content, ContentShape},
    options::ServerOptions,
    policy::{self, UnknownFields},
};
use crate::{GenerateOptions, Sampling, SamplingDefaults, error::Error, ops::sample::MAX_STOP_IDS};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use utoipa::ToSchema;

/// Most answers to one prompt.
const MAX_N: u64 = 128;
/// Most stop strings, and most bytes of each: every one is searched for after every token.
const MAX_STOPS: usize = 64;
const MAX_STOP_BYTES: usize = 1024;
/// Most stop ids of a request.
const MAX_STOP_TOKENS: usize = 256;
/// Most alternatives to a token that are reported.
pub(super) const MAX_LOGPROBS: u32 = 20;

/// Fields of completions and chats. A field that is `null` counts as absent.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct Common {
    /// One of the names of `/v1/models`; absent, the model that is served.
    pub model: Option<String>,
    /// Most tokens of an answer. Absent: 16 for completions, until the context is full for chats.
    pub max_tokens: Option<u64>,
    /// The same as `max_tokens`.
    pub max_completion_tokens: Option<u64>,
    /// Divides the logits. 0 takes the most likely token; anything else below 0.001 counts as 0.001. 1 when absent.
    #[schema(minimum = 0, maximum = 100)]
    pub temperature: Option<f32>,
    /// Only the most likely tokens that together have this probability; 0 takes the most likely token.
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f32>,
    /// Only this many of the most likely tokens; 0 and -1 are off.
    #[schema(minimum = -1)]
    pub top_k: Option<i64>,
    /// Only tokens with at least this share of the most likely token's probability.
    #[schema(minimum = 0, maximum = 1)]
    pub min_p: Option<f32>,
    /// Answers to each prompt, 1 to 128.
    #[schema(minimum = 1, maximum = 128)]
    pub n: Option<u64>,
    /// Send the answer as it is made, as server-sent events.
    pub stream: Option<bool>,
    /// What a stream also carries.
    pub stream_options: Option<StreamOptions>,
    /// The answer ends before the first of these.
    #[schema(value_type = Option<OneOrMany>)]
    pub stop: Option<Stop>,
    /// The same seed and prompt give the same answer; answer i has seed + i. When absent, the seed is new each time.
    pub seed: Option<i64>,
    /// Added to the logits of tokens; keys are token ids.
    pub logit_bias: Option<BTreeMap<String, f32>>,
    /// Taken from the logit of each token in the answer.
    #[schema(minimum = -100, maximum = 100)]
    pub presence_penalty: Option<f32>,
    /// Taken from a token's logit for each time that it is in the answer.
    #[schema(minimum = -100, maximum = 100)]
    pub frequency_penalty: Option<f32>,
    /// Divides the logits of tokens in prompt and answer.
    #[schema(minimum = 0.01, maximum = 100)]
    pub repetition_penalty: Option<f32>,
    /// The answer does not end before this many tokens.
    pub min_tokens: Option<u32>,
    /// The model's end-of-text tokens do not end the answer.
    pub ignore_eos: Option<bool>,
    /// Ids that end the answer besides the model's own.
    pub stop_token_ids: Option<Vec<u32>>,
    /// A stop string that ends the answer stays in it.
    pub include_stop_str_in_output: Option<bool>,
    /// Leave special tokens out of the text; true when absent.
    pub skip_special_tokens: Option<bool>,
    /// Also report token ids.
    pub return_token_ids: Option<bool>,
    /// Log-probabilities of the prompt's tokens, with this many of the most likely ones, 0 to 20.
    #[schema(maximum = 20)]
    pub prompt_logprobs: Option<u32>,
    /// What the answer must look like.
    pub response_format: Option<ResponseFormat>,
    /// What the answer must look like, in vLLM's form.
    pub structured_outputs: Option<StructuredOutputs>,
    /// The same as `structured_outputs.json`.
    pub guided_json: Option<Value>,
    /// The same as `structured_outputs.regex`.
    pub guided_regex: Option<String>,
    /// The same as `structured_outputs.choice`.
    pub guided_choice: Option<Vec<String>>,
    /// The same as `structured_outputs.grammar`.
    pub guided_grammar: Option<String>,
    /// Whether the next tokens are guessed from text that came before: the answer comes faster and is the same. When
    /// absent, the server's own setting counts; false also leaves `prediction` out.
    pub speculate: Option<bool>,
    /// A text that much of the answer may repeat, such as one that is to be changed in a few places: the answer comes
    /// faster, and is the same.
    pub prediction: Option<Prediction>,
}

/// Text that the answer may repeat.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct Prediction {
    /// `content`
    #[serde(rename = "type")]
    #[allow(dead_code)] // only one kind exists
    kind: PredictionKind,
    /// A text, or parts of type text, which are joined by line ends.
    #[schema(value_type = ContentShape)]
    pub content: Content,
}

/// Kinds of predictions.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum PredictionKind {
    Content,
}

/// What a stream also carries.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct StreamOptions {
    /// A last event with the counts of tokens.
    pub include_usage: Option<bool>,
    /// The counts with every event.
    pub continuous_usage_stats: Option<bool>,
}

/// What the answer must look like.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct ResponseFormat {
    /// `text`, `json_object` or `json_schema`.
    #[serde(rename = "type")]
    pub kind: ResponseKind,
    /// The schema, with `json_schema`.
    pub json_schema: Option<NamedSchema>,
}

/// Kinds of answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum ResponseKind {
    Text,
    JsonObject,
    JsonSchema,
}

/// A JSON schema. `name`, `description` and `strict` change nothing: every answer follows the schema.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct NamedSchema {
    #[allow(dead_code)]
    name: Option<String>,
    #[allow(dead_code)]
    description: Option<String>,
    #[allow(dead_code)]
    strict: Option<bool>,
    /// The schema itself.
    pub schema: Option<Value>,
}

/// What the answer must look like: exactly one of these.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct StructuredOutputs {
    /// A JSON schema.
    pub json: Option<Value>,
    /// Any JSON object.
    pub json_object: Option<bool>,
    /// A regular expression for the whole answer, in the syntax of the crate `regex`.
    pub regex: Option<String>,
    /// One of these texts.
    pub choice: Option<Vec<String>>,
    /// A grammar in Lark's syntax.
    pub grammar: Option<String>,
}

/// A text or a list of texts.
#[derive(ToSchema)]
#[serde(untagged)]
#[allow(dead_code)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// Stop strings.
#[derive(Debug, Deserialize)]
#[serde(try_from = "Value")]
pub(super) struct Stop(pub Vec<String>);

impl TryFrom<Value> for Stop {
    type Error = &'static str;
    fn try_from(value: Value) -> Result<Stop, &'static str> {
        let text = |value| match value {
            Value::String(text) => Ok(text),
            _ => Err("expected a text or a list of texts"),
        };
        match value {
            Value::Array(list) => list.into_iter().map(text).collect::<Result<_, _>>().map(Stop),
            one => text(one).map(|text| Stop(vec![text])),
        }
    }
}

impl ResponseFormat {
    /// JSON that follows `schema`.
    pub fn schema(schema: Value) -> ResponseFormat {
        let json_schema = NamedSchema { name: None, description: None, strict: None, schema: Some(schema) };
        ResponseFormat { kind: ResponseKind::JsonSchema, json_schema: Some(json_schema) }
    }
}

impl Common {
    /// Answers to each prompt.
    pub fn n(&self) -> Result<usize, ApiError> {
        match self.n.unwrap_or(1) {
            n if (1..=MAX_N).contains(&n) => Ok(n as usize),
            n => Err(ApiError::invalid("n", format!("n is {n}, allowed is 1 to {MAX_N}"))),
        }
    }

    /// Most tokens of an answer, if the request says so, and the field that says it.
    pub fn limit(&self) -> Result<Option<(usize, &'static str)>, ApiError> {
        let (tokens, name) = match (self.max_tokens, self.max_completion_tokens) {
            (Some(a), Some(b)) if a != b => {
                let message = format!("max_tokens is {a} and max_completion_tokens {b}: give one of them");
                return Err(ApiError::invalid("max_tokens", message));
            }
            (Some(n), _) => (n, "max_tokens"),
            (None, Some(n)) => (n, "max_completion_tokens"),
            (None, None) => return Ok(None),
        };
        Ok(Some((usize::try_from(tokens).unwrap_or(usize::MAX), name)))
    }

    /// Leave special tokens out of the text.
    pub fn skip_special(&self) -> bool {
        self.skip_special_tokens.unwrap_or(true)
    }

    /// How an answer goes on and when it ends, except for its length; checked for a model with `vocab` ids and `eos`
    /// own tokens that end a text. Where the request is silent, the recommendation of the model's author counts.
    pub fn options(&self, vocab: usize, eos: usize, by: &SamplingDefaults) -> Result<GenerateOptions, ApiError> {
        let stop_ids = self.stop_token_ids.clone().unwrap_or_default();
        if stop_ids.len() > MAX_STOP_TOKENS {
            let message = format!("{} stop ids, at most {MAX_STOP_TOKENS} are allowed", stop_ids.len());
            return Err(ApiError::invalid("stop_token_ids", message));
        }
        if let Some(id) = stop_ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(ApiError::invalid("stop_token_ids", format!("{id} is not below the vocabulary's {vocab}")));
        }
        let ignore_eos = self.ignore_eos.unwrap_or(false);
        let options = GenerateOptions {
            sampling: self.sampling(vocab, by)?,
            stop: self.stops()?,
            include_stop: self.include_stop_str_in_output.unwrap_or(false),
            keep_special: !self.skip_special(),
            ignore_eos,
            stop_ids,
            ..GenerateOptions::default()
        };
        let ends = options.stop_ids.len() + if ignore_eos { 0 } else { eos };
        if options.sampling.min_tokens > 0 && ends > MAX_STOP_IDS {
            let message =
                format!("min_tokens works with at most {MAX_STOP_IDS} ids that end the text, here are {ends}");
            return Err(ApiError::invalid("min_tokens", message));
        }
        Ok(options)
    }

    fn sampling(&self, vocab: usize, by: &SamplingDefaults) -> Result<Sampling, ApiError> {
        let default = Sampling::recommended(by);
        let top_k = match self.top_k {
            None => default.top_k,
            Some(-1) => 0,
            Some(k) => u32::try_from(k)
                .map_err(|_| ApiError::invalid("top_k", format!("top_k is {k}, allowed is -1 (off) and from 0 on")))?,
        };
        let bias = |(key, &bias): (&String, &f32)| match key.parse() {
            Ok(id) => Ok((id, bias)),
            Err(_) => Err(ApiError::invalid("logit_bias", format!("logit_bias: {key:?} is no token id"))),
        };
        let sampling = Sampling {
            temperature: self.temperature.or(by.temperature).unwrap_or(1.0),
            top_k,
            top_p: self.top_p.unwrap_or(default.top_p),
            min_p: self.min_p.unwrap_or(default.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(default.repetition_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(default.frequency_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(default.presence_penalty),
            logit_bias: self.logit_bias.iter().flatten().map(bias).collect::<Result<_, _>>()?,
            seed: self.seed.map_or_else(|| fastrand::u64(..), |seed| seed as u64),
            min_tokens: self.min_tokens.unwrap_or(default.min_tokens),
        };
        match sampling.check(vocab) {
            Ok(()) => Ok(sampling),
            // The message begins with the name of the option, which is also the field's name.
            Err(Error::Input(message)) => {
                let end = message.find([' ', ':']).unwrap_or(message.len());
                Err(ApiError::invalid(&message[..end], &message))
            }
            Err(other) => Err(ApiError::bad(other.to_string())),
        }
    }

    fn stops(&self) -> Result<Vec<String>, ApiError> {
        let stops = self.stop.as_ref().map_or(&[][..], |stop| &stop.0);
        let wrong = |message: String| Err(ApiError::invalid("stop", message));
        if stops.len() > MAX_STOPS {
            return wrong(format!("{} stop strings, at most {MAX_STOPS} are allowed", stops.len()));
        }
        match stops.iter().position(|s| s.is_empty() || s.len() > MAX_STOP_BYTES) {
            Some(i) => wrong(format!("stop string {i} has {} bytes, allowed is 1 to {MAX_STOP_BYTES}", stops[i].len())),
            None => Ok(stops.to_vec()),
        }
    }
}

/// A request, and the names of its fields that change nothing.
pub(super) struct Parsed<T> {
    pub common: Common,
    pub own: T,
    pub ignored: Vec<String>,
}

/// Reads the body of a request that has the fields of `T` and those of [`Common`].
pub(super) fn parse<T: DeserializeOwned>(
    body: &[u8],
    options: &ServerOptions,
    refused: &[policy::Refused],
) -> Result<Parsed<T>, ApiError> {
    let (common, own, ignored) = parse_two(body, options.unknown_fields, refused)?;
    Ok(Parsed { common, own, ignored })
}

/// Reads the body of a request that has the fields of `A` and those of `B`; also gives the names of fields that change
/// nothing.
pub(super) fn parse_two<A: DeserializeOwned, B: DeserializeOwned>(
    body: &[u8],
    unknown: UnknownFields,
    refused: &[policy::Refused],
) -> Result<(A, B, Vec<String>), ApiError> {
    let value = json(body)?;
    let (mut unknown_to_a, mut unknown_to_b) = (BTreeSet::new(), BTreeSet::new());
    let (a, b) = (read(&value, &mut unknown_to_a)?, read(&value, &mut unknown_to_b)?);
    // Each of the two sees the other's fields as unknown, so only names that both do not know count; what is inside a
    // field is read by its owner alone.
    let both = |path: &&Vec<String>| path.len() > 1 || unknown_to_a.contains(*path) && unknown_to_b.contains(*path);
    let all: BTreeSet<Vec<String>> = unknown_to_a.union(&unknown_to_b).filter(both).cloned().collect();
    Ok((a, b, policy::judge(&value, &all, refused, unknown)?))
}

/// Reads the body of a request that has the fields of `T` only.
pub(super) fn parse_alone<T: DeserializeOwned>(
    body: &[u8],
    unknown: UnknownFields,
    refused: &[policy::Refused],
) -> Result<(T, Vec<String>), ApiError> {
    let value = json(body)?;
    let mut ignored = BTreeSet::new();
    let own = read(&value, &mut ignored)?;
    Ok((own, policy::judge(&value, &ignored, refused, unknown)?))
}

fn json(body: &[u8]) -> Result<Value, ApiError> {
    let body = body.strip_prefix("\u{FEFF}".as_bytes()).unwrap_or(body); // the byte order mark of some editors and clients
    let value = serde_json::from_slice(body).map_err(|e| ApiError::bad(format!("the body is not valid JSON: {e}")))?;
    match value {
        Value::Object(mut map) => {
            map.values_mut().for_each(whole);
            Ok(Value::Object(map))
        }
        _ => Err(ApiError::bad("the body is not a JSON object")),
    }
}

/// Turns a whole number that is written `4.0` into an integer: some clients have only one kind of number. What is
/// inside an object, such as a schema, stays as it is.
fn whole(value: &mut Value) {
    match value {
        Value::Array(list) => list.iter_mut().for_each(whole),
        Value::Number(number) if number.is_f64() => {
            let float = number.as_f64().filter(|x| x.fract() == 0.0 && (-(2f64.powi(63))..2f64.powi(63)).contains(x));
            if let Some(float) = float {
                *value = Value::from(float as i64);
            }
        }
        _ => {}
    }
}

/// Reads `T`, and notes the paths of what `T` does not know.
fn read<T: DeserializeOwned>(value: &Value, unknown: &mut BTreeSet<Vec<String>>) -> Result<T, ApiError> {
    let mut note = |path: serde_ignored::Path| {
        let path = path.to_string();
        unknown.insert(path.split('.').filter(|part| *part != "?").map(String::from).collect());
    };
    serde_path_to_error::deserialize(serde_ignored::Deserializer::new(value, &mut note)).map_err(|e| {
        let (path, message) = (e.path().to_string(), e.inner().to_string());
        match message.strip_prefix("missing field `").and_then(|rest| rest.split('`').next()) {
            Some(field) if path == "." => ApiError::invalid(field, message.clone()),
            Some(field) => ApiError::invalid(format!("{path}.{field}"), message.clone()),
            None => ApiError::invalid(&path, format!("{path}: {message}")),
        }
    })
}
