//! Q4_0: 32 weights; f16 d, 16 bytes of codes. Value d (q - 8).

use super::{
    block::{Block, codes, half, nibbles, put_half, put_nibbles, scaled},
    fit::symmetric,
};

pub static Q4_0: Block = Block {
    name: "Q4_0",
    id: 2,
    weights: 32,
    bytes: 18,
    bits: 4,
    group: 32,
    offset: false,
    values,
    encode: Some(encode),
};

fn values(b: &[u8], out: &mut [f32]) {
    scaled(out, half(b), nibbles(&b[2..]).map(|q| f32::from(q) - 8.0));
}

fn encode(x: &[f32], w: &[f32], b: &mut [u8]) {
    let d = put_half(b, symmetric(x, w, -8.0, 7.0));
    let mut stored = [0; 32];
    stored.iter_mut().zip(codes(x, d, -8.0, 7.0)).for_each(|(s, q)| *s = (q + 8) as u8);
    put_nibbles(&mut b[2..], &stored);
}
