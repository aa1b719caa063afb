//! Causal grouped-query attention: `out[r, h] = softmax_t(q[r, h] . k[g, t] / sqrt(head_dim)) v[g, t]` over `t <= pos[r]`, where
//! `g = h / (n_heads / n_kv_heads)`; for many rows:
//! flash attention (Dao 2023).
//!
//! Shapes: `out` [rows, n_heads * head_dim]; `qkv` [rows, (n_heads + 2 n_kv_heads) * head_dim], of which q is read; `k`, `v`
//! [n_kv_heads, max_seq, head_dim], which hold the rows' own keys already; `pos` [at least rows], consecutive:
//! `pos[r] = pos[0] + r`.
//! Rounding: scores and sums in f32, one rounding at the store.

use super::{Act, AttnDecode, expect};
use crate::error::Result;

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct AttnPrefill {
    /// Tokens.
    pub rows: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key heads.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Capacity of the cache; the caller proves that each position is below.
    pub max_seq: usize,
}

impl AttnPrefill {
    const STEM: &'static str = "attn_prefill";

    /// Elements of a row of `qkv`.
    pub fn qkv_dim(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
    }

    /// Buffer lengths fit the sizes.
    pub fn check(&self, out: usize, qkv: usize, k: usize, v: usize, pos: usize) -> Result<()> {
        expect(Self::STEM, self.n_kv_heads > 0 && self.n_heads % self.n_kv_heads == 0, || {
            format!("{self:?}: n_heads must be a multiple of n_kv_heads")
        })?;
        let cache = self.n_kv_heads * self.max_seq * self.head_dim;
        expect(Self::STEM, k >= cache && v >= cache, || format!("k has {k} elements and v {v}, {self:?}"))?;
        let q = self.rows * self.n_heads * self.head_dim;
        expect(Self::STEM, q > 0 && out >= q && qkv >= self.rows * self.qkv_dim() && pos >= self.rows, || {
            format!("out has {out} elements, qkv {qkv} and pos {pos}, {self:?}")
        })
    }

    /// The definition: that of the decode attention, whose rows are independent.
    pub fn reference<A: Act>(&self, out: &mut [A], qkv: &[A], k: &[A], v: &[A], pos: &[u32]) {
        let Self { rows, n_heads, n_kv_heads, head_dim, max_seq } = *self;
        let op = AttnDecode { rows, n_heads, n_kv_heads, head_dim, max_seq, kv_len: max_seq };
        op.reference(out, qkv, k, v, pos);
    }

    /// The kernel.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        _cu: &crate::cuda::Cuda,
        _out: &mut crate::cuda::Buffer<half::bf16>,
        _qkv: &crate::cuda::Buffer<half::bf16>,
        _k: &crate::cuda::Buffer<half::bf16>,
        _v: &crate::cuda::Buffer<half::bf16>,
        _pos: &crate::cuda::Buffer<u32>,
    ) -> Result<()> {
        Err(crate::error::Error::Op { op: Self::STEM, what: "has no kernel yet".into() })
    }
}
