//! Q4_K: 256 weights; f16 d, f16 dmin, a scale and an offset of 6 bits for each 32, 128 bytes of codes: of each 64 weights the
//! low halves, then the high ones. Value d sc q - dmin mn.

use super::block::{Block, half, nibbles, shifted, six_bits};

pub static Q4_K: Block =
    Block { name: "Q4_K", id: 12, weights: 256, bytes: 144, bits: 4, group: 32, offset: true, values };

fn values(b: &[u8], out: &mut [f32]) {
    let (d, dmin) = (half(b), half(&b[2..]));
    let mut codes = b[16..].chunks_exact(32).flat_map(nibbles);
    for ((scale, offset), out) in six_bits(&b[4..16]).zip(out.chunks_exact_mut(32)) {
        shifted(out, d * f32::from(scale), -(dmin * f32::from(offset)), codes.by_ref().take(32));
    }
}
