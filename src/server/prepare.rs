//! Turns the checked fields of a request into the jobs that the batch runs.

use super::{
    body::blocking,
    calls::CallReader,
    constrain::Format,
    error::ApiError,
    fields::{Common, MAX_LOGPROBS, ResponseKind},
    messages::{ChatMessage, encode},
    state::State,
    tools::Tools,
    worker::Guarded,
};
use crate::{GenerateOptions, Job, Pooling, Speculate};
use serde_json::Value;
use std::sync::Arc;

/// A prompt, and its text if it was sent as text.
#[derive(Default)]
pub(super) struct Prompt {
    pub ids: Vec<u32>,
    pub text: Option<String>,
    /// Whether the first id is a BOS that the text does not have.
    pub bos: bool,
}

/// A request that was read and checked.
pub(super) struct Prepared {
    pub model: String,
    pub jobs: Vec<Job>,
    /// The required format of the answers, and the field that asks for it.
    pub format: Option<(String, Format)>,
    /// The parts of a combined format, each with its field. When the format is refused, they show which part is to
    /// blame.
    pub parts: Vec<(String, Format)>,
    /// Finds the calls of functions in an answer, where there may be some.
    pub reader: Option<CallReader>,
    /// The request's `stop_token_ids`: if one of them ends an answer, the client is told.
    pub stop_ids: Vec<u32>,
    /// Lengths of the prompts.
    pub prompts: Vec<usize>,
    /// Answers to each prompt.
    pub n: usize,
    pub stream: bool,
    pub include_usage: bool,
    pub continuous_usage: bool,
    pub ignored: Vec<String>,
}

impl Prepared {
    /// The same in an API that calls the field `f` of a chat `own(f)`: only later is found what is wrong with a format.
    pub fn renamed(mut self, own: fn(&str) -> String) -> Prepared {
        self.format.iter_mut().chain(&mut self.parts).for_each(|(field, _)| *field = own(field));
        self
    }
}

/// What the APIs express in different ways.
#[derive(Default)]
pub(super) struct Wishes<'a> {
    /// Most tokens when the request does not say; if absent too, the answer may go on until the context is full.
    pub default_tokens: Option<usize>,
    pub logprobs: Option<u32>,
    pub prompt_logprobs: Option<u32>,
    /// The field that carries the prompt.
    pub field: &'static str,
    /// Functions that may be called.
    pub tools: Option<&'a Tools>,
    /// Asks for the prompts as vectors.
    pub embed: Option<Pooling>,
}

impl State {
    /// The name under which the model was asked for.
    pub fn model(&self, asked: Option<&str>) -> Result<String, ApiError> {
        let names = &self.options.names;
        match asked {
            None => Ok(names[0].clone()),
            Some(name) if names.iter().any(|n| n == name) => Ok(name.into()),
            Some(name) => Err(ApiError::no_model(name, names)),
        }
    }

    /// Makes the jobs of a request for one answer to a conversation in which functions may be called.
    pub fn converse(
        &self,
        common: Common,
        ignored: Vec<String>,
        messages: &[ChatMessage],
        begun: bool,
        tools: Option<&Tools>,
    ) -> Result<Prepared, ApiError> {
        let prompt = Prompt { ids: encode(self, messages, begun, tools)?, ..Prompt::default() };
        let wishes = Wishes { field: "messages", tools, ..Wishes::default() };
        self.prepare(common, ignored, &[prompt], &wishes)
    }

