//! One decode step as the device's clock saw it: when each kernel ran, and the gaps between kernels.

use super::{WARM_UP, decode_context, median, step, tokens};
use crate::{
    Engine, Sampling,
    backend::cuda::{Cuda, Launch, Span},
    error::{Error, Result},
};
use serde::Serialize;
use std::{collections::BTreeMap, time::Duration};

/// Most steps that [`timeline`] decodes.
pub const TIMELINE_STEPS: usize = 48;

/// A traced step.
#[derive(Debug, Clone, Serialize)]
pub struct Timeline {
    /// Tokens before the step, approximately.
    pub depth: usize,
    /// Wall time of a step without a trace, microseconds: the median.
    pub untraced_us: f64,
    /// Wall time of a step with a trace, likewise: the difference is what the trace costs.
    pub traced_us: f64,
    /// From the first block's begin to the last one's end.
    pub step_us: f64,
    /// Nanoseconds by which the clock advances, as far as these times show.
    pub clock_ns: u64,
    /// Layers of the model.
    pub n_layers: usize,
    /// Launches of kernels that note no times: their time shows as gaps between other kernels.
    pub silent: BTreeMap<String, usize>,
    /// In the order in which they were enqueued.
    pub launches: Vec<Timed>,
    /// By number, including those on which nothing ran.
    pub sms: Vec<Sm>,
}

/// A launch. Times are microseconds since the step's begin; `gap_us` and `run_us` of all launches add up to the step.
#[derive(Debug, Clone, Serialize)]
pub struct Timed {
    /// Name of the kernel.
    pub kernel: String,
    /// The op with its sizes.
    pub case: String,
    /// Bytes that it must move at least.
    pub bytes: u64,
    /// Blocks.
    pub blocks: usize,
    /// When its first block began.
    pub begin_us: f64,
    /// When its first block knew that the kernels before were done.
    pub ready_us: f64,
    /// The last block ends.
    pub end_us: f64,
    /// From the end of what ran before until it was ready.
    pub gap_us: f64,
    /// From then to its end.
    pub run_us: f64,
    /// Its bytes divided by gap and run.
    pub gb_per_s: f64,
    /// The spans of its blocks, as noted.
    #[serde(skip)]
    pub spans: Vec<Span>,
}

/// A multiprocessor.
#[derive(Debug, Clone, Serialize)]
pub struct Sm {
    /// Share of the step in which it had a block that was ready.
    pub busy: f64,
    /// When that was: microseconds since the step's begin, in order and apart.
    #[serde(skip)]
    pub intervals: Vec<(f64, f64)>,
}

/// Decodes after `depth` tokens and traces a step.
///
/// # Errors
/// `NoGpu` when the model does not run on one; `Context` when the depth does not fit.
pub fn timeline(engine: &Engine, depth: usize) -> Result<Timeline> {
    let Some(cuda) = engine.cuda() else {
        return Err(Error::NoGpu(format!(
            "a timeline shows kernels on a GPU, and this model runs on {}",
            engine.device()
        )));
    };
    // the trace also needs room for steps that it does not show: the first one, which is not recorded
    let (n, room) = if cuda.info().is_emulated() { (4, 1 << 15) } else { (TIMELINE_STEPS / 2, 1 << 20) };
    let mut session = engine.session(decode_context(depth, 2 * n))?;
    session.sync(&tokens(depth.max(1), engine.config().vocab, 1))?;
    let mut steps = session.decode(&Sampling::default(), &[])?;
    let mut run = |n: usize| -> Result<Vec<f64>> {
        (0..n).map(|_| step(&mut steps).map(|(all, _): (Duration, _)| all.as_secs_f64() * 1e6)).collect()
    };
    run(WARM_UP)?;
    let mut untraced = run(n)?;
    cuda.trace_start(room)?;
    let traced = run(n);
    let launches = cuda.trace_stop();
    // the first steps of the trace are run and recorded, not replayed
    let mut traced = traced?.split_off(n / 2);
    let of_wall = (median(&mut untraced), median(&mut traced));
    Timeline::new(depth, of_wall, engine.config().n_layers, cuda, launches?)
}

