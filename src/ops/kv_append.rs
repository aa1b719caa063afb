//! The key and value of each row's [place](crate::model::kv) `pos[r]` (sequence and position in one number) `=` the k and v heads
//! of the row.
//!
//! Shapes: `k`, `v` [pages of the cache, n_kv_heads, [`PAGE`](super::PAGE), head_dim]; `qkv` [rows, (n_heads + 2 n_kv_heads) *
//! head_dim]; `pos` [at least rows]; `pages` [sequences, max_seq / PAGE], the table.
//! Exact; in fp8 each key or value is rounded by itself.

use super::{Act, Cost, Grid, KvDtype, Op, Paged, Tolerance, expect, noise_buf, paged::expect_paged, scrambled};
use crate::{backend::train::TrainBackend, error::Result, tiles};

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
    /// How keys and values are stored.
    pub kv: KvDtype,
}

impl KvAppend {
    /// Elements of a row of `qkv`.
    pub fn qkv_dim(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
    }

    /// Buffer lengths fit the sizes; `A` is the type of activations.
    pub fn check<A: Act>(&self, k: usize, v: usize, qkv: usize, pos: usize, pages: usize) -> Result<()> {
        expect_paged::<A>(Self::STEM, self.kv, [self.n_kv_heads, self.head_dim, self.max_seq], [k, v, pages], self)?;
        expect(Self::STEM, self.rows > 0 && qkv >= self.rows * self.qkv_dim() && pos >= self.rows, || {
            format!("qkv has {qkv} elements and pos {pos}, {self:?}")
        })
    }

    /// Blocks over rows and the elements of their k heads, 8 elements a thread; in fp8 over rows and their k and v heads, one a warp.
    pub fn grid(&self) -> Grid {
        match self.kv {
            KvDtype::Auto => Grid::of_vectors(self.rows, self.n_kv_heads * self.head_dim),
            KvDtype::Fp8 => {
                let threads = tiles::VECTOR_THREADS;
                let down = (2 * self.n_kv_heads as u32).div_ceil(threads / 32);
                Grid { blocks: [self.rows as u32, down, 1], threads, shared: 0 }
            }
        }
    }

