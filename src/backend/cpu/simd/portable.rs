//! [`Lanes`] of any CPU. `f32::mul_add` is one instruction where the target has it (aarch64) and a call where it has not.
#![expect(unsafe_op_in_unsafe_fn, reason = "each function is its contract, that of Lanes, applied to one expression")]

use super::{
    super::rows::tree,
    lanes::{Codes, Lanes},
};
use half::f16;

impl Codes for [u8; 32] {
    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self {
        p.cast::<Self>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn nibbles(p: *const u8) -> Self {
        std::array::from_fn(|i| *p.add(i % 16) >> (i / 16 * 4) & 15)
    }
    #[inline(always)]
    unsafe fn twos(p: *const u8) -> Self {
        std::array::from_fn(|i| *p.add(i / 2) >> (i % 2 * 4) & 15)
    }
    #[inline(always)]
    unsafe fn fifths(word: u32) -> Self {
        std::array::from_fn(|i| (word >> i & 1) as u8 * 16)
    }
    #[inline(always)]
    unsafe fn part(self, shift: usize, mask: u8) -> Self {
        self.map(|q| q >> shift & mask)
    }
    #[inline(always)]
    unsafe fn high(self) -> Self {
        self.map(|q| q << 4)
    }
    #[inline(always)]
    unsafe fn or(self, other: Self) -> Self {
        std::array::from_fn(|i| self[i] | other[i])
    }
    #[inline(always)]
    unsafe fn minus(self, zero: u8) -> Self {
        self.map(|q| q.wrapping_sub(zero))
    }
}

/// 2^-8 of an e4m3.
#[inline(always)]
fn e4m3(code: u8) -> f32 {
    f16::from_bits(u16::from(code & 0x80) << 8 | u16::from(code & 0x7f) << 7).to_f32_const()
}

impl Lanes for [f32; 16] {
    type Codes = [u8; 32];
    #[inline(always)]
    unsafe fn bytes(codes: [u8; 32], flip: u8, zero: f32) -> (Self, Self) {
        let value = |i: usize| f32::from(codes[i] ^ flip) - zero;
        (std::array::from_fn(|i| value(2 * i)), std::array::from_fn(|i| value(2 * i + 1)))
    }
    #[inline(always)]
    unsafe fn e4m3(codes: [u8; 32]) -> (Self, Self) {
        (std::array::from_fn(|i| e4m3(codes[2 * i])), std::array::from_fn(|i| e4m3(codes[2 * i + 1])))
    }
    #[inline(always)]
    unsafe fn half(bits: u16) -> f32 {
        f16::from_bits(bits).to_f32_const()
    }
    #[inline(always)]
    unsafe fn halves(a: f32, b: f32) -> Self {
        std::array::from_fn(|i| if i < 8 { a } else { b })
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        [x; 16]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        std::array::from_fn(|i| *p.add(i))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        p.cast::<Self>().write_unaligned(self);
    }
    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        std::array::from_fn(|i| a[i].mul_add(b[i], self[i]))
    }
    #[inline(always)]
    unsafe fn widen(p: *const u16) -> Self {
        std::array::from_fn(|i| f32::from_bits(u32::from(*p.add(i)) << 16))
    }
    #[inline(always)]
    unsafe fn pairs_bf16(p: *const u16) -> (Self, Self) {
        let value = |w: u16| f32::from_bits(if w & 0x6000 == 0 { 0 } else { u32::from(w) << 16 });
        (std::array::from_fn(|i| value(*p.add(2 * i))), std::array::from_fn(|i| value(*p.add(2 * i + 1))))
    }
    #[inline(always)]
    unsafe fn pairs_f32(p: *const f32) -> (Self, Self) {
        (std::array::from_fn(|i| *p.add(2 * i)), std::array::from_fn(|i| *p.add(2 * i + 1)))
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        tree(self)
    }
}
