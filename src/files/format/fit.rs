//! Fits the scale of quantized codes by least squares. Several scales are tried around the one that maps the largest
//! value to the last code. The codes that fit best are kept, with the scale that fits these codes best:
//! `d = sum(w x q) / sum(w q q)`, where `w` says how much the square of each value's error counts.

/// Values that are added side by side, so that the compiler can use vectors. A sum has this many partial sums, always
/// added in the same order.
const LANES: usize = 16;
/// The scales that are tried, as fractions of the one for the largest value. Below 1 the largest values are cut off,
/// which pays where few are that large.
const FIRST: f32 = 0.65;
const STEP: f32 = 0.025;
const STEPS: usize = 19;

/// The nearest whole number, ties to even, of a number below 2^22. It lets an addition do the rounding, which every CPU
/// has for vectors.
pub(super) fn nearest(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23
    (x + MAGIC) - MAGIC
}

/// `sum(w (x - back)^2)`
pub(super) fn error(x: &[f32], w: &[f32], back: impl Iterator<Item = f32>) -> f64 {
    x.iter().zip(w).zip(back).map(|((x, w), back)| f64::from(*w) * f64::from(x - back).powi(2)).sum()
}

/// `sum(w x q)` and `sum(w q q)` of the codes that `code` gives.
fn sums(x: &[f32], w: &[f32], code: impl Fn(f32) -> f32) -> (f32, f32) {
    let (mut xq, mut qq) = ([0f32; LANES], [0f32; LANES]);
    let mut add = |x: &[f32], w: &[f32]| {
        for (((x, w), xq), qq) in x.iter().zip(w).zip(&mut xq).zip(&mut qq) {
            let q = code(*x);
            *xq += w * x * q;
            *qq += w * q * q;
        }
    };
    let ((whole, rest), (whole_w, rest_w)) = (x.as_chunks::<LANES>(), w.as_chunks::<LANES>());
    whole.iter().zip(whole_w).for_each(|(x, w)| add(x, w));
    add(rest, rest_w);
    (xq.iter().sum(), qq.iter().sum())
}

/// The scale `d` with which codes from `low` to `high` come nearest to `x`, as `d q`; 0 when all of `x` is 0. `low` is
/// negative. The square of an error counts `w` times, here and below.
pub(super) fn symmetric(x: &[f32], w: &[f32], low: f32, high: f32) -> f32 {
    // the largest value gets the code with the larger magnitude, whatever its sign
    let last = if -low >= high { low } else { high };
    best(x, w, last, |x, inverse| nearest(x * inverse).clamp(low, high))
}

/// As [`symmetric`], for codes that `code(x, 1 / d)` gives, of which `last` has the largest magnitude.
pub(super) fn best(x: &[f32], w: &[f32], last: f32, code: impl Fn(f32, f32) -> f32) -> f32 {
    let largest = x.iter().fold(0f32, |m, x| if x.abs() > m.abs() { *x } else { m });
    if largest.abs() < f32::MIN_POSITIVE {
        return 0.0;
    }
    let (mut gain, mut scale) = (0f32, largest / last);
    for step in 0..STEPS {
        let inverse = last / (largest * (FIRST + STEP * step as f32));
        let (xq, qq) = sums(x, w, |x| code(x, inverse));
        // How much of the sum of squares these codes explain, with the scale that fits them best.
        if xq * xq > gain * qq {
            (gain, scale) = (xq * xq / qq, xq / qq);
        }
    }
    scale
}