impl Timeline {
    fn new(
        depth: usize,
        (untraced_us, traced_us): (f64, f64),
        n_layers: usize,
        cuda: &Cuda,
        launches: Vec<Launch>,
    ) -> Result<Timeline> {
        let (noted, silent): (Vec<Launch>, Vec<Launch>) = launches.into_iter().partition(|l| !l.spans.is_empty());
        let mut silent_counts = BTreeMap::new();
        silent.into_iter().for_each(|l| *silent_counts.entry(l.kernel).or_default() += 1);
        let all = || noted.iter().flat_map(|l| &l.spans);
        let (Some(begin), Some(end)) = (all().map(|s| s.begin).min(), all().map(|s| s.end).max()) else {
            return Err(Error::Input("the step ran no kernel that notes when it ran".into()));
        };
        let us = |ns: u64| (ns - begin) as f64 / 1e3;
        let step_us = us(end);
        let clock_ns = all().flat_map(|s| [s.begin, s.ready, s.end]).fold(0, |d, t| gcd(d, t - begin));
        let mut sms = vec![Vec::new(); cuda.info().sm_count as usize];
        for s in all() {
            if s.sm as usize >= sms.len() {
                sms.resize(s.sm as usize + 1, Vec::new()); // numbers need not be dense
            }
            sms[s.sm as usize].push((us(s.ready), us(s.end)));
        }
        let sms = sms.into_iter().map(|v| Sm::new(v, step_us)).collect();
        let mut done = 0.0f64;
        let launches = noted.into_iter().map(|l| {
            let timed = Timed::new(l, done, us);
            done = done.max(timed.end_us);
            timed
        });
        let launches = launches.collect();
        Ok(Timeline {
            depth,
            untraced_us,
            traced_us,
            step_us,
            clock_ns,
            n_layers,
            silent: silent_counts,
            launches,
            sms,
        })
    }

    /// All gaps between kernels, in microseconds.
    pub fn gaps_us(&self) -> f64 {
        self.launches.iter().map(|l| l.gap_us).sum()
    }
}

impl Timed {
    /// `done_us`: the end of what was launched before.
    fn new(l: Launch, done_us: f64, us: impl Fn(u64) -> f64) -> Timed {
        let at = |time: fn(&Span) -> u64| l.spans.iter().map(time);
        let begin_us = at(|s| s.begin).min().map_or(0.0, &us);
        // a block that had no work returned before it waited, so it was never ready
        let waited = l.spans.iter().filter(|s| s.ready > s.begin || us(s.begin) >= done_us);
        let ready_us = waited.map(|s| s.ready).min().map_or(done_us, &us);
        let end_us = at(|s| s.end).max().map_or(0.0, &us);
        let gap_us = (ready_us - done_us).max(0.0);
        let run_us = (end_us - done_us - gap_us).max(0.0);
        let bytes = l.cost.read + l.cost.write;
        Timed {
            gb_per_s: bytes as f64 / ((gap_us + run_us).max(1e-3) * 1e3),
            kernel: l.kernel,
            case: l.case,
            bytes,
            blocks: l.spans.len(),
            begin_us,
            ready_us,
            end_us,
            gap_us,
            run_us,
            spans: l.spans,
        }
    }
}

impl Sm {
    fn new(mut blocks: Vec<(f64, f64)>, step_us: f64) -> Sm {
        blocks.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut intervals: Vec<(f64, f64)> = Vec::new();
        for (begin, end) in blocks {
            match intervals.last_mut() {
                Some(last) if begin <= last.1 => last.1 = last.1.max(end),
                _ => intervals.push((begin, end)),
            }
        }
        let busy = intervals.iter().fold(0.0, |sum, (begin, end)| sum + end - begin) / step_us.max(1e-3);
        Sm { busy, intervals }
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Cost;

    fn launch(spans: &[(u64, u64, u64)]) -> Launch {
        let spans = spans.iter().map(|&(begin, ready, end)| Span::new(begin, ready, end, 0)).collect();
        let cost = Cost { read: 1000, write: 500, flops: 0 };
        Launch { kernel: "k".into(), case: "K".into(), cost, spans }
    }

    #[test]
    fn gaps_and_runs_add_up() {
        let us = |ns| ns as f64 / 1e3;
        let first = Timed::new(launch(&[(0, 0, 900), (100, 100, 1000)]), 0.0, us);
        assert_eq!((first.gap_us, first.run_us, first.gb_per_s), (0.0, 1.0, 1.5));
        // begins early, is ready 0.5 us after the first is done
        let second = Timed::new(launch(&[(800, 1500, 2000), (700, 1600, 2500)]), first.end_us, us);
        assert_eq!((second.begin_us, second.gap_us, second.run_us, second.gb_per_s), (0.7, 0.5, 1.0, 1.0));
        // a block without work is not the first that is ready
        let idle = Timed::new(launch(&[(2000, 2000, 2100), (2000, 2600, 3000)]), second.end_us, us);
        assert_eq!((idle.begin_us, idle.ready_us), (2.0, 2.6));
        // it ends before the kernel that ran at the same time
        let beside = Timed::new(launch(&[(800, 900, 1000)]), second.end_us, us);
        assert_eq!((beside.gap_us, beside.run_us), (0.0, 0.0));
    }

    #[test]
    fn busy_time_is_counted_once() {
        let sm = Sm::new(vec![(3.0, 4.0), (0.0, 1.0), (0.5, 2.0), (2.0, 2.5)], 10.0);
        assert_eq!(sm.intervals, [(0.0, 2.5), (3.0, 4.0)]);
        assert!((sm.busy - 0.35).abs() < 1e-12);
        assert_eq!([(0, 96), (96, 64), (7, 0)].map(|(a, b)| gcd(a, b)), [96, 32, 7]);
    }
}
