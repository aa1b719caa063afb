//! Q4_0: 32 weights; f16 d, 16 bytes of codes. Value d (q - 8).

use super::block::{Block, half, nibbles, scaled};

pub static Q4_0: Block =
    Block { name: "Q4_0", id: 2, weights: 32, bytes: 18, bits: 4, group: 32, offset: false, values };

fn values(b: &[u8], out: &mut [f32]) {
    scaled(out, half(b), nibbles(&b[2..]).map(|q| f32::from(q) - 8.0));
}
