//! Plans a run: what it will take, known before it begins.

use super::{
    adapter::Adapter,
    config::TuneConfig,
    data::{Data, Packing},
    pass::{self, Sizes},
};
use crate::{
    backend::{cpu::Cpu, train::TrainBackend},
    error::{Error, Result},
    files::ModelFiles,
};
use half::bf16;
use serde::Serialize;

/// What a run will do, known before it begins.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Rows that are learned.
    pub rows: usize,
    /// Rows kept apart.
    pub eval_rows: usize,
    /// Rows left out.
    pub dropped: usize,
    /// Tokens of an epoch.
    pub tokens: usize,
    /// Tokens of an epoch that are learned.
    pub labels: usize,
    /// Tokens of the longest row.
    pub longest: usize,
    /// Micro-batches of an epoch.
    pub micro_batches: usize,
    /// Tokens of an epoch, as a share of the room in its micro-batches.
    pub filled: f64,
    /// Steps of the run.
    pub steps: usize,
    /// Parameters of the adapter.
    pub parameters: usize,
    /// Bytes of the weights, of the adapter with its optimizer, and of the activations.
    pub memory: [u64; 3],
}

/// Plans a run.
pub(super) fn plan(
    config: &TuneConfig,
    files: &ModelFiles,
    adapter: &Adapter,
    data: &Data,
    eval: &Data,
    packing: Packing,
) -> Summary {
    let batches = data.epoch(0, packing);
    let steps_of_epoch = batches.len().div_ceil(config.gradient_accumulation_steps);
    let steps = config.max_steps.unwrap_or_else(|| (config.num_epochs * steps_of_epoch as f64).ceil() as usize);
    let longest = data.examples.iter().chain(&eval.examples).map(|e| e.ids.len()).max().unwrap_or(0);
    let sizes = sizes(config, data, eval, packing);
    let activations = match config.bf16 {
        true => pass::bytes::<Cpu<bf16>>(&files.config, adapter, sizes),
        false => pass::bytes::<Cpu<f32>>(&files.config, adapter, sizes),
    };
    let memory = [files.weights.bytes(), 16 * adapter.len as u64, activations];
    let room = batches.len() * packing.capacity.unwrap_or(packing.rows * longest);
    Summary {
        rows: data.examples.len(),
        eval_rows: eval.examples.len(),
        dropped: data.dropped.len(),
        tokens: data.tokens(),
        labels: data.labels(),
        longest,
        micro_batches: batches.len(),
        filled: data.tokens() as f64 / room.max(1) as f64,
        steps,
        parameters: adapter.len,
        memory,
    }
}

/// Checks that a run fits the memory of a backend, or of the machine, where that is known: for a GPU with its weights, which
/// on a CPU stay in their file.
///
/// # Errors
/// `Memory` with the numbers.
pub(super) fn fits<B: TrainBackend>(b: &B, files: &ModelFiles, adapter: &Adapter, sizes: Sizes) -> Result<()> {
    let (c, free) = (&files.config, b.free_memory()?);
    let elements: usize = files.weights.tensors().map(|t| t.rows() * t.cols()).sum();
    let weights = if B::IS_GPU { 2 * elements as u64 } else { 0 };
    let parts = [
        ("weights", weights),
        ("adapter and optimizer", 16 * adapter.len as u64),
        ("activations", pass::bytes::<B>(c, adapter, sizes)),
        ("work", B::training_bytes(c, adapter.shape.rank, sizes.rows)),
    ];
    let needed: u64 = parts.iter().map(|(_, bytes)| bytes).sum();
    let Some(free) = free.filter(|free| needed > *free) else { return Ok(()) };
    let gib = |b: u64| format!("{:.2} GiB", b as f64 / (1u64 << 30) as f64);
    let parts = parts.iter().filter(|(_, bytes)| *bytes > 0);
    let parts: Vec<String> = parts.map(|(what, bytes)| format!("{what} {}", gib(*bytes))).collect();
    Err(Error::Memory(format!(
        "a micro-batch of {} tokens needs {} ({}), available {}; smaller: micro_batch_size, sequence_len, \
         gradient_checkpointing: true",
        sizes.rows,
        gib(needed),
        parts.join(", "),
        gib(free)
    )))
}

/// The most tokens of a micro-batch: as many as packing allows, or the longest rows together.
pub(super) fn sizes(config: &TuneConfig, data: &Data, eval: &Data, packing: Packing) -> Sizes {
    let mut lengths: Vec<usize> = data.examples.iter().chain(&eval.examples).map(|e| e.ids.len()).collect();
    lengths.sort_unstable_by(|a, b| b.cmp(a));
    let together: usize = lengths.iter().take(packing.rows.max(1)).sum();
    let all: usize = lengths.iter().sum();
    let rows = packing.capacity.map_or(together, |capacity| capacity.min(all)).max(lengths[0]);
    Sizes { rows, recompute: config.gradient_checkpointing }
}
