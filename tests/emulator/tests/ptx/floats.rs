//! Floating point: rounding, NaN, signed zeros, saturation, bf16, approximations.

use crate::{check, results};

const NAN: u32 = 0x7fff_ffff; // the one that arithmetic makes
const OTHER_NAN: u32 = 0xffc0_0001;
const INF: u32 = 0x7f80_0000;

fn b(x: f32) -> u64 {
    x.to_bits().into()
}

fn d(x: f64) -> u64 {
    x.to_bits()
}

#[test]
fn to_nearest_even() {
    let half = f32::EPSILON / 2.0; // of 1: a tie
    for rn in ["", ".rn"] {
        check!(&format!("add{rn}.f32 %v, %f0, %f1"); [b(1.0), b(half)] => b(1.0), [b(1.0 + f32::EPSILON), b(half)] => b(1.0 + 2.0 * f32::EPSILON),
            [OTHER_NAN, 0] => NAN, [INF, 0xff80_0000u32] => NAN);
        check!(&format!("sub{rn}.f32 %v, %f0, %f1"); [b(1.0), b(3.0)] => b(-2.0), [b(1.0), b(1.0)] => b(0.0));
        check!(&format!("mul{rn}.f32 %v, %f0, %f1"); [b(3.0), b(0.1)] => b(3.0 * 0.1), [INF, 0] => NAN, [b(-0.0), b(1.0)] => b(-0.0));
    }
    check!("fma.rn.f32 %v, %f0, %f1, %f2"; // one rounding: the product's last bits count
        [b(1.0 + f32::EPSILON), b(1.0 - f32::EPSILON), b(-1.0)] => b(-(f32::EPSILON * f32::EPSILON)), [INF, 0, 0] => NAN);
    check!("div.rn.f32 %v, %f0, %f1"; [b(1.0), b(3.0)] => b(1.0 / 3.0), [b(1.0), b(0.0)] => INF, [0, 0] => NAN,
        [b(f32::MIN_POSITIVE), b(3.0)] => b(f32::MIN_POSITIVE / 3.0));
    check!("rcp.rn.f32 %v, %f0"; [b(3.0)] => b(1.0 / 3.0), [b(-0.0)] => 0xff80_0000u32);
    check!("sqrt.rn.f32 %v, %f0"; [b(2.0)] => b(2f32.sqrt()), [b(-1.0)] => NAN, [b(-0.0)] => b(-0.0));
    check!("neg.f32 %v, %f0"; [b(1.0)] => b(-1.0));
    check!("abs.f32 %v, %f0"; [b(-1.0)] => b(1.0));
    check!("copysign.f32 %v, %f0, %f1"; [b(-1.0), b(2.0)] => b(-2.0));
    check!("add.f64 %x, %d0, %d1"; [d(0.1), d(0.2)] => d(0.1 + 0.2));
    check!("sub.f64 %x, %d0, %d1"; [d(0.3), d(0.2)] => d(0.3 - 0.2));
    check!("mul.f64 %x, %d0, %d1"; [d(0.3), d(0.2)] => d(0.3 * 0.2));
    check!("fma.rn.f64 %x, %d0, %d1, %d2"; [d(0.1), d(10.0), d(-1.0)] => d(0.1f64.mul_add(10.0, -1.0)));
    check!("div.rn.f64 %x, %d0, %d1"; [d(1.0), d(3.0)] => d(1.0 / 3.0));
    check!("neg.f64 %x, %d0"; [d(1.0)] => d(-1.0));
    check!("abs.f64 %x, %d0"; [d(-1.0)] => d(1.0));
    check!("sqrt.rn.f64 %x, %d0"; [d(2.0)] => d(2f64.sqrt()));
}

