//! How weights of each format come into registers, 32 columns at a time, and what the sum of their products is multiplied by.
//!
//! A code less its zero point, and an e4m3, is exact in bf16, so it is multiplied like a weight in bf16. The layouts of blocks are those of
//! `files/format`, whose values tests compare.

use super::{
    coded::Coded as Parts,
    lanes::{Codes, Dot, Lanes},
};
use std::{marker::PhantomData, ops::Index};

/// What becomes of 32 products.
pub(super) trait Scale: Copy {
    /// `acc` and the products of `x` and `w`.
    ///
    /// # Safety
    /// As [`Lanes`].
    unsafe fn add<D: Dot>(self, acc: D::Acc, x: D::Pairs, w: D::Pairs) -> D::Acc;
}

/// They are added.
impl Scale for () {
    #[inline(always)]
    unsafe fn add<D: Dot>(self, acc: D::Acc, x: D::Pairs, w: D::Pairs) -> D::Acc {
        // SAFETY: the contract of the trait.
        unsafe { D::dot(acc, x, w) }
    }
}

/// Each lane's sum of two times a scale is added.
#[derive(Clone, Copy)]
pub(super) struct Each(f32);

impl Scale for Each {
    #[inline(always)]
    unsafe fn add<D: Dot>(self, acc: D::Acc, x: D::Pairs, w: D::Pairs) -> D::Acc {
        // SAFETY: the contract of the trait.
        unsafe { acc.fma(D::dot(D::Acc::splat(0.0), x, w), D::Acc::splat(self.0)) }
    }
}

/// The same, with a scale for each 16 columns.
#[derive(Clone, Copy)]
pub(super) struct Halves(f32, f32);

impl Scale for Halves {
    #[inline(always)]
    unsafe fn add<D: Dot>(self, acc: D::Acc, x: D::Pairs, w: D::Pairs) -> D::Acc {
        // SAFETY: the contract of the trait.
        unsafe { acc.fma(D::dot(D::Acc::splat(0.0), x, w), D::Acc::halves(self.0, self.1)) }
    }
}

/// The same as [`Each`], and then an offset times each lane's sum of two of `x`.
#[derive(Clone, Copy)]
pub(super) struct Affine(f32, f32);

impl Scale for Affine {
    #[inline(always)]
    unsafe fn add<D: Dot>(self, acc: D::Acc, x: D::Pairs, w: D::Pairs) -> D::Acc {
        // SAFETY: the contract of the trait.
        unsafe {
            let (zero, one) = (D::Acc::splat(0.0), D::Acc::splat(1.0));
            let acc = acc.fma(D::dot(zero, x, w), D::Acc::splat(self.0));
            acc.fma(D::dot(zero, x, D::pairs((one, one))), D::Acc::splat(self.1))
        }
    }
}

/// Rows of weights of one format.
///
/// # Safety
/// Of what is `unsafe`: as [`Lanes`], and the row has what is read.
pub(super) trait Format<D: Dot>: Copy {
    /// Where a row is.
    type Row: Copy;
    type Scale: Scale;
    /// Of a block.
    type Scales: Copy + Index<usize, Output = Self::Scale>;
    /// 32 columns are a chunk, so many chunks a block.
    const CHUNKS: usize = 1;
    /// It need not exist.
    fn row(self, c: usize) -> Self::Row;
    unsafe fn scales(row: Self::Row, block: usize) -> Self::Scales;
    /// Chunk `i` of a block, without its scale.
    unsafe fn load(row: Self::Row, block: usize, i: usize) -> D::Pairs;
    /// The last `k % 32` values of a row, filled up with 0, of formats whose rows may end so.
    unsafe fn tail(_row: Self::Row, _k: usize) -> D::Pairs {
        unreachable!("rows are whole chunks")
    }
    /// Asks for a chunk, of rows that come from memory and need not exist: they are too short for the CPU to find out by itself.
    fn prefetch(_row: Self::Row, _block: usize, _i: usize) {}
}

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

