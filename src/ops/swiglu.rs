//! `hb[r, i] = silu(gate[r, i]) * up[r, i]`, `silu(g) = g / (1 + exp(-g))` (Shazeer 2020).
//!
//! Shapes: `hb` [rows, ffn_dim]; `gate_up` [rows, 2 * ffn_dim], a row holds gate and then up.
//! Rounding: f32 arithmetic, one rounding at the store.

use super::{Act, expect};
use crate::error::Result;

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct Swiglu {
    /// Tokens.
    pub rows: usize,
    /// Width of gate and of up.
    pub ffn_dim: usize,
}

impl Swiglu {
    const STEM: &'static str = "swiglu";

    /// Buffer lengths fit the sizes.
    pub fn check(&self, hb: usize, gate_up: usize) -> Result<()> {
        let n = self.rows * self.ffn_dim;
        expect(Self::STEM, n > 0 && hb >= n && gate_up >= 2 * n, || {
            format!("hb has {hb} elements and gate_up {gate_up}, {self:?}")
        })
    }

    /// The definition.
    pub fn reference<A: Act>(&self, hb: &mut [A], gate_up: &[A]) {
        let n = self.ffn_dim;
        for (hb, gate_up) in hb.chunks_exact_mut(n).zip(gate_up.chunks_exact(2 * n)).take(self.rows) {
            let (gate, up) = gate_up.split_at(n);
            for ((hb, g), u) in hb.iter_mut().zip(gate).zip(up) {
                let g = g.to_f32();
                *hb = A::from_f32(g / (1.0 + (-g).exp()) * u.to_f32());
            }
        }
    }

    /// The kernel.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        _cu: &crate::cuda::Cuda,
        _hb: &mut crate::cuda::Buffer<half::bf16>,
        _gate_up: &crate::cuda::Buffer<half::bf16>,
    ) -> Result<()> {
        Err(crate::error::Error::Op { op: Self::STEM, what: "has no kernel yet".into() })
    }
}
