//! The responses of `/v1/messages`: a message of content blocks, or a stream of events that build it up.

use super::ErrorReply;
use crate::server::{
    answer::{Delta, End, StopReason},
    error::ApiError,
    parts::{New, Part, Parts},
    prepare::Prepared,
    reply::{Api, event},
    usage::Tally,
};
use axum::response::sse::Event;
use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// An answer.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(in crate::server) struct Message {
    id: String,
    /// `message`
    #[serde(rename = "type")]
    kind: &'static str,
    /// `assistant`
    role: &'static str,
    /// The name under which the model was asked for.
    model: String,
    content: Vec<Block>,
    /// `end_turn`, `max_tokens`, `stop_sequence` or `tool_use`; `null` in the first event of a stream.
    stop_reason: Option<&'static str>,
    /// With `stop_sequence`: which.
    stop_sequence: Option<String>,
    usage: TokenUsage,
}

/// A part of an answer.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = MessagesAnswerBlock)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum Block {
    Text {
        text: String,
    },
    /// A call of a function. A call that was cut off has no block.
    ToolUse {
        id: String,
        name: String,
        /// The arguments.
        #[schema(value_type = Object)]
        input: Map<String, Value>,
    },
}

/// Counts of tokens. The prompt's are `input_tokens` and `cache_read_input_tokens` together.
#[derive(Debug, Default, Clone, Copy, Serialize, ToSchema)]
#[schema(as = MessagesUsage)]
pub(super) struct TokenUsage {
    /// Tokens of the prompt that were computed. The first event of a stream comes before that is known, and has all of
    /// them.
    input_tokens: usize,
    /// Always 0: all prompts are kept, and nothing is charged for it.
    cache_creation_input_tokens: usize,
    /// Tokens of the prompt that did not have to be computed.
    cache_read_input_tokens: usize,
    output_tokens: usize,
}

impl TokenUsage {
    fn of(tally: &Tally) -> TokenUsage {
        let usage = tally.usage();
        let cached = usage.prompt_tokens_details.cached_tokens;
        TokenUsage {
            input_tokens: usage.prompt_tokens - cached,
            cache_read_input_tokens: cached,
            output_tokens: usage.completion_tokens,
            ..TokenUsage::default()
        }
    }
}

/// An event of a stream, under the name of its `type`.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(in crate::server) enum MessageEvent {
    MessageStart { message: Message },
    ContentBlockStart { index: usize, content_block: Block },
    ContentBlockDelta { index: usize, delta: BlockDelta },
    ContentBlockStop { index: usize },
    MessageDelta { delta: MessageChange, usage: TokenUsage },
    MessageStop,
}

/// What is added to a block.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = MessagesBlockDelta)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(super) enum BlockDelta {
    TextDelta { text: String },
    InputJsonDelta { partial_json: String },
}

/// What is known at the end.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = MessagesChange)]
pub(super) struct MessageChange {
    stop_reason: Option<&'static str>,
    stop_sequence: Option<String>,
}

impl MessageEvent {
    fn event(&self) -> Option<Event> {
        let name = match self {
            MessageEvent::MessageStart { .. } => "message_start",
            MessageEvent::ContentBlockStart { .. } => "content_block_start",
            MessageEvent::ContentBlockDelta { .. } => "content_block_delta",
            MessageEvent::ContentBlockStop { .. } => "content_block_stop",
            MessageEvent::MessageDelta { .. } => "message_delta",
            MessageEvent::MessageStop => "message_stop",
        };
        event(Some(name), self)
    }
}

/// The answer to a request.
pub(super) struct Messages {
    id: String,
    model: String,
    parts: Parts,
    end: Option<End>,
}

impl Messages {
    pub fn new(request: &Prepared) -> Messages {
        let id = format!("msg_{:016x}{:08x}", fastrand::u64(..), fastrand::u32(..));
        Messages { id, model: request.model.clone(), parts: Parts::new(request.reader.clone()), end: None }
    }

    fn change(&self) -> MessageChange {
        let stop = self.end.as_ref().and_then(|end| end.stop_reason.clone());
        let (reason, sequence) = match (self.end.as_ref().map(|end| end.reason), stop) {
            (None, _) => (None, None),
            (Some("length"), _) => (Some("max_tokens"), None),
            _ if self.parts.called() => (Some("tool_use"), None),
            (_, Some(StopReason::Text(text))) => (Some("stop_sequence"), Some(text)),
            _ => (Some("end_turn"), None),
        };
        MessageChange { stop_reason: reason, stop_sequence: sequence }
    }

    fn message(&self, content: Vec<Block>, usage: TokenUsage) -> Message {
        let MessageChange { stop_reason, stop_sequence } = self.change();
        let (id, model) = (self.id.clone(), self.model.clone());
        Message { id, kind: "message", role: "assistant", model, content, stop_reason, stop_sequence, usage }
    }

    /// The events that report `new`.
    fn told(&self, New { index, begins, more }: New) -> Vec<MessageEvent> {
        let mut events = Vec::new();
        let part = &self.parts.list()[index];
        if begins {
            events.extend(index.checked_sub(1).map(|index| MessageEvent::ContentBlockStop { index }));
            let content_block = match part {
                Part::Text(_) => Block::Text { text: String::new() },
                Part::Call { id, name, .. } => Block::ToolUse { id: id.clone(), name: name.clone(), input: Map::new() },
            };
            events.push(MessageEvent::ContentBlockStart { index, content_block });
        }
        if !more.is_empty() {
            let delta = match part {
                Part::Text(_) => BlockDelta::TextDelta { text: more },
                Part::Call { .. } => BlockDelta::InputJsonDelta { partial_json: more },
            };
            events.push(MessageEvent::ContentBlockDelta { index, delta });
        }
        events
    }
}

impl Api for Messages {
    type Reply = Message;

    fn add(&mut self, _: usize, delta: Delta) {
        self.parts.add(delta.text, delta.end.is_some());
        self.end = delta.end;
    }

    fn reply(self, tally: &Tally) -> Message {
        let block = |part: &Part| match part {
            Part::Text(text) => Some(Block::Text { text: text.clone() }),
            Part::Call { id, name, arguments } => {
                let input = serde_json::from_str(arguments).ok()?; // fails for a call that was cut off
                Some(Block::ToolUse { id: id.clone(), name: name.clone(), input })
            }
        };
        let content = self.parts.list().iter().filter_map(block).collect();
        self.message(content, TokenUsage::of(tally))
    }

    fn begin(&mut self, tally: &Tally) -> Vec<Event> {
        let message = self.message(Vec::new(), TokenUsage::of(tally));
        MessageEvent::MessageStart { message }.event().into_iter().collect()
    }

    fn events(&mut self, _: usize, delta: Delta, _: &Tally) -> Vec<Event> {
        let news = self.parts.add(delta.text, delta.end.is_some());
        self.end = delta.end;
        news.into_iter().flat_map(|new| self.told(new)).filter_map(|e| e.event()).collect()
    }

    fn end(&mut self, tally: &Tally) -> Vec<Event> {
        let open = self.parts.list().len().checked_sub(1).map(|index| MessageEvent::ContentBlockStop { index });
        let change = MessageEvent::MessageDelta { delta: self.change(), usage: TokenUsage::of(tally) };
        open.into_iter().chain([change, MessageEvent::MessageStop]).filter_map(|e| e.event()).collect()
    }

    fn error(&mut self, error: &ApiError) -> Vec<Event> {
        event(Some("error"), &ErrorReply::of(error)).into_iter().collect()
    }
}
