//! What the commands share: arguments for the model and for sampling, input, output, interruption.

use crate::{Cli, guesses::Guesses};
use aoji::{
    Activations, Device, Engine, Error, GenerateOptions, KvDtype, ModelFiles, Options, Result, Sampling,
    SamplingDefaults, Template, Tokenizer, hub, lora::LoraSpec, output::Output, quantize,
};
use clap::{CommandFactory, ValueEnum, builder::RangedU64ValueParser, error::ErrorKind};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use std::{
    fmt::Arguments,
    fs,
    io::{self, IsTerminal, Read, Write},
    num::NonZeroUsize,
    ops::RangeInclusive,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

/// The path in errors of writing to standard output.
pub const STDOUT: &str = "standard output";
/// The path in errors of reading standard input.
pub const STDIN: &str = "standard input";
/// The mark with which some editors begin a text.
pub const BYTE_ORDER_MARK: char = '\u{feff}';

/// Parses a number of a range.
pub fn within(range: RangeInclusive<usize>) -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(*range.start() as u64..=*range.end() as u64)
}

/// The model of a command that was given none: what AOJI_MODEL names, else the demo. This is a default, since clap's
/// `env` would count as a flag that is given, and conflict with a model that is named without the flag.
pub fn default_model() -> String {
    std::env::var("AOJI_MODEL").ok().filter(|name| !name.is_empty()).unwrap_or_else(|| "demo".into())
}

/// The model of a command that needs nothing else: `aoji info demo` or `aoji info -m demo`.
#[derive(clap::Args)]
pub struct OneModel {
    /// A directory in Hugging Face layout, a GGUF file, OWNER/NAME in the local Hugging Face cache, or demo
    #[arg(value_name = "MODEL", conflicts_with = "named")]
    model: Option<String>,
    /// The same, as for other commands
    #[arg(short = 'm', long = "model", id = "named", value_name = "NAME", default_value_t = default_model())]
    named: String,
}

impl OneModel {
    /// Its name.
    pub fn name(&self) -> &str {
        self.model.as_ref().unwrap_or(&self.named)
    }
}

/// Which model, and where it runs.
#[derive(clap::Args)]
pub struct ModelArgs {
    /// A directory in Hugging Face layout, a GGUF file, OWNER/NAME in the local Hugging Face cache, or demo; the
    /// environment variable AOJI_MODEL sets another default
    #[arg(short, long, value_name = "NAME", default_value_t = default_model())]
    pub model: String,
    /// Where it runs: auto (a GPU where there is one), cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    pub device: Device,
    /// Activations on the CPU: bf16 as on a GPU, or f32
    #[arg(long, value_name = "TYPE", default_value = "bf16")]
    pub dtype: Activations,
    /// How keys and values are stored: auto (as activations are) or fp8, which takes half the memory and loses some precision
    #[arg(long, value_name = "TYPE", default_value_t)]
    pub kv: KvDtype,
    /// Threads that compute on the CPU [default: one a physical core]
    #[arg(long, value_name = "N")]
    pub threads: Option<NonZeroUsize>,
    /// A LoRA adapter as PEFT stores it, added to the weights; DIR:SCALE adds more or less of it; repeatable
    #[arg(long, value_name = "DIR[:SCALE]")]
    pub lora: Vec<LoraSpec>,
    /// Convert quantized weights to bf16 when they are loaded; otherwise they stay quantized where that is supported
    #[arg(long)]
    pub widen: bool,
    /// Quantize the weights while they are loaded, adapters added: q8_0, q6_k, q4_k, q4_0, fp8, int8 or int4; int4:64 for groups of
    /// 64 columns in place of 128
    #[arg(long, value_name = "FORMAT[:GROUP]", conflicts_with = "widen")]
    pub quantize: Option<quantize::Options>,
    /// Most tokens of prompt and answer together [default: the model's maximum, or as much of it as fits the memory]
    #[arg(long, value_name = "TOKENS")]
    pub context: Option<usize>,
}

impl ModelArgs {
    /// The model's files, with the adapters.
    pub fn files(&self) -> Result<ModelFiles> {
        let mut files = ModelFiles::open(&self.model)?;
        self.lora.iter().try_for_each(|spec| files.add_lora(spec))?;
        Ok(files)
    }

