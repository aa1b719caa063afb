//! How models write calls of functions into the text of an answer (each family of models has its own format), and the
//! reader that finds them there.

use super::policy::one_of;
use crate::{
    Template, Tokenizer,
    error::{Error, Result},
};
use std::str::FromStr;

/// How a model writes calls of functions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ToolParser {
    /// As the chat template shows it; [`ToolParser::Json`] where it shows nothing that aoji knows.
    #[default]
    Auto,
    /// Llama 3.1 and 3.2: an answer that is one object with `name` and `parameters`.
    Llama3,
    /// Hermes and Qwen: objects with `name` and `arguments`, each in `<tool_call>` and `</tool_call>`, after any text.
    Hermes,
    /// Mistral: `[TOOL_CALLS]` and a list of objects with `name` and `arguments`, after any text.
    Mistral,
    /// For models whose template knows no tools: the functions are listed in the system text. An answer is text, or
    /// objects with `name` and `arguments`, each on a line of its own.
    Json,
    /// Requests with tools are refused.
    None,
}

impl FromStr for ToolParser {
    type Err = String;
    fn from_str(s: &str) -> std::result::Result<Self, String> {
        let known = [
            ("auto", Self::Auto),
            ("llama3", Self::Llama3),
            ("hermes", Self::Hermes),
            ("mistral", Self::Mistral),
            ("json", Self::Json),
            ("none", Self::None),
        ];
        one_of(s, &known)
    }
}

/// How calls are written: an answer is text, then `open`, calls with `between` between them, and `close`. A call is
/// `{"name": "f", "arguments": {..}}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CallFormat {
    /// The marker at which text ends and calls begin; it never appears in text. Empty: calls are at the beginning of
    /// the answer or nowhere.
    pub marker: &'static str,
    /// What may stand between the marker and the first call.
    pub open: &'static [&'static str],
    pub between: &'static str,
    pub close: &'static str,
    /// The key of the arguments.
    pub arguments: &'static str,
    /// Whether an answer may have several calls.
    pub several: bool,
    /// Whether the chat template itself formats tools, calls and results; otherwise they are written into the messages.
    pub in_template: bool,
}

/// Begins every call.
pub(super) const HEAD: &str = "{\"name\"";
/// Between that and the name.
const COLON: &str = ": \"";

impl CallFormat {
    pub const LLAMA3: CallFormat = CallFormat {
        marker: "",
        open: &[""],
        between: "",
        close: "",
        arguments: "parameters",
        several: false, // its template refuses messages with several
        in_template: true,
    };
    pub const HERMES: CallFormat = CallFormat {
        marker: "<tool_call>",
        open: &["\n"],
        between: "\n</tool_call>\n<tool_call>\n",
        close: "\n</tool_call>",
        arguments: "arguments",
        several: true,
        in_template: true,
    };
    pub const MISTRAL: CallFormat = CallFormat {
        marker: "[TOOL_CALLS]",
        open: &["[", " ["], // by tokenizer
        between: ", ",
        close: "]",
        arguments: "arguments",
        several: true,
        in_template: true,
    };
    pub const JSON: CallFormat = CallFormat {
        marker: "",
        open: &[""],
        between: "\n",
        close: "",
        arguments: "arguments",
        several: true,
        in_template: false,
    };

    /// What `parser` means for a model with this template; `None` where requests with tools are refused.
    ///
    /// # Errors
    /// `Input` for a format that a model can learn only from its template, when the template does not know tools.
    pub fn of(parser: ToolParser, template: &Template) -> Result<Option<CallFormat>> {
        let source = match template {
            Template::Jinja(jinja) => jinja.tool_source(),
            _ => String::new(),
        };
        let knows = source.contains("tools");
        let format = match parser {
            ToolParser::None => return Ok(None),
            ToolParser::Json => Self::JSON,
            ToolParser::Llama3 => Self::LLAMA3,
            ToolParser::Hermes => Self::HERMES,
            ToolParser::Mistral => Self::MISTRAL,
            ToolParser::Auto if !knows => Self::JSON,
            // Later models of Mistral write [TOOL_CALLS]name[ARGS]{..}, which is another format.
            ToolParser::Auto if source.contains("[TOOL_CALLS]") && !source.contains("[ARGS]") => Self::MISTRAL,
            ToolParser::Auto if source.contains("<tool_call>") && !source.contains("<function=") => Self::HERMES,
            ToolParser::Auto if source.contains("\"parameters\": ") && source.contains("ipython") => Self::LLAMA3,
            ToolParser::Auto => Self::JSON,
        };
        if format.in_template && !knows {
            let what = format!(
                "the chat template {template} does not know tools: --tool-parser json puts them into the messages"
            );
            return Err(Error::Input(what));
        }
        Ok(Some(format))
    }

