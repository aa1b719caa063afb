//! Q5_0: 32 weights; f16 d, a word of fifth bits, 16 bytes of low bits. Value d (q - 16).

use super::{
    block::{Block, codes, fives, half, put_half, put_nibbles, scaled},
    fit::symmetric,
};

pub static Q5_0: Block = Block {
    name: "Q5_0",
    id: 6,
    weights: 32,
    bytes: 22,
    bits: 5,
    group: 32,
    offset: false,
    values,
    encode: Some(encode),
};

fn values(b: &[u8], out: &mut [f32]) {
    scaled(out, half(b), fives(&b[2..], &b[6..]).map(|q| f32::from(q) - 16.0));
}

fn encode(x: &[f32], w: &[f32], b: &mut [u8]) {
    let d = put_half(b, symmetric(x, w, -16.0, 15.0));
    let mut stored = [0; 32];
    stored.iter_mut().zip(codes(x, d, -16.0, 15.0)).for_each(|(s, q)| *s = (q + 16) as u8);
    let high = stored.iter().rev().fold(0u32, |word, q| word << 1 | u32::from(q >> 4));
    b[2..6].copy_from_slice(&high.to_le_bytes());
    put_nibbles(&mut b[6..], &stored);
}
