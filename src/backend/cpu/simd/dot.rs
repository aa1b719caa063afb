//! `y[r, c] = sum_j x[r, j] w[c, j]` for a block of rows of `w`: the one loop of all matrix products and of attention scores.
//!
//! bits:     16 lanes take pairs of columns in turn ([`Dot`]), one tree sums them at the end ([`Lanes::sum`]). So the bits of
//!           `y[r, c]` depend on row `r` of `x` and row `c` of `w` alone: not on the other rows, on the block or on the CPU.
//! registers: `Dot::ROWS` x `Dot::COLS` sums of 16 lanes at a time, along the whole of `k`; both operands are read along their rows,
//!           so nothing is transposed or broadcast.
//! traffic:  up to [`PACK_ROWS`] rows of `x`, the weights go from memory to registers; for more, the block is unpacked once, aligned,
//!           into the second-level cache and read from there.
//! tests:    every path against the definition and against each other, bit for bit, in `cpu/tests`.

use super::{
    Elements, Kernel, Level, Line,
    lanes::{Bf16, Dot, F32, Format, Lanes, Packed},
    lines,
};

/// More rows of `x` than this, and a block of weights is unpacked first.
pub const PACK_ROWS: usize = 16;

/// One block of products.
pub struct Product<'a> {
    /// Prepared rows, one after the other; see `prepare` in `rows.rs`. [rows, lines(k)]
    pub x: &'a [Line],
    pub rows: usize,
    /// [cols, k]
    pub w: Elements<'a>,
    pub cols: usize,
    pub k: usize,
    /// [rows, y_stride], of which `cols` of each row are written.
    pub y: &'a mut [f32],
    pub y_stride: usize,
    /// Room for the block, unpacked, if there are more than [`PACK_ROWS`] rows: [cols, lines(k)]
    pub packed: &'a mut [Line],
}

/// The same, with pointers and types.
#[derive(Clone, Copy)]
struct Block<X, W> {
    x: *const X,
    rows: usize,
    w: *const W,
    /// Elements from a row of `w` to the next.
    w_stride: usize,
    cols: usize,
    k: usize,
    y: *mut f32,
    y_stride: usize,
}

impl Product<'_> {
    /// Computes it.
    ///
    /// # Panics
    /// If a slice is too short.
    pub fn run(self, level: Level) {
        let Product { rows, cols, k, y_stride, w, .. } = self;
        if rows == 0 || cols == 0 {
            return;
        }
        let (row, room) = (lines(level, k), if rows > PACK_ROWS { cols } else { 0 });
        assert!(self.x.len() >= rows * row, "{} lines of x, {rows} rows of {k}", self.x.len());
        assert!(w.len() >= cols * k, "{} weights, {cols} rows of {k}", w.len());
        assert!(
            y_stride >= cols && self.y.len() >= (rows - 1) * y_stride + cols,
            "{} of y, {rows} x {cols}",
            self.y.len()
        );
        assert!(self.packed.len() >= room * row, "{} lines of room, {cols} rows of {k}", self.packed.len());
        let f32_weights = matches!(w, Elements::F32(_));
        assert!(!f32_weights || level == level.of_f32(), "{level} prepares rows for weights in bf16");
        super::run(level, Checked(self));
    }
}

/// A product whose sizes are as [`Product::run`] asserts.
struct Checked<'a>(Product<'a>);

impl Kernel for Checked<'_> {
    #[inline(always)]
    unsafe fn run<D: Dot>(self) {
        // SAFETY: the contract of the trait, and the asserts: `rows` prepared rows of `k` at `x`, `cols` rows of `k` at `w`, `cols` of
        // each of `rows` rows at `y`, and room for `cols` prepared rows at `packed` where it is needed.
        unsafe {
            match self.0.w {
                Elements::Bf16(w) => block::<D, Bf16>(self.0, w.as_ptr().cast()),
                Elements::F32(w) => block::<D, F32>(self.0, w.as_ptr()),
            }
        }
    }
}

/// # Safety
/// The sizes are as [`Product::run`] asserts, `w` is the product's, and the CPU has the instructions of `D`.
#[inline(always)]
unsafe fn block<D: Dot, F: Format<D>>(p: Product<'_>, w: *const F::Elem) {
    let Product { rows, cols, k, y_stride, .. } = p;
    let (x, y) = (p.x.as_ptr().cast::<D::Elem>(), p.y.as_mut_ptr());
    // SAFETY: the contract of this function, and that a packed row is as long as a prepared one.
    unsafe {
        if rows <= PACK_ROWS {
            return tiles::<D, F>(Block { x, rows, w, w_stride: k, cols, k, y, y_stride });
        }
        let (padded, packed) = (k.next_multiple_of(32), p.packed.as_mut_ptr().cast::<D::Elem>());
        for c in 0..cols {
            let row = w.add(c * k);
            for chunk in 0..k / 32 {
                D::store(F::load(row, chunk), packed.add(c * padded + 32 * chunk));
            }
            if !k.is_multiple_of(32) {
                D::store(tail::<D, F>(row, k), packed.add((c + 1) * padded - 32));
            }
        }
        tiles::<D, Packed>(Block { x, rows, w: packed, w_stride: padded, cols, k: padded, y, y_stride });
    }
}

