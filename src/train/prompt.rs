//! Turns rows of data into tokens, and says which of them are learned, as Axolotl does (`prompt_strategies`,
//! `prompt_tokenizers` of 2024-05).
//!
//! Prompt and response are tokenized separately and put together, so no token spans both; a model that is asked for the
//! response later sees the same tokens. The response ends with EOS, which is learned too.

use crate::{
    error::{Error, Result},
    text::Tokenizer,
};
use serde_json::Value;

/// What kind of rows a file has.
#[derive(Debug, Clone, PartialEq)]
pub enum Kind {
    /// `instruction`, `input` and `output`, in the prompt of Stanford Alpaca.
    Alpaca,
    /// A prompt that the user describes.
    Custom(PromptFormat),
    /// `input_ids` and `labels`; labels of -100 are not learned.
    Tokens,
}

/// Fields of a row, and how the prompt is made of them: `{instruction}` and `{input}` are replaced in the formats,
/// `{system}` in the format of the system prompt.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "Axolotl's keys")]
pub struct PromptFormat {
    pub field_system: String,
    pub field_instruction: String,
    pub field_input: String,
    pub field_output: String,
    /// Used if there is no `field_system`, or the row does not have it.
    pub system_prompt: String,
    pub system_format: String,
    pub format: String,
    /// Used for rows whose input is empty or absent.
    pub no_input_format: String,
}

const ALPACA: &str = "Below is an instruction that describes a task, paired with an input that provides further context. Write a \
                      response that appropriately completes the request.\n\n";
const ALPACA_NO_INPUT: &str =
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n";

/// A row as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub ids: Vec<u32>,
    /// For each token, whether it is learned.
    pub learned: Vec<bool>,
}

impl Example {
    /// How many tokens are learned; the first of a row cannot be.
    pub fn labels(&self) -> usize {
        self.learned.iter().skip(1).filter(|l| **l).count()
    }
}

/// How rows become tokens.
pub struct Encoder<'a> {
    /// The model's tokenizer, and the token that ends a response; rows of tokens need neither.
    pub text: Option<(&'a Tokenizer, u32)>,
    /// Rows of the vocabulary.
    pub vocab: usize,
    /// Longest prompt and longest response; each is cut separately.
    pub sequence_len: usize,
    /// Whether the prompt is learned too.
    pub train_on_inputs: bool,
}

impl Kind {
    /// Prompt and response of a row; `None` for rows of tokens.
    ///
    /// # Errors
    /// What is wrong with the row.
    pub fn texts(&self, row: &Value) -> Result<Option<(String, String)>, String> {
        let format = match self {
            Kind::Tokens => return Ok(None),
            Kind::Custom(format) => format.clone(),
            Kind::Alpaca => PromptFormat {
                field_system: String::new(),
                field_instruction: "instruction".into(),
                field_input: "input".into(),
                field_output: "output".into(),
                system_prompt: String::new(),
                system_format: "{system}".into(),
                format: format!(
                    "{ALPACA}### Instruction:\n{{instruction}}\n\n### Input:\n{{input}}\n\n### Response:\n"
                ),
                no_input_format: format!("{ALPACA_NO_INPUT}### Instruction:\n{{instruction}}\n\n### Response:\n"),
            },
        };
        let optional = |field: &str| match row.get(field).filter(|_| !field.is_empty()) {
            None | Some(Value::Null) => Ok(""),
            Some(Value::String(s)) => Ok(s.as_str()),
            Some(other) => Err(format!("{field:?} is {other}, expected text")),
        };
        let needed = |field: &str| match row.get(field) {
            None | Some(Value::Null) => Err(format!("there is no {field:?}")),
            Some(_) => optional(field),
        };
        let (instruction, input) = (needed(&format.field_instruction)?, optional(&format.field_input)?);
        let output = needed(&format.field_output)?;
        if output.is_empty() {
            return Err(format!("{:?} is empty: there is nothing to learn", format.field_output));
        }
        let system = match optional(&format.field_system)? {
            "" => format.system_prompt.as_str(),
            system => system,
        };
        let mut prompt = match system {
            "" => String::new(),
            system => fill(&format.system_format, &[("{system}", system)]),
        };
        let body = if input.is_empty() { &format.no_input_format } else { &format.format };
        prompt += &fill(body, &[("{instruction}", instruction), ("{input}", input)]);
        Ok(Some((prompt, output.to_string())))
    }
}

/// `text` with each name replaced, all at once: inserted text is not searched again. `{{` and `}}` stand for braces, as
/// in Python.
fn fill(text: &str, values: &[(&str, &str)]) -> String {
    let (mut out, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(at) = rest.find(['{', '}']) {
        out += &rest[..at];
        rest = &rest[at..];
        let (with, len) = match values.iter().find(|(name, _)| rest.starts_with(name)) {
            Some((name, value)) => (*value, name.len()),
            None if rest.starts_with("{{") => ("{", 2),
            None if rest.starts_with("}}") => ("}", 2),
            None => (&rest[..1], 1),
        };
        out += with;
        rest = &rest[len..];
    }
    out + rest
}

impl Encoder<'_> {
    /// The tokens of a row.
    ///
    /// # Errors
    /// What is wrong with the row.
    pub fn row(&self, kind: &Kind, row: &Value) -> Result<Example, String> {
        let example = match kind.texts(row)? {
            Some((prompt, response)) => self.pair(&prompt, &response).map_err(|e| e.to_string())?,
            None => tokens(row)?,
        };
        match example.ids.iter().find(|id| **id as usize >= self.vocab) {
            Some(id) => Err(format!("token {id} is none of the model's {}", self.vocab)),
            None => Ok(example),
        }
    }

    /// The tokens of a prompt and its response.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn pair(&self, prompt: &str, response: &str) -> Result<Example> {
        let (tokenizer, eos) = self.text.ok_or_else(|| Error::Input("there is no tokenizer for text".into()))?;
        let mut ids = if prompt.is_empty() { Vec::new() } else { tokenizer.encode(prompt, true)? };
        ids.truncate(self.sequence_len);
        let mut learned = vec![self.train_on_inputs; ids.len()];
        let mut answer = tokenizer.encode(response, true)?;
        answer.truncate(self.sequence_len);
        if answer.last() != Some(&eos) && answer.len() < self.sequence_len {
            answer.push(eos);
        }
        if !answer.is_empty() && answer.first().copied() == tokenizer.bos() {
            answer.remove(0);
        }
        learned.resize(ids.len() + answer.len(), true);
        ids.extend(answer);
        Ok(Example { ids, learned })
    }
}

