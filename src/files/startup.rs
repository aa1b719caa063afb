//! Records what happened, and when, until a model was ready.

use serde::{Deserialize, Serialize};
use std::{
    borrow::Cow,
    fs,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

/// The clock of a start and its phases, some of which run at the same time. Clones share it.
#[derive(Clone)]
pub struct Startup(Arc<Inner>);

struct Inner {
    zero: Instant,
    /// Bytes that the process had read from disks at that time.
    read: Option<u64>,
    phases: Mutex<Vec<Phase>>,
}

/// A part of the start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// `config`, `files`, `tokenizer`, `driver`, `context`, `kernels`, `weights` with its parts `memory` (allocated)
    /// and `copies` (from the files to the GPU), and what a program adds.
    pub name: Cow<'static, str>,
    /// Seconds from the start's beginning to its own.
    pub begin: f64,
    /// Its duration.
    pub seconds: f64,
    /// Bytes that it read, loaded or allocated; 0 where bytes say nothing.
    pub bytes: u64,
}

/// A start as it can be written and read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StartupReport {
    /// From its beginning to the end of the last phase.
    pub seconds: f64,
    /// Bytes that the process had from disks in that time: 0 with a warm page cache. Absent where the system does not
    /// say.
    pub disk_bytes: Option<u64>,
    /// In the order in which they began.
    pub phases: Vec<Phase>,
}

impl Startup {
    /// The start begins now.
    pub(crate) fn begin() -> Startup {
        Startup(Arc::new(Inner { zero: Instant::now(), read: disk_bytes(), phases: Mutex::default() }))
    }

    /// Runs a phase.
    pub(crate) fn time<T>(&self, name: &'static str, bytes: u64, run: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        let result = run();
        self.record(name, begin, Instant::now(), bytes);
        result
    }

    /// Adds a phase that ran.
    pub fn record(&self, name: &'static str, begin: Instant, end: Instant, bytes: u64) {
        let phase = Phase {
            name: name.into(),
            begin: begin.saturating_duration_since(self.0.zero).as_secs_f64(),
            seconds: end.saturating_duration_since(begin).as_secs_f64(),
            bytes,
        };
        tracing::debug!("{name}: {:.3} s from {:.3} s on, {bytes} bytes", phase.seconds, phase.begin);
        self.0.phases.lock().unwrap_or_else(PoisonError::into_inner).push(phase);
    }

    /// The start so far.
    pub fn report(&self) -> StartupReport {
        let mut phases = self.0.phases.lock().unwrap_or_else(PoisonError::into_inner).clone();
        phases.sort_by(|a, b| a.begin.total_cmp(&b.begin));
        let seconds = phases.iter().map(|p| p.begin + p.seconds).fold(0.0, f64::max);
        let disk_bytes = disk_bytes().zip(self.0.read).map(|(now, before)| now.saturating_sub(before));
        StartupReport { seconds, disk_bytes, phases }
    }
}

/// Bytes that this process has had from block devices, page faults and read-ahead included, as Linux counts them.
fn disk_bytes() -> Option<u64> {
    let io = fs::read_to_string("/proc/self/io").ok()?;
    io.lines().find_map(|line| line.strip_prefix("read_bytes:"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn phases_come_in_the_order_in_which_they_began() {
        let startup = Startup::begin();
        let at = |ms| startup.0.zero + Duration::from_millis(ms);
        startup.record("second", at(30), at(40), 0);
        startup.clone().record("first", at(10), at(90), 7);
        let StartupReport { seconds, phases, .. } = startup.report();
        assert_eq!(seconds, 0.09, "the last to end, not the last to begin");
        let first = Phase { name: "first".into(), begin: 0.01, seconds: 0.08, bytes: 7 };
        assert_eq!(phases[0], first);
        assert_eq!(phases[1].name, "second");
        assert_eq!(startup.time("third", 0, || 5), 5);
        assert_eq!(startup.report().phases.len(), 3);
    }
}
