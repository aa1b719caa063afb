//! Causal grouped-query attention: `out[r, h] = softmax_t(q[r, h] . k[g, t] / sqrt(head_dim)) v[g, t]` over `t <= pos[r]`, where
//! `g = h / (n_heads / n_kv_heads)`; for few rows: the
//! keys are split over blocks at fixed positions and the parts merged on the device, so the bits of a row depend on its own
//! position only (flash-decoding, Dao et al. 2023).
//!
//! Shapes: `out` [rows, n_heads * head_dim]; `qkv` [rows, (n_heads + 2 n_kv_heads) * head_dim], of which q is read; `k`, `v`
//! [n_kv_heads, max_seq, head_dim], which hold the rows' own keys already; `pos` [at least rows].
//! Rounding: scores and sums in f32, one rounding at the store.

use super::{Act, expect};
use crate::error::Result;
use rayon::prelude::*;

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct AttnDecode {
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
    /// Positions that the launch covers: every `pos[r]` is below. A captured launch serves all steps of a length bucket.
    pub kv_len: usize,
}

impl AttnDecode {
    const STEM: &'static str = "attn_decode";

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

    /// Blocks that share the keys of one head.
    pub fn splits(&self) -> usize {
        self.kv_len.div_ceil(crate::tiles::ATTN_SPLIT as usize)
    }

    /// f32 values of `part`: per row, head and split the maximum, the sum and the weighted values.
    pub fn part_len(&self) -> usize {
        self.rows * self.n_heads * self.splits() * (self.head_dim + 2)
    }

    /// Counters of `arrived`: one per row and kv head; zero before and after each call.
    pub fn arrived_len(&self) -> usize {
        self.rows * self.n_kv_heads
    }

    /// The definition. Rows are computed in parallel.
    pub fn reference<A: Act>(&self, out: &mut [A], qkv: &[A], k: &[A], v: &[A], pos: &[u32]) {
        let (d, group) = (self.head_dim, self.n_heads / self.n_kv_heads);
        let scale = 1.0 / (d as f32).sqrt();
        let heads = out.par_chunks_exact_mut(d).take(self.rows * self.n_heads).enumerate();
        heads.for_each(|(i, out)| {
            let (r, h) = (i / self.n_heads, i % self.n_heads);
            let q: Vec<f32> = qkv[r * self.qkv_dim() + h * d..][..d].iter().map(|q| q.to_f32()).collect();
            let (len, base) = (pos[r] as usize + 1, h / group * self.max_seq * d);
            let keys = k[base..][..len * d].chunks_exact(d);
            let mut p: Vec<f32> =
                keys.map(|k| q.iter().zip(k).map(|(q, k)| q * k.to_f32()).sum::<f32>() * scale).collect();
            let max = p.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            p.iter_mut().for_each(|p| *p = (*p - max).exp());
            let sum: f32 = p.iter().sum();
            let mut acc = vec![0f32; d];
            for (p, v) in p.iter().zip(v[base..][..len * d].chunks_exact(d)) {
                acc.iter_mut().zip(v).for_each(|(acc, v)| *acc += p * v.to_f32());
            }
            out.iter_mut().zip(acc).for_each(|(out, acc)| *out = A::from_f32(acc / sum));
        });
    }

    /// The kernel.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        _cu: &crate::cuda::Cuda,
        _out: &mut crate::cuda::Buffer<half::bf16>,
        _part: &mut crate::cuda::Buffer<f32>,
        _arrived: &mut crate::cuda::Buffer<u32>,
        _qkv: &crate::cuda::Buffer<half::bf16>,
        _k: &crate::cuda::Buffer<half::bf16>,
        _v: &crate::cuda::Buffer<half::bf16>,
        _pos: &crate::cuda::Buffer<u32>,
    ) -> Result<()> {
        Err(crate::error::Error::Op { op: Self::STEM, what: "has no kernel yet".into() })
    }
}
