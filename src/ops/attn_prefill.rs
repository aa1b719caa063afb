//! Causal grouped-query attention: `out[r, h] = softmax_t(q[r, h] . k[s, g, t] / sqrt(head_dim)) v[s, g, t]` over the last
//! `window` positions `t` up to that of the [place](crate::model::kv) `pos[r]`, in its sequence `s`, where `g = h / (n_heads / n_kv_heads)`; for many rows:
//! FlashAttention-2 (Dao 2023).
//!
//! Shapes: `out` [rows, n_heads * head_dim]; `qkv` [rows, (n_heads + 2 n_kv_heads) * head_dim], of which q is read;
//! `k`, `v` [pages of the cache, n_kv_heads, [`PAGE`](super::PAGE), head_dim], which already hold the rows' own keys and values; `pos`
//! [at least rows], consecutive, of which the kernel reads the first; `pages` [sequences, max_seq / PAGE], the table.
//! Rounding: scores and sums in f32, one rounding at the store. The kernel also rounds the softmax's weights to bf16
//! before they are multiplied by `v`, as tensor cores need them; the definition does not.
//! The rows begin at `first`. The positions of their sequence below `shared` are read from sequence 0: branches of one
//! text, each in a sequence of its own, share their beginning.
//! The kernel's bits of a row depend on its position, its query and the cache up to there: not on how the prompt was
//! cut.

#[cfg(feature = "cuda")]
use super::attn_decode::HEAD_DIMS;
use super::{
    Act, AttnDecode, Cost, Grid, KvDtype, Op, Tolerance, download, expect, noise, noise_buf, paged::expect_paged,
    poison, scrambled, to_pages,
};
use crate::{
    backend::{Backend, train::TrainBackend},
    error::Result,
    tiles,
};

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct AttnPrefill {
    /// Tokens.
    pub rows: usize,
    /// Row of the first of them in `out`, `qkv` and `pos`.
    pub first: usize,
    /// Positions below this are read from sequence 0.
    pub shared: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key heads.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Positions of a sequence; the caller proves that each place, and those before it that it sees, have a page of the cache.
    pub max_seq: usize,
    /// Positions of the cache in use, including these rows' own: the last row's position plus one, or a larger bound
    /// when the caller knows no better. The caller ensures that each position is below; the cost is counted with this
    /// number.
    pub kv_len: usize,
    /// Keys that a row sees, its own and those before it; `max_seq` are all.
    pub window: usize,
    /// How keys and values are stored.
    pub kv: KvDtype,
}

impl AttnPrefill {
    /// Elements of a row of `qkv`.
    pub fn qkv_dim(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
    }

    /// Buffer lengths fit the sizes; `A` is the type of activations.
    pub fn check<A: Act>(&self, out: usize, qkv: usize, k: usize, v: usize, pos: usize, pages: usize) -> Result<()> {
        expect(Self::STEM, self.n_kv_heads > 0 && self.n_heads.is_multiple_of(self.n_kv_heads), || {
            format!("{self:?}: n_heads must be a multiple of n_kv_heads")
        })?;
        expect(Self::STEM, self.rows <= self.kv_len && self.kv_len <= self.max_seq, || {
            format!("{self:?}: kv_len must be at least rows and at most max_seq")
        })?;
        expect(Self::STEM, self.window > 0, || format!("{self:?}: window must be positive"))?;
        expect_paged::<A>(Self::STEM, self.kv, [self.n_kv_heads, self.head_dim, self.max_seq], [k, v, pages], self)?;
        let (end, width) = (self.first + self.rows, self.n_heads * self.head_dim);
        let fits = out >= end * width && qkv >= end * self.qkv_dim() && pos >= end;
        expect(Self::STEM, self.rows > 0 && width > 0 && self.shared <= self.max_seq && fits, || {
            format!("out has {out} elements, qkv {qkv} and pos {pos}, {self:?}")
        })
    }

