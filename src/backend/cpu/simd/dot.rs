//! `y[r, c] = sum_j x[r, j] w[c, j]` for a block of rows of `w`: the one loop of all matrix products and of attention scores.
//!
//! bits:     16 lanes take pairs of columns in turn ([`Dot`]), one tree sums them at the end ([`Lanes::sum`]). Quantized weights have
//!           the sum of each 32 codes multiplied by their scale ([`Scale`]). So the bits of `y[r, c]` depend on row `r` of `x` and row
//!           `c` of `w` alone: not on the other rows, on the block or on the CPU.
//! registers: `Dot::ROWS` x `Dot::COLS` sums of 16 lanes at a time, along the whole of `k`; both operands are read along their rows,
//!           so nothing is transposed or broadcast.
//! traffic:  up to [`direct`] rows of `x`, the weights go from memory to registers; for more, the block is unpacked once, aligned,
//!           into the second-level cache and read from there.
//! tests:    every path against the definition and against each other, bit for bit, in `cpu/tests`.

use super::{
    Elements, Kernel, Level, Line,
    coded::{Coded, Kind},
    formats::{self, Bf16, Block as BlockOf, Code, E4m3, F32, Format, Int4, Int8, Packed, Scale, of_block},
    lanes::{Dot, Lanes},
    lines,
};
use crate::files::format;
use std::marker::PhantomData;

/// One block of products.
pub struct Product<'a> {
    /// Prepared rows (padded, and in the order in which the loop reads them), one after the other; see `prepare` in
    /// `rows.rs`. [rows, lines(k)]
    pub x: &'a [Line],
    pub rows: usize,
    /// [cols, k]
    pub w: Rows<'a>,
    pub cols: usize,
    pub k: usize,
    /// [rows, y_stride], of which `cols` of each row are written.
    pub y: &'a mut [f32],
    pub y_stride: usize,
    /// Room for the block, unpacked: [`room`].
    pub packed: &'a mut [Line],
}

/// Rows of weights by their format.
#[derive(Clone, Copy, Debug)]
pub enum Rows<'a> {
    /// Numbers.
    Plain(Elements<'a>),
    /// A GGUF type: the first row's blocks, and bytes from there to the next one's.
    Blocks { block: &'static format::Block, bytes: &'a [u8], stride: usize },
    /// Codes, with their scales beside them.
    Codes(Coded<'a>),
}

impl<'a> From<Elements<'a>> for Rows<'a> {
    fn from(w: Elements<'a>) -> Self {
        Rows::Plain(w)
    }
}

impl Rows<'_> {
    /// There are so many, of `k` columns.
    fn hold(&self, rows: usize, k: usize) -> bool {
        match self {
            Rows::Plain(w) => w.len() >= rows * k,
            Rows::Blocks { block, bytes, stride } => {
                k.is_multiple_of(block.weights) && bytes.len() >= (rows - 1) * stride + k / block.weights * block.bytes
            }
            Rows::Codes(c) => {
                let groups = c.groups > (k / 32).saturating_sub(1) >> c.shift && c.scales.len() >= rows * c.groups;
                let width = k / if c.kind == Kind::Int4 { 2 } else { 1 };
                let codes = c.width >= width && c.codes.len() >= rows * c.width;
                k.is_multiple_of(32) && groups && codes && (c.kind == Kind::E4m3 || c.zeros.len() >= rows * c.groups)
            }
        }
    }
}

/// Most rows of `x` for which numbers are read as they are; for more, a block of them is unpacked first.
pub const DIRECT: usize = 16;

/// The same of weights of any format: codes are worth it earlier.
fn direct(w: &Rows<'_>) -> usize {
    if matches!(w, Rows::Plain(_)) { DIRECT } else { 4 }
}

/// Lines of room that a product needs: for the block and the scales of its codes, if it is unpacked.
pub fn room(level: Level, w: &Rows<'_>, [rows, cols, k]: [usize; 3]) -> usize {
    let scales = match w {
        Rows::Plain(_) => 0,
        _ => (cols * k.div_ceil(32) * size_of::<[f32; 2]>()).div_ceil(size_of::<Line>()),
    };
    if rows > direct(w) { cols * lines(level, k) + scales } else { 0 }
}

