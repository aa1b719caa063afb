//! Sixteen f32 side by side, and the two ways to multiply by them: what differs from one instruction set to the next.

/// 32 codes of weights, a byte each, in the order of their columns.
///
/// # Safety
/// As [`Lanes`].
pub(super) trait Codes: Copy {
    /// 32 bytes.
    unsafe fn load(p: *const u8) -> Self;
    /// The low halves of 16 bytes, then the high ones.
    unsafe fn nibbles(p: *const u8) -> Self;
    /// Of each of 16 bytes the low half, then the high one.
    unsafe fn twos(p: *const u8) -> Self;
    /// The bits of a word, each 0 or 16.
    unsafe fn fifths(word: u32) -> Self;
    /// `self >> shift & mask`, where the mask has none of the bits that come in.
    unsafe fn part(self, shift: usize, mask: u8) -> Self;
    /// `self << 4`, of less than 16.
    unsafe fn high(self) -> Self;
    /// `self | other`
    unsafe fn or(self, other: Self) -> Self;
    /// `self - zero`
    unsafe fn minus(self, zero: u8) -> Self;
}

/// Sixteen f32 lanes.
///
/// # Safety
/// Of every function: the CPU has the implementer's instructions, and each pointer is good for what is read or written there
/// (no alignment is asked for).
pub(super) trait Lanes: Copy {
    /// 32 codes, a byte each.
    type Codes: Codes;
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
    /// The even and the odd ones of 32 bytes, with their bits `flip` turned around, less `zero`.
    unsafe fn bytes(codes: Self::Codes, flip: u8, zero: f32) -> (Self, Self);
    /// The even and the odd ones of 32 e4m3, each 2^-8 of its value: an f16 has the same digits there.
    unsafe fn e4m3(codes: Self::Codes) -> (Self, Self);
    /// The value of an f16.
    unsafe fn half(bits: u16) -> f32;
    /// `a` in the lanes of the first 16 of 32 values, `b` in the others.
    unsafe fn halves(a: f32, b: f32) -> Self;
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

/// How pairs of neighbouring values are multiplied and summed. Of each 32 values in turn, lane `l` of a sum adds
/// `x[2l + 1] w[2l + 1]` and then `x[2l] w[2l]`, each with one rounding. This is the order of the instruction
/// `vdpbf16ps`.
///
/// `vdpbf16ps` reads denormals as 0 and makes none. So that no path ever meets one, factors are cut: a bf16 weight
/// below 2^-63 and a bf16 activation below 2^-49 ([`super::rows::prepare`]) count as 0. The other weights are multiples
/// of 2^-70 and the other activations of 2^-56, so every sum is a multiple of 2^-126, the least normal number.
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
    /// 32 codes below 64, less `ZERO`; below 32 if `ZERO` is.
    #[inline(always)]
    unsafe fn few<const ZERO: i32>(codes: <Self::Acc as Lanes>::Codes) -> Self::Pairs {
        // SAFETY: the contract of the trait.
        unsafe { Self::pairs(Self::Acc::bytes(codes, 0, ZERO as f32)) }
    }
    /// The even and the odd ones of 32 values that bf16 has.
    unsafe fn pairs(even_odd: (Self::Acc, Self::Acc)) -> Self::Pairs;
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
    unsafe fn pairs(even_odd: (L, L)) -> (L, L) {
        even_odd
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
