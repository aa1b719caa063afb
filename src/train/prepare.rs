//! Turns rows of data sets into prompt and response, by the rules that the card of Llama-3-Ko-8B-Instruct-AOG gives for
//! its own.
//!
//! The prompt is rendered with the same template that later answers questions. A row has a question and an answer, and
//! sometimes an instruction of its own; a conversation has turns before its last question. With some probability, an
//! instruction is added to a row that has none; the draw depends on the seed and the row's number alone.

use crate::{
    error::Result,
    ops::sample::philox,
    text::{Message, Template},
};
use serde::Serialize;
use serde_json::Value;

/// The instruction that the card's author added to rows without one: "You are an artificial intelligence assistant. Give detailed answers,
/// so that the user need not search elsewhere to understand."
pub const CARD_INSTRUCTION: &str =
    "당신은 인공지능 비서입니다. 사용자가 답을 이해하기 위해 외부에서 검색할 필요가 없도록 상세한 답변을 제공하세요.";
/// The probability with which it was added.
pub const CARD_SHARE: f64 = 0.8;

/// A word in the counter of these draws, which other draws do not have.
const PREPARE: u32 = 3;

/// What kind of rows a file has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// `instruction`, `input` and `output`. With an input, the input is the question and the instruction is the row's
    /// own; without one, the instruction is the question.
    Alpaca,
    /// `text` of `### Human:` and `### Assistant:` turns, `messages` of `role` and `content`, or `conversations` of `from` and `value`. The last
    /// answer is the response.
    Chat,
}

/// A row to be learned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Pair {
    /// Everything before the answer.
    pub prompt: String,
    /// The answer.
    pub response: String,
}

/// How rows become pairs.
#[derive(Debug, Clone)]
pub struct Prepare {
    /// Renders the prompts.
    pub template: Template,
    /// Added to rows without an instruction.
    pub instruction: Option<String>,
    /// The probability of that.
    pub share: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Prepare {
    /// Makes the pair of row `number`, counted over all files; or says why the row is left out.
    ///
    /// # Errors
    /// When the template fails.
    pub fn row(&self, source: Source, row: &Value, number: usize) -> Result<Result<Pair, String>> {
        let read = match source {
            Source::Alpaca => alpaca(row),
            Source::Chat => chat(row),
        };
        let (mut messages, own, response) = match read {
            Ok(read) => read,
            Err(why) => return Ok(Err(why)),
        };
        if response.trim().is_empty() {
            return Ok(Err("the answer is empty".into()));
        }
        let added = self.instruction.as_deref().filter(|_| own.is_none() && self.draw(number) < self.share);
        let instruction = own.as_deref().or(added).unwrap_or_default();
        if let Template::Jinja(_) = self.template
            && !instruction.is_empty()
        {
            messages.insert(0, Message::new("system", instruction));
        }
        let instruction = Some(instruction).filter(|_| !matches!(self.template, Template::Jinja(_) | Template::Raw));
        let prompt = self.template.render(&messages, instruction)?;
        Ok(Ok(Pair { prompt, response }))
    }

    /// A random number from 0 to below 1.
    fn draw(&self, number: usize) -> f64 {
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        let [word, ..] = philox([number as u32, PREPARE, (number as u64 >> 32) as u32, 0], key);
        f64::from(word) / 4_294_967_296.0
    }
}

/// Turns that end with a question, the row's own instruction, and the answer.
type Parts = (Vec<Message>, Option<String>, String);

/// A field that may be absent.
fn text<'a>(row: &'a Value, field: &str) -> Result<&'a str, String> {
    match row.get(field) {
        None | Some(Value::Null) => Ok(""),
        Some(Value::String(s)) => Ok(s),
        Some(other) => Err(format!("{field:?} is {other}, expected text")),
    }
}

fn alpaca(row: &Value) -> Result<Parts, String> {
    let (instruction, input, output) = (text(row, "instruction")?, text(row, "input")?, text(row, "output")?);
    let (question, own) = match (input.trim(), instruction.trim()) {
        ("", "") => return Err("there is neither instruction nor input".into()),
        ("", question) => (question, None),
        (question, "") => (question, None),
        (question, own) => (question, Some(own.to_string())),
    };
    Ok((vec![Message::new("user", question)], own, output.trim().into()))
}