#[test]
fn in_a_direction() {
    let (one, next, before) = (b(1.0), b(1.0 + f32::EPSILON), b(1.0 - f32::EPSILON / 2.0));
    let tiny = b(1e-30);
    check!("add.rp.f32 %v, %f0, %f1"; [one, tiny] => next, [one, 0] => one);
    check!("add.rm.f32 %v, %f0, %f1"; [one, b(-1e-30)] => before, [one, tiny] => one);
    check!("add.rz.f32 %v, %f0, %f1"; [one, b(-1e-30)] => before, [one, tiny] => one, [b(-1.0), tiny] => b(-1.0 + f32::EPSILON / 2.0));
    check!("sub.rm.f32 %v, %f0, %f1"; [one, tiny] => before);
    check!("mul.rp.f32 %v, %f0, %f1"; [next, next] => b(1.0 + 3.0 * f32::EPSILON));
    check!("mul.rz.f32 %v, %f0, %f1"; [next, next] => b(1.0 + 2.0 * f32::EPSILON));
    check!("fma.rm.f32 %v, %f0, %f1, %f2"; [one, one, b(-1e-30)] => before, [one, one, tiny] => one,
        [b(100.4), b(0.25), b(12582913.0)] => b(12582938.0)); // an integer and below
    // a sum that is exactly zero is -0 downwards and +0 in every other direction, but of two zeros of one sign it is that zero
    let (zero, minus) = (b(0.0), b(-0.0));
    for (r, of_opposites) in [("rm", minus), ("rp", zero), ("rz", zero), ("rn", zero)] {
        check!(&format!("fma.{r}.f32 %v, %f0, %f1, %f2"); [one, one, b(-1.0)] => of_opposites, [b(-1.0), one, one] => of_opposites,
            [zero, one, minus] => of_opposites, [minus, one, minus] => minus, [zero, one, zero] => zero);
        check!(&format!("add.{r}.f32 %v, %f0, %f1"); [one, b(-1.0)] => of_opposites, [minus, zero] => of_opposites, [minus, minus] => minus);
        check!(&format!("sub.{r}.f32 %v, %f0, %f1"); [one, one] => of_opposites, [minus, minus] => of_opposites, [minus, zero] => minus);
        check!(&format!("mul.{r}.f32 %v, %f0, %f1"); [minus, one] => minus, [minus, minus] => zero);
    }
    check!("fma.rp.f32 %v, %f0, %f1, %f2"; [one, one, tiny] => next, [b(3e38), b(10.0), 0] => INF);
    check!("fma.rz.f32 %v, %f0, %f1, %f2"; [b(3e38), b(10.0), 0] => b(f32::MAX));
}

#[test]
fn saturation_and_extremes() {
    check!("add.sat.f32 %v, %f0, %f1"; [b(0.7), b(0.7)] => b(1.0), [b(-1.0), b(0.5)] => b(0.0), [NAN, 0] => 0);
    check!("mul.sat.f32 %v, %f0, %f1"; [b(0.5), b(0.5)] => b(0.25));
    check!("fma.rn.sat.f32 %v, %f0, %f1, %f2"; [b(2.0), b(2.0), 0] => b(1.0));
    check!("min.f32 %v, %f0, %f1"; [b(1.0), NAN] => b(1.0), [OTHER_NAN, b(2.0)] => b(2.0), [NAN, OTHER_NAN] => NAN, [b(0.0), b(-0.0)] => b(-0.0));
    check!("max.f32 %v, %f0, %f1"; [b(1.0), NAN] => b(1.0), [OTHER_NAN, b(2.0)] => b(2.0), [b(-0.0), b(0.0)] => b(0.0), [b(1.0), b(2.0)] => b(2.0));
    check!("min.f64 %x, %d0, %d1"; [d(1.0), d(2.0)] => d(1.0));
    check!("max.f64 %x, %d0, %d1"; [d(1.0), d(2.0)] => d(2.0));
}

#[test]
fn comparisons_with_nan() {
    // both numbers and true; u: or a NaN
    for (c, want) in [
        ("eq", [0, 1, 0]),
        ("ne", [1, 0, 1]),
        ("lt", [1, 0, 0]),
        ("le", [1, 1, 0]),
        ("gt", [0, 0, 1]),
        ("ge", [0, 1, 1]),
    ] {
        for (u, nan) in [("", 0), ("u", 1)] {
            check!(&format!("setp.{c}{u}.f32 %p, %f0, %f1"); [b(1.0), b(2.0)] => want[0], [b(-0.0), b(0.0)] => want[1], [b(2.0), b(1.0)] => want[2],
                [NAN, b(1.0)] => nan, [b(1.0), OTHER_NAN] => nan);
        }
    }
    check!("setp.num.f32 %p, %f0, %f1"; [b(1.0), b(2.0)] => 1, [NAN, b(1.0)] => 0);
    check!("setp.nan.f32 %p, %f0, %f1"; [b(1.0), b(2.0)] => 0, [b(1.0), NAN] => 1);
    check!("setp.lt.f64 %p, %d0, %d1"; [d(1.0), d(2.0)] => 1);
    check!("setp.gt.or.f32 %p, %f0, %f1, %q2"; [NAN, b(1.0), 1] => 1);
}

