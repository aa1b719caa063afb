//! `aoji data preview`: shows rows as the model will see them, and how many rows there are of each length.

use crate::{
    common,
    svg::{Anchor, FAINT, INK, PALETTE, Svg},
    tune,
};
use aoji::{
    Error, ModelFiles, Result, Tokenizer,
    train::{Data, Encoder, Example, Kind, PromptFormat, Tuner, rows, tokens_of},
};
use std::{
    fs,
    io::IsTerminal,
    path::{Path, PathBuf},
};

/// Bars of the histogram.
const BARS: usize = 16;

/// Arguments of `aoji data preview`.
#[derive(clap::Args)]
#[command(after_help = "\
What is learned is green on a terminal and between » and « elsewhere; special tokens are shown. For a configuration it also shows \
micro-batches, steps and memory. A file of rows of prompt and response (as `aoji data` writes them), of instruction and output, or of \
input_ids and labels is shown with the tokens of --model.

Example: aoji data preview examples/tune/demo.yml --rows 2")]
pub struct Args {
    /// A configuration of `aoji tune`, or JSONL
    #[arg(value_name = "CONFIG.yml|FILE")]
    file: PathBuf,
    /// The model whose tokenizer is used
    #[arg(short, long, value_name = "NAME", default_value_t = common::default_model())]
    model: String,
    /// Number of rows to show
    #[arg(long, value_name = "N", default_value_t = 3)]
    rows: usize,
    /// Most tokens of a row
    #[arg(long, value_name = "TOKENS", default_value_t = 4096)]
    sequence_len: usize,
    /// Another value of a key of the configuration; repeatable
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Show token ids too
    #[arg(long)]
    ids: bool,
    /// Write the histogram of lengths
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// Prints rows and numbers.
pub fn run(args: Args) -> Result<()> {
    let yaml = args.file.extension().is_some_and(|e| e == "yml" || e == "yaml");
    let (data, files, about) = if yaml {
        let config = tune::read(&args.file, &args.set)?;
        let files = ModelFiles::open(&config.base_model)?;
        let tuner = Tuner::open(config)?;
        let about = tune::describe(&tuner);
        (tuner.data, files, about)
    } else {
        let files = ModelFiles::open(&args.model)?;
        let kind = kind(&args.file)?;
        let text = Some(tokens_of(&files, None)?);
        let (vocab, sequence_len) = (files.config.vocab, args.sequence_len);
        let encoder = Encoder { text, vocab, sequence_len, train_on_inputs: false };
        let data = Data::read(&[(args.file.clone(), kind)], &encoder)?;
        let (tokens, labels) = (data.tokens(), data.labels());
        let about = format!(
            "{} rows, {} dropped: {tokens} tokens, {:.1}% of them learned\n",
            data.examples.len(),
            data.dropped.len(),
            100.0 * labels as f64 / tokens.max(1) as f64
        );
        (data, files, about)
    };
    let (tokenizer, _) = tokens_of(&files, None)?;
    let color = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let mut text = String::new();
    for (example, (path, line)) in data.examples.iter().zip(&data.places).take(args.rows) {
        let n = example.ids.len();
        text += &format!("--- {}:{line}, {n} tokens, {} learned\n", path.display(), example.labels());
        text += &show(tokenizer, example, color)?;
        text += "\n";
        if args.ids {
            text += &format!("{:?}\n", example.ids);
        }
    }
    text += "--- lengths\n";
    let lengths: Vec<usize> = data.examples.iter().map(|e| e.ids.len()).collect();
    let (width, bars) = histogram(&lengths);
    let most = bars.iter().max().copied().unwrap_or(1).max(1);
    for (i, n) in bars.iter().enumerate() {
        let bar = "#".repeat((40 * n).div_ceil(most));
        text += &format!("{:6} to {:6} {n:8} {bar}\n", i * width + 1, (i + 1) * width);
    }
    for d in &data.dropped {
        text += &format!("dropped {}:{}: {}\n", d.path.display(), d.line, d.reason);
    }
    common::print(&(text + &about))?;
    if let Some(path) = &args.svg {
        fs::write(path, draw(width, &bars)).map_err(|source| Error::Io { path: path.clone(), source })?;
    }
    Ok(())
}

/// What the rows of a file are, by the fields of the first.
fn kind(path: &Path) -> Result<Kind> {
    let mut first = None;
    rows(path, |_, row| {
        first.get_or_insert(row);
        Ok(())
    })?;
    let has = |field: &str| first.as_ref().is_some_and(|row| row.get(field).is_some());
    if has("prompt") && has("response") {
        return Ok(Kind::Custom(PromptFormat {
            field_system: String::new(),
            field_instruction: "prompt".into(),
            field_input: String::new(),
            field_output: "response".into(),
            system_prompt: String::new(),
            system_format: "{system}".into(),
            format: "{instruction}".into(),
            no_input_format: "{instruction}".into(),
        }));
    }
    if has("input_ids") {
        return Ok(Kind::Tokens);
    }
    if has("instruction") && has("output") {
        return Ok(Kind::Alpaca);
    }
    let what = "has neither prompt and response, instruction and output, nor input_ids and labels; `aoji data` prepares rows of \
                other kinds";
    Err(Error::File { path: path.into(), what: what.into() })
}

/// The text of a row, with what is learned marked.
fn show(tokenizer: &Tokenizer, example: &Example, color: bool) -> Result<String> {
    let (on, off) = if color { ("\u{1b}[32m", "\u{1b}[0m") } else { ("»", "«") };
    let mut text = String::new();
    let mut at = 0;
    while at < example.ids.len() {
        let learned = example.learned[at];
        let end = (at..example.ids.len()).find(|&i| example.learned[i] != learned).unwrap_or(example.ids.len());
        let part = tokenizer.decode(&example.ids[at..end], false)?;
        text += &if learned { format!("{on}{part}{off}") } else { part };
        at = end;
    }
    Ok(text)
}

/// The width of a bar, and the rows in each.
fn histogram(lengths: &[usize]) -> (usize, Vec<usize>) {
    let longest = lengths.iter().max().copied().unwrap_or(1);
    let width = longest.div_ceil(BARS).max(1);
    let mut bars = vec![0; longest.div_ceil(width)];
    lengths.iter().for_each(|n| bars[(n - 1) / width] += 1);
    (width, bars)
}

fn draw(width: usize, bars: &[usize]) -> String {
    let (left, bottom, height, step) = (56.0, 240.0, 190.0, 40.0);
    let most = bars.iter().max().copied().unwrap_or(1).max(1) as f64;
    let right = left + step * bars.len() as f64;
    let mut svg = Svg::new(right + 20.0, bottom + 40.0);
    svg.text(left, 20.0, Anchor::Start, 14.0, "Rows by length in tokens");
    for i in 0..=4 {
        let part = f64::from(i) / 4.0;
        svg.line(&[(left, bottom - height * part), (right, bottom - height * part)], FAINT, 1.0);
        svg.text(left - 6.0, bottom - height * part + 4.0, Anchor::End, 11.0, &format!("{:.0}", most * part));
    }
    for (i, n) in bars.iter().enumerate() {
        let (x, tall) = (left + step * i as f64, height * *n as f64 / most);
        svg.rect(x + 2.0, bottom - tall, step - 4.0, tall, PALETTE[0], &format!("{n} rows"));
        svg.text(x + step, bottom + 16.0, Anchor::Middle, 10.0, &((i + 1) * width).to_string());
    }
    svg.line(&[(left, bottom), (right, bottom)], INK, 1.0);
    svg.finish()
}
