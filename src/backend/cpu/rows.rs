//! Loops over the elements of rows, in plain Rust that is compiled once for each level ([`each_level`]). The compiler
//! turns operations on neighbouring elements into vector instructions. Rust neither reorders nor fuses floating-point
//! operations, so every level computes the same bits.

use super::{
    level::Level,
    simd::{Line, each_level},
};
use crate::{files::format::e4m3, ops::Act};

/// `exp(x)` to 2 units in the last place, 0 below -87.3 and infinite above 88.3: `2^n` times a polynomial of the rest (Cephes, Moshier
/// 1989).
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: a sum with it has no place for fractions
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let f = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = p * f + c;
    }
    let y = p * f * f + f + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    let y = if x < -87.3 { 0.0 } else { y * power };
    if x > 88.3 { f32::INFINITY } else { y }
}

/// The sum of 16 lanes by the tree of `simd/lanes.rs`.
#[inline(always)]
pub fn tree(mut s: [f32; 16]) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            s[i] += s[i + half];
        }
    }
    s[0]
}

/// The sum of `f(x)`: element `i` in lane `i % 16`, then the tree.
#[inline(always)]
pub(super) fn sum<T: Copy>(x: &[T], f: impl Fn(T) -> f32) -> f32 {
    let mut lanes = [0f32; 16];
    let (chunks, rest) = x.as_chunks::<16>();
    for x in chunks {
        for (lane, x) in lanes.iter_mut().zip(x) {
            *lane += f(*x);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += f(*x);
    }
    tree(lanes)
}

/// The largest number; NaN is skipped.
#[inline(always)]
fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (chunks, rest) = x.as_chunks::<16>();
    let larger = |lane: &mut f32, x: &f32| *lane = if *x > *lane { *x } else { *lane };
    for x in chunks {
        lanes.iter_mut().zip(x).for_each(|(lane, x)| larger(lane, x));
    }
    lanes.iter_mut().zip(rest).for_each(|(lane, x)| larger(lane, x));
    lanes.into_iter().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a })
}

/// A bf16 activation below 2^-49 is 0, see `Dot` in `simd/lanes.rs`.
#[inline(always)]
fn cut<A: Act>(x: A) -> f32 {
    let x = x.to_f32();
    if size_of::<A>() == 2 && x.to_bits() & 0x7fff_ffff < (127 - 49) << 23 { 0.0 } else { x }
}

/// Prepares a row for [`super::simd::Product`].
pub fn prepare<A: Act>(level: Level, x: &[A], to: &mut [Line]) {
    if level == Level::Avx512Bf16 {
        let to: &mut [u16] = bytemuck::cast_slice_mut(to);
        as_bf16(level, bytemuck::cast_slice(x), &mut to[..x.len()]);
        to[x.len()..].fill(0);
    } else {
        in_pairs(level, x, bytemuck::cast_slice_mut(to));
    }
}

each_level! {
    /// bf16 that count.
    pub fn as_bf16<>(x: &[u16], to: &mut [u16]) {
        for (to, x) in to.iter_mut().zip(x) {
            *to = if x & 0x7fff < (127 - 49) << 7 { 0 } else { *x };
        }
    }
}

each_level! {
    /// The even elements of each 32 values, then the odd ones.
    pub fn in_pairs<A: Act>(x: &[A], to: &mut [f32]) {
        let (chunks, rest) = x.as_chunks::<32>();
        let (to, last) = to.split_at_mut(32 * chunks.len());
        for (x, to) in chunks.iter().zip(to.as_chunks_mut::<32>().0) {
            for l in 0..16 {
                to[l] = cut(x[2 * l]);
                to[16 + l] = cut(x[2 * l + 1]);
            }
        }
        last.fill(0.0);
        for (i, x) in rest.iter().enumerate() {
            last[i % 2 * 16 + i / 2] = cut(*x);
        }
    }
}

each_level! {
    /// Keys or values of a cache of fp8, a row for each scale.
    pub fn from_fp8<A: Act>(codes: &[u8], scales: &[u8], out: &mut [A]) {
        let d = out.len() / scales.len();
        for (out, (codes, scale)) in out.chunks_exact_mut(d).zip(codes.chunks_exact(d).zip(scales)) {
            e4m3::read_row(codes, *scale, out);
        }
    }
}

