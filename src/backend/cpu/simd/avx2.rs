//! [`Lanes`] of AVX2 with FMA: two registers.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "each function is its contract, that of Lanes, applied to a few instructions"
)]

use super::lanes::Lanes;
use std::arch::x86_64::*;

#[derive(Clone, Copy)]
pub(super) struct Avx2(__m256, __m256);

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

impl Lanes for Avx2 {
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
