//! The requests of `/v1/messages`, and how they become chats.

use crate::server::{
    error::ApiError,
    fields::{Common, ResponseFormat, Stop, parse_alone, parse_two},
    messages::{ChatMessage, Role, call, encode, say},
    policy::Refused,
    prepare::Prepared,
    state::State,
    tools::{Function, ToolChoice, Tools},
};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// The body of a request for an answer.
#[derive(ToSchema)]
#[allow(dead_code)] // only for the description of the API: the body is read as two structs
pub(in crate::server) struct MessagesRequest {
    #[serde(flatten)]
    own: Fields,
    #[serde(flatten)]
    talk: Talk,
}

/// How the answer is made.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = MessagesFields)]
struct Fields {
    /// Most tokens of the answer.
    max_tokens: u64,
    /// The answer ends before the first of these.
    stop_sequences: Option<Vec<String>>,
    /// Send the answer as it is made, as named server-sent events.
    stream: Option<bool>,
    /// Divides the logits; 0 takes the most likely token.
    #[schema(minimum = 0, maximum = 100)]
    temperature: Option<f32>,
    /// Only the most likely tokens that together have this probability.
    #[schema(minimum = 0, maximum = 1)]
    top_p: Option<f32>,
    /// Only this many of the most likely tokens.
    #[schema(minimum = -1)]
    top_k: Option<i64>,
}

/// A conversation, and what the answer to it may be.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = MessagesConversation)]
pub(in crate::server) struct Talk {
    /// One of the names of `/v1/models`; absent, the model that is served.
    model: Option<String>,
    /// The messages so far. If the last one is the assistant's, the answer continues it.
    messages: Vec<Said>,
    /// The instruction: a text, or blocks of the type `text`.
    #[schema(value_type = Option<ContentShape>)]
    system: Option<Blocks>,
    /// Functions that the model may ask the client to call.
    tools: Option<Vec<ToolParam>>,
    /// Whether functions are called, and which.
    tool_choice: Option<Choice>,
    /// What the answer must look like.
    output_config: Option<OutputConfig>,
    /// Only `disabled`: the models here have no separate thinking.
    #[allow(dead_code)] // reading it refuses everything but `disabled`
    thinking: Option<Thinking>,
}

/// A message of a conversation.
#[derive(Debug, Deserialize, ToSchema)]
struct Said {
    role: Speaker,
    /// A text or blocks.
    #[schema(value_type = ContentShape)]
    content: Blocks,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Speaker {
    User,
    Assistant,
}

#[derive(ToSchema)]
#[schema(as = MessagesContent)]
#[serde(untagged)]
#[allow(dead_code)]
enum ContentShape {
    Text(String),
    Blocks(Vec<Block>),
}

/// A part of a message. `cache_control` and `citations` change nothing.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Block {
    Text {
        text: String,
    },
    /// A call of a function by the assistant.
    ToolUse {
        id: String,
        name: String,
        #[schema(value_type = Object)]
        input: Map<String, Value>,
    },
    /// The result of a call, from the user.
    ToolResult {
        tool_use_id: String,
        /// A text, or blocks of the type `text`.
        #[schema(value_type = Option<TextShape>)]
        content: Option<Blocks>,
        #[allow(dead_code)] // the model learns it from the text
        is_error: Option<bool>,
    },
}

#[derive(ToSchema)]
#[schema(as = MessagesText)]
#[serde(untagged)]
#[allow(dead_code)]
enum TextShape {
    Text(String),
    Blocks(Vec<TextBlock>),
}

#[derive(ToSchema)]
#[schema(as = MessagesTextBlock)]
#[allow(dead_code)]
struct TextBlock {
    /// `text`
    #[schema(rename = "type")]
    kind: String,
    text: String,
}

/// A text is one block.
#[derive(Debug, Deserialize)]
#[serde(try_from = "Value")]
struct Blocks(Vec<Block>);

