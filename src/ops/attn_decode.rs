//! Causal grouped-query attention for few rows: `out[r, h] = softmax_t(q[r, h] . k[s, g, t] / sqrt(head_dim)) v[s, g, t]`
//! over the last `window` positions `t` up to that of the [place](crate::model::kv) `pos[r]`, in its sequence `s`, where
//! `g = h / (n_heads / n_kv_heads)`. The keys are split over blocks by the row's position
//! alone and the parts merged on the device, so the bits of a row depend on nothing else (flash-decoding, Dao et al.
//! 2023).
//!
//! Shapes: `out` [rows, n_heads * head_dim]; `qkv` [rows, (n_heads + 2 n_kv_heads) * head_dim], of which q is read;
//! `k`, `v` [pages of the cache, n_kv_heads, [`PAGE`](super::PAGE), head_dim], which already hold the rows' own keys and values; `pos` [at
//! least rows]; `pages` [sequences, max_seq / PAGE], the table.
//! Rounding: scores and sums in f32, one rounding at the store.

use super::{
    Act, Cost, Grid, KvDtype, Op, Paged, Tolerance, download, expect, noise, noise_buf, paged::expect_paged, poison,
    scrambled, to_pages,
};
use crate::{
    backend::{Backend, DECODE_ROWS, train::TrainBackend},
    error::Result,
    tiles,
};
use rayon::prelude::*;

/// Widths of a head that the kernels of both attentions have.
pub(super) const HEAD_DIMS: [usize; 4] = [64, 80, 96, 128];

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct AttnDecode {
    /// Tokens.
    pub rows: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key heads.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Positions of a sequence; the caller proves that each place, and those before it in its sequence, have a page of the cache.
    pub max_seq: usize,
    /// Positions that the launch covers: each row's position is below. A captured launch serves all lengths up to this.
    pub kv_len: usize,
    /// Keys that a row sees, its own and those before it; `max_seq` are all.
    pub window: usize,
    /// How keys and values are stored.
    pub kv: KvDtype,
}

impl AttnDecode {
    /// Elements of a row of `qkv`.
    pub fn qkv_dim(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
    }

    /// Buffer lengths fit the sizes; `A` is the type of activations.
    pub fn check<A: Act>(&self, out: usize, qkv: usize, k: usize, v: usize, pos: usize, pages: usize) -> Result<()> {
        expect(Self::STEM, self.n_kv_heads > 0 && self.n_heads.is_multiple_of(self.n_kv_heads), || {
            format!("{self:?}: n_heads must be a multiple of n_kv_heads")
        })?;
        expect_paged::<A>(Self::STEM, self.kv, [self.n_kv_heads, self.head_dim, self.max_seq], [k, v, pages], self)?;
        let q = self.rows * self.n_heads * self.head_dim;
        expect(Self::STEM, q > 0 && out >= q && qkv >= self.rows * self.qkv_dim() && pos >= self.rows, || {
            format!("out has {out} elements, qkv {qkv} and pos {pos}, {self:?}")
        })?;
        expect(Self::STEM, self.window > 0, || format!("{self:?}: window must be positive"))
    }

    /// What the kernel asks for beyond [`AttnDecode::check`].
    pub fn check_kernel(&self, part: usize, arrived: usize) -> Result<()> {
        expect(Self::STEM, (1..=DECODE_ROWS).contains(&self.rows), || {
            format!("{self:?}: 1 to {DECODE_ROWS} rows, more go to attn_prefill")
        })?;
        expect(Self::STEM, HEAD_DIMS.contains(&self.head_dim), || {
            format!("{self:?}: the kernel has head_dim 64, 80, 96 and 128; others run on the CPU only")
        })?;
        expect(Self::STEM, self.n_heads / self.n_kv_heads <= tiles::ATTN_GROUP as usize, || {
            format!("{self:?}: the kernel takes up to {} heads of one kv head", tiles::ATTN_GROUP)
        })?;
        expect(Self::STEM, self.n_heads < 1 << 12 && self.max_seq < 1 << 30, || {
            format!("{self:?}: the kernel takes n_heads below 2^12 and max_seq below 2^30")
        })?;
        expect(Self::STEM, (1..=self.max_seq).contains(&self.kv_len), || {
            format!("{self:?}: kv_len must be 1 to max_seq")
        })?;
        expect(Self::STEM, part >= self.part_len() && arrived >= self.arrived_len(), || {
            let (p, a) = (self.part_len(), self.arrived_len());
            format!("part has {part} elements and arrived {arrived}, {self:?} needs {p} and {a}")
        })
    }

