//! `out[r, i] (+)= sum_j x[r, j] * w[i, j]`, and the bias of `w`, for a few rows (decode). The weights are read once and everything else is
//! small, so no kernel can be faster than reading them.
//!
//! Shapes: `out` [rows, n], `x` [rows, k], `w` [n, k]. What happens at the end, the epilogue, is the kind of [`Out`].
//! Rounding: sums in f32, one rounding at the store; bias and residual are added before it.
//! The kernel's bits of a row depend on the row and the weights only: not on the other rows, their number or n.

use super::{Act, Cost, Grid, Op, Tolerance, download, expect, noise_buf, noise_weight, poison};
use crate::{
    backend::{DECODE_ROWS, Out, train::TrainBackend},
    error::Result,
    tiles,
};

/// Largest n and k: the kernel adds a tile or a round of columns to them in an int.
const MAX_SIZE: usize = 1 << 30;

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct Gemv {
    /// Rows of `x` and `out`, at most [`DECODE_ROWS`].
    pub rows: usize,
    /// Rows of `w`, columns of `out`.
    pub n: usize,
    /// Columns of `x` and `w`: what is summed over.
    pub k: usize,
}

impl Gemv {
    /// Buffer lengths fit the sizes, and the rows are few.
    pub fn check(&self, out: usize, x: usize, w: (usize, usize)) -> Result<()> {
        expect(Self::STEM, w == (self.n, self.k), || format!("w is {w:?}, {self:?}"))?;
        expect(Self::STEM, (1..=DECODE_ROWS).contains(&self.rows), || {
            format!("{self:?}: 1 to {DECODE_ROWS} rows, more go to gemm")
        })?;
        expect(Self::STEM, x >= self.rows * self.k && out >= self.rows * self.n, || {
            format!("x has {x} elements and out {out}, {self:?}")
        })
    }

    /// What the kernel asks for beyond [`Gemv::check`]: rows of `w` and `x` are read 16 bytes at a time, and 16 rows of `w`
    /// by a block.
    pub fn check_kernel(&self) -> Result<()> {
        let enough = self.n >= tiles::GEMV_TILE as usize;
        expect(Self::STEM, enough && self.k > 0 && self.k.is_multiple_of(8), || {
            format!("{self:?}: the kernel needs k % 8 == 0 and n >= {}", tiles::GEMV_TILE)
        })?;
        expect(Self::STEM, self.n.max(self.k) <= MAX_SIZE, || format!("{self:?}: the kernel takes n and k up to 2^30"))
    }

    /// One block per `GEMV_TILE` rows of `w`.
    pub fn grid(&self, ring: Ring) -> Grid {
        product(self.n, self.rows, false, ring).0
    }

    /// The definition, before the epilogue: `out` [rows, n] in f32.
    pub fn reference<A: Act, W: Act>(&self, out: &mut [f32], x: &[A], w: &[W]) {
        for (r, out) in out.chunks_exact_mut(self.n).take(self.rows).enumerate() {
            let x = &x[r * self.k..][..self.k];
            for (out, w) in out.iter_mut().zip(w.chunks_exact(self.k)) {
                *out = x.iter().zip(w).map(|(x, w)| x.to_f32() * w.to_f32()).sum();
            }
        }
    }

