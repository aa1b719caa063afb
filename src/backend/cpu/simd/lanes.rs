//! Sixteen f32 side by side, and the two ways to multiply by them: what differs from one instruction set to the next.

/// Sixteen f32 lanes.
///
/// # Safety
/// Of every function: the CPU has the implementer's instructions, and each pointer is good for what is read or written there
/// (no alignment is asked for).
pub(super) trait Lanes: Copy {
    unsafe fn splat(x: f32) -> Self;
    unsafe fn load(p: *const f32) -> Self;
    unsafe fn store(self, p: *mut f32);
    /// `self + a * b`, rounded once.
    unsafe fn fma(self, a: Self, b: Self) -> Self;
    /// 16 bf16.
    unsafe fn widen(p: *const u16) -> Self;
    /// The even and the odd ones of 32 bf16, those below 2^-63 as 0.
    unsafe fn pairs_bf16(p: *const u16) -> (Self, Self);
    /// The even and the odd ones of 32 f32.
    unsafe fn pairs_f32(p: *const f32) -> (Self, Self);
    /// The sum of the lanes by the one tree: lane `i` and `i + 8`, then `i + 4`, `i + 2`, `i + 1`.
    unsafe fn sum(self) -> f32;
    /// [`Lanes::sum`] of 16: that of `acc[c][r]` goes to `y[r * stride + c]`.
    unsafe fn sums(acc: &[[Self; 4]; 4], y: *mut f32, stride: usize) {
        for (c, acc) in acc.iter().enumerate() {
            for (r, acc) in acc.iter().enumerate() {
                // SAFETY: the contract of this function.
                unsafe { *y.add(r * stride + c) = acc.sum() };
            }
        }
    }
}

/// How pairs of neighbouring values are multiplied and summed: lane `l` of a sum takes `x[2l + 1] w[2l + 1]`, then `x[2l] w[2l]`,
/// of each 32 values in turn, each with one rounding. That is the order of `vdpbf16ps`.
///
/// `vdpbf16ps` takes denormals for 0 and makes none. So that no path ever sees one, factors are cut: a bf16 weight below 2^-63 and
/// a bf16 activation below 2^-49 ([`super::rows::prepare`]) count as 0. What is left is a multiple of 2^-70 and of 2^-56, and every
/// sum a multiple of 2^-126, the least normal number.
///
/// # Safety
/// As [`Lanes`].
pub(super) trait Dot {
    type Acc: Lanes;
    /// Element of prepared values: padded to 32, cut, in the order in which [`Dot::load`] reads them.
    type Elem: Copy + Default;
    /// 32 values in registers.
    type Pairs: Copy;
    /// Rows of `x` and of `w` that are multiplied at a time, 4 or 2: what there are registers for.
    const ROWS: usize;
    const COLS: usize;
    /// 32 prepared values.
    unsafe fn load(p: *const Self::Elem) -> Self::Pairs;
    /// 32 bf16 of weights, cut.
    unsafe fn bf16(p: *const u16) -> Self::Pairs;
    /// 32 f32 of weights.
    unsafe fn f32(p: *const f32) -> Self::Pairs;
    /// Prepares 32 values.
    unsafe fn store(pairs: Self::Pairs, p: *mut Self::Elem);
    unsafe fn dot(acc: Self::Acc, x: Self::Pairs, w: Self::Pairs) -> Self::Acc;
}

/// Two fused multiply-adds. Prepared are the 16 even values and then the 16 odd ones, in f32.
pub(super) struct Fma<L, const SIDE: usize>(std::marker::PhantomData<L>);

impl<L: Lanes, const SIDE: usize> Dot for Fma<L, SIDE> {
    type Acc = L;
    type Elem = f32;
    type Pairs = (L, L);
    const ROWS: usize = SIDE;
    const COLS: usize = SIDE;
    #[inline(always)]
    unsafe fn load(p: *const f32) -> (L, L) {
        // SAFETY: the contract of the trait.
        unsafe { (L::load(p), L::load(p.add(16))) }
    }
    #[inline(always)]
    unsafe fn bf16(p: *const u16) -> (L, L) {
        // SAFETY: the contract of the trait.
        unsafe { L::pairs_bf16(p) }
    }
    #[inline(always)]
    unsafe fn f32(p: *const f32) -> (L, L) {
        // SAFETY: the contract of the trait.
        unsafe { L::pairs_f32(p) }
    }
    #[inline(always)]
    unsafe fn store((even, odd): (L, L), p: *mut f32) {
        // SAFETY: the contract of the trait.
        unsafe {
            even.store(p);
            odd.store(p.add(16));
        }
    }
    #[inline(always)]
    unsafe fn dot(acc: L, x: (L, L), w: (L, L)) -> L {
        // SAFETY: the contract of the trait.
        unsafe { acc.fma(x.1, w.1).fma(x.0, w.0) }
    }
}

/// A format of weights: how 32 of a row come into registers. A row is its elements or blocks, one after the other.
///
/// # Safety
/// As [`Lanes`]: the row has the chunk.
pub(super) trait Format<D: Dot> {
    type Elem: Copy + Default;
    /// Rows come from memory.
    const FAR: bool = true;
    /// Values `32 chunk..` of a row.
    unsafe fn load(row: *const Self::Elem, chunk: usize) -> D::Pairs;
}

pub(super) struct Bf16;
pub(super) struct F32;
/// What [`Dot::store`] wrote.
pub(super) struct Packed;

impl<D: Dot> Format<D> for Bf16 {
    type Elem = u16;
    #[inline(always)]
    unsafe fn load(row: *const u16, chunk: usize) -> D::Pairs {
        // SAFETY: the contract of the trait.
        unsafe { D::bf16(row.add(32 * chunk)) }
    }
}

impl<D: Dot> Format<D> for F32 {
    type Elem = f32;
    #[inline(always)]
    unsafe fn load(row: *const f32, chunk: usize) -> D::Pairs {
        // SAFETY: the contract of the trait.
        unsafe { D::f32(row.add(32 * chunk)) }
    }
}

impl<D: Dot> Format<D> for Packed {
    type Elem = D::Elem;
    const FAR: bool = false;
    #[inline(always)]
    unsafe fn load(row: *const D::Elem, chunk: usize) -> D::Pairs {
        // SAFETY: the contract of the trait.
        unsafe { D::load(row.add(32 * chunk)) }
    }
}
