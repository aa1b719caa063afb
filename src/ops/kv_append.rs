//! The key and value of each row's [place](crate::model::kv) `pos[r]` (sequence and position in one number) `=` the k and v heads
//! of the row.
//!
//! Shapes: `k`, `v` [pages of the cache, n_kv_heads, [`PAGE`](super::PAGE), head_dim]; `qkv` [rows, (n_heads + 2 n_kv_heads) *
//! head_dim]; `pos` [at least rows]; `pages` [sequences, max_seq / PAGE], the table.
//! Exact.

use super::{
    Act, Cost, Grid, Op, Tolerance, download, element_at, expect, noise_buf, paged::expect_paged, poison, scrambled,
};
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
    /// Positions of a sequence. The caller ensures that each place has a page of the cache, and that no two rows have the same.
    pub max_seq: usize,
}

impl KvAppend {
    /// Elements of a row of `qkv`.
    pub fn qkv_dim(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
    }

    /// Buffer lengths fit the sizes.
    pub fn check(&self, k: usize, v: usize, qkv: usize, pos: usize, pages: usize) -> Result<()> {
        expect_paged(Self::STEM, [self.n_kv_heads, self.head_dim, self.max_seq], [k, v, pages], self)?;
        expect(Self::STEM, self.rows > 0 && qkv >= self.rows * self.qkv_dim() && pos >= self.rows, || {
            format!("qkv has {qkv} elements and pos {pos}, {self:?}")
        })
    }

    /// Blocks over rows and the elements of their k heads, 8 elements a thread.
    pub fn grid(&self) -> Grid {
        Grid::of_vectors(self.rows, self.n_kv_heads * self.head_dim)
    }

    /// The definition.
    pub fn reference<A: Act>(&self, k: &mut [A], v: &mut [A], qkv: &[A], pos: &[u32], pages: &[u32]) {
        let d = self.head_dim;
        for (row, &place) in qkv.chunks_exact(self.qkv_dim()).zip(&pos[..self.rows]) {
            let (ks, vs) = row[self.n_heads * d..].split_at(self.n_kv_heads * d);
            for h in 0..self.n_kv_heads {
                let at = element_at(pages, place as usize, self.n_kv_heads, h, d);
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
        pages: &crate::backend::cuda::Buffer<u32>,
    ) -> Result<()> {
        self.check(k.len(), v.len(), qkv.len(), pos.len(), pages.len())?;
        expect(Self::STEM, self.head_dim.is_multiple_of(8), || {
            format!("{self:?}: the kernel needs head_dim % 8 == 0; the CPU runs any head_dim")
        })?;
        super::expect_ints(Self::STEM, &[self.rows, self.qkv_dim()])?;
        // SAFETY: check() proved that rows rows of qkv and rows places exist; each place is in the table and its page in k and
        // v by the caller's promise. The arguments are those of the kernel, in order.
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
                    pages.into(),
                    self.n_heads.into(),
                    self.n_kv_heads.into(),
                    self.head_dim.into(),
                    cu.trace(self, self.grid()),
                ],
            )
        }
    }
}

impl Op for KvAppend {
    const STEM: &'static str = "kv_append";
    type Io<B: TrainBackend> = (B::Buf<B::Act>, B::Buf<B::Act>, B::Buf<B::Act>, B::Buf<u32>, B::Buf<u32>);

    fn cases() -> Vec<Self> {
        let case =
            |rows, n_heads, n_kv_heads, head_dim, max_seq| KvAppend { rows, n_heads, n_kv_heads, head_dim, max_seq };
        vec![
            case(1, 1, 1, 8, 64),
            case(3, 3, 1, 48, 64),
            case(5, 9, 3, 64, 128),
            case(2, 9, 9, 128, 192),
            case(1, 32, 8, 128, 2048),
            case(512, 32, 8, 128, 2048),
        ]
    }

    fn cost(&self) -> Cost {
        let n = (2 * self.rows * self.n_kv_heads * self.head_dim) as u64; // k and v
        Cost { read: 2 * n + 8 * self.rows as u64, write: 2 * n, flops: 0 }
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
            b.upload(&scrambled(2, self.max_seq))?,
        ))
    }

    fn run<B: TrainBackend>(&self, b: &B, (k, v, qkv, pos, pages): &mut Self::Io<B>) -> Result<()> {
        b.kv_append(self, k, v, qkv, pos, pages)
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
        let op = KvAppend { rows: 1, n_heads: 1, n_kv_heads: 2, head_dim: 1, max_seq: 64 };
        for (place, page) in [(1, 1), (64 + 5, 0)] {
            let (mut k, mut v) = ([0f32; 256], [0f32; 256]);
            op.reference(&mut k, &mut v, &[9.0, 1.0, 2.0, 3.0, 4.0], &[place], &[1, 0]);
            let at = page * 128 + place as usize % 64;
            assert_eq!([k[at], k[at + 64], v[at], v[at + 64]], [1.0, 2.0, 3.0, 4.0]);
            assert_eq!((k.iter().sum::<f32>(), v.iter().sum::<f32>()), (3.0, 7.0), "nothing else is written");
        }
    }

    #[test]
    fn check_and_grid() {
        let op = KvAppend { rows: 2, n_heads: 9, n_kv_heads: 9, head_dim: 128, max_seq: 64 };
        let (cache, qkv) = (9 * 64 * 128, 2 * op.qkv_dim());
        assert!(op.check(cache, cache, qkv, 2, 1).is_ok());
        assert!(op.check(cache, cache - 1, qkv, 2, 1).unwrap_err().to_string().starts_with("kv_append: k has 73728"));
        assert!(op.check(cache, cache, qkv - 1, 2, 1).unwrap_err().to_string().starts_with("kv_append: qkv has 6911"));
        assert_eq!(op.grid().blocks, [2, 2, 1]); // 1152 elements, 1024 a block
    }
}
