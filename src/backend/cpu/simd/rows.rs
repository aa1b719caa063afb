//! Loops over the elements of rows, as plain Rust that is compiled once for each level: what does the same to neighbouring elements
//! becomes vectors. Rust neither reorders nor fuses floating-point operations, so every level computes the same bits.

use super::{Level, Line, Weights, lanes::Lanes};
use crate::ops::Act;

/// A function whose body is compiled once for each level, and the choice between them.
macro_rules! each_level {
    ($(#[$doc:meta])* pub fn $name:ident<$($g:ident: $bound:ident),*>($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$doc])*
        pub fn $name<$($g: $bound),*>(level: Level, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body<$($g: $bound),*>($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                fn avx2<$($g: $bound),*>($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }
                #[target_feature(enable = "avx512f,avx512bw")]
                fn avx512<$($g: $bound),*>($($arg: $ty),*) $(-> $ret)? {
                    body($($arg),*)
                }
                match level {
                    Level::Portable => {}
                    // SAFETY: a level is only made where the CPU has its instructions.
                    Level::Avx2 => return unsafe { avx2($($arg),*) },
                    // SAFETY: the same.
                    Level::Avx512 | Level::Avx512Bf16 => return unsafe { avx512($($arg),*) },
                }
            }
            let _ = level;
            body($($arg),*)
        }
    };
}

/// `exp(x)` to 2 units in the last place, 0 below -87.3 and infinite above 88.3: `2^n` times a polynomial of the rest (Cephes, Moshier
/// 1989).
#[inline(always)]
fn exp(x: f32) -> f32 {
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

/// The sum of 16 lanes by the tree of [`super::lanes`].
#[inline(always)]
fn tree(mut s: [f32; 16]) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            s[i] += s[i + half];
        }
    }
    s[0]
}

/// The sum of `f(x)`: element `i` in lane `i % 16`, then the tree.
#[inline(always)]
fn sum<T: Copy>(x: &[T], f: impl Fn(T) -> f32) -> f32 {
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

/// The largest; NaN is none.
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

/// A bf16 activation below 2^-49 is 0, for [`super::lanes::Dot`].
#[inline(always)]
fn cut<A: Act>(x: A) -> f32 {
    let x = x.to_f32();
    if size_of::<A>() == 2 && x.to_bits() & 0x7fff_ffff < (127 - 49) << 23 { 0.0 } else { x }
}

/// Prepares a row for [`super::Product`].
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
    /// Of each 32 values the even ones, then the odd ones.
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
    /// `s = exp(scale s - m)`, where `m` is the largest `scale s`; the sum of it. `(m, sum)`.
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
    /// The largest; NaN is none.
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

/// `o[q] += sum_t p[q, t] v[t]`, in the order of `t`, each with one rounding: the values of attention by their weights.
///
/// registers: 16 columns of up to 8 rows of `o`, so a value is read once for them.
pub struct Weighted<'a> {
    /// [rows, p_stride], of which the first `n` of each row count.
    pub p: &'a [f32],
    pub p_stride: usize,
    pub rows: usize,
    /// [n, d]
    pub v: Weights<'a>,
    pub n: usize,
    pub d: usize,
    /// [rows, o_stride], whose rows have room for whole 16.
    pub o: &'a mut [f32],
    pub o_stride: usize,
}

/// An element of a value.
trait Value: Copy + Default {
    /// # Safety
    /// 16 are at `p`.
    unsafe fn lanes<L: Lanes>(p: *const Self) -> L;
}
impl Value for u16 {
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(p: *const u16) -> L {
        // SAFETY: the contract of the trait.
        unsafe { L::widen(p) }
    }
}
impl Value for f32 {
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(p: *const f32) -> L {
        // SAFETY: the contract of the trait.
        unsafe { L::load(p) }
    }
}

