//! `k[s, h, t, :] = ` k head `h` of row `r`, and likewise `v`. Sequence `s` and position `t` are those of the
//! [place](crate::model::kv) `pos[r]`, which is both in one number.
//!
//! Shapes: `k`, `v` [sequences, n_kv_heads, max_seq, head_dim]; `qkv` [rows, (n_heads + 2 n_kv_heads) * head_dim]; `pos` [at least rows].
//! Exact.

use super::{Act, Cost, Grid, Op, Tolerance, download, expect, noise_buf, poison};
use crate::{backend::train::TrainBackend, error::Result};

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct KvAppend {
    /// Tokens.
    pub rows: usize,
    /// Query heads, which lie before the k heads in a row.
    pub n_heads: usize,
    /// Key heads, as many as value heads.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Positions of a sequence. The caller ensures that each place is in the cache, and that no two rows have the same.
    pub max_seq: usize,
}

impl KvAppend {
    /// Elements of a row of `qkv`.
    pub fn qkv_dim(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
    }

    /// Buffer lengths fit the sizes.
    pub fn check(&self, k: usize, v: usize, qkv: usize, pos: usize) -> Result<()> {
        let cache = self.n_kv_heads * self.max_seq * self.head_dim;
        expect(Self::STEM, cache > 0 && k >= cache && v >= cache, || {
            format!("k has {k} elements and v {v}, {self:?}")
        })?;
        expect(Self::STEM, self.rows > 0 && qkv >= self.rows * self.qkv_dim() && pos >= self.rows, || {
            format!("qkv has {qkv} elements and pos {pos}, {self:?}")
        })
    }

    /// Blocks over rows and the elements of their k heads, 8 elements a thread.
    pub fn grid(&self) -> Grid {
        Grid::of_vectors(self.rows, self.n_kv_heads * self.head_dim)
    }

    /// The definition.
    pub fn reference<A: Act>(&self, k: &mut [A], v: &mut [A], qkv: &[A], pos: &[u32]) {
        let d = self.head_dim;
        for (row, &t) in qkv.chunks_exact(self.qkv_dim()).zip(&pos[..self.rows]) {
            let (ks, vs) = row[self.n_heads * d..].split_at(self.n_kv_heads * d);
            for h in 0..self.n_kv_heads {
                let (s, t) = (t as usize / self.max_seq, t as usize % self.max_seq);
                let at = ((s * self.n_kv_heads + h) * self.max_seq + t) * d;
                k[at..at + d].copy_from_slice(&ks[h * d..][..d]);
                v[at..at + d].copy_from_slice(&vs[h * d..][..d]);
            }
        }
    }

    /// The kernel.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        cu: &crate::backend::cuda::Cuda,
        k: &mut crate::backend::cuda::Buffer<half::bf16>,
        v: &mut crate::backend::cuda::Buffer<half::bf16>,
        qkv: &crate::backend::cuda::Buffer<half::bf16>,
        pos: &crate::backend::cuda::Buffer<u32>,
    ) -> Result<()> {
        self.check(k.len(), v.len(), qkv.len(), pos.len())?;
        expect(Self::STEM, self.head_dim.is_multiple_of(8), || {
            format!("{self:?}: the kernel needs head_dim % 8 == 0; the CPU runs any head_dim")
        })?;
        super::expect_ints(Self::STEM, &[self.rows, self.qkv_dim(), self.max_seq])?;
        // SAFETY: check() proved that a sequence of k and v, rows rows of qkv and rows places exist; each place is in the
        // cache by the caller's promise. The arguments are those of the kernel, in order.
        unsafe {
            cu.launch(
                "kv_append_bf16",
                self,
                self.grid(),
                &[
                    k.into(),
                    v.into(),
                    qkv.into(),
                    pos.into(),
                    self.n_heads.into(),
                    self.n_kv_heads.into(),
                    self.head_dim.into(),
                    self.max_seq.into(),
                    cu.trace(self, self.grid()),
                ],
            )
        }
    }
}

impl Op for KvAppend {
    const STEM: &'static str = "kv_append";
    type Io<B: TrainBackend> = (B::Buf<B::Act>, B::Buf<B::Act>, B::Buf<B::Act>, B::Buf<u32>);

    fn cases() -> Vec<Self> {
        let case =
            |rows, n_heads, n_kv_heads, head_dim, max_seq| KvAppend { rows, n_heads, n_kv_heads, head_dim, max_seq };
        vec![
            case(1, 1, 1, 8, 1),
            case(3, 3, 1, 48, 5),
            case(5, 9, 3, 64, 40),
            case(2, 9, 9, 128, 11),
            case(1, 32, 8, 128, 2048),
            case(512, 32, 8, 128, 2048),
        ]
    }

    fn cost(&self) -> Cost {
        let n = (2 * self.rows * self.n_kv_heads * self.head_dim) as u64; // k and v
        Cost { read: 2 * n + 4 * self.rows as u64, write: 2 * n, flops: 0 }
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance::EXACT
    }

    /// The caches are poison, so a copy to a wrong place shows twice. Two sequences; rows go to the end of the second and, when
    /// there are several, to that of the first.
    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>> {
        let cache = 2 * self.n_kv_heads * self.max_seq * self.head_dim;
        let place = |r: usize| ((2 - r % 2) * self.max_seq - 1 - r / 2) as u32;
        Ok((
            poison(b, cache)?,
            poison(b, cache)?,
            noise_buf(b, self.rows * self.qkv_dim(), seed, 3.0)?,
            b.upload(&(0..self.rows).map(place).collect::<Vec<u32>>())?,
        ))
    }

    fn run<B: TrainBackend>(&self, b: &B, (k, v, qkv, pos): &mut Self::Io<B>) -> Result<()> {
        b.kv_append(self, k, v, qkv, pos)
    }

    fn outputs<B: TrainBackend>(&self, b: &B, (k, v, ..): &Self::Io<B>) -> Result<Vec<f32>> {
        Ok([download(b, k)?, download(b, v)?].concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_go_to_their_positions() {
        let op = KvAppend { rows: 1, n_heads: 1, n_kv_heads: 2, head_dim: 1, max_seq: 3 };
        let (mut k, mut v) = ([0f32; 6], [0f32; 6]);
        op.reference(&mut k, &mut v, &[9.0, 1.0, 2.0, 3.0, 4.0], &[1]);
        assert_eq!(k, [0.0, 1.0, 0.0, 0.0, 2.0, 0.0]);
        assert_eq!(v, [0.0, 3.0, 0.0, 0.0, 4.0, 0.0]);
        let (mut k, mut v) = ([0f32; 12], [0f32; 12]);
        op.reference(&mut k, &mut v, &[9.0, 1.0, 2.0, 3.0, 4.0], &[3 + 2]); // of the second sequence
        assert_eq!([k[8], k[11], v[8], v[11]], [1.0, 2.0, 3.0, 4.0]);
    }

    #[test]
    fn check_and_grid() {
        let op = KvAppend { rows: 2, n_heads: 9, n_kv_heads: 9, head_dim: 128, max_seq: 11 };
        let (cache, qkv) = (9 * 11 * 128, 2 * op.qkv_dim());
        assert!(op.check(cache, cache, qkv, 2).is_ok());
        assert!(op.check(cache, cache - 1, qkv, 2).unwrap_err().to_string().starts_with("kv_append: k has 12672"));
        assert!(op.check(cache, cache, qkv - 1, 2).unwrap_err().to_string().starts_with("kv_append: qkv has 6911"));
        assert_eq!(op.grid().blocks, [2, 2, 1]); // 1152 elements, 1024 a block
    }
}
