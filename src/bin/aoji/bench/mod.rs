//! `aoji bench`: how fast a model runs here, how fast each kernel, and which kernels a GPU has confirmed.

mod compare;
#[cfg(feature = "cuda")]
mod cpu;
#[cfg(feature = "cuda")]
mod kernels;
#[cfg(feature = "cuda")]
mod ledger;
mod model;
#[cfg(feature = "cuda")]
mod readme;
#[cfg(feature = "cuda")]
mod roofline;
#[cfg(feature = "server")]
mod server;
mod speculate;
pub mod startup;
mod table;
#[cfg(feature = "cuda")]
mod timeline;

use crate::{
    common::{self, ModelArgs},
    guesses::Guesses,
};
use aoji::{Error, Result, backend::DECODE_ROWS, bench};
use serde::Serialize;
use std::{ops::Deref, path::PathBuf, str::FromStr};

const AFTER_HELP: &str = "\
Times are those of this machine as it is now. The same run measures what its memory can do (reading 4 GB and nothing \
else; a copy, counting reads and writes) and what its matrix units can do. \"floor\" is the least possible time: all \
bytes that the ops must move at the rate of reading, all operations at the rate of the matrix product. \"host us\" is \
the time that the calling thread works for a step, apart from waiting; it overlaps with the GPU's work on earlier steps.

--compare gives each change with an interval that holds it in 95 of 100 such pairs of runs, from the ranks of the \
medians of repeated runs (Hodges and Lehmann). It knows only the noise inside the two runs: another process, another \
temperature or another hour can change more.

--startup runs `aoji generate` with a prompt of 16 tokens and shows what happens up to the first token; phases \
overlap, and memory and copies are parts of weights. \"from disk\" is 0 when the page cache held the model's files; \
on the CPU weights stay in the mapped file and are read when they are first used. --json has the seconds of every run, \
and `startup` as in `aoji generate --json`, whose times begin when the model is opened.

--server sends streamed completions to a server in this process, all at the same time, and gives the same jobs to the \
batch without HTTP. \"HTTP us/token\" is the difference of the whole times, divided by the tokens streamed meanwhile; \
server, client and, without a GPU, the model share this machine's cores. \"outside engine\" is the part of a request \
that the engine does not report as its own, in us, divided by the request's tokens.";

/// Arguments of `aoji bench`.
#[derive(clap::Args)]
#[command(
    after_help = AFTER_HELP
)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "what is said of kernels needs them"))]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Lengths of prompts to time, or none; those that fit the context
    #[arg(long, value_name = "TOKENS,...", default_value = "128,512,2048,8192")]
    prefill: Lengths,
    /// Depths at which to time decoding, or none; one that does not fit the context is moved to where it does
    #[arg(long, value_name = "TOKENS,...", default_value = "0,512,2048,8192")]
    depth: Lengths,
    /// Only there to say what it is called here
    #[arg(long, hide = true, num_args = 0..=1)]
    decode: Option<Option<String>>,
    /// Also time steps of N sequences together, 1 to 16, at those depths that fit the context
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = common::within(1..=DECODE_ROWS))]
    sequences: Vec<usize>,
    /// Runs of each prompt, of each depth or of the start; of each kernel, 20 times as many
    #[arg(long, value_name = "N", default_value_t = 5)]
    repeat: usize,
    /// Steps of decoding in each run
    #[arg(long, value_name = "N", default_value_t = 128)]
    tokens: usize,
    /// Time kernels instead of a model: all, or those of one op
    #[arg(long, value_name = "OP", num_args = 0..=1, default_missing_value = "")]
    kernels: Option<String>,
    /// With --kernels: only cases that are small enough for the emulated device
    #[arg(long, requires = "kernels")]
    small: bool,
    /// With --kernels: compare large cases with the reference too
    #[arg(long, requires = "kernels")]
    check: bool,
    /// With --kernels: run each case once, without warm-up, for tools that slow down every launch
    #[arg(long, requires = "kernels")]
    once: bool,
    /// With --kernels: compare the variants of kernels/lab with the shipped kernels, in turn; or only the one of this name
    #[arg(long, value_name = "NAME", num_args = 0..=1, default_missing_value = "", requires = "kernels")]
    lab: Option<String>,
    /// With --kernels: also draw the cases under the roofs of this machine (roofline)
    #[arg(long, value_name = "FILE", requires = "kernels")]
    svg: Option<PathBuf>,
    /// Trace one step of decoding at the first --depth: writes OUT.json, for https://ui.perfetto.dev, and OUT.svg
    #[arg(long, value_name = "OUT", conflicts_with = "kernels")]
    timeline: Option<PathBuf>,
    /// Measure the start instead: a process for each run, from its start to its first token
    #[arg(long, conflicts_with_all = ["kernels", "timeline"])]
    startup: bool,
    /// Measure the server instead: streams through HTTP and the same jobs without it; prompts have the first --depth tokens
    #[cfg(feature = "server")]
    #[arg(long, conflicts_with_all = ["kernels", "timeline", "startup"])]
    server: bool,
    /// With --server: requests at the same time
    #[cfg(feature = "server")]
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,8",
        value_parser = common::within(1..=1000))]
    streams: Vec<usize>,
    /// Measure decoding with guesses of the next tokens beside plain decoding instead, for each kind of text; --tokens
    /// limits an answer
    #[arg(long, value_name = "ngram|model=NAME", num_args = 0..=1, default_missing_value = "ngram",
        conflicts_with_all = ["kernels", "timeline", "startup"])]
    speculate: Option<Guesses>,
    /// With --speculate: a file of lines {"kind", "question", "prediction"}, of which the prediction may be absent
    /// [default: a set of aoji's own]
    #[arg(long, value_name = "FILE", requires = "speculate")]
    prompts: Option<PathBuf>,
    /// Show which kernels a GPU has confirmed, from the results of earlier runs, as a table in Markdown
    #[arg(long, conflicts_with_all = ["kernels", "startup"])]
    ledger: bool,
    /// Rewrite the tables of a README, and the plot beside the results, from the results of earlier runs
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernels", "ledger", "startup", "timeline"])]
    readme: Option<PathBuf>,
    /// Compare two outputs of `aoji bench --json`, of models or of kernels
    #[arg(long, value_names = ["A", "B"], num_args = 2,
        conflicts_with_all = ["kernels", "ledger", "startup", "timeline", "readme"])]
    compare: Option<Vec<PathBuf>>,
    /// With --ledger and --readme: where the results are
    #[arg(long, value_name = "DIR", default_value = "benches/results")]
    results: PathBuf,
    /// One JSON object instead of a table
    #[arg(long)]
    json: bool,
}

