//! Q5_K: 256 weights; as Q4_K, with 32 bytes of fifth bits before the codes: bit `g` of byte `l` is that of weight `32 g + l`.
//! Value d sc q - dmin mn.

use super::block::{Block, half, nibbles, shifted, six_bits};

pub static Q5_K: Block =
    Block { name: "Q5_K", id: 13, weights: 256, bytes: 176, bits: 5, group: 32, offset: true, values, encode: None };

fn values(b: &[u8], out: &mut [f32]) {
    let (d, dmin, high) = (half(b), half(&b[2..]), &b[16..48]);
    let mut low = b[48..].chunks_exact(32).flat_map(nibbles);
    for (g, ((scale, offset), out)) in six_bits(&b[4..16]).zip(out.chunks_exact_mut(32)).enumerate() {
        let codes = high.iter().zip(low.by_ref()).map(|(high, low)| low | (high >> g & 1) << 4);
        shifted(out, d * f32::from(scale), -(dmin * f32::from(offset)), codes);
    }
}
