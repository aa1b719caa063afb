//! The memory that a model needs, computed before anything is allocated.

use crate::{
    backend::{Backend, SamplerState},
    error::{Error, Result},
    files::config::Config,
    model::{LOGIT_ROWS, Scratch, kv::Kv},
};
use std::fmt;

/// Bytes that a model and its sequences need on their device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Plan {
    /// Tokens of context that the other numbers are for.
    pub context: usize,
    /// Number of sequences that they are for.
    pub sequences: usize,
    /// Weights, once. For quantized ones that stay quantized, also room for one matrix in 16 bits.
    pub weights: u64,
    /// KV cache of the sequences.
    pub kv: u64,
    /// Activations and logits of a step, what its products need, and the sequences' samplers.
    pub scratch: u64,
    /// Free memory of the device, where it is limited.
    pub free: Option<u64>,
}

impl Plan {
    /// What this many sequences of `context` tokens need.
    pub fn new<B: Backend>(config: &Config, weights: u64, context: usize, sequences: usize, free: Option<u64>) -> Plan {
        let table = (context * config.head_dim * 4) as u64;
        let sampler = SamplerState::<B>::bytes(config.vocab, sequences);
        let rows = B::CHUNK.min(context);
        let products = B::workspace_bytes(config, rows);
        let scratch = Scratch::<B>::bytes(config, rows, LOGIT_ROWS, context) + table + sampler + products;
        let kv = sequences as u64 * Kv::<B>::bytes(config, context);
        Plan { context, sequences, weights, kv, scratch, free }
    }

    /// The sum of all.
    pub fn total(&self) -> u64 {
        self.weights + self.kv + self.scratch
    }

    /// The part that is allocated only by sessions and batches, after the model was loaded.
    pub(crate) fn of_sequences(&self) -> u64 {
        self.kv + self.scratch
    }

    /// Whether the device has room, with a margin for the driver's own use.
    pub fn fits(&self) -> bool {
        self.free.is_none_or(|free| self.total() + (256 << 20).min(free / 16) <= free)
    }

    /// The plan for the requested context; if none was requested, for the longest that fits, up to the model's maximum.
    pub(crate) fn choose<B: Backend>(
        config: &Config,
        weights: u64,
        asked: Option<usize>,
        sequences: usize,
        free: Option<u64>,
    ) -> Result<Plan> {
        if sequences == 0 {
            return Err(Error::Input("room for 0 sequences: at least 1".into()));
        }
        if let Some(n) = asked.filter(|n| *n == 0 || *n > config.max_seq) {
            return Err(Error::Input(format!("a context of {n} tokens: the model allows 1 to {}", config.max_seq)));
        }
        let plan = |context| Plan::new::<B>(config, weights, context, sequences, free);
        let wanted = plan(asked.unwrap_or(config.max_seq));
        if wanted.fits() {
            return Ok(wanted);
        }
        // bisect for the longest context that fits
        let (mut low, mut high) = (0, wanted.context);
        while high - low > 1 {
            let middle = (low + high) / 2;
            if plan(middle).fits() { low = middle } else { high = middle }
        }
        match asked {
            None if low >= 512.min(config.max_seq) => Ok(plan(low)),
            _ => Err(Error::Memory(format!(
                "{wanted}; {}",
                if low > 0 {
                    format!("a context of {low} tokens would fit")
                } else {
                    "not even the weights fit".into()
                }
            ))),
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gib = |b: u64| format!("{:.2} GiB", b as f64 / (1u64 << 30) as f64);
        write!(
            f,
            "weights {} + KV cache {} for {}{} tokens + scratch {} = {}",
            gib(self.weights),
            gib(self.kv),
            if self.sequences == 1 { String::new() } else { format!("{} x ", self.sequences) },
            self.context,
            gib(self.scratch),
            gib(self.total())
        )?;
        self.free.map_or(Ok(()), |free| write!(f, ", free {}", gib(free)))
    }
}
