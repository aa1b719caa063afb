//! The KV cache: keys and values of all tokens so far. No other file knows its layout.
//!
//! For each layer, `k` and `v` are [sequences, n_kv_heads, max_seq, head_dim]: all keys of one head lie one after the
//! other, so that a block of the attention kernel can stream them. A token is found by one number, its *place*:
//! `sequence * max_seq + position`. With a single sequence the place is the position. A place is written when its token
//! is computed; places beyond the present length of a sequence are never read.

use crate::{
    backend::Backend,
    error::Result,
    files::{config::Config, session_file::Sink},
    ops::Act,
};

/// Keys and values of all layers and sequences.
pub struct Kv<B: Backend> {
    /// Per layer, [sequences, n_kv_heads, max_seq, head_dim].
    pub k: Vec<B::Buf<B::Act>>,
    /// Per layer, [sequences, n_kv_heads, max_seq, head_dim].
    pub v: Vec<B::Buf<B::Act>>,
    /// Capacity of a sequence in tokens.
    pub max_seq: usize,
    /// Sequences.
    pub sequences: usize,
}

impl<B: Backend> Kv<B> {
    /// Bytes of a cache for one sequence of `max_seq` tokens.
    pub fn bytes(config: &Config, max_seq: usize) -> u64 {
        2 * (config.n_layers * config.kv_dim() * max_seq * size_of::<B::Act>()) as u64
    }

    /// An empty cache.
    pub fn new(b: &B, config: &Config, sequences: usize, max_seq: usize) -> Result<Self> {
        let layer = || b.alloc(sequences * config.kv_dim() * max_seq);
        Ok(Kv {
            k: (0..config.n_layers).map(|_| layer()).collect::<Result<_>>()?,
            v: (0..config.n_layers).map(|_| layer()).collect::<Result<_>>()?,
            max_seq,
            sequences,
        })
    }

    /// The place of a position.
    pub fn place(&self, sequence: usize, pos: usize) -> u32 {
        debug_assert!(sequence < self.sequences && pos < self.max_seq);
        (sequence * self.max_seq + pos) as u32
    }

    /// Copies the first `len` positions of sequence `from` to sequence `to`, another one.
    pub fn copy(&mut self, b: &B, config: &Config, to: usize, from: usize, len: usize) -> Result<()> {
        for buf in self.k.iter_mut().chain(&mut self.v) {
            for head in 0..config.n_kv_heads {
                let [to, from] = [to, from].map(|s| (s * config.n_kv_heads + head) * self.max_seq * config.head_dim);
                b.copy(buf, to, from, len * config.head_dim)?;
            }
        }
        Ok(())
    }

    /// Gives the bytes of the first `len` positions of sequence 0: of each layer its keys and then its values, head by head.
    pub(crate) fn save(&self, b: &B, config: &Config, len: usize, to: &mut Sink<'_>) -> Result<()> {
        let n = len * config.head_dim;
        let mut acts = vec![B::Act::from_f32(0.0); n];
        for buf in self.k.iter().zip(&self.v).flat_map(|(k, v)| [k, v]) {
            for head in 0..config.n_kv_heads {
                b.read(&mut acts, buf, head * self.max_seq * config.head_dim)?;
                to(bytemuck::cast_slice(&acts))?;
            }
        }
        Ok(())
    }

    /// The way back; `bytes` are whole.
    pub(crate) fn load(&mut self, b: &B, config: &Config, len: usize, bytes: &[u8]) -> Result<()> {
        let mut heads = bytes.chunks_exact(len * config.head_dim * size_of::<B::Act>());
        for buf in self.k.iter_mut().zip(&mut self.v).flat_map(|(k, v)| [k, v]) {
            for (head, bytes) in heads.by_ref().take(config.n_kv_heads).enumerate() {
                // a file's bytes need not be aligned
                let acts: Vec<B::Act> = bytemuck::pod_collect_to_vec(bytes);
                b.write(buf, head * self.max_seq * config.head_dim, &acts)?;
            }
        }
        Ok(())
    }
}