/// The same, with pointers and types.
#[derive(Clone, Copy)]
struct Block<X, F> {
    x: *const X,
    rows: usize,
    w: F,
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
        let Product { rows, cols, k, y_stride, ref w, .. } = self;
        if rows == 0 || cols == 0 {
            return;
        }
        let (row, room) = (lines(level, k), room(level, w, [rows, cols, k]));
        assert!(self.x.len() >= rows * row, "{} lines of x, {rows} rows of {k}", self.x.len());
        assert!(w.hold(cols, k), "{w:?} are not {cols} rows of {k}");
        assert!(
            y_stride >= cols && self.y.len() >= (rows - 1) * y_stride + cols,
            "{} of y, {rows} x {cols}",
            self.y.len()
        );
        assert!(self.packed.len() >= room, "{} lines of room, {cols} rows of {k}", self.packed.len());
        let f32_weights = matches!(w, Rows::Plain(Elements::F32(_)));
        assert!(!f32_weights || level == level.of_f32(), "{level} prepares rows for weights in bf16");
        match self.w {
            Rows::Plain(Elements::Bf16(w)) => self.of(level, Bf16(w.as_ptr().cast(), k)),
            Rows::Plain(Elements::F32(w)) => self.of(level, F32(w.as_ptr(), k)),
            Rows::Blocks { block: kind, bytes, stride } => {
                of_block!(kind, |B| self.of(level, Raw::<B>::new(bytes.as_ptr(), stride)));
            }
            Rows::Codes(c) => match c.kind {
                Kind::Int8 => self.of(level, formats::Coded::<Int8>::new(&c)),
                Kind::E4m3 => self.of(level, formats::Coded::<E4m3>::new(&c)),
                Kind::Int4 => self.of(level, formats::Coded::<Int4>::new(&c)),
            },
        }
    }

    /// With weights of one format: a function of its own for each, because one of all would take the compiler minutes.
    fn of(self, level: Level, w: impl Weights) {
        super::run(level, Checked { product: self, level, w });
    }
}

/// A product whose sizes are as [`Product::run`] asserts, at its level, and its weights.
struct Checked<'a, W> {
    product: Product<'a>,
    level: Level,
    w: W,
}

/// A [`Format`] at every level.
trait Weights: Copy {
    /// # Safety
    /// As [`block`].
    unsafe fn product<D: Dot>(self, level: Level, p: Product<'_>);
}

macro_rules! weights {
    ($(($($of:ident: $bound:ident)?) $name:ty),*) => {$(
        impl$(<$of: $bound>)? Weights for $name {
            #[inline(always)]
            unsafe fn product<D: Dot>(self, level: Level, p: Product<'_>) {
                // SAFETY: the contract of the trait.
                unsafe { block::<D, Self>(level, self, p) }
            }
        }
    )*};
}
weights!(() Bf16, () F32, (B: BlockOf) formats::Raw<B>, (K: Code) formats::Coded<K>);

impl<W: Weights> Kernel for Checked<'_, W> {
    #[inline(always)]
    unsafe fn run<D: Dot>(self) {
        // SAFETY: the contract of the trait, and the asserts: `rows` prepared rows of `k` at `x`, `cols` rows of `k` at `w`, `cols` of
        // each of `rows` rows at `y`, and room for `cols` prepared rows at `packed` where it is needed.
        unsafe { self.w.product::<D>(self.level, self.product) }
    }
}

/// # Safety
/// The sizes are as [`Product::run`] asserts, `w` is the product's, and the CPU has the instructions of `D`.
#[inline(always)]
unsafe fn block<D: Dot, F: Format<D>>(level: Level, w: F, p: Product<'_>) {
    let Product { rows, cols, k, .. } = p;
    // SAFETY: the contract of this function, and that a packed row is as long as a prepared one.
    unsafe {
        if rows <= direct(&p.w) {
            let (x, y) = (p.x.as_ptr().cast(), p.y.as_mut_ptr());
            return tiles::<D, F>(Block { x, rows, w, cols, k, y, y_stride: p.y_stride });
        }
        let (chunks, packed) = (k.div_ceil(32), p.packed.as_mut_ptr().cast::<D::Elem>());
        let scales = packed.add(cols * chunks * 32).cast::<F::Scale>();
        for c in 0..cols {
            let (row, at) = (w.row(c), c * chunks);
            for block in 0..k / 32 / F::CHUNKS {
                let of_block = F::scales(row, block);
                for i in 0..F::CHUNKS {
                    let at = at + block * F::CHUNKS + i;
                    D::store(F::load(row, block, i), packed.add(32 * at));
                    *scales.add(at) = of_block[i];
                }
            }
            if !k.is_multiple_of(32) {
                D::store(F::tail(row, k), packed.add(32 * (at + chunks - 1)));
            }
        }
    }
    // by itself, so that it is there once for all formats
    super::run(level, Unpacked(p, PhantomData::<F::Scale>));
}

/// A product whose weights are unpacked.
struct Unpacked<'a, S>(Product<'a>, PhantomData<S>);