    /// Whether the text of special tokens is needed to find calls.
    pub fn needs_special(&self, tokenizer: &Tokenizer) -> bool {
        is_special(tokenizer, self.marker)
    }

    /// The body of a rule of a Lark grammar that matches exactly this text. If the text has a marker for which the
    /// model has a token, both the token and its spelling in letters match, since they mean the same.
    pub fn literal(&self, tokenizer: &Tokenizer, text: &str) -> String {
        let mut rest = text;
        let mut parts = Vec::new();
        while !rest.is_empty() {
            let special = |marker: &str| {
                is_special(tokenizer, marker).then(|| Some((rest.find(marker)?, marker.len()))).flatten()
            };
            match [self.marker, "</tool_call>"].into_iter().filter_map(special).min() {
                Some((0, len)) => {
                    let (marker, after) = rest.split_at(len);
                    let id = tokenizer.token_id(marker).unwrap_or_default(); // found, since special tokens are in the vocabulary
                    parts.push(format!("(<[{id}]> | {})", quoted(marker)));
                    rest = after;
                }
                found => {
                    let (text, after) = rest.split_at(found.map_or(rest.len(), |(at, _)| at));
                    parts.push(quoted(text));
                    rest = after;
                }
            }
        }
        if parts.is_empty() { quoted("") } else { parts.join(" ") }
    }

    /// What stands between the name of a function and its arguments.
    fn middle(&self) -> String {
        format!("\", \"{}\": ", self.arguments)
    }

    /// What follows [`HEAD`] in a call of the function `name`, up to its arguments.
    pub fn before_arguments(&self, name: &str) -> String {
        format!("{COLON}{name}{}", self.middle())
    }
}

/// A new id of a call: nine letters and digits, as Mistral's templates want them.
pub(super) fn call_id() -> String {
    std::iter::repeat_with(fastrand::alphanumeric).take(9).collect()
}

/// Quotes a text for Lark, whose string syntax includes JSON's.
pub(super) fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn is_special(tokenizer: &Tokenizer, token: &str) -> bool {
    !token.is_empty() && tokenizer.token_id(token).is_some_and(|id| tokenizer.is_special(id))
}

/// What was found in an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    /// Text that belongs to no call.
    Text(String),
    /// A call of this function begins.
    Call(String),
    /// More of the arguments of the call that began last.
    Arguments(String),
}

/// Reads an answer in pieces, however they are cut. It relies on the grammar that the answer follows: the format's
/// marker is never a part of the text, whether it came as a token or in letters.
#[derive(Debug, Clone)]
pub(super) struct CallReader {
    format: CallFormat,
    /// Whether calls come at the beginning of the answer or not at all; a marker that comes later is then text.
    only_first: bool,
    /// Whether the answer must be calls.
    must: bool,
    place: Place,
    /// Text of which it is not certain yet what it is.
    held: String,
    /// Calls that have begun.
    pub begun: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    /// Nothing was said yet.
    Start,
    /// In the text.
    Text,
    /// Before a call.
    Before,
    /// In the name of a function.
    Name,
    /// In its arguments: how many brackets are open, whether it is inside a string, and whether after a backslash
    /// there.
    Arguments { depth: usize, string: bool, escaped: bool },
}

impl CallReader {
    /// `only_first`: an answer that does not begin with a call has none. `must`: it does begin with one.
    pub fn new(format: CallFormat, only_first: bool, must: bool) -> CallReader {
        CallReader { format, only_first, must, place: Place::Start, held: String::new(), begun: 0 }
    }

    /// Whether there are calls, and none of them was cut off before its arguments ended.
    pub fn called(&self) -> bool {
        self.begun > 0 && self.place == Place::Before
    }

    /// The next piece of the answer.
    pub fn push(&mut self, piece: &str) -> Vec<Found> {
        self.held.push_str(piece);
        let mut found = Vec::new();
        while self.advance(&mut found) {}
        found
    }

    /// Ends the answer: text that was held back, because it could have become something else, is given now. Half a name
    /// is dropped, and so is the beginning of a call that must be.
    pub fn finish(&mut self) -> Option<Found> {
        let held = std::mem::take(&mut self.held);
        let is_text = match self.place {
            Place::Start => !self.must,
            Place::Text => true,
            Place::Before | Place::Name | Place::Arguments { .. } => false,
        };
        (is_text && !held.is_empty()).then_some(Found::Text(held))
    }

