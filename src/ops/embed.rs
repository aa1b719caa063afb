//! `x[r, i] = table[tokens[r], i]`
//!
//! Shapes: `x` [rows, dim], `tokens` [at least rows], `table` [vocab, dim]. Exact.

use super::{Act, expect};
use crate::error::Result;

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct Embed {
    /// Tokens.
    pub rows: usize,
    /// Width.
    pub dim: usize,
    /// Rows of the table; the caller proves that each token is below.
    pub vocab: usize,
}

impl Embed {
    const STEM: &'static str = "embed";

    /// Buffer lengths fit the sizes.
    pub fn check(&self, x: usize, tokens: usize, table: (usize, usize)) -> Result<()> {
        expect(Self::STEM, table == (self.vocab, self.dim), || format!("table is {table:?}, {self:?}"))?;
        expect(Self::STEM, self.rows > 0 && tokens >= self.rows && x >= self.rows * self.dim, || {
            format!("x has {x} elements and tokens {tokens}, {self:?}")
        })
    }

    /// The definition.
    pub fn reference<A: Act, W: Act>(&self, x: &mut [A], tokens: &[u32], table: &[W]) {
        for (x, &t) in x.chunks_exact_mut(self.dim).zip(&tokens[..self.rows]) {
            for (x, w) in x.iter_mut().zip(&table[t as usize * self.dim..][..self.dim]) {
                *x = A::from_f32(w.to_f32());
            }
        }
    }

    /// The kernel.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        _cu: &crate::cuda::Cuda,
        _x: &mut crate::cuda::Buffer<half::bf16>,
        _tokens: &crate::cuda::Buffer<u32>,
        _table: &crate::cuda::Weight,
    ) -> Result<()> {
        Err(crate::error::Error::Op { op: Self::STEM, what: "has no kernel yet".into() })
    }
}
