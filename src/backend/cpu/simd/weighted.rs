//! `o[q] += sum_t p[q, t] v[t]`, in the order of `t`, each with one rounding: the values of attention by their weights.
//!
//! registers: 16 or 64 columns of up to 4 rows of `o`, so a value is read once for them.
//! masked:    a row takes the values that it sees, which lie side by side, and no other, not even by a weight of 0: that times an infinite value is NaN.

use super::{
    Elements, Kernel, Level,
    lanes::{Dot, Lanes},
};
use std::ops::Range;

/// One block of weighted values.
pub struct Weighted<'a> {
    /// [rows, p_stride], of which `seen(row)` of each row count.
    pub p: &'a [f32],
    pub p_stride: usize,
    pub rows: usize,
    /// [n, d]
    pub v: Elements<'a>,
    pub d: usize,
    /// Values that a row sees, of `n`.
    pub seen: &'a dyn Fn(usize) -> Range<usize>,
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

impl Kernel for Weighted<'_> {
    #[inline(always)]
    unsafe fn run<D: Dot>(self) {
        // SAFETY: the contract of the trait. Where there are 32 registers, 64 columns of 4 rows fit.
        unsafe {
            match (self.v, D::COLS) {
                (Elements::Bf16(v), 4) => self.all::<D::Acc, u16, 4>(bytemuck::cast_slice(v)),
                (Elements::F32(v), 4) => self.all::<D::Acc, f32, 4>(v),
                (Elements::Bf16(v), _) => self.all::<D::Acc, u16, 1>(bytemuck::cast_slice(v)),
                (Elements::F32(v), _) => self.all::<D::Acc, f32, 1>(v),
            }
        }
    }
}

impl Weighted<'_> {
    /// Computes it.
    ///
    /// # Panics
    /// If a slice is too short.
    pub fn run(self, level: Level) {
        super::run(level, self);
    }

    /// # Safety
    /// The CPU has the instructions of `L`.
    #[inline(always)]
    unsafe fn all<L: Lanes, V: Value, const COLS: usize>(self, v: &[V]) {
        let Weighted { p, p_stride, rows, d, seen, o, o_stride, .. } = self;
        assert!(d > 0 && o_stride >= d.next_multiple_of(16) && o.len() >= rows * o_stride, "o is too short");
        let values = |q: usize| {
            let seen = seen(q);
            assert!(p.len() >= q * p_stride + seen.end && v.len() >= seen.end * d, "p or v is too short");
            seen
        };
        for first in (0..rows).step_by(4) {
            let height = (rows - first).min(4);
            // what all of them see, together; where two have nothing in common, each its own
            let (mut from, mut to, mut end) = (0, usize::MAX, 0);
            for q in first..first + height {
                let seen = values(q);
                (from, to, end) = (seen.start.max(from), seen.end.min(to), seen.end.max(end));
            }
            if from >= to {
                (from, to) = (end, end);
            }
            // SAFETY: the asserts: each row has its weights, values and room for whole 16 sums.
            unsafe {
                let (p, o) = (p.as_ptr().add(first * p_stride), o.as_mut_ptr().add(first * o_stride));
                for q in 0..height {
                    let (p, o, seen) = (p.add(q * p_stride), o.add(q * o_stride), values(first + q));
                    if seen.start < from {
                        let to = from.min(seen.end);
                        columns::<L, V, 1, COLS>(p, p_stride, v.as_ptr(), seen.start, to, d, o, o_stride);
                    }
                }
                match height {
                    1 => columns::<L, V, 1, COLS>(p, p_stride, v.as_ptr(), from, to, d, o, o_stride),
                    2 => columns::<L, V, 2, COLS>(p, p_stride, v.as_ptr(), from, to, d, o, o_stride),
                    3 => columns::<L, V, 3, COLS>(p, p_stride, v.as_ptr(), from, to, d, o, o_stride),
                    _ => columns::<L, V, 4, COLS>(p, p_stride, v.as_ptr(), from, to, d, o, o_stride),
                }
                for q in 0..height {
                    let (p, o, seen) = (p.add(q * p_stride), o.add(q * o_stride), values(first + q));
                    if seen.end > to {
                        columns::<L, V, 1, COLS>(p, p_stride, v.as_ptr(), to, seen.end, d, o, o_stride);
                    }
                }
            }
        }
    }
}

/// The values `from..to`, `COLS` times 16 columns at a time and the rest 16.
///
/// # Safety
/// `Q` rows of weights, `to` values and `Q` rows of sums are there.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "pointers and their sizes")]
unsafe fn columns<L: Lanes, V: Value, const Q: usize, const COLS: usize>(
    p: *const f32,
    p_stride: usize,
    v: *const V,
    from: usize,
    to: usize,
    d: usize,
    o: *mut f32,
    o_stride: usize,
) {
    let mut j = 0;
    while j < d {
        // SAFETY: the contract of this function; column j is one of `d`.
        unsafe {
            if d - j >= 16 * COLS {
                strip::<L, V, Q, COLS>(p, p_stride, v.add(j), from, to, d, 16 * COLS, o.add(j), o_stride);
                j += 16 * COLS;
            } else {
                strip::<L, V, Q, 1>(p, p_stride, v.add(j), from, to, d, (d - j).min(16), o.add(j), o_stride);
                j += 16;
            }
        }
    }
}

/// # Safety
/// As [`columns`], for `width` columns: whole 16, or up to 16.
#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "pointers and their sizes")]
#[expect(clippy::needless_range_loop, reason = "no closures: see dot.rs")]
unsafe fn strip<L: Lanes, V: Value, const Q: usize, const COLS: usize>(
    p: *const f32,
    p_stride: usize,
    v: *const V,
    from: usize,
    to: usize,
    d: usize,
    width: usize,
    o: *mut f32,
    o_stride: usize,
) {
    // SAFETY: the contract of this function; where there are less than 16 columns, they are copied to where there are 16.
    unsafe {
        let mut acc = [[L::splat(0.0); COLS]; Q];
        for q in 0..Q {
            for c in 0..COLS {
                acc[q][c] = L::load(o.add(q * o_stride + 16 * c));
            }
        }
        let mut part = [V::default(); 16];
        for t in from..to {
            let mut at = v.add(t * d);
            if width < 16 {
                std::ptr::copy_nonoverlapping(at, part.as_mut_ptr(), width);
                at = part.as_ptr();
            }
            let mut value = [L::splat(0.0); COLS];
            for c in 0..COLS {
                value[c] = V::lanes(at.add(16 * c));
            }
            for q in 0..Q {
                let p = L::splat(*p.add(q * p_stride + t));
                for c in 0..COLS {
                    acc[q][c] = acc[q][c].fma(p, value[c]);
                }
            }
        }
        for q in 0..Q {
            for c in 0..COLS {
                acc[q][c].store(o.add(q * o_stride + 16 * c));
            }
        }
    }
}
