//! `aoji ppl`: perplexity of a text.

use crate::common::{self, ModelArgs};
use aoji::{
    Engine, Error, Result,
    score::{self, Window},
};
use serde::Serialize;
use std::{num::NonZeroUsize, path::PathBuf, time::Instant};

const AFTER_HELP: &str = "\
Without --stride the text is scored as lm-evaluation-harness does (loglikelihood_rolling): every token once, the first one \
after BOS, in blocks of the window. With --stride it is scored as in Hugging Face's guide: windows begin every N tokens, and \
each scores the tokens that the one before did not; the first token of the text is not scored.

Perplexity is exp(-log-probability / n), where n counts tokens, words (runs of white space, plus one) or bytes of UTF-8. With --jsonl \
each text has windows of its own, and all are added up.

Example: aoji ppl README.md --window 1024 --stride 512";

/// Arguments of `aoji ppl`.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// The text; - is standard input
    file: PathBuf,
    /// The file has one JSON object a line, each with a separate text under "text"
    #[arg(long)]
    jsonl: bool,
    /// Tokens that the model sees at once [default: the context]
    #[arg(long, value_name = "N")]
    window: Option<NonZeroUsize>,
    /// Begin a window every N tokens
    #[arg(long, value_name = "N")]
    stride: Option<NonZeroUsize>,
    #[command(flatten)]
    model: ModelArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    window: usize,
    stride: Option<usize>,
    texts: usize,
    windows: usize,
    /// Tokens that were scored.
    tokens: usize,
    words: usize,
    bytes: usize,
    sum_logprob: f64,
    /// Mean over the tokens.
    nll: f64,
    token_perplexity: f64,
    word_perplexity: f64,
    byte_perplexity: f64,
    bits_per_byte: f64,
    tokens_computed: usize,
    seconds: f64,
}

/// Scores and prints.
pub fn run(args: Args) -> Result<()> {
    let texts = common::read_texts(&args.file, args.jsonl)?;
    let engine = args.model.open()?;
    let window = args.window.map_or(engine.max_context(), NonZeroUsize::get);
    if window > engine.max_context() {
        return Err(Error::Context { needed: window, max: engine.max_context() });
    }
    let stride = args.stride.map(NonZeroUsize::get);
    if stride.is_some_and(|n| n > window) {
        return Err(Error::Input(format!(
            "--stride {} is more than the window of {window} tokens",
            stride.unwrap_or(0)
        )));
    }
    let tokenizer = engine.tokenizer()?;
    let part = |text: String| -> Result<Part> {
        let (tokens, windows) = match stride {
            None => {
                let tokens = [vec![score::first_token(&engine)?], tokenizer.encode(&text, false)?].concat();
                let windows = Window::rolling(tokens.len(), window);
                (tokens, windows)
            }
            Some(stride) => {
                let tokens = tokenizer.encode(&text, true)?;
                let windows = Window::strided(tokens.len(), window, stride);
                (tokens, windows)
            }
        };
        Ok(Part { text, tokens, windows })
    };
    let parts = texts.into_iter().map(part).collect::<Result<Vec<_>>>()?;
    let Some(report) = score(&engine, &parts, window, stride)? else { return Ok(()) };
    if args.json { common::print_json(&report) } else { common::print(&report.text()) }
}

/// A text, and which tokens of it are scored.
struct Part {
    text: String,
    tokens: Vec<u32>,
    windows: Vec<Window>,
}

/// `None` when Ctrl-C ended it.
fn score(engine: &Engine, parts: &[Part], window: usize, stride: Option<usize>) -> Result<Option<Report>> {
    let windows = || parts.iter().flat_map(|part| part.windows.iter().map(move |w| (part, w)));
    let n: usize = windows().map(|(_, w)| w.end - w.from).sum();
    if n == 0 {
        return Err(Error::Input("the text has no token to score".into()));
    }
    common::catch_interrupt()?;
    let longest = parts.iter().map(|part| part.tokens.len()).max().unwrap_or(1);
    let mut session = engine.session(window.min(longest))?;
    let bar = common::bar(n as u64, "scoring", "{pos}/{len} tokens, {eta} left");
    let (start, mut sum, mut computed) = (Instant::now(), 0.0, 0);
    for (Part { tokens, .. }, w) in windows() {
        let scores = session.score(&tokens[w.begin..w.from], &[&tokens[w.from..w.end]])?;
        sum += scores.continuations[0].sum();
        computed += scores.computed;
        bar.inc((w.end - w.from) as u64);
        if common::interrupted() {
            return Ok(None);
        }
    }
    bar.finish_and_clear();
    let words = parts.iter().map(|part| score::words(&part.text)).sum();
    let bytes = parts.iter().map(|part| part.text.len()).sum();
    let perplexity = |n: usize| (-sum / n as f64).exp();
    Ok(Some(Report {
        window,
        stride,
        texts: parts.len(),
        windows: windows().count(),
        tokens: n,
        words,
        bytes,
        sum_logprob: sum,
        nll: -sum / n as f64,
        token_perplexity: perplexity(n),
        word_perplexity: perplexity(words),
        byte_perplexity: perplexity(bytes),
        bits_per_byte: -sum / bytes as f64 / 2f64.ln(),
        tokens_computed: computed,
        seconds: start.elapsed().as_secs_f64(),
    }))
}

impl Report {
    fn text(&self) -> String {
        let method = match self.stride {
            None => format!("rolling, {} windows of {}", self.windows, self.window),
            Some(stride) => format!("{} windows of {}, stride {stride}", self.windows, self.window),
        };
        let line = |name: &str, x: f64, n: usize| format!("{x:>14.4}  per {name}, {n} of them\n");
        [
            line("token", self.token_perplexity, self.tokens),
            line("word", self.word_perplexity, self.words),
            line("byte", self.byte_perplexity, self.bytes),
            format!("{:>14.4}  bits per byte\n", self.bits_per_byte),
            format!("{:>14.4}  negative log-probability a token ({method})\n", self.nll),
            format!("{:>14.4}  log-probability\n", self.sum_logprob),
        ]
        .concat()
    }
}
