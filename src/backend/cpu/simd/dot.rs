//! `y[r, c] = sum_j x[r, j] w[c, j]` for a block of rows of `w`: the one loop of all matrix products and of attention scores.
//!
//! bits:     16 lanes take pairs of columns in turn ([`Dot`]), one tree sums them at the end ([`Lanes::sum`]). So the bits of
//!           `y[r, c]` depend on row `r` of `x` and row `c` of `w` alone: not on the other rows, on the block or on the CPU.
//! registers: `Dot::ROWS` x `Dot::COLS` sums of 16 lanes at a time, along the whole of `k`; both operands are read along their rows,
//!           so nothing is transposed or broadcast.
//! traffic:  up to [`PACK_ROWS`] rows of `x`, the weights go from memory to registers; for more, the block is unpacked once, aligned,
//!           into the second-level cache and read from there.
//! tests:    every path against the definition and against each other, bit for bit, at the end of `mod.rs`.

use super::{
    Level, Line, Weights,
    lanes::{Bf16, Dot, F32, Fma, Format, Lanes, Packed},
    lines,
};

/// More rows of `x` than this, and a block of weights is unpacked first.
pub const PACK_ROWS: usize = 16;

/// One block of products.
pub struct Product<'a> {
    /// Prepared rows, one after the other; see [`super::rows::prepare`]. [rows, lines(k)]
    pub x: &'a [Line],
    pub rows: usize,
    /// [cols, k]
    pub w: Weights<'a>,
    pub cols: usize,
    pub k: usize,
    /// [rows, y_stride], of which `cols` of each row are written.
    pub y: &'a mut [f32],
    pub y_stride: usize,
    /// Room for the block, unpacked: [cols, lines(k)]
    pub packed: &'a mut [Line],
}

impl Product<'_> {
    /// Computes it.
    ///
    /// # Panics
    /// If a slice is too short.
    pub fn run(self, level: Level) {
        let Product { x, rows, w, cols, k, y, y_stride, packed } = self;
        if rows == 0 || cols == 0 {
            return;
        }
        assert!(x.len() >= rows * lines(level, k), "{} lines of x, {rows} rows of {k}", x.len());
        assert!(w.len() >= cols * k, "{} weights, {cols} rows of {k}", w.len());
        assert!(y_stride >= cols && y.len() >= (rows - 1) * y_stride + cols, "{} of y, {rows} x {cols}", y.len());
        assert!(packed.len() >= cols * lines(level, k), "{} lines of room, {cols} rows of {k}", packed.len());
        let (x, y, packed) = (x.as_ptr(), y.as_mut_ptr(), packed.as_mut_ptr());
        // SAFETY: the asserts: `rows` prepared rows of `k` at `x`, `cols` rows of `k` at `w`, `cols` of each of `rows`
        // rows at `y`, and room for `cols` prepared rows at `packed`. A level is only made where the CPU has it.
        unsafe {
            match w {
                Weights::Bf16(w) => bf16(level, x, rows, w.as_ptr(), cols, k, y, y_stride, packed),
                Weights::F32(w) => f32(level, x, rows, w.as_ptr(), cols, k, y, y_stride, packed),
            }
        }
    }
}

