//! Records when and on which multiprocessor each block of each launch ran, by the device's clock, as
//! `kernels/common/trace.cuh` notes it.
//!
//! A launch passes [`Cuda::trace`] as its last argument: while a trace runs, the address of its own spans (a span is
//! the run of one block), else null. A recorded step contains that address, so a trace has a number that is a part of
//! the key of recorded steps: a traced step is recorded separately, and the trace shows its last replay.

use super::{Arg, Buffer, Cuda};
use crate::{
    backend::Backend,
    error::{Error, Result},
    ops::{Cost, Element, Grid, Op},
};
use std::{
    fmt::Debug,
    ops::Range,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

/// One block's run, as the kernel wrote it; times are nanoseconds of the device's clock.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Span {
    /// Its first thread started.
    pub begin: u64,
    /// When the work that the kernel depends on was done; `begin` if the kernel does not wait for that itself.
    pub ready: u64,
    /// When its first thread was done: a lower bound, see `kernels/common/trace.cuh`.
    pub end: u64,
    /// The multiprocessor.
    pub sm: u32,
    pad: u32,
}

impl Element for Span {}

impl Span {
    /// A block's run on a multiprocessor.
    pub fn new(begin: u64, ready: u64, end: u64, sm: u32) -> Span {
        Span { begin, ready, end, sm, pad: 0 }
    }
}

/// A launch in a trace.
#[derive(Debug, Clone, Default)]
pub struct Launch {
    /// Name of the kernel.
    pub kernel: String,
    /// The op with its sizes.
    pub case: String,
    /// What the op must move and compute; for one of several kernels of an op, its share.
    pub cost: Cost,
    /// One for each block, in the order of their linear index. Empty for a kernel that notes nothing.
    pub spans: Vec<Span>,
}

/// The trace that is running, if any.
#[derive(Default)]
pub(super) struct Tracer {
    /// The number of the trace, 0 for none; read at each launch.
    id: AtomicU64,
    trace: Mutex<Option<Trace>>,
    started: AtomicU64,
}

struct Trace {
    spans: Buffer<Span>,
    /// Spans that are given to launches.
    given: usize,
    /// In the order of the launches.
    launches: Vec<(Launch, Range<usize>)>,
    /// A launch that has got its spans and is not enqueued yet.
    open: Option<(Launch, Range<usize>)>,
}

impl Tracer {
    /// The number of the running trace; 0 when there is none.
    pub fn id(&self) -> u64 {
        self.id.load(Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Trace>> {
        self.trace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `f` when a trace runs; costs one load when none does.
    fn with<T>(&self, f: impl FnOnce(&mut Trace) -> T) -> Option<T> {
        if self.id() == 0 { None } else { self.lock().as_mut().map(f) }
    }

    /// Forgets the launches so far: they belong to an earlier step.
    pub fn step(&self) {
        self.with(|t| t.launches.clear());
    }

    /// A kernel is about to be enqueued with this grid, which for a variant of the lab may differ from the one that
    /// [`Cuda::trace`] was given.
    pub fn launching(&self, kernel: &str, op: &dyn Debug, grid: Grid) -> Result<(), String> {
        let noted = self.with(|t| {
            let (mut launch, given) = t.open.take().unwrap_or_default();
            (launch.kernel, launch.case) = (kernel.into(), format!("{op:?}"));
            let range = given.start..given.start + if given.is_empty() { 0 } else { blocks(grid) };
            t.given = t.given.max(range.end);
            if given.end <= t.spans.len() && range.end > t.spans.len() {
                return Err(format!("the trace has room for {} blocks", t.spans.len()));
            }
            t.launches.push((launch, range));
            Ok(())
        });
        noted.unwrap_or(Ok(()))
    }
}

fn blocks(grid: Grid) -> usize {
    grid.blocks.iter().map(|n| *n as usize).product()
}

impl Cuda {
    /// The last argument of a launch: where its blocks note their spans, or null.
    pub fn trace<O: Op>(&self, op: &O, grid: Grid) -> Arg {
        self.trace_part(op.cost(), grid)
    }

    /// As [`Cuda::trace`], for one of several kernels of an op; `cost` is its share of the op's cost.
    pub fn trace_part(&self, cost: Cost, grid: Grid) -> Arg {
        let address = self.trace.with(|t| {
            let range = t.given..t.given + blocks(grid);
            t.given = range.end;
            let fits = range.end <= t.spans.len();
            let address = t.spans.address + (range.start * size_of::<Span>()) as u64;
            t.open = Some((Launch { cost, ..Launch::default() }, range));
            if fits { address } else { 0 }
        });
        Arg(address.unwrap_or(0))
    }

    /// Begins a trace with room for `blocks` blocks. For the steps of a session it shows the last one that was recorded
    /// or run op by op, at its last replay; for other launches, all of them. Everything that runs on this GPU meanwhile
    /// is traced, so that should be one session of one thread.
    ///
    /// # Errors
    /// `Input` when one is running; `Memory` when the room is not there.
    pub fn trace_start(&self, blocks: usize) -> Result<()> {
        let spans = self.alloc(blocks)?;
        let mut trace = self.trace.lock();
        if trace.is_some() {
            return Err(Error::Input("a trace is already running on this GPU".into()));
        }
        *trace = Some(Trace { spans, given: 0, launches: Vec::new(), open: None });
        self.trace.id.store(self.trace.started.fetch_add(1, Relaxed) + 1, Relaxed);
        Ok(())
    }

    /// Ends the trace, waits for the device, and returns the launches in the order in which they were enqueued.
    ///
    /// # Errors
    /// `Input` when none is running or when there were more blocks than it had room for; `Cuda` when a kernel noted only some
    /// of its blocks.
    pub fn trace_stop(&self) -> Result<Vec<Launch>> {
        self.trace.id.store(0, Relaxed);
        let Some(trace) = self.trace.lock().take() else {
            return Err(Error::Input("no trace is running on this GPU".into()));
        };
        if trace.given > trace.spans.len() {
            let (given, room) = (trace.given, trace.spans.len());
            return Err(Error::Input(format!("the trace has room for {room} blocks, {given} were launched")));
        }
        let spans = self.download(&trace.spans)?;
        let mut launches = Vec::with_capacity(trace.launches.len());
        for (mut launch, range) in trace.launches {
            launch.spans.extend_from_slice(&spans[range]);
            if launch.spans.iter().all(|s| s.end == 0) {
                launch.spans.clear(); // a variant of the lab need not take them
            }
            if let Some(block) = launch.spans.iter().position(|s| s.end == 0) {
                let (what, cause) = (launch.case, format!("block {block} of {} noted no time", launch.kernel));
                return Err(Error::Cuda { what, cause });
            }
            launches.push(launch);
        }
        Ok(launches)
    }
}