fn chat(row: &Value) -> Result<Parts, String> {
    let mut turns: Vec<(String, String)> = match (row.get("text"), row.get("messages").or(row.get("conversations"))) {
        (Some(Value::String(text)), _) => guanaco(text)?,
        (_, Some(Value::Array(list))) => list
            .iter()
            .map(|m| {
                let role = text(m, if m.get("role").is_some() { "role" } else { "from" })?;
                let said = text(m, if m.get("content").is_some() { "content" } else { "value" })?;
                Ok((role.to_string(), said.trim().to_string()))
            })
            .collect::<Result<_, String>>()?,
        _ => return Err("there is neither text, messages nor conversations".into()),
    };
    let role = |name: &str| match name.to_lowercase().as_str() {
        "user" | "human" | "prompter" => Some("user"),
        "assistant" | "gpt" | "bot" => Some("assistant"),
        "system" => Some("system"),
        _ => None,
    };
    if let Some((other, _)) = turns.iter().find(|(name, _)| role(name).is_none()) {
        return Err(format!("a turn is of {other:?}, expected user or assistant"));
    }
    let own = match turns.first() {
        Some((name, said)) if role(name) == Some("system") => {
            let own = Some(said.clone()).filter(|s| !s.is_empty());
            turns.remove(0);
            own
        }
        _ => None,
    };
    while turns.last().is_some_and(|(name, _)| role(name) != Some("assistant")) {
        turns.pop(); // a question without an answer
    }
    let Some((_, response)) = turns.pop() else { return Err("there is no answer".into()) };
    let kinds: Vec<_> = turns.iter().filter_map(|(name, _)| role(name)).collect();
    let wanted = ["user", "assistant"].into_iter().cycle();
    if kinds.len().is_multiple_of(2) || kinds.iter().zip(wanted).any(|(kind, wanted)| *kind != wanted) {
        return Err("questions and answers do not come in turn".into());
    }
    let messages = turns.iter().zip(kinds).map(|((_, said), kind)| Message::new(kind, said)).collect();
    Ok((messages, own, response))
}

/// Splits a text of openassistant-guanaco into turns; a turn begins right after the one before, on the same line.
fn guanaco(text: &str) -> Result<Vec<(String, String)>, String> {
    const MARKS: [&str; 2] = ["### Human:", "### Assistant:"];
    let mut places: Vec<(usize, usize)> =
        MARKS.iter().enumerate().flat_map(|(i, mark)| text.match_indices(mark).map(move |(at, _)| (at, i))).collect();
    places.sort_unstable();
    if places.is_empty() {
        return Err("the text has no \"### Human:\" and \"### Assistant:\"".into());
    }
    let ends = places.iter().skip(1).map(|(at, _)| *at).chain([text.len()]);
    let turn = |(&(at, i), end): (&(usize, usize), usize)| {
        (["user", "assistant"][i].to_string(), text[at + MARKS[i].len()..end].trim().to_string())
    };
    Ok(places.iter().zip(ends).map(turn).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn card(share: f64) -> Prepare {
        Prepare { template: Template::Aog, instruction: Some("지시".into()), share, seed: 1 }
    }

    #[test]
    fn the_cards_rows() {
        let row = |source, row: Value| card(1.0).row(source, &row, 0).unwrap();
        let koalpaca = row(Source::Alpaca, json!({ "instruction": "왜?", "output": "그래서." })).unwrap();
        assert_eq!(koalpaca.prompt, "### Question:\n왜?\n\n### Instruction:\n지시\n\n### Response:\n");
        let orca = json!({ "instruction": "짧게.", "input": "왜?", "output": "그래서." });
        let orca = row(Source::Alpaca, orca).unwrap();
        assert_eq!(orca.prompt, "### Question:\n왜?\n\n### Instruction:\n짧게.\n\n### Response:\n");
        let guanaco = "### Human: 하나?### Assistant: 이것.### Human: 둘?\n### Assistant: 저것. ### Human: 셋?";
        let said = row(Source::Chat, json!({ "text": guanaco })).unwrap();
        assert_eq!(said.response, "저것.");
        assert!(
            said.prompt.starts_with("### Question:\n하나?\n\n### Response:\n이것.\n\n### Question:\n둘?"),
            "{said:?}"
        );
        let messages = json!({ "messages": [
            { "role": "user", "content": "1" }, { "role": "assistant", "content": "2" },
            { "role": "user", "content": "3" }, { "role": "assistant", "content": "4" }] });
        let history = row(Source::Chat, messages).unwrap();
        assert!(
            history.prompt.starts_with("### Question:\n1\n\n### Response:\n2\n\n### Question:\n3"),
            "{}",
            history.prompt
        );
        assert_eq!(history.response, "4");
        for (source, bad, why) in [
            (Source::Alpaca, json!({ "output": "x" }), "neither instruction nor input"),
            (Source::Alpaca, json!({ "instruction": "x" }), "the answer is empty"),
            (Source::Chat, json!({ "text": "x" }), "### Human:"),
            (Source::Chat, json!({ "conversations": [{ "from": "gpt", "value": "x" }] }), "in turn"),
            (Source::Chat, json!({ "messages": [{ "role": "tool", "content": "x" }] }), "\"tool\""),
        ] {
            let error = row(source, bad.clone()).unwrap_err();
            assert!(error.contains(why), "{bad}: {error}");
        }
    }

    #[test]
    fn an_instruction_is_added_to_its_share_of_rows() {
        let row = json!({ "instruction": "왜?", "output": "그래서." });
        let added = |seed| {
            let prepare = Prepare { seed, ..card(0.8) };
            (0..1000).map(|i| prepare.row(Source::Alpaca, &row, i).unwrap().unwrap().prompt.contains("지시")).collect()
        };
        let (one, two): (Vec<bool>, Vec<bool>) = (added(1), added(2));
        let n = one.iter().filter(|x| **x).count();
        assert!((760..840).contains(&n), "{n} of 1000"); // 800 +- 13
        assert!(one != two && one == added(1));
    }
}
