//! The gradients of gate and up from `dh`, that of [`crate::ops::Swiglu`]'s `h = silu(g) u`: with `s = 1 / (1 + exp(-g))`,
//! `dg = dh u s (1 + g (1 - s))` and `du = dh g s` (SwiGLU, Shazeer 2020).
//!
//! Shapes: `d_gate_up` and `gate_up` [at least rows, 2 ffn_dim], a row is the gate and then the up; `dh` [at least rows, ffn_dim].

use super::Real;
use crate::{
    backend::train::TrainBackend,
    error::Result,
    ops::{Cost, Grid, Op, Tolerance, download, expect, noise_buf, poison},
};

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct SwigluBwd {
    /// Tokens.
    pub rows: usize,
    /// Width of the feed-forward layer.
    pub ffn_dim: usize,
}

impl SwigluBwd {
    /// Buffer lengths fit the sizes.
    ///
    /// # Errors
    /// `Op` names what does not.
    pub fn check(&self, d_gate_up: usize, dh: usize, gate_up: usize) -> Result<()> {
        let n = self.rows * self.ffn_dim;
        expect(Self::STEM, d_gate_up >= 2 * n && dh >= n && gate_up >= 2 * n, || {
            format!("d_gate_up has {d_gate_up} elements, dh {dh} and gate_up {gate_up}: too few for {self:?}")
        })
    }

    /// Blocks over rows and columns, 8 elements a thread.
    pub fn grid(&self) -> Grid {
        Grid::of_vectors(self.rows, self.ffn_dim)
    }

    /// The definition.
    pub fn reference<X: Real>(&self, d_gate_up: &mut [X], dh: &[X], gate_up: &[X]) {
        let n = self.ffn_dim;
        let rows = d_gate_up.chunks_exact_mut(2 * n).zip(dh.chunks_exact(n)).zip(gate_up.chunks_exact(2 * n));
        for ((d, dh), gate_up) in rows.take(self.rows) {
            for i in 0..n {
                let (dh, g, u) = (dh[i].get(), gate_up[i].get(), gate_up[n + i].get());
                let s = 1.0 / (1.0 + (-g).exp());
                d[i] = X::put(dh * u * s * (1.0 + g * (1.0 - s)));
                d[n + i] = X::put(dh * g * s);
            }
        }
    }

    /// The kernel.
    ///
    /// # Errors
    /// As `check`; a width that the kernel does not take; those of the launch.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        cu: &crate::backend::cuda::Cuda,
        d_gate_up: &mut crate::backend::cuda::Buffer<half::bf16>,
        dh: &crate::backend::cuda::Buffer<half::bf16>,
        gate_up: &crate::backend::cuda::Buffer<half::bf16>,
    ) -> Result<()> {
        self.check(d_gate_up.len(), dh.len(), gate_up.len())?;
        super::expect_chunks(Self::STEM, self, &[self.ffn_dim], &[])?;
        crate::ops::expect_ints(Self::STEM, &[self.rows, self.ffn_dim])?;
        let args = [d_gate_up.into(), dh.into(), gate_up.into(), self.ffn_dim.into()];
        // SAFETY: check() proved that rows rows of each buffer exist; the arguments are those of the kernel, in order.
        unsafe { cu.launch("swiglu_bwd_bf16", self, self.grid(), &args) }
    }
}

impl Op for SwigluBwd {
    const STEM: &'static str = "swiglu_bwd";
    type Io<B: TrainBackend> = (B::Buf<B::Act>, B::Buf<B::Act>, B::Buf<B::Act>);

    fn cases() -> Vec<Self> {
        [(1, 8), (3, 1032), (50, 768), (4096, 14336)].map(|(rows, ffn_dim)| SwigluBwd { rows, ffn_dim }).into()
    }

    fn odd() -> Vec<Self> {
        [(1, 1), (3, 17)].map(|(rows, ffn_dim)| SwigluBwd { rows, ffn_dim }).into()
    }

    fn cost(&self) -> Cost {
        let n = (self.rows * self.ffn_dim) as u64;
        Cost { read: 6 * n, write: 4 * n, flops: 11 * n }
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance::BF16
    }

    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>> {
        let n = self.rows * self.ffn_dim;
        Ok((poison(b, 2 * n)?, noise_buf(b, n, seed, 2.0)?, noise_buf(b, 2 * n, seed + 1, 4.0)?))
    }

    fn run<B: TrainBackend>(&self, b: &B, (d, dh, gate_up): &mut Self::Io<B>) -> Result<()> {
        b.swiglu_bwd(self, d, dh, gate_up)
    }

    fn outputs<B: TrainBackend>(&self, b: &B, (d, ..): &Self::Io<B>) -> Result<Vec<f32>> {
        download(b, d)
    }
}

#[cfg(test)]
mod tests {
    use super::super::checks::{gradient, values};
    use super::*;

    #[test]
    fn is_the_gradient_of_swiglu() {
        let op = SwigluBwd { rows: 2, ffn_dim: 5 };
        let (gate_up, dh) = (values(20, 1, 3.0), values(10, 2, 1.0));
        let mut d = vec![f64::NAN; 20];
        op.reference(&mut d, &dh, &gate_up);
        let loss = |x: &[f64]| {
            let h = |i: usize| {
                let (g, u) = (x[i / 5 * 10 + i % 5], x[i / 5 * 10 + 5 + i % 5]);
                g / (1.0 + (-g).exp()) * u
            };
            (0..10).map(|i| h(i) * dh[i]).sum()
        };
        gradient("swiglu_bwd", loss, &gate_up, &d);
    }
}