    /// Opens the model, with a progress bar on a terminal, and reports what it is.
    pub fn open(&self) -> Result<Engine> {
        self.open_with(&Guesses::Off)
    }

    /// The same, also with the model that guesses, if there is one.
    pub fn open_with(&self, guesses: &Guesses) -> Result<Engine> {
        let engine = self.load(1, None, guesses)?;
        note(format_args!("{}", self.describe(&engine)));
        Ok(engine)
    }

    /// Opens the model with room for so many sequences and tokens of their cache, and the model that guesses; a progress bar.
    pub fn load(&self, sequences: usize, cache_tokens: Option<usize>, guesses: &Guesses) -> Result<Engine> {
        let options = Options {
            device: self.device,
            activations: self.dtype,
            context: self.context,
            sequences,
            cache_tokens,
            kv: self.kv,
            threads: self.threads,
            widen: self.widen,
            draft: None,
            quantize: self.quantize.clone(),
        };
        let options = match guesses {
            Guesses::Model(name) => options.with_draft(name, &self.model)?,
            _ => options,
        };
        let bar = bar(0, "loading", "{bytes}/{total_bytes} {bytes_per_sec}");
        let progress = &mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        };
        let engine = match self.lora[..] {
            [] => Engine::open_with(&self.model, &options, progress)?,
            _ => Engine::load(self.files()?, &options, progress)?,
        };
        bar.finish_and_clear();
        Ok(engine)
    }

    /// The model and where it runs, in one line.
    pub fn describe(&self, engine: &Engine) -> String {
        let config = engine.config();
        let token = |id: u32| describe_token(engine.tokenizer().ok(), id);
        let bos = engine.tokenizer().ok().and_then(Tokenizer::bos).map_or("none".into(), token);
        let eos: Vec<String> = config.eos.iter().copied().map(token).collect();
        format!(
            "{} on {}, context {}, rope_theta {}, BOS {bos}, eos {}",
            self.model,
            engine.device(),
            engine.max_context(),
            config.rope_theta,
            if eos.is_empty() { "none".into() } else { eos.join(" ") },
        )
    }

    /// The template of this name; without a name, the model's own.
    pub fn template(&self, engine: &Engine, name: Option<&str>) -> Result<Template> {
        let Some(name) = name else { return Ok(engine.template().clone()) };
        let dir = if self.model == "demo" { None } else { Some(hub::resolve(&self.model)?) };
        Template::parse(name, dir.as_deref())
    }
}

/// Whether sampling as the model's author recommends it is the default.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GenerationConfig {
    /// What generation_config.json says, unless a flag or a request says otherwise
    Auto,
    /// The defaults of this program
    None,
}

impl GenerationConfig {
    /// The sampling that is used unless something else is said.
    pub fn sampling(self, engine: &Engine) -> SamplingDefaults {
        match self {
            GenerationConfig::Auto => engine.config().sampling.clone(),
            GenerationConfig::None => SamplingDefaults::default(),
        }
    }

    /// Reports the recommended sampling, if it is used and there is any.
    pub fn announce(self, engine: &Engine, say: impl FnOnce(Arguments)) {
        let found = &engine.config().sampling;
        if self == GenerationConfig::Auto && *found != SamplingDefaults::default() {
            say(format_args!("sampling of generation_config.json: {found}"));
        }
    }
}

