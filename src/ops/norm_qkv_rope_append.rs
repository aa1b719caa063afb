//! What a layer does before its attention: `qkv[r] = norm(x[r]) w^T`, plus the bias of w; q and k heads are normed (where the model has
//! that) and rotated to the position of the [place](crate::model::kv) `pos[r]`; k and v heads are appended to the cache there.
//!
//! Fused of `rms_norm`, `matmul`, `head_norm`, `rope` and `kv_append`, which are its definition ([`crate::backend::definition`]).
//! Shapes: `qkv` [rows, (n_heads + 2 n_kv_heads) * head_dim]; `k`, `v` [pages of the cache, n_kv_heads, [`PAGE`](super::PAGE), head_dim];
//! `x` [rows, dim]; `pos` [at least rows]; `pages` [sequences, max_seq / PAGE], the table; `gain` [dim]; `w` [(n_heads + 2 n_kv_heads) * head_dim, dim]; `heads` [2, head_dim], gains; `table` [positions, head_dim] f32.
//! In fp8 the kernel stops before the cache and that of `kv_append` follows: a key's scale is that of its whole head, which several
//! blocks have parts of.
//! Rounding: the kernel rounds `x * gain` to bf16 where the definition rounds `x * gain / rms`, and does not round the
//! product before the rotation. The bits of a row depend on the row, its position and the weights only.

use super::{
    Act, Cost, Grid, HeadNorm, KvAppend, KvDtype, Op, Ring, RmsNorm, Rope, Tolerance, download, expect, gemv::product,
    noise_buf, noise_weight, paged::expect_paged, poison, scrambled,
};
use crate::{
    backend::{Backend, Buffer, DECODE_ROWS, train::TrainBackend},
    error::Result,
};
use half::bf16;

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct NormQkvRopeAppend {
    /// Tokens.
    pub rows: usize,
    /// Width of `x`.
    pub dim: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key heads, as many as value heads.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Positions of a sequence. The caller ensures that each place has a page of the cache, and that they differ.
    pub max_seq: usize,
    /// Positions in the table. The caller ensures that each position is below.
    pub positions: usize,
    /// Added to the mean square.
    pub eps: f32,
    /// Each q and k head is normed.
    pub head_norm: bool,
    /// How keys and values are stored.
    pub kv: KvDtype,
}

impl NormQkvRopeAppend {
    /// Columns of `qkv`, rows of `w`.
    pub fn qkv_dim(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
    }

    /// The first op of the definition.
    pub fn norm(&self) -> RmsNorm {
        RmsNorm { rows: self.rows, first: 0, dim: self.dim, eps: self.eps }
    }

    /// The third, where heads are normed.
    pub fn heads(&self) -> HeadNorm {
        let NormQkvRopeAppend { rows, n_heads, n_kv_heads, head_dim, eps, .. } = *self;
        HeadNorm { rows, n_heads, n_kv_heads, head_dim, eps }
    }

    /// The one before the last.
    pub fn rope(&self) -> Rope {
        let NormQkvRopeAppend { rows, n_heads, n_kv_heads, head_dim, max_seq, positions, .. } = *self;
        Rope { rows, n_heads, n_kv_heads, head_dim, max_seq, positions }
    }

    /// The last.
    pub fn append(&self) -> KvAppend {
        let NormQkvRopeAppend { rows, n_heads, n_kv_heads, head_dim, max_seq, kv, .. } = *self;
        KvAppend { rows, n_heads, n_kv_heads, head_dim, max_seq, kv }
    }

    /// Buffer lengths fit the sizes, and the sizes the kernel.
    #[expect(clippy::too_many_arguments, reason = "one argument a buffer, named as in the kernel")]
    pub fn check(
        &self,
        qkv: usize,
        k: usize,
        v: usize,
        arrived: usize,
        x: usize,
        pos: usize,
        pages: usize,
        gain: usize,
        w: (usize, usize),
        heads: Option<(usize, usize)>,
        table: usize,
    ) -> Result<()> {
        expect(Self::STEM, (1..=DECODE_ROWS).contains(&self.rows), || {
            format!("{self:?}: the kernel takes 1 to {DECODE_ROWS} rows")
        })?;
        expect(Self::STEM, self.dim > 0 && self.dim.is_multiple_of(8) && self.head_dim.is_multiple_of(16), || {
            format!("{self:?}: the kernel needs dim % 8 == 0 and head_dim % 16 == 0")
        })?;
        expect(Self::STEM, w == (self.qkv_dim(), self.dim) && gain == self.dim, || {
            format!("w is {w:?} and gain has {gain} elements, {self:?}")
        })?;
        expect(Self::STEM, x >= self.rows * self.dim && qkv >= self.rows * self.qkv_dim() && pos >= self.rows, || {
            format!("qkv has {qkv} elements, x {x} and pos {pos}, {self:?}")
        })?;
        let gains = self.head_norm.then_some((2, self.head_dim));
        expect(Self::STEM, heads == gains && (!self.head_norm || arrived >= self.arrived_len()), || {
            format!("heads is {heads:?} and arrived has {arrived} elements, {self:?}")
        })?;
        expect_paged::<bf16>(Self::STEM, self.kv, [self.n_kv_heads, self.head_dim, self.max_seq], [k, v, pages], self)?;
        expect(Self::STEM, table >= self.positions * self.head_dim, || format!("table has {table} elements, {self:?}"))
    }

