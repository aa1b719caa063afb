//! `hb[r] = silu(norm(x[r]) w_gate^T) * (norm(x[r]) w_up^T)`, and biases where `w` has them: the first half of a layer's feed-forward network.
//!
//! Fuses `rms_norm`, `matmul` and `swiglu`, which are its definition ([`crate::backend::definition`]).
//! Shapes: `hb` [rows, ffn_dim]; `x` [rows, dim]; `gain` [dim]; `w` [2 * ffn_dim, dim], the rows of gate and then those of up.
//! Rounding: the kernel rounds `x * gain` to bf16 where the definition rounds `x * gain / rms`, and does not round gate
//! and up. The bits of a row depend on the row and the weights only.

use super::{
    Cost, Grid, Op, Ring, RmsNorm, Swiglu, Tolerance, download, expect, gemv::product, noise_buf, noise_weight, poison,
};
use crate::{
    backend::{Backend, DECODE_ROWS, train::TrainBackend},
    error::Result,
};

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct NormGateUp {
    /// Tokens.
    pub rows: usize,
    /// Width of `x`.
    pub dim: usize,
    /// Width of gate and of up.
    pub ffn_dim: usize,
    /// Added to the mean square.
    pub eps: f32,
}

impl NormGateUp {
    /// The first op of the definition.
    pub fn norm(&self) -> RmsNorm {
        RmsNorm { rows: self.rows, first: 0, dim: self.dim, eps: self.eps }
    }

    /// The last.
    pub fn swiglu(&self) -> Swiglu {
        Swiglu { rows: self.rows, ffn_dim: self.ffn_dim }
    }

    /// Buffer lengths fit the sizes, and the sizes the kernel.
    pub fn check(&self, hb: usize, x: usize, gain: usize, w: (usize, usize)) -> Result<()> {
        expect(Self::STEM, (1..=DECODE_ROWS).contains(&self.rows), || {
            format!("{self:?}: the kernel takes 1 to {DECODE_ROWS} rows")
        })?;
        let whole = |n: usize| n > 0 && n.is_multiple_of(8);
        expect(Self::STEM, whole(self.dim) && whole(self.ffn_dim), || {
            format!("{self:?}: the kernel needs dim % 8 == 0 and ffn_dim % 8 == 0")
        })?;
        expect(Self::STEM, w == (2 * self.ffn_dim, self.dim) && gain == self.dim, || {
            format!("w is {w:?} and gain has {gain} elements, {self:?}")
        })?;
        expect(Self::STEM, x >= self.rows * self.dim && hb >= self.rows * self.ffn_dim, || {
            format!("hb has {hb} elements and x {x}, {self:?}")
        })
    }

    /// A block owns 8 rows of gate and the same 8 of up.
    pub fn grid(&self, ring: Ring) -> Grid {
        product(2 * self.ffn_dim, self.rows, true, ring).0
    }

    /// The kernel.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        cu: &crate::backend::cuda::Cuda,
        hb: &mut crate::backend::cuda::Buffer<half::bf16>,
        x: &crate::backend::cuda::Buffer<half::bf16>,
        gain: &crate::backend::cuda::Weight,
        w: &crate::backend::cuda::Weight,
    ) -> Result<()> {
        self.check(hb.len(), x.len(), gain.data.len(), (w.rows, w.cols))?;
        super::expect_ints(Self::STEM, &[self.dim, 2 * self.ffn_dim])?;
        let [rows, dim, ffn_dim] = [self.rows, self.dim, self.ffn_dim].map(crate::backend::cuda::Arg::from);
        let (grid, kind) = w.product(self.rows, true, cu.ring());
        let (weights, bias) = ([(&gain.data).into(), (&w.data).into()], w.bias.as_ref().into());
        let (eps, trace) = (self.eps.into(), cu.trace(self, grid));
        let args = [hb.into(), x.into(), weights[0], weights[1], bias, rows, dim, ffn_dim, eps, trace];
        // SAFETY: check() proved that every buffer holds what the sizes say, that rows of w and x are 16-byte aligned and
        // that gate is whole groups of 8 rows; the arguments are those of the kernel, in order; it waits for its predecessor
        // before it reads what that wrote.
        unsafe { cu.launch_dependent(&format!("norm_gate_up_{}_{kind}", w.kind.name()), self, grid, &args) }
    }
}

