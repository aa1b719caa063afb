//! Loops over rows for the ops of training, as [`super::rows`] has them for the others.

use super::{
    level::Level,
    rows::{exp, sum},
    simd::each_level,
};
use crate::ops::{
    Act,
    train::{Dropout, Factors},
};

each_level! {
    /// A row of [`crate::ops::train::RmsNormBwd`].
    pub fn norm_bwd<A: Act, W: Act>(dx: &mut [A], dy: &[A], x: &[A], w: &[W], eps: f32, add: bool) {
        let n = x.len() as f32;
        let s = 1.0 / (sum(x, |x| x.to_f32() * x.to_f32()) / n + eps).sqrt();
        let mut lanes = [0f32; 16];
        for (i, ((dy, x), w)) in dy.iter().zip(x).zip(w).enumerate() {
            lanes[i % 16] += dy.to_f32() * w.to_f32() * x.to_f32();
        }
        let mean = s * s * sum(&lanes, |x| x) / n;
        for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(w) {
            let own = s * (dy.to_f32() * w.to_f32() - x.to_f32() * mean);
            *dx = A::from_f32(if add { dx.to_f32() + own } else { own });
        }
    }
}

each_level! {
    /// A row of [`crate::ops::train::SwigluBwd`].
    pub fn swiglu_bwd<A: Act>(d: &mut [A], dh: &[A], gate_up: &[A]) {
        let ((gate, up), (dg, du)) = (gate_up.split_at(dh.len()), d.split_at_mut(dh.len()));
        for ((((dg, du), dh), g), u) in dg.iter_mut().zip(du).zip(dh).zip(gate).zip(up) {
            let (dh, g, u) = (dh.to_f32(), g.to_f32(), u.to_f32());
            let s = 1.0 / (1.0 + exp(-g));
            *dg = A::from_f32(dh * u * s * (1.0 + g * (1.0 - s)));
            *du = A::from_f32(dh * g * s);
        }
    }
}

each_level! {
    /// `out = x`, in f32.
    pub fn widen<A: Act>(out: &mut [f32], x: &[A]) {
        for (out, x) in out.iter_mut().zip(x) {
            *out = x.to_f32();
        }
    }
}

each_level! {
    /// `out += scale y`, rounded.
    pub fn add_scaled<A: Act>(out: &mut [A], y: &[f32], scale: f32) {
        for (out, y) in out.iter_mut().zip(y) {
            *out = A::from_f32(out.to_f32() + scale * y);
        }
    }
}

each_level! {
    /// `x *= scale`
    pub fn scale<>(x: &mut [f32], scale: f32) {
        x.iter_mut().for_each(|x| *x *= scale);
    }
}

/// `x` times what [`Dropout::factor`] gives its elements, of which the first is element `first`.
pub fn drop(level: Level, x: &mut [f32], dropout: Dropout, first: usize) {
    if dropout.p > 0.0 {
        masked(level, x, dropout, first);
    }
}

each_level! {
    /// 16 draws of four words at a time.
    pub fn masked<>(x: &mut [f32], dropout: Dropout, first: usize) {
        let (threshold, scale) = (dropout.threshold(), dropout.scale());
        let (mut counter, mut skip) = ((first / 4) as u32, first % 4);
        let mut rest = x;
        while !rest.is_empty() {
            let [mut c0, mut c1, mut c2, mut c3] = [[0u32; 16], [0; 16], [dropout.step; 16], [dropout.site; 16]];
            for (i, c) in c0.iter_mut().enumerate() {
                *c = counter.wrapping_add(i as u32);
            }
            let (mut k0, mut k1) = (dropout.seed as u32, (dropout.seed >> 32) as u32);
            for _ in 0..10 {
                for i in 0..16 {
                    let (a, b) = (u64::from(c0[i]) * 0xD251_1F53, u64::from(c2[i]) * 0xCD9E_8D57);
                    c0[i] = (b >> 32) as u32 ^ c1[i] ^ k0;
                    c1[i] = b as u32;
                    c2[i] = (a >> 32) as u32 ^ c3[i] ^ k1;
                    c3[i] = a as u32;
                }
                (k0, k1) = (k0.wrapping_add(0x9E37_79B9), k1.wrapping_add(0xBB67_AE85));
            }
            let mut factors = [0f32; 64];
            for i in 0..16 {
                for (w, c) in [c0[i], c1[i], c2[i], c3[i]].into_iter().enumerate() {
                    factors[4 * i + w] = if c >= threshold { scale } else { 0.0 };
                }
            }
            let n = rest.len().min(64 - skip);
            let (now, later) = rest.split_at_mut(n);
            now.iter_mut().zip(&factors[skip..]).for_each(|(x, f)| *x *= f);
            (rest, skip, counter) = (later, 0, counter.wrapping_add(16));
        }
    }
}

each_level! {
    /// `x = scale exp(a x - m)`
    pub fn exp_scaled<>(x: &mut [f32], a: f32, m: f32, scale: f32) {
        for x in x.iter_mut() {
            *x = scale * exp(a * *x - m);
        }
    }
}

each_level! {
    /// `ds = p (ds - delta) scale`
    pub fn softmax_bwd<>(ds: &mut [f32], p: &[f32], delta: f32, scale: f32) {
        for (ds, p) in ds.iter_mut().zip(p) {
            *ds = p * (*ds - delta) * scale;
        }
    }
}

each_level! {
    /// `sum(a b)`
    pub fn dot<>(a: &[f32], b: &[f32]) -> f32 {
        let mut lanes = [0f32; 16];
        for (i, (a, b)) in a.iter().zip(b).enumerate() {
            lanes[i % 16] += a * b;
        }
        sum(&lanes, |x| x)
    }
}

each_level! {
    /// Part of a step of [`crate::ops::train::AdamW`], with the gradient times `clip`.
    pub fn adamw<>(w: &mut [f32], m: &mut [f32], v: &mut [f32], grads: &mut [f32], clip: f32, f: Factors) {
        for (((w, m), v), g) in w.iter_mut().zip(m).zip(v).zip(grads) {
            let grad = *g * clip;
            *m += f.mix1 * (grad - *m);
            *v = f.beta2 * *v + f.mix2 * grad * grad;
            *w = *w * f.keep - f.rate * *m / ((*v).sqrt() / f.root + f.eps);
            *g = 0.0;
        }
    }
}