    /// One block per head and [`tiles::PREFILL_ROWS`] rows. Each stage has a tile of keys and one of values, of fp8 with their scales.
    pub fn grid(&self) -> Grid {
        let width = if self.head_dim <= 64 { 64 } else { 128 }; // of a row in shared memory
        let row = self.kv.row_bytes(width, size_of::<half::bf16>()) as u32;
        Grid {
            blocks: [self.n_heads as u32, self.rows.div_ceil(tiles::PREFILL_ROWS as usize) as u32, 1],
            threads: tiles::PREFILL_THREADS,
            shared: 2 * tiles::PREFILL_STAGES * tiles::PREFILL_KEYS * row,
        }
    }

    /// The definition: that of the decode attention, whose rows are independent.
    pub fn reference<A: Act>(&self, out: &mut [A], qkv: &[A], k: &[A], v: &[A], pos: &[u32], pages: &[u32]) {
        let Self { rows, first, shared, n_heads, n_kv_heads, head_dim, max_seq, kv_len, window, kv } = *self;
        let op = AttnDecode { rows, n_heads, n_kv_heads, head_dim, max_seq, kv_len, window, kv };
        let (out, qkv) = (&mut out[first * n_heads * head_dim..], &qkv[first * self.qkv_dim()..]);
        op.reference_sharing(out, qkv, k, v, &pos[first..first + rows], pages, shared);
    }

    /// The kernel.
    #[cfg(feature = "cuda")]
    #[expect(clippy::too_many_arguments, reason = "one argument a buffer, named as in the kernel")]
    pub fn launch(
        &self,
        cu: &crate::backend::cuda::Cuda,
        out: &mut crate::backend::cuda::Buffer<half::bf16>,
        qkv: &crate::backend::cuda::Buffer<half::bf16>,
        k: &crate::backend::cuda::Buffer<half::bf16>,
        v: &crate::backend::cuda::Buffer<half::bf16>,
        pos: &crate::backend::cuda::Buffer<u32>,
        pages: &crate::backend::cuda::Buffer<u32>,
    ) -> Result<()> {
        self.check::<half::bf16>(out.len(), qkv.len(), k.len(), v.len(), pos.len(), pages.len())?;
        expect(Self::STEM, HEAD_DIMS.contains(&self.head_dim), || {
            format!("head_dim is {}, the kernels are for 64, 80, 96 and 128", self.head_dim)
        })?;
        let grid = self.grid();
        super::expect_ints(Self::STEM, &[self.first + self.rows, self.n_heads, self.n_kv_heads, self.max_seq])?;
        super::expect_ints(Self::STEM, &[k.len() / self.head_dim])?; // at least half the rows of the cache
        expect(Self::STEM, grid.blocks[1] <= 0xffff, || {
            format!("{self:?}: rows are above the kernel's limit of 4 million")
        })?;
        let scale = std::f32::consts::LOG2_E / (self.head_dim as f32).sqrt();
        // SAFETY: check() proved that out and qkv hold `rows` rows, k and v a page and pos a place; that the rows from first on
        // have consecutive places in one sequence, of which all that is seen has pages of the cache, is the caller's promise
        // (`kv_len`). The arguments are those of the kernel, in order.
        unsafe {
            cu.launch(
                &format!("attn_prefill_{}_d{}", self.kv.kernels(), self.head_dim),
                self,
                grid,
                &[
                    out.into(),
                    qkv.into(),
                    k.into(),
                    v.into(),
                    pos.into(),
                    pages.into(),
                    self.rows.into(),
                    self.first.into(),
                    self.shared.into(),
                    self.n_heads.into(),
                    self.n_kv_heads.into(),
                    self.max_seq.into(),
                    self.window.into(),
                    scale.into(),
                ],
            )
        }
    }
}

/// `out`, `qkv`, `k`, `v`, `pos`, `pages` of one call.
type Io<B> = (ActBuf<B>, ActBuf<B>, ActBuf<B>, ActBuf<B>, <B as Backend>::Buf<u32>, <B as Backend>::Buf<u32>);
type ActBuf<B> = <B as Backend>::Buf<<B as Backend>::Act>;

impl Op for AttnPrefill {
    const STEM: &'static str = "attn_prefill";
    type Io<B: TrainBackend> = Io<B>;

