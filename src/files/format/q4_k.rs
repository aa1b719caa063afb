//! Q4_K: 256 weights; f16 d, f16 dmin, a scale and an offset of 6 bits for each 32, 128 bytes of codes: of each 64 weights the
//! low halves, then the high ones. Value d sc q - dmin mn.

use super::{
    block::{Block, half, nibbles, put_half, put_nibbles, put_six_bits, shifted, six_bits},
    fit::{affine, nearest},
};

pub static Q4_K: Block = Block {
    name: "Q4_K",
    id: 12,
    weights: 256,
    bytes: 144,
    bits: 4,
    group: 32,
    offset: true,
    values,
    encode: Some(encode),
};

fn values(b: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half(b), half(&b[2..]));
    let mut codes = b[16..].chunks_exact(32).flat_map(nibbles);
    for ((scale, offset), out) in six_bits(&b[4..16]).zip(out.chunks_exact_mut(32)) {
        shifted(out, d * f32::from(scale), -(dmin * f32::from(offset)), codes.by_ref().take(32));
    }
}

/// Scale and offset are fitted for each 32 weights alone, then rounded to multiples of the block's, where the
/// neighbouring multiples are tried too.
fn encode(x: &[f32], w: &[f32], b: &mut [u8]) {
    let mut fits = [(0f32, 0f32); 8];
    let parts = || x.chunks_exact(32).zip(w.chunks_exact(32));
    fits.iter_mut().zip(parts()).for_each(|(fit, (x, w))| *fit = affine(x, w, 15.0));
    let largest = fits.iter().fold((0f32, 0f32), |m, fit| (m.0.max(fit.0), m.1.max(fit.1)));
    let (d, dmin) = (put_half(b, largest.0 / 63.0), put_half(&mut b[2..], largest.1 / 63.0));
    let near = |x: f32, d: f32| {
        let n = if d == 0.0 { 0.0 } else { nearest(x / d) };
        [n, n - 1.0, n + 1.0].map(|n| n.clamp(0.0, 63.0))
    };
    let code = |x: f32, d: f32, m: f32| if d == 0.0 { 0.0 } else { nearest(((x + m) / d).clamp(0.0, 15.0)) };
    let mut pairs = [(0u8, 0u8); 8];
    for (g, (x, w)) in parts().enumerate() {
        let mut least = f32::INFINITY;
        for scale in near(fits[g].0, d) {
            for offset in near(fits[g].1, dmin) {
                let (s, m) = (d * scale, dmin * offset);
                let error = x.iter().zip(w).map(|(x, w)| w * (s * code(*x, s, m) - m - x).powi(2)).sum();
                if error < least {
                    (least, pairs[g]) = (error, (scale as u8, offset as u8));
                }
            }
        }
    }
    put_six_bits(&mut b[4..16], &pairs);
    for ((x, b), pairs) in x.chunks_exact(64).zip(b[16..].chunks_exact_mut(32)).zip(pairs.chunks_exact(2)) {
        let mut stored = [0; 64];
        for ((stored, x), (scale, offset)) in stored.chunks_exact_mut(32).zip(x.chunks_exact(32)).zip(pairs) {
            let (s, m) = (d * f32::from(*scale), dmin * f32::from(*offset));
            stored.iter_mut().zip(x).for_each(|(q, x)| *q = code(*x, s, m) as u8);
        }
        put_nibbles(b, &stored);
    }
}
