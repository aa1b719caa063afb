//! Steps recorded once and replayed: one enqueue instead of hundreds.
//!
//! Rules of a recorded step, which `Backend` promises for its ops: no allocation, no synchronisation, no read on the host; all
//! that changes from step to step is in device buffers. Each pointer is baked in, so a set of graphs belongs to the buffers of
//! one session. The first run of a step is not recorded: it loads the kernels that it needs.

use super::{Cuda, failed};
use crate::error::{Error, Result};
use cudarc::driver::{CudaGraph, sys};
use std::collections::HashMap;

/// The recorded steps of one session, by key and by the trace that they write to (0: none).
#[derive(Default)]
pub struct Graphs(HashMap<(usize, u64), Recorded>);

/// A step has run once (`None`) or is recorded.
struct Recorded(Option<CudaGraph>);

// SAFETY: CudaGraph holds driver handles, which any thread may use while its context is current (launch binds it), though not
// two at once: Graphs is only reached through `&mut`.
unsafe impl Send for Recorded {}

impl Cuda {
    /// Runs `ops` the first time, records and launches them the second time, and launches the record from then on.
    pub(super) fn replay(&self, graphs: &mut Graphs, key: usize, ops: impl FnOnce() -> Result<()>) -> Result<()> {
        let launch = |g: &CudaGraph| g.launch().map_err(failed(|| format!("replaying step {key}")));
        let ops = || {
            self.trace.step();
            ops()
        };
        let id = (key, self.trace.id());
        match graphs.0.get(&id) {
            None => {
                graphs.0.insert(id, Recorded(None));
                ops()
            }
            Some(Recorded(Some(g))) => launch(g),
            Some(Recorded(None)) => {
                let g = self.record(ops)?;
                launch(&g)?;
                graphs.0.insert(id, Recorded(Some(g)));
                Ok(())
            }
        }
    }

    fn record(&self, ops: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
        let what = || failed(|| "recording a step".into());
        // thread-local: other threads may go on calling the driver
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).map_err(what())?;
        let result = ops();
        // ended whatever happened, or the stream would go on recording
        let graph = self.stream.end_capture(sys::CUgraphInstantiate_flags(0));
        result?;
        graph
            .map_err(what())?
            .ok_or_else(|| Error::Cuda { what: "recording a step".into(), cause: "nothing was recorded".into() })
    }
}
