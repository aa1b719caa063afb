//! [`Lanes`] of AVX-512 (F and BW), and the products of AVX512-BF16.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "each function is its contract, that of Lanes, applied to a few instructions"
)]

use super::{
    avx2::{EVEN, ODD, e4m3_halves},
    lanes::{Dot, Lanes},
};
use std::{arch::x86_64::*, mem::transmute};

/// 32 bf16 as they are in memory, those below 2^-63 as 0: their two highest bits of the exponent are 0.
#[inline(always)]
unsafe fn cut(p: *const u16) -> __m512i {
    let w = _mm512_loadu_si512(p.cast());
    _mm512_maskz_mov_epi16(_mm512_test_epi16_mask(w, _mm512_set1_epi16(0x6000)), w)
}

/// Two sums of 16 lanes as 8 lanes each: [a, b].
#[inline(always)]
unsafe fn halves(a: __m512, b: __m512) -> __m512 {
    _mm512_add_ps(_mm512_shuffle_f32x4::<0b01_00_01_00>(a, b), _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b))
}

/// Four of 8 lanes as 4 lanes each: [a, b, c, d].
#[inline(always)]
unsafe fn quarters(ab: __m512, cd: __m512) -> __m512 {
    _mm512_add_ps(_mm512_shuffle_f32x4::<0b10_00_10_00>(ab, cd), _mm512_shuffle_f32x4::<0b11_01_11_01>(ab, cd))
}

/// Two columns of 4 rows as 2 lanes each, in turn: of each row those of `p` and of `q`.
#[inline(always)]
unsafe fn eighths(p: __m512, q: __m512) -> __m512 {
    let (p, q) = (_mm512_castps_pd(p), _mm512_castps_pd(q));
    _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)))
}

impl Lanes for __m512 {
    type Codes = __m256i;
    /// A byte in the mantissa of a large number, less that number and `zero`: exact. The lane's first byte is the even one.
    #[inline(always)]
    unsafe fn bytes(codes: __m256i, flip: u8, zero: f32) -> (Self, Self) {
        let (lanes, flip) = (_mm512_cvtepu16_epi32(codes), i32::from(flip));
        let even = _mm512_and_si512(lanes, _mm512_set1_epi32(0xff));
        let even = _mm512_xor_si512(even, _mm512_set1_epi32(EVEN.to_bits() as i32 | flip));
        let odd = _mm512_and_si512(lanes, _mm512_set1_epi32(0xff00));
        let odd = _mm512_xor_si512(odd, _mm512_set1_epi32(ODD.to_bits() as i32 | flip << 8));
        (
            _mm512_sub_ps(_mm512_castsi512_ps(even), _mm512_set1_ps(EVEN + zero)),
            _mm512_sub_ps(_mm512_castsi512_ps(odd), _mm512_set1_ps(ODD + zero)),
        )
    }
    #[inline(always)]
    unsafe fn e4m3(codes: __m256i) -> (Self, Self) {
        let (even, odd) = e4m3_halves(codes);
        (_mm512_cvtph_ps(even), _mm512_cvtph_ps(odd))
    }
    #[inline(always)]
    unsafe fn half(bits: u16) -> f32 {
        _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))))
    }
    #[inline(always)]
    unsafe fn halves(a: f32, b: f32) -> Self {
        _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(a), _mm512_set1_ps(b))
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        _mm512_set1_ps(x)
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        _mm512_loadu_ps(p)
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        _mm512_storeu_ps(p, self);
    }
    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        _mm512_fmadd_ps(a, b, self)
    }
    #[inline(always)]
    unsafe fn widen(p: *const u16) -> Self {
        let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
    }
    #[inline(always)]
    unsafe fn pairs_bf16(p: *const u16) -> (Self, Self) {
        let w = cut(p);
        let odd = _mm512_and_si512(w, _mm512_set1_epi32(0xffff_0000_u32 as i32));
        (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(w)), _mm512_castsi512_ps(odd))
    }
    #[inline(always)]
    unsafe fn pairs_f32(p: *const f32) -> (Self, Self) {
        let (a, b) = (_mm512_loadu_ps(p), _mm512_loadu_ps(p.add(16)));
        let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        let odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
        (_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b))
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(self)));
        let s = _mm256_add_ps(_mm512_castps512_ps256(self), high);
        let s = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps::<1>(s));
        let s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps::<1>(s, s)))
    }
    /// The 16 trees at once: each level halves what is left of two registers into one. 30 shuffles and 15 additions.
    #[inline(always)]
    unsafe fn sums(acc: &[[Self; 4]; 4], y: *mut f32, stride: usize) {
        let mut columns = [acc[0][0]; 4];
        for c in 0..4 {
            columns[c] = quarters(halves(acc[c][0], acc[c][1]), halves(acc[c][2], acc[c][3]));
        }
        let (p, q) = (eighths(columns[0], columns[1]), eighths(columns[2], columns[3]));
        let rows = _mm512_add_ps(_mm512_shuffle_ps::<0b10_00_10_00>(p, q), _mm512_shuffle_ps::<0b11_01_11_01>(p, q));
        _mm_storeu_ps(y, _mm512_castps512_ps128(rows));
        _mm_storeu_ps(y.add(stride), _mm512_extractf32x4_ps::<1>(rows));
        _mm_storeu_ps(y.add(2 * stride), _mm512_extractf32x4_ps::<2>(rows));
        _mm_storeu_ps(y.add(3 * stride), _mm512_extractf32x4_ps::<3>(rows));
    }
}

