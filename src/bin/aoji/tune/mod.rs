//! `aoji tune`: trains a LoRA adapter as a configuration says.

mod picture;
mod speed;

use crate::common;
use aoji::{
    Device, Error, Result,
    train::{KEYS, Place, TuneConfig, TuneEvent, Tuner},
};
use serde_json::{Map, Value};
use std::{
    fs,
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

/// Arguments of `aoji tune`.
#[derive(clap::Args)]
#[command(after_help = "\
The configuration is YAML with the keys of Axolotl; a key that aoji does not know is an error. `aoji data preview CONFIG` shows what the model \
will see. On a GPU it trains in bf16, and lora_r is a multiple of 8.

In output_dir: adapter_config.json and adapter_model.safetensors (for --lora here, PEFT and vLLM), checkpoint-STEP, train.jsonl, loss.svg. \
Ctrl-C saves a checkpoint; `--set resume_from_checkpoint=true` continues from the last one, with the bits of a run that was never stopped.

Example: aoji tune examples/tune/demo.yml
         aoji tune run.yml --set learning_rate=1e-4 --set output_dir=second")]
pub struct Args {
    /// The configuration
    #[arg(value_name = "CONFIG.yml", required_unless_present = "keys")]
    config: Option<PathBuf>,
    /// Set a key of the configuration to another value; repeatable
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Where it runs: auto (the first GPU, if there is one and bf16 is true, else the CPU), cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: Device,
    /// Threads that compute [default: one a physical core]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Show what the run would do, then end
    #[arg(long)]
    dry_run: bool,
    /// Measure some steps, then end; nothing is written
    #[arg(long)]
    bench: bool,
    /// With --bench: results in JSON
    #[arg(long, requires = "bench")]
    json: bool,
    /// List the keys of a configuration, then end
    #[arg(long)]
    keys: bool,
}

/// Trains, and prints the adapter's directory.
pub fn run(args: Args) -> Result<()> {
    if args.keys {
        let lines = KEYS.iter().map(|(key, what)| format!("{key:28}{what}\n"));
        return common::print(&lines.collect::<String>());
    }
    let path = args.config.unwrap_or_default();
    let tuner = Tuner::open(read(&path, &args.set)?)?;
    let text = describe(&tuner);
    if args.dry_run {
        common::print(&text)?;
        return Place::open(&tuner, args.device, args.threads).map(|_| ());
    }
    if args.bench {
        let place = Place::open(&tuner, args.device, args.threads)?;
        return speed::print(&place, &tuner, args.json);
    }
    tuner.ready()?;
    let place = Place::open(&tuner, args.device, args.threads)?;
    common::say(format_args!("{text}on {}", place.name()));
    common::catch_interrupt()?;
    let (out, total) = (tuner.config().output_dir.clone(), tuner.summary().steps);
    let bar = common::bar(total as u64, "", "{pos}/{len} steps, {eta} left");
    let outcome = place.run(tuner, &mut |event| {
        match event {
            TuneEvent::Step(step, line) => {
                bar.set_position(step as u64);
                if let Some(loss) = line.and_then(|l| l.loss) {
                    bar.set_message(format!("loss {loss:.4}"));
                }
            }
            TuneEvent::Eval(line) => {
                let loss = line.eval_loss.unwrap_or(f64::NAN);
                bar.suspend(|| common::say(format_args!("step {}: loss of the evaluation rows {loss:.4}", line.step)));
            }
            TuneEvent::Saved(dir) => bar.suspend(|| common::note(format_args!("saved {}", dir.display()))),
        }
        !common::interrupted()
    })?;
    bar.finish_and_clear();
    picture::write(&out)?;
    let speed = outcome.tokens_per_second;
    if outcome.finished {
        common::say(format_args!(
            "{total} steps, {speed:.0} tokens a second; try it: --lora {}",
            outcome.dir.display()
        ));
    } else {
        let (path, set) = (path.display(), "--set resume_from_checkpoint=true");
        common::say(format_args!("stopped after step {} of {total}; to go on: aoji tune {path} {set}", outcome.step));
    }
    common::print(&format!("{}\n", outcome.dir.display()))
}

/// Reads a configuration from a YAML file, with other values for some keys.
pub fn read(path: &Path, set: &[String]) -> Result<TuneConfig> {
    let malformed = |what: String| Error::File { path: path.into(), what };
    let parse = |text: &str| serde_saphyr::from_str::<Value>(text).map_err(|e| e.to_string());
    let text = common::read_file(path)?;
    let mut map: Map<String, Value> = match parse(&text).map_err(|e| malformed(format!("is not YAML: {e}")))? {
        Value::Object(map) => map,
        _ => return Err(malformed("is not a mapping of keys to values".into())),
    };
    for pair in set {
        let Some((key, value)) = pair.split_once('=') else {
            return Err(Error::Input(format!("--set {pair}: expected KEY=VALUE")));
        };
        let value = parse(value).map_err(|e| Error::Input(format!("--set {pair}: {e}")))?;
        map.insert(key.into(), value);
    }
    TuneConfig::new(path, map)
}

/// What a run will do, in a few lines.
pub fn describe(tuner: &Tuner) -> String {
    let (s, c) = (tuner.summary(), tuner.config());
    let gib = |b: u64| format!("{:.2} GiB", b as f64 / (1u64 << 30) as f64);
    let mut text = format!(
        "{} rows ({} kept apart, {} dropped): {} tokens, {:.1}% of them learned; the longest row has {}\n",
        s.rows + s.eval_rows,
        s.eval_rows,
        s.dropped,
        s.tokens,
        100.0 * s.labels as f64 / s.tokens.max(1) as f64,
        s.longest,
    );
    text += &format!(
        "{} steps of {} micro-batches, {} micro-batches an epoch, {:.1}% full\n",
        s.steps,
        c.gradient_accumulation_steps,
        s.micro_batches,
        100.0 * s.filled,
    );
    let [weights, adapter, activations] = s.memory.map(gib);
    text += &format!(
        "adapter of {} parameters; memory: weights {weights}, adapter and optimizer {adapter}, activations {activations}\n",
        s.parameters,
    );
    for d in tuner.data.dropped.iter().take(5) {
        text += &format!("dropped {}:{}: {}\n", d.path.display(), d.line, d.reason);
    }
    if s.dropped > 5 {
        text += &format!("and {} more; `aoji data preview` lists all\n", s.dropped - 5);
    }
    text
}

/// The lines of a log.
fn log(dir: &Path) -> Result<Vec<aoji::train::Line>> {
    let path = dir.join("train.jsonl");
    let text = fs::read_to_string(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
    let line = |line| serde_json::from_str(line).map_err(|e| Error::File { path: path.clone(), what: e.to_string() });
    text.lines().map(line).collect()
}