/// Largest relative error; the ISA allows 2^-22 or so.
fn close(instruction: &str, f: fn(f64) -> f64, xs: &[f32]) {
    let cases: Vec<Vec<u64>> = xs.iter().map(|x| vec![b(*x)]).collect();
    for (x, got) in xs.iter().zip(results(instruction, &cases)) {
        let (got, want) = (f64::from(f32::from_bits(got as u32)), f(f64::from(*x)));
        assert!((got - want).abs() <= want.abs() * 2f64.powi(-21), "{instruction} of {x}: {got}, expected {want}");
    }
}

#[test]
fn approximations() {
    let xs = [0.001, 0.5, 1.0, 1.5, 2.0, 3.3, 10.0, 77.7];
    close("ex2.approx.f32 %v, %f0", f64::exp2, &xs);
    close("ex2.approx.ftz.f32 %v, %f0", f64::exp2, &xs);
    close("lg2.approx.f32 %v, %f0", f64::log2, &xs);
    close("rsqrt.approx.f32 %v, %f0", |x| 1.0 / x.sqrt(), &xs);
    close("sqrt.approx.f32 %v, %f0", f64::sqrt, &xs);
    close("rcp.approx.f32 %v, %f0", |x| 1.0 / x, &xs);
    close("rcp.approx.ftz.f32 %v, %f0", |x| 1.0 / x, &xs);
    close("div.approx.f32 %v, %f0, 0f40400000", |x| x / 3.0, &xs);
    close("div.full.f32 %v, %f0, 0f40400000", |x| x / 3.0, &xs);
    check!("ex2.approx.f32 %v, %f0"; [0xff80_0000u32] => 0, [INF] => INF, [b(-149.0)] => 1, [b(0.0)] => b(1.0));
    check!("ex2.approx.ftz.f32 %v, %f0"; [b(-149.0)] => 0, [b(-0.0)] => b(1.0)); // a subnormal result becomes 0
    check!("rsqrt.approx.f32 %v, %f0"; [0] => INF, [b(-1.0)] => NAN, [b(4.0)] => b(0.5));
    check!("lg2.approx.f32 %v, %f0"; [0] => 0xff80_0000u32, [b(8.0)] => b(3.0));
}

#[test]
fn bf16_is_rounded_once() {
    // 1 + 2^-7 is the bf16 after 1 (0x3f81); a product of 1 and 1 plus 2^-9 is a tie, plus any bit more is not
    check!("fma.rn.bf16x2 %w, %r0, %r1, %r2";
        [0x3f81_4040u32, 0x3f80_4000u32, 0x8000_8000u32] => 0x3f81_40c0u32,
        [0x3f81_3f80u32, 0x3f81_3f80u32, 0x8000_3b80u32] => 0x3f82_3f80u32, // (1 + 2^-7)^2 = 1 + 2^-6 + 2^-14; 1 + 2^-8 a tie
        [0x7f80_0000u32, 0x0000_7f80u32, 0] => 0x7fff_7fffu32);
    // integers in the low bits, subnormal below 128: 15 / 64 and 240 / 1024, less 8 / 64; 255 / 64 and 127 / 64, less 2
    check!("fma.rn.bf16x2 %w, %r0, %r1, %r2"; [0x000f_00f0u32, 0x7f00_7d00, 0xbe00_be00u32] => 0x3de0_3de0u32,
        [0x00ff_007fu32, 0x7f00_7f00, 0xc000_c000u32] => 0x3ffe_bc80u32);
    check!("fma.rn.bf16 %s, %h0, %h1, %h2"; [0x3f80, 0x3f81, 0x3b80] => 0x3f82, // 1 + 2^-7 + 2^-8: a tie, to even
        [0x3f80, 0x3f80, 0x0001] => 0x3f80);
    check!("add.rn.bf16x2 %w, %r0, %r1"; [0x3f80_4000u32, 0x3f80_3f80u32] => 0x4000_4040u32);
    check!("sub.rn.bf16x2 %w, %r0, %r1"; [0x4000_4040u32, 0x3f80_3f80u32] => 0x3f80_4000u32);
    check!("mul.rn.bf16x2 %w, %r0, %r1"; [0x4000_4040u32, 0x4000_4000u32] => 0x4080_40c0u32);
    check!("max.bf16x2 %w, %r0, %r1"; [0x4000_7fc0u32, 0x4040_3f80u32] => 0x4040_3f80u32);
    check!("min.bf16x2 %w, %r0, %r1"; [0x4000_7fc0u32, 0x4040_3f80u32] => 0x4000_3f80u32);
}
