//! Decode steps recorded as CUDA graphs: the host enqueues one graph instead of hundreds of kernels.
//!
//! What is recorded must not allocate, synchronise or read back; `Backend` promises that for its ops. Everything that
//! changes from step to step (token, position, length) is read from device buffers. A graph contains the addresses of
//! these buffers, so each session has graphs of its own. The first run of a step is not recorded, because it loads the
//! kernels. Recording uses a stream of its own, so that work which other sessions enqueue at the same time does not get
//! into it.

use super::{Cuda, failed};
use crate::error::{Error, Result};
use cudarc::driver::{CudaGraph, DriverError, sys};
use std::{cell::Cell, collections::HashMap, ptr::null_mut};

thread_local! {
    /// Where this thread's launches go while it records a step.
    static RECORDING: Cell<sys::CUstream> = const { Cell::new(null_mut()) };
}

/// The recorded steps of one session, by key and by the trace that they write to (0: none).
#[derive(Default)]
pub struct Graphs(HashMap<(usize, u64), Recorded>);

/// While it lives, this thread's launches are recorded.
struct Recording;

impl Drop for Recording {
    fn drop(&mut self) {
        RECORDING.set(null_mut());
    }
}

/// How the nodes of a recorded step depend on each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Edges {
    /// All of them.
    pub all: usize,
    /// Those across which a kernel may start before the one before it has ended.
    pub programmatic: usize,
    /// Nodes of the step.
    pub nodes: usize,
}

impl Graphs {
    /// The edges of each recorded step, as the driver has them.
    pub fn edges(&self) -> Result<Vec<Edges>> {
        let recorded = self.0.values().filter_map(|r| r.0.as_ref());
        recorded.map(|g| edges(g).map_err(failed(|| "asking for the edges of a step".into()))).collect()
    }
}

fn edges(g: &CudaGraph) -> Result<Edges, DriverError> {
    let (mut nodes, mut n) = (0, 0);
    // SAFETY: the graph lives; without arrays the two calls only write the counts.
    unsafe {
        sys::cuGraphGetNodes(g.cu_graph(), null_mut(), &mut nodes).result()?;
        sys::cuGraphGetEdges_v2(g.cu_graph(), null_mut(), null_mut(), null_mut(), &mut n).result()?;
    }
    let (mut from, mut to) = (vec![null_mut(); n], vec![null_mut(); n]);
    // SAFETY: plain bytes, without invalid values.
    let mut data: Vec<sys::CUgraphEdgeData> = vec![unsafe { std::mem::zeroed() }; n];
    // SAFETY: each array has room for the n edges that were asked for.
    unsafe { sys::cuGraphGetEdges_v2(g.cu_graph(), from.as_mut_ptr(), to.as_mut_ptr(), data.as_mut_ptr(), &mut n) }
        .result()?;
    let kind = sys::CUgraphDependencyType::CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC as u8;
    Ok(Edges { all: n, programmatic: data.iter().filter(|d| d.type_ == kind).count(), nodes })
}

/// A step has run once (`None`) or is recorded.
struct Recorded(Option<CudaGraph>);

// SAFETY: CudaGraph holds driver handles, which any thread may use while its context is current (launch binds it), though not
// two at once: Graphs is only reached through `&mut`.
unsafe impl Send for Recorded {}

impl Cuda {
    /// Runs `ops` the first time, records and launches them the second time, and launches the record from then on.
    pub(super) fn replay(&self, graphs: &mut Graphs, key: usize, ops: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let launch = |g: &CudaGraph| {
            self.context.bind_to_thread().map_err(failed(|| format!("replaying step {key}")))?;
            // SAFETY: graph and stream live; what the step uses is the session's, as `graphs` are.
            unsafe { sys::cuGraphLaunch(g.cu_graph_exec(), self.stream.cu_stream()) }
                .result()
                .map_err(failed(|| format!("replaying step {key}")))
        };
        let mut ops = || {
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
                let g = self.record(&mut ops)?;
                launch(&g)?;
                graphs.0.insert(id, Recorded(Some(g)));
                Ok(())
            }
        }
    }

    /// The stream of the step that this thread records.
    pub(super) fn recording() -> Option<sys::CUstream> {
        Some(RECORDING.get()).filter(|s| !s.is_null())
    }

    fn record(&self, ops: &mut dyn FnMut() -> Result<()>) -> Result<CudaGraph> {
        let what = || failed(|| "recording a step".into());
        let stream = self.context.new_stream().map_err(what())?;
        // thread-local: other threads may go on calling the driver
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode).map_err(what())?;
        RECORDING.set(stream.cu_stream());
        let recording = Recording; // ends when it is dropped, also by a panic of `ops`
        let result = ops();
        drop(recording);
        // ended whatever happened, or the stream would go on recording
        let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0));
        result?;
        let graph = graph
            .map_err(what())?
            .ok_or_else(|| Error::Cuda { what: "recording a step".into(), cause: "nothing was recorded".into() })?;
        if tracing::enabled!(tracing::Level::DEBUG) {
            let Edges { all, programmatic, nodes } = edges(&graph).map_err(what())?;
            tracing::debug!("recorded a step of {nodes} nodes, {programmatic} of their {all} edges programmatic");
        }
        Ok(graph)
    }
}