    /// Makes the jobs of a request: for each prompt its answers, one after the other.
    pub fn prepare(
        &self,
        common: Common,
        ignored: Vec<String>,
        prompts: &[Prompt],
        wishes: &Wishes<'_>,
    ) -> Result<Prepared, ApiError> {
        let model = self.model(common.model.as_deref())?;
        let config = self.engine.config();
        let n = common.n()?;
        let mut options = common.options(config.vocab, config.eos.len(), &self.options.sampling)?;
        (options.speculate, options.prediction) = self.guesses(&common)?;
        for (field, asked) in [("logprobs", wishes.logprobs), ("prompt_logprobs", wishes.prompt_logprobs)] {
            if let Some(k) = asked.filter(|k| *k > MAX_LOGPROBS) {
                return Err(ApiError::invalid(field, format!("{k} alternatives, allowed is 0 to {MAX_LOGPROBS}")));
            }
        }
        let mut format = format(&common)?.map(|(field, format)| (field.to_string(), format));
        let (mut parts, mut reader) = (Vec::new(), None);
        if let Some(tools) = wishes.tools {
            reader = Some(CallReader::new(tools.format, format.is_some(), tools.must()));
            let combined = tools.grammar(&self.tokenizer, format.as_ref().map(|(_, format)| format))?;
            parts = tools.schemas();
            parts.extend(format.replace(("tools".into(), combined)));
            options.keep_special |= tools.format.needs_special(&self.tokenizer);
        }
        if let Some((field, _)) = &format {
            ends_by_itself(field, &options)?;
        }
        let stop_ids = options.stop_ids.clone();
        let mut jobs = Vec::with_capacity(prompts.len() * n);
        for prompt in prompts {
            options.max_tokens = self.room(&common, prompt, wishes)?;
            options.check_length().map_err(|e| ApiError::from_library(e, "min_tokens"))?;
            if let Some(tokens) = options.max_tokens {
                self.metrics.max_tokens(tokens);
            }
            for i in 0..n {
                let mut options = options.clone();
                options.sampling.seed = options.sampling.seed.wrapping_add(i as u64);
                let count = |k: Option<u32>| k.map(|k| k as usize);
                jobs.push(Job {
                    prompt: prompt.ids.clone(),
                    options,
                    logprobs: count(wishes.logprobs),
                    prompt_logprobs: count(wishes.prompt_logprobs),
                    embed: wishes.embed,
                    constraint: None, // `constrain` adds it
                });
            }
        }
        let stream = common.stream.unwrap_or(false);
        let asked = common.stream_options.unwrap_or_default();
        if !stream && (asked.include_usage.is_some() || asked.continuous_usage_stats.is_some()) {
            return Err(ApiError::invalid("stream_options", "stream_options is for streams: set stream to true"));
        }
        Ok(Prepared {
            model,
            jobs,
            format,
            parts,
            reader,
            stop_ids,
            prompts: prompts.iter().map(|p| p.ids.len()).collect(),
            n,
            stream,
            include_usage: asked.include_usage.unwrap_or(false),
            continuous_usage: asked.continuous_usage_stats.unwrap_or(false),
            ignored,
        })
    }

    /// Most tokens of the answer to `prompt`, after checking that both fit the context.
    fn room(&self, common: &Common, prompt: &Prompt, wishes: &Wishes<'_>) -> Result<Option<usize>, ApiError> {
        let (max, length) = (self.engine.max_context(), prompt.ids.len());
        if length == 0 {
            return Err(ApiError::invalid(wishes.field, "the prompt is empty: expected at least one token"));
        }
        let vocab = self.engine.config().vocab;
        if let Some(id) = prompt.ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(ApiError::invalid(wishes.field, format!("token {id} is not below the vocabulary's {vocab}")));
        }
        match common.limit()? {
            Some((tokens, field)) if length.saturating_add(tokens) > max => {
                Err(ApiError::context(length, tokens, max, if length >= max { wishes.field } else { field }))
            }
            Some((tokens, _)) => Ok(Some(tokens)),
            None if length >= max => Err(ApiError::context(length, 1, max, wishes.field)),
            None => Ok(self.options.sampling.max_new_tokens.or(wishes.default_tokens).map(|n| n.min(max - length))),
        }
    }

    /// The settings for guessing the next tokens.
    fn guesses(&self, common: &Common) -> Result<(Speculate, Vec<u32>), ApiError> {
        let speculate = match common.speculate {
            Some(false) => return Ok((Speculate::Off, Vec::new())),
            Some(true) if self.options.speculate == Speculate::Off => Speculate::Ngram,
            Some(true) => self.options.speculate,
            None => self.options.speculate,
        };
        let Some(prediction) = &common.prediction else { return Ok((speculate, Vec::new())) };
        let ids = self.tokenizer.encode_plain(&prediction.content.0);
        let ids = ids.map_err(|e| ApiError::from_library(e, "prediction"))?;
        match self.engine.max_context() {
            max if ids.len() > max => {
                let message =
                    format!("the prediction has {} tokens, and the context {max}: send a shorter one", ids.len());
                Err(ApiError::invalid("prediction", message))
            }
            _ => Ok((speculate, ids)),
        }
    }

    /// Constrains the jobs of a request to its format, if it has one. Compiling a schema takes milliseconds.
    pub async fn constrain(self: &Arc<Self>, request: &mut Prepared) -> Result<(), ApiError> {
        let Some((field, format)) = request.format.take() else { return Ok(()) };
        let parts = std::mem::take(&mut request.parts);
        let state = self.clone();
        let compile = move || {
            let grammars = state.grammars().map_err(|why| ApiError::unsupported(&field, why))?;
            grammars.compile(&format).map_err(|why| {
                let wrong = |(field, part): &(String, Format)| Some((field.clone(), grammars.compile(part).err()?));
                let (field, why) = parts.iter().find_map(wrong).unwrap_or((field, why));
                ApiError::invalid(&field, format!("{field}: {why}"))
            })
        };
        let grammar = blocking(compile).await?;
        for job in &mut request.jobs {
            job.constraint = Some(Box::new(Guarded(grammar.clone())));
        }
        Ok(())
    }
}

