//! `hb[r, i] = silu(gate[r, i]) * up[r, i]`, `silu(g) = g / (1 + exp(-g))` (Shazeer 2020).
//!
//! Shapes: `hb` [rows, ffn_dim]; `gate_up` [rows, 2 * ffn_dim], a row holds gate and then up.
//! Rounding: f32 arithmetic, one rounding at the store.

use super::{Act, Cost, Grid, Op, Tolerance, download, expect, noise_buf, poison};
use crate::{backend::train::TrainBackend, error::Result};

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct Swiglu {
    /// Tokens.
    pub rows: usize,
    /// Width of gate and of up.
    pub ffn_dim: usize,
}

impl Swiglu {
    /// Buffer lengths fit the sizes.
    pub fn check(&self, hb: usize, gate_up: usize) -> Result<()> {
        let n = self.rows * self.ffn_dim;
        expect(Self::STEM, n > 0 && hb >= n && gate_up >= 2 * n, || {
            format!("hb has {hb} elements and gate_up {gate_up}, {self:?}")
        })
    }

    /// Blocks over rows and columns, 8 elements a thread.
    pub fn grid(&self) -> Grid {
        Grid::of_vectors(self.rows, self.ffn_dim)
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
        cu: &crate::backend::cuda::Cuda,
        hb: &mut crate::backend::cuda::Buffer<half::bf16>,
        gate_up: &crate::backend::cuda::Buffer<half::bf16>,
    ) -> Result<()> {
        self.check(hb.len(), gate_up.len())?;
        expect(Self::STEM, self.ffn_dim.is_multiple_of(8), || format!("{self:?}: the kernel needs ffn_dim % 8 == 0"))?;
        super::expect_ints(Self::STEM, &[self.rows, self.ffn_dim])?;
        // SAFETY: check() proved that rows rows of hb and of gate_up exist; the arguments are those of the kernel, in order.
        unsafe {
            cu.launch(
                "swiglu_bf16",
                self,
                self.grid(),
                &[hb.into(), gate_up.into(), self.ffn_dim.into(), cu.trace(self, self.grid())],
            )
        }
    }
}

impl Op for Swiglu {
    const STEM: &'static str = "swiglu";
    type Io<B: TrainBackend> = (B::Buf<B::Act>, B::Buf<B::Act>);

    fn cases() -> Vec<Self> {
        let case = |rows, ffn_dim| Swiglu { rows, ffn_dim };
        vec![case(1, 8), case(3, 1536), case(5, 1032), case(1, 14336), case(512, 14336)]
    }

    fn cost(&self) -> Cost {
        let n = (self.rows * self.ffn_dim) as u64;
        Cost { read: 4 * n, write: 2 * n, flops: 5 * n }
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance::BF16
    }

    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>> {
        let n = self.rows * self.ffn_dim;
        Ok((poison(b, n)?, noise_buf(b, 2 * n, seed, 12.0)?)) // 12: both tails of silu
    }

    fn run<B: TrainBackend>(&self, b: &B, (hb, gate_up): &mut Self::Io<B>) -> Result<()> {
        b.swiglu(self, hb, gate_up)
    }

    fn outputs<B: TrainBackend>(&self, b: &B, (hb, _): &Self::Io<B>) -> Result<Vec<f32>> {
        download(b, hb)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tails_and_the_middle() {
        let op = Swiglu { rows: 2, ffn_dim: 2 };
        let mut hb = [f32::NAN; 4];
        op.reference(&mut hb, &[0.0, 100.0, 7.0, 2.0, -200.0, 1.0, 3.0, -1.0f32]);
        assert_eq!(hb[..3], [0.0, 200.0, 0.0]);
        assert!((hb[3] + 0.731_058_6).abs() < 1e-6, "{}", hb[3]);
    }

    #[test]
    fn check_and_grid() {
        let op = Swiglu { rows: 2, ffn_dim: 14336 };
        assert!(op.check(28672, 57344).is_ok());
        assert!(op.check(28672, 57343).unwrap_err().to_string().starts_with("swiglu: hb has 28672 elements"));
        assert_eq!(op.grid().blocks, [2, 14, 1]);
    }
}