each_level! {
    /// `out = y`, rounded.
    pub fn store<A: Act>(out: &mut [A], y: &[f32]) {
        for (out, y) in out.iter_mut().zip(y) {
            *out = A::from_f32(*y);
        }
    }
}

each_level! {
    /// `out += y`, rounded.
    pub fn add<A: Act>(out: &mut [A], y: &[f32]) {
        for (out, y) in out.iter_mut().zip(y) {
            *out = A::from_f32(out.to_f32() + y);
        }
    }
}

each_level! {
    /// A row of [`crate::ops::RmsNorm`].
    pub fn norm<A: Act, W: Act>(out: &mut [A], x: &[A], w: &[W], eps: f32) {
        let mean = sum(x, |x| x.to_f32() * x.to_f32()) / x.len() as f32;
        let scale = 1.0 / (mean + eps).sqrt();
        for ((out, x), w) in out.iter_mut().zip(x).zip(w) {
            *out = A::from_f32(x.to_f32() * scale * w.to_f32());
        }
    }
}

each_level! {
    /// A head of [`crate::ops::HeadNorm`].
    pub fn norm_in_place<A: Act>(x: &mut [A], w: &[f32], eps: f32) {
        let mean = sum(x, |x| x.to_f32() * x.to_f32()) / x.len() as f32;
        let scale = 1.0 / (mean + eps).sqrt();
        for (x, w) in x.iter_mut().zip(w) {
            *x = A::from_f32(x.to_f32() * scale * w);
        }
    }
}

each_level! {
    /// `y += bias`
    pub fn add_bias<>(y: &mut [f32], bias: &[f32]) {
        for (y, bias) in y.iter_mut().zip(bias) {
            *y += bias;
        }
    }
}

each_level! {
    /// A row of [`crate::ops::Swiglu`].
    pub fn swiglu<A: Act>(hb: &mut [A], gate_up: &[A]) {
        let (gate, up) = gate_up.split_at(hb.len());
        for ((hb, g), u) in hb.iter_mut().zip(gate).zip(up) {
            let g = g.to_f32();
            *hb = A::from_f32(g / (1.0 + exp(-g)) * u.to_f32());
        }
    }
}

each_level! {
    /// A head of [`crate::ops::Rope`] by a row of its table.
    pub fn rotate<A: Act>(head: &mut [A], table: &[f32]) {
        let half = head.len() / 2;
        let ((a, b), (cos, sin)) = (head.split_at_mut(half), table.split_at(half));
        for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
            let (x, y) = (a.to_f32(), b.to_f32());
            *a = A::from_f32(x * cos - y * sin);
            *b = A::from_f32(y * cos + x * sin);
        }
    }
}

each_level! {
    /// `s = exp(scale s - m)`, where `m` is the largest `scale s`. Returns `m` and the sum of the new `s`.
    pub fn softmax<>(s: &mut [f32], scale: f32) -> (f32, f32) {
        let m = max(s) * scale;
        for s in s.iter_mut() {
            *s = exp(*s * scale - m);
        }
        (m, sum(s, |s| s))
    }
}

each_level! {
    /// `to = a to + b from`
    pub fn mix<>(to: &mut [f32], a: f32, from: &[f32], b: f32) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = *to * a + from * b;
        }
    }
}

each_level! {
    /// `out = x / sum`, rounded.
    pub fn divide<A: Act>(out: &mut [A], x: &[f32], sum: f32) {
        for (out, x) in out.iter_mut().zip(x) {
            *out = A::from_f32(x / sum);
        }
    }
}

each_level! {
    /// `e^x`.
    pub fn exp_of<>(x: f32) -> f32 {
        exp(x)
    }
}

each_level! {
    /// The largest number; NaN is skipped.
    pub fn max_of<>(x: &[f32]) -> f32 {
        max(x)
    }
}

each_level! {
    /// The sum of `exp(x - max)`; 1024 at a time in f32, these in f64.
    pub fn sum_exp<>(x: &[f32], max: f32) -> f64 {
        x.chunks(1024).map(|x| f64::from(sum(x, |x| exp(x - max)))).sum()
    }
}
