//! The KV cache of one session: the only place that knows its layout.
//!
//! Per layer `k` and `v` are [n_kv_heads, max_seq, head_dim]: the keys of one head are contiguous, so that an attention
//! block streams them. Position `t` of every head is written when token `t` is computed; what lies beyond the live length is
//! never read.

use crate::{backend::Backend, config::Config, error::Result};

/// Keys and values of all layers.
pub struct Kv<B: Backend> {
    /// Per layer, [n_kv_heads, max_seq, head_dim].
    pub k: Vec<B::Buf<B::Act>>,
    /// Per layer, [n_kv_heads, max_seq, head_dim].
    pub v: Vec<B::Buf<B::Act>>,
    /// Capacity in tokens.
    pub max_seq: usize,
}

impl<B: Backend> Kv<B> {
    /// Bytes of a cache for `max_seq` tokens.
    pub fn bytes(config: &Config, max_seq: usize) -> u64 {
        2 * (config.n_layers * config.kv_dim() * max_seq * size_of::<B::Act>()) as u64
    }

    /// An empty cache.
    pub fn new(b: &B, config: &Config, max_seq: usize) -> Result<Self> {
        let layer = || b.alloc(config.kv_dim() * max_seq);
        Ok(Kv {
            k: (0..config.n_layers).map(|_| layer()).collect::<Result<_>>()?,
            v: (0..config.n_layers).map(|_| layer()).collect::<Result<_>>()?,
            max_seq,
        })
    }
}