    /// The kernel.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        cu: &crate::backend::cuda::Cuda,
        out: Out<'_, crate::backend::cuda::Cuda>,
        x: &crate::backend::cuda::Buffer<half::bf16>,
        w: &crate::backend::cuda::Weight,
    ) -> Result<()> {
        use crate::backend::cuda::Arg;
        let (epilogue, len, out): (_, _, Arg) = match out {
            Out::Store(out) => ("store", out.len(), out.into()),
            Out::Add(out) => ("add", out.len(), out.into()),
            Out::F32(out) => ("f32", out.len(), out.into()),
        };
        self.check(len, x.len(), (w.rows, w.cols))?;
        self.check_kernel()?;
        expect(Self::STEM, w.kind.record().is_none() || epilogue == "add", || {
            format!("{self:?}: with packed weights ({:?}) it adds", w.kind)
        })?;
        let (grid, kind) = w.product(self.rows, false, cu.ring());
        let (kernel, trace) = (format!("gemv_{}_{epilogue}_{kind}", w.kind.name()), cu.trace(self, grid));
        let [rows, n, k] = [self.rows, self.n, self.k].map(Arg::from);
        let args = [out, x.into(), (&w.data).into(), w.bias.as_ref().into(), rows, n, k, trace];
        // SAFETY: check() proved that x holds [rows, k], w [n, k] and a bias [n], if any, and out [rows, n] elements of the epilogue's type,
        // and check_kernel() that rows are 16-byte aligned, that w has the rows of a block and that the sizes fit an int;
        // the arguments are those of the kernel, in order; it waits for its predecessor before it reads what that wrote.
        unsafe { cu.launch_dependent(&kernel, self, grid, &args) }
    }
}

/// The ring is the shared memory through which a product takes its weights: some stages are being filled while another
/// is used. For one row it is as deep as the device has room for; the result has the same bits with either. Products of
/// more rows use short rings. See `kernels/common/gemv.cuh`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ring {
    /// `GEMV_STAGES` stages a warp.
    Short,
    /// `GEMV_DEEP_STAGES`.
    Deep,
}

/// Launch and kernel (the end of its name) of a product of `kernels/common/gemv.cuh`: `n` rows of `w` times `rows` rows of
/// `x`, normed or not.
pub(crate) fn product(n: usize, rows: usize, norm: bool, ring: Ring) -> (Grid, &'static str) {
    let (kind, stages) = match (rows, ring) {
        (..=1, Ring::Short) => ("r1", tiles::GEMV_STAGES),
        (..=1, Ring::Deep) => ("r1_deep", tiles::GEMV_DEEP_STAGES),
        (..=8, _) => ("r8", tiles::GEMV_STAGES),
        _ => ("r16", tiles::GEMV_STAGES),
    };
    let stage = (tiles::GEMV_TILE as usize + rows + usize::from(norm)) * tiles::GEMV_STAGE as usize * 2;
    let shared = stage as u32 * stages * tiles::GEMV_WARPS;
    let blocks = n.div_ceil(tiles::GEMV_TILE as usize) as u32;
    (Grid { blocks: [blocks, 1, 1], threads: tiles::GEMV_WARPS * 32, shared }, kind)
}

/// The cases run [`Out::Store`]; `tests/device/decode.rs` has the other epilogues.
impl Op for Gemv {
    const STEM: &'static str = "gemv";
    type Io<B: TrainBackend> = (B::Buf<B::Act>, B::Buf<B::Act>, B::Weight);

    fn cases() -> Vec<Self> {
        let case = |(rows, n, k)| Gemv { rows, n, k };
        let edges = [
            (1, 16, 8),     // one block, one chunk of a row
            (3, 17, 72),    // just past a block, just past a stage of 64 columns
            (8, 31, 256),   // one stage a warp
            (9, 23, 264),   // a second group of rows, of one; a stage for one warp more
            (2, 16, 1032),  // just past the first round of the rings
            (1, 18, 2056),  // the same of the deep ring
            (5, 20, 2056),  // full rounds and a rest
            (16, 17, 2320), // all rows
        ];
        let demo = [(1, 512, 256), (8, 1408, 256), (1, 256, 704)];
        let smollm2_135m = [(1, 960, 576), (4, 576, 576), (1, 3072, 576), (1, 576, 1536), (1, 49152, 576)];
        let llama3_8b = [(1, 6144, 4096), (1, 4096, 4096), (1, 28672, 4096), (1, 4096, 14336), (1, 128_256, 4096)];
        let rows = [(8, 6144, 4096), (8, 4096, 14336), (16, 6144, 4096), (16, 4096, 14336)];
        [&edges[..], &demo, &smollm2_135m, &llama3_8b, &rows].concat().into_iter().map(case).collect()
    }

