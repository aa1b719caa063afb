//! Stop strings. Text that could be the beginning of one is held back until that is decided, so no part of a stop
//! string is ever shown, wherever the boundaries of tokens fall.

use crate::error::{Error, Result};

/// Looks for stop strings in a text that comes in pieces, and holds back what could still become one.
///
/// The result does not depend on where the text is cut. The stop string whose last character comes first ends the text;
/// of several that end there, the longest. The text ends where that stop string begins.
///
/// ```
/// let mut stops = aoji::StopStrings::new(vec!["###".into()]).unwrap();
/// assert_eq!(stops.push("답 #").text, "답 ");
/// let found = stops.push("## 질문");
/// assert_eq!((found.text.as_str(), found.stopped), ("", Some(0)));
/// ```
#[derive(Debug, Clone)]
pub struct StopStrings {
    stops: Vec<String>,
    /// What could still be the beginning of a stop string.
    held: String,
    stopped: Option<usize>,
}

/// What [`StopStrings::push`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Text that belongs to no stop string, whatever comes next.
    pub text: String,
    /// The stop string that ended the text, as its index in the list; no text comes after it.
    pub stopped: Option<usize>,
}

impl StopStrings {
    /// Watches for `stops`; with an empty list nothing is held back.
    ///
    /// # Errors
    /// [`Error::Input`] when one of them is empty.
    pub fn new(stops: Vec<String>) -> Result<Self> {
        match stops.iter().position(String::is_empty) {
            Some(i) => Err(Error::Input(format!("stop string {} is empty: it would end every text at once", i + 1))),
            None => Ok(Self { stops, held: String::new(), stopped: None }),
        }
    }

    /// Takes the next piece of text. Returns the text that may be shown now, and whether the text has ended.
    pub fn push(&mut self, piece: &str) -> Found {
        if self.stopped.is_some() {
            return Found { text: String::new(), stopped: self.stopped };
        }
        let mut text = std::mem::take(&mut self.held);
        let old = text.len();
        text.push_str(piece);
        if let Some((start, which)) = self.first_stop(&text, old) {
            text.truncate(start);
            self.stopped = Some(which);
        } else {
            self.held = text.split_off(text.len() - self.could_grow(&text));
        }
        Found { text, stopped: self.stopped }
    }

    /// Takes the next piece of a text that is not to end yet: no stop string ends in it, but one that ends later may begin in it.
    /// Returns the text that may be shown now.
    pub fn pass(&mut self, piece: &str) -> String {
        let mut text = std::mem::take(&mut self.held);
        text.push_str(piece);
        self.held = text.split_off(text.len() - self.could_grow(&text));
        text
    }

    /// The text that was held back, when no more comes. After that, the watch starts anew.
    pub fn finish(&mut self) -> String {
        self.stopped = None;
        std::mem::take(&mut self.held)
    }

    /// Start and index of the stop string that ends first in `text` after byte `old`.
    fn first_stop(&self, text: &str, old: usize) -> Option<(usize, usize)> {
        (old + 1..=text.len()).find_map(|end| {
            let ends = |stop: &String| text.as_bytes()[..end].ends_with(stop.as_bytes());
            let ended = (0..self.stops.len()).filter(|&i| ends(&self.stops[i]));
            ended.map(|i| (end - self.stops[i].len(), i)).min()
        })
    }

    /// Length of the longest end of `text` with which a longer stop string begins.
    fn could_grow(&self, text: &str) -> usize {
        let grows = |stop: &String| {
            let longest = text.len().min(stop.len() - 1);
            (1..=longest).rev().find(|&n| text.as_bytes().ends_with(&stop.as_bytes()[..n])).unwrap_or(0)
        };
        self.stops.iter().map(grows).max().unwrap_or(0)
    }
}