    /// Reads as far as the present state goes. Returns whether there is more to read.
    fn advance(&mut self, found: &mut Vec<Found>) -> bool {
        if self.held.is_empty() {
            return false;
        }
        match &mut self.place {
            Place::Start => {
                let (begin, place) = match self.format.marker {
                    "" => ([HEAD, COLON].concat(), Place::Name),
                    marker => (marker.to_string(), Place::Before),
                };
                match self.held.strip_prefix(&begin) {
                    Some(rest) => {
                        self.held = rest.to_string();
                        self.place = place;
                    }
                    None if begin.starts_with(&self.held) => return false,
                    None => self.place = Place::Text,
                }
                true
            }
            Place::Text => {
                let marker = if self.only_first { "" } else { self.format.marker };
                if let Some(at) = self.held.find(marker).filter(|_| !marker.is_empty()) {
                    let rest = self.held.split_off(at + marker.len());
                    self.held.truncate(at);
                    self.place = Place::Before;
                    self.say(found, rest);
                    return true;
                }
                let kept = (1..marker.len()).rev().find(|&n| self.held.ends_with(&marker[..n])).unwrap_or(0);
                let rest = self.held.split_off(self.held.len() - kept);
                self.say(found, rest);
                false
            }
            Place::Before => {
                let head = [HEAD, COLON].concat();
                let Some(at) = self.held.find(&head) else { return false };
                self.held.drain(..at + head.len());
                self.place = Place::Name;
                true
            }
            Place::Name => {
                let middle = self.format.middle();
                let Some(at) = self.held.find(&middle) else { return false };
                let name = self.held.drain(..at + middle.len()).take(at).collect();
                found.push(Found::Call(name));
                self.begun += 1;
                self.place = Place::Arguments { depth: 0, string: false, escaped: false };
                true
            }
            Place::Arguments { depth, string, escaped } => {
                let mut end = None;
                for (i, byte) in self.held.bytes().enumerate() {
                    match (byte, *string) {
                        _ if *escaped => *escaped = false,
                        (b'\\', true) => *escaped = true,
                        (b'"', _) => *string = !*string,
                        (b'{' | b'[', false) => *depth += 1,
                        (b'}' | b']', false) => *depth = depth.saturating_sub(1),
                        _ => {}
                    }
                    if *depth == 0 {
                        end = Some(i + 1);
                        break;
                    }
                }
                let rest = self.held.split_off(end.unwrap_or(self.held.len()));
                found.push(Found::Arguments(std::mem::replace(&mut self.held, rest)));
                if end.is_some() {
                    self.place = Place::Before;
                }
                end.is_some()
            }
        }
    }

    /// Gives what was held as text, with `rest` after it.
    fn say(&mut self, found: &mut Vec<Found>, rest: String) {
        let text = std::mem::replace(&mut self.held, rest);
        if !text.is_empty() {
            found.push(Found::Text(text));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What a reader finds; neighbouring pieces of the same kind are joined.
    fn read<'a>(format: CallFormat, pieces: impl IntoIterator<Item = &'a str>) -> Vec<Found> {
        collect(CallReader::new(format, false, false), pieces)
    }

    fn collect<'a>(mut reader: CallReader, pieces: impl IntoIterator<Item = &'a str>) -> Vec<Found> {
        let mut all: Vec<Found> = pieces.into_iter().flat_map(|piece| reader.push(piece)).collect();
        all.extend(reader.finish());
        all.into_iter().fold(Vec::new(), |mut whole, next| {
            match (whole.last_mut(), next) {
                (Some(Found::Text(text)), Found::Text(more)) => text.push_str(&more),
                (Some(Found::Arguments(text)), Found::Arguments(more)) => text.push_str(&more),
                (_, next) => whole.push(next),
            }
            whole
        })
    }

    fn text(text: &str) -> Found {
        Found::Text(text.into())
    }

    fn call(name: &str, arguments: &str) -> [Found; 2] {
        [Found::Call(name.into()), Found::Arguments(arguments.into())]
    }