/// The buffers of one call.
pub struct Io<B: Backend> {
    hb: B::Buf<B::Act>,
    xb: B::Buf<B::Act>,
    gate_up: B::Buf<B::Act>,
    x: B::Buf<B::Act>,
    gain: B::Weight,
    w: B::Weight,
}

impl Op for NormGateUp {
    const STEM: &'static str = "norm_gate_up";
    type Io<B: TrainBackend> = Io<B>;

    fn cases() -> Vec<Self> {
        let case = |(rows, dim, ffn_dim)| NormGateUp { rows, dim, ffn_dim, eps: 1e-5 };
        let shapes = [
            (1, 8, 8),        // one chunk of a row, one block
            (3, 72, 24),      // just past a stage
            (8, 1032, 16),    // the last warps have one stage less
            (2, 2056, 8),     // past a round of the ring
            (1, 2056, 8),     // of the deep one
            (16, 1032, 16),   // all rows
            (11, 264, 8),     // a second group of rows that is not full
            (1, 256, 704),    // the demo
            (1, 576, 1536),   // SmolLM2-135M
            (1, 4096, 14336), // Llama-3-8B
            (8, 4096, 14336),
            (16, 4096, 14336),
        ];
        shapes.into_iter().map(case).collect()
    }

    fn cost(&self) -> Cost {
        let [rows, dim, ffn] = [self.rows, self.dim, self.ffn_dim].map(|n| n as u64);
        Cost {
            read: 4 * ffn * dim + 2 * dim + 2 * rows * dim,
            write: 2 * rows * ffn,
            flops: 4 * rows * ffn * dim + 4 * rows * dim + 5 * rows * ffn,
        }
    }

    /// The definition rounds four times on the way. It is off from the same in f32 by up to 6.1e-3 (L2), at worst
    /// 1.9e-2, and the kernel by 4.4e-3 and 1.8e-2 (529 calls, random models of 15 seeds). The worst outputs are near a
    /// zero of silu: there the error of gate is multiplied by up, which can be large.
    fn tolerance(&self) -> Tolerance {
        Tolerance { l2: 9e-3, worst: 2.2e-2 }
    }

    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Io<B>> {
        let scale = 2.0 / (self.dim as f32).sqrt(); // gates of about 1: silu is neither 0 nor straight
        Ok(Io {
            hb: poison(b, self.rows * self.ffn_dim)?,
            xb: poison(b, self.rows * self.dim)?,
            gate_up: poison(b, self.rows * 2 * self.ffn_dim)?,
            x: noise_buf(b, self.rows * self.dim, seed, 3.0)?,
            gain: noise_weight(b, 1, self.dim, seed + 1, 1.0)?,
            w: noise_weight(b, 2 * self.ffn_dim, self.dim, seed + 2, scale)?,
        })
    }

    fn run<B: TrainBackend>(&self, b: &B, io: &mut Io<B>) -> Result<()> {
        b.norm_gate_up(self, &mut io.hb, &mut io.xb, &mut io.gate_up, &io.x, &io.gain, &io.w)
    }

    fn outputs<B: TrainBackend>(&self, b: &B, io: &Io<B>) -> Result<Vec<f32>> {
        download(b, &io.hb)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_names_what_is_wrong() {
        let op = NormGateUp { rows: 2, dim: 64, ffn_dim: 24, eps: 1e-5 };
        let text = |r: Result<()>| r.unwrap_err().to_string();
        assert!(op.check(48, 128, 64, (48, 64)).is_ok());
        assert!(text(op.check(47, 128, 64, (48, 64))).starts_with("norm_gate_up: hb has 47 elements and x 128"));
        assert!(text(op.check(48, 128, 63, (48, 64))).contains("gain has 63 elements"));
        assert!(text(op.check(48, 128, 64, (24, 64))).contains("w is (24, 64)"));
        let wrong = |op: NormGateUp| text(op.check(99, 999, 64, (48, 64)));
        assert!(wrong(NormGateUp { rows: 0, ..op.clone() }).ends_with("1 to 16 rows"));
        assert!(wrong(NormGateUp { ffn_dim: 20, ..op }).ends_with("ffn_dim % 8 == 0"));
    }

    #[test]
    fn blocks_cover_gate_and_up() {
        assert_eq!(NormGateUp { rows: 1, dim: 4096, ffn_dim: 14336, eps: 1e-5 }.grid(Ring::Short).blocks, [1792, 1, 1]);
    }
}
