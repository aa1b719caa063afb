//! `aoji merge-lora`: writes a checkpoint with adapters added to its weights.

use crate::common;
use aoji::{
    ModelFiles, Result,
    lora::{self, LoraSpec},
    output::Output,
};
use std::path::Path;

/// Arguments of `aoji merge-lora`.
#[derive(clap::Args)]
#[command(
    override_usage = "aoji merge-lora [OPTIONS] [BASE] <ADAPTER[:SCALE]> <OUT>",
    after_help = "\
The result is what PEFT's merge_and_unload gives, rounded to the base model's type. `--lora ADAPTER` of the other commands \
adds an adapter without writing anything.

Example: aoji merge-lora beomi/Llama-3-Open-Ko-8B adapter merged, or
         aoji merge-lora -m beomi/Llama-3-Open-Ko-8B adapter merged"
)]
pub struct Args {
    /// The model that the adapter was trained on, unless --model names it; the directory of a PEFT adapter, as
    /// DIR:SCALE to add more or less of it; the directory to write, which must be absent or empty
    #[arg(value_names = ["BASE", "ADAPTER[:SCALE]", "OUT"], num_args = 2..=3, required = true)]
    words: Vec<String>,
    /// The model that the adapter was trained on: a directory, or OWNER/NAME in the local Hugging Face cache
    #[arg(short, long, value_name = "NAME")]
    model: Option<String>,
    /// Another adapter to add; repeatable
    #[arg(long, value_name = "DIR[:SCALE]")]
    lora: Vec<LoraSpec>,
    /// Replace the model that is in OUT, once the new one is complete
    #[arg(long)]
    force: bool,
}

/// Writes the checkpoint and prints its directory.
pub fn run(args: Args) -> Result<()> {
    let (base, adapter, out) = match (args.model, &args.words[..]) {
        (None, [base, adapter, out]) => (base.clone(), adapter, out),
        (Some(base), [adapter, out]) => (base, adapter, out),
        _ => common::usage_error("merge-lora", "expected BASE ADAPTER OUT, or --model BASE ADAPTER OUT"),
    };
    let adapter: LoraSpec = adapter.parse().unwrap_or_else(|e: String| common::usage_error("merge-lora", &e));
    let out = Path::new(out);
    let mut files = ModelFiles::open(&base)?;
    [adapter].iter().chain(&args.lora).try_for_each(|spec| files.add_lora(spec))?;
    let output = if args.force { Output::replace(out)? } else { Output::begin(out)? };
    common::abandon_on_interrupt(&output)?;
    let bar = common::bar(0, "merging", "{pos}/{len} tensors");
    lora::merge_checkpoint(&files, output, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    common::print(&format!("{}\n", out.display()))
}
