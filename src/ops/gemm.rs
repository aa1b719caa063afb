//! `out[r, i] (+)= sum_j x[r, j] * w[i, j]`, and the bias of `w`, for many rows (prefill): tensor cores.
//!
//! Shapes: `out` [rows, n], `x` [rows, k], `w` [n, k]. What happens at the end, the epilogue, is the kind of
//! [`Out`](crate::backend::Out).
//! Rounding: sums in f32, one rounding at the store; bias and residual are added before it.
//! The kernel's bits of a row depend on the row and the weights only: not on the tile, the other rows or the GPU's
//! size. Long sums are made of parts; how many depends on `n` and `k` alone.
//! Where cuBLAS computes the product, it adds in an order of its own, which may change with `rows`.

use super::{Cost, Grid, Op, Tolerance, download, expect, noise_buf, noise_weight, poison};
use crate::{
    backend::{Out, train::TrainBackend},
    error::Result,
    tiles,
};

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct Gemm {
    /// Rows of `x` and `out`.
    pub rows: usize,
    /// Rows of `w`, columns of `out`.
    pub n: usize,
    /// Columns of `x` and `w`: what is summed over.
    pub k: usize,
}

/// What one block of the kernel computes.
#[derive(Debug, PartialEq)]
pub struct Tile {
    /// Rows and columns of `out`.
    pub side: u32,
    /// Columns of `k` in a stage of the pipeline.
    depth: u32,
    /// A block computes one part of `k`, not all.
    splits: bool,
    /// Symbols for the epilogues [`Out::Store`], [`Out::Add`], [`Out::F32`].
    kernels: [&'static str; 3],
}

const LARGE: Tile = Tile {
    side: tiles::GEMM_LARGE_SIDE,
    depth: tiles::GEMM_LARGE_DEPTH,
    splits: false,
    kernels: ["gemm_bf16_large_store", "gemm_bf16_large_add", "gemm_bf16_large_f32"],
};
const SMALL: Tile = Tile {
    side: tiles::GEMM_SMALL_SIDE,
    depth: tiles::GEMM_SMALL_DEPTH,
    splits: true,
    kernels: ["gemm_bf16_small_store", "gemm_bf16_small_add", "gemm_bf16_small_f32"],
};

/// No GPU has more multiprocessors than this.
const MOST_SMS: usize = 192;

impl Gemm {
    /// Buffer lengths fit the sizes.
    pub fn check(&self, out: usize, x: usize, w: (usize, usize)) -> Result<()> {
        expect(Self::STEM, w == (self.n, self.k), || format!("w is {w:?}, {self:?}"))?;
        expect(Self::STEM, self.rows > 0 && x >= self.rows * self.k && out >= self.rows * self.n, || {
            format!("x has {x} elements and out {out}, {self:?}")
        })
    }

    /// The large tile if it gives each multiprocessor a block: it has half the traffic of the small one.
    pub fn tile(&self, sm_count: u32) -> &'static Tile {
        let [x, y] = self.tiles(&LARGE);
        if x * y >= sm_count { &LARGE } else { &SMALL }
    }

    /// How many columns of `k` are summed on their own, in order; these sums are then added in order. Without such
    /// parts, few rows of a small matrix would make too few blocks. A part is whole stages of both tiles, or all
    /// columns and more.
    pub fn part(&self) -> usize {
        let stage = SMALL.depth as usize;
        let [blocks, most, least] = [tiles::GEMM_BLOCKS, tiles::GEMM_PARTS, tiles::GEMM_PART_DEPTH].map(|n| n as usize);
        let by_blocks = blocks / self.n.div_ceil(SMALL.side as usize);
        let parts = by_blocks.min(most).min(self.k / least).max(1);
        self.k.div_ceil(stage).div_ceil(parts) * stage
    }

    /// How many elements of scratch are needed: f32 sums, and counters. None if there is one part.
    pub fn workspace(&self, tile: &Tile) -> (usize, usize) {
        let (parts, tiles) = (self.k.div_ceil(self.part()), self.tiles(tile).iter().product::<u32>() as usize);
        let slots = if tile.splits { parts } else { 1 };
        if parts == 1 { (0, 0) } else { (slots * tiles * (tile.side * tile.side) as usize, tiles) }
    }

