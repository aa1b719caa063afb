//! Causal attention of documents that lie one after the other: a row sees the rows of its own document up to itself.
//! `out = softmax(q k^T / sqrt(head_dim)) v`, and `lse = ln sum exp` of each row and head for the backward pass.
//!
//! Shapes: `out` [rows, n_heads * head_dim], `lse` [rows, n_heads] f32, `qkv` [rows, (n_heads + 2 n_kv_heads) * head_dim] with rotated q
//! and k, `starts` [documents + 1]: the first row of each document, and `rows`.

use super::{Real, poison_f32};
use crate::{
    backend::train::TrainBackend,
    error::Result,
    ops::{Cost, Grid, Op, Tolerance, download, expect, noise_buf, poison},
    tiles,
};

/// What the kernels are compiled for.
#[cfg(feature = "cuda")]
const HEAD_DIMS: [usize; 4] = [64, 80, 96, 128];

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct AttnPacked {
    /// Tokens.
    pub rows: usize,
    /// Documents. The caller ensures that `starts` rises from 0 to `rows`.
    pub documents: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key heads, as many as value heads.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl AttnPacked {
    /// Elements of a row of `qkv`.
    pub fn qkv_dim(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
    }

    /// Elements of a row of `out`.
    pub fn q_dim(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Buffer lengths fit the sizes.
    ///
    /// # Errors
    /// `Op` names what does not.
    pub fn check(&self, out: usize, lse: usize, qkv: usize, starts: usize) -> Result<()> {
        expect(Self::STEM, self.n_kv_heads > 0 && self.n_heads.is_multiple_of(self.n_kv_heads), || {
            format!("{self:?}: n_heads must be a multiple of n_kv_heads")
        })?;
        expect(Self::STEM, out >= self.rows * self.q_dim() && lse >= self.rows * self.n_heads, || {
            format!("out has {out} elements and lse {lse}: too few for {self:?}")
        })?;
        expect(Self::STEM, qkv >= self.rows * self.qkv_dim() && starts > self.documents, || {
            format!("qkv has {qkv} elements and starts {starts}: too few for {self:?}")
        })
    }

    /// The weights that row `r`, head `h` gives the rows `start..=r`, and their `lse`.
    pub(super) fn weights<X: Real>(&self, qkv: &[X], start: usize, r: usize, h: usize) -> (Vec<f64>, f64) {
        let d = self.head_dim;
        let q = &qkv[r * self.qkv_dim() + h * d..][..d];
        let kv_head = self.n_heads + h / (self.n_heads / self.n_kv_heads);
        let score = |t: usize| {
            let k = &qkv[t * self.qkv_dim() + kv_head * d..][..d];
            q.iter().zip(k).map(|(q, k)| q.get() * k.get()).sum::<f64>() / (d as f64).sqrt()
        };
        let scores: Vec<f64> = (start..=r).map(score).collect();
        let max = scores.iter().fold(f64::NEG_INFINITY, |m, s| m.max(*s));
        let lse = max + scores.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
        (scores.iter().map(|s| (s - lse).exp()).collect(), lse)
    }

    /// The definition.
    pub fn reference<X: Real, P: Real>(&self, out: &mut [X], lse: &mut [P], qkv: &[X], starts: &[u32]) {
        let (d, group) = (self.head_dim, self.n_heads / self.n_kv_heads);
        for document in starts[..=self.documents].windows(2) {
            let (start, end) = (document[0] as usize, document[1] as usize);
            for r in start..end {
                for h in 0..self.n_heads {
                    let (p, l) = self.weights(qkv, start, r, h);
                    lse[r * self.n_heads + h] = P::put(l);
                    let v = (self.n_heads + self.n_kv_heads + h / group) * d;
                    for i in 0..d {
                        let term = |(t, p): (usize, &f64)| p * qkv[(start + t) * self.qkv_dim() + v + i].get();
                        out[r * self.q_dim() + h * d + i] = X::put(p.iter().enumerate().map(term).sum());
                    }
                }
            }
        }
    }

    /// Documents of lengths that differ, one of them a single token, for cases.
    pub(super) fn starts(&self) -> Vec<u32> {
        let at = |i: usize| (self.rows * i * (i + 1) / (self.documents * (self.documents + 1))) as u32;
        (0..=self.documents).map(|i| at(i).max(i as u32)).collect()
    }

    /// Pairs of a row and what it sees, when documents are as [`AttnPacked::starts`] has them.
    pub(super) fn pairs(&self) -> u64 {
        let pairs = |w: &[u32]| u64::from(w[1] - w[0]) * u64::from(w[1] - w[0] + 1) / 2;
        self.starts().windows(2).map(pairs).sum()
    }

    /// Blocks over query heads and rows.
    pub fn grid(&self) -> Grid {
        self.grid_of(self.n_heads, 0)
    }

    /// Blocks over heads and rows; besides the tiles, `held` rows of two matrices are in shared memory.
    pub(super) fn grid_of(&self, heads: usize, held: u32) -> Grid {
        let width = if self.head_dim <= 64 { 64 } else { 128 }; // of a row in shared memory
        let rows = tiles::PACKED_STAGES * tiles::PACKED_TILE + held;
        Grid {
            blocks: [heads as u32, self.rows.div_ceil(tiles::PACKED_ROWS as usize) as u32, 1],
            threads: tiles::PACKED_THREADS,
            shared: 2 * rows * width * size_of::<half::bf16>() as u32,
        }
    }

    /// The kernels take these sizes.
    #[cfg(feature = "cuda")]
    pub(crate) fn check_kernel(&self, op: &'static str) -> Result<()> {
        expect(op, HEAD_DIMS.contains(&self.head_dim), || {
            format!("head_dim is {}, the kernels are for 64, 80, 96 and 128", self.head_dim)
        })?;
        crate::ops::expect_ints(op, &[self.rows, self.documents, self.rows * self.n_heads])?;
        let blocks = self.rows.div_ceil(tiles::PACKED_ROWS as usize);
        expect(op, self.rows > 0 && self.documents > 0 && blocks <= 0xffff, || {
            format!("{self:?}: the kernels take 1 to 4 million rows, of one document or more")
        })
    }

    /// The kernel.
    ///
    /// # Errors
    /// As `check`; sizes that the kernel does not take; those of the launch.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        cu: &crate::backend::cuda::Cuda,
        out: &mut crate::backend::cuda::Buffer<half::bf16>,
        lse: &mut crate::backend::cuda::Buffer<f32>,
        qkv: &crate::backend::cuda::Buffer<half::bf16>,
        starts: &crate::backend::cuda::Buffer<u32>,
    ) -> Result<()> {
        use crate::backend::cuda::Arg;
        self.check(out.len(), lse.len(), qkv.len(), starts.len())?;
        self.check_kernel(Self::STEM)?;
        let scale = std::f32::consts::LOG2_E / (self.head_dim as f32).sqrt();
        let sizes = [self.rows, self.documents, self.n_heads, self.n_kv_heads].map(Arg::from);
        let buffers: [Arg; 4] = [out.into(), lse.into(), qkv.into(), starts.into()];
        let args = [&buffers[..], &sizes, &[scale.into()]].concat();
        // SAFETY: check() proved that out, lse and qkv hold rows rows and starts documents + 1 elements; that these rise from 0 to
        // rows is the caller's promise. The arguments are those of the kernel, in order.
        unsafe { cu.launch(&format!("attn_packed_bf16_d{}", self.head_dim), self, self.grid(), &args) }
    }
}

impl Op for AttnPacked {
    const STEM: &'static str = "attn_packed";
    /// `out`, `lse`, `qkv`, `starts`
    type Io<B: TrainBackend> = (B::Buf<B::Act>, B::Buf<f32>, B::Buf<B::Act>, B::Buf<u32>);

    fn cases() -> Vec<Self> {
        let case = |rows, documents, n_heads, n_kv_heads, head_dim| AttnPacked {
            rows,
            documents,
            n_heads,
            n_kv_heads,
            head_dim,
        };
        vec![
            case(1, 1, 1, 1, 64),
            case(5, 5, 2, 1, 64), // single tokens
            case(9, 2, 4, 2, 128),
            case(170, 3, 9, 3, 64), // documents that begin and end within tiles and blocks
            case(140, 1, 2, 2, 128),
            case(70, 2, 2, 1, 80),
            case(67, 3, 2, 2, 96),
            case(4096, 1, 32, 8, 128),
            case(4096, 9, 32, 8, 128),
        ]
    }

    fn odd() -> Vec<Self> {
        [(1, 1, 1, 1, 2), (5, 5, 2, 1, 8), (9, 2, 4, 2, 24)]
            .map(|(rows, documents, n_heads, n_kv_heads, head_dim)| AttnPacked {
                rows,
                documents,
                n_heads,
                n_kv_heads,
                head_dim,
            })
            .into()
    }

    fn cost(&self) -> Cost {
        let (out, qkv) = ((self.rows * self.q_dim()) as u64, (self.rows * self.qkv_dim()) as u64);
        let flops = 4 * self.pairs() * self.q_dim() as u64;
        Cost { read: 2 * qkv, write: 2 * out + 4 * (self.rows * self.n_heads) as u64, flops }
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance::BF16
    }

    /// As [`AttnPrefill`](crate::ops::AttnPrefill), whose weights the kernel rounds likewise.
    fn kernel_tolerance(&self) -> Tolerance {
        Tolerance { l2: 2.5e-3, worst: 1.1e-2 }
    }

    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>> {
        Ok((
            poison(b, self.rows * self.q_dim())?,
            poison_f32(b, self.rows * self.n_heads)?,
            noise_buf(b, self.rows * self.qkv_dim(), seed, 2.0)?,
            b.upload(&self.starts())?,
        ))
    }

    fn run<B: TrainBackend>(&self, b: &B, (out, lse, qkv, starts): &mut Self::Io<B>) -> Result<()> {
        b.attn_packed(self, out, lse, qkv, starts)
    }

    fn outputs<B: TrainBackend>(&self, b: &B, (out, lse, ..): &Self::Io<B>) -> Result<Vec<f32>> {
        Ok([download(b, out)?, b.download(lse)?].concat())
    }
}
