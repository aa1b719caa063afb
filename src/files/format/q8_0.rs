//! Q8_0: 32 weights; f16 d, 32 codes of 8 bits with sign. Value d q.

use super::{
    block::{Block, codes, half, put_half, scaled},
    fit::symmetric,
};

pub static Q8_0: Block = Block {
    name: "Q8_0",
    id: 8,
    weights: 32,
    bytes: 34,
    bits: 8,
    group: 32,
    offset: false,
    values,
    encode: Some(encode),
};

fn values(b: &[u8], out: &mut [f32]) {
    scaled(out, half(b), b[2..].iter().map(|q| f32::from(*q as i8)));
}

fn encode(x: &[f32], w: &[f32], b: &mut [u8]) {
    let d = put_half(b, symmetric(x, w, -127.0, 127.0));
    b[2..].iter_mut().zip(codes(x, d, -127.0, 127.0)).for_each(|(b, q)| *b = q as i8 as u8);
}