    /// Blocks launched for the keys of one row and kv head; those beyond the splits that the row needs do nothing.
    pub fn splits(&self) -> usize {
        let tile = tiles::ATTN_TILE as usize;
        let most = self.kv_len.min(self.window + tile - 1); // the window's first tile may begin before it
        most.div_ceil(tile).min(tiles::ATTN_SPLITS as usize)
    }

    /// One block per split, kv head and row.
    pub fn grid(&self) -> Grid {
        let blocks = [self.splits(), self.n_kv_heads, self.rows].map(|n| n as u32);
        Grid { blocks, threads: tiles::ATTN_THREADS, shared: 0 }
    }

    /// f32 values of `part`: per row, head and split the weighted values, the maximum and the sum.
    pub fn part_len(&self) -> usize {
        self.rows * self.n_heads * self.splits() * (self.head_dim + 2)
    }

    /// Counters of `arrived`: one per row and kv head; zero before and after each call.
    pub fn arrived_len(&self) -> usize {
        self.rows * self.n_kv_heads
    }

    /// The definition. Rows are computed in parallel.
    pub fn reference<A: Act>(&self, out: &mut [A], qkv: &[A], k: &[A], v: &[A], pos: &[u32], pages: &[u32]) {
        self.reference_sharing(out, qkv, k, v, pos, pages, 0);
    }

    /// The definition for rows that read the positions below `shared` from sequence 0.
    #[expect(clippy::too_many_arguments, reason = "one argument a buffer, named as in the kernel")]
    pub(super) fn reference_sharing<A: Act>(
        &self,
        out: &mut [A],
        qkv: &[A],
        k: &[A],
        v: &[A],
        pos: &[u32],
        pages: &[u32],
        shared: usize,
    ) {
        let (d, group) = (self.head_dim, self.n_heads / self.n_kv_heads);
        let scale = 1.0 / (d as f32).sqrt();
        let heads = out.par_chunks_exact_mut(d).take(self.rows * self.n_heads).enumerate();
        heads.for_each(|(i, out)| {
            let (r, h) = (i / self.n_heads, i % self.n_heads);
            let q: Vec<f32> = qkv[r * self.qkv_dim() + h * d..][..d].iter().map(|q| q.to_f32()).collect();
            let (place, len) = (pos[r] as usize, pos[r] as usize % self.max_seq + 1);
            let kv = Paged { dtype: self.kv, pages, n_kv_heads: self.n_kv_heads, head_dim: d };
            let row = |cache, t| kv.row(cache, if t < shared { t } else { place + 1 - len + t }, h / group);
            let seen = len.saturating_sub(self.window)..len;
            let score = |k: Vec<A>| q.iter().zip(k).map(|(q, k)| q * k.to_f32()).sum::<f32>() * scale;
            let mut p: Vec<f32> = seen.clone().map(|t| score(row(k, t))).collect();
            let max = p.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            p.iter_mut().for_each(|p| *p = (*p - max).exp());
            let sum: f32 = p.iter().sum();
            let mut acc = vec![0f32; d];
            for (p, v) in p.iter().zip(seen.map(|t| row(v, t))) {
                acc.iter_mut().zip(v).for_each(|(acc, v)| *acc += p * v.to_f32());
            }
            out.iter_mut().zip(acc).for_each(|(out, acc)| *out = A::from_f32(acc / sum));
        });
    }

