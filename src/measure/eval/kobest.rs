//! The five tasks: how a row becomes a question, and how a document is made of a question and few-shot examples.

use super::PythonRandom;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::{
    fmt, fs,
    path::{Path, PathBuf},
    str::FromStr,
};

/// A task of KoBEST.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Task {
    /// Yes or no, by a paragraph.
    Boolq,
    /// The more plausible cause or effect.
    Copa,
    /// The right ending of a story.
    Hellaswag,
    /// Positive or negative.
    Sentineg,
    /// Whether a word means the same in two sentences.
    Wic,
}

impl Task {
    /// All, in the order of the harness's tables.
    pub const ALL: [Task; 5] = [Task::Boolq, Task::Copa, Task::Hellaswag, Task::Sentineg, Task::Wic];

    /// `wic`, as its files are called.
    pub fn name(self) -> &'static str {
        match self {
            Task::Boolq => "boolq",
            Task::Copa => "copa",
            Task::Hellaswag => "hellaswag",
            Task::Sentineg => "sentineg",
            Task::Wic => "wic",
        }
    }

    /// Whether the harness also reports accuracy by log-probability per character.
    pub fn has_acc_norm(self) -> bool {
        self == Task::Hellaswag
    }

    fn question(self, row: &Row) -> Result<Question> {
        let text = |name: &str| row.text(name);
        let fixed = |no: &str, yes: &str| vec![no.to_string(), yes.to_string()];
        let (text, choices) = match self {
            Task::Boolq => {
                (format!("{} 질문: {} 답변: ", text("paragraph")?, text("question")?), fixed("아니오", "예"))
            }
            Task::Copa => {
                let connector = match text("question")?.trim() {
                    "원인" => " 왜냐하면",
                    "결과" => " 그래서",
                    other => return Err(row.wrong(format!("question is {other:?}, expected 원인 or 결과"))),
                };
                let alternatives = ["alternative_1", "alternative_2"].map(|name| text(name).map(String::from));
                (format!("{} {connector}", text("premise")?), alternatives.into_iter().collect::<Result<_>>()?)
            }
            Task::Hellaswag => {
                let endings = ["ending_1", "ending_2", "ending_3", "ending_4"].map(|e| text(e).map(String::from));
                (format!("문장: {}", text("context")?), endings.into_iter().collect::<Result<_>>()?)
            }
            Task::Sentineg => (format!("문장: {} 긍부정:", text("sentence")?), fixed("부정", "긍정")),
            Task::Wic => (
                format!(
                    "문장1: {} 문장2: {} 두 문장에서 {}가 같은 뜻으로 쓰였나?",
                    text("context_1")?,
                    text("context_2")?,
                    text("word")?
                ),
                fixed("아니오", "예"),
            ),
        };
        let gold = row.label(choices.len())?;
        Ok(Question { text, choices, gold })
    }
}

impl fmt::Display for Task {
    /// The harness's name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kobest_{}", self.name())
    }
}

impl FromStr for Task {
    type Err = String;
    fn from_str(s: &str) -> Result<Task, String> {
        let name = s.strip_prefix("kobest_").unwrap_or(s);
        let names = || Task::ALL.map(Task::name).join(", ");
        Task::ALL.into_iter().find(|t| t.name() == name).ok_or_else(|| format!("expected one of {}", names()))
    }
}

impl TryFrom<String> for Task {
    type Error = String;
    fn try_from(s: String) -> Result<Task, String> {
        s.parse()
    }
}

impl From<Task> for String {
    fn from(task: Task) -> String {
        task.to_string()
    }
}

/// A row as a question.
struct Question {
    text: String,
    choices: Vec<String>,
    gold: usize,
}

/// What the model is asked about one row of a test set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// The task it belongs to.
    pub task: Task,
    /// Number of its row in the test set.
    pub doc_id: usize,
    /// Few-shot examples and question.
    pub context: String,
    /// The answers to choose from; what follows the context is a space and one of them.
    pub choices: Vec<String>,
    /// Index of the right one.
    pub gold: usize,
}

impl Document {
    /// The texts that may follow the context.
    pub fn continuations(&self) -> Vec<String> {
        self.choices.iter().map(|c| format!(" {c}")).collect()
    }
}

