//! The responses of `/v1/responses`: an object of output items, or a stream of events that build it up.

use super::request::{Echoed, TextFormat, ToolParam};
use crate::server::{
    answer::{Delta, End},
    error::ApiError,
    parts::{New, Part, Parts},
    prepare::Prepared,
    reply::{Api, event},
    state::now,
    usage::Tally,
};
use axum::response::sse::Event;
use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// A response.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(in crate::server) struct ResponseObject {
    id: String,
    /// `response`
    object: &'static str,
    /// Seconds since 1970.
    created_at: u64,
    /// `in_progress`, `completed`, `incomplete` or `failed`.
    status: &'static str,
    /// With `failed`: why.
    error: Option<Failure>,
    /// With `incomplete`: what cut the answer off.
    incomplete_details: Option<Incomplete>,
    instructions: Option<String>,
    max_output_tokens: Option<u64>,
    /// The name under which the model was asked for.
    model: String,
    output: Vec<Item>,
    parallel_tool_calls: bool,
    /// Always absent: aoji keeps no conversations.
    previous_response_id: Option<()>,
    /// Always false, for the same reason.
    store: bool,
    temperature: f32,
    text: TextConfig,
    #[schema(value_type = Value)]
    tool_choice: Value,
    #[schema(value_type = Vec<Object>)]
    tools: Vec<ToolParam>,
    top_p: f32,
    /// `disabled`
    truncation: &'static str,
    /// Counts of tokens, once they are known.
    usage: Option<ResponseUsage>,
    #[schema(value_type = Object)]
    metadata: Map<String, Value>,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = ResponsesFailure)]
struct Failure {
    code: &'static str,
    message: String,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = ResponsesIncomplete)]
struct Incomplete {
    /// `max_output_tokens`
    reason: &'static str,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = ResponsesFormat)]
struct TextConfig {
    #[schema(value_type = Object)]
    format: TextFormat,
}

/// Counts of tokens.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = ResponsesUsage)]
struct ResponseUsage {
    input_tokens: usize,
    input_tokens_details: InputDetails,
    output_tokens: usize,
    output_tokens_details: OutputDetails,
    total_tokens: usize,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = ResponsesInputDetails)]
struct InputDetails {
    /// Tokens that did not have to be computed.
    cached_tokens: usize,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = ResponsesOutputDetails)]
struct OutputDetails {
    /// Always 0: aoji does not separate thoughts from answers.
    reasoning_tokens: usize,
}

impl ResponseUsage {
    fn of(tally: &Tally) -> ResponseUsage {
        let usage = tally.usage();
        ResponseUsage {
            input_tokens: usage.prompt_tokens,
            input_tokens_details: InputDetails { cached_tokens: usage.prompt_tokens_details.cached_tokens },
            output_tokens: usage.completion_tokens,
            output_tokens_details: OutputDetails { reasoning_tokens: 0 },
            total_tokens: usage.total_tokens,
        }
    }
}

/// A part of an answer; `status` is `in_progress`, `completed` or `incomplete`.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = ResponsesOutputItem)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Item {
    Message {
        id: String,
        status: &'static str,
        /// `assistant`
        role: &'static str,
        content: Vec<Content>,
    },
    FunctionCall {
        id: String,
        status: &'static str,
        /// What the result refers to.
        call_id: String,
        name: String,
        /// A JSON object as text.
        arguments: String,
    },
}

/// The text of a message.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = ResponsesOutputText)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Content {
    OutputText {
        text: String,
        /// Always empty.
        #[schema(value_type = Vec<Object>)]
        annotations: [(); 0],
        /// Always empty: `/v1/chat/completions` has log-probabilities.
        #[schema(value_type = Vec<Object>)]
        logprobs: [(); 0],
    },
}

impl Content {
    fn text(text: String) -> Content {
        Content::OutputText { text, annotations: [], logprobs: [] }
    }
}

/// An event of a stream, under the name of its `type`.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(in crate::server) struct ResponseEvent {
    /// The place of the event in the stream, from 0 on.
    sequence_number: usize,
    #[serde(flatten)]
    kind: EventKind,
}