    /// Of [`Out::Store`].
    fn cost(&self) -> Cost {
        let [rows, n, k] = [self.rows, self.n, self.k].map(|n| n as u64);
        Cost { read: 2 * k * (n + rows), write: 2 * rows * n, flops: 2 * rows * n * k }
    }

    /// The f32 sums differ in their order only (relative error about 1e-6 of the terms' size), so few elements are
    /// rounded to a neighbour.
    fn tolerance(&self) -> Tolerance {
        Tolerance::BF16
    }

    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>> {
        Ok((
            poison(b, self.rows * self.n)?,
            noise_buf(b, self.rows * self.k, seed, 1.0)?,
            noise_weight(b, self.n, self.k, seed + 1, 0.5)?,
        ))
    }

    fn run<B: TrainBackend>(&self, b: &B, (out, x, w): &mut Self::Io<B>) -> Result<()> {
        b.gemv(self, Out::Store(out), x, w)
    }

    fn outputs<B: TrainBackend>(&self, b: &B, (out, ..): &Self::Io<B>) -> Result<Vec<f32>> {
        download(b, out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_the_rows_and_fill_132_multiprocessors() {
        for n in [16, 17, 31, 32, 49_152] {
            let blocks = Gemv { rows: 1, n, k: 8 }.grid(Ring::Short).blocks[0] as usize;
            assert!(blocks * 16 >= n && (blocks - 1) * 16 < n, "{n} rows, {blocks} blocks");
        }
        // the matrices of Llama-3-8B: at most 3% of the block places of an H100 or H200 are idle in the last round
        for n in [4096, 6144, 28_672, 128_256] {
            let blocks = Gemv { rows: 1, n, k: 4096 }.grid(Ring::Deep).blocks[0];
            let places = blocks.next_multiple_of(132);
            assert!(f64::from(blocks) >= 0.969 * f64::from(places), "{n} rows: {blocks} blocks for {places} places");
        }
    }

    #[test]
    fn each_number_of_rows_has_its_kernel() {
        let of = |rows, ring| product(16, rows, true, ring);
        for (rows, short, deep) in [(1, "r1", "r1_deep"), (2, "r8", "r8"), (8, "r8", "r8"), (9, "r16", "r16")] {
            assert_eq!((of(rows, Ring::Short).1, of(rows, Ring::Deep).1), (short, deep), "{rows} rows");
        }
        // 16 rows of w, the gain and the rows of x, 128 bytes each, of four warps
        let shared = |rows, ring| of(rows, ring).0.shared;
        assert_eq!(shared(1, Ring::Short), 18 * 128 * 4 * 4);
        assert_eq!(shared(1, Ring::Deep), 18 * 128 * 8 * 4);
        assert_eq!(shared(DECODE_ROWS, Ring::Deep), 33 * 128 * 4 * 4);
    }

    #[test]
    fn check_names_what_is_wrong() {
        let op = Gemv { rows: 2, n: 20, k: 16 };
        assert!(op.check(40, 32, (20, 16)).is_ok() && op.check_kernel().is_ok());
        let text = |r: Result<()>| r.unwrap_err().to_string();
        assert_eq!(text(op.check(40, 32, (16, 20))), "gemv: w is (16, 20), Gemv { rows: 2, n: 20, k: 16 }");
        assert!(text(op.check(39, 32, (20, 16))).starts_with("gemv: x has 32 elements and out 39"));
        let rows = |rows| text(Gemv { rows, ..op.clone() }.check(999, 999, (20, 16)));
        assert!(rows(17).ends_with("1 to 16 rows, more go to gemm") && rows(0).contains("rows: 0"));
        assert!(text(Gemv { k: 12, ..op.clone() }.check_kernel()).ends_with("the kernel needs k % 8 == 0 and n >= 16"));
        assert!(text(Gemv { n: (1 << 30) + 1, ..op }.check_kernel()).ends_with("up to 2^30"));
    }

    #[test]
    fn cost_is_the_weights_and_little_else() {
        let c = Gemv { rows: 1, n: 4096, k: 14_336 }.cost();
        assert_eq!(c, Cost { read: 117_440_512 + 28_672, write: 8192, flops: 117_440_512 });
    }
}