impl Weighted<'_> {
    /// Computes it.
    ///
    /// # Panics
    /// If a slice is too short.
    pub fn run(self, level: Level) {
        if self.rows == 0 || self.n == 0 {
            return;
        }
        let last = self.rows - 1;
        assert!(
            self.p.len() >= last * self.p_stride + self.n && self.v.len() >= self.n * self.d,
            "p or v is too short"
        );
        assert!(
            self.o_stride >= self.d.next_multiple_of(16) && self.o.len() >= self.rows * self.o_stride,
            "o is too short"
        );
        match self.v {
            Weights::Bf16(v) => self.of(level, v),
            Weights::F32(v) => self.of(level, v),
        }
    }

    fn of<V: Value>(self, level: Level, v: &[V]) {
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx2,fma")]
            fn avx2<V: Value>(w: Weighted<'_>, v: &[V]) {
                // SAFETY: `run` asserted the sizes; the caller has the instructions.
                unsafe { w.all::<super::avx2::Avx2, V, 4>(v) }
            }
            #[target_feature(enable = "avx512f,avx512bw")]
            fn avx512<V: Value>(w: Weighted<'_>, v: &[V]) {
                // SAFETY: the same.
                unsafe { w.all::<std::arch::x86_64::__m512, V, 8>(v) }
            }
            match level {
                Level::Portable => {}
                // SAFETY: a level is only made where the CPU has its instructions.
                Level::Avx2 => return unsafe { avx2(self, v) },
                // SAFETY: the same.
                Level::Avx512 | Level::Avx512Bf16 => return unsafe { avx512(self, v) },
            }
        }
        let _ = level;
        // SAFETY: `run` asserted the sizes.
        unsafe { self.all::<[f32; 16], V, 4>(v) }
    }

    /// # Safety
    /// The sizes are as `run` asserts, and the CPU has the instructions of `L`.
    #[inline(always)]
    unsafe fn all<L: Lanes, V: Value, const ROWS: usize>(self, v: &[V]) {
        let Weighted { p, p_stride, rows, n, d, o, o_stride, .. } = self;
        for q in (0..rows).step_by(ROWS) {
            for j in (0..d).step_by(16) {
                // SAFETY: rows q.. and columns j.. are within the sizes; a row of o has room for whole 16.
                unsafe {
                    let (p, v, o) =
                        (p.as_ptr().add(q * p_stride), v.as_ptr().add(j), o.as_mut_ptr().add(q * o_stride + j));
                    let width = (d - j).min(16);
                    match (rows - q).min(ROWS) {
                        1 => strip::<L, V, 1>(p, p_stride, v, n, d, width, o, o_stride),
                        2 => strip::<L, V, 2>(p, p_stride, v, n, d, width, o, o_stride),
                        3 => strip::<L, V, 3>(p, p_stride, v, n, d, width, o, o_stride),
                        4 => strip::<L, V, 4>(p, p_stride, v, n, d, width, o, o_stride),
                        5 => strip::<L, V, 5>(p, p_stride, v, n, d, width, o, o_stride),
                        6 => strip::<L, V, 6>(p, p_stride, v, n, d, width, o, o_stride),
                        7 => strip::<L, V, 7>(p, p_stride, v, n, d, width, o, o_stride),
                        _ => strip::<L, V, 8>(p, p_stride, v, n, d, width, o, o_stride),
                    }
                }
            }
        }
    }
}

/// # Safety
/// `Q` rows of `n` weights, `n` values of `width` columns and `Q` rows of 16 sums are there.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "pointers and their sizes")]
#[expect(clippy::needless_range_loop, reason = "no closures: see dot.rs")]
unsafe fn strip<L: Lanes, V: Value, const Q: usize>(
    p: *const f32,
    p_stride: usize,
    v: *const V,
    n: usize,
    d: usize,
    width: usize,
    o: *mut f32,
    o_stride: usize,
) {
    // SAFETY: the contract of this function.
    unsafe {
        let mut acc = [L::splat(0.0); Q];
        for q in 0..Q {
            acc[q] = L::load(o.add(q * o_stride));
        }
        let mut part = [V::default(); 16];
        for t in 0..n {
            let mut from = v.add(t * d);
            if width < 16 {
                std::ptr::copy_nonoverlapping(from, part.as_mut_ptr(), width);
                from = part.as_ptr();
            }
            let value: L = V::lanes(from);
            for q in 0..Q {
                acc[q] = acc[q].fma(L::splat(*p.add(q * p_stride + t)), value);
            }
        }
        for q in 0..Q {
            acc[q].store(o.add(q * o_stride));
        }
    }
}
