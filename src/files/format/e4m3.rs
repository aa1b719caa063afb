//! e4m3: a sign, 4 bits of exponent with bias 7, 3 bits of mantissa. A code of all ones is NaN, and there are no
//! infinities (the "fn" in its full name; OCP 8-bit Floating Point Specification 1.0, table 1).

use super::fit::{best, nearest};

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

#[cfg(test)]
mod tests {
    use super::*;

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