impl TryFrom<Value> for Blocks {
    type Error = String;
    fn try_from(value: Value) -> Result<Blocks, String> {
        match value {
            Value::String(text) => Ok(Blocks(vec![Block::Text { text }])),
            Value::Array(list) => {
                let block = |(i, value)| serde_json::from_value(value).map_err(|e| format!("block {i}: {e}"));
                list.into_iter().enumerate().map(block).collect::<Result<_, _>>().map(Blocks)
            }
            _ => Err("expected a text or a list of blocks".into()),
        }
    }
}

impl Blocks {
    /// All of it as one text.
    fn text(&self) -> Result<String, &'static str> {
        let text = |block: &Block| match block {
            Block::Text { text } => Ok(text.clone()),
            _ => Err("expected blocks of the type text only"),
        };
        self.0.iter().map(text).collect::<Result<Vec<_>, _>>().map(|texts| texts.join("\n"))
    }
}

/// A function that the client has.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = MessagesTool)]
struct ToolParam {
    /// `custom`
    #[serde(rename = "type")]
    #[allow(dead_code)] // only one kind exists
    kind: Option<ToolKind>,
    /// Up to 64 letters, digits, `_`, `-` and `.`.
    #[schema(max_length = 64)]
    name: String,
    /// What the function does, for the model.
    description: Option<String>,
    /// JSON schema of the arguments, an object.
    #[schema(value_type = Object)]
    input_schema: Value,
    /// Refuse a schema with parts that cannot be enforced.
    strict: Option<bool>,
    /// Changes nothing: prompts are always kept for the next one.
    #[schema(value_type = Option<Object>)]
    #[allow(dead_code)]
    cache_control: Option<IgnoredAny>,
}

#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[schema(as = MessagesToolKind)]
#[serde(rename_all = "lowercase")]
enum ToolKind {
    Custom,
}

/// Whether functions are called, and which.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = MessagesToolChoice)]
struct Choice {
    #[serde(rename = "type")]
    kind: ChoiceKind,
    /// With `tool`: the function.
    name: Option<String>,
    /// At most one call.
    disable_parallel_tool_use: Option<bool>,
}

#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[schema(as = MessagesToolChoiceKind)]
#[serde(rename_all = "lowercase")]
enum ChoiceKind {
    Auto,
    Any,
    Tool,
    None,
}

/// What the answer must look like.
#[derive(Debug, Deserialize, ToSchema)]
struct OutputConfig {
    format: Option<OutputFormat>,
}

/// JSON that follows a schema.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
enum OutputFormat {
    JsonSchema {
        #[schema(value_type = Object)]
        schema: Value,
    },
}

#[derive(Debug, Deserialize, ToSchema)]
struct Thinking {
    #[serde(rename = "type")]
    #[allow(dead_code)] // only one kind exists
    kind: ThinkingKind,
}

#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum ThinkingKind {
    Disabled,
}

/// Fields that ask for what Anthropic's servers do.
const REFUSED: &[Refused] = &[
    ("container", "", "aoji runs no code"),
    ("context_management", "", "aoji does not shorten conversations: send a shorter one"),
    ("mcp_servers", "", "aoji calls no servers; offer their functions as tools"),
    ("output_format", "", "use output_config.format"),
];

/// Makes the jobs of a request for an answer.
pub(super) fn prepare(state: &State, body: &[u8]) -> Result<Prepared, ApiError> {
    let (own, talk, ignored) = parse_two::<Fields, Talk>(body, state.options.unknown_fields, REFUSED)?;
    let format = talk.output_config.as_ref().and_then(|config| config.format.as_ref());
    let common = Common {
        model: talk.model.clone(),
        max_tokens: Some(own.max_tokens),
        temperature: own.temperature,
        top_p: own.top_p,
        top_k: own.top_k,
        stop: own.stop_sequences.map(Stop),
        stream: own.stream,
        response_format: format.map(|OutputFormat::JsonSchema { schema }| ResponseFormat::schema(schema.clone())),
        ..Common::default()
    };
    let (messages, begun) = talk.messages()?;
    let tools = talk.tools(state)?;
    let prepared = state.converse(common, ignored, &messages, begun, tools.as_ref());
    Ok(prepared.map_err(|e| e.renamed(own_name))?.renamed(own_name))
}

