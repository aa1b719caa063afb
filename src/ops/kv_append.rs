//! `k[h, pos[r], :] = ` k head `h` of row `r`, and likewise `v`.
//!
//! Shapes: `k`, `v` [n_kv_heads, max_seq, head_dim]; `qkv` [rows, (n_heads + 2 n_kv_heads) * head_dim]; `pos` [at least rows].
//! Exact.

use super::{Act, expect};
use crate::error::Result;

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct KvAppend {
    /// Tokens.
    pub rows: usize,
    /// Query heads, which lie before the k heads in a row.
    pub n_heads: usize,
    /// Key heads, as many as value heads.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Capacity of the cache; the caller proves that each position is below.
    pub max_seq: usize,
}

impl KvAppend {
    const STEM: &'static str = "kv_append";

    /// Elements of a row of `qkv`.
    pub fn qkv_dim(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
    }

    /// Buffer lengths fit the sizes.
    pub fn check(&self, k: usize, v: usize, qkv: usize, pos: usize) -> Result<()> {
        let cache = self.n_kv_heads * self.max_seq * self.head_dim;
        expect(Self::STEM, k >= cache && v >= cache, || format!("k has {k} elements and v {v}, {self:?}"))?;
        expect(Self::STEM, self.rows > 0 && qkv >= self.rows * self.qkv_dim() && pos >= self.rows, || {
            format!("qkv has {qkv} elements and pos {pos}, {self:?}")
        })
    }

    /// The definition.
    pub fn reference<A: Act>(&self, k: &mut [A], v: &mut [A], qkv: &[A], pos: &[u32]) {
        let d = self.head_dim;
        for (row, &t) in qkv.chunks_exact(self.qkv_dim()).zip(&pos[..self.rows]) {
            let (ks, vs) = row[self.n_heads * d..].split_at(self.n_kv_heads * d);
            for h in 0..self.n_kv_heads {
                let at = (h * self.max_seq + t as usize) * d;
                k[at..at + d].copy_from_slice(&ks[h * d..][..d]);
                v[at..at + d].copy_from_slice(&vs[h * d..][..d]);
            }
        }
    }

    /// The kernel.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        _cu: &crate::cuda::Cuda,
        _k: &mut crate::cuda::Buffer<half::bf16>,
        _v: &mut crate::cuda::Buffer<half::bf16>,
        _qkv: &crate::cuda::Buffer<half::bf16>,
        _pos: &crate::cuda::Buffer<u32>,
    ) -> Result<()> {
        Err(crate::error::Error::Op { op: Self::STEM, what: "has no kernel yet".into() })
    }
}
