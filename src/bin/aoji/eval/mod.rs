//! `aoji eval`: accuracy on a benchmark, as lm-evaluation-harness measures it.

mod beside;
mod chart;
mod samples;

use crate::common::{self, ModelArgs};
use aoji::{
    Activations, Engine, Error, Result,
    eval::{self, Document, Sample, Task, TaskResult},
};
use beside::Beside;
use clap::ValueEnum;
use samples::{Header, Samples};
use serde::Serialize;
use std::{fs, path::PathBuf, time::Instant};

const AFTER_HELP: &str = "\
DIR, or a folder jsonl in it, holds boolq.test.jsonl, boolq.train.jsonl and so on, with the rows of the Hugging Face data \
set kobest_v1. The requests, the few-shot examples, the metrics and the standard errors are those of \
lm-evaluation-harness.

The table goes to standard output as Markdown. --json prints one object instead: {\"tasks\": [{\"task\", \"n\", \"acc\", \
\"acc_stderr\", \"f1\", ...}], \"tokens_asked\", \"tokens_computed\", \"seconds\", ...}. tokens_asked counts every \
choice with its whole context; but a context is computed once for all its choices, and so is a beginning that contexts share.

Example: aoji eval kobest --data kobest_v1 -m werty1248/Llama-3-Ko-8B-Instruct-AOG --save-samples aog.jsonl \
--beside card";

/// Arguments of `aoji eval`.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// The benchmark
    suite: Suite,
    /// Directory with its files
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Which tasks: boolq, copa, hellaswag, sentineg, wic
    #[arg(long, value_name = "TASK,...", value_delimiter = ',', default_values_t = Task::ALL, hide_default_value = true)]
    tasks: Vec<Task>,
    /// Examples before each question, drawn from the training set
    #[arg(long, value_name = "N", default_value_t = 5)]
    shots: usize,
    /// Only the first N rows of each test set
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Seed of the choice of examples; the default is the harness's
    #[arg(long, value_name = "S", default_value_t = 1234)]
    seed: u64,
    /// Whether BOS is put before each context: auto is the tokenizer's own rule; off is what the harness did up to
    /// 0.4.9.1
    #[arg(long, value_enum, default_value_t = Bos::Off)]
    bos: Bos,
    /// Cut the beginning off contexts that are too long for the model, as the harness does, instead of failing
    #[arg(long)]
    cut: bool,
    /// Write each document's request and scores to FILE as soon as it is done; if FILE exists, continue after what it
    /// has
    #[arg(long, value_name = "FILE")]
    save_samples: Option<PathBuf>,
    /// Draw the accuracies to FILE
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Show the accuracies of FILE beside these: what --json printed for another model, or a table of figures in that form;
    /// card stands for the figures on the card of Llama-3-Ko-8B-Instruct-AOG, of 5 shots; repeatable
    #[arg(long, value_name = "FILE|card")]
    beside: Vec<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Suite {
    Kobest,
}

#[derive(Clone, Copy, ValueEnum, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Bos {
    Auto,
    On,
    Off,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    header: Header,
    limit: Option<usize>,
    tasks: Vec<TaskResult>,
    /// Choices that the model was asked about.
    requests: usize,
    tokens_asked: usize,
    tokens_computed: usize,
    /// Duration of this run.
    seconds: f64,
    /// Speed of this run; absent when an earlier run had done everything.
    requests_per_second: Option<f64>,
}

