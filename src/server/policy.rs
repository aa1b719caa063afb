//! Fields that aoji does not support are refused, or ignored and named in a header; none is dropped silently.

use super::error::ApiError;
use serde_json::Value;
use std::{collections::BTreeSet, str::FromStr};

/// What happens to unknown fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UnknownFields {
    /// The field is named in the header `x-aoji-ignored-params`.
    #[default]
    Warn,
    /// The request is refused.
    Reject,
    /// Nothing.
    Ignore,
}

impl FromStr for UnknownFields {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        one_of(s, &[("warn", Self::Warn), ("reject", Self::Reject), ("ignore", Self::Ignore)])
    }
}

/// The value of `known` that has the name `s`.
pub(super) fn one_of<T: Copy>(s: &str, known: &[(&str, T)]) -> Result<T, String> {
    let found = known.iter().find(|(name, _)| *name == s).map(|(_, value)| *value);
    found.ok_or_else(|| {
        let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
        let (last, others) = names.split_last().unwrap_or((&"", &[]));
        format!("{s:?}: expected {} or {last}", others.join(", "))
    })
}

/// Known fields that change nothing here. docs/server.md lists them; `[]` stands for every element of a list.
pub(super) const IGNORED: &[&str] = &[
    "cache_prompt",
    "cache_salt",
    "messages[].annotations",
    "messages[].name",
    "messages[].reasoning_content",
    "messages[].refusal",
    "metadata",
    "priority",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "reasoning",
    "reasoning_effort",
    "request_id",
    "safety_identifier",
    "service_tier",
    "store",
    "stream_options.include_obfuscation",
    "timings_per_token",
    "user",
    "verbosity",
];

/// A known field that is refused: its name, a value that asks for nothing and is therefore allowed, and what to do
/// instead. `null`, `false`, `[]` and `{}` ask for nothing either.
pub(super) type Refused = (&'static str, &'static str, &'static str);

const SAMPLER: &str = "aoji has no such sampler; it has temperature, top_p, top_k, min_p and three penalties";
const TEXT: &str = "aoji reads and writes text only";

/// What both APIs refuse.
pub(super) const REFUSED: &[Refused] = &[
    ("allowed_token_ids", "", "use logit_bias, or structured_outputs"),
    ("audio", "", TEXT),
    ("bad_words", "", "use logit_bias for single tokens"),
    ("documents", "", "put them into the messages"),
    ("dry_multiplier", "0", SAMPLER),
    ("early_stopping", "", "aoji has no beam search"),
    ("function_call", "\"none\"", "use tool_choice"),
    ("functions", "", "use tools"),
    ("grammar", "", "use structured_outputs.grammar, in Lark's syntax"),
    (
        "guided_decoding_backend",
        "",
        "there is one only, which takes JSON schemas, regular expressions and Lark grammars",
    ),
    ("guided_whitespace_pattern", "", "JSON is written compactly, without blanks"),
    ("json_schema", "", "use response_format"),
    ("length_penalty", "1", "aoji has no beam search"),
    ("logprob_token_ids", "", "use logprobs"),
    ("lora", "", "adapters are added when the server starts, with --lora"),
    ("mirostat", "0", SAMPLER),
    ("mm_processor_kwargs", "", TEXT),
    ("modalities", "[\"text\"]", TEXT),
    ("moderation", "", "aoji moderates nothing"),
    ("n_predict", "", "use max_tokens"),
    ("n_probs", "0", "use logprobs"),
    ("prompt_embeds", "", "give text or token ids"),
    ("repeat_penalty", "1", "use repetition_penalty"),
    ("samplers", "", "the order of the samplers is fixed: penalties, temperature, top_k, top_p, min_p"),
    ("spaces_between_special_tokens", "true", "special tokens are written as they are"),
    ("tfs_z", "1", SAMPLER),
    ("top_n_sigma", "-1", SAMPLER),
    ("truncate_prompt_tokens", "", "aoji does not cut prompts: send a shorter one"),
    ("typical_p", "1", SAMPLER),
    ("use_beam_search", "", "aoji has no beam search"),
    ("web_search_options", "", "aoji does not search; offer a function that does in tools"),
    ("xtc_probability", "0", SAMPLER),
];

/// Refuses fields that must be refused, and returns the names of those that were ignored.
pub(super) fn judge(
    request: &Value,
    unknown: &BTreeSet<Vec<String>>,
    refused: &[Refused],
    policy: UnknownFields,
) -> Result<Vec<String>, ApiError> {
    let mut ignored = BTreeSet::new();
    for path in unknown {
        let value = at(request, path);
        if value.is_some_and(asks_for_nothing) {
            continue;
        }
        let name = name(path);
        if let Some((_, neutral, why)) = refused.iter().chain(REFUSED).find(|(field, ..)| *field == name) {
            if value.is_some_and(|v| same(v, neutral)) {
                continue;
            }
            return Err(ApiError::unsupported(&name, why));
        }
        if !IGNORED.contains(&name.as_str()) {
            match policy {
                UnknownFields::Warn => {}
                UnknownFields::Ignore => continue,
                UnknownFields::Reject => {
                    let why = "aoji knows no such field (it was started with --unknown-fields reject)";
                    return Err(ApiError::unsupported(&path.join("."), why));
                }
            }
        }
        ignored.insert(name);
    }
    Ok(ignored.into_iter().collect())
}

fn at<'a>(request: &'a Value, path: &[String]) -> Option<&'a Value> {
    path.iter().try_fold(request, |value, part| match value {
        Value::Array(list) => list.get(part.parse::<usize>().ok()?),
        other => other.get(part),
    })
}

fn asks_for_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

/// Whether `value` equals the JSON text `neutral`; numbers are compared by value.
fn same(value: &Value, neutral: &str) -> bool {
    let Ok(neutral) = serde_json::from_str::<Value>(neutral) else { return false };
    value.as_f64().map_or(*value == neutral, |number| neutral.as_f64() == Some(number))
}

/// `messages[].name`
fn name(path: &[String]) -> String {
    let mut name = String::new();
    for (i, part) in path.iter().enumerate() {
        if i > 0 && part.bytes().all(|b| b.is_ascii_digit()) {
            name.push_str("[]");
        } else {
            name.push_str(if i > 0 { "." } else { "" });
            name.push_str(part);
        }
    }
    name
}
