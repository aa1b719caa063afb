//! Plans a run: what it will take, known before it begins.

use super::{
    adapter::Adapter,
    config::TuneConfig,
    data::{Data, Packing},
    pass::{self, Sizes},
};
use crate::{
    backend::cpu::Cpu,
    error::{Error, Result},
    files::ModelFiles,
};
use half::bf16;
use serde::Serialize;
use std::fs;

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
///
/// # Errors
/// `Memory` if the machine's memory is too small.
pub(super) fn plan(
    config: &TuneConfig,
    files: &ModelFiles,
    adapter: &Adapter,
    data: &Data,
    eval: &Data,
    packing: Packing,
) -> Result<Summary> {
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
    let free = available();
    if free.is_some_and(|free| memory[1] + memory[2] > free) {
        let gib = |b: u64| format!("{:.2} GiB", b as f64 / (1u64 << 30) as f64);
        return Err(Error::Memory(format!(
            "adapter and optimizer {} + activations of {} tokens {}, available {}; smaller: micro_batch_size, sequence_len, \
             gradient_checkpointing: true",
            gib(memory[1]),
            sizes.rows,
            gib(memory[2]),
            gib(free.unwrap_or(0))
        )));
    }
    let room = batches.len() * packing.capacity.unwrap_or(packing.rows * longest);
    Ok(Summary {
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
    })
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

/// Bytes of memory that the system can still give, where it says so.
fn available() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}
