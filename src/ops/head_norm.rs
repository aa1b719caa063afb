//! `h = norm(h) * gain` of each q and k head `h`, before its rotation: [`RmsNorm`](super::RmsNorm) over a head (Qwen3).
//!
//! Shapes: `qkv` [rows, (n_heads + 2 n_kv_heads) * head_dim], of which the q and k heads are normed in place; `gains` [2, head_dim], that
//! of q heads and that of k heads.
//! Rounding: sums in f32, one rounding at the store.

use super::{Act, Cost, Grid, Op, Tolerance, download, expect, noise_buf, noise_weight};
use crate::{backend::train::TrainBackend, error::Result};

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadNorm {
    /// Tokens.
    pub rows: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key heads, as many as value heads.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Added to the mean square.
    pub eps: f32,
}

impl HeadNorm {
    /// Elements of a row of `qkv`.
    pub fn qkv_dim(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
    }

    /// Buffer lengths fit the sizes.
    pub fn check(&self, qkv: usize, gains: (usize, usize)) -> Result<()> {
        expect(Self::STEM, gains == (2, self.head_dim), || format!("gains is {gains:?}, {self:?}"))?;
        expect(Self::STEM, self.rows > 0 && self.head_dim > 0 && qkv >= self.rows * self.qkv_dim(), || {
            format!("qkv has {qkv} elements, {self:?}")
        })
    }

    /// A warp for each head of a row.
    pub fn grid(&self) -> Grid {
        let threads = crate::tiles::VECTOR_THREADS;
        let heads = (self.n_heads + self.n_kv_heads) as u32;
        Grid { blocks: [self.rows as u32, heads.div_ceil(threads / 32), 1], threads, shared: 0 }
    }

    /// The definition.
    pub fn reference<A: Act, W: Act>(&self, qkv: &mut [A], gains: &[W]) {
        let (of_q, of_k) = gains.split_at(self.head_dim);
        for row in qkv.chunks_exact_mut(self.qkv_dim()).take(self.rows) {
            let heads = row.chunks_exact_mut(self.head_dim).take(self.n_heads + self.n_kv_heads).enumerate();
            for (h, head) in heads {
                let sum: f32 = head.iter().map(|x| x.to_f32() * x.to_f32()).sum();
                let scale = 1.0 / (sum / self.head_dim as f32 + self.eps).sqrt();
                for (x, gain) in head.iter_mut().zip(if h < self.n_heads { of_q } else { of_k }) {
                    *x = A::from_f32(x.to_f32() * scale * gain.to_f32());
                }
            }
        }
    }

    /// The kernel.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        cu: &crate::backend::cuda::Cuda,
        qkv: &mut crate::backend::cuda::Buffer<half::bf16>,
        gains: &crate::backend::cuda::Weight,
    ) -> Result<()> {
        self.check(qkv.len(), (gains.rows, gains.cols))?;
        expect(Self::STEM, self.head_dim.is_multiple_of(8), || {
            format!("{self:?}: the kernel needs head_dim % 8 == 0; the CPU runs any head_dim")
        })?;
        super::expect_ints(Self::STEM, &[self.rows, self.qkv_dim()])?;
        let (sizes, grid) = ([self.n_heads, self.n_kv_heads, self.head_dim], self.grid());
        let [n_heads, n_kv_heads, head_dim] = sizes.map(crate::backend::cuda::Arg::from);
        let gains = (&gains.data).into();
        // SAFETY: check() proved that rows rows of qkv and two gains exist. The arguments are those of the kernel, in order.
        unsafe {
            let trace = cu.trace(self, grid);
            let args = [qkv.into(), gains, n_heads, n_kv_heads, head_dim, self.eps.into(), trace];
            cu.launch("head_norm_bf16", self, grid, &args)
        }
    }
}

impl Op for HeadNorm {
    const STEM: &'static str = "head_norm";
    type Io<B: TrainBackend> = (B::Buf<B::Act>, B::Weight);

    fn cases() -> Vec<Self> {
        let case = |rows, n_heads, n_kv_heads, head_dim| HeadNorm { rows, n_heads, n_kv_heads, head_dim, eps: 1e-6 };
        vec![
            case(1, 1, 1, 8),
            case(3, 3, 1, 48),
            case(5, 9, 3, 64),
            case(2, 4, 2, 80),
            case(2, 5, 1, 264), // more than a warp takes at once
            case(1, 32, 8, 128),
            case(512, 32, 8, 128), // Qwen3-8B
        ]
    }

    fn cost(&self) -> Cost {
        let normed = (self.rows * (self.n_heads + self.n_kv_heads) * self.head_dim) as u64;
        Cost { read: 2 * normed + 4 * self.head_dim as u64, write: 2 * normed, flops: 4 * normed }
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance::BF16
    }

    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>> {
        let gains = noise_weight(b, 2, self.head_dim, seed + 1, 1.0)?;
        Ok((noise_buf(b, self.rows * self.qkv_dim(), seed, 3.0)?, gains))
    }

    fn run<B: TrainBackend>(&self, b: &B, (qkv, gains): &mut Self::Io<B>) -> Result<()> {
        b.head_norm(self, qkv, gains)
    }

    fn outputs<B: TrainBackend>(&self, b: &B, (qkv, ..): &Self::Io<B>) -> Result<Vec<f32>> {
        download(b, qkv)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn q_and_k_have_gains_of_their_own_and_v_stays() {
        let op = HeadNorm { rows: 1, n_heads: 1, n_kv_heads: 1, head_dim: 2, eps: 0.0 };
        let mut qkv = [3.0, 4.0, -6.0, 8.0, 5.0, 6.0f32];
        op.reference(&mut qkv, &[1.0, 2.0, 10.0, 20.0f32]);
        let rms = 12.5f32.sqrt();
        let want = [3.0 / rms, 8.0 / rms, -30.0 / rms, 80.0 / rms, 5.0, 6.0];
        assert!(qkv.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-5), "{qkv:?}");
    }

    #[test]
    fn check_and_grid() {
        let op = HeadNorm { rows: 2, n_heads: 9, n_kv_heads: 3, head_dim: 64, eps: 1e-6 };
        let n = 2 * op.qkv_dim();
        assert!(op.check(n, (2, 64)).is_ok());
        assert!(op.check(n - 1, (2, 64)).unwrap_err().to_string().starts_with("head_norm: qkv has 1919 elements"));
        assert!(op.check(n, (1, 64)).unwrap_err().to_string().starts_with("head_norm: gains is (1, 64)"));
        assert_eq!(op.grid().blocks, [2, 3, 1]); // 12 heads, 4 a block
    }
}