/// The last `k % 32` values of a row, filled up with 0.
///
/// # Safety
/// As [`Format::load`]; the row has `k` elements.
#[inline(always)]
unsafe fn tail<D: Dot, F: Format<D>>(row: *const F::Elem, k: usize) -> D::Pairs {
    let mut rest = [F::Elem::default(); 32];
    // SAFETY: the row has `k` elements, of which less than 32 are copied.
    unsafe {
        std::ptr::copy_nonoverlapping(row.add(k / 32 * 32), rest.as_mut_ptr(), k % 32);
        F::load(rest.as_ptr(), 0)
    }
}

/// Columns outside: their weights come from memory once, and from the first-level cache for all rows but the first.
///
/// # Safety
/// All that a block is made of is there, and the CPU has the instructions of `D`.
#[inline(always)]
unsafe fn tiles<D: Dot, F: Format<D>>(b: Block<D::Elem, F::Elem>) {
    let padded = b.k.next_multiple_of(32);
    let mut c = 0;
    while c < b.cols {
        let width = if b.cols - c < D::COLS { 1 } else { D::COLS };
        for r in (0..b.rows).step_by(D::ROWS) {
            // SAFETY: the tile is within rows x cols.
            unsafe {
                let (x, w, y) = (b.x.add(r * padded), b.w.add(c * b.w_stride), b.y.add(r * b.y_stride + c));
                let b = Block { x, w, y, ..b };
                match (D::ROWS.min(b.rows - r), width) {
                    (1, 1) => tile::<D, F, 1, 1>(b),
                    (2, 1) => tile::<D, F, 2, 1>(b),
                    (3, 1) => tile::<D, F, 3, 1>(b),
                    (_, 1) => tile::<D, F, 4, 1>(b),
                    (1, 2) => tile::<D, F, 1, 2>(b),
                    (_, 2) => tile::<D, F, 2, 2>(b),
                    (1, _) => tile::<D, F, 1, 4>(b),
                    (2, _) => tile::<D, F, 2, 4>(b),
                    (3, _) => tile::<D, F, 3, 4>(b),
                    _ => tile::<D, F, 4, 4>(b),
                }
            }
        }
        c += width;
    }
}

/// No closures here and below: one is a function of its own, without the instructions of the level, and where it is not inlined every
/// instruction of its becomes a call.
///
/// # Safety
/// As [`tiles`], for `R` rows of `x` and `C` of `w`.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "both indices of a tile in every loop")]
unsafe fn tile<D: Dot, F: Format<D>, const R: usize, const C: usize>(b: Block<D::Elem, F::Elem>) {
    let Block { x, w, w_stride, k, y, y_stride, .. } = b;
    // SAFETY: the contract of this function.
    unsafe {
        let mut acc = [[D::Acc::splat(0.0); R]; C];
        let x_stride = k.next_multiple_of(32);
        for chunk in 0..k / 32 {
            let mut pairs = [F::load(w, chunk); C];
            for c in 1..C {
                pairs[c] = F::load(w.add(c * w_stride), chunk);
            }
            if F::FAR {
                for c in 0..C {
                    prefetch(w.wrapping_add((C + c) * w_stride + 32 * chunk));
                }
            }
            add::<D, R, C>(&mut acc, x.add(32 * chunk), x_stride, pairs);
        }
        if !k.is_multiple_of(32) {
            let mut pairs = [tail::<D, F>(w, k); C];
            for c in 1..C {
                pairs[c] = tail::<D, F>(w.add(c * w_stride), k);
            }
            add::<D, R, C>(&mut acc, x.add(k / 32 * 32), x_stride, pairs);
        }
        if R == 4 && C == 4 {
            return D::Acc::sums(&*(&raw const acc).cast(), y, y_stride);
        }
        for c in 0..C {
            for r in 0..R {
                *y.add(r * y_stride + c) = acc[c][r].sum();
            }
        }
    }
}

/// # Safety
/// `R` rows have 32 prepared values at `x`, `stride` apart.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "both indices of a tile in every loop")]
unsafe fn add<D: Dot, const R: usize, const C: usize>(
    acc: &mut [[D::Acc; R]; C],
    x: *const D::Elem,
    stride: usize,
    w: [D::Pairs; C],
) {
    for r in 0..R {
        // SAFETY: the contract of this function.
        unsafe {
            let x = D::load(x.add(r * stride));
            for c in 0..C {
                acc[c][r] = D::dot(acc[c][r], x, w[c]);
            }
        }
    }
}

/// Asks for what the next tile begins with: rows are too short for the CPU to find out by itself.
#[inline(always)]
fn prefetch<T>(p: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which no address makes fault.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}