/// The scale and the offset with which codes from 0 to `high` come nearest to `x`, as `scale q - offset`; neither is
/// negative.
pub(super) fn affine(x: &[f32], w: &[f32], high: f32) -> (f32, f32) {
    let min = x.iter().fold(0f32, |m, x| m.min(*x));
    let max = x.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
    let range = max - min;
    if range < f32::MIN_POSITIVE {
        return (0.0, -min);
    }
    let n: f32 = w.iter().sum();
    let error = |scale: f32, offset: f32, inverse: f32| -> f32 {
        let code = |x: f32| nearest((x - min) * inverse).clamp(0.0, high);
        x.iter().zip(w).map(|(x, w)| w * (scale * code(*x) - offset - x).powi(2)).sum()
    };
    let mut found = (range / high, -min);
    let mut least = error(found.0, found.1, high / range);
    for step in 0..=20 {
        let inverse = (high - 1.0 + 0.1 * step as f32) / range;
        let (mut q1, mut q2, mut x1, mut xq) = (0f32, 0f32, 0f32, 0f32);
        for (x, w) in x.iter().zip(w) {
            let q = nearest((x - min) * inverse).clamp(0.0, high);
            (q1, q2, x1, xq) = (q1 + w * q, q2 + w * q * q, x1 + w * x, xq + w * x * q);
        }
        let det = n * q2 - q1 * q1;
        if det <= 0.0 {
            continue;
        }
        let (mut scale, mut offset) = ((n * xq - x1 * q1) / det, (q1 * xq - q2 * x1) / det);
        if offset < 0.0 {
            (scale, offset) = (xq / q2, 0.0);
        }
        let error = error(scale, offset, inverse);
        if scale > 0.0 && error < least {
            (least, found) = (error, (scale, offset));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers from -1 to 1.
    fn values(seed: u32, n: usize) -> Vec<f32> {
        let hash = |i: u32| (i + 1).wrapping_mul(2_654_435_761).wrapping_add(seed).wrapping_mul(0x9E37_79B1) >> 8;
        (0..n as u32).map(|i| hash(i) as f32 / (1 << 23) as f32 - 1.0).collect()
    }

    fn error(x: &[f32], w: &[f32], back: impl Fn(f32) -> f32) -> f32 {
        super::error(x, w, x.iter().map(|x| back(*x))) as f32
    }

    /// All alike, or one in eight counting a hundred times as much.
    fn weights(n: usize) -> [Vec<f32>; 2] {
        [vec![1.0; n], (0..n).map(|i| if i % 8 == 3 { 100.0 } else { 1.0 }).collect()]
    }

    #[test]
    fn no_worse_than_the_scale_of_the_largest_value() {
        for (seed, n) in (0..50).flat_map(|seed| [1, 16, 32, 45, 300].map(|n| (seed, n))) {
            let x: Vec<f32> = values(seed, n).iter().map(|x| x * x * x).collect();
            let largest = x.iter().fold(0f32, |m, x| if x.abs() > m.abs() { *x } else { m });
            let min = x.iter().fold(0f32, |m, x| m.min(*x));
            let max = x.iter().fold(min, |m, x| m.max(*x));
            for w in &weights(n) {
                let most = w.iter().fold(0f32, |m, w| m.max(*w)); // an error counts so often
                let round = |d: f32| error(&x, w, |x| d * nearest(x / d).clamp(-8.0, 7.0));
                let (found, plain) = (symmetric(&x, w, -8.0, 7.0), largest / -8.0);
                let (found, plain) = (round(found), round(plain));
                assert!(found <= plain * 1.0001 + 1e-12 * most, "{seed}, {n}: {found} {plain}");
                let (scale, offset) = affine(&x, w, 15.0);
                assert!(scale >= 0.0 && offset >= 0.0, "{scale}, {offset}");
                let fit = |scale: f32, offset: f32| {
                    error(&x, w, |x| scale * nearest((x + offset) / scale).clamp(0.0, 15.0) - offset)
                };
                let plain = fit((max - min) / 15.0, -min);
                assert!(scale == 0.0 || fit(scale, offset) <= plain * 1.001 + 1e-9 * most, "{seed}, {n}");
            }
        }
    }

    /// Over many values, those that count more come nearer, and the weighted error becomes less.
    #[test]
    fn what_counts_more_comes_nearer() {
        let [ones, heavy] = weights(32);
        let is_heavy: Vec<f32> = heavy.iter().map(|w| f32::from(u8::from(*w > 1.0))).collect();
        let mut state = 3u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let samples: Vec<[f32; 32]> = (0..200).map(|_| std::array::from_fn(|_| next() + next())).collect();
        let sums = |w: &[f32], of: &[f32]| -> (f32, f32) {
            let one = |x: &[f32; 32]| {
                let x = &x[..];
                let d = symmetric(x, w, -8.0, 7.0);
                let (scale, offset) = affine(x, w, 15.0);
                (
                    error(x, of, |x| d * nearest(x / d).clamp(-8.0, 7.0)),
                    error(x, of, |x| scale * nearest((x + offset) / scale).clamp(0.0, 15.0) - offset),
                )
            };
            samples.iter().map(one).fold((0.0, 0.0), |sum, e| (sum.0 + e.0, sum.1 + e.1))
        };
        for of in [&is_heavy, &heavy] {
            let (with, without) = (sums(&heavy, of), sums(&ones, of));
            assert!(with.0 < 0.9 * without.0 && with.1 < 0.9 * without.1, "{with:?} {without:?}");
        }
    }

    #[test]
    fn codes_that_fit_are_found() {
        let (x, w) = ((-8..8).map(|q| 0.25 * q as f32).collect::<Vec<_>>(), [1.0; 32]);
        assert_eq!(symmetric(&x, &w, -8.0, 7.0), 0.25);
        let (scale, offset) = affine(&(0..16).map(|q| 0.5 * q as f32 - 2.0).collect::<Vec<_>>(), &w[..16], 15.0);
        assert!((scale - 0.5).abs() < 1e-6 && (offset - 2.0).abs() < 1e-5, "{scale}, {offset}");
        assert_eq!((symmetric(&[0.0; 32], &w, -8.0, 7.0), affine(&[0.0; 32], &w, 15.0)), (0.0, (0.0, 0.0)));
        assert_eq!(affine(&[-3.0; 32], &w, 15.0).0 * 0.0, 0.0);
        // nothing counts: the scale of the largest value
        assert_eq!(symmetric(&x, &[0.0; 16], -8.0, 7.0), 0.25);
    }

    #[test]
    fn whole_numbers() {
        for (x, want) in [(0.5, 0.0), (1.5, 2.0), (-0.5, 0.0), (-1.5, -2.0), (2.4, 2.0), (-2.6, -3.0), (4e5, 4e5)] {
            assert_eq!(nearest(x), want, "{x}");
        }
    }
}
