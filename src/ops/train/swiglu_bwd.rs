//! The gradients of gate and up from `dh`, that of [`crate::ops::Swiglu`]'s `h = silu(g) u`: with `s = 1 / (1 + exp(-g))`,
//! `dg = dh u s (1 + g (1 - s))` and `du = dh g s` (SwiGLU, Shazeer 2020).
//!
//! Shapes: `d_gate_up` and `gate_up` [at least rows, 2 ffn_dim], a row is the gate and then the up; `dh` [at least rows, ffn_dim].

use super::{Real, TrainOp};
use crate::{
    backend::{cpu::Cpu, train::TrainBackend},
    error::Result,
    ops::{Act, Cost, Tolerance, download, expect, noise_buf, poison},
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
}

impl TrainOp for SwigluBwd {
    const STEM: &'static str = "swiglu_bwd";
    type Io<B: TrainBackend> = (B::Buf<B::Act>, B::Buf<B::Act>, B::Buf<B::Act>);

    fn cases() -> Vec<Self> {
        [(1, 1), (3, 17), (50, 768)].map(|(rows, ffn_dim)| SwigluBwd { rows, ffn_dim }).into()
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

    fn define<A: Act + Real>(&self, (d, dh, gate_up): &mut Self::Io<Cpu<A>>) {
        self.reference(d, dh, gate_up);
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
