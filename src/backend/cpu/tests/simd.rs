//! Every level computes the bits of the portable one, and these are right.

use super::others;
use crate::{
    backend::cpu::{
        level::Level,
        rows,
        simd::{Line, Product, Rows, Weighted, lines, room},
        weight::Elements,
    },
    ops::{Act, noise},
};
use half::bf16;

/// What memory may hold before it is written.
const NOISE: Line = Line([u32::MAX; 16]);

fn bits(y: &[f32]) -> Vec<u32> {
    y.iter().map(|y| y.to_bits()).collect()
}

/// bf16 of all sizes: with what is cut, with both zeros and with what cancels.
fn wild(len: usize, seed: u64) -> Vec<bf16> {
    let scale = [1.0, 1e-3, 3e4, 1e-13, 1e-17, 1e-25, 1e-39, 0.0, -1.0];
    let values = noise(len, seed).into_iter().enumerate();
    values.map(|(i, x)| bf16::from_f32(x * scale[(i * 7 + i / 13) % scale.len()])).collect()
}

pub(super) fn product<A: Act>(level: Level, x: &[A], w: Rows<'_>, [rows, cols, k]: [usize; 3]) -> Vec<f32> {
    let row = lines(level, k);
    let mut prepared = vec![NOISE; rows * row];
    for (to, x) in prepared.chunks_exact_mut(row).zip(x.chunks_exact(k)) {
        rows::prepare(level, x, to);
    }
    let room = room(level, &w, [rows, cols, k]);
    let (mut y, mut packed) = (vec![f32::NAN; rows * (cols + 3)], vec![NOISE; room]);
    Product { x: &prepared, rows, w, cols, k, y: &mut y, y_stride: cols + 3, packed: &mut packed }.run(level);
    y.chunks_exact(cols + 3).flat_map(|y| y[..cols].to_vec()).collect()
}

const SIZES: [[usize; 3]; 12] = [
    [1, 1, 1],
    [1, 4, 32],
    [1, 5, 33],
    [2, 3, 31],
    [3, 4, 64],
    [4, 4, 576],
    [5, 9, 100],
    [7, 6, 8],
    [16, 8, 96],
    [17, 7, 72], // unpacked first
    [21, 10, 33],
    [33, 32, 256],
];

#[test]
fn every_level_has_the_same_bits_of_products() {
    let others = others();
    for (seed, size @ [rows, cols, k]) in SIZES.into_iter().enumerate() {
        let (x, w) = (wild(rows * k, seed as u64), wild(cols * k, 77 + seed as u64));
        let f32s = |v: &[bf16]| v.iter().map(|x| x.to_f32() * 1.000_123).collect::<Vec<f32>>();
        let (xf, wf) = (f32s(&x), f32s(&w));
        let bf16s = || Rows::from(Elements::of(&w));
        let of = |level: Level| {
            let f = level.of_f32();
            let products = [
                product(level, &x, bf16s(), size),
                product(f, &xf, bf16s(), size),
                product(f, &xf, Elements::F32(&wf).into(), size),
            ];
            products.map(|y| bits(&y))
        };
        let want = of(Level::Portable);
        for &level in &others {
            assert_eq!(of(level), want, "{level}, {size:?}");
        }
        for (r, y) in want[0].chunks_exact(cols).enumerate() {
            for (c, y) in y.iter().enumerate() {
                let exact = (0..k).map(|j| x[r * k + j].to_f64() * w[c * k + j].to_f64());
                let size: f64 = exact.clone().map(f64::abs).sum();
                let exact: f64 = exact.sum();
                let off = (f64::from(f32::from_bits(*y)) - exact).abs();
                assert!(
                    off <= 1e-6 * size + 1e-12,
                    "{y:x} is {off} from {exact}, row {r}, column {c} of {rows} x {cols} x {k}"
                );
            }
        }
    }
}