/// `vdpbf16ps`. Prepared are 32 bf16 as they are.
pub(super) struct DpBf16;

impl Dot for DpBf16 {
    type Acc = __m512;
    type Elem = u16;
    type Pairs = __m512i;
    const ROWS: usize = 4;
    const COLS: usize = 4;
    #[inline(always)]
    unsafe fn load(p: *const u16) -> __m512i {
        _mm512_loadu_si512(p.cast())
    }
    #[inline(always)]
    unsafe fn bf16(p: *const u16) -> __m512i {
        cut(p)
    }
    /// Not asked for: see `Level::of_f32`.
    #[inline(always)]
    unsafe fn f32(_: *const f32) -> __m512i {
        unreachable!("its rows are bf16")
    }
    /// Looked up: the bf16 of a whole number below 256 is the high half of its f32.
    #[inline(always)]
    unsafe fn few<const ZERO: i32>(codes: __m256i) -> __m512i {
        let table = const {
            let (mut table, mut i) = ([0u16; 64], 0);
            while i < 64 {
                table[i as usize] = (((i - ZERO) as f32).to_bits() >> 16) as u16;
                i += 1;
            }
            table
        };
        let (codes, first) = (_mm512_cvtepu8_epi16(codes), _mm512_loadu_si512(table.as_ptr().cast()));
        if ZERO < 32 {
            return _mm512_permutexvar_epi16(codes, first);
        }
        _mm512_permutex2var_epi16(first, codes, _mm512_loadu_si512(table.as_ptr().add(32).cast()))
    }
    /// The high halves of both, side by side.
    #[inline(always)]
    unsafe fn pairs((even, odd): (__m512, __m512)) -> __m512i {
        let high = _mm512_and_si512(_mm512_castps_si512(odd), _mm512_set1_epi32(0xffff_0000_u32 as i32));
        _mm512_or_si512(high, _mm512_srli_epi32::<16>(_mm512_castps_si512(even)))
    }
    #[inline(always)]
    unsafe fn store(pairs: __m512i, p: *mut u16) {
        _mm512_storeu_si512(p.cast(), pairs);
    }
    #[inline(always)]
    unsafe fn dot(acc: __m512, x: __m512i, w: __m512i) -> __m512 {
        _mm512_dpbf16_ps(acc, transmute::<__m512i, __m512bh>(x), transmute::<__m512i, __m512bh>(w))
    }
}