    /// Counters of `arrived`: one a q or k head; zero before and after each call.
    pub fn arrived_len(&self) -> usize {
        self.n_heads + self.n_kv_heads
    }

    /// A block owns 8 rows of each half of a head.
    pub fn grid(&self, ring: Ring) -> Grid {
        product(self.qkv_dim(), self.rows, true, ring).0
    }

    /// The kernel, and in fp8 that of [`KvAppend`] after it.
    #[cfg(feature = "cuda")]
    #[expect(clippy::too_many_arguments, reason = "one argument a buffer, named as in the kernel")]
    pub fn launch(
        &self,
        cu: &crate::backend::cuda::Cuda,
        qkv: &mut crate::backend::cuda::Buffer<bf16>,
        k: &mut crate::backend::cuda::Buffer<bf16>,
        v: &mut crate::backend::cuda::Buffer<bf16>,
        arrived: &mut crate::backend::cuda::Buffer<u32>,
        x: &crate::backend::cuda::Buffer<bf16>,
        pos: &crate::backend::cuda::Buffer<u32>,
        pages: &crate::backend::cuda::Buffer<u32>,
        gain: &crate::backend::cuda::Weight,
        w: &crate::backend::cuda::Weight,
        heads: Option<&crate::backend::cuda::Weight>,
        table: &crate::backend::cuda::Buffer<f32>,
    ) -> Result<()> {
        let (shape, gains) = ((w.rows, w.cols), heads.map(|h| (h.rows, h.cols)));
        let (k_len, v_len, arrived_len, x_len) = (k.len(), v.len(), arrived.len(), x.len());
        let (places, pages_len, gain_len, table_len) = (pos.len(), pages.len(), gain.data.len(), table.len());
        let qkv_len = qkv.len();
        self.check(qkv_len, k_len, v_len, arrived_len, x_len, places, pages_len, gain_len, shape, gains, table_len)?;
        let sizes = [self.rows, self.dim, self.n_heads, self.n_kv_heads, self.head_dim, self.max_seq];
        super::expect_ints(Self::STEM, &[&sizes[..], &[self.qkv_dim(), self.positions]].concat())?;
        let cache = match self.kv {
            KvDtype::Auto => [(&mut *k).into(), (&mut *v).into()],
            KvDtype::Fp8 => [crate::backend::cuda::Arg::NULL; 2],
        };
        let buffers = [(&mut *qkv).into(), cache[0], cache[1], arrived.into(), x.into(), pos.into(), pages.into()];
        let heads = heads.map(|heads| &heads.data).into();
        let weights = [(&gain.data).into(), (&w.data).into(), w.bias.as_ref().into(), heads, table.into()];
        let (grid, kind) = w.product(self.rows, true, cu.ring());
        let scalars = [self.eps.into(), cu.trace(self, grid)];
        let args = [&buffers[..], &weights, &sizes.map(crate::backend::cuda::Arg::from), &scalars].concat();
        // SAFETY: check() proved that every buffer holds what the sizes say, that rows of w and x are 16-byte aligned and
        // that a head is whole blocks; each place has a page of the cache and its position is in the table, which the caller promises
        // (the device alone knows them), and `arrived` is 0, as this kernel leaves it; the arguments are those of the kernel, in
        // order; it waits for its predecessor before it reads what that wrote.
        unsafe { cu.launch_dependent(&format!("norm_qkv_rope_append_{}_{kind}", w.kind.name()), self, grid, &args) }?;
        match self.kv {
            KvDtype::Auto => Ok(()),
            KvDtype::Fp8 => self.append().launch(cu, k, v, qkv, pos, pages),
        }
    }
}

/// The buffers of one call.
pub struct Io<B: Backend> {
    qkv: B::Buf<B::Act>,
    k: B::Buf<B::Act>,
    v: B::Buf<B::Act>,
    xb: B::Buf<B::Act>,
    arrived: B::Buf<u32>,
    x: B::Buf<B::Act>,
    pos: B::Buf<u32>,
    pages: B::Buf<u32>,
    gain: B::Weight,
    w: B::Weight,
    heads: Option<B::Weight>,
    table: B::Buf<f32>,
}