    /// The kernel.
    #[cfg(feature = "cuda")]
    #[expect(clippy::too_many_arguments, reason = "one argument a buffer, named as in the kernel")]
    pub fn launch(
        &self,
        cu: &crate::backend::cuda::Cuda,
        out: &mut crate::backend::cuda::Buffer<half::bf16>,
        part: &mut crate::backend::cuda::Buffer<f32>,
        arrived: &mut crate::backend::cuda::Buffer<u32>,
        qkv: &crate::backend::cuda::Buffer<half::bf16>,
        k: &crate::backend::cuda::Buffer<half::bf16>,
        v: &crate::backend::cuda::Buffer<half::bf16>,
        pos: &crate::backend::cuda::Buffer<u32>,
        pages: &crate::backend::cuda::Buffer<u32>,
    ) -> Result<()> {
        self.check::<half::bf16>(out.len(), qkv.len(), k.len(), v.len(), pos.len(), pages.len())?;
        self.check_kernel(part.len(), arrived.len())?;
        let kernel = format!("attn_decode_{}_d{}", self.kv.kernels(), self.head_dim);
        // scores in base 2: the device has exp2
        let scale = std::f32::consts::LOG2_E / (self.head_dim as f32).sqrt();
        let [n_heads, n_kv_heads, max_seq, window] =
            [self.n_heads, self.n_kv_heads, self.max_seq, self.window].map(crate::backend::cuda::Arg::from);
        // SAFETY: check() and check_kernel() proved that every buffer holds what the sizes say and that these fit the
        // kernel; each place, and those before it in its sequence, have a page of the cache and its position is below kv_len,
        // which the caller promises (the device alone knows them), and `arrived` is 0, as this kernel leaves it; the arguments
        // are those of the kernel, in order. Before it waits for its predecessor it reads pos, which the last kernel of the step
        // before wrote, at least two kernels back, the table, which no kernel writes, and keys and values before the least
        // position, which earlier steps wrote: none is written by the predecessor. `part` and `arrived` it uses after the wait.
        unsafe {
            cu.launch_dependent(
                &kernel,
                self,
                self.grid(),
                &[
                    out.into(),
                    part.into(),
                    arrived.into(),
                    qkv.into(),
                    k.into(),
                    v.into(),
                    pos.into(),
                    pages.into(),
                    n_heads,
                    n_kv_heads,
                    max_seq,
                    window,
                    scale.into(),
                    cu.trace(self, self.grid()),
                ],
            )
        }
    }
}

/// The buffers of one call.
pub struct Io<B: Backend> {
    out: B::Buf<B::Act>,
    part: B::Buf<f32>,
    arrived: B::Buf<u32>,
    qkv: B::Buf<B::Act>,
    k: B::Buf<B::Act>,
    v: B::Buf<B::Act>,
    pos: B::Buf<u32>,
    pages: B::Buf<u32>,
}

impl Op for AttnDecode {
    const STEM: &'static str = "attn_decode";
    type Io<B: TrainBackend> = Io<B>;

