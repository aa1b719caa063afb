//! Integers of 8 bits with sign, a byte each.

pub fn codes(bytes: &[u8], cols: usize, first: usize, out: &mut [f32]) {
    out.iter_mut().zip(&bytes[first * cols..]).for_each(|(x, q)| *x = f32::from(*q as i8));
}

pub fn zero(zeros: &[u8], at: usize) -> f32 {
    f32::from(zeros[at] as i8)
}
