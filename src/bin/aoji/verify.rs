//! `aoji verify`: does this engine compute what it should?

use crate::common::{self, ModelArgs};
use aoji::{
    Activations, Error, Result, hub,
    verify::{self, Limits},
};
use serde::Serialize;
use std::path::PathBuf;

/// Arguments of `aoji verify`.
#[derive(clap::Args)]
#[command(after_help = "It ends with 3 when a number is outside its limit.")]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Goldens of Hugging Face transformers in float32 [default: golden.json in the model's directory]
    #[arg(long, value_name = "FILE")]
    golden: Option<PathBuf>,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Answer {
    passed: bool,
    /// What is outside its limit.
    failure: Option<String>,
    #[serde(flatten)]
    report: verify::Report,
}

/// Compares, prints, and fails when something is outside its limit.
pub fn run(args: Args) -> Result<()> {
    let golden = match args.golden {
        Some(path) => path,
        None if args.model.model == "demo" => {
            return Err(Error::Input("the demo model has no goldens: give --golden FILE, or another --model".into()));
        }
        None => hub::resolve(&args.model.model)?.join("golden.json"),
    };
    let engine = args.model.open()?;
    let exact = !engine.is_gpu() && args.model.dtype == Activations::F32;
    let limits = if exact { Limits::F32 } else { Limits::BF16 };
    let bar = common::bar(0, "comparing", "{pos}/{len} texts");
    let report = verify::verify(&engine, &golden, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    let failure = report.verdict(&limits).err();
    if args.json {
        common::print_json(&Answer { passed: failure.is_none(), failure: failure.clone(), report })?;
    } else {
        common::print(&format!("{report}\n"))?;
    }
    failure.map_or(Ok(()), |what| Err(Error::Disagree(what)))
}