    fn cases() -> Vec<Self> {
        let case = |rows, kv_len, (n_heads, n_kv_heads, head_dim), max_seq| AttnPrefill {
            rows,
            first: 0,
            shared: 0,
            n_heads,
            n_kv_heads,
            head_dim,
            max_seq,
            kv_len,
            window: max_seq,
            kv: KvDtype::Auto,
        };
        const DEMO: (usize, usize, usize) = (4, 2, 64);
        const SMOLLM2: (usize, usize, usize) = (9, 3, 64);
        const LLAMA3: (usize, usize, usize) = (32, 8, 128);
        let cases = vec![
            case(1, 1, (1, 1, 64), 64),
            case(9, 9, DEMO, 128),           // less than a tile
            case(64, 64, (3, 1, 64), 64),    // whole tiles of keys, the cache full
            case(65, 65, (3, 1, 64), 128),   // just past a page
            case(33, 41, (1, 1, 128), 64),   // just past a warp's rows, and half a tile of keys
            case(70, 193, (2, 1, 128), 256), // a later chunk, whose rows cross tiles of keys
            case(16, 144, SMOLLM2, 192),
            AttnPrefill { first: 21, shared: 70, ..case(20, 90, (2, 1, 64), 128) }, // a branch that begins inside a tile
            AttnPrefill { first: 3, shared: 100, ..case(9, 137, (4, 2, 128), 192) },
            AttnPrefill { shared: 96, ..case(30, 200, (2, 1, 64), 256) }, // one that begins with a tile, inside a page
            AttnPrefill { shared: 128, ..case(9, 140, (1, 1, 128), 192) }, // with a page
            case(130, 130, (2, 2, 64), 192),
            AttnPrefill { window: 1, ..case(20, 61, (1, 1, 64), 64) }, // each row its own key alone
            AttnPrefill { window: 40, ..case(135, 193, (2, 1, 64), 256) }, // whole tiles that some rows of a block see and some do not
            AttnPrefill { window: 33, ..case(70, 150, (1, 1, 128), 192) },
            AttnPrefill { window: 30, first: 5, shared: 70, ..case(20, 90, (2, 1, 64), 128) }, // a branch that sees less than all of what it shares
            case(70, 193, (2, 1, 80), 256),
            case(33, 41, (2, 2, 96), 64),
            AttnPrefill { window: 50, ..case(131, 150, (1, 1, 96), 192) },
            case(512, 512, SMOLLM2, 2048),
            case(512, 512, LLAMA3, 8192),
            case(2048, 2048, LLAMA3, 8192),
            case(512, 8192, LLAMA3, 8192),
        ];
        let fp8: Vec<_> = cases.iter().map(|case| AttnPrefill { kv: KvDtype::Fp8, ..*case }).collect();
        [cases, fp8].concat()
    }

    /// The products of each row with the keys that it sees, and no others: `4 * head_dim` for each row, head and key.
    fn cost(&self) -> Cost {
        let [rows, n_heads, n_kv_heads, head_dim, kv_len] =
            [self.rows, self.n_heads, self.n_kv_heads, self.head_dim, self.kv_len].map(|n| n as u64);
        let q = 2 * rows * n_heads * head_dim;
        let window = self.window as u64;
        // the sum of 1 to n, of which none counts more than the window
        let up_to = |n: u64| n.min(window) * (n.min(window) + 1) / 2 + n.saturating_sub(window) * window;
        let seen = up_to(kv_len) - up_to(kv_len - rows); // keys, summed over the rows
        let keys = kv_len.min(rows + window - 1);
        let row = self.kv.row_bytes(self.head_dim, 2) as u64;
        Cost { read: q + 2 * n_kv_heads * keys * row + 4, write: q, flops: 4 * head_dim * n_heads * seen }
    }