/// Numbers of tokens, as in `128,512`; `none` is none of them.
#[derive(Debug, Clone)]
struct Lengths(Vec<usize>);

impl FromStr for Lengths {
    type Err = String;
    fn from_str(s: &str) -> Result<Lengths, String> {
        if s == "none" {
            return Ok(Lengths(Vec::new()));
        }
        let one = |n: &str| n.trim().parse().map_err(|_| format!("{n:?}: expected numbers as in 128,512, or none"));
        s.split(',').map(one).collect::<Result<_, _>>().map(Lengths)
    }
}

impl Deref for Lengths {
    type Target = [usize];
    fn deref(&self) -> &[usize] {
        &self.0
    }
}

/// Where and when numbers were measured.
#[derive(Serialize)]
struct Header {
    aoji: &'static str,
    commit: Option<String>,
    date: String,
    device: String,
    /// Compute capability of the GPU.
    capability: Option<String>,
    sm_count: Option<u32>,
    memory_bytes: Option<u64>,
    /// CUDA version that the driver supports.
    driver: Option<String>,
    /// What nvidia-smi says of the GPU.
    board: Option<bench::Board>,
    /// Whether the kernels ran on the CPU, so that times mean nothing.
    emulated: bool,
}

impl Header {
    fn new(device: &str) -> Header {
        Header {
            aoji: env!("CARGO_PKG_VERSION"),
            commit: bench::commit(),
            date: bench::now(),
            device: device.into(),
            capability: None,
            sm_count: None,
            memory_bytes: None,
            driver: None,
            board: None,
            emulated: false,
        }
    }

    #[cfg(feature = "cuda")]
    fn of_gpu(gpu: &aoji::cuda::Info) -> Header {
        Header {
            capability: Some(format!("{}.{}", gpu.capability.0, gpu.capability.1)),
            sm_count: Some(gpu.sm_count),
            memory_bytes: Some(gpu.memory),
            driver: Some(format!("{}.{}", gpu.driver / 1000, gpu.driver % 1000 / 10)),
            board: if gpu.is_emulated() { None } else { bench::Board::of(&gpu.pci) },
            emulated: gpu.is_emulated(),
            ..Header::new(&gpu.name)
        }
    }

    /// The text above a table.
    fn text(&self) -> String {
        let commit = self.commit.as_ref().map_or(String::new(), |c| format!(" ({c})"));
        let board = self.board.as_ref().and_then(|b| b.driver_version.as_ref());
        let version = board.map_or(String::new(), |v| format!(" ({v})"));
        let driver = self.driver.as_ref().map_or(String::new(), |d| format!(", driver CUDA {d}{version}"));
        let emulated = if self.emulated { "\nTHE EMULATED DEVICE: these times mean nothing.\n" } else { "" };
        format!("aoji {}{commit}, {}{driver}, {}\n{emulated}", self.aoji, self.device, self.date)
    }
}

/// Measures, and prints.
pub fn run(args: Args) -> Result<()> {
    if args.decode.is_some() {
        common::usage_error("bench", "there is no --decode: --depth takes the depths at which decoding is timed");
    }
    if let Some([a, b]) = args.compare.as_deref() {
        return compare::run(a, b, args.json);
    }
    #[cfg(feature = "cuda")]
    {
        if args.ledger {
            return ledger::run(&args);
        }
        if args.kernels.is_some() {
            return kernels::run(&args);
        }
        if let Some(out) = &args.timeline {
            return timeline::run(&args, out);
        }
        if let Some(readme) = &args.readme {
            return readme::run(readme, &args.results);
        }
    }
    if args.ledger || args.kernels.is_some() || args.timeline.is_some() || args.readme.is_some() {
        return Err(Error::NoGpu("this binary was built without the feature `cuda`: it has no kernels".into()));
    }
    #[cfg(feature = "server")]
    if args.server {
        return server::run(&args);
    }
    if let Some(guesses) = &args.speculate {
        return speculate::run(&args, guesses);
    }
    if args.startup { startup::run(&args) } else { model::run(&args) }
}

/// The number of the GPU that `--device` names.
#[cfg(feature = "cuda")]
fn ordinal(device: aoji::Device) -> Result<usize> {
    match device {
        aoji::Device::Auto => Ok(0),
        aoji::Device::Cuda(n) => Ok(n),
        aoji::Device::Cpu => Err(Error::Input("kernels run on a GPU: leave out --device cpu".into())),
    }
}