/// A row that is tokens already.
fn tokens(row: &Value) -> Result<Example, String> {
    let list = |field: &str| {
        let list = row.get(field).and_then(Value::as_array).ok_or_else(|| format!("there is no list {field:?}"))?;
        let number = |v: &Value| v.as_i64().ok_or_else(|| format!("{field:?} has {v}, expected token ids"));
        list.iter().map(number).collect::<Result<Vec<i64>, String>>()
    };
    let (ids, labels) = (list("input_ids")?, list("labels")?);
    if ids.len() != labels.len() {
        return Err(format!("input_ids has {} elements and labels {}", ids.len(), labels.len()));
    }
    if let Some(i) = (0..ids.len()).find(|&i| labels[i] != -100 && labels[i] != ids[i]) {
        return Err(format!("labels[{i}] is {}, expected -100 or {} as in input_ids", labels[i], ids[i]));
    }
    let id = |id: &i64| u32::try_from(*id).map_err(|_| format!("input_ids has {id}, expected token ids"));
    let ids = ids.iter().map(id).collect::<Result<_, _>>()?;
    Ok(Example { ids, learned: labels.iter().map(|l| *l != -100).collect() })
}

/// The token that ends a response.
///
/// # Errors
/// `Input` when the model has none: then an answer would never end.
pub fn eos(tokenizer: &Tokenizer, named: Option<&str>, model: &[u32]) -> Result<u32> {
    match named {
        Some(text) => tokenizer
            .token_id(text)
            .ok_or_else(|| Error::Input(format!("special_tokens.eos_token: {text:?} is no token of the model"))),
        None => model.first().copied().ok_or_else(|| {
            Error::Input(
                "the model's files name no token that ends a text, so what is learned would never end: name one with \
                 special_tokens: {eos_token: ...}"
                    .into(),
            )
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn prompts_are_axolotls() {
        let texts = |kind: &Kind, row| kind.texts(&row).map(|t| t.unwrap());
        let row = json!({ "instruction": "do {input}", "input": "with", "output": " yes" });
        let (prompt, response) = texts(&Kind::Alpaca, row).unwrap();
        assert!(prompt.starts_with("Below is an instruction that describes a task, paired with an input"), "{prompt}");
        assert!(
            prompt.ends_with("\n\n### Instruction:\ndo {input}\n\n### Input:\nwith\n\n### Response:\n"),
            "{prompt}"
        );
        assert_eq!(response, " yes");
        let (prompt, _) = texts(&Kind::Alpaca, json!({ "instruction": "do", "input": "", "output": "yes" })).unwrap();
        assert!(prompt.contains("a task. Write a response") && !prompt.contains("### Input"), "{prompt}");

        let custom = Kind::Custom(PromptFormat {
            field_system: "sys".into(),
            field_instruction: "q".into(),
            field_input: "i".into(),
            field_output: "a".into(),
            system_prompt: String::new(),
            system_format: "<{system}>\n".into(),
            format: "{{{instruction}}}: {input} =".into(),
            no_input_format: "{instruction} =".into(),
        });
        let row = json!({ "q": "1", "i": "{instruction}", "a": "2", "sys": "S" });
        assert_eq!(texts(&custom, row).unwrap().0, "<S>\n{1}: {instruction} =");
        assert_eq!(texts(&custom, json!({ "q": "1", "a": "2" })).unwrap().0, "1 =");
        assert_eq!(texts(&custom, json!({ "q": "1" })).unwrap_err(), "there is no \"a\"");
        assert_eq!(
            texts(&custom, json!({ "q": "1", "a": "" })).unwrap_err(),
            "\"a\" is empty: there is nothing to learn"
        );
        assert!(texts(&custom, json!({ "q": 1, "a": "2" })).unwrap_err().contains("expected text"));
    }

    #[test]
    fn rows_of_tokens() {
        let row = |ids: Value, labels: Value| tokens(&json!({ "input_ids": ids, "labels": labels }));
        let example = row(json!([1, 2, 3]), json!([-100, 2, 3])).unwrap();
        assert_eq!((example.ids.as_slice(), example.labels()), (&[1, 2, 3][..], 2));
        assert!(row(json!([1, 2]), json!([1])).unwrap_err().contains("2 elements and labels 1"));
        assert!(row(json!([1, 2]), json!([1, 3])).unwrap_err().contains("labels[1] is 3, expected -100 or 2"));
        assert!(row(json!([-1]), json!([-1])).is_err());
    }
}
