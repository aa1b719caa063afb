//! e4m3: a sign, 4 bits of exponent with bias 7, 3 bits of mantissa. A code of all ones is NaN, and there are no
//! infinities (the "fn" in its full name; OCP 8-bit Floating Point Specification 1.0, table 1).

use super::fit::{best, nearest};
use crate::ops::Act;

/// The value of each code.
static VALUES: [f32; 256] = {
    let mut values = [0f32; 256];
    let mut code = 0;
    while code < 256 {
        let (exponent, mantissa) = (code >> 3 & 15, (code & 7) as f32);
        let magnitude = match (exponent, code & 7) {
            (15, 7) => f32::NAN,
            (0, _) => mantissa / 512.0,
            _ => (1.0 + mantissa / 8.0) * f32::from_bits((exponent as u32 + 120) << 23),
        };
        values[code] = if code & 128 == 0 { magnitude } else { -magnitude };
        code += 1;
    }
    values
};

pub fn codes(bytes: &[u8], cols: usize, first: usize, out: &mut [f32]) {
    out.iter_mut().zip(&bytes[first * cols..]).for_each(|(x, q)| *x = VALUES[usize::from(*q)]);
}

/// The code of the value nearest to `x`, ties to even codes; values beyond the largest, 448, become 448.
fn code(x: f32) -> u8 {
    let (sign, x) = ((x.to_bits() >> 24 & 128) as u8, x.abs().min(448.0));
    let magnitude = if x < 1.0 / 64.0 {
        nearest(x * 512.0) as u8 // subnormal: steps of 2^-9; 8 is the first normal code
    } else {
        let bits = x.to_bits();
        let rounded = bits + 0x7FFFF + (bits >> 20 & 1);
        ((rounded >> 20) - (120 << 3)) as u8
    };
    sign | magnitude
}

/// The scale with which codes come nearest to `x`; 0 when all of `x` is 0. Larger codes have wider steps, so the best
/// scale need not map the largest value to the last code.
/// The square of an error counts `w` times.
pub fn scale(x: &[f32], w: &[f32]) -> f32 {
    best(x, w, 448.0, |x, inverse| VALUES[usize::from(code(x * inverse))])
}

/// The codes of values with one scale.
pub fn nearest_codes(x: &[f32], scale: f32) -> impl Iterator<Item = u8> {
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    x.iter().map(move |x| code(x * inverse))
}

/// The values of these codes.
pub fn nearest_values(x: &[f32], scale: f32) -> impl Iterator<Item = f32> {
    nearest_codes(x, scale).map(move |q| VALUES[usize::from(q)] * scale)
}

/// The scale byte (E8M0: `2^(byte - 127)`) with which [`write_row`] stores a row: the smallest with which its largest magnitude
/// rounds to at most 448. From 10 on every nonzero value that can be read is a normal number of bf16; up to 246 the largest is
/// finite, and only there, above `1.8125 * 2^127`, does a code saturate. 255 where an element is not finite.
fn row_scale<A: Act>(x: &[A]) -> u8 {
    let top = x.iter().map(|x| x.to_f32().to_bits() & 0x7FFF_FFFF).max().unwrap_or(0);
    if top >= f32::INFINITY.to_bits() {
        return ROW_NAN;
    }
    // 464, the tie between 448 and what would be 480, is 1.8125 * 2^8 and rounds to 448
    ((top + 0x17_FFFF) >> 23).saturating_sub(8).clamp(10, 246) as u8
}

/// The scale byte of a row with an element that is not finite: all of it reads as NaN.
const ROW_NAN: u8 = 255;

/// Stores a row as codes, rounded to the nearest, ties to even, and gives the byte of its scale: a function of the row alone.
pub fn write_row<A: Act>(codes: &mut [u8], x: &[A]) -> u8 {
    let scale = row_scale(x);
    if scale == ROW_NAN {
        codes.fill(0x7F);
    } else {
        let inverse = f32::from_bits(u32::from(254 - scale) << 23);
        codes.iter_mut().zip(x).for_each(|(q, x)| *q = code(x.to_f32() * inverse));
    }
    scale
}

