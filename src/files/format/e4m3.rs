//! e4m3: a sign, 4 bits of exponent with bias 7, 3 bits of mantissa; all ones is no number, and there are no infinities ("fn" in
//! its full name; OCP 8-bit Floating Point Specification 1.0, table 1).

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_the_specification() {
        let value = |code: usize| VALUES[code];
        assert_eq!([value(0x7E), value(0x08), value(0x07), value(0x01)], [448.0, 0.015625, 0.875 / 64.0, 1.0 / 512.0]);
        assert_eq!([value(0x38), value(0xB8), value(0x3C)], [1.0, -1.0, 1.5]);
        assert!(value(0x7F).is_nan() && value(0xFF).is_nan() && value(0x80).is_sign_negative());
        assert!((1..0x7F).all(|code| value(code) > value(code - 1)));
    }
}
