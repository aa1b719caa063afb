//! [`Lanes`] of any CPU. `f32::mul_add` is one instruction where the target has it (aarch64) and a call where it has not.
#![expect(unsafe_op_in_unsafe_fn, reason = "each function is its contract, that of Lanes, applied to one expression")]

use super::{super::rows::tree, lanes::Lanes};

impl Lanes for [f32; 16] {
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
