//! `aoji merge-lora`: a checkpoint with adapters added to its weights.

use crate::common;
use aoji::{
    ModelFiles, Result,
    lora::{self, LoraSpec},
};
use std::path::PathBuf;

/// Arguments of `aoji merge-lora`.
#[derive(clap::Args)]
#[command(after_help = "\
The result is what PEFT's merge_and_unload gives, rounded to the base model's type. `--lora ADAPTER` of the other commands \
adds an adapter without writing anything.

Example: aoji merge-lora beomi/Llama-3-Open-Ko-8B adapter merged")]
pub struct Args {
    /// The model that the adapter was trained on: a directory, or OWNER/NAME in the local Hugging Face cache
    base: String,
    /// Directory of a PEFT adapter; DIR:SCALE for more or less of it
    #[arg(value_name = "ADAPTER[:SCALE]")]
    adapter: LoraSpec,
    /// The directory to write; it must be absent or empty
    out: PathBuf,
    /// Another adapter to add; repeatable
    #[arg(long, value_name = "DIR[:SCALE]")]
    lora: Vec<LoraSpec>,
}

/// Writes the checkpoint and prints its directory.
pub fn run(args: Args) -> Result<()> {
    let mut files = ModelFiles::open(&args.base)?;
    [args.adapter].iter().chain(&args.lora).try_for_each(|spec| files.add_lora(spec))?;
    let bar = common::bar(0, "merging", "{pos}/{len} tensors");
    lora::merge_checkpoint(&files, &args.out, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    common::print(&format!("{}\n", args.out.display()))
}
