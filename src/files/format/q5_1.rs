//! Q5_1: 32 weights; f16 d, f16 m, a word of fifth bits, 16 bytes of low bits. Value d q + m.

use super::block::{Block, fives, half, shifted};

pub static Q5_1: Block =
    Block { name: "Q5_1", id: 7, weights: 32, bytes: 24, bits: 5, group: 32, offset: true, values, encode: None };

fn values(b: &[u8], out: &mut [f32]) {
    shifted(out, half(b), half(&b[2..]), fives(&b[4..], &b[8..]));
}