/// Numbers and the columns of a row.
macro_rules! plain {
    ($name:ident, $elem:ty, $load:ident) => {
        #[derive(Clone, Copy)]
        pub(super) struct $name(pub *const $elem, pub usize);

        impl<D: Dot> Format<D> for $name {
            type Row = *const $elem;
            type Scale = ();
            type Scales = [(); 1];
            #[inline(always)]
            fn row(self, c: usize) -> Self::Row {
                self.0.wrapping_add(c * self.1)
            }
            #[inline(always)]
            unsafe fn scales(_: Self::Row, _: usize) -> [(); 1] {
                [()]
            }
            #[inline(always)]
            unsafe fn load(row: Self::Row, chunk: usize, _: usize) -> D::Pairs {
                // SAFETY: the contract of the trait.
                unsafe { D::$load(row.add(32 * chunk)) }
            }
            #[inline(always)]
            unsafe fn tail(row: Self::Row, k: usize) -> D::Pairs {
                let mut rest = [<$elem>::default(); 32];
                // SAFETY: the row has `k` elements, of which less than 32 are copied.
                unsafe {
                    std::ptr::copy_nonoverlapping(row.add(k / 32 * 32), rest.as_mut_ptr(), k % 32);
                    D::$load(rest.as_ptr())
                }
            }
            #[inline(always)]
            fn prefetch(row: Self::Row, chunk: usize, _: usize) {
                prefetch(row.wrapping_add(32 * chunk));
            }
        }
    };
}

plain!(Bf16, u16, bf16);
plain!(F32, f32, f32);

/// What [`Dot::store`] wrote, and scales.
#[derive(Clone, Copy)]
pub(super) struct Packed<E, S> {
    pub values: *const E,
    pub scales: *const S,
    pub chunks: usize,
}

impl<D: Dot, S: Scale> Format<D> for Packed<D::Elem, S> {
    type Row = (*const D::Elem, *const S);
    type Scale = S;
    type Scales = [S; 1];
    #[inline(always)]
    fn row(self, c: usize) -> Self::Row {
        (self.values.wrapping_add(c * self.chunks * 32), self.scales.wrapping_add(c * self.chunks))
    }
    #[inline(always)]
    unsafe fn scales((_, scales): Self::Row, chunk: usize) -> [S; 1] {
        // SAFETY: the contract of the trait.
        unsafe { [*scales.add(chunk)] }
    }
    #[inline(always)]
    unsafe fn load((values, _): Self::Row, chunk: usize, _: usize) -> D::Pairs {
        // SAFETY: the contract of the trait.
        unsafe { D::load(values.add(32 * chunk)) }
    }
}

/// A GGUF type.
pub(super) trait Block: Copy {
    const BYTES: usize;
    const CHUNKS: usize;
    type Scale: Scale;
    type Scales: Copy + Index<usize, Output = Self::Scale>;
    /// # Safety
    /// As [`Lanes`]; a block is at `b`.
    unsafe fn scales<L: Lanes>(b: *const u8) -> Self::Scales;
    /// Chunk `i`.
    ///
    /// # Safety
    /// As [`Lanes`]; a block is at `b`.
    unsafe fn load<D: Dot>(b: *const u8, i: usize) -> D::Pairs;
}

/// The first row, and bytes to the next.
#[derive(Clone, Copy)]
pub(super) struct Raw<B>(*const u8, usize, PhantomData<B>);

impl<B> Raw<B> {
    pub(super) fn new(first: *const u8, stride: usize) -> Self {
        Raw(first, stride, PhantomData)
    }
}

