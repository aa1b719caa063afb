//! Q6_K: 256 weights; 128 bytes of low bits, 64 bytes of high bits, 16 scales of 8 bits with sign, f16 d. Value d sc (q - 32).
//!
//! Of each 128 weights, those 32 apart share a byte of high bits, and those 64 apart one of low bits.

use super::{
    block::{Block, codes, half, put_half, scaled},
    fit::{nearest, symmetric},
};

pub static Q6_K: Block = Block {
    name: "Q6_K",
    id: 14,
    weights: 256,
    bytes: 210,
    bits: 6,
    group: 16,
    offset: false,
    values,
    encode: Some(encode),
};

fn values(b: &[u8], out: &mut [f32]) {
    let (low, high, scales, d) = (&b[..128], &b[128..192], &b[192..208], half(&b[208..]));
    for (g, out) in out.chunks_exact_mut(16).enumerate() {
        let (part, first) = (g / 8, g % 8 * 16); // 128 weights, and the first of this group among them
        let code = |i: usize| {
            let low = low[64 * part + i % 64] >> (i / 64 * 4) & 15;
            let high = high[32 * part + i % 32] >> (i / 32 * 2) & 3;
            f32::from(low | high << 4) - 32.0
        };
        scaled(out, d * f32::from(scales[g] as i8), (first..first + 16).map(code));
    }
}

/// The scale is fitted for each 16 weights alone, then rounded to a multiple of the block's, where the neighbouring
/// multiples are tried too.
fn encode(x: &[f32], w: &[f32], b: &mut [u8]) {
    let mut scales = [0f32; 16];
    let parts = || x.chunks_exact(16).zip(w.chunks_exact(16));
    scales.iter_mut().zip(parts()).for_each(|(s, (x, w))| *s = symmetric(x, w, -32.0, 31.0));
    let largest = scales.iter().fold(0f32, |m, s| if s.abs() > m.abs() { *s } else { m });
    b.fill(0);
    let d = put_half(&mut b[208..], largest / -128.0);
    if d == 0.0 {
        return;
    }
    for (g, (x, w)) in parts().enumerate() {
        let error = |scale: f32| -> f32 {
            let back = codes(x, d * scale, -32.0, 31.0).map(|q| d * scale * q as f32);
            back.zip(x).zip(w).map(|((back, x), w)| w * (back - x).powi(2)).sum()
        };
        let near = nearest(scales[g] / d);
        let tried = [near, near - 1.0, near + 1.0].map(|scale| scale.clamp(-128.0, 127.0));
        let scale = tried.into_iter().min_by(|a, b| error(*a).total_cmp(&error(*b))).unwrap_or(near);
        b[192 + g] = scale as i8 as u8;
        let (part, first) = (g / 8, g % 8 * 16);
        for (i, q) in (first..).zip(codes(x, d * scale, -32.0, 31.0)) {
            let q = (q + 32) as u8;
            b[64 * part + i % 64] |= (q & 15) << (i / 64 * 4);
            b[128 + 32 * part + i % 32] |= q >> 4 << (i / 32 * 2);
        }
    }
}