    /// The most of [`Gemm::workspace`] for up to `rows` rows, whatever the GPU.
    pub fn most_workspace(rows: usize, n: usize, k: usize) -> (usize, usize) {
        // the small tile's: it is not used where the large one, four times its size, fills the device
        let small_rows = (4 * MOST_SMS / n.div_ceil(SMALL.side as usize)).max(1) * SMALL.side as usize;
        let of = |rows: usize, tile| Gemm { rows, n, k }.workspace(tile);
        let (large, small) = (of(rows, &LARGE), of(rows.min(small_rows), &SMALL));
        (large.0.max(small.0), large.1.max(small.1))
    }

    /// Tiles of `out` by rows and by columns.
    fn tiles(&self, tile: &Tile) -> [u32; 2] {
        [self.rows, self.n].map(|n| n.div_ceil(tile.side as usize) as u32)
    }

    /// One block per tile of `out`, row tiles fastest; with the small tile, one for each part.
    pub fn grid(&self, tile: &Tile) -> Grid {
        let stage = 2 * tile.side * tile.depth * size_of::<half::bf16>() as u32;
        let [x, y] = self.tiles(tile);
        let parts = if tile.splits { self.k.div_ceil(self.part()) as u32 } else { 1 };
        Grid { blocks: [x, y, parts], threads: tiles::GEMM_THREADS, shared: tiles::GEMM_STAGES * stage }
    }

    /// The kernel, or cuBLAS where [`GemmBy`](crate::backend::cuda::GemmBy) says so and there is no bias, which cuBLAS does not add.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        cu: &crate::backend::cuda::Cuda,
        out: Out<'_, crate::backend::cuda::Cuda>,
        x: &crate::backend::cuda::Buffer<half::bf16>,
        w: &crate::backend::cuda::Weight,
        bias: Option<&crate::backend::cuda::Buffer<half::bf16>>,
    ) -> Result<()> {
        use crate::backend::cuda::Arg;
        if bias.is_none()
            && let Some(blas) = cu.blas_for(self.rows)?
        {
            return cu.timed("cublas", || blas.gemm(self, &out, x, w));
        }
        let (epilogue, len, out): (_, _, Arg) = match out {
            Out::Store(out) => (0, out.len(), out.into()),
            Out::Add(out) => (1, out.len(), out.into()),
            Out::F32(out) => (2, out.len(), out.into()),
        };
        self.check(len, x.len(), (w.rows, w.cols))?;
        expect(Self::STEM, self.k.is_multiple_of(8), || format!("{self:?}: the kernel needs k % 8 == 0"))?;
        let tile = self.tile(cu.info().sm_count);
        let grid = self.grid(tile);
        super::expect_ints(Self::STEM, &[self.rows, self.n, self.k])?;
        expect(Self::STEM, grid.blocks[1] <= 0xffff, || {
            format!("{self:?}: n is above the kernel's limit of 4 million")
        })?;
        let (sums, counters) = self.workspace(tile);
        cu.with_workspace(sums, counters, |sums, arrived| {
            let [rows, n, k, part] = [self.rows, self.n, self.k, self.part()].map(Arg::from);
            let (w, bias) = ((&w.data).into(), bias.into());
            let args = [out, sums.into(), arrived.into(), x.into(), w, bias, rows, n, k, part];
            // SAFETY: check() proved that x holds [rows, k], w [n, k] and out [rows, n] elements of the epilogue's type,
            // workspace() is what the kernel needs of sums and counters, which are 0 and which no kernel uses at the same
            // time, since the stream runs one after the other; the sizes fit an int; the arguments are those of the kernel,
            // in order.
            unsafe { cu.launch(tile.kernels[epilogue], self, grid, &args) }
        })
    }
}

/// The cases run [`Out::Store`]; `tests/device/prefill.rs` has the other epilogues.
impl Op for Gemm {
    const STEM: &'static str = "gemm";
    type Io<B: TrainBackend> = (B::Buf<B::Act>, B::Buf<B::Act>, B::Weight);

    fn cases() -> Vec<Self> {
        let case = |rows, n, k| Gemm { rows, n, k };
        let mut cases = vec![
            case(1, 3, 8),       // one chunk, an odd row length
            case(9, 65, 40),     // just past a small tile, k no multiple of the depth
            case(65, 129, 72),   // three small tiles in each direction, all ragged
            case(129, 200, 264), // four large tiles
            case(17, 70, 1096),  // four parts, the last not full, of two small tiles
            case(200, 200, 520), // two parts, of four large tiles
            case(9, 512, 256),   // demo model
            case(9, 256, 704),
            case(17, 960, 576), // SmolLM2-135M
            case(512, 3072, 576),
            case(512, 576, 1536),
        ];
        for rows in [128, 512, 2048] {
            cases.extend([(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)].map(|(n, k)| case(rows, n, k)));
        }
        cases
    }

