//! One case of one op, ready to be called, checked and timed.
//!
//! Calls are timed inside a recorded sequence, each on buffers of its own, so that neither the host nor the contents of
//! the L2 cache matter. There are `copies` sets of buffers: if the case is large enough, together they are at least
//! twice the L2.

use super::{Times, ratio::Ratio};
use crate::{
    backend::{
        Backend,
        cpu::Cpu,
        cuda::{Cuda, Launched, lab::Variant},
    },
    error::{Error, Result},
    ops::{Cost, Op},
};
use half::bf16;
use serde::Serialize;

/// Most sets of buffers.
const MAX_COPIES: usize = 256;

/// What to run.
#[derive(Debug, Clone)]
pub struct KernelOptions {
    /// Only this op.
    pub stem: Option<String>,
    /// Only the cases that the emulated device could run too.
    pub small: bool,
    /// Check large cases too.
    pub check: bool,
    /// Timed runs.
    pub repeat: usize,
    /// Only one set of buffers and no warm-up: for tools that slow every launch down.
    pub once: bool,
    /// Variants of the lab to compare with the shipped kernels; without `stem`, only their ops run.
    pub variants: Vec<&'static Variant>,
}

/// Whether what was timed computes the right thing.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    /// Compared with the reference, within the tolerance of the op.
    Passed,
    /// Not compared: too large for a quick look.
    Skipped,
    /// What is wrong.
    Failed(String),
}

/// One case of one op, by the shipped kernels or by a variant.
#[derive(Debug, Clone, Serialize)]
pub struct KernelResult {
    /// Stem of the op.
    pub op: &'static str,
    /// Its sizes.
    pub case: String,
    /// Name of the variant.
    pub variant: Option<&'static str>,
    /// Bytes that a call must read.
    pub read_bytes: u64,
    /// Bytes that a call must write.
    pub write_bytes: u64,
    /// Floating-point operations of a call.
    pub flops: u64,
    /// What a call launches.
    #[serde(skip)]
    pub launches: Vec<Launched>,
    /// Times of one call; absent when it failed.
    pub times: Option<Times>,
    /// A variant's time as a multiple of the shipped kernel's.
    pub ratio: Option<Ratio>,
    /// Sets of buffers that took turns.
    pub copies: usize,
    /// Whether they are at least twice the L2 cache, so that no call finds its data there.
    pub cold: bool,
    /// Comparison with the reference.
    pub check: Check,
}

/// One op with its sizes, whatever its type is: all that measures is compiled once, not for each op.
pub(super) trait Case {
    /// A result without times.
    fn result(&self, variant: Option<&'static str>) -> KernelResult;
    /// As [`Op::is_small`].
    fn is_small(&self) -> bool;
    /// As [`Bench::new`].
    fn bench<'a>(&self, cuda: &'a Cuda, once: bool) -> Result<Bench<'a>>;
}

impl<O: Op> Case for O {
    fn result(&self, variant: Option<&'static str>) -> KernelResult {
        let Cost { read, write, flops } = self.cost();
        KernelResult {
            op: O::STEM,
            case: format!("{self:?}"),
            variant,
            read_bytes: read,
            write_bytes: write,
            flops,
            launches: Vec::new(),
            times: None,
            ratio: None,
            copies: 0,
            cold: false,
            check: Check::Skipped,
        }
    }

    fn is_small(&self) -> bool {
        Op::is_small(self)
    }

    fn bench<'a>(&self, cuda: &'a Cuda, once: bool) -> Result<Bench<'a>> {
        Bench::new(cuda, self.clone(), once)
    }
}

/// One case, ready to be timed.
pub struct Bench<'a> {
    cuda: &'a Cuda,
    calls: Box<dyn Calls + 'a>,
    copies: usize,
    launches: Vec<Launched>,
    graphs: <Cuda as Backend>::Graphs,
    cold: bool,
}

/// A case and its sets of buffers.
trait Calls {
    /// A call on each set.
    fn run(&mut self) -> Result<()>;
    /// As [`Bench::check`].
    fn check(&self) -> Result<()>;
}

struct Of<'a, O: Op> {
    cuda: &'a Cuda,
    op: O,
    buffers: Vec<O::Io<Cuda>>,
}

impl<O: Op> Calls for Of<'_, O> {
    fn run(&mut self) -> Result<()> {
        let Of { cuda, op, buffers } = self;
        buffers.iter_mut().try_for_each(|io| op.run(*cuda, io))
    }

    fn check(&self) -> Result<()> {
        let Of { cuda, op, buffers } = self;
        let got = op.outputs(*cuda, &buffers[0])?;
        let cpu = Cpu::<bf16>::new()?;
        let mut io = op.setup(&cpu, 0)?;
        op.run(&cpu, &mut io)?;
        let want = op.outputs(&cpu, &io)?;
        op.kernel_tolerance().compare(&got, &want).map_err(|e| Error::Disagree(format!("{op:?}: {e}")))
    }
}

impl<'a> Bench<'a> {
    /// Allocates and fills the buffers, and makes one call on the first set.
    pub fn new<O: Op>(cuda: &'a Cuda, op: O, once: bool) -> Result<Self> {
        let c = op.cost();
        let (bytes, l2) = ((c.read + c.write).max(1), cuda.info().l2_bytes);
        let copies = match once || cuda.info().is_emulated() {
            true => 1,
            false => (2 * l2).div_ceil(bytes).clamp(1, MAX_COPIES as u64) as usize,
        };
        // a single set is cold if it is large enough by itself
        let cold = copies as u64 * bytes >= 2 * l2;
        let mut buffers = (0..copies).map(|i| op.setup(cuda, i as u64)).collect::<Result<Vec<_>>>()?;
        let launches = cuda.launches(|| op.run(cuda, &mut buffers[0]))?;
        let calls = Box::new(Of { cuda, op, buffers });
        Ok(Bench { cuda, calls, copies, launches, graphs: Default::default(), cold })
    }

    /// What a call launches.
    pub fn launches(&self) -> &[Launched] {
        &self.launches
    }

    /// Sets of buffers.
    pub fn copies(&self) -> usize {
        self.copies
    }

    /// Compares the first call with the reference. Must come before any timing: some ops work in place.
    pub fn check(&self) -> Result<()> {
        self.calls.check()
    }

    /// Milliseconds of one call: the device's time for one call on every set, divided by their number.
    pub fn time(&mut self) -> Result<f64> {
        let Bench { cuda, calls, graphs, copies, .. } = self;
        let ms = cuda.time(|| cuda.replay(graphs, 0, &mut || calls.run()))?;
        Ok(f64::from(ms) / *copies as f64)
    }

    /// As [`Bench::time`], `repeat` times after a warm-up.
    pub fn times(&mut self, repeat: usize, warm_up: bool) -> Result<Times> {
        super::at_least_one("--repeat", repeat)?;
        if warm_up {
            for _ in 0..3 {
                self.time()?; // loads, records, replays
            }
        }
        (0..repeat).map(|_| self.time()).collect::<Result<Vec<_>>>().map(Times::new)
    }
}

/// A case after its first call, compared with the reference if that was asked for.
pub(super) fn ready<'a>(
    cuda: &'a Cuda,
    case: &dyn Case,
    options: &KernelOptions,
    result: &mut KernelResult,
) -> Result<Bench<'a>> {
    let bench = case.bench(cuda, options.once)?;
    (result.copies, result.cold, result.launches) = (bench.copies(), bench.cold, bench.launches.clone());
    if case.is_small() || options.check {
        bench.check()?;
        result.check = Check::Passed;
    }
    Ok(bench)
}
