//! The requests of `/v1/responses`, and how they become chats.

use crate::server::{
    error::ApiError,
    fields::{Common, ResponseFormat, ResponseKind, parse_alone},
    messages::{Arguments, ChatMessage, Role, call, joined, say},
    policy::Refused,
    prepare::Prepared,
    state::State,
    tools::{Function, ToolChoice, ToolKind, Tools},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// The body of a request.
#[derive(Debug, Deserialize, ToSchema)]
pub(in crate::server) struct ResponsesRequest {
    /// One of the names of `/v1/models`; absent, the model that is served.
    model: Option<String>,
    /// The conversation: a text, or messages, calls and their results.
    #[schema(value_type = InputShape)]
    input: Input,
    /// Goes before the conversation, as its system message.
    instructions: Option<String>,
    /// Most tokens of the answer; until the context is full when absent.
    max_output_tokens: Option<u64>,
    /// Divides the logits; 0 takes the most likely token.
    #[schema(minimum = 0, maximum = 100)]
    temperature: Option<f32>,
    /// Only the most likely tokens that together have this probability.
    #[schema(minimum = 0, maximum = 1)]
    top_p: Option<f32>,
    /// Send the answer as it is made, as named server-sent events.
    stream: Option<bool>,
    /// Functions that the model may ask the client to call.
    tools: Option<Vec<ToolParam>>,
    /// `auto`, `none`, `required`, or the one that must be called.
    #[schema(value_type = Option<ChoiceShape>)]
    tool_choice: Option<Choice>,
    /// Several calls in an answer; true when absent.
    parallel_tool_calls: Option<bool>,
    /// What the answer must look like.
    text: Option<TextConfig>,
    /// Only `reasoning.encrypted_content`, which answers here never have.
    #[allow(dead_code)] // there is nothing to include
    include: Option<Vec<Include>>,
    /// Given back with the answer.
    #[schema(value_type = Option<Object>)]
    metadata: Option<Map<String, Value>>,
}

#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[schema(as = ResponsesInclude)]
enum Include {
    #[serde(rename = "reasoning.encrypted_content")]
    Reasoning,
}

#[derive(ToSchema)]
#[schema(as = ResponsesInput)]
#[serde(untagged)]
#[allow(dead_code)]
enum InputShape {
    Text(String),
    Items(Vec<ItemShape>),
}

#[derive(ToSchema)]
#[schema(as = ResponsesItem)]
#[serde(untagged)]
#[allow(dead_code)]
enum ItemShape {
    Message(MessageItem),
    Call(CallItem),
    Result(ResultItem),
}

/// The conversation, in order.
#[derive(Debug, Deserialize)]
#[serde(try_from = "Value")]
struct Input(Vec<Item>);

#[derive(Debug)]
enum Item {
    Message(MessageItem),
    Call(CallItem),
    Result(ResultItem),
}

/// A message; its `type` may be absent.
#[derive(Debug, Deserialize, ToSchema)]
struct MessageItem {
    role: InputRole,
    /// A text, or parts of the types `input_text` and `output_text`.
    #[schema(value_type = ResponsesText)]
    content: Content,
}

#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum InputRole {
    User,
    Assistant,
    System,
    Developer,
}

/// A call of a function that the assistant made, of the type `function_call`.
#[derive(Debug, Deserialize, ToSchema)]
struct CallItem {
    call_id: String,
    name: String,
    /// A JSON object as text.
    #[schema(value_type = String)]
    arguments: Arguments,
}

/// The result of a call, of the type `function_call_output`.
#[derive(Debug, Deserialize, ToSchema)]
struct ResultItem {
    call_id: String,
    /// A text, or parts of the type `input_text`.
    #[schema(value_type = ResponsesText)]
    output: Content,
}

#[derive(ToSchema)]
#[serde(untagged)]
#[allow(dead_code)]
pub(in crate::server) enum ResponsesText {
    Text(String),
    Parts(Vec<ResponsesTextPart>),
}

#[derive(ToSchema)]
#[allow(dead_code)]
pub(in crate::server) struct ResponsesTextPart {
    /// `input_text`, `output_text` or `text`
    #[schema(rename = "type")]
    kind: String,
    text: String,
}

/// Its parts, joined by line ends.
#[derive(Debug, Deserialize)]
#[serde(try_from = "Value")]
struct Content(String);

