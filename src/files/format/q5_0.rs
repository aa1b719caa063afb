//! Q5_0: 32 weights; f16 d, a word of fifth bits, 16 bytes of low bits. Value d (q - 16).

use super::block::{Block, fives, half, scaled};

pub static Q5_0: Block =
    Block { name: "Q5_0", id: 6, weights: 32, bytes: 22, bits: 5, group: 32, offset: false, values };

fn values(b: &[u8], out: &mut [f32]) {
    scaled(out, half(b), fives(&b[2..], &b[6..]).map(|q| f32::from(q) - 16.0));
}
