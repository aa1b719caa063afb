//! `logits[r] = norm(x[first + r]) w^T`, in f32: the step from the residual stream to logits.
//!
//! Fuses `rms_norm` and `matmul`, which are its definition ([`crate::backend::definition`]).
//! Shapes: `logits` [rows, vocab] f32; `x` [first + rows, dim]; `gain` [dim]; `w` [vocab, dim].
//! Rounding: the kernel rounds `x * gain` to bf16 where the definition rounds `x * gain / rms`; the logits stay in f32.
//! The bits of a row depend on the row and the weights only.

use super::{Cost, Grid, Op, Ring, RmsNorm, Tolerance, expect, gemv::product, noise_buf, noise_weight, poison};
use crate::{
    backend::{Backend, DECODE_ROWS, train::TrainBackend},
    error::Result,
    tiles,
};

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct NormHead {
    /// Rows of logits.
    pub rows: usize,
    /// The first row of `x`.
    pub first: usize,
    /// Width of `x`.
    pub dim: usize,
    /// Width of `logits`.
    pub vocab: usize,
    /// Added to the mean square.
    pub eps: f32,
}

impl NormHead {
    /// The first op of the definition.
    pub fn norm(&self) -> RmsNorm {
        RmsNorm { rows: self.rows, first: self.first, dim: self.dim, eps: self.eps }
    }

    /// Buffer lengths fit the sizes, and the sizes the kernel.
    pub fn check(&self, logits: usize, x: usize, gain: usize, w: (usize, usize)) -> Result<()> {
        expect(Self::STEM, (1..=DECODE_ROWS).contains(&self.rows), || {
            format!("{self:?}: the kernel takes 1 to {DECODE_ROWS} rows")
        })?;
        let enough = self.vocab >= tiles::GEMV_TILE as usize;
        expect(Self::STEM, self.dim > 0 && self.dim.is_multiple_of(8) && enough, || {
            format!("{self:?}: the kernel needs dim % 8 == 0 and a vocabulary of {} or more", tiles::GEMV_TILE)
        })?;
        expect(Self::STEM, w == (self.vocab, self.dim) && gain == self.dim, || {
            format!("w is {w:?} and gain has {gain} elements, {self:?}")
        })?;
        expect(Self::STEM, x >= (self.first + self.rows) * self.dim && logits >= self.rows * self.vocab, || {
            format!("logits has {logits} elements and x {x}, {self:?}")
        })
    }

    /// A block owns 16 rows of `w`.
    pub fn grid(&self, ring: Ring) -> Grid {
        product(self.vocab, self.rows, true, ring).0
    }

    /// The kernel; its first row of `logits` is `at`.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        cu: &crate::backend::cuda::Cuda,
        logits: &mut crate::backend::cuda::Buffer<f32>,
        at: usize,
        x: &crate::backend::cuda::Buffer<half::bf16>,
        gain: &crate::backend::cuda::Weight,
        w: &crate::backend::cuda::Weight,
    ) -> Result<()> {
        let offset = at * self.vocab;
        self.check(logits.len().saturating_sub(offset), x.len(), gain.data.len(), (w.rows, w.cols))?;
        let sizes = [self.rows, self.first, self.dim, self.vocab];
        super::expect_ints(Self::STEM, &sizes)?;
        let [rows, first, dim, vocab] = sizes.map(crate::backend::cuda::Arg::from);
        let (grid, kind) = w.product(self.rows, true, cu.ring());
        let logits = crate::backend::cuda::Arg::from(logits).after(offset * size_of::<f32>());
        let buffers = [logits, x.into(), (&gain.data).into(), (&w.data).into()];
        let scalars = [rows, first, dim, vocab, self.eps.into(), cu.trace(self, grid)];
        let args = [&buffers[..], &scalars].concat();
        // SAFETY: check() proved that every buffer holds what the sizes say, that rows of w and x are 16-byte aligned and
        // that w has the rows of a block; the arguments are those of the kernel, in order; it waits for its predecessor
        // before it reads what that wrote.
        unsafe { cu.launch_dependent(&format!("norm_head_{}_{kind}", w.kind.name()), self, grid, &args) }
    }
}