/// Asks, prints and draws.
pub fn run(args: Args) -> Result<()> {
    let beside = beside::read(&args.beside, args.shots)?;
    let mut tasks = args.tasks.clone();
    tasks.sort_by_key(|t| t.name());
    tasks.dedup();
    let of = |&task: &Task| eval::documents(&args.data, task, args.shots, args.limit, args.seed);
    let documents: Vec<Document> = tasks.iter().map(of).collect::<Result<Vec<_>>>()?.concat();
    let engine = args.model.open()?;
    if args.bos == Bos::On && engine.tokenizer()?.bos().is_none() {
        return Err(Error::Input("--bos on: the model's tokenizer adds no BOS".into()));
    }
    let header = Header::new(&args, &engine);
    let mut samples = Samples::open(args.save_samples.as_deref(), &header, &documents)?;
    let (seconds, asked) = ask(&args, &engine, &documents, &mut samples)?;
    let left = documents.len() - samples.done.len();
    if left > 0 {
        common::say(format_args!("interrupted: {left} of {} documents are left", documents.len()));
        if args.save_samples.is_some() {
            common::say(format_args!("the same command continues from here"));
        }
        return Ok(());
    }
    let sum = |of: fn(&Sample) -> usize| samples.done.iter().map(of).sum();
    let report = Report {
        header,
        limit: args.limit,
        tasks: tasks.iter().map(|&task| TaskResult::of(task, &samples.done)).collect(),
        requests: sum(|s| s.logprobs.len()),
        tokens_asked: sum(|s| s.asked),
        tokens_computed: sum(|s| s.computed),
        seconds,
        requests_per_second: (asked > 0).then(|| asked as f64 / seconds),
    };
    if let Some(path) = &args.svg {
        let svg = chart::draw(&report, &beside);
        fs::write(path, svg).map_err(|source| Error::Io { path: path.clone(), source })?;
    }
    if args.json { common::print_json(&report) } else { common::print(&report.table(&beside)) }?;
    common::note(format_args!(
        "{} requests, {} tokens asked, {} computed ({:.1}%), {:.1} s{}",
        report.requests,
        report.tokens_asked,
        report.tokens_computed,
        100.0 * report.tokens_computed as f64 / report.tokens_asked.max(1) as f64,
        report.seconds,
        report.requests_per_second.map_or(String::new(), |r| format!(", {r:.1} requests/s")),
    ));
    Ok(())
}

/// Asks about the documents that `samples` lacks, until Ctrl-C. Returns the seconds, and how many choices it asked
/// about.
fn ask(args: &Args, engine: &Engine, documents: &[Document], samples: &mut Samples) -> Result<(f64, usize)> {
    let left = samples.left(documents);
    common::catch_interrupt()?;
    let bar = common::bar(0, "evaluating", "{pos}/{len} tokens, {eta} left");
    let (start, mut asked) = (Instant::now(), 0);
    eval::run(engine, &left, args.bos != Bos::Off, args.cut, &mut |progress, sample| {
        bar.set_length(progress.total as u64);
        bar.set_position(progress.done as u64);
        asked += sample.logprobs.len();
        samples.add(documents, sample)?;
        Ok(!common::interrupted())
    })?;
    bar.finish_and_clear();
    Ok((start.elapsed().as_secs_f64(), asked))
}

impl Report {
    /// The table of a model card, as the harness prints it, and a column for each of `beside`.
    fn table(&self, beside: &[Beside]) -> String {
        let mut text = "|     Tasks      |n-shot| Metric |Value |   |Stderr|".to_string();
        beside.iter().for_each(|b| text += &format!(" {} |", b.name));
        text += "\n|----------------|-----:|--------|-----:|---|------|";
        text += &"---|".repeat(beside.len());
        text.push('\n');
        for t in &self.tasks {
            let (shots, error) = (self.header.shots, stderr(t.acc_stderr));
            text += &format!("|{:<16}|{shots:>6}|acc     |{:.4}|±  |{error:<6}|", t.task, t.acc);
            for b in beside {
                let figure =
                    b.figure(&t.task).map_or("-".into(), |f| format!("{:.4} ± {}", f.acc, stderr(f.acc_stderr)));
                text += &format!(" {figure} |");
            }
            text.push('\n');
        }
        text
    }
}

fn stderr(e: Option<f64>) -> String {
    e.map_or("N/A".into(), |e| format!("{e:.4}"))
}

impl Header {
    fn new(args: &Args, engine: &Engine) -> Header {
        Header {
            suite: args.suite,
            model: args.model.model.clone(),
            lora: args.model.lora.iter().map(|l| format!("{}:{}", l.dir.display(), l.scale)).collect(),
            device: engine.device().into(),
            dtype: if engine.is_gpu() || args.model.dtype == Activations::Bf16 { "bf16" } else { "f32" },
            shots: args.shots,
            seed: args.seed,
            bos: args.bos,
            cut: args.cut,
        }
    }
}