impl TryFrom<Value> for Content {
    type Error = String;
    fn try_from(value: Value) -> Result<Content, String> {
        // Other fields of an answer's text may be sent back, and are ignored.
        let more = ["annotations", "logprobs"];
        joined(&value, &["input_text", "output_text", "text"], &more).map(Content)
    }
}

impl TryFrom<Value> for Input {
    type Error = String;
    fn try_from(value: Value) -> Result<Input, String> {
        let list = match value {
            Value::String(text) => {
                let message = MessageItem { role: InputRole::User, content: Content(text) };
                return Ok(Input(vec![Item::Message(message)]));
            }
            Value::Array(list) => list,
            _ => return Err("expected a text or a list of items".into()),
        };
        let item = |(i, value): (usize, Value)| {
            let wrong = |e: serde_json::Error| format!("item {i}: {e}");
            match value.get("type").and_then(Value::as_str) {
                None | Some("message") => serde_json::from_value(value).map(Item::Message).map_err(wrong),
                Some("function_call") => serde_json::from_value(value).map(Item::Call).map_err(wrong),
                Some("function_call_output") => serde_json::from_value(value).map(Item::Result).map_err(wrong),
                Some(other) => Err(format!(
                    "item {i} is of type {other:?}: expected message, function_call or function_call_output"
                )),
            }
        };
        list.into_iter().enumerate().map(item).collect::<Result<_, _>>().map(Input)
    }
}

/// A function that the client has.
#[derive(Debug, Clone, Deserialize, Serialize, ToSchema)]
#[schema(as = ResponsesTool)]
pub(super) struct ToolParam {
    /// `function`
    #[serde(rename = "type")]
    kind: ToolKind,
    /// Up to 64 letters, digits, `_`, `-` and `.`.
    #[schema(max_length = 64)]
    name: String,
    /// What the function does, for the model.
    description: Option<String>,
    /// JSON schema of the arguments, an object.
    #[schema(value_type = Option<Object>)]
    parameters: Option<Value>,
    /// Refuse a schema with parts that cannot be enforced.
    strict: Option<bool>,
}

/// Whether functions are called, and which: as the client sent it, and what it means.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "Value")]
struct Choice(Value, ToolChoice);

impl TryFrom<Value> for Choice {
    type Error = String;
    fn try_from(value: Value) -> Result<Choice, String> {
        // In this API the name is beside the type.
        let choice = match (value.get("type").and_then(Value::as_str), value.get("name").and_then(Value::as_str)) {
            (Some("function"), Some(name)) => ToolChoice::Named(name.into()),
            (None, _) => ToolChoice::try_from(value.clone())?,
            _ => {
                return Err(format!(
                    "{value}: expected none, auto, required, or {{\"type\": \"function\", \"name\": ..}}"
                ));
            }
        };
        Ok(Choice(value, choice))
    }
}

#[derive(ToSchema)]
#[schema(as = ResponsesToolChoice)]
#[serde(untagged)]
#[allow(dead_code)]
enum ChoiceShape {
    /// `none`, `auto` or `required`
    Mode(String),
    Named(NamedFunction),
}

#[derive(ToSchema)]
#[schema(as = ResponsesNamedFunction)]
#[allow(dead_code)]
struct NamedFunction {
    /// `function`
    #[schema(rename = "type")]
    kind: String,
    name: String,
}

/// What the answer must look like.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[schema(as = ResponsesTextConfig)]
struct TextConfig {
    format: Option<TextFormat>,
}

#[derive(Debug, Clone, Deserialize, Serialize, ToSchema)]
#[schema(as = ResponsesTextFormat)]
pub(super) struct TextFormat {
    /// `text`, `json_object` or `json_schema`
    #[serde(rename = "type")]
    kind: ResponseKind,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    description: Option<String>,
    /// With `json_schema`: the schema.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    schema: Option<Value>,
    /// Changes nothing: every answer follows the schema.
    #[serde(skip_serializing_if = "Option::is_none")]
    strict: Option<bool>,
}

impl TextFormat {
    /// The format of an answer for which none was asked.
    pub fn text() -> TextFormat {
        TextFormat { kind: ResponseKind::Text, name: None, description: None, schema: None, strict: None }
    }
}

