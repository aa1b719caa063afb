//! Q8_0: 32 weights; f16 d, 32 codes of 8 bits with sign. Value d q.

use super::block::{Block, half, scaled};

pub static Q8_0: Block =
    Block { name: "Q8_0", id: 8, weights: 32, bytes: 34, bits: 8, group: 32, offset: false, values };

fn values(b: &[u8], out: &mut [f32]) {
    scaled(out, half(b), b[2..].iter().map(|q| f32::from(*q as i8)));
}