/// The buffers of one call.
pub struct Io<B: Backend> {
    logits: B::Buf<f32>,
    xb: B::Buf<B::Act>,
    x: B::Buf<B::Act>,
    gain: B::Weight,
    w: B::Weight,
}

impl Op for NormHead {
    const STEM: &'static str = "norm_head";
    type Io<B: TrainBackend> = Io<B>;

    fn cases() -> Vec<Self> {
        let case = |(rows, first, dim, vocab)| NormHead { rows, first, dim, vocab, eps: 1e-5 };
        let shapes = [
            (1, 0, 8, 16),     // one chunk of a row, one block
            (3, 2, 72, 33),    // just past a stage; the last block repeats 15 rows of the one before
            (8, 0, 1032, 17),  // the last warps have one stage less
            (16, 1, 1032, 17), // all rows
            (1, 0, 2056, 40),  // past a round of the deep ring
            (1, 4, 64, 512),   // stories260K
            (1, 0, 256, 2048), // the demo
            (1, 0, 576, 49152),
            (1, 0, 4096, 128_256),
            (8, 0, 4096, 128_256),
            (16, 0, 4096, 128_256),
        ];
        shapes.into_iter().map(case).collect()
    }

    fn cost(&self) -> Cost {
        let [rows, dim, vocab] = [self.rows, self.dim, self.vocab].map(|n| n as u64);
        Cost {
            read: 2 * vocab * dim + 2 * dim + 2 * rows * dim,
            write: 4 * rows * vocab,
            flops: 2 * rows * vocab * dim + 4 * rows * dim,
        }
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance::FUSED
    }

    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Io<B>> {
        Ok(Io {
            logits: b.upload(&vec![f32::NAN; self.rows * self.vocab])?,
            xb: poison(b, self.rows * self.dim)?,
            x: noise_buf(b, (self.first + self.rows) * self.dim, seed, 3.0)?,
            gain: noise_weight(b, 1, self.dim, seed + 1, 1.0)?,
            w: noise_weight(b, self.vocab, self.dim, seed + 2, 0.5)?,
        })
    }

    fn run<B: TrainBackend>(&self, b: &B, io: &mut Io<B>) -> Result<()> {
        b.norm_head(self, &mut io.logits, &mut io.xb, &io.x, &io.gain, &io.w)
    }

    fn outputs<B: TrainBackend>(&self, b: &B, io: &Io<B>) -> Result<Vec<f32>> {
        b.download(&io.logits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_names_what_is_wrong() {
        let op = NormHead { rows: 2, first: 1, dim: 64, vocab: 20, eps: 1e-5 };
        let text = |r: Result<()>| r.unwrap_err().to_string();
        assert!(op.check(40, 192, 64, (20, 64)).is_ok());
        assert!(text(op.check(40, 191, 64, (20, 64))).starts_with("norm_head: logits has 40 elements and x 191"));
        assert!(text(op.check(40, 192, 64, (64, 20))).contains("w is (64, 20)"));
        let wrong = |op: NormHead| text(op.check(999, 999, 64, (20, 64)));
        assert!(wrong(NormHead { rows: 17, ..op.clone() }).ends_with("1 to 16 rows"));
        assert!(wrong(NormHead { vocab: 15, ..op }).ends_with("a vocabulary of 16 or more"));
    }

    #[test]
    fn blocks_cover_the_vocabulary() {
        let blocks = |vocab| NormHead { rows: 1, first: 0, dim: 64, vocab, eps: 1e-5 }.grid(Ring::Short).blocks[0];
        assert_eq!([blocks(16), blocks(17), blocks(128_256)], [1, 2, 8016]);
    }
}