/// What a row's codes, none of them NaN, and its scale mean; each is exact in bf16. Inlined where it becomes vector instructions.
#[inline(always)]
pub fn read_row<A: Act>(codes: &[u8], scale: u8, x: &mut [A]) {
    let scale = if scale == ROW_NAN { f32::NAN } else { f32::from_bits(u32::from(scale) << 23) };
    for (x, q) in x.iter_mut().zip(codes) {
        // an f32 of the same exponent and mantissa; of a subnormal, 1 and its fraction, less the 1
        let (magnitude, sign) = (u32::from(q & 127), u32::from(q & 128) << 24);
        let (exponent, one) = if magnitude < 8 { (121, 1.0 / 64.0) } else { (120, 0.0) };
        let value = (f32::from_bits((magnitude << 20) + (exponent << 23)) - one) * scale;
        *x = A::from_f32(f32::from_bits(value.to_bits() | sign));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    fn there_and_back(x: &[f32]) -> (u8, Vec<f32>) {
        let (mut codes, mut read) = (vec![0; x.len()], vec![0.0; x.len()]);
        let scale = write_row(&mut codes, x);
        read_row(&codes, scale, &mut read);
        (scale, read)
    }

    /// Of every positive bf16, alone in its row.
    #[test]
    fn the_scale_is_the_smallest_that_holds_the_row() {
        for bits in 0..0x7F80u16 {
            let x = bf16::from_bits(bits).to_f32();
            let (scale, y) = there_and_back(&[x, -x]);
            assert_eq!(y[0], -y[1]);
            let fits = |scale: u8| f64::from(x) / 2f64.powi(i32::from(scale) - 127) <= 464.0;
            assert!(fits(scale) || scale == 246, "{x}: {scale}");
            assert!(scale == 10 || !fits(scale - 1), "{x}: {scale} is not the smallest");
            let step = 2f32.powi(-126).max(x / 8.0); // of subnormal codes, and of normal ones at most
            let limit = if fits(scale) { step / 2.0 } else { x / 8.0 };
            assert!((x - y[0]).abs() <= limit, "{x} became {}", y[0]);
        }
    }

    #[test]
    fn what_is_read_is_exact_and_normal_in_bf16_and_stays_as_it_is() {
        for scale in 10..=246 {
            let codes: Vec<u8> = (0..=255).filter(|q| q & 127 != 127).collect();
            let mut all = vec![0.0; codes.len()];
            read_row(&codes, scale, &mut all);
            for (&x, q) in all.iter().zip(&codes) {
                let want = VALUES[usize::from(*q)] * f32::from_bits(u32::from(scale) << 23);
                assert_eq!(x.to_bits(), want.to_bits(), "code {q}, scale {scale}");
                assert_eq!(bf16::from_f32(x).to_f32(), x, "scale {scale}");
                assert!(x == 0.0 || (x.is_normal() && bf16::from_f32(x).is_normal()), "{x}, scale {scale}");
            }
            assert_eq!(there_and_back(&all), (scale, all), "a row that was read is stored without loss");
        }
    }

    #[test]
    fn a_row_that_is_not_finite_is_nan() {
        for x in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let (scale, y) = there_and_back(&[1.0, x, 0.0]);
            assert_eq!(scale, ROW_NAN);
            assert!(y.iter().all(|y| y.is_nan()), "{x}: {y:?}");
        }
        assert_eq!(there_and_back(&[0.0, -0.0]), (10, vec![0.0, -0.0]));
    }

    #[test]
    fn the_nearest_code() {
        for q in 0..=255u8 {
            let x = VALUES[usize::from(q)];
            if x.is_nan() {
                continue;
            }
            assert_eq!(code(x), q, "{x}");
            let next = VALUES[usize::from(q) + 1..].first().copied().unwrap_or(f32::NAN);
            if q & 127 < 0x7E {
                let half = (x + next) / 2.0;
                assert_eq!(code(half), q + (q & 1), "{half} is a tie");
                let off = (next - x) / 1000.0;
                assert_eq!((code(half - off), code(half + off)), (q, q + 1), "{half}");
            }
        }
        assert_eq!((code(1e9), code(-1e9), code(460.0), code(1e-9)), (0x7E, 0xFE, 0x7E, 0));
    }

    #[test]
    fn values_of_the_specification() {
        let value = |code: usize| VALUES[code];
        assert_eq!([value(0x7E), value(0x08), value(0x07), value(0x01)], [448.0, 0.015625, 0.875 / 64.0, 1.0 / 512.0]);
        assert_eq!([value(0x38), value(0xB8), value(0x3C)], [1.0, -1.0, 1.5]);
        assert!(value(0x7F).is_nan() && value(0xFF).is_nan() && value(0x80).is_sign_negative());
        assert!((1..0x7F).all(|code| value(code) > value(code - 1)));
    }
}
