//! Splits an answer into a list of parts (text, and calls of functions), for the APIs that report answers so.

use super::calls::{CallReader, Found, call_id};

/// A part of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Part {
    Text(String),
    /// A call of a function; `arguments` is the text of a JSON object, or its beginning where the answer was cut off.
    Call {
        id: String,
        name: String,
        arguments: String,
    },
}

/// News of a part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct New {
    /// Index of the part in the list.
    pub index: usize,
    /// The part begins.
    pub begins: bool,
    /// More of its text or of its arguments.
    pub more: String,
}

/// The parts of an answer, found as its text comes.
#[derive(Debug)]
pub(super) struct Parts {
    reader: Option<CallReader>,
    list: Vec<Part>,
}

impl Parts {
    /// For an answer in which `reader` finds calls; without a reader all of it is text.
    pub fn new(reader: Option<CallReader>) -> Parts {
        Parts { reader, list: Vec::new() }
    }

    /// The parts so far.
    pub fn list(&self) -> &[Part] {
        &self.list
    }

    /// Whether there are calls, and none was cut off.
    pub fn called(&self) -> bool {
        self.reader.as_ref().is_some_and(CallReader::called)
    }

    /// Takes the next piece of the answer, and whether it was the last. Returns what is new.
    pub fn add(&mut self, piece: String, ended: bool) -> Vec<New> {
        let found = match &mut self.reader {
            None => Vec::from_iter((!piece.is_empty()).then_some(Found::Text(piece))),
            Some(reader) => {
                let mut found = reader.push(&piece);
                found.extend(ended.then(|| reader.finish()).flatten());
                found
            }
        };
        found.into_iter().map(|found| self.found(found)).collect()
    }

    fn found(&mut self, found: Found) -> New {
        let before = self.list.len();
        let more = match (found, self.list.last_mut()) {
            (Found::Text(more), Some(Part::Text(text))) => {
                text.push_str(&more);
                more
            }
            (Found::Arguments(more), Some(Part::Call { arguments, .. })) => {
                arguments.push_str(&more);
                more
            }
            (Found::Text(more) | Found::Arguments(more), _) => {
                self.list.push(Part::Text(more.clone())); // (arguments never come without a call)
                more
            }
            (Found::Call(name), _) => {
                self.list.push(Part::Call { id: call_id(), name, arguments: String::new() });
                String::new()
            }
        };
        New { index: self.list.len() - 1, begins: self.list.len() > before, more }
    }
}
