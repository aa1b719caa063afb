//! `aoji bench --speculate`: measures speculation beside plain decoding, for each kind of text.

use super::{Args, Header, table};
use crate::{common, guesses::Guesses};
use aoji::{
    Engine, Error, GenerateOptions, Message, Result, Speculate,
    bench::{self, Prompt, Speculation},
};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The prompts if `--prompts` names no others: texts to quote, programs to change, chats, Korean.
const PROMPTS: &str = include_str!("../../../../assets/speculate/prompts.jsonl");

/// A line of prompts.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    kind: String,
    /// The user's question; the model's template turns it into a prompt.
    question: String,
    #[serde(default)]
    prediction: String,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    header: &'a Header,
    model: &'a str,
    /// Most tokens of an answer.
    tokens: usize,
    #[serde(flatten)]
    measured: &'a Speculation,
}

/// Measures, and prints.
pub fn run(args: &Args, guesses: &Guesses) -> Result<()> {
    let speculate = guesses.speculate();
    if speculate == Speculate::Off {
        return Err(Error::Input(
            "--speculate off is plain decoding, which is measured beside the others: name another".into(),
        ));
    }
    let (text, path) = match &args.prompts {
        Some(path) => (common::read_file(path)?, path.as_path()),
        None => (PROMPTS.into(), Path::new("assets/speculate/prompts.jsonl")),
    };
    let lines = lines(&text, path)?;
    let engine = args.model.open_with(guesses)?;
    let prompts = lines.iter().map(|line| prompt(&engine, line)).collect::<Result<Vec<_>>>()?;
    let options = GenerateOptions { speculate, max_tokens: Some(args.tokens), ..GenerateOptions::default() };
    let bar = common::bar(prompts.len() as u64, "measuring", "{pos}/{len} prompts");
    let measured =
        bench::speculate(&engine, &prompts, &options, args.repeat, &mut |done| bar.set_position(done as u64))?;
    bar.finish_and_clear();
    let header = Header::new(engine.device());
    if args.json {
        let (model, tokens) = (args.model.model.as_str(), args.tokens);
        return common::print_json(&Report { header: &header, model, tokens, measured: &measured });
    }
    common::print(&format!("{}\n{}", header.text(), tables(&measured)))
}

fn lines(text: &str, path: &Path) -> Result<Vec<Line>> {
    let line = |(i, line): (usize, &str)| {
        let wrong = |e| Error::File { path: path.into(), what: format!("line {}: {e}", i + 1) };
        serde_json::from_str(line).map_err(wrong)
    };
    let lines: Vec<Line> =
        text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()).map(line).collect::<Result<_>>()?;
    match lines.is_empty() {
        true => Err(Error::File { path: path.into(), what: "has no prompts".into() }),
        false => Ok(lines),
    }
}

fn prompt(engine: &Engine, line: &Line) -> Result<Prompt> {
    let tokenizer = engine.tokenizer()?;
    let tokens = engine.template().encode(tokenizer, &[Message::new("user", line.question.clone())], None)?;
    let prediction = tokenizer.encode_plain(&line.prediction)?;
    Ok(Prompt { kind: line.kind.clone(), tokens, prediction })
}

fn tables(measured: &Speculation) -> String {
    let row = |k: &bench::Kind| {
        vec![
            k.kind.clone(),
            k.texts.to_string(),
            k.tokens.to_string(),
            format!("{:.0}%", 100.0 * k.accepted as f64 / k.drafted.max(1) as f64),
            format!("{:.2}", k.accepted_per_step),
            format!("{:.1}", k.plain_tokens_per_s),
            format!("{:.1}", k.tokens_per_s),
            format!("{:.2}", k.times_plain),
        ]
    };
    let header = ["kind", "texts", "tokens", "right", "right/step", "plain tok/s", "tok/s", "times plain"];
    let kinds = table::table(&header, &measured.kinds.iter().map(row).collect::<Vec<_>>());
    let steps = measured.step_ms.iter().map(|(rows, ms)| vec![rows.to_string(), format!("{ms:.3}")]);
    format!("{kinds}\n{}", table::table(&["rows of a step", "ms"], &steps.collect::<Vec<_>>()))
}