    /// The definition.
    pub fn reference<A: Act>(&self, k: &mut [A], v: &mut [A], qkv: &[A], pos: &[u32], pages: &[u32]) {
        let d = self.head_dim;
        let kv = Paged { dtype: self.kv, pages, n_kv_heads: self.n_kv_heads, head_dim: d };
        for (row, &place) in qkv.chunks_exact(self.qkv_dim()).zip(&pos[..self.rows]) {
            let (ks, vs) = row[self.n_heads * d..].split_at(self.n_kv_heads * d);
            for h in 0..self.n_kv_heads {
                kv.store(k, place as usize, h, &ks[h * d..][..d]);
                kv.store(v, place as usize, h, &vs[h * d..][..d]);
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
        self.check::<half::bf16>(k.len(), v.len(), qkv.len(), pos.len(), pages.len())?;
        let multiple = if self.kv == KvDtype::Fp8 { 16 } else { 8 };
        expect(Self::STEM, self.head_dim.is_multiple_of(multiple), || {
            format!("{self:?}: the kernel needs head_dim % {multiple} == 0; the CPU runs any head_dim")
        })?;
        super::expect_ints(Self::STEM, &[self.rows, self.qkv_dim()])?;
        // SAFETY: check() proved that rows rows of qkv and rows places exist; each place is in the table and its page in k and
        // v by the caller's promise. The arguments are those of the kernel, in order; it waits for its predecessor before it reads
        // or writes anything.
        unsafe {
            cu.launch_dependent(
                &format!("kv_append_{}", self.kv.kernels()),
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
        let case = |rows, n_heads, n_kv_heads, head_dim, max_seq, kv| KvAppend {
            rows,
            n_heads,
            n_kv_heads,
            head_dim,
            max_seq,
            kv,
        };
        vec![
            case(1, 1, 1, 8, 64, KvDtype::Auto),
            case(3, 3, 1, 48, 64, KvDtype::Auto),
            case(5, 9, 3, 64, 128, KvDtype::Auto),
            case(2, 9, 9, 128, 192, KvDtype::Auto),
            case(1, 32, 8, 128, 2048, KvDtype::Auto),
            case(512, 32, 8, 128, 2048, KvDtype::Auto),
            case(1, 1, 1, 16, 64, KvDtype::Fp8),
            case(3, 3, 1, 48, 64, KvDtype::Fp8),
            case(5, 9, 3, 64, 128, KvDtype::Fp8),
            case(2, 9, 9, 128, 192, KvDtype::Fp8), // more heads than warps of a block
            case(3, 2, 2, 256, 64, KvDtype::Fp8),  // more than a warp stores at a time
            case(1, 32, 8, 128, 2048, KvDtype::Fp8),
            case(512, 32, 8, 128, 2048, KvDtype::Fp8),
        ]
    }

    fn cost(&self) -> Cost {
        let heads = (2 * self.rows * self.n_kv_heads) as u64; // k and v
        let write = heads * self.kv.row_bytes(self.head_dim, 2) as u64;
        Cost { read: 2 * heads * self.head_dim as u64 + 8 * self.rows as u64, write, flops: 0 }
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance::EXACT
    }

    /// The caches are full of ones, as bits, so a copy to a wrong place shows twice. Two sequences; rows go to the end of the second and, when
    /// there are several, to that of the first.
    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>> {
        let pages = scrambled(2, self.max_seq);
        let cache = pages.len() * self.n_kv_heads * self.kv.head_len::<B::Act>(self.head_dim);
        let mut ones = vec![B::Act::from_f32(0.0); cache];
        bytemuck::cast_slice_mut::<_, u8>(&mut ones).fill(0xFF);
        let place = |r: usize| ((2 - r % 2) * self.max_seq - 1 - r / 2) as u32;
        Ok((
            b.upload(&ones)?,
            b.upload(&ones)?,
            noise_buf(b, self.rows * self.qkv_dim(), seed, 3.0)?,
            b.upload(&(0..self.rows).map(place).collect::<Vec<u32>>())?,
            b.upload(&pages)?,
        ))
    }

    fn run<B: TrainBackend>(&self, b: &B, (k, v, qkv, pos, pages): &mut Self::Io<B>) -> Result<()> {
        b.kv_append(self, k, v, qkv, pos, pages)
    }

    /// All words of the caches, of 16 bits: also what is no number has to be equal.
    fn outputs<B: TrainBackend>(&self, b: &B, (k, v, ..): &Self::Io<B>) -> Result<Vec<f32>> {
        let cache = [b.download(k)?, b.download(v)?].concat();
        Ok(bytemuck::cast_slice::<_, u16>(&cache).iter().map(|word| f32::from(*word)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_go_to_their_positions() {
        let op = KvAppend { rows: 1, n_heads: 1, n_kv_heads: 2, head_dim: 1, max_seq: 64, kv: KvDtype::Auto };
        for (place, page) in [(1, 1), (64 + 5, 0)] {
            let (mut k, mut v) = ([0f32; 256], [0f32; 256]);
            op.reference(&mut k, &mut v, &[9.0, 1.0, 2.0, 3.0, 4.0], &[place], &[1, 0]);
            let at = page * 128 + place as usize % 64;
            assert_eq!([k[at], k[at + 64], v[at], v[at + 64]], [1.0, 2.0, 3.0, 4.0]);
            assert_eq!((k.iter().sum::<f32>(), v.iter().sum::<f32>()), (3.0, 7.0), "nothing else is written");
        }
    }

    #[test]
    fn a_row_of_fp8_has_the_scale_of_its_largest() {
        let op = KvAppend { rows: 1, n_heads: 1, n_kv_heads: 1, head_dim: 2, max_seq: 64, kv: KvDtype::Fp8 };
        let (mut k, mut v) = ([0f32; 48], [0f32; 48]); // a page of 64 * (2 + 1) bytes
        op.reference(&mut k, &mut v, &[9.0, 9.0, 448.0, -1.0, 0.0, 3.0], &[5], &[0]);
        let bytes = |cache: &[f32]| bytemuck::cast_slice::<f32, u8>(cache).to_vec();
        let (k, v) = (bytes(&k), bytes(&v));
        assert_eq!((&k[10..12], k[128 + 5]), (&[0x7E, 0xB8][..], 127), "448 and -1 as they are");
        assert_eq!((&v[10..12], v[128 + 5]), (&[0, 0x7C][..], 120), "3 as 384 times 2^-7");
        assert_eq!(k.iter().filter(|byte| **byte != 0).count(), 3, "nothing else is written");
    }

    #[test]
    fn check_and_grid() {
        let op = KvAppend { rows: 2, n_heads: 9, n_kv_heads: 9, head_dim: 128, max_seq: 64, kv: KvDtype::Auto };
        let (cache, qkv) = (9 * 64 * 128, 2 * op.qkv_dim());
        assert!(op.check::<f32>(cache, cache, qkv, 2, 1).is_ok());
        assert!(
            op.check::<f32>(cache, cache - 1, qkv, 2, 1).unwrap_err().to_string().starts_with("kv_append: k has 73728")
        );
        assert!(
            op.check::<f32>(cache, cache, qkv - 1, 2, 1)
                .unwrap_err()
                .to_string()
                .starts_with("kv_append: qkv has 6911")
        );
        assert_eq!(op.grid().blocks, [2, 2, 1]); // 1152 elements, 1024 a block
        assert_eq!(KvAppend { kv: KvDtype::Fp8, ..op }.grid().blocks, [2, 5, 1]); // 18 heads, 4 a block
    }
}