    /// Rounding the softmax's weights to bf16 (up to 2^-9 of each) moves outputs by a relative L2 of 1.7e-3 and the worst by
    /// 5.3e-3 over the small cases: allowed are 1.5 and 2 times that.
    fn tolerance(&self) -> Tolerance {
        Tolerance { l2: 2.5e-3, worst: 1.1e-2 }
    }

    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>> {
        let start = self.max_seq + self.kv_len - self.rows; // of the second sequence
        let unseen = (self.kv_len - self.rows + 1).saturating_sub(self.window); // before every window
        // of the first sequence only what is shared, of the second what is not, and nothing past the last position is to be
        // read or to leak through a weight of zero: it is poisoned. The pages lie in disorder.
        let pages = scrambled(2, self.max_seq);
        let cache = |seed| {
            let sequence = self.n_kv_heads * self.max_seq * self.head_dim;
            let mut v: Vec<B::Act> = noise(2 * sequence, seed).into_iter().map(B::Act::from_f32).collect();
            let (nan, d) = (B::Act::from_f32(f32::NAN), self.head_dim);
            let (base, own) = v.split_at_mut(sequence);
            for head in base.chunks_exact_mut(self.max_seq * d) {
                head[self.shared * d..].fill(nan);
                head[..unseen * d].fill(nan);
            }
            for head in own.chunks_exact_mut(self.max_seq * d) {
                head[..self.shared.max(unseen) * d].fill(nan);
                head[self.kv_len * d..].fill(nan);
            }
            b.upload(&to_pages(self.kv, &v, &pages, [self.n_kv_heads, self.max_seq, d]))
        };
        Ok((
            poison(b, (self.first + self.rows) * self.n_heads * self.head_dim)?,
            noise_buf(b, (self.first + self.rows) * self.qkv_dim(), seed, 6.0)?, // scores of standard deviation 2: neither flat nor one key
            cache(seed + 1)?,
            cache(seed + 2)?,
            b.upload(&((start as u32 - self.first as u32)..(start + self.rows) as u32).collect::<Vec<_>>())?,
            b.upload(&pages)?,
        ))
    }

    fn run<B: TrainBackend>(&self, b: &B, (out, qkv, k, v, pos, pages): &mut Self::Io<B>) -> Result<()> {
        b.attn_prefill(self, out, qkv, k, v, pos, pages)
    }

    fn outputs<B: TrainBackend>(&self, b: &B, (out, ..): &Self::Io<B>) -> Result<Vec<f32>> {
        Ok(download(b, out)?.split_off(self.first * self.n_heads * self.head_dim))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OP: AttnPrefill = AttnPrefill {
        rows: 65,
        first: 0,
        shared: 0,
        n_heads: 4,
        n_kv_heads: 2,
        head_dim: 64,
        max_seq: 128,
        kv_len: 100,
        window: 128,
        kv: KvDtype::Auto,
    };

    #[test]
    fn blocks_cover_the_rows() {
        assert_eq!(OP.grid(), Grid { blocks: [4, 1, 1], threads: 128, shared: 24 << 10 });
        let large = AttnPrefill { head_dim: 128, rows: 129, ..OP };
        assert_eq!(large.grid(), Grid { blocks: [4, 2, 1], threads: 128, shared: 48 << 10 });
        let fp8 = AttnPrefill { kv: KvDtype::Fp8, ..large };
        assert_eq!(fp8.grid().shared, (24 << 10) + 192);
    }

    #[test]
    fn cost_counts_what_each_row_sees() {
        let seen: u64 = (0..65).map(|r| 100 - 65 + r + 1).sum();
        assert_eq!(OP.cost().flops, seen * 4 * 64 * 4); // a multiply-add for q k and one for p v, 4 heads
        assert_eq!(OP.cost().write, 65 * 4 * 64 * 2);
        let cache = 2 * 2 * 100 * 64 * 2; // k and v, 2 heads
        assert_eq!(OP.cost().read, 65 * 4 * 64 * 2 + cache + 4);
    }

    #[test]
    fn check_names_what_does_not_fit() {
        let [q, qkv, cache] = [65 * 256, 65 * 512, 2 * 64 * 64];
        assert!(OP.check::<half::bf16>(q, qkv, cache, cache, 65, 2).is_ok());
        let text =
            |op: &AttnPrefill, cache| op.check::<half::bf16>(q, qkv, cache, cache, 65, 2).unwrap_err().to_string();
        assert!(text(&OP, cache - 1).starts_with("attn_prefill: k has 8191 elements"), "{}", text(&OP, cache - 1));
        assert!(
            text(&AttnPrefill { kv_len: 129, ..OP }, cache)
                .ends_with("kv_len must be at least rows and at most max_seq")
        );
        assert!(
            text(&AttnPrefill { n_kv_heads: 3, ..OP }, cache).ends_with("n_heads must be a multiple of n_kv_heads")
        );
    }
}
