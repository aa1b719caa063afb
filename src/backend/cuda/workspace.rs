//! Scratch memory for the matrix product for many rows. All calls share it, since the stream runs them one after the
//! other.

use super::{Buffer, Cuda};
use crate::{backend::Backend, error::Result, files::config::Config, ops::Gemm};
use std::sync::PoisonError;

/// The sums and counters that all products of a model with up to `rows` rows need at most.
pub(super) fn most(c: &Config, rows: usize) -> (usize, usize) {
    let Config { dim, ffn_dim, vocab, .. } = *c;
    let products =
        [(c.q_dim() + 2 * c.kv_dim(), dim), (dim, c.q_dim()), (2 * ffn_dim, dim), (dim, ffn_dim), (vocab, dim)];
    let sizes = products.map(|(n, k)| Gemm::most_workspace(rows, n, k));
    sizes.into_iter().fold((0, 0), |most, size| (most.0.max(size.0), most.1.max(size.1)))
}

/// The memory so far; see `kernels/gemm.cu`.
#[derive(Default)]
pub(super) struct Workspace {
    sums: Option<Buffer<f32>>,
    /// 0 between calls.
    arrived: Option<Buffer<u32>>,
}

impl Cuda {
    /// Enqueues work with at least this many sums and counters. They are allocated when a model is loaded, by
    /// [`Backend::expect_rows`], or here if nothing was expected.
    pub(crate) fn with_workspace(
        &self,
        sums: usize,
        counters: usize,
        enqueue: impl FnOnce(&Buffer<f32>, &Buffer<u32>) -> Result<()>,
    ) -> Result<()> {
        let mut workspace = self.workspace.lock().unwrap_or_else(PoisonError::into_inner);
        let Workspace { sums: has, arrived } = &mut *workspace;
        // what is freed here is freed on the stream, after the calls that use it
        let sums = match has.take().filter(|b| b.len() >= sums) {
            Some(enough) => has.insert(enough),
            None => has.insert(self.alloc(sums)?),
        };
        let arrived = match arrived.take().filter(|b| b.len() >= counters) {
            Some(enough) => arrived.insert(enough),
            None => arrived.insert(self.alloc(counters)?),
        };
        enqueue(sums, arrived)
    }
}