    fn cost(&self) -> Cost {
        let [rows, n, k] = [self.rows, self.n, self.k].map(|n| n as u64);
        Cost { read: 2 * k * (rows + n), write: 2 * rows * n, flops: 2 * rows * n * k }
    }

    /// The f32 sums differ in their order only (relative error about 1e-6 of the terms' size), so few elements are rounded to
    /// a neighbour.
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
        b.gemm(self, Out::Store(out), x, w)
    }

    fn outputs<B: TrainBackend>(&self, b: &B, (out, ..): &Self::Io<B>) -> Result<Vec<f32>> {
        download(b, out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_the_output_and_share_a_multiprocessor() {
        for (rows, n) in [(1, 1), (64, 128), (65, 129), (2048, 128_256)] {
            let op = Gemm { rows, n, k: 64 };
            for tile in [&LARGE, &SMALL] {
                let grid = op.grid(tile);
                let [x, y, z] = grid.blocks.map(|n| n as usize);
                let side = tile.side as usize;
                assert!(x * side >= rows && y * side >= n && z == 1, "{op:?}: {grid:?}");
                assert!((x - 1) * side < rows && (y - 1) * side < n, "{op:?}: {grid:?} has idle blocks");
                assert!(
                    2 * (grid.shared + 1024) <= 100 << 10,
                    "two blocks, each with its kilobyte, on an SM of 100 KiB"
                );
            }
        }
    }

    #[test]
    fn parts_are_of_n_and_k_alone_and_fill_a_gpu() {
        let parts = |n, k| [17, 64, 511, 2048].map(|rows| k_parts(&Gemm { rows, n, k }));
        assert_eq!(parts(4096, 4096), [4; 4]);
        assert_eq!(parts(4096, 14336), [4; 4]);
        assert_eq!(parts(6144, 4096), [2; 4]);
        assert_eq!(parts(28672, 4096), [1; 4]);
        assert_eq!(parts(576, 576), [2; 4]); // at least 256 columns each
        let op = Gemm { rows: 64, n: 4096, k: 14336 };
        assert_eq!(op.grid(&SMALL).blocks, [1, 64, 4]);
        assert_eq!(op.grid(&LARGE).blocks, [1, 32, 1]);
        for k in [8, 72, 511, 512, 520, 1096, 4096, 14336] {
            let part = Gemm { rows: 1, n: 64, k }.part();
            assert!(part.is_multiple_of(64) && part * k.div_ceil(part) >= k, "{k}: {part}");
        }
    }

    fn k_parts(op: &Gemm) -> usize {
        op.k.div_ceil(op.part())
    }

    #[test]
    fn the_planned_workspace_is_enough() {
        for (n, k) in [(4096, 4096), (6144, 4096), (576, 1536), (28672, 4096)] {
            for sms in [1, 46, 132, 170, 192] {
                for rows in (17..2048).step_by(47) {
                    let op = Gemm { rows, n, k };
                    let (needed, planned) = (op.workspace(op.tile(sms)), Gemm::most_workspace(2048, n, k));
                    let fits = needed.0 <= planned.0 && needed.1 <= planned.1;
                    assert!(fits, "{op:?} with {sms}: {needed:?} of {planned:?}");
                }
            }
        }
        assert_eq!(Gemm::most_workspace(2048, 28672, 4096), (0, 0));
    }

    #[test]
    fn the_large_tile_is_taken_when_it_fills_the_device() {
        assert_eq!(Gemm { rows: 2048, n: 4096, k: 4096 }.tile(132), &LARGE); // 16 * 32 blocks
        assert_eq!(Gemm { rows: 128, n: 4096, k: 4096 }.tile(132), &SMALL); // 32
        assert_eq!(Gemm { rows: 128, n: 28672, k: 4096 }.tile(132), &LARGE); // 224
    }

    #[test]
    fn check_and_cost() {
        let op = Gemm { rows: 3, n: 5, k: 8 };
        assert!(op.check(15, 24, (5, 8)).is_ok());
        assert_eq!(
            op.check(15, 24, (8, 5)).unwrap_err().to_string(),
            "gemm: w is (8, 5), Gemm { rows: 3, n: 5, k: 8 }"
        );
        assert!(op.check(14, 24, (5, 8)).unwrap_err().to_string().starts_with("gemm: x has 24 elements and out 14"));
        assert_eq!(op.cost(), Cost { read: 2 * 8 * 8, write: 30, flops: 240 });
    }
}
