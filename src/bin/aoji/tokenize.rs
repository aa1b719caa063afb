//! `aoji tokenize`: text to token ids and back, with a model's tokenizer alone.

use crate::common;
use aoji::{Error, ModelFiles, Result, Tokenizer, hub};
use clap::ArgGroup;
use serde::{Deserialize, Serialize};
use std::io;

const AFTER_HELP: &str = "\
Ids are printed as --tokens of other commands takes them. --json prints {\"ids\": [ids], \"tokens\": [texts]}, with \
--decode {\"text\"}. Needs only tokenizer.json, not the weights.

Examples: aoji tokenize demo \"안녕하세요\"
          aoji tokenize demo --decode 2046,270";

/// Arguments of `aoji tokenize`.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
#[command(group = ArgGroup::new("input").args(["decode", "jsonl"]))]
pub struct Args {
    /// The model, unless --model names it, and the text; - reads it from standard input, to the last byte
    #[arg(value_name = "MODEL] [TEXT", num_args = 0..=2)]
    words: Vec<String>,
    /// A directory in Hugging Face layout, a GGUF file, OWNER/NAME in the local Hugging Face cache, or demo
    #[arg(short, long, value_name = "NAME")]
    model: Option<String>,
    /// Turn these ids into text
    #[arg(long, value_name = "ID,ID,...", value_delimiter = ',')]
    decode: Vec<u32>,
    /// Turn each line {"text": ...} of standard input into a line {"ids": [...]}
    #[arg(long)]
    jsonl: bool,
    /// Add no BOS; with --decode, leave out special tokens
    #[arg(long)]
    no_special: bool,
    /// Print JSON
    #[arg(long, conflicts_with = "jsonl")]
    json: bool,
}

impl Args {
    /// Which word is which: with --model, --decode or --jsonl there is one word less.
    fn model_and_text(&self) -> Result<(String, Option<String>), &'static str> {
        let text_is_given = self.decode.is_empty() && !self.jsonl;
        let mut words = self.words.iter().cloned();
        let model = self.model.clone().or_else(|| words.next()).unwrap_or_else(common::default_model);
        let text = words.next();
        match (text_is_given, words.next().or(text.clone().filter(|_| !text_is_given))) {
            (_, Some(_)) => {
                Err("there is one word too many: expected the model, once, and the text, --decode or --jsonl")
            }
            (true, None) if text.is_none() => Err(
                "there is no text: `aoji tokenize MODEL TEXT` or `aoji tokenize -m MODEL TEXT`, --decode or --jsonl",
            ),
            _ => Ok((model, text)),
        }
    }
}

#[derive(Deserialize)]
struct Line {
    text: String,
}

#[derive(Serialize)]
struct Ids {
    ids: Vec<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens: Option<Vec<String>>,
}

#[derive(Serialize)]
struct Text {
    text: String,
}

/// Prints ids or text.
pub fn run(args: Args) -> Result<()> {
    let (model, text) = args.model_and_text().unwrap_or_else(|wrong| common::usage_error("tokenize", wrong));
    let tokenizer = open(&model)?;
    if args.jsonl {
        return lines(&tokenizer, args.no_special);
    }
    if let Some(text) = text {
        let ids = tokenizer.encode(&common::text_or_stdin(&text)?, !args.no_special)?;
        if args.json {
            let tokens = ids.iter().map(|&id| String::from_utf8_lossy(&tokenizer.token_bytes(id)).into_owned());
            let tokens = Some(tokens.collect());
            return common::print_json(&Ids { ids, tokens });
        }
        let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
        return common::print(&format!("{}\n", ids.join(",")));
    }
    if let Some(id) = args.decode.iter().find(|&&id| tokenizer.token(id).is_none()) {
        return Err(Error::Input(format!("{id} is no token; the tokenizer has {}", tokenizer.vocab())));
    }
    let text = tokenizer.decode(&args.decode, args.no_special)?;
    if args.json { common::print_json(&Text { text }) } else { common::print(&format!("{text}\n")) }
}

fn open(model: &str) -> Result<Tokenizer> {
    let none = |what: &str| Error::Input(format!("{what} has no tokenizer.json"));
    if model == "demo" {
        return ModelFiles::open(model)?.tokenizer.ok_or_else(|| none(model));
    }
    let dir = hub::resolve(model)?;
    Tokenizer::from_dir(&dir)?.ok_or_else(|| none(&dir.display().to_string()))
}

fn lines(tokenizer: &Tokenizer, no_special: bool) -> Result<()> {
    for (i, line) in io::stdin().lines().enumerate() {
        let wrong = |what: String| Error::Input(format!("{}, line {}: {what}", common::STDIN, i + 1));
        let line = line.map_err(|e| wrong(e.to_string()))?;
        let line = if i == 0 { line.trim_start_matches(common::BYTE_ORDER_MARK) } else { &line };
        if line.trim().is_empty() {
            continue; // as `ppl --jsonl` does
        }
        let line: Line = serde_json::from_str(line).map_err(|e| wrong(format!("expected {{\"text\": ...}}: {e}")))?;
        let ids = tokenizer.encode(&line.text, !no_special).map_err(|e| wrong(e.to_string()))?;
        common::print_json(&Ids { ids, tokens: None })?;
    }
    Ok(())
}