    #[test]
    fn each_format() {
        let [f, g] = [call("f", "{\"a\": \"}\\\"<tool_call>\"}"), call("g", "{}")];
        let two = [&f[..], &g].concat();
        let after = |said: &str| [&[text(said)], &two[..]].concat();
        let hermes = "네<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"}\\\"<tool_call>\"}}\n</tool_call>\n<tool_call>\n\
                      {\"name\": \"g\", \"arguments\": {}}\n</tool_call>";
        assert_eq!(read(CallFormat::HERMES, [hermes]), after("네"));
        let list =
            "[{\"name\": \"f\", \"arguments\": {\"a\": \"}\\\"<tool_call>\"}}, {\"name\": \"g\", \"arguments\": {}}]";
        assert_eq!(read(CallFormat::MISTRAL, [&format!("[TOOL_CALLS] {list}")[..]]), two);
        assert_eq!(read(CallFormat::MISTRAL, [&format!("한[TOOL_CALLS]{list}")[..]]), after("한"));
        let json = list[1..list.len() - 1].replace("}}, ", "}}\n");
        assert_eq!(read(CallFormat::JSON, [&json[..]]), two);
        let llama = "{\"name\": \"f\", \"parameters\": {\"a\": \"}\\\"<tool_call>\"}}";
        assert_eq!(read(CallFormat::LLAMA3, [llama]), f);
    }

    #[test]
    fn what_is_no_call_is_text() {
        for format in [CallFormat::HERMES, CallFormat::MISTRAL, CallFormat::JSON, CallFormat::LLAMA3] {
            for said in ["", "안녕 <tool", "[TOOL_CALLS", "{\"name\"", "{\"nam\": 1}", "<b>x</b>", " {\"name\": \"f\"}"]
            {
                let expected: Vec<Found> = [text(said)].into_iter().filter(|_| !said.is_empty()).collect();
                assert_eq!(read(format, [said]), expected, "{format:?} {said:?}");
            }
        }
        // An answer that was cut in the middle of a call gives the arguments as far as they came, and no text.
        let cut = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": [1";
        assert_eq!(read(CallFormat::HERMES, [cut]), call("f", "{\"a\": [1"));
        assert_eq!(read(CallFormat::HERMES, ["<tool_call>\n{\"name\": \"f"]), []);
    }

    #[test]
    fn a_marker_within_a_formatted_answer_is_text() {
        for (format, call) in [
            (CallFormat::HERMES, "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>"),
            (CallFormat::MISTRAL, "[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {}}]"),
        ] {
            let json = format!("{{\"a\":{:?}}}", format.marker);
            for cut in 0..json.len() {
                let pieces = [&json[..cut], &json[cut..]];
                assert_eq!(collect(CallReader::new(format, true, false), pieces), [text(&json)]);
            }
            assert_eq!(collect(CallReader::new(format, true, false), [call]), self::call("f", "{}"));
        }
    }

    #[test]
    fn the_beginning_of_a_call_that_must_be_is_no_text() {
        let whole = [
            (CallFormat::JSON, "{\"name\": \"f"),
            (CallFormat::LLAMA3, "{\"name\": \"f"),
            (CallFormat::HERMES, "<tool_call>\n{\"name\": \"f"),
            (CallFormat::MISTRAL, "[TOOL_CALLS][{\"name\": \"f"),
        ];
        for (format, whole) in whole {
            for cut in 0..=whole.len() {
                assert_eq!(collect(CallReader::new(format, false, true), [&whole[..cut]]), [], "{:?}", &whole[..cut]);
            }
        }
    }

    #[test]
    fn calls_are_made_when_their_arguments_are_whole() {
        let whole = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": [1]}}\n</tool_call>";
        let complete = whole.find("]}").unwrap() + 2;
        for cut in 0..whole.len() {
            let mut reader = CallReader::new(CallFormat::HERMES, false, false);
            reader.push(&whole[..cut]);
            assert_eq!(reader.called(), cut >= complete, "{:?}", &whole[..cut]);
        }
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(cuts in proptest::collection::vec(0usize..200, 0..12), which in 0usize..4) {
            let formats = [CallFormat::HERMES, CallFormat::MISTRAL, CallFormat::JSON, CallFormat::LLAMA3];
            let format = formats[which];
            let one = |name: &str| format!("{HEAD}{}{{\"값\": [\"\\\\\", {{}}]}}}}", format.before_arguments(name));
            let said = if format.marker.is_empty() { "" } else { "<한 [TOOL" };
            let mut whole = format!("{said}{}{}{}", format.marker, format.open[0], one("f"));
            if format.several {
                whole += &[format.between, &one("g")].concat();
            }
            whole += format.close;
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|at| whole.is_char_boundary(*at)).collect();
            cuts.extend([0, whole.len()]);
            cuts.sort_unstable();
            let pieces = cuts.windows(2).map(|w| &whole[w[0]..w[1]]);
            prop_assert_eq!(read(format, pieces), read(format, [&whole[..]]));
            prop_assert_eq!(read(format, [&whole[..]]).len(), usize::from(!said.is_empty()) + 2 * (1 + usize::from(format.several)));
        }
    }
}