    fn cases() -> Vec<Self> {
        let case = |(rows, (n_heads, n_kv_heads, head_dim), max_seq, kv_len)| AttnDecode {
            rows,
            n_heads,
            n_kv_heads,
            head_dim,
            max_seq,
            kv_len,
            window: max_seq,
            kv: KvDtype::Auto,
        };
        let windowed = |window, of| AttnDecode { window, ..case(of) };
        let (smollm2, llama3) = ((9, 3, 64), (32, 8, 128));
        let cases = vec![
            case((1, (1, 1, 64), 64, 1)),       // one key
            case((8, (2, 1, 64), 128, 65)),     // just past one split; rows from the first key on
            case((3, (14, 2, 128), 192, 64)),   // 7 heads of a kv head, one full split
            case((1, (8, 1, 128), 256, 193)),   // 8 heads
            case((2, smollm2, 320, 131)),       // 3 heads
            case((1, (4, 4, 64), 128, 127)),    // 1 head
            case((16, (2, 1, 64), 128, 66)),    // all rows
            case((1, (1, 1, 64), 3136, 3072)),  // most splits of one tile
            case((2, (1, 1, 128), 3200, 3137)), // two tiles a split, the last one not full
            case((1, (1, 1, 64), 6208, 6200)),  // three tiles a split
            case((1, (4, 1, 128), 64, 33)),
            windowed(1, (2, (2, 1, 64), 128, 66)),       // its own key alone
            windowed(40, (5, smollm2, 320, 131)),        // within a tile, across two
            windowed(64, (3, (2, 1, 128), 448, 321)),    // rows that begin at a tile and inside it
            windowed(200, (2, (4, 1, 64), 320, 150)),    // wider than what there is
            windowed(3100, (1, (1, 1, 64), 3456, 3300)), // two tiles a split, from inside a tile on
            case((3, (4, 2, 80), 192, 131)),
            case((2, (3, 1, 96), 192, 129)),
            windowed(70, (9, (6, 2, 80), 256, 190)),
            case((1, smollm2, 8192, 8192)),
            case((1, llama3, 8192, 128)),
            case((1, llama3, 8192, 512)),
            case((1, llama3, 8192, 2048)),
            case((1, llama3, 8192, 8192)),
            case((8, llama3, 8192, 8192)),
            case((16, llama3, 8192, 8192)),
        ];
        let fp8: Vec<_> = cases.iter().map(|case| AttnDecode { kv: KvDtype::Fp8, ..*case }).collect();
        [cases, fp8].concat()
    }

    /// The keys and values of one row, which the others share.
    fn cost(&self) -> Cost {
        let [rows, n_heads, n_kv_heads, d, kv_len] =
            [self.rows, self.n_heads, self.n_kv_heads, self.head_dim, self.kv_len.min(self.window)].map(|n| n as u64);
        let (q, row) = (2 * rows * n_heads * d, self.kv.row_bytes(self.head_dim, 2) as u64);
        Cost { read: 2 * n_kv_heads * kv_len * row + q, write: q, flops: 4 * rows * n_heads * kv_len * d }
    }

    /// The f32 sums differ in their order, weights by 2^-17, exp2 by 2^-22: few elements are rounded to a neighbour.
    fn tolerance(&self) -> Tolerance {
        Tolerance::BF16
    }

    /// All rows are of the second of two sequences, the last one at `kv_len - 1` and the others before it, evenly; the first
    /// sequence, the cache beyond and what lies before every window are NaN: a stray read shows. The pages lie in disorder.
    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Io<B>> {
        let d = self.head_dim;
        let place = |r: usize| (self.max_seq + (self.kv_len - 1) * r / self.rows) as u32;
        let pages = scrambled(2, self.max_seq);
        let unseen = (place(1) as usize % self.max_seq + 1).saturating_sub(self.window);
        let cache = |seed| {
            let sequence = self.n_kv_heads * self.max_seq * d;
            let mut v: Vec<B::Act> = noise(2 * sequence, seed).into_iter().map(B::Act::from_f32).collect();
            let nan = B::Act::from_f32(f32::NAN);
            v[..sequence].fill(nan);
            for head in v.chunks_exact_mut(self.max_seq * d) {
                head[self.kv_len * d..].fill(nan);
                head[..unseen * d].fill(nan);
            }
            b.upload(&to_pages(self.kv, &v, &pages, [self.n_kv_heads, self.max_seq, d]))
        };
        let pos: Vec<u32> = (1..=self.rows).map(place).collect();
        Ok(Io {
            out: poison(b, self.rows * self.n_heads * d)?,
            part: b.upload(&vec![f32::NAN; self.part_len()])?,
            arrived: b.alloc(self.arrived_len())?,
            // scores of standard deviation 2 or so: some keys count and many matter
            qkv: noise_buf(b, self.rows * self.qkv_dim(), seed, 6.0)?,
            k: cache(seed + 1)?,
            v: cache(seed + 2)?,
            pos: b.upload(&pos)?,
            pages: b.upload(&pages)?,
        })
    }

    fn run<B: TrainBackend>(&self, b: &B, io: &mut Io<B>) -> Result<()> {
        let Io { out, part, arrived, qkv, k, v, pos, pages } = io;
        b.attn_decode(self, out, part, arrived, qkv, k, v, pos, pages)
    }

