//! Products with quantized weights: every level has the bits of the portable one, they are the sums of the values, and a row's do not depend
//! on the others.

use super::{super::level::Level, others, simd::product};
use crate::{
    backend::cpu::simd::{Coded, Kind, Rows},
    files::format::BLOCKS,
    ops::noise,
};
use half::{bf16, f16};

/// Bytes in order of a generator (Knuth's MMIX).
fn random(n: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as u8
    };
    (0..n).map(|_| next()).collect()
}

fn bf16s(n: usize, seed: u64) -> Vec<bf16> {
    noise(n, seed).into_iter().map(bf16::from_f32).collect()
}

/// `y` of every level, for bf16 and f32 of `x`, is that of `values`; of rows alone it is that of all.
fn check(what: &str, w: &Rows<'_>, values: &[f32], cols: usize) {
    let (rows, k) = (37, values.len() / cols);
    let x = bf16s(rows * k, 3);
    let f32s: Vec<f32> = x.iter().map(|x| x.to_f32() * 1.000_123).collect();
    let of = |level: Level, first: usize, rows: usize| {
        let size = [rows, cols, k];
        let both = [product(level, &x[first * k..], *w, size), product(level.of_f32(), &f32s[first * k..], *w, size)];
        both.map(|y| y.iter().map(|y| y.to_bits()).collect::<Vec<_>>())
    };
    let want = of(Level::Portable, 0, rows);
    for level in others() {
        assert_eq!(of(level, 0, rows), want, "{what} at {level}");
    }
    for (first, rows) in [(0, 1), (5, 2), (9, 3), (1, 4), (20, 7), (3, 16), (2, 20)] {
        let alone = of(Level::best(), first, rows);
        for (alone, want) in alone.iter().zip(&want) {
            assert_eq!(*alone, want[first * cols..][..rows * cols], "{what}: rows {first} and {rows} more");
        }
    }
    for (i, y) in want[0].iter().enumerate() {
        let (r, c) = (i / cols, i % cols);
        let terms = (0..k).map(|j| x[r * k + j].to_f64() * f64::from(values[c * k + j]));
        let (exact, size) = terms.fold((0f64, 0f64), |(sum, size), t| (sum + t, size + t.abs()));
        let off = (f64::from(f32::from_bits(*y)) - exact).abs();
        assert!(off <= 1e-5 * size + 1e-9, "{what}: {off} from {exact}, row {r}, column {c}");
    }
}

#[test]
fn blocks() {
    for block in BLOCKS {
        for (k, cols) in [(block.weights, 1), (256 * 2, 7)] {
            let mut bytes = random(k / block.weights * block.bytes * cols, 5);
            for (i, b) in bytes.chunks_exact_mut(block.bytes).enumerate() {
                let d = f16::from_f32(1e-3 * (1 + i % 5) as f32).to_le_bytes();
                let at = if block.name == "Q6_K" { 208 } else { 0 };
                b[at..at + 2].copy_from_slice(&d);
                if block.offset {
                    b[2..4].copy_from_slice(&f16::from_f32(-2e-3).to_le_bytes());
                }
            }
            let mut values = vec![0f32; k * cols];
            block.values(&bytes, &mut values);
            let width = bytes.len() / cols;
            check(block.name, &Rows::Blocks { block, bytes: &bytes, stride: width }, &values, cols);
            // every second row, as of a head whose halves are in turn
            let second = cols.div_ceil(2);
            let halves: Vec<f32> = values.chunks_exact(k).step_by(2).flatten().copied().collect();
            check(block.name, &Rows::Blocks { block, bytes: &bytes, stride: 2 * width }, &halves, second);
        }
    }
}

#[test]
fn codes_and_scales() {
    let (k, cols) = (576, 6);
    for (kind, shift) in [(Kind::Int8, 63), (Kind::Int8, 1), (Kind::E4m3, 63), (Kind::Int4, 0), (Kind::Int4, 2)] {
        let groups = if shift == 63 { 1 } else { (k / 32usize).div_ceil(1 << shift) };
        let width = if kind == Kind::Int4 { k / 2 } else { k };
        let codes: Vec<u8> = random(cols * width, 9).into_iter().map(|q| q & !(u8::from(q & 127 == 127))).collect();
        let scales: Vec<f32> = noise(cols * groups, 4).into_iter().map(|x| 1e-3 * (2.0 + x)).collect();
        let zeros: Vec<u8> = match kind {
            Kind::Int4 => random(cols * groups, 6).into_iter().map(|z| z % 17).collect(),
            _ => vec![0; cols * groups],
        };
        let value = |c: usize, j: usize| {
            let g = c * groups + if shift == 63 { 0 } else { (j / 32) >> shift };
            let code = match kind {
                Kind::Int8 => f32::from(codes[c * width + j] as i8),
                Kind::Int4 => f32::from(codes[c * width + j / 2] >> (j % 2 * 4) & 15),
                Kind::E4m3 => {
                    let q = u16::from(codes[c * width + j]);
                    f16::from_bits((q & 0x80) << 8 | (q & 0x7f) << 7).to_f32()
                }
            };
            scales[g] * (code - f32::from(zeros[g]))
        };
        let values: Vec<f32> = (0..cols * k).map(|i| value(i / k, i % k)).collect();
        let w = Coded { kind, codes: &codes, width, scales: &scales, zeros: &zeros, groups, shift };
        check(&format!("{kind:?}, groups of 32 << {shift}"), &Rows::Codes(w), &values, cols);
    }
}
