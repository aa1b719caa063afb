//! `aoji score`: how likely the model finds a text, token by token.

use crate::common::{self, ModelArgs};
use aoji::{Engine, Error, Result, verify};
use clap::ArgGroup;
use serde::Serialize;
use std::{fmt::Write, path::PathBuf};

const AFTER_HELP: &str = "\
Natural logarithms, summed in f64. --json prints one object: {\"tokens\": [ids], \"logprobs\": [null, ...], \
\"sum_logprob\", \"top\": [[], [[id, logprob], ...], ...]}; entry i is about token i given those before it, so the \
first is null. \"top\" comes only with --top.

Example: aoji score \"피보나치 수열은 앞의 두 수를 더한 것입니다.\" --top 3";

/// Arguments of `aoji score`.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
#[command(group = ArgGroup::new("input").args(["text", "prompt_file", "tokens"]))]
pub struct Args {
    /// The text; - reads it from standard input
    text: Option<String>,
    /// The text of a file; - is standard input
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// Token ids, as they are
    #[arg(long, value_name = "ID,ID,...", value_delimiter = ',')]
    tokens: Vec<u32>,
    /// Add no BOS to the text
    #[arg(long, conflicts_with = "tokens")]
    no_special: bool,
    /// Also print the K most likely tokens at each position
    #[arg(long, value_name = "K", default_value_t = 0)]
    top: usize,
    #[command(flatten)]
    model: ModelArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Score {
    tokens: Vec<u32>,
    logprobs: Vec<Option<f64>>,
    sum_logprob: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    top: Option<Vec<Vec<(u32, f64)>>>,
}

/// Prints the log-probabilities.
pub fn run(args: Args) -> Result<()> {
    let text = match (&args.text, &args.prompt_file) {
        (Some(text), _) => Some(common::text_or_stdin(text)?),
        (_, Some(path)) => Some(common::read_file(path)?),
        _ if args.tokens.is_empty() => common::usage_error(
            "score",
            "there is nothing to score; give a text, as in\n\n  aoji score \"하늘은 파란색입니다.\"",
        ),
        _ => None,
    };
    let engine = args.model.open()?;
    let tokens = match text {
        Some(text) => engine.tokenizer()?.encode(&text, !args.no_special)?,
        None => args.tokens,
    };
    let score = score(&engine, tokens, args.top)?;
    if args.json { common::print_json(&score) } else { common::print(&table(&engine, &score)) }
}

fn score(engine: &Engine, tokens: Vec<u32>, k: usize) -> Result<Score> {
    if tokens.is_empty() {
        return Err(Error::Input("the text has no tokens".into()));
    }
    let mut session = engine.session(tokens.len())?;
    let (mut logprobs, mut top) = (vec![None], vec![Vec::new()]);
    let bar = common::bar(tokens.len() as u64, "scoring", "{pos}/{len} tokens");
    session.logits_of(&tokens, 0, &mut |i, logits| {
        bar.inc(1);
        if let Some(&next) = tokens.get(i + 1) {
            logprobs.push(Some(verify::log_softmax(logits, next)));
            top.push(most_likely(logits, k));
        }
    })?;
    bar.finish_and_clear();
    let sum_logprob = logprobs.iter().flatten().fold(0.0, |sum, x| sum + x); // `sum` makes -0 of none
    Ok(Score { tokens, logprobs, sum_logprob, top: (k > 0).then_some(top) })
}

/// The `k` most likely tokens with their log-probabilities; of equal ones, the lower id first.
fn most_likely(logits: &[f32], k: usize) -> Vec<(u32, f64)> {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let better = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if k == 0 {
        return Vec::new();
    }
    if k < ids.len() {
        ids.select_nth_unstable_by(k, better);
        ids.truncate(k);
    }
    ids.sort_unstable_by(better);
    // The first log-probability is that of the largest logit, so it also gives the normaliser.
    let (best, norm) = (logits[ids[0] as usize], verify::log_softmax(logits, ids[0]));
    ids.into_iter().map(|id| (id, f64::from(logits[id as usize] - best) + norm)).collect()
}

fn table(engine: &Engine, score: &Score) -> String {
    let tokenizer = engine.tokenizer().ok();
    let token = |id: u32| match tokenizer {
        Some(t) => format!("{id:>6} {:?}", String::from_utf8_lossy(&t.token_bytes(id))),
        None => format!("{id:>6}"),
    };
    let mut text = format!("{:>10}  {:>6}\n", "logprob", "token");
    for (i, (&id, logprob)) in score.tokens.iter().zip(&score.logprobs).enumerate() {
        let logprob = logprob.map_or(String::new(), |x| format!("{x:.4}"));
        let _ = writeln!(text, "{logprob:>10}  {}", token(id));
        for (id, logprob) in score.top.iter().flat_map(|top| &top[i]) {
            let _ = writeln!(text, "{:>10}  {logprob:>10.4}  {}", "", token(*id));
        }
    }
    let n = score.tokens.len() - 1;
    let _ = writeln!(text, "{:>10.4}  sum over {n} tokens", score.sum_logprob);
    if n > 0 {
        let _ = writeln!(text, "{:>10.4}  perplexity", (-score.sum_logprob / n as f64).exp());
    }
    text
}