/// What a response repeats from its request.
pub(super) struct Echoed {
    pub instructions: Option<String>,
    pub max_output_tokens: Option<u64>,
    pub temperature: f32,
    pub top_p: f32,
    pub tools: Vec<ToolParam>,
    pub tool_choice: Value,
    pub parallel_tool_calls: bool,
    pub format: TextFormat,
    pub metadata: Map<String, Value>,
}

const MEMORY: &str = "aoji keeps no conversations: send all of it as input";

/// Fields that ask for what OpenAI's servers do.
const REFUSED: &[Refused] = &[
    ("background", "", "answers are made while the client waits"),
    ("context_management", "", "aoji does not shorten conversations: send a shorter one"),
    ("conversation", "", MEMORY),
    (
        "max_tool_calls",
        "",
        "it is about tools that OpenAI's servers run; with parallel_tool_calls false there is at most one call",
    ),
    ("n", "1", "a response has one answer"),
    ("previous_response_id", "", MEMORY),
    ("prompt", "", "aoji keeps no prompts: send input"),
    ("stop", "", "Responses have no stop strings; /v1/chat/completions has"),
    ("top_logprobs", "0", "use /v1/chat/completions"),
    ("truncation", "\"disabled\"", "aoji does not shorten conversations: send a shorter one"),
];

/// Makes the jobs of a request, and what its response repeats.
pub(super) fn prepare(state: &State, body: &[u8]) -> Result<(Prepared, Echoed), ApiError> {
    let (request, ignored) = parse_alone::<ResponsesRequest>(body, state.options.unknown_fields, REFUSED)?;
    let format = request.text.and_then(|text| text.format).unwrap_or_else(TextFormat::text);
    let common = Common {
        model: request.model,
        max_tokens: request.max_output_tokens,
        temperature: request.temperature,
        top_p: request.top_p,
        stream: request.stream,
        response_format: Some(match (format.kind, &format.schema) {
            (ResponseKind::JsonSchema, Some(schema)) => ResponseFormat::schema(schema.clone()),
            (kind, _) => ResponseFormat { kind, json_schema: None },
        }),
        ..Common::default()
    };
    let tools = request.tools.unwrap_or_default();
    let function = |tool: &ToolParam| Function {
        name: tool.name.clone(),
        description: tool.description.clone(),
        parameters: tool.parameters.clone(),
        strict: tool.strict,
    };
    let functions = tools.iter().map(function).collect();
    let choice = request.tool_choice.unwrap_or_else(|| Choice("auto".into(), ToolChoice::Auto));
    let offered = Tools::new(functions, Some(choice.1), request.parallel_tool_calls, state.calls);
    let offered = offered.map_err(|e| e.renamed(own_name))?;
    let messages = messages(request.instructions.as_deref(), request.input);
    let prepared = state.converse(common, ignored, &messages, false, offered.as_ref());
    let prepared = prepared.map_err(|e| e.renamed(own_name))?.renamed(own_name);
    let sampling = &prepared.jobs[0].options.sampling;
    let echoed = Echoed {
        instructions: request.instructions,
        max_output_tokens: request.max_output_tokens,
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        tools,
        tool_choice: choice.0,
        parallel_tool_calls: request.parallel_tool_calls.unwrap_or(true),
        format,
        metadata: request.metadata.unwrap_or_default(),
    };
    Ok((prepared, echoed))
}

/// The conversation as a chat.
fn messages(instructions: Option<&str>, input: Input) -> Vec<ChatMessage> {
    let mut all = Vec::new();
    all.extend(instructions.map(|text| ChatMessage::text(Role::System, text.into())));
    for item in input.0 {
        match item {
            Item::Message(MessageItem { role, content }) => {
                let role = match role {
                    InputRole::User => Role::User,
                    InputRole::Assistant => Role::Assistant,
                    InputRole::System | InputRole::Developer => Role::System,
                };
                say(&mut all, role, content.0);
            }
            Item::Call(CallItem { call_id, name, arguments }) => call(&mut all, call_id, name, arguments.0),
            Item::Result(ResultItem { call_id, output }) => all.push(ChatMessage::result(call_id, output.0)),
        }
    }
    all
}

/// The field of this API that stands for a chat's.
fn own_name(chat: &str) -> String {
    match chat {
        "max_tokens" => "max_output_tokens".into(),
        "response_format" | "response_format.json_schema" | "response_format.json_schema.schema" => {
            "text.format".into()
        }
        messages if messages.starts_with("messages") => "input".into(),
        other => other.replacen("].function.", "].", 1),
    }
}