/// The documents of a task: the first `limit` rows of its test set, each after `shots` examples that the harness draws from the
/// training set. `dir` has `wic.test.jsonl` and so on, or a folder `jsonl` with them.
///
/// # Errors
/// `Io` or `File` for a file that is missing or has a row that is not of the task; `Input` for more shots than there are rows.
pub fn documents(dir: &Path, task: Task, shots: usize, limit: Option<usize>, seed: u64) -> Result<Vec<Document>> {
    let test = questions(dir, task, "test")?;
    let train = if shots > 0 { questions(dir, task, "train")? } else { Vec::new() };
    if train.len() < shots {
        return Err(Error::Input(format!("{shots} shots: the training set of {task} has {} rows", train.len())));
    }
    let mut random = PythonRandom::new(seed);
    let document = |(doc_id, q): (usize, Question)| {
        let shots = random.sample(train.len(), shots).into_iter().map(|i| &train[i]);
        let shots: String = shots.map(|q| format!("{} {}\n\n", q.text, q.choices[q.gold])).collect();
        Document { task, doc_id, context: shots + &q.text, choices: q.choices, gold: q.gold }
    };
    Ok(test.into_iter().take(limit.unwrap_or(usize::MAX)).enumerate().map(document).collect())
}

fn questions(dir: &Path, task: Task, split: &str) -> Result<Vec<Question>> {
    let name = format!("{}.{split}.jsonl", task.name());
    let inner = dir.join("jsonl").join(&name);
    let path = if inner.exists() { inner } else { dir.join(&name) };
    let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
    let question = |(i, line): (usize, &str)| {
        let row = Row { path: &path, line: i + 1, fields: Map::new() };
        let fields = serde_json::from_str(line).map_err(|e| row.wrong(format!("is not a JSON object: {e}")))?;
        task.question(&Row { fields, ..row })
    };
    // Some editors begin a file with a byte order mark, which belongs to no row.
    text.trim_start_matches('\u{feff}').lines().enumerate().map(question).collect()
}

/// A line of a data file.
struct Row<'a> {
    path: &'a PathBuf,
    line: usize,
    fields: Map<String, Value>,
}

impl Row<'_> {
    fn wrong(&self, what: String) -> Error {
        Error::file(self.path, format!("line {}: {what}", self.line))
    }

    fn text(&self, name: &str) -> Result<&str> {
        let text = self.fields.get(name).and_then(Value::as_str);
        text.ok_or_else(|| self.wrong(format!("has no text {name:?}")))
    }

    fn label(&self, below: usize) -> Result<usize> {
        let label = self.fields.get("label").and_then(Value::as_u64).map(|n| n as usize);
        label.filter(|n| *n < below).ok_or_else(|| self.wrong(format!("has no label from 0 to {}", below - 1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(task: Task, json: &str) -> Result<Question> {
        let path = PathBuf::from("wic.test.jsonl");
        task.question(&Row { path: &path, line: 3, fields: serde_json::from_str(json).unwrap() })
    }

    #[test]
    fn a_cause_and_an_effect() {
        let row =
            |q| format!(r#"{{"premise":"비.","question":"{q}","alternative_1":"ㄱ","alternative_2":"ㄴ","label":1}}"#);
        let text = |q| question(Task::Copa, &row(q)).map(|q| q.text).map_err(|e| e.to_string());
        assert_eq!(text(" 원인 ").unwrap(), "비.  왜냐하면"); // the two spaces are the harness's
        assert_eq!(text("결과").unwrap(), "비.  그래서");
        assert_eq!(text("왜").unwrap_err(), "wic.test.jsonl: line 3: question is \"왜\", expected 원인 or 결과");
    }

    #[test]
    fn rows_of_another_task_are_named() {
        let error = |json| question(Task::Sentineg, json).map(drop).unwrap_err().to_string();
        assert_eq!(error(r#"{"label": 1}"#), "wic.test.jsonl: line 3: has no text \"sentence\"");
        assert_eq!(error(r#"{"sentence": "a", "label": 2}"#), "wic.test.jsonl: line 3: has no label from 0 to 1");
    }

    #[test]
    fn names() {
        assert_eq!(("kobest_wic".parse(), "copa".parse()), (Ok(Task::Wic), Ok(Task::Copa)));
        assert_eq!("x".parse::<Task>().unwrap_err(), "expected one of boolq, copa, hellaswag, sentineg, wic");
    }
}
