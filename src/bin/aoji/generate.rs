//! `aoji generate`: one prompt, one answer.

use crate::{
    answer::{self, Answer},
    bench::startup,
    common::{self, GenerationConfig, ModelArgs, SamplingArgs},
};
use aoji::{Engine, Message, Result, StartupReport, Template};
use clap::ArgGroup;
use serde::Serialize;
use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

const EXAMPLE: &str = "aoji generate \"피보나치 수열이 무엇인가요?\"";

const AFTER_HELP: &str = "\
The text goes to standard output while it is generated. Tokens are chosen greedily unless --temperature or \
--generation-config auto is given.

--json prints one object: {\"text\", \"prompt_tokens\": [ids], \"token_ids\": [ids], \"finish_reason\", \"timings\", \
\"startup\"}. finish_reason is \"stop\" (end-of-text token or --stop), \"length\" (--max-tokens, or the context is full) \
or null (Ctrl-C); token_ids includes the token that ended the text. \
startup tells what happened up to the first token: {\"seconds\", \"disk_bytes\", \"phases\": [{\"name\", \"begin\", \
\"seconds\", \"bytes\"}]}, which -v prints as a table; disk_bytes is 0 when the page cache had everything, and null if the \
system does not say.

Example: aoji generate \"피보나치 수열이 무엇인가요?\"";

/// Arguments of `aoji generate`.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
#[command(group = ArgGroup::new("input").args(["positional", "question", "prompt", "prompt_file", "tokens"]))]
pub struct Args {
    /// The question; - reads it from standard input
    #[arg(value_name = "QUESTION")]
    positional: Option<String>,
    /// The same as QUESTION
    #[arg(short, long, value_name = "TEXT")]
    question: Option<String>,
    /// What the model is told in addition to the question [default: the template's own]
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["prompt", "prompt_file", "tokens"])]
    instruction: Option<String>,
    /// Begin the answer with this text: the model continues it, and only what it writes is printed
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["prompt", "prompt_file", "tokens"])]
    answer_start: Option<String>,
    /// Continue this text as it is, without a template; - reads it from standard input
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Continue the text of a file as it is, without a template; - is standard input
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// Continue these token ids as they are
    #[arg(long, value_name = "ID,ID,...", value_delimiter = ',')]
    tokens: Vec<u32>,
    /// aog, aog-instruction-first, raw or a .jinja file [default: the model's own, else aog]
    #[arg(long, value_name = "NAME", conflicts_with_all = ["prompt", "prompt_file", "tokens"])]
    template: Option<String>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Whether sampling as the model's author recommends it is the default for flags that are not given
    #[arg(long, value_name = "auto|none", default_value = "none")]
    generation_config: GenerationConfig,
    /// Print one JSON object with text, token ids, finish reason and timings
    #[arg(long)]
    json: bool,
}

/// What to continue.
enum Input {
    Question(String),
    Prompt(String),
    Tokens(Vec<u32>),
}

/// Streams the answer.
pub fn run(args: Args) -> Result<()> {
    // Read before the model is loaded, so that a mistyped file name is reported at once.
    let input = args.input()?;
    let engine = args.model.open_with(&args.sampling.guesses())?;
    if !args.json {
        engine.tokenizer()?; // without a tokenizer there is no text to print
    }
    let prompt = args.prompt(&engine, input)?;
    args.generation_config.announce(&engine, common::note);
    let options = args.sampling.options(&args.generation_config.sampling(&engine));
    let room = options.max_tokens.unwrap_or(usize::MAX).saturating_add(prompt.len()).min(engine.max_context());
    let begin = Instant::now();
    let mut session = engine.session(room)?;
    engine.startup().record("session", begin, Instant::now(), 0);
    common::catch_interrupt()?;
    let begin = Instant::now();
    let answer = answer::answer(&mut session, &prompt, &options, &mut |text| match args.json {
        true => Ok(()),
        false => common::print(text),
    })?;
    if let Some(t) = answer.timings {
        let first = begin + Duration::from_secs_f64(t.first_token_seconds);
        engine.startup().record("first token", begin, first, 0);
    }
    let start = engine.startup().report();
    if args.json {
        common::print_json(&Report { answer: &answer, startup: &start })?;
    } else if !answer.text.ends_with('\n') {
        common::print("\n")?;
    }
    if tracing::enabled!(tracing::Level::INFO) {
        common::say(format_args!("{}", startup::table(&start, 0.0).trim_end()));
    }
    common::note(format_args!("{}", answer.summary()));
    Ok(())
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    answer: &'a Answer,
    startup: &'a StartupReport,
}

impl Args {
    fn input(&self) -> Result<Input> {
        if let Some(question) = self.question.as_ref().or(self.positional.as_ref()) {
            let text = common::text_or_stdin(question)?;
            let text = if question == "-" { text.trim_end_matches(['\n', '\r']) } else { &text };
            return Ok(Input::Question(text.into()));
        }
        if let Some(prompt) = &self.prompt {
            return common::text_or_stdin(prompt).map(Input::Prompt);
        }
        if let Some(path) = &self.prompt_file {
            return common::read_file(path).map(Input::Prompt);
        }
        if !self.tokens.is_empty() {
            return Ok(Input::Tokens(self.tokens.clone()));
        }
        common::usage_error("generate", &format!("there is nothing to answer; give a question, as in\n\n  {EXAMPLE}"))
    }

    fn prompt(&self, engine: &Engine, input: Input) -> Result<Vec<u32>> {
        match input {
            Input::Tokens(ids) => Ok(ids),
            Input::Prompt(text) => Template::Raw.encode(engine.tokenizer()?, &[Message::new("user", text)], None),
            Input::Question(question) => {
                let template = self.model.template(engine, self.template.as_deref())?;
                let mut messages = vec![Message::new("user", question)];
                messages.extend(self.answer_start.as_ref().map(Message::begun));
                template.encode(engine.tokenizer()?, &messages, self.instruction.as_deref())
            }
        }
    }
}