impl<S: Scale> Kernel for Unpacked<'_, S> {
    #[inline(always)]
    unsafe fn run<D: Dot>(self) {
        let Product { x, rows, cols, k, y, y_stride, packed, .. } = self.0;
        let (chunks, values) = (k.div_ceil(32), packed.as_ptr().cast::<D::Elem>());
        // SAFETY: the contract of the trait, and that [`block`] has written the weights and their scales.
        unsafe {
            let w = Packed { values, scales: values.add(cols * chunks * 32).cast::<S>(), chunks };
            tiles::<D, _>(Block { x: x.as_ptr().cast(), rows, w, cols, k: 32 * chunks, y: y.as_mut_ptr(), y_stride });
        }
    }
}

/// Columns outside: their weights come from memory once, and from the first-level cache for all rows but the first.
///
/// # Safety
/// All that a block is made of is there, and the CPU has the instructions of `D`.
#[inline(always)]
unsafe fn tiles<D: Dot, F: Format<D>>(b: Block<D::Elem, F>) {
    let padded = b.k.next_multiple_of(32);
    let mut c = 0;
    while c < b.cols {
        let width = if b.cols - c < D::COLS { 1 } else { D::COLS };
        for r in (0..b.rows).step_by(D::ROWS) {
            // SAFETY: the tile is within rows x cols.
            unsafe {
                let (x, y) = (b.x.add(r * padded), b.y.add(r * b.y_stride + c));
                let (height, b) = (b.rows - r, Block { x, y, ..b });
                if D::COLS == 4 && width == 4 {
                    tile_of::<D, F, 4>(height, b, c);
                } else if D::COLS == 2 && width == 2 {
                    tile_of::<D, F, 2>(height, b, c);
                } else {
                    tile_of::<D, F, 1>(height, b, c);
                }
            }
        }
        c += width;
    }
}

/// Up to `D::ROWS` of `height` rows. Conditions that a level decides leave nothing to compile for the others.
///
/// # Safety
/// As [`tiles`], for these rows of `x` and `C` of `w`.
#[inline(always)]
unsafe fn tile_of<D: Dot, F: Format<D>, const C: usize>(height: usize, b: Block<D::Elem, F>, first: usize) {
    // SAFETY: the contract of this function.
    unsafe {
        if D::ROWS > 3 && height > 3 {
            tile::<D, F, 4, C>(b, first);
        } else if D::ROWS > 2 && height > 2 {
            tile::<D, F, 3, C>(b, first);
        } else if D::ROWS > 1 && height > 1 {
            tile::<D, F, 2, C>(b, first);
        } else {
            tile::<D, F, 1, C>(b, first);
        }
    }
}

/// There are no closures here and below: a closure is a function of its own, without the instructions of the level, and
/// if it is not inlined, each of its instructions becomes a call.
///
/// # Safety
/// As [`tiles`], for `R` rows of `x` and `C` of `w`.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "both indices of a tile in every loop")]
unsafe fn tile<D: Dot, F: Format<D>, const R: usize, const C: usize>(b: Block<D::Elem, F>, first: usize) {
    let Block { x, w, k, y, y_stride, .. } = b;
    // SAFETY: the contract of this function.
    unsafe {
        let mut acc = [[D::Acc::splat(0.0); R]; C];
        let x_stride = k.next_multiple_of(32);
        let (mut row, mut next) = ([w.row(first); C], [w.row(first + C); C]);
        for c in 1..C {
            (row[c], next[c]) = (w.row(first + c), w.row(first + C + c));
        }
        for block in 0..k / 32 / F::CHUNKS {
            let mut scales = [F::scales(row[0], block); C];
            for c in 1..C {
                scales[c] = F::scales(row[c], block);
            }
            for i in 0..F::CHUNKS {
                let mut pairs = [F::load(row[0], block, i); C];
                for c in 1..C {
                    pairs[c] = F::load(row[c], block, i);
                }
                for c in 0..C {
                    F::prefetch(next[c], block, i);
                }
                let x = x.add(32 * (block * F::CHUNKS + i));
                for r in 0..R {
                    let x = D::load(x.add(r * x_stride));
                    for c in 0..C {
                        acc[c][r] = scales[c][i].add::<D>(acc[c][r], x, pairs[c]);
                    }
                }
            }
        }
        if !k.is_multiple_of(32) {
            let mut pairs = [F::tail(row[0], k); C];
            for c in 1..C {
                pairs[c] = F::tail(row[c], k);
            }
            for r in 0..R {
                let x = D::load(x.add(r * x_stride + k / 32 * 32));
                for c in 0..C {
                    acc[c][r] = D::dot(acc[c][r], x, pairs[c]);
                }
            }
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
