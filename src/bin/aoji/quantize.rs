//! `aoji quantize`: writes a checkpoint with weights of fewer bits.

use crate::common;
use aoji::{
    Device, Error, ModelFiles, Result, calibration,
    lora::LoraSpec,
    output::Output,
    quantize::{self, Inputs, Options, Target},
};
use std::{num::NonZeroUsize, path::PathBuf};

const AFTER_HELP: &str = "\
q8_0, q4_0, q4_k and q6_k make a GGUF file, which llama.cpp reads too; int8, int4 and fp8 make a directory of compressed-tensors, which \
vLLM and transformers read too. Scales are fitted to the weights by least squares; with --calibration the model first reads a text, and \
the error of a weight counts as much as the square of what it is multiplied with there. In GGUF files of 4 bits the matrix that makes the \
logits is Q6_K, and a matrix whose rows are not whole blocks of 256 weights becomes Q5_0 instead of Q4_K, or Q8_0 instead of Q6_K. A \
compressed-tensors directory keeps the embedding and the head as they are. docs/formats.md shows what each costs in quality.

Example: aoji quantize werty1248/Llama-3-Ko-8B-Instruct-AOG model-q4_k.gguf --format q4_k";

/// Arguments of `aoji quantize`.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// A model directory in Hugging Face layout, or OWNER/NAME in the local Hugging Face cache
    #[arg(value_name = "MODEL")]
    model: String,
    /// The file (NAME.gguf) or the directory to write
    #[arg(value_name = "OUT")]
    out: PathBuf,
    /// q8_0, q4_0, q4_k, q6_k, int8, int4 or fp8
    #[arg(long, value_name = "FORMAT")]
    format: Target,
    /// Columns that share a scale, for int4 and int8 [default: 128 for int4, the whole row for int8]
    #[arg(long, value_name = "N")]
    group: Option<NonZeroUsize>,
    /// Leave a matrix as it is: lm_head, down_proj (in every layer), model.layers.0.mlp.down_proj; repeatable
    #[arg(long, value_name = "NAME")]
    ignore: Vec<String>,
    /// Run the model on this text first, and weigh the errors of its weights by what they are multiplied with; - is standard input
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// With --calibration: the file has one JSON object a line, each with a separate text under "text"
    #[arg(long, requires = "calibration")]
    jsonl: bool,
    /// With --calibration: where the model runs: auto (a GPU where there is one), cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", requires = "calibration")]
    device: Device,
    /// With --calibration: threads that compute on the CPU [default: one a physical core]
    #[arg(long, value_name = "N", requires = "calibration")]
    threads: Option<NonZeroUsize>,
    /// Add a LoRA adapter before quantizing; repeatable
    #[arg(long, value_name = "DIR[:SCALE]")]
    lora: Vec<LoraSpec>,
    /// Replace OUT, once the new one is complete
    #[arg(long)]
    force: bool,
    /// Print one JSON object instead of the path
    #[arg(long)]
    json: bool,
}

/// Writes the checkpoint and prints where it is.
pub fn run(args: Args) -> Result<()> {
    let grouped = matches!(args.format, Target::Int(_));
    if args.group.is_some() && !grouped {
        common::usage_error("quantize", "--group is for int4 and int8: the other formats have groups of their own");
    }
    let ends = args.out.extension().is_some_and(|end| end == "gguf");
    if args.format.is_file() != ends {
        let what = if ends { "a directory: without .gguf at its end" } else { "a file: NAME.gguf" };
        return Err(Error::Input(format!("OUT is {}; --format writes {what}", args.out.display())));
    }
    let mut files = ModelFiles::open(&args.model)?;
    args.lora.iter().try_for_each(|spec| files.add_lora(spec))?;
    let output = match (args.format.is_file(), args.force) {
        (true, force) => Output::file(&args.out, force)?,
        (false, true) => Output::replace(&args.out)?,
        (false, false) => Output::begin(&args.out)?,
    };
    common::abandon_on_interrupt(&output)?;
    let group = args.group.map(NonZeroUsize::get);
    let mut options = Options { target: args.format, group, ignore: args.ignore, inputs: Inputs::default() };
    if let Some(path) = &args.calibration {
        quantize::check(&files, &options)?; // before minutes of work
        let texts = common::read_texts(path, args.jsonl)?;
        let bar = common::bar(0, "calibrating", "{pos}/{len} tokens, {eta} left");
        options.inputs = calibration::calibrate(&files, &texts, args.device, args.threads, &mut |done, total| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
        })?;
        bar.finish_and_clear();
    }
    let bar = common::bar(0, "quantizing", "{percent}% {eta} left");
    let report = quantize::quantize(&files, &options, output, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    common::note(format_args!("{report}"));
    if args.json {
        return common::print_json(&serde_json::json!({
            "out": args.out, "matrices": report.matrices, "bytes": report.bytes,
        }));
    }
    common::print(&format!("{}\n", args.out.display()))
}