/// Refuses options that would keep an answer from ending where its format ends.
fn ends_by_itself(field: &str, options: &GenerateOptions) -> Result<(), ApiError> {
    for (other, set) in [("ignore_eos", options.ignore_eos), ("min_tokens", options.sampling.min_tokens > 0)] {
        if set {
            let message = format!(
                "{other} keeps an answer from ending, but {field} decides where it ends: give only one of them"
            );
            return Err(ApiError::invalid(other, message));
        }
    }
    Ok(())
}

/// What the answer must look like, and the field that says so.
fn format(common: &Common) -> Result<Option<(&'static str, Format)>, ApiError> {
    let mut found = Vec::new();
    if let Some(format) = &common.response_format {
        let field = "response_format";
        match (format.kind, &format.json_schema) {
            (ResponseKind::Text, _) => {}
            (ResponseKind::JsonObject, _) => found.push((field, Format::JsonObject)),
            (ResponseKind::JsonSchema, Some(named)) => {
                let schema = schema("response_format.json_schema.schema", named.schema.as_ref())?;
                found.push((field, Format::JsonSchema(schema)));
            }
            (ResponseKind::JsonSchema, None) => {
                return Err(ApiError::invalid("response_format.json_schema", "type json_schema needs a json_schema"));
            }
        }
    }
    let outputs = common.structured_outputs.as_ref();
    let both =
        [("structured_outputs", outputs.and_then(|o| o.json.as_ref())), ("guided_json", common.guided_json.as_ref())];
    for (field, json) in both {
        if json.is_some() {
            found.push((field, Format::JsonSchema(schema(field, json)?)));
        }
    }
    if outputs.and_then(|o| o.json_object) == Some(true) {
        found.push(("structured_outputs", Format::JsonObject));
    }
    let texts = [
        ("structured_outputs", outputs.and_then(|o| o.regex.clone()).map(Format::Regex)),
        ("structured_outputs", outputs.and_then(|o| o.choice.clone()).map(Format::Choice)),
        ("structured_outputs", outputs.and_then(|o| o.grammar.clone()).map(Format::Lark)),
        ("guided_regex", common.guided_regex.clone().map(Format::Regex)),
        ("guided_choice", common.guided_choice.clone().map(Format::Choice)),
        ("guided_grammar", common.guided_grammar.clone().map(Format::Lark)),
    ];
    found.extend(texts.into_iter().filter_map(|(field, format)| Some((field, format?))));
    match found.len() {
        0 | 1 => Ok(found.pop()),
        _ => {
            let field = found[1].0;
            let first = found[0].0;
            Err(ApiError::invalid(
                field,
                format!("{first} and {field} both set the format of the answer: give only one"),
            ))
        }
    }
}

/// A schema may be an object, or the text of one.
fn schema(field: &str, value: Option<&Value>) -> Result<Value, ApiError> {
    let wrong = |message: String| Err(ApiError::invalid(field, format!("{field}: {message}")));
    match value {
        Some(Value::Object(map)) => Ok(Value::Object(map.clone())),
        Some(Value::String(text)) => match serde_json::from_str(text) {
            Ok(Value::Object(map)) => Ok(Value::Object(map)),
            Ok(_) => wrong("expected a JSON schema, found JSON that is no object".into()),
            Err(e) => wrong(format!("expected a JSON schema, found text that is no JSON: {e}")),
        },
        Some(_) => wrong("expected a JSON schema, an object".into()),
        None => wrong("there is no schema".into()),
    }
}
