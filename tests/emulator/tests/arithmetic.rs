//! Arithmetic that must have the same bits on host and device, wide atomics and shuffles.
mod common;
use common::*;

/// Numbers of every kind: ordinary, huge, tiny, subnormal, negative, zero, infinite.
fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let special = [0.0, -0.0, 1e-40, -3e-39, f32::MAX, f32::MIN, f32::INFINITY, 4294967296.0, 2147483648.0, -1.5, 2.5];
    let scale = [1.0, 1e-20, 1e20, 1e9, 1e-38];
    let noise = noise(n, seed);
    (0..n).map(|i| if i < special.len() { special[i] } else { noise[i] * scale[i % scale.len()] }).collect()
}

#[test]
fn explicitly_rounded_arithmetic_has_the_hosts_bits() {
    let g = Gpu::new();
    let n = 1000usize;
    let (a, mut b, c) = (numbers(n, 1), numbers(n, 2), numbers(n, 3));
    b.rotate_left(17); // specials meet ordinary numbers, too
    let (ad, bd, cd) = (g.upload(&a), g.upload(&b), g.upload(&c));
    let mut out = g.stream.alloc_zeros::<u32>(17 * n).unwrap();
    launch!(g, "t_arithmetic", grid(8, 1, 128, 0), &mut out, &ad, &bd, &cd, &(n as i32)).unwrap();
    let got = g.stream.clone_dtoh(&out).unwrap();
    for i in 0..n {
        let (x, y, z) = (a[i], b[i], c[i]);
        let (ux, uy) = (x.to_bits(), y.to_bits());
        let (wx, wy) = ((ux as u64) << 32 | uy as u64, (uy as u64) << 32 | ux as u64);
        let wide = (wx as u128 * wy as u128) >> 64;
        let want = [
            (x + y).to_bits(),
            (x - y).to_bits(),
            (x * y).to_bits(),
            (x / y).to_bits(),
            x.abs().sqrt().to_bits(),
            x.mul_add(y, z).to_bits(),
            (x * y + z).to_bits(),
            x as u32, // Rust's casts saturate as CUDA's do
            x as i32 as u32,
            x.round_ties_even() as i32 as u32,
            ((ux as u64 * uy as u64) >> 32) as u32,
            (wide >> 32) as u32,
            (wx as f32).to_bits(),
            (ux as f32).to_bits(),
            (x as u64) as u32,
            (ux >> 19) | (uy << 13),
            ux.reverse_bits(),
        ];
        for (k, w) in want.iter().enumerate() {
            let got = got[n * k + i];
            let both_nan = k < 7 && f32::from_bits(got).is_nan() && f32::from_bits(*w).is_nan();
            assert!(got == *w || both_nan, "value {k} of {x:e} {y:e} {z:e}: {got:08x}, expected {w:08x}");
        }
    }
}

#[test]
fn wide_atomics_shuffles_and_matches() {
    let g = Gpu::new();
    let x: Vec<u64> = (0..32).map(|i| ((i % 5) << 40) | (i % 3)).collect();
    let mut out = g.stream.alloc_zeros::<u64>(66).unwrap();
    launch!(g, "t_wide", grid(1, 1, 32, 0), &mut out, &g.upload(&x)).unwrap();
    let got = g.stream.clone_dtoh(&out).unwrap();
    assert_eq!((got[0], got[1]), (x.iter().sum(), *x.iter().max().unwrap()));
    for i in 0..32 {
        assert_eq!(got[2 + i], x[i ^ 1], "lane {i}");
        let same = (0..32).filter(|&j| x[j] == x[i]).fold(0u64, |m, j| m | 1 << j);
        assert_eq!(got[34 + i], same, "lane {i}");
    }
}

#[test]
fn eight_at_a_time() {
    let g = Gpu::new();
    let x = halves(&noise(256, 4));
    let mut y = g.uninit::<bf16>(256);
    launch!(g, "t_pack", grid(1, 1, 32, 0), &mut y, &g.upload(&x)).unwrap();
    let want: Vec<bf16> = x.iter().map(|v| bf16::from_f32(2.0 * v.to_f32())).collect();
    assert_eq!(g.stream.clone_dtoh(&y).unwrap(), want);
}

#[test]
fn every_half_is_the_same_number() {
    let g = Gpu::new();
    let x: Vec<u32> = (0..1 << 15).map(|i| (2 * i) | ((2 * i + 1) << 16)).collect();
    let mut out = g.uninit::<f32>(1 << 16);
    launch!(g, "t_halves", grid(1, 1, 32, 0), &mut out, &g.upload(&x), &(x.len() as i32)).unwrap();
    for (i, got) in g.stream.clone_dtoh(&out).unwrap().into_iter().enumerate() {
        let want = half::f16::from_bits(i as u16).to_f32();
        assert!(got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()), "{i:#x}: {got}, expected {want}");
    }
}

#[test]
fn bytes_are_chosen() {
    let g = Gpu::new();
    let mut out = g.uninit::<u32>(5);
    launch!(g, "t_bytes", grid(1, 1, 32, 0), &mut out, &0x4433_2211u32, &0x8877_6655u32).unwrap();
    let want = [0x4433_2211, 0x8877_6655, 0x1122_3344, 0x5544_5522, 0x4433_4433];
    assert_eq!(g.stream.clone_dtoh(&out).unwrap(), want);
}
