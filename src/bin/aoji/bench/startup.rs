//! `aoji bench --startup`: the time from the start of a process to its first token, phase by phase.

use super::{Args, Header, table};
use aoji::{Activations, Device, Error, Result, StartupReport};
use serde::{Deserialize, Serialize};
use std::{
    env,
    io::{BufRead, BufReader, Read},
    process::{Command, Stdio},
    time::Instant,
};

use crate::common;

/// Tokens of the prompt; which ones does not matter.
const PROMPT: &str = "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1";

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    header: Header,
    model: String,
    /// Seconds of the run in the middle.
    median_seconds: f64,
    runs: Vec<Run>,
}

/// One start.
#[derive(Serialize)]
struct Run {
    /// From the start of the process to its first token, as seen by the process that started it.
    seconds: f64,
    /// What it reports itself, from when it began to open the model.
    startup: StartupReport,
}

/// The part of the answer of `aoji generate --json` that is read here.
#[derive(Deserialize)]
struct Answer {
    startup: StartupReport,
}

/// Measures.
pub fn run(args: &Args) -> Result<()> {
    if args.repeat == 0 {
        return Err(Error::Input("--repeat is 0: there is nothing to measure".into()));
    }
    let mut runs = (0..args.repeat).map(|_| start(args)).collect::<Result<Vec<_>>>()?;
    let median = median(&runs);
    let report = Report {
        header: header(args)?,
        model: args.model.model.clone(),
        median_seconds: runs[median].seconds,
        runs: std::mem::take(&mut runs),
    };
    if args.json { common::print_json(&report) } else { common::print(&text(&report)) }
}

/// Which run is in the middle, by its time.
fn median(runs: &[Run]) -> usize {
    let mut order: Vec<usize> = (0..runs.len()).collect();
    order.sort_by(|a, b| runs[*a].seconds.total_cmp(&runs[*b].seconds));
    order[runs.len() / 2]
}

/// Made after the runs: a driver that is already open in this process starts faster.
fn header(args: &Args) -> Result<Header> {
    #[cfg(feature = "cuda")]
    if let Ok(n) = super::ordinal(args.model.device)
        && let Some(gpu) = aoji::cuda::devices().unwrap_or_default().get(n)
    {
        return Ok(Header::of_gpu(gpu));
    }
    let _ = args;
    Ok(Header::new("CPU"))
}

/// Starts a process and waits for its first token.
fn start(args: &Args) -> Result<Run> {
    let failed = |what: String| Error::Input(format!("measuring a start of `aoji generate`: {what}"));
    let program = env::current_exe().map_err(|e| failed(e.to_string()))?;
    let device = match args.model.device {
        Device::Auto => "auto".into(),
        Device::Cpu => "cpu".into(),
        Device::Cuda(n) => format!("cuda:{n}"),
    };
    let dtype = match args.model.dtype {
        Activations::Bf16 => "bf16",
        Activations::F32 => "f32",
    };
    let mut command = Command::new(program);
    command.args(["generate", "--json", "--ignore-eos", "--max-tokens", "1", "--tokens", PROMPT]);
    command.args(["--model", &args.model.model, "--device", &device, "--dtype", dtype]);
    command.args(args.model.context.iter().flat_map(|n| ["--context".into(), n.to_string()]));
    let begin = Instant::now();
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().map_err(|e| failed(e.to_string()))?;
    let (mut line, mut said) = (String::new(), String::new());
    let read = child.stdout.take().map(|out| BufReader::new(out).read_line(&mut line));
    let seconds = begin.elapsed().as_secs_f64(); // what follows is the end of the process
    let _ = child.stderr.take().map(|mut err| err.read_to_string(&mut said));
    let status = child.wait().map_err(|e| failed(e.to_string()))?;
    if !status.success() || !matches!(read, Some(Ok(_))) {
        return Err(failed(said.trim().to_string()));
    }
    let answer: Answer = serde_json::from_str(&line).map_err(|e| failed(e.to_string()))?;
    Ok(Run { seconds, startup: answer.startup })
}

fn text(r: &Report) -> String {
    let mut text = r.header.text();
    let fastest = r.runs.iter().map(|run| run.seconds).fold(f64::INFINITY, f64::min);
    let slowest = r.runs.iter().map(|run| run.seconds).fold(0.0, f64::max);
    text += &format!(
        "{}: process start to first token {:.3} s, the median of {} ({fastest:.3} to {slowest:.3} s)\n\n",
        r.model,
        r.median_seconds,
        r.runs.len(),
    );
    let rows: Vec<_> = r.runs.iter().enumerate().map(|(i, run)| run.cells(i)).collect();
    let middle = &r.runs[median(&r.runs)];
    text += &table::table(&["run", "seconds", "from disk"], &rows);
    text += "\nthe run in the middle, from the start of the process:\n\n";
    text + &table(&middle.startup, middle.seconds - middle.startup.seconds)
}

impl Run {
    fn cells(&self, i: usize) -> Vec<String> {
        let disk = self.startup.disk_bytes.map(megabytes);
        vec![(i + 1).to_string(), format!("{:.3}", self.seconds), disk.unwrap_or_else(|| "-".into())]
    }
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// A table of the phases of a start, which began `before` seconds after the process, and of the time before it.
pub fn table(start: &StartupReport, before: f64) -> String {
    let row = |name: &str, begin: f64, seconds: f64, bytes: u64| {
        let (size, rate) = match bytes {
            0 => (String::new(), String::new()),
            n => (megabytes(n), format!("{:.2}", n as f64 / 1e9 / seconds.max(1e-9))),
        };
        vec![name.to_string(), format!("{begin:.3}"), format!("{seconds:.3}"), size, rate]
    };
    let process = (before > 0.0).then(|| row("process", 0.0, before, 0));
    let phases = start.phases.iter().map(|p| row(&p.name, before + p.begin, p.seconds, p.bytes));
    let rows: Vec<_> = process.into_iter().chain(phases).collect();
    table::table(&["phase", "begin s", "seconds", "bytes", "GB/s"], &rows)
}
