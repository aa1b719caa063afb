//! The `aoji` command.
//!
//! One module per command, each with its arguments and `run`. Results go to standard output; everything else, to
//! standard error.
#![deny(clippy::print_stderr, reason = "`eprintln!` panics where standard error cannot be written: use `common::say`")]

mod answer;
mod bench;
mod chat;
mod common;
mod completions;
mod data;
mod doctor;
mod eval;
mod generate;
mod guesses;
mod info;
mod merge_lora;
mod ppl;
mod pull;
mod quantize;
mod score;
#[cfg(feature = "server")]
mod serve;
#[cfg_attr(not(feature = "cuda"), allow(dead_code))] // without it fewer pictures are drawn
mod svg;
mod synth;
mod tokenize;
mod tune;
mod verify;

use aoji::Error;
use clap::{ArgAction, CommandFactory, Parser, Subcommand};
use std::{
    io::{self, ErrorKind},
    process::ExitCode,
};

const AFTER_HELP: &str = "\
Models: --model takes a directory in Hugging Face layout, a GGUF file, the name OWNER/NAME of a model in the local Hugging Face \
cache (see `aoji pull`; OWNER/NAME@REVISION for a revision other than main), or `demo`, the small model inside this program.

Environment, for measuring and for finding faults: AOJI_GEMM=own|cublas (which code multiplies the matrices of a prompt), \
AOJI_PDL=0 (kernels of a step do not overlap), AOJI_RING=short|deep (how many stages of weights a kernel has on their way), \
AOJI_LAB=NAMES (variants of kernels/lab replace shipped kernels), \
AOJI_SYNC=1 (wait for each kernel, so that an error names its op), AOJI_CPU=portable|avx2|avx512|avx512bf16 (instructions of the \
CPU, by default the best; the results are the same).

AOJI_CUBLAS_DIR names the directory of cuBLAS, which multiplies the matrices of prompts from 512 tokens on; by default it is looked for \
where the system's loader looks, in the Python wheel nvidia-cublas of $VIRTUAL_ENV and ./.venv, and in /usr/local/cuda.

AOJI_MODEL names the model for commands that are given none; without it, that is `demo`.

Exit codes: 0 success, 1 failure, 2 wrong usage, 3 a verification found a difference, 130 ended by Ctrl-C.";

/// What to type first: shown to somebody who typed only `aoji`.
const FIRST: &str =
    "  aoji generate --question \"피보나치 수열이 뭐야?\"      an answer of the small model inside this program
  aoji pull werty1248/Llama-3-Ko-8B-Instruct-AOG       the 8B model, downloaded
  aoji chat -m werty1248/Llama-3-Ko-8B-Instruct-AOG    a conversation with it
";

/// Runs Llama-like language models on one GPU, or on a CPU.
#[derive(Parser)]
#[command(version, after_help = AFTER_HELP)]
struct Cli {
    /// Report progress on standard error; -vv reports more
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
#[allow(clippy::large_enum_variant)] // one value, moved once
enum Command {
    /// Answer a question, or continue a text
    Generate(generate::Args),
    /// Hold a conversation
    Chat(chat::Args),
    /// Answer requests over HTTP, in OpenAI's APIs and Anthropic's
    #[cfg(feature = "server")]
    Serve(serve::Args),
    /// Say how likely a text is, token by token
    Score(score::Args),
    /// Measure accuracy on a benchmark
    Eval(eval::Args),
    /// Measure the perplexity of a text
    Ppl(ppl::Args),
    /// Turn text into token ids, and back
    Tokenize(tokenize::Args),
    /// Describe a model and the memory that it needs
    Info(info::Args),
    /// Download a model into the Hugging Face cache
    Pull(pull::Args),
    /// Show what this machine has, what is missing and how to fix it
    Doctor(doctor::Args),
    /// Write a random checkpoint with the sizes of a real one
    Synth(synth::Args),
    /// Write a model with LoRA adapters added to its weights
    MergeLora(merge_lora::Args),
    /// Write a model with weights of fewer bits
    Quantize(quantize::Args),
    /// Prepare rows for training, and show what a model will see of them
    Data(data::Args),
    /// Train a LoRA adapter
    Tune(tune::Args),
    /// Measure how fast a model runs, or each kernel
    Bench(bench::Args),
    /// Compare with Hugging Face, another model, or the GPU with the CPU; test what bits depend on
    Verify(verify::Args),
    /// Print the completions of a shell
    Completions(completions::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let Some(command) = cli.command else {
        common::say(format_args!("{FIRST}\n{}", Cli::command().render_help()));
        return ExitCode::from(2);
    };
    match &command {
        #[cfg(feature = "server")]
        Command::Serve(args) => args.start_log(cli.verbose),
        _ => start_log(cli.verbose),
    }
    let result = match command {
        Command::Generate(args) => generate::run(args),
        Command::Chat(args) => chat::run(args),
        #[cfg(feature = "server")]
        Command::Serve(args) => serve::run(args),
        Command::Score(args) => score::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Ppl(args) => ppl::run(args),
        Command::Tokenize(args) => tokenize::run(args),
        Command::Info(args) => info::run(args),
        Command::Pull(args) => pull::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Synth(args) => synth::run(args),
        Command::MergeLora(args) => merge_lora::run(args),
        Command::Quantize(args) => quantize::run(args),
        Command::Data(args) => data::run(args),
        Command::Tune(args) => tune::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Completions(args) => completions::run(args),
    };
    exit_code(result)
}

/// Sends the library's log to standard error: warnings; with -v also what happens; with -vv every detail.
fn start_log(verbose: u8) {
    let level = match verbose {
        0 => tracing::Level::WARN,
        1 => tracing::Level::INFO,
        _ => tracing::Level::DEBUG,
    };
    let color = common::color();
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(io::stderr)
        .log_internal_errors(false) // a line that cannot be written would be reported by `eprintln!`, which panics
        .with_ansi(color)
        .with_target(false)
        .without_time()
        .init();
}

/// The one place where an error becomes a message and an exit code.
fn exit_code(result: aoji::Result<()>) -> ExitCode {
    let error = match result {
        Ok(()) if common::interrupted() => return ExitCode::from(130),
        Ok(()) => return ExitCode::SUCCESS,
        Err(error) => error,
    };
    // If the reader of our output has enough, as `head` has, that is no failure.
    if let Error::Io { path, source } = &error
        && path.as_os_str() == common::STDOUT
        && source.kind() == ErrorKind::BrokenPipe
    {
        return ExitCode::SUCCESS;
    }
    common::print_error(&error);
    ExitCode::from(if matches!(error, Error::Disagree(_)) { 3 } else { 1 })
}