/// The entry of a format: its loop once for each level, compiled for that level's instructions.
macro_rules! entry {
    ($name:ident, $format:ident, $elem:ty, [$($level:ident: $dot:ty, $features:literal;)*]) => {
        #[expect(clippy::too_many_arguments, reason = "those of block")]
        unsafe fn $name(
            level: Level, x: *const Line, rows: usize, w: *const $elem, cols: usize, k: usize, y: *mut f32, stride: usize, packed: *mut Line,
        ) {
            match level {
                $(
                    Level::$level => {
                        #[target_feature(enable = $features)]
                        unsafe fn go(
                            x: *const Line, rows: usize, w: *const $elem, cols: usize, k: usize, y: *mut f32, stride: usize, packed: *mut Line,
                        ) {
                            // SAFETY: the contract of the caller.
                            unsafe { block::<$dot, $format>(x.cast(), rows, w, cols, k, y, stride, packed.cast()) }
                        }
                        // SAFETY: the contract of the caller; the level's instructions are there.
                        unsafe { go(x, rows, w, cols, k, y, stride, packed) }
                    }
                )*
                #[allow(unreachable_patterns, reason = "where all levels are listed")]
                _ => unreachable!("activations in f32 have no {level:?}"),
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
use {super::avx2::Avx2, super::avx512::DpBf16, std::arch::x86_64::__m512};

#[cfg(target_arch = "x86_64")]
entry!(bf16, Bf16, u16, [
    Portable: Fma<[f32; 16], 2>, "sse2";
    Avx2: Fma<Avx2, 2>, "avx2,fma";
    Avx512: Fma<__m512, 4>, "avx512f,avx512bw";
    Avx512Bf16: DpBf16, "avx512f,avx512bw,avx512bf16";
]);
#[cfg(target_arch = "x86_64")]
entry!(f32, F32, f32, [
    Portable: Fma<[f32; 16], 2>, "sse2";
    Avx2: Fma<Avx2, 2>, "avx2,fma";
    Avx512: Fma<__m512, 4>, "avx512f,avx512bw";
]);
#[cfg(target_arch = "aarch64")]
entry!(bf16, Bf16, u16, [Portable: Fma<[f32; 16], 2>, "neon";]);
#[cfg(target_arch = "aarch64")]
entry!(f32, F32, f32, [Portable: Fma<[f32; 16], 2>, "neon";]);

/// # Safety
/// `x` has `rows` prepared rows of `k`, `w` has `cols` rows of `k`, `y` has `cols` of `rows` rows that are `stride` apart, and `packed`
/// has room for `cols` prepared rows if there are more than [`PACK_ROWS`]; the CPU has the instructions of `D`.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "pointers and their sizes")]
unsafe fn block<D: Dot, F: Format<D>>(
    x: *const D::Elem,
    rows: usize,
    w: *const F::Elem,
    cols: usize,
    k: usize,
    y: *mut f32,
    stride: usize,
    packed: *mut D::Elem,
) {
    // SAFETY: the contract of this function, and that a packed row is as long as a prepared one.
    unsafe {
        if rows <= PACK_ROWS {
            return tiles::<D, F>(x, rows, w, k, cols, k, y, stride);
        }
        let padded = k.next_multiple_of(32);
        for c in 0..cols {
            let row = w.add(c * k);
            for chunk in 0..k / 32 {
                D::store(F::load(row, chunk), packed.add(c * padded + 32 * chunk));
            }
            if !k.is_multiple_of(32) {
                D::store(tail::<D, F>(row, k), packed.add((c + 1) * padded - 32));
            }
        }
        tiles::<D, Packed>(x, rows, packed, padded, cols, padded, y, stride);
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

/// # Safety
/// As [`block`]; rows of `w` are `w_stride` apart.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "pointers and their sizes")]
unsafe fn tiles<D: Dot, F: Format<D>>(
    x: *const D::Elem,
    rows: usize,
    w: *const F::Elem,
    w_stride: usize,
    cols: usize,
    k: usize,
    y: *mut f32,
    stride: usize,
) {
    let padded = k.next_multiple_of(32);
    let mut r = 0;
    while r < rows {
        let height = D::ROWS.min(rows - r);
        let mut c = 0;
        while c < cols {
            let width = if cols - c < D::COLS { 1 } else { D::COLS };
            // SAFETY: tile (r, c) of `height` x `width` is within rows x cols.
            unsafe {
                let (x, w, y) = (x.add(r * padded), w.add(c * w_stride), y.add(r * stride + c));
                match (height, width) {
                    (1, 1) => tile::<D, F, 1, 1>(x, w, w_stride, k, y, stride),
                    (2, 1) => tile::<D, F, 2, 1>(x, w, w_stride, k, y, stride),
                    (3, 1) => tile::<D, F, 3, 1>(x, w, w_stride, k, y, stride),
                    (_, 1) => tile::<D, F, 4, 1>(x, w, w_stride, k, y, stride),
                    (1, 2) => tile::<D, F, 1, 2>(x, w, w_stride, k, y, stride),
                    (_, 2) => tile::<D, F, 2, 2>(x, w, w_stride, k, y, stride),
                    (1, _) => tile::<D, F, 1, 4>(x, w, w_stride, k, y, stride),
                    (2, _) => tile::<D, F, 2, 4>(x, w, w_stride, k, y, stride),
                    (3, _) => tile::<D, F, 3, 4>(x, w, w_stride, k, y, stride),
                    _ => tile::<D, F, 4, 4>(x, w, w_stride, k, y, stride),
                }
            }
            c += width;
        }
        r += height;
    }
}

/// No closures here and below: one is a function of its own, without the instructions of the level, and where it is not inlined every
/// instruction of its becomes a call.
///
/// # Safety
/// As [`tiles`], for `R` rows of `x` and `C` of `w`.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "both indices of a tile in every loop")]
unsafe fn tile<D: Dot, F: Format<D>, const R: usize, const C: usize>(
    x: *const D::Elem,
    w: *const F::Elem,
    w_stride: usize,
    k: usize,
    y: *mut f32,
    stride: usize,
) {
    // SAFETY: the contract of this function.
    unsafe {
        let mut acc = [[D::Acc::splat(0.0); R]; C];
        let stride_x = k.next_multiple_of(32);
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
            add::<D, R, C>(&mut acc, x.add(32 * chunk), stride_x, pairs);
        }
        if !k.is_multiple_of(32) {
            let mut pairs = [tail::<D, F>(w, k); C];
            for c in 1..C {
                pairs[c] = tail::<D, F>(w.add(c * w_stride), k);
            }
            add::<D, R, C>(&mut acc, x.add(k / 32 * 32), stride_x, pairs);
        }
        if R == 4 && C == 4 {
            return D::Acc::sums(&*(&raw const acc).cast(), y, stride);
        }
        for c in 0..C {
            for r in 0..R {
                *y.add(r * stride + c) = acc[c][r].sum();
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

/// Asks for what the next tile begins with: rows are too short for the CPU to find out by itself (10% of a product of one row).
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
