//! [`Lanes`] of AVX2 with FMA and F16C: two registers.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "each function is its contract, that of Lanes, applied to a few instructions"
)]

use super::lanes::{Codes, Lanes};
use std::arch::x86_64::*;

#[derive(Clone, Copy)]
pub(super) struct Avx2(__m256, __m256);

impl Avx2 {
    /// 16 f16.
    #[inline(always)]
    unsafe fn of_halves(halves: __m256i) -> Self {
        Avx2(_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(halves)))
    }
}

/// 8 bf16.
#[inline(always)]
unsafe fn widened(p: *const u16) -> __m256 {
    let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
}

/// The even and the odd ones of 16 bf16, those below 2^-63 as 0.
#[inline(always)]
unsafe fn pairs(p: *const u16) -> (__m256, __m256) {
    let w = _mm256_loadu_si256(p.cast());
    let small = _mm256_cmpeq_epi16(_mm256_and_si256(w, _mm256_set1_epi16(0x6000)), _mm256_setzero_si256());
    let w = _mm256_andnot_si256(small, w);
    let odd = _mm256_and_si256(w, _mm256_set1_epi32(0xffff_0000_u32 as i32));
    (_mm256_castsi256_ps(_mm256_slli_epi32::<16>(w)), _mm256_castsi256_ps(odd))
}

/// The even and the odd ones of 16 f32: within each half of a register, then the quarters to their places.
#[inline(always)]
unsafe fn parted(p: *const f32) -> (__m256, __m256) {
    let (a, b) = (_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8)));
    let even = _mm256_castps_pd(_mm256_shuffle_ps::<0b10_00_10_00>(a, b));
    let odd = _mm256_castps_pd(_mm256_shuffle_ps::<0b11_01_11_01>(a, b));
    (
        _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(even)),
        _mm256_castpd_ps(_mm256_permute4x64_pd::<0b11_01_10_00>(odd)),
    )
}

/// A number whose last byte of the mantissa counts whole numbers, and one of which the byte before it does.
pub(super) const EVEN: f32 = 8_388_608.0;
pub(super) const ODD: f32 = 32_768.0;

/// The even and the odd ones of 16 bytes, as [`Lanes::bytes`].
#[inline(always)]
unsafe fn bytes(codes: __m128i, flip: u8, zero: f32) -> (__m256, __m256) {
    let (lanes, flip) = (_mm256_cvtepu16_epi32(codes), i32::from(flip));
    let even = _mm256_and_si256(lanes, _mm256_set1_epi32(0xff));
    let even = _mm256_xor_si256(even, _mm256_set1_epi32(EVEN.to_bits() as i32 | flip));
    let odd = _mm256_and_si256(lanes, _mm256_set1_epi32(0xff00));
    let odd = _mm256_xor_si256(odd, _mm256_set1_epi32(ODD.to_bits() as i32 | flip << 8));
    (
        _mm256_sub_ps(_mm256_castsi256_ps(even), _mm256_set1_ps(EVEN + zero)),
        _mm256_sub_ps(_mm256_castsi256_ps(odd), _mm256_set1_ps(ODD + zero)),
    )
}

/// The even and the odd ones of 32 e4m3 as f16: the sign, 0, and the other bits.
#[inline(always)]
pub(super) unsafe fn e4m3_halves(codes: __m256i) -> (__m256i, __m256i) {
    let bits = _mm256_set1_epi16(0xbf80_u16 as i16);
    let even = _mm256_srai_epi16::<1>(_mm256_slli_epi16::<8>(codes));
    (_mm256_and_si256(even, bits), _mm256_and_si256(_mm256_srai_epi16::<1>(codes), bits))
}

impl Codes for __m256i {
    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self {
        _mm256_loadu_si256(p.cast())
    }
    #[inline(always)]
    unsafe fn nibbles(p: *const u8) -> Self {
        let bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128(p.cast()));
        _mm256_and_si256(_mm256_srlv_epi64(bytes, _mm256_setr_epi64x(0, 0, 4, 4)), _mm256_set1_epi8(15))
    }
    #[inline(always)]
    unsafe fn twos(p: *const u8) -> Self {
        let words = _mm256_cvtepu8_epi16(_mm_loadu_si128(p.cast()));
        _mm256_and_si256(_mm256_or_si256(words, _mm256_slli_epi16::<4>(words)), _mm256_set1_epi8(15))
    }
    #[inline(always)]
    unsafe fn fifths(word: u32) -> Self {
        let of_byte = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
        let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
        let bytes = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(word as i32), of_byte), bit);
        _mm256_and_si256(_mm256_cmpeq_epi8(bytes, bit), _mm256_set1_epi8(16))
    }
    #[inline(always)]
    unsafe fn part(self, shift: usize, mask: u8) -> Self {
        _mm256_and_si256(_mm256_srl_epi16(self, _mm_cvtsi32_si128(shift as i32)), _mm256_set1_epi8(mask as i8))
    }
    #[inline(always)]
    unsafe fn high(self) -> Self {
        _mm256_slli_epi16::<4>(self)
    }
    #[inline(always)]
    unsafe fn or(self, other: Self) -> Self {
        _mm256_or_si256(self, other)
    }
    #[inline(always)]
    unsafe fn minus(self, zero: u8) -> Self {
        _mm256_sub_epi8(self, _mm256_set1_epi8(zero as i8))
    }
}

impl Lanes for Avx2 {
    type Codes = __m256i;
    #[inline(always)]
    unsafe fn bytes(codes: __m256i, flip: u8, zero: f32) -> (Self, Self) {
        let (a, b) = (_mm256_castsi256_si128(codes), _mm256_extracti128_si256::<1>(codes));
        let (a, b) = (bytes(a, flip, zero), bytes(b, flip, zero));
        (Avx2(a.0, b.0), Avx2(a.1, b.1))
    }
    #[inline(always)]
    unsafe fn e4m3(codes: __m256i) -> (Self, Self) {
        let (even, odd) = e4m3_halves(codes);
        (Avx2::of_halves(even), Avx2::of_halves(odd))
    }
    #[inline(always)]
    unsafe fn half(bits: u16) -> f32 {
        _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))))
    }
    #[inline(always)]
    unsafe fn halves(a: f32, b: f32) -> Self {
        Avx2(_mm256_set1_ps(a), _mm256_set1_ps(b))
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Avx2(_mm256_set1_ps(x), _mm256_set1_ps(x))
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        Avx2(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8)))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        _mm256_storeu_ps(p, self.0);
        _mm256_storeu_ps(p.add(8), self.1);
    }
    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        Avx2(_mm256_fmadd_ps(a.0, b.0, self.0), _mm256_fmadd_ps(a.1, b.1, self.1))
    }
    #[inline(always)]
    unsafe fn widen(p: *const u16) -> Self {
        Avx2(widened(p), widened(p.add(8)))
    }
    #[inline(always)]
    unsafe fn pairs_bf16(p: *const u16) -> (Self, Self) {
        let (a, b) = (pairs(p), pairs(p.add(16)));
        (Avx2(a.0, b.0), Avx2(a.1, b.1))
    }
    #[inline(always)]
    unsafe fn pairs_f32(p: *const f32) -> (Self, Self) {
        let (a, b) = (parted(p), parted(p.add(16)));
        (Avx2(a.0, b.0), Avx2(a.1, b.1))
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let s = _mm256_add_ps(self.0, self.1);
        let s = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps::<1>(s));
        let s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps::<1>(s, s)))
    }
}