impl<D: Dot, B: Block> Format<D> for Raw<B> {
    type Row = *const u8;
    type Scale = B::Scale;
    type Scales = B::Scales;
    const CHUNKS: usize = B::CHUNKS;
    #[inline(always)]
    fn row(self, c: usize) -> *const u8 {
        self.0.wrapping_add(c * self.1)
    }
    #[inline(always)]
    unsafe fn scales(row: *const u8, block: usize) -> B::Scales {
        // SAFETY: the contract of the trait.
        unsafe { B::scales::<D::Acc>(row.add(block * B::BYTES)) }
    }
    #[inline(always)]
    unsafe fn load(row: *const u8, block: usize, i: usize) -> D::Pairs {
        // SAFETY: the contract of the trait.
        unsafe { B::load::<D>(row.add(block * B::BYTES), i) }
    }
    #[inline(always)]
    fn prefetch(row: *const u8, block: usize, i: usize) {
        prefetch(row.wrapping_add(block * B::BYTES + i * (B::BYTES / B::CHUNKS)));
    }
}

/// Codes less `ZERO`, which is 128 of bytes with sign.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
unsafe fn less<D: Dot, const ZERO: i32>(codes: <D::Acc as Lanes>::Codes) -> D::Pairs {
    // SAFETY: the contract of this function.
    unsafe { if ZERO == 128 { D::pairs(D::Acc::bytes(codes, 128, 128.0)) } else { D::few::<ZERO>(codes) } }
}

/// The number at `b`.
///
/// # Safety
/// One is there.
#[inline(always)]
unsafe fn read<T: Copy>(b: *const u8) -> T {
    // SAFETY: the contract of this function.
    unsafe { b.cast::<T>().read_unaligned() }
}

/// The f16 at `b`.
///
/// # Safety
/// One is there, and as [`Lanes`].
#[inline(always)]
unsafe fn half<L: Lanes>(b: *const u8) -> f32 {
    // SAFETY: the contract of this function.
    unsafe { L::half(u16::from_le(read(b))) }
}

/// A type: bytes and chunks of a block, the scales of the one at `b`, the codes of its chunk `i`, and their zero point.
macro_rules! block {
    ($name:ident, $bytes:literal, $chunks:literal of $scale:ty, |$b:ident, $l:ident| $scales:expr, |$i:ident, $c:ident| $codes:expr, $zero:literal) => {
        #[derive(Clone, Copy)]
        pub(super) struct $name;

        impl Block for $name {
            const BYTES: usize = $bytes;
            const CHUNKS: usize = $chunks;
            type Scale = $scale;
            type Scales = [$scale; $chunks];
            #[inline(always)]
            unsafe fn scales<$l: Lanes>($b: *const u8) -> Self::Scales {
                // SAFETY: the contract of the trait.
                unsafe { $scales }
            }
            #[inline(always)]
            unsafe fn load<D: Dot>($b: *const u8, $i: usize) -> D::Pairs {
                /// # Safety
                /// That of the trait.
                #[inline(always)]
                unsafe fn codes<$c: Codes>($b: *const u8, $i: usize) -> $c {
                    // SAFETY: the contract of the trait.
                    unsafe { $codes }
                }
                // SAFETY: the contract of the trait.
                unsafe { less::<D, $zero>(codes($b, $i)) }
            }
        }
    };
}