impl Op for NormQkvRopeAppend {
    const STEM: &'static str = "norm_qkv_rope_append";
    type Io<B: TrainBackend> = Io<B>;

    fn cases() -> Vec<Self> {
        let case = |(rows, dim, n_heads, n_kv_heads, head_dim, max_seq)| NormQkvRopeAppend {
            rows,
            dim,
            n_heads,
            n_kv_heads,
            head_dim,
            max_seq,
            positions: max_seq + 3,
            eps: 1e-5,
            head_norm: false,
            kv: KvDtype::Auto,
        };
        let shapes = [
            (1, 8, 1, 1, 16, 64),       // one chunk of a row, one block a head
            (3, 72, 2, 1, 32, 64),      // just past a stage
            (8, 1032, 1, 1, 64, 128),   // the last warps have one stage less
            (16, 1032, 1, 1, 64, 64),   // all rows
            (1, 2056, 1, 1, 32, 64),    // past a round of the deep ring
            (10, 264, 2, 1, 32, 192),   // a second group of rows that is not full
            (5, 256, 4, 2, 128, 64),    // as many stages as warps
            (1, 576, 9, 3, 64, 320),    // SmolLM2-135M
            (1, 4096, 32, 8, 128, 512), // Llama-3-8B
            (8, 4096, 32, 8, 128, 512),
            (16, 4096, 32, 8, 128, 512),
        ];
        let normed = [
            (1, 8, 1, 1, 16, 64),     // one block a head
            (3, 72, 2, 1, 80, 64),    // as many rows and blocks as make no whole warps
            (16, 264, 4, 2, 64, 128), // all rows
            (5, 256, 2, 1, 128, 64),
            (1, 4096, 32, 8, 128, 512), // Qwen3-8B
        ];
        let normed = normed.into_iter().map(|shape| NormQkvRopeAppend { head_norm: true, ..case(shape) });
        let fp8 = [(1, 8, 1, 1, 16, 64), (10, 264, 2, 1, 32, 192), (1, 4096, 32, 8, 128, 512)].map(case);
        let fp8 = fp8.into_iter().chain([NormQkvRopeAppend { head_norm: true, ..case((5, 256, 2, 1, 128, 64)) }]);
        let fp8 = fp8.map(|case| NormQkvRopeAppend { kv: KvDtype::Fp8, ..case });
        shapes.into_iter().map(case).chain(normed).chain(fp8).collect()
    }

    fn cost(&self) -> Cost {
        let [rows, dim, n, d] = [self.rows, self.dim, self.qkv_dim(), self.head_dim].map(|n| n as u64);
        let cache = rows * self.n_kv_heads as u64 * self.kv.row_bytes(self.head_dim, 2) as u64;
        let gains = if self.head_norm { 4 * d } else { 0 };
        let normed = if self.head_norm { 4 * rows * (n - self.n_kv_heads as u64 * d) } else { 0 };
        Cost {
            read: 2 * n * dim + 2 * dim + 2 * rows * dim + 4 * rows * d + gains,
            write: 2 * rows * n + 2 * cache,
            flops: 2 * rows * n * dim + 4 * rows * dim + 3 * rows * n + normed,
        }
    }

    /// The definition rounds once more, before the rotation. Both are off by up to 3.2e-3 (L2) from the same in f32,
    /// and from each other by 4.3e-3. Allowed is 1.5 times that.
    fn tolerance(&self) -> Tolerance {
        Tolerance { l2: 6.4e-3, worst: 1.6e-2 }
    }

    /// The caches are full before the call, so a copy to a wrong place is noticed twice; those of fp8 are 0. Two sequences, to which
    /// the rows belong in turn.
    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Io<B>> {
        let pages = scrambled(2, self.max_seq);
        let cache = pages.len() * self.n_kv_heads * self.kv.head_len::<B::Act>(self.head_dim);
        let full = |seed| match self.kv {
            KvDtype::Auto => noise_buf(b, cache, seed, 1.0),
            KvDtype::Fp8 => b.alloc(cache),
        };
        let place = |r: usize| ((2 - r % 2) * self.max_seq - 1 - r / 2) as u32; // from the cache's end
        let scale = 2.0 / (self.dim as f32).sqrt(); // heads as large as what the caches hold
        let inv_freq: Vec<f32> = (0..self.head_dim / 2).map(|i| 0.7f32.powi(i as i32 + 1)).collect();
        Ok(Io {
            qkv: poison(b, self.rows * self.qkv_dim())?,
            k: full(seed + 3)?,
            v: full(seed + 4)?,
            xb: poison(b, self.rows * self.dim)?,
            arrived: b.alloc(self.arrived_len())?,
            x: noise_buf(b, self.rows * self.dim, seed, 3.0)?,
            pos: b.upload(&(0..self.rows).map(place).collect::<Vec<u32>>())?,
            pages: b.upload(&pages)?,
            gain: noise_weight(b, 1, self.dim, seed + 1, 1.0)?,
            w: noise_weight(b, self.qkv_dim(), self.dim, seed + 2, scale)?,
            heads: self.head_norm.then(|| noise_weight(b, 2, self.head_dim, seed + 5, 1.0)).transpose()?,
            table: b.upload(&Rope::table(&inv_freq, self.positions))?,
        })
    }