#[test]
fn every_level_has_the_same_bits_of_weighted_values() {
    let others = others();
    for [rows, n, d] in [[1, 1, 8], [3, 17, 64], [4, 5, 16], [5, 100, 24], [8, 128, 128], [29, 30, 72]] {
        let (p, v) = (noise(rows * (n + 2), 3), noise(n * d, 4).into_iter().map(bf16::from_f32).collect::<Vec<_>>());
        let vf: Vec<f32> = v.iter().map(|v| v.to_f32() * 1.01).collect();
        let o_stride = d.next_multiple_of(16) + 2;
        let of = |level: Level, v: Elements<'_>| {
            let mut o = vec![0.5; rows * o_stride];
            // rows see more and more, and the last all; of long ones three in four have a window
            let seen = |q: usize| {
                let end = n - (rows - 1 - q).min(n);
                if n > 20 && q + 1 < rows { end.saturating_sub(20 * (1 + q % 4 % 3))..end } else { 0..end }
            };
            Weighted { p: &p, p_stride: n + 2, rows, v, d, seen: &seen, o: &mut o, o_stride }.run(level);
            bits(&o)
        };
        let both = |level| [of(level, Elements::of(&v)), of(level, Elements::F32(&vf))];
        let want = both(Level::Portable);
        for &level in &others {
            assert_eq!(both(level), want, "{level}, {rows} rows, {n} values of {d}");
        }
        let (r, j) = (rows - 1, d - 1);
        let exact: f64 = (0..n).map(|t| f64::from(p[r * (n + 2) + t]) * v[t * d + j].to_f64()).sum();
        let got = f32::from_bits(want[0][r * o_stride + j]);
        assert!((f64::from(got) - 0.5 - exact).abs() < 1e-4, "{got} - 0.5 is not {exact}");
    }
}

#[test]
fn every_level_has_the_same_bits_of_rows() {
    let others = others();
    for n in [1, 2, 15, 16, 33, 576, 1500] {
        let (x, w) = (wild(2 * n, 5), wild(n, 6));
        let of = |level: Level| {
            let mut out = vec![bf16::ZERO; n];
            rows::norm(level, &mut out, &x[..n], &w, 1e-5);
            let mut all: Vec<f32> = out.iter().map(|x| x.to_f32()).collect();
            rows::swiglu(level, &mut out, &x);
            all.extend(out.iter().map(|x| x.to_f32()));
            let mut s: Vec<f32> = noise(n, 8).iter().map(|x| x * 30.0).collect();
            let largest = rows::max_of(level, &s);
            assert_eq!(largest, s.iter().copied().fold(f32::MIN, f32::max));
            all.push(rows::sum_exp(level, &s, largest) as f32);
            let (m, sum) = rows::softmax(level, &mut s, 0.125);
            all.extend(s.iter().chain([&m, &sum]));
            bits(&all)
        };
        let want = of(Level::Portable);
        for &level in &others {
            assert_eq!(of(level), want, "{level}, {n} elements");
        }
    }
}

#[test]
fn exp_is_close() {
    for i in -9000..9000 {
        let x = i as f32 / 100.0;
        let (got, want) = (f64::from(rows::exp_of(Level::best(), x)), f64::from(x).exp());
        let fits = match x {
            ..-87.305 => got == 0.0,
            88.305.. => got.is_infinite(),
            _ => (got / want - 1.0).abs() < 2.5e-7,
        };
        assert!(fits, "exp({x}) is {got}, expected {want}");
    }
    assert!(rows::exp_of(Level::best(), f32::NAN).is_nan());
    assert_eq!(rows::exp_of(Level::best(), 0.0), 1.0);
}

#[test]
fn a_level_is_chosen_by_its_name() {
    assert_eq!(Level::named("portable").unwrap(), Level::Portable);
    assert_eq!(Level::named(Level::best().name()).unwrap(), Level::best());
    let error = Level::named("sse").unwrap_err().to_string();
    assert!(error.contains("AOJI_CPU is \"sse\", allowed on this CPU is portable"), "{error}");
}
