//! `aoji data`: rows of data sets for `aoji tune`, and a look at what the model will see of them.

mod preview;

use crate::common;
use aoji::{
    Error, Result, Template, hub,
    output::Output,
    train::{CARD_INSTRUCTION, CARD_SHARE, Prepare, Source, rows},
};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// Arguments of `aoji data`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Rows of instruction, input and output
    Alpaca(Convert),
    /// Conversations: the last answer is learned
    Chat(Convert),
    /// The three data sets of the card of Llama-3-Ko-8B-Instruct-AOG, by its rules
    Card(Card),
    /// Show what the model will see of rows
    Preview(preview::Args),
}

/// What all conversions take.
#[derive(clap::Args)]
struct Common {
    /// The file to write, JSONL of prompt and response
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Template of the prompts: aog, aog-instruction-first, raw, or a .jinja file
    #[arg(long, default_value = "aog")]
    template: String,
    /// A model whose own chat template renders the prompts
    #[arg(short, long, value_name = "NAME", conflicts_with = "template")]
    model: Option<String>,
    /// Seed of the draws that decide which rows get the instruction
    #[arg(long, default_value_t = 42)]
    seed: u64,
}

#[derive(clap::Args)]
#[command(after_help = "\
A row of alpaca has instruction, input and output. If it has an input, the input is the question and the instruction stays an instruction; \
if not, the instruction is the question. A row of chat has text (`### Human:` and `### Assistant:` turns), messages (role, content) or conversations \
(from, value); earlier turns become the history of the prompt. Files are JSONL; a data set in Parquet is converted by its own \
library: `datasets.load_dataset(NAME, split=\"train\").to_json(FILE)`.

Example: aoji data alpaca rows.jsonl -o train.jsonl --instruction \"짧게 답하자.\" --share 0.5")]
struct Convert {
    /// JSONL files
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    common: Common,
    /// An instruction for rows that have none
    #[arg(long, value_name = "TEXT")]
    instruction: Option<String>,
    /// Share of these rows that get it
    #[arg(long, default_value_t = 1.0)]
    share: f64,
}

#[derive(clap::Args)]
#[command(after_help = format!("\
The card's rules: OpenOrca-KO is taken as it is. KoAlpaca and guanaco get, with probability 80%, the instruction
  {CARD_INSTRUCTION}
In guanaco the last answer is learned, and the turns before it are the history. Files are JSONL, as \
`datasets.load_dataset(NAME, split=\"train\").to_json(FILE)` writes them.

Example: aoji data card --koalpaca koalpaca.jsonl --orca orca.jsonl --guanaco guanaco.jsonl -o card.jsonl"))]
struct Card {
    /// beomi/KoAlpaca-v1.1a
    #[arg(long, value_name = "FILE")]
    koalpaca: PathBuf,
    /// kyujinpy/OpenOrca-KO
    #[arg(long, value_name = "FILE")]
    orca: PathBuf,
    /// nlpai-lab/openassistant-guanaco-ko
    #[arg(long, value_name = "FILE")]
    guanaco: PathBuf,
    #[command(flatten)]
    common: Common,
    /// The instruction that is added
    #[arg(long, value_name = "TEXT", default_value = CARD_INSTRUCTION)]
    instruction: String,
    /// Share of the rows that get it
    #[arg(long, default_value_t = CARD_SHARE)]
    share: f64,
}

/// Does what the subcommand says.
pub fn run(args: Args) -> Result<()> {
    match args.command {
        Command::Alpaca(c) => convert(&c, Source::Alpaca),
        Command::Chat(c) => convert(&c, Source::Chat),
        Command::Card(c) => {
            let prepare = prepare(&c.common, Some(&c.instruction), c.share)?;
            let plain = Prepare { instruction: None, ..prepare.clone() };
            let files = [
                (c.koalpaca.as_path(), Source::Alpaca, &prepare),
                (c.orca.as_path(), Source::Alpaca, &plain),
                (c.guanaco.as_path(), Source::Chat, &prepare),
            ];
            write(&c.common.output, &files)
        }
        Command::Preview(args) => preview::run(args),
    }
}

fn convert(c: &Convert, source: Source) -> Result<()> {
    let prepare = prepare(&c.common, c.instruction.as_deref(), c.share)?;
    let files: Vec<_> = c.files.iter().map(|file| (file.as_path(), source, &prepare)).collect();
    write(&c.common.output, &files)
}

fn prepare(common: &Common, instruction: Option<&str>, share: f64) -> Result<Prepare> {
    if !(0.0..=1.0).contains(&share) {
        return Err(Error::Input(format!("--share {share}: expected a number from 0 to 1")));
    }
    let template = match &common.model {
        Some(model) if model != "demo" => Template::for_model(Some(&hub::resolve(model)?))?,
        Some(_) => Template::Aog,
        None => Template::parse(&common.template, None)?,
    };
    Ok(Prepare { template, instruction: instruction.map(str::to_string), share, seed: common.seed })
}

/// Writes the pairs of all files, and says how many rows were left out and why.
fn write(output: &Path, files: &[(&Path, Source, &Prepare)]) -> Result<()> {
    let name = output.file_name().and_then(|n| n.to_str());
    let name = name.ok_or_else(|| Error::Input(format!("--output {} names no file", output.display())))?;
    let dir = output.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut out = Output::beside(dir);
    let mut target = out.create(name)?;
    let (mut number, mut kept, mut left_out) = (0, 0, BTreeMap::<String, (usize, String)>::new());
    for (path, source, prepare) in files {
        rows(path, |line, row| {
            match prepare.row(*source, &row, number)? {
                Ok(pair) => {
                    let text = serde_json::to_string(&pair).map_err(|e| Error::Input(e.to_string()))?;
                    target.write(format!("{text}\n").as_bytes())?;
                    kept += 1;
                }
                Err(why) => {
                    let place = format!("{}:{line}", path.display());
                    left_out.entry(why).or_insert((0, place)).0 += 1;
                }
            }
            number += 1;
            Ok(())
        })?;
    }
    for (why, (n, place)) in &left_out {
        common::say(format_args!("left out {n} rows, {place} first: {why}"));
    }
    if kept == 0 {
        return Err(Error::Input("no row is left: see the rules of `aoji data --help`".into()));
    }
    drop(target);
    out.finish()?;
    common::say(format_args!("{kept} of {number} rows"));
    common::print(&format!("{}\n", output.display()))
}
