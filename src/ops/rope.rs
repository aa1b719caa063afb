//! Rotary position embedding, *half-split* (Hugging Face's layout, not the interleaved one of the paper, Su et al. 2021):
//! for `i < head_dim / 2`, the pair `(a, b) = (h[i], h[i + head_dim / 2])` of a head becomes `(a c - b s, b c + a s)` with
//! `c, s = cos, sin` of `pos[r] * inv_freq[i]`.
//!
//! Shapes: `qkv` [rows, (n_heads + 2 n_kv_heads) * head_dim], of which the q and k heads are rotated in place; `pos` [at least
//! rows]; `table` [max_seq, head_dim] f32, a row holds the cosines and then the sines of a position.
//! Rounding: f32 arithmetic, one rounding at the store.

use super::{Act, expect};
use crate::error::Result;

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Tokens.
    pub rows: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key heads, as many as value heads.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Positions in the table; the caller proves that each position is below.
    pub max_seq: usize,
}

impl Rope {
    const STEM: &'static str = "rope";

    /// Elements of a row of `qkv`.
    pub fn qkv_dim(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
    }

    /// Buffer lengths fit the sizes.
    pub fn check(&self, qkv: usize, pos: usize, table: usize) -> Result<()> {
        expect(Self::STEM, self.head_dim % 2 == 0, || format!("{self:?}: head_dim must be even"))?;
        expect(Self::STEM, self.rows > 0 && qkv >= self.rows * self.qkv_dim() && pos >= self.rows, || {
            format!("qkv has {qkv} elements and pos {pos}, {self:?}")
        })?;
        expect(Self::STEM, table >= self.max_seq * self.head_dim, || format!("table has {table} elements, {self:?}"))
    }

    /// The table for `inv_freq` [head_dim / 2]: angles in f32 as Hugging Face computes them, cosines and sines exact to f32.
    pub fn table(inv_freq: &[f32], max_seq: usize) -> Vec<f32> {
        let mut table = Vec::with_capacity(max_seq * inv_freq.len() * 2);
        for t in 0..max_seq {
            let angles = || inv_freq.iter().map(|f| f64::from(t as f32 * f));
            table.extend(angles().map(|a| a.cos() as f32));
            table.extend(angles().map(|a| a.sin() as f32));
        }
        table
    }

    /// The definition.
    pub fn reference<A: Act>(&self, qkv: &mut [A], pos: &[u32], table: &[f32]) {
        let half = self.head_dim / 2;
        for (row, &t) in qkv.chunks_exact_mut(self.qkv_dim()).zip(&pos[..self.rows]) {
            let (cos, sin) = table[t as usize * self.head_dim..][..self.head_dim].split_at(half);
            for head in row.chunks_exact_mut(self.head_dim).take(self.n_heads + self.n_kv_heads) {
                for i in 0..half {
                    let (a, b) = (head[i].to_f32(), head[i + half].to_f32());
                    head[i] = A::from_f32(a * cos[i] - b * sin[i]);
                    head[i + half] = A::from_f32(b * cos[i] + a * sin[i]);
                }
            }
        }
    }

    /// The kernel.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        _cu: &crate::cuda::Cuda,
        _qkv: &mut crate::cuda::Buffer<half::bf16>,
        _pos: &crate::cuda::Buffer<u32>,
        _table: &crate::cuda::Buffer<f32>,
    ) -> Result<()> {
        Err(crate::error::Error::Op { op: Self::STEM, what: "has no kernel yet".into() })
    }
}