/// How tokens are chosen and when an answer ends. No flag has a default in clap, so that `/set` of `aoji chat` can
/// change one flag and leave the others.
#[derive(clap::Args, Clone)]
pub struct SamplingArgs {
    /// Most tokens of the answer [default: until the text ends or the context is full]
    #[arg(long, value_name = "N")]
    max_tokens: Option<NonZeroUsize>,
    /// Divides the logits; 0 always takes the most likely token (greedy) [default: 0]
    #[arg(long, value_name = "X")]
    temperature: Option<f32>,
    /// Choose among the K most likely tokens; 0 is off [default: 0]
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,
    /// Choose among the most likely tokens that together have probability P; 1 is off [default: 1]
    #[arg(long, value_name = "P")]
    top_p: Option<f32>,
    /// Choose among tokens with at least P times the most likely one's probability; 0 is off [default: 0]
    #[arg(long, value_name = "P")]
    min_p: Option<f32>,
    /// Divides the logits of tokens in prompt and answer; 1 is off [default: 1]
    #[arg(long, value_name = "X")]
    repeat_penalty: Option<f32>,
    /// Taken from a token's logit each time it is in the answer; 0 is off [default: 0]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    frequency_penalty: Option<f32>,
    /// Taken from the logits of tokens in the answer; 0 is off [default: 0]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    presence_penalty: Option<f32>,
    /// Add BIAS to the logit of the token ID; -inf forbids it; repeatable
    #[arg(long, value_name = "ID=BIAS", value_parser = parse_bias)]
    logit_bias: Vec<(u32, f32)>,
    /// The same seed and prompt give the same text [default: 0]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// The text does not end before N tokens [default: 0]
    #[arg(long, value_name = "N")]
    min_tokens: Option<u32>,
    /// End the text before TEXT; repeatable
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Continue after the model's end-of-text tokens
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    ignore_eos: Option<bool>,
    /// Guess the next tokens: ngram takes what came next where prompt or answer had the same text before; model=NAME asks a
    /// smaller model with the same vocabulary. The answer is the same and comes faster where guesses are right [default: off]
    #[arg(long, value_name = "ngram|model=NAME|off")]
    speculate: Option<Guesses>,
}

impl SamplingArgs {
    /// Changes the seed, for another text from the same prompt.
    pub fn next_seed(&mut self) {
        self.seed = Some(self.seed.unwrap_or(0).wrapping_add(1));
    }

    /// Where guesses come from.
    pub fn guesses(&self) -> Guesses {
        self.speculate.clone().unwrap_or_default()
    }

    /// The library's options; `by` is the default for flags that were not given.
    pub fn options(&self, by: &SamplingDefaults) -> GenerateOptions {
        let default = Sampling::recommended(by);
        GenerateOptions {
            sampling: Sampling {
                temperature: self.temperature.unwrap_or(default.temperature),
                top_k: self.top_k.unwrap_or(default.top_k),
                top_p: self.top_p.unwrap_or(default.top_p),
                min_p: self.min_p.unwrap_or(default.min_p),
                repetition_penalty: self.repeat_penalty.unwrap_or(default.repetition_penalty),
                frequency_penalty: self.frequency_penalty.unwrap_or(default.frequency_penalty),
                presence_penalty: self.presence_penalty.unwrap_or(default.presence_penalty),
                logit_bias: self.logit_bias.clone(),
                seed: self.seed.unwrap_or(default.seed),
                min_tokens: self.min_tokens.unwrap_or(default.min_tokens),
            },
            max_tokens: self.max_tokens.map(NonZeroUsize::get).or(by.max_new_tokens),
            stop: self.stop.clone(),
            include_stop: false,
            keep_special: false,
            stop_ids: Vec::new(),
            ignore_eos: self.ignore_eos.unwrap_or(false),
            speculate: self.guesses().speculate(),
            prediction: Vec::new(),
            earlier: Vec::new(),
        }
    }
}

fn parse_bias(text: &str) -> Result<(u32, f32), String> {
    let pair = text.split_once('=').and_then(|(id, bias)| Some((id.parse().ok()?, bias.parse().ok()?)));
    pair.ok_or_else(|| "expected ID=BIAS, as in 42=-1.5 or 42=-inf".into())
}

/// The text of an argument: `-` is standard input.
pub fn text_or_stdin(text: &str) -> Result<String> {
    if text == "-" { read_file(Path::new("-")) } else { Ok(text.into()) }
}

/// The text of a file, to the last byte; `-` is standard input.
pub fn read_file(path: &Path) -> Result<String> {
    let stdin = path.as_os_str() == "-";
    let path = if stdin { Path::new(STDIN) } else { path };
    let mut bytes = Vec::new();
    let read = match stdin {
        true => io::stdin().read_to_end(&mut bytes).map(drop),
        false => fs::read(path).map(|b| bytes = b),
    };
    read.map_err(|source| Error::Io { path: path.into(), source })?;
    String::from_utf8(bytes).map_err(|e| {
        let what = format!("byte {} is not UTF-8 text", e.utf8_error().valid_up_to());
        Error::File { path: path.into(), what }
    })
}