block!(Q4_0, 18, 1 of Each, |b, L| [Each(half::<L>(b))], |_i, C| C::nibbles(b.add(2)), 8);
block!(Q4_1, 20, 1 of Affine, |b, L| [affine::<L>(b)], |_i, C| C::nibbles(b.add(4)), 0);
block!(Q5_0, 22, 1 of Each, |b, L| [Each(half::<L>(b))], |_i, C| C::nibbles(b.add(6)).or(C::fifths(u32::from_le(read(b.add(2))))), 16);
block!(Q5_1, 24, 1 of Affine, |b, L| [affine::<L>(b)], |_i, C| C::nibbles(b.add(8)).or(C::fifths(u32::from_le(read(b.add(4))))), 0);
block!(Q8_0, 34, 1 of Each, |b, L| [Each(half::<L>(b))], |_i, C| C::load(b.add(2)), 128);
block!(Q4K, 144, 8 of Affine, |b, L| six_bits::<L>(b), |i, C| C::load(b.add(16 + i / 2 * 32)).part(i % 2 * 4, 15), 0);
block!(
    Q5K,
    176,
    8 of Affine,
    |b, L| six_bits::<L>(b),
    |i, C| C::load(b.add(48 + i / 2 * 32)).part(i % 2 * 4, 15).or(C::load(b.add(16)).part(i, 1).high()),
    0
);
// 128 weights after the other: chunks that share a byte of high bits, two of low ones
block!(
    Q6K,
    210,
    8 of Halves,
    |b, L| sixteenths::<L>(b),
    |i, C| C::load(b.add(i / 4 * 64 + i % 2 * 32))
        .part(i % 4 / 2 * 4, 15)
        .or(C::load(b.add(128 + i / 4 * 32)).part(i % 4 * 2, 3).high()),
    32
);

/// The scale and the offset at the beginning of a block.
///
/// # Safety
/// As [`half`].
#[inline(always)]
unsafe fn affine<L: Lanes>(b: *const u8) -> Affine {
    // SAFETY: the contract of this function.
    unsafe { Affine(half::<L>(b), half::<L>(b.add(2))) }
}

/// Scales and offsets of a block of Q4_K or Q5_K: six bits each, see `six_bits` in `files/format/block.rs`.
///
/// # Safety
/// As [`half`]; a block is at `b`.
#[inline(always)]
unsafe fn six_bits<L: Lanes>(b: *const u8) -> [Affine; 8] {
    // SAFETY: the contract of this function.
    let (Affine(d, dmin), words) = unsafe { (affine::<L>(b), read::<[u32; 3]>(b.add(4))) };
    let [x, y, z] = words.map(u32::from_le);
    let four = |low: u32, high: u32| (low & 0x0f0f_0f0f) | (high & 0xc0c0_c0c0) >> 2;
    let eight = |first: u32, then: u32| (u64::from(first & 0x3f3f_3f3f) | u64::from(then) << 32).to_le_bytes();
    let (scales, offsets) = (eight(x, four(z, x)), eight(y, four(z >> 4, y)));
    let mut all = [Affine(0.0, 0.0); 8];
    for i in 0..8 {
        all[i] = Affine(d * f32::from(scales[i]), -(dmin * f32::from(offsets[i])));
    }
    all
}

/// Scales of a block of Q6_K, one for each 16 weights.
///
/// # Safety
/// As [`half`]; a block is at `b`.
#[inline(always)]
unsafe fn sixteenths<L: Lanes>(b: *const u8) -> [Halves; 8] {
    // SAFETY: the contract of this function.
    let (d, scales) = unsafe { (half::<L>(b.add(208)), read::<[i8; 16]>(b.add(192))) };
    let mut all = [Halves(0.0, 0.0); 8];
    for i in 0..8 {
        all[i] = Halves(d * f32::from(scales[2 * i]), d * f32::from(scales[2 * i + 1]));
    }
    all
}

/// Runs `$body` with `$B` the type of a block.
macro_rules! of_block {
    ($block:expr, |$B:ident| $body:expr) => {{
        use crate::backend::cpu::simd::formats::*;
        match $block.name {
            "Q4_0" => {
                type $B = Q4_0;
                $body
            }
            "Q4_1" => {
                type $B = Q4_1;
                $body
            }
            "Q5_0" => {
                type $B = Q5_0;
                $body
            }
            "Q5_1" => {
                type $B = Q5_1;
                $body
            }
            "Q8_0" => {
                type $B = Q8_0;
                $body
            }
            "Q4_K" => {
                type $B = Q4K;
                $body
            }
            "Q5_K" => {
                type $B = Q5K;
                $body
            }
            "Q6_K" => {
                type $B = Q6K;
                $body
            }
            other => unreachable!("{other} is no type of blocks"),
        }
    }};
}
pub(super) use of_block;