    /// `out`, and the counters, which are zero again.
    fn outputs<B: TrainBackend>(&self, b: &B, io: &Io<B>) -> Result<Vec<f32>> {
        let mut v = download(b, &io.out)?;
        v.extend(b.download(&io.arrived)?.into_iter().map(|n| n as f32));
        Ok(v)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(rows: usize, (n_heads, n_kv_heads, head_dim): (usize, usize, usize), kv_len: usize) -> AttnDecode {
        AttnDecode { rows, n_heads, n_kv_heads, head_dim, max_seq: 1 << 20, kv_len, window: 1 << 20, kv: KvDtype::Auto }
    }

    #[test]
    fn a_launch_covers_the_splits_of_every_position_in_its_bucket() {
        // as the kernel computes them
        let live = |len: usize| len.div_ceil(64 * len.div_ceil(64 * 48));
        let mut needed = 0; // by the positions so far
        for len in 1..40_000 {
            needed = needed.max(live(len));
            let splits = op(1, (32, 8, 128), len).splits();
            assert!(needed <= splits && splits <= 48, "{len} keys: {needed} splits needed, {splits} blocks");
        }
        for window in [1, 64, 65, 1000, 3072, 4096] {
            for len in 1..10_000usize {
                let seen = len - len.saturating_sub(window) / 64 * 64; // from the window's first tile on
                let splits = AttnDecode { window, ..op(1, (32, 8, 128), len) }.splits();
                assert!(live(seen) <= splits, "{len} keys, a window of {window}: {splits} blocks");
            }
        }
        assert_eq!(op(1, (32, 8, 128), 2048).grid(), Grid { blocks: [32, 8, 1], threads: 128, shared: 0 });
        assert_eq!(op(8, (9, 3, 64), 65).grid().blocks, [2, 3, 8]);
    }

    #[test]
    fn check_names_what_is_wrong() {
        let text = |r: Result<()>| r.unwrap_err().to_string();
        let ok = op(2, (4, 2, 64), 100);
        let (cache, pages) = (2 * 64 * 64, (1 << 20) / 64);
        assert!(ok.check::<half::bf16>(512, 1024, cache, cache, 2, pages).is_ok());
        assert!(ok.check_kernel(ok.part_len(), 4).is_ok());
        assert!(
            text(ok.check::<half::bf16>(512, 1024, cache, cache - 1, 2, pages))
                .starts_with("attn_decode: k has 8192 elements, v 8191")
        );
        assert!(
            text(ok.check::<half::bf16>(512, 1024, cache, cache, 1, pages))
                .starts_with("attn_decode: out has 512 elements, qkv 1024 and pos 1")
        );
        assert!(
            text(op(1, (3, 2, 64), 1).check::<half::bf16>(1, 1, 1, 1, 1, 1))
                .ends_with("n_heads must be a multiple of n_kv_heads")
        );
        assert!(text(ok.check_kernel(ok.part_len() - 1, 4)).contains("needs 1056 and 4"));
        let wrong = |op: AttnDecode| text(op.check_kernel(usize::MAX, usize::MAX));
        assert!(
            wrong(op(1, (8, 4, 8), 1))
                .ends_with("the kernel has head_dim 64, 80, 96 and 128; others run on the CPU only")
        );
        assert!(wrong(op(1, (9, 1, 64), 1)).ends_with("up to 8 heads of one kv head"));
        assert!(wrong(op(17, (1, 1, 64), 1)).ends_with("1 to 16 rows, more go to attn_prefill"));
        assert!(wrong(op(1, (1, 1, 64), (1 << 20) + 1)).ends_with("kv_len must be 1 to max_seq"));
    }

    #[test]
    fn cost_is_the_cache_and_little_else() {
        let c = op(1, (32, 8, 128), 2048).cost();
        assert_eq!(c, Cost { read: 8_388_608 + 8192, write: 8192, flops: 33_554_432 });
    }
}
