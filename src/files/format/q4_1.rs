//! Q4_1: 32 weights; f16 d, f16 m, 16 bytes of codes. Value d q + m.

use super::block::{Block, half, nibbles, shifted};

pub static Q4_1: Block =
    Block { name: "Q4_1", id: 3, weights: 32, bytes: 20, bits: 4, group: 32, offset: true, values, encode: None };

fn values(b: &[u8], out: &mut [f32]) {
    shifted(out, half(b), half(&b[2..]), nibbles(&b[4..]));
}