    fn run<B: TrainBackend>(&self, b: &B, io: &mut Io<B>) -> Result<()> {
        let Io { qkv, k, v, xb, arrived, x, pos, pages, gain, w, heads, table } = io;
        b.norm_qkv_rope_append(self, qkv, k, v, xb, arrived, x, pos, pages, gain, w, heads.as_ref(), table)
    }

    /// `qkv` and the caches; of those in fp8, how many bytes differ from what `qkv` makes of them.
    fn outputs<B: TrainBackend>(&self, b: &B, io: &Io<B>) -> Result<Vec<f32>> {
        let mut all = download(b, &io.qkv)?;
        if self.kv == KvDtype::Auto {
            all.extend([download(b, &io.k)?, download(b, &io.v)?].concat());
            return Ok(all);
        }
        // neighbouring codes are far apart: what is stored of qkv is exact, and so is all else
        let [mut k, mut v] = [&io.k, &io.v].map(|cache| vec![B::Act::from_f32(0.0); cache.len()]);
        let append = self.append();
        append.reference(&mut k, &mut v, &b.download(&io.qkv)?, &b.download(&io.pos)?, &b.download(&io.pages)?);
        for (want, got) in [(k, &io.k), (v, &io.v)] {
            let (got, bytes) = (b.download(got)?, bytemuck::cast_slice::<B::Act, u8>);
            all.push(bytes(&got).iter().zip(bytes(&want)).filter(|(got, want)| got != want).count() as f32);
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op() -> NormQkvRopeAppend {
        NormQkvRopeAppend {
            rows: 2,
            dim: 64,
            n_heads: 2,
            n_kv_heads: 1,
            head_dim: 32,
            max_seq: 64,
            positions: 10,
            eps: 1e-5,
            head_norm: false,
            kv: KvDtype::Auto,
        }
    }

    #[test]
    fn check_names_what_is_wrong() {
        let (op, text) = (op(), |r: Result<()>| r.unwrap_err().to_string());
        let check = |op: &NormQkvRopeAppend, k, x, w| op.check(256, k, 2048, 0, x, 2, 1, 64, w, None, 320);
        assert!(check(&op, 2048, 128, (128, 64)).is_ok());
        assert!(
            text(check(&op, 2047, 128, (128, 64))).starts_with("norm_qkv_rope_append: k has 2047 elements, v 2048")
        );
        assert!(text(check(&op, 2048, 127, (128, 64))).contains("qkv has 256 elements, x 127 and pos 2"));
        assert!(text(check(&op, 2048, 128, (64, 128))).contains("w is (64, 128)"));
        let short = op.check(256, 2048, 2048, 0, 128, 2, 1, 64, (128, 64), None, 319);
        assert!(text(short).contains("table has 319 elements"));
        let wrong = |op: NormQkvRopeAppend| text(check(&op, 2048, 128, (128, 64)));
        assert!(wrong(NormQkvRopeAppend { rows: 17, ..op.clone() }).ends_with("1 to 16 rows"));
        assert!(wrong(NormQkvRopeAppend { head_dim: 8, ..op.clone() }).ends_with("head_dim % 16 == 0"));
        let normed = NormQkvRopeAppend { head_norm: true, ..op };
        let check = |heads, arrived| normed.check(256, 2048, 2048, arrived, 128, 2, 1, 64, (128, 64), heads, 320);
        assert!(check(Some((2, 32)), 3).is_ok());
        assert!(text(check(None, 3)).contains("heads is None"));
        assert!(text(check(Some((2, 32)), 2)).contains("arrived has 2 elements"));
    }

    #[test]
    fn a_head_is_whole_blocks() {
        assert_eq!(op().grid(Ring::Short).blocks, [8, 1, 1]);
        let llama = NormQkvRopeAppend::cases().into_iter().find(|c| c.dim == 4096).unwrap();
        assert_eq!(llama.grid(Ring::Short).blocks, [384, 1, 1]);
    }
}