/// Counts the tokens of the prompt that a conversation becomes; also gives the names of ignored fields.
pub(super) fn count(state: &State, body: &[u8]) -> Result<(usize, Vec<String>), ApiError> {
    let (talk, ignored) = parse_alone::<Talk>(body, state.options.unknown_fields, REFUSED)?;
    state.model(talk.model.as_deref())?;
    let (messages, begun) = talk.messages()?;
    let ids = encode(state, &messages, begun, talk.tools(state)?.as_ref()).map_err(|e| e.renamed(own_name))?;
    Ok((ids.len(), ignored))
}

/// The field of this API that stands for a chat's.
fn own_name(chat: &str) -> String {
    match chat {
        "stop" => "stop_sequences".into(),
        "response_format" => "output_config.format".into(),
        "response_format.json_schema.schema" => "output_config.format.schema".into(),
        // A message of the chat may be made of several here.
        messages if messages.starts_with("messages") => "messages".into(),
        other => other.replacen("].function.parameters", "].input_schema", 1).replacen("].function.", "].", 1),
    }
}

impl Talk {
    /// The conversation as a chat, and whether its last message is the beginning of the answer.
    fn messages(&self) -> Result<(Vec<ChatMessage>, bool), ApiError> {
        let mut all = Vec::new();
        if let Some(system) = &self.system {
            let text = system.text().map_err(|why| ApiError::invalid("system", why))?;
            all.push(ChatMessage::text(Role::System, text));
        }
        for (i, said) in self.messages.iter().enumerate() {
            let wrong = |k: usize, why: &str| Err(ApiError::invalid(format!("messages[{i}].content[{k}]"), why));
            for (k, block) in said.content.0.iter().enumerate() {
                match (block, said.role) {
                    (Block::Text { text }, Speaker::User) => say(&mut all, Role::User, text.clone()),
                    (Block::Text { text }, Speaker::Assistant) => say(&mut all, Role::Assistant, text.clone()),
                    (Block::ToolUse { id, name, input }, Speaker::Assistant) => {
                        call(&mut all, id.clone(), name.clone(), input.clone());
                    }
                    (Block::ToolResult { tool_use_id, content, .. }, Speaker::User) => {
                        let text = content.as_ref().map_or(Ok(String::new()), Blocks::text);
                        match text {
                            Ok(text) => all.push(ChatMessage::result(tool_use_id.clone(), text)),
                            Err(why) => return wrong(k, why),
                        }
                    }
                    (Block::ToolUse { .. }, Speaker::User) => return wrong(k, "only the assistant calls functions"),
                    (Block::ToolResult { .. }, Speaker::Assistant) => return wrong(k, "results come from the user"),
                }
            }
        }
        let begun = all.last().is_some_and(ChatMessage::is_answer);
        Ok((all, begun))
    }

    fn tools(&self, state: &State) -> Result<Option<Tools>, ApiError> {
        let function = |tool: &ToolParam| Function {
            name: tool.name.clone(),
            description: tool.description.clone(),
            parameters: Some(tool.input_schema.clone()),
            strict: tool.strict,
        };
        let functions = self.tools.iter().flatten().map(function).collect();
        let choice = match &self.tool_choice {
            None => None,
            Some(Choice { kind: ChoiceKind::Auto, .. }) => Some(ToolChoice::Auto),
            Some(Choice { kind: ChoiceKind::Any, .. }) => Some(ToolChoice::Required),
            Some(Choice { kind: ChoiceKind::None, .. }) => Some(ToolChoice::None),
            Some(Choice { kind: ChoiceKind::Tool, name: Some(name), .. }) => Some(ToolChoice::Named(name.clone())),
            Some(Choice { kind: ChoiceKind::Tool, name: None, .. }) => {
                return Err(ApiError::invalid("tool_choice.name", "the type tool needs the name of one"));
            }
        };
        let parallel = self.tool_choice.as_ref().and_then(|c| c.disable_parallel_tool_use).map(|disabled| !disabled);
        Tools::new(functions, choice, parallel, state.calls).map_err(|e| e.renamed(own_name))
    }
}