/// Codes whose scales are beside them.
pub(super) trait Code: Copy {
    /// Of 32 codes.
    const BYTES: usize;
    /// # Safety
    /// As [`Lanes`]; 32 codes are at `p`, and their zero point at `zeros[group]`.
    unsafe fn load<D: Dot>(p: *const u8, zeros: *const u8, group: usize) -> D::Pairs;
}

#[derive(Clone, Copy)]
pub(super) struct Coded<K> {
    codes: *const u8,
    width: usize,
    scales: *const f32,
    zeros: *const u8,
    groups: usize,
    shift: u32,
    kind: PhantomData<K>,
}

impl<K> Coded<K> {
    pub(super) fn new(c: &Parts<'_>) -> Self {
        let &Parts { codes, width, scales, zeros, groups, shift, .. } = c;
        let (codes, scales, zeros) = (codes.as_ptr(), scales.as_ptr(), zeros.as_ptr());
        Coded { codes, width, scales, zeros, groups, shift, kind: PhantomData }
    }
}

impl<D: Dot, K: Code> Format<D> for Coded<K> {
    /// The first row is its own.
    type Row = Self;
    type Scale = Each;
    type Scales = [Each; 1];
    #[inline(always)]
    fn row(self, c: usize) -> Self {
        let (codes, groups) = (self.codes.wrapping_add(c * self.width), c * self.groups);
        Coded { codes, scales: self.scales.wrapping_add(groups), zeros: self.zeros.wrapping_add(groups), ..self }
    }
    #[inline(always)]
    unsafe fn scales(row: Self, chunk: usize) -> [Each; 1] {
        // SAFETY: the contract of the trait.
        unsafe { [Each(*row.scales.add(chunk >> row.shift))] }
    }
    #[inline(always)]
    unsafe fn load(row: Self, chunk: usize, _: usize) -> D::Pairs {
        // SAFETY: the contract of the trait.
        unsafe { K::load::<D>(row.codes.add(K::BYTES * chunk), row.zeros, chunk >> row.shift) }
    }
    #[inline(always)]
    fn prefetch(row: Self, chunk: usize, _: usize) {
        prefetch(row.codes.wrapping_add(K::BYTES * chunk));
    }
}

/// A byte each, less a zero point of its group.
#[derive(Clone, Copy)]
pub(super) struct Int8;

impl Code for Int8 {
    const BYTES: usize = 32;
    #[inline(always)]
    unsafe fn load<D: Dot>(p: *const u8, zeros: *const u8, group: usize) -> D::Pairs {
        // SAFETY: the contract of the trait.
        unsafe { less::<D, 128>(<D::Acc as Lanes>::Codes::load(p).minus(*zeros.add(group))) }
    }
}

/// Four bits each, the lower ones first, less a zero point of its group.
#[derive(Clone, Copy)]
pub(super) struct Int4;

impl Code for Int4 {
    const BYTES: usize = 16;
    #[inline(always)]
    unsafe fn load<D: Dot>(p: *const u8, zeros: *const u8, group: usize) -> D::Pairs {
        // SAFETY: the contract of the trait.
        unsafe {
            let codes = <D::Acc as Lanes>::Codes::twos(p).minus((*zeros.add(group)).wrapping_sub(16));
            D::few::<16>(codes)
        }
    }
}

/// e4m3, and scales that are 2^8 of what they were.
#[derive(Clone, Copy)]
pub(super) struct E4m3;

impl Code for E4m3 {
    const BYTES: usize = 32;
    #[inline(always)]
    unsafe fn load<D: Dot>(p: *const u8, _: *const u8, _: usize) -> D::Pairs {
        // SAFETY: the contract of the trait.
        unsafe { D::pairs(D::Acc::e4m3(<D::Acc as Lanes>::Codes::load(p))) }
    }
}
