//! Q6_K: 256 weights; 128 bytes of low bits, 64 bytes of high bits, 16 scales of 8 bits with sign, f16 d. Value d sc (q - 32).
//!
//! Of each 128 weights, those 32 apart share a byte of high bits, and those 64 apart one of low bits.

use super::block::{Block, half, scaled};

pub static Q6_K: Block =
    Block { name: "Q6_K", id: 14, weights: 256, bytes: 210, bits: 6, group: 16, offset: false, values };

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