/// The text of a file; with `jsonl` the texts of its lines, each a JSON object with one under "text".
pub fn read_texts(path: &Path, jsonl: bool) -> Result<Vec<String>> {
    #[derive(Deserialize)]
    struct Line {
        text: String,
    }
    let text = read_file(path)?;
    if !jsonl {
        return Ok(vec![text]);
    }
    let line = |(i, line): (usize, &str)| match serde_json::from_str::<Line>(line) {
        Ok(line) => Ok(line.text),
        Err(e) => Err(Error::Input(format!(
            "{}: line {}: {e}, expected an object like {{\"text\": \"...\"}}",
            path.display(),
            i + 1
        ))),
    };
    let text = text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&text);
    text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(line).collect()
}

/// The text of a file of lines, without the byte order mark with which some editors begin a file.
#[cfg(feature = "server")]
pub fn read_lines(path: &Path) -> Result<String> {
    let mut text = read_file(path)?;
    if text.starts_with(BYTE_ORDER_MARK) {
        text.drain(..BYTE_ORDER_MARK.len_utf8());
    }
    Ok(text)
}

/// Whether the log on standard error has colors: on a terminal, unless `NO_COLOR` (no-color.org) is set to anything.
pub fn color() -> bool {
    io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// Writes to standard output at once.
pub fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    written.map_err(|source| Error::Io { path: STDOUT.into(), source })
}

/// Writes one JSON value as one line to standard output.
pub fn print_json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string(value).map_err(|e| Error::Input(format!("cannot be written as JSON: {e}")))?;
    print(&format!("{text}\n"))
}

/// Writes a line to standard error. If it cannot be written (a full disk, a closed pipe) it is lost, and nothing else: `eprintln!`
/// would panic.
pub fn say(text: Arguments) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Reports something about the work on standard error, if somebody reads it: on a terminal, or with -v.
pub fn note(text: Arguments) {
    if io::stderr().is_terminal() || tracing::enabled!(tracing::Level::INFO) {
        say(text);
    }
}

/// Writes an error and what can be done about it to standard error.
pub fn print_error(error: &Error) {
    say(format_args!("error: {error}"));
    if let Some(hint) = error.hint() {
        say(format_args!("hint: {hint}"));
    }
}

/// Ends the program as clap does when an argument is wrong; for faults that clap cannot see.
pub fn usage_error(command: &str, message: &str) -> ! {
    let mut cli = Cli::command();
    cli.build(); // so that the usage names the command in full
    let command = cli.find_subcommand_mut(command).expect("a command of ours");
    command.error(ErrorKind::MissingRequiredArgument, message).exit()
}

/// A progress bar on standard error, hidden when that is no terminal; `numbers` is a template of indicatif's.
pub fn bar(total: u64, message: &'static str, numbers: &str) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = format!("{{msg}} {{wide_bar}} {numbers}");
    let style = ProgressStyle::with_template(&style).expect("a valid template");
    ProgressBar::new(total).with_style(style).with_message(message)
}

/// `2047 "<|end_of_text|>"`
pub fn describe_token(tokenizer: Option<&Tokenizer>, id: u32) -> String {
    match tokenizer.and_then(|t| t.token(id)) {
        Some(token) => format!("{id} {token:?}"),
        None => id.to_string(),
    }
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on Ctrl-C only sets [`interrupted`]; a second one ends the program.
pub fn catch_interrupt() -> Result<()> {
    let handler = || {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    };
    ctrlc::set_handler(handler).map_err(|e| Error::Input(format!("cannot watch for Ctrl-C: {e}")))
}

/// From now on Ctrl-C removes the unfinished files of `output` before it ends the program.
pub fn abandon_on_interrupt(output: &Output) -> Result<()> {
    let abandon = output.abandon();
    let handler = move || {
        abandon();
        std::process::exit(130);
    };
    ctrlc::set_handler(handler).map_err(|e| Error::Input(format!("cannot watch for Ctrl-C: {e}")))
}

/// Whether Ctrl-C was pressed.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Forgets that Ctrl-C was pressed.
pub fn clear_interrupt() {
    INTERRUPTED.store(false, Ordering::Relaxed);
}