/// The content of an event.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = ResponsesEventKind)]
#[serde(tag = "type")]
enum EventKind {
    #[serde(rename = "response.created")]
    Created { response: Box<ResponseObject> },
    #[serde(rename = "response.in_progress")]
    InProgress { response: Box<ResponseObject> },
    #[serde(rename = "response.output_item.added")]
    ItemAdded { output_index: usize, item: Item },
    #[serde(rename = "response.content_part.added")]
    PartAdded { item_id: String, output_index: usize, content_index: usize, part: Content },
    #[serde(rename = "response.output_text.delta")]
    TextDelta {
        item_id: String,
        output_index: usize,
        content_index: usize,
        delta: String,
        #[schema(value_type = Vec<Object>)]
        logprobs: [(); 0],
    },
    #[serde(rename = "response.output_text.done")]
    TextDone {
        item_id: String,
        output_index: usize,
        content_index: usize,
        text: String,
        #[schema(value_type = Vec<Object>)]
        logprobs: [(); 0],
    },
    #[serde(rename = "response.content_part.done")]
    PartDone { item_id: String, output_index: usize, content_index: usize, part: Content },
    #[serde(rename = "response.function_call_arguments.delta")]
    ArgumentsDelta { item_id: String, output_index: usize, delta: String },
    #[serde(rename = "response.function_call_arguments.done")]
    ArgumentsDone { item_id: String, output_index: usize, name: String, arguments: String },
    #[serde(rename = "response.output_item.done")]
    ItemDone { output_index: usize, item: Item },
    #[serde(rename = "response.completed")]
    Completed { response: Box<ResponseObject> },
    #[serde(rename = "response.incomplete")]
    Incomplete { response: Box<ResponseObject> },
    #[serde(rename = "response.failed")]
    Failed { response: Box<ResponseObject> },
}

impl EventKind {
    fn name(&self) -> &'static str {
        match self {
            EventKind::Created { .. } => "response.created",
            EventKind::InProgress { .. } => "response.in_progress",
            EventKind::ItemAdded { .. } => "response.output_item.added",
            EventKind::PartAdded { .. } => "response.content_part.added",
            EventKind::TextDelta { .. } => "response.output_text.delta",
            EventKind::TextDone { .. } => "response.output_text.done",
            EventKind::PartDone { .. } => "response.content_part.done",
            EventKind::ArgumentsDelta { .. } => "response.function_call_arguments.delta",
            EventKind::ArgumentsDone { .. } => "response.function_call_arguments.done",
            EventKind::ItemDone { .. } => "response.output_item.done",
            EventKind::Completed { .. } => "response.completed",
            EventKind::Incomplete { .. } => "response.incomplete",
            EventKind::Failed { .. } => "response.failed",
        }
    }
}

/// The answer to a request.
pub(super) struct Responses {
    /// The end that all ids of this response share.
    id: String,
    created_at: u64,
    model: String,
    echoed: Echoed,
    parts: Parts,
    end: Option<End>,
    /// Events sent so far.
    told: usize,
}

impl Responses {
    pub fn new(request: &Prepared, echoed: Echoed) -> Responses {
        let id = format!("{:016x}{:08x}", fastrand::u64(..), fastrand::u32(..));
        let (model, parts) = (request.model.clone(), Parts::new(request.reader.clone()));
        Responses { id, created_at: now(), model, echoed, parts, end: None, told: 0 }
    }

    /// Whether the answer was cut off by its length.
    fn is_cut(&self) -> bool {
        self.end.as_ref().is_some_and(|end| end.reason == "length")
    }

    fn response(&self, status: &'static str, output: Vec<Item>, usage: Option<ResponseUsage>) -> Box<ResponseObject> {
        let Echoed { tools, metadata, .. } = &self.echoed;
        let incomplete = (status == "incomplete").then_some(Incomplete { reason: "max_output_tokens" });
        Box::new(ResponseObject {
            id: format!("resp_{}", self.id),
            object: "response",
            created_at: self.created_at,
            status,
            error: None,
            incomplete_details: incomplete,
            instructions: self.echoed.instructions.clone(),
            max_output_tokens: self.echoed.max_output_tokens,
            model: self.model.clone(),
            output,
            parallel_tool_calls: self.echoed.parallel_tool_calls,
            previous_response_id: None,
            store: false,
            temperature: self.echoed.temperature,
            text: TextConfig { format: self.echoed.format.clone() },
            tool_choice: self.echoed.tool_choice.clone(),
            tools: tools.clone(),
            top_p: self.echoed.top_p,
            truncation: "disabled",
            usage,
            metadata: metadata.clone(),
        })
    }

    /// The response after its end.
    fn ended(&self, tally: &Tally) -> Box<ResponseObject> {
        let n = self.parts.list().len();
        // If the length cut the answer off, the last item is the one that was cut.
        let output = (0..n).map(|i| self.item(i, if self.is_cut() && i + 1 == n { "incomplete" } else { "completed" }));
        let status = if self.is_cut() { "incomplete" } else { "completed" };
        self.response(status, output.collect(), Some(ResponseUsage::of(tally)))
    }

