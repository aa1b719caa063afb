//! `aoji verify`: checks whether this engine computes what it should, or compares a model with another one.

use crate::{
    common::{self, ModelArgs},
    guesses::Guesses,
};
use aoji::{
    Activations, Error, KvDtype, Result, divergence, hub, invariance,
    verify::{self, Limits},
};
use clap::ArgGroup;
use serde::Serialize;
use std::{num::NonZeroUsize, path::PathBuf};

/// Arguments of `aoji verify`.
#[derive(clap::Args)]
#[command(group = ArgGroup::new("experiment").args(["lockstep", "invariance"]))]
#[command(after_help = "The exit code is 3 when a number is outside its limit, or bits depend on what they must not.")]
pub struct Args {
    /// The model, as with --model
    #[arg(value_name = "MODEL", conflicts_with = "model")]
    only: Option<String>,
    #[command(flatten)]
    model: ModelArgs,
    /// Goldens of Hugging Face transformers, as scripts/make-goldens.py makes them [default: golden.json in the model's
    /// directory]
    #[arg(long, value_name = "FILE")]
    golden: Option<PathBuf>,
    /// Run the model on the GPU and on the CPU side by side instead, and name the first op that computes something else
    #[arg(long, conflicts_with = "golden")]
    lockstep: bool,
    /// Compare with another model instead, on a text: divergence of the predictions, tokens on which both agree, perplexities
    #[arg(long, value_name = "MODEL", requires = "text", conflicts_with_all = ["golden", "lockstep", "invariance"])]
    against: Option<String>,
    /// With --against: the text; - is standard input
    #[arg(long, value_name = "FILE", requires = "against")]
    text: Option<PathBuf>,
    /// With --against: tokens that the models see at once
    #[arg(long, value_name = "N", default_value = "512", requires = "against")]
    window: NonZeroUsize,
    /// With --lockstep: steps of decoding, greedy and then drawn
    #[arg(long, value_name = "N", default_value_t = 8, requires = "lockstep")]
    tokens: usize,
    /// Test what the bits of the logits depend on, one thing at a time: the division of a prompt, the cache, what runs
    /// beside it or ran before
    #[arg(long, conflicts_with = "golden")]
    invariance: bool,
    /// With --invariance: a smaller model also guesses the next tokens
    #[arg(long, value_name = "model=NAME", requires = "invariance")]
    speculate: Option<Guesses>,
    /// With --lockstep or --invariance: tokens of the prompt, which are random [default: 20 or 100]
    #[arg(long, value_name = "N", requires = "experiment")]
    prompt: Option<usize>,
    /// With --lockstep: only the first N layers
    #[arg(long, value_name = "N", requires = "lockstep")]
    layers: Option<std::num::NonZeroUsize>,
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
pub fn run(mut args: Args) -> Result<()> {
    if let Some(name) = args.only.take() {
        args.model.model = name;
    }
    if args.lockstep {
        return lockstep(&args);
    }
    if args.invariance {
        return invariance(&args);
    }
    if args.against.is_some() {
        return against(args);
    }
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

/// Compares the model with another one on a text, and prints.
fn against(mut args: Args) -> Result<()> {
    let (Some(base), Some(text)) = (args.against.take(), args.text.take()) else { return Ok(()) }; // clap asks for both
    let text = common::read_file(&text)?;
    let model = args.model.open()?;
    args.model.lora.clear();
    args.model.quantize = None;
    args.model.kv = KvDtype::Auto;
    let name = std::mem::replace(&mut args.model.model, base);
    let base = args.model.open()?;
    let tokens = model.tokenizer()?.encode(&text, true)?;
    if base.tokenizer()?.encode(&text, true)? != tokens {
        return Err(Error::Input("the two models tokenize the text differently: they cannot be compared".into()));
    }
    common::catch_interrupt()?;
    let window = args.window.get().min(model.max_context()).min(base.max_context());
    let bar = common::bar(0, "comparing", "{pos}/{len} tokens, {eta} left");
    let report = divergence::divergence(&model, &base, &tokens, window, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
        !common::interrupted()
    })?;
    bar.finish_and_clear();
    let Some(report) = report else { return Ok(()) };
    if !args.json {
        return common::print(&format!("{name} against {}\n{report}\n", args.model.model));
    }
    let mut json = serde_json::json!({"model": name, "base": args.model.model, "device": model.device()});
    let found = serde_json::to_value(&report).map_err(|e| Error::Input(e.to_string()))?;
    if let (Some(json), Some(found)) = (json.as_object_mut(), found.as_object()) {
        json.extend(found.clone());
    }
    common::print_json(&json)
}

/// Runs the experiments, prints, and fails when something that must hold does not.
fn invariance(args: &Args) -> Result<()> {
    let engine = args.model.open_with(args.speculate.as_ref().unwrap_or(&Guesses::Off))?;
    let report = invariance::invariance(&engine, args.prompt.unwrap_or(100))?;
    let failure = report.verdict().err();
    if args.json {
        common::print_json(&serde_json::json!({
            "passed": failure.is_none(), "failure": failure, "model": args.model.model, "device": report.device,
            "prompt": report.prompt, "findings": report.findings,
        }))?;
    } else {
        common::print(&format!("{report}\n"))?;
    }
    failure.map_or(Ok(()), |what| Err(Error::Disagree(what)))
}

#[cfg(not(feature = "cuda"))]
fn lockstep(_: &Args) -> Result<()> {
    Err(Error::NoGpu("this binary was built without the feature `cuda`".into()))
}

/// Runs both side by side, prints, and fails at the first difference.
#[cfg(feature = "cuda")]
fn lockstep(args: &Args) -> Result<()> {
    let mut files = args.model.files()?;
    let layers = args.layers.map_or(files.config.n_layers, |n| n.get().min(files.config.n_layers));
    files.config.n_layers = layers;
    files.weights.layers.truncate(layers);
    let gpu = match args.model.device {
        aoji::Device::Cuda(n) => n,
        aoji::Device::Auto => 0,
        aoji::Device::Cpu => {
            return Err(Error::Input("lockstep needs a GPU beside the CPU: leave out --device cpu".into()));
        }
    };
    let prompt = args.prompt.unwrap_or(20);
    let said = verify::lockstep(files, gpu, args.model.kv, prompt, args.tokens);
    let failure = match &said {
        Ok(_) => None,
        Err(Error::Disagree(what)) => Some(what),
        Err(_) => return said.map(drop),
    };
    if args.json {
        let steps = args.tokens;
        common::print_json(&serde_json::json!({
            "passed": failure.is_none(), "failure": failure, "device": said.as_ref().ok(), "model": args.model.model,
            "layers": layers, "prompt_tokens": prompt, "steps": steps,
        }))?;
    } else if let Ok(device) = &said {
        common::print(&format!(
            "{} on {device} beside the CPU, {layers} layers: a prompt of {prompt} tokens and twice {} steps agree, op by op\n",
            args.model.model, args.tokens
        ))?;
    }
    said.map(drop)
}