    fn item_id(&self, index: usize) -> String {
        let prefix = if let Part::Text(_) = self.parts.list()[index] { "msg" } else { "fc" };
        format!("{prefix}_{}{index:02x}", self.id)
    }

    /// The item for part `index`; empty while it is in progress.
    fn item(&self, index: usize, status: &'static str) -> Item {
        let (id, open) = (self.item_id(index), status == "in_progress");
        match &self.parts.list()[index] {
            Part::Text(text) => {
                let content = if open { Vec::new() } else { vec![Content::text(text.clone())] };
                Item::Message { id, status, role: "assistant", content }
            }
            Part::Call { id: call_id, name, arguments } => {
                let arguments = if open { String::new() } else { arguments.clone() };
                Item::FunctionCall { id, status, call_id: call_id.clone(), name: name.clone(), arguments }
            }
        }
    }

    /// The events that report `new`.
    fn news(&self, New { index, begins, more }: New) -> Vec<EventKind> {
        let mut events = Vec::new();
        let (item_id, output_index, content_index) = (self.item_id(index), index, 0);
        let is_text = matches!(self.parts.list()[index], Part::Text(_));
        if begins {
            events.extend(index.checked_sub(1).into_iter().flat_map(|before| self.done(before, "completed")));
            events.push(EventKind::ItemAdded { output_index, item: self.item(index, "in_progress") });
            if is_text {
                let (item_id, part) = (item_id.clone(), Content::text(String::new()));
                events.push(EventKind::PartAdded { item_id, output_index, content_index, part });
            }
        }
        if !more.is_empty() {
            events.push(match is_text {
                true => EventKind::TextDelta { item_id, output_index, content_index, delta: more, logprobs: [] },
                false => EventKind::ArgumentsDelta { item_id, output_index, delta: more },
            });
        }
        events
    }

    /// The events with which part `index` ends.
    fn done(&self, index: usize, status: &'static str) -> Vec<EventKind> {
        let (item_id, output_index, content_index) = (self.item_id(index), index, 0);
        let last = EventKind::ItemDone { output_index, item: self.item(index, status) };
        match &self.parts.list()[index] {
            Part::Text(text) => {
                let (text, part) = (text.clone(), Content::text(text.clone()));
                let done =
                    EventKind::TextDone { item_id: item_id.clone(), output_index, content_index, text, logprobs: [] };
                vec![done, EventKind::PartDone { item_id, output_index, content_index, part }, last]
            }
            Part::Call { name, arguments, .. } => {
                let (name, arguments) = (name.clone(), arguments.clone());
                vec![EventKind::ArgumentsDone { item_id, output_index, name, arguments }, last]
            }
        }
    }

    /// Numbers the events.
    fn tell(&mut self, events: Vec<EventKind>) -> Vec<Event> {
        let number = |kind: EventKind| {
            let sequence_number = self.told;
            self.told += 1;
            event(Some(kind.name()), &ResponseEvent { sequence_number, kind })
        };
        events.into_iter().filter_map(number).collect()
    }
}

impl Api for Responses {
    type Reply = ResponseObject;

    fn add(&mut self, _: usize, delta: Delta) {
        self.parts.add(delta.text, delta.end.is_some());
        self.end = delta.end;
    }

    fn reply(self, tally: &Tally) -> ResponseObject {
        *self.ended(tally)
    }

    fn begin(&mut self, _: &Tally) -> Vec<Event> {
        let response = self.response("in_progress", Vec::new(), None);
        self.tell(vec![EventKind::Created { response: response.clone() }, EventKind::InProgress { response }])
    }

    fn events(&mut self, _: usize, delta: Delta, _: &Tally) -> Vec<Event> {
        let news = self.parts.add(delta.text, delta.end.is_some());
        self.end = delta.end;
        let events = news.into_iter().flat_map(|new| self.news(new)).collect();
        self.tell(events)
    }

    fn end(&mut self, tally: &Tally) -> Vec<Event> {
        let status = if self.is_cut() { "incomplete" } else { "completed" };
        let open = self.parts.list().len().checked_sub(1);
        let mut events: Vec<EventKind> = open.into_iter().flat_map(|last| self.done(last, status)).collect();
        let response = self.ended(tally);
        events.push(match self.is_cut() {
            true => EventKind::Incomplete { response },
            false => EventKind::Completed { response },
        });
        self.tell(events)
    }

    fn error(&mut self, error: &ApiError) -> Vec<Event> {
        let mut response = self.response("failed", Vec::new(), None);
        response.error = Some(Failure { code: "server_error", message: error.message.clone() });
        self.tell(vec![EventKind::Failed { response }])
    }
}
