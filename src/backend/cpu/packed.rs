//! Attention for training, and its backward pass: one document and key head at a time, whose queries and keys are first
//! collected in f32.
//!
//! [`QUERIES`] rows at a time go over all keys that one of them sees, so the scores never exist as a whole. The sums of
//! a document have the same bits alone and beside others.

use super::{
    Cpu,
    level::Level,
    rows as each,
    simd::{Line, Product, Weighted, lines},
    train_rows as rows,
    weight::Elements,
};
use crate::ops::{Act, train::AttnPacked};
use std::sync::{Mutex, PoisonError};

/// Rows of queries at a time.
const QUERIES: usize = 64;

/// A document and one of its key heads, in f32.
struct Part {
    start: usize,
    len: usize,
    kv_head: usize,
    /// [len, head_dim]
    k: Vec<f32>,
    /// [len, head_dim]
    v: Vec<f32>,
}

/// Gradients of a part: of its query heads [group][len, head_dim], and of keys and values [len, head_dim rounded up].
struct Gradients {
    q: Vec<Vec<f32>>,
    k: Vec<f32>,
    v: Vec<f32>,
}

/// Memory for the scores of a block of queries, and the like.
struct Room {
    x: Vec<Line>,
    packed: Vec<Line>,
    s: Vec<f32>,
    ds: Vec<f32>,
    turned: Vec<f32>,
    o: Vec<f32>,
}

impl<A: Act> Cpu<A> {
    /// Calls `f` for each document and key head, on whatever threads are free; gives the results in order.
    fn parts<T: Send>(
        &self,
        op: &AttnPacked,
        qkv: &[A],
        starts: &[u32],
        f: impl Fn(&Part) -> T + Sync,
    ) -> Vec<(Part, T)> {
        let n = op.documents * op.n_kv_heads;
        let done: Vec<Mutex<Option<(Part, T)>>> = (0..n).map(|_| Mutex::new(None)).collect();
        self.pool.run(n, &|i| {
            let (document, kv_head) = (i / op.n_kv_heads, i % op.n_kv_heads);
            let start = starts[document] as usize;
            let len = starts[document + 1] as usize - start;
            let head = |h| self.head(qkv, op.qkv_dim(), (start, len), h, op.head_dim);
            let (k, v) = (head(op.n_heads + kv_head), head(op.n_heads + op.n_kv_heads + kv_head));
            let part = Part { start, len, kv_head, k, v };
            let result = f(&part);
            *done[i].lock().unwrap_or_else(PoisonError::into_inner) = Some((part, result));
        });
        let result = |m: Mutex<Option<(Part, T)>>| m.into_inner().unwrap_or_else(PoisonError::into_inner);
        done.into_iter().filter_map(result).collect()
    }

    /// One head of some rows, in f32. [len, head_dim]
    fn head(&self, x: &[A], stride: usize, (start, len): (usize, usize), head: usize, d: usize) -> Vec<f32> {
        let mut out = vec![0f32; len * d];
        for (r, out) in out.chunks_exact_mut(d).enumerate() {
            rows::widen(self.level, out, &x[(start + r) * stride + head * d..][..d]);
        }
        out
    }

    /// Sizes were checked.
    pub(super) fn packed(&self, op: &AttnPacked, out: &mut [A], lse: &mut [f32], qkv: &[A], starts: &[u32]) {
        let (d, group, level) = (op.head_dim, op.n_heads / op.n_kv_heads, self.f32s());
        let (width, scale) = (d.next_multiple_of(16), 1.0 / (d as f32).sqrt());
        let parts = self.parts(op, qkv, starts, |part| {
            let mut room = Room::new(level, part.len, d);
            let head = |h: usize| {
                let q = self.head(qkv, op.qkv_dim(), (part.start, part.len), part.kv_head * group + h, d);
                let (mut out, mut lse) = (vec![0f32; part.len * d], vec![0f32; part.len]);
                for first in (0..part.len).step_by(QUERIES) {
                    let n = QUERIES.min(part.len - first);
                    let keys = first + n;
                    room.scores(level, &q[first * d..][..n * d], &part.k[..keys * d], d, false);
                    let mut sums = [0f32; QUERIES];
                    for (i, sum) in sums[..n].iter_mut().enumerate() {
                        let (sees, hidden) = room.s[i * keys..][..keys].split_at_mut(first + i + 1);
                        let (m, s) = each::softmax(level, sees, scale);
                        hidden.fill(0.0);
                        *sum = s;
                        lse[first + i] = m + f64::from(s).ln() as f32;
                    }
                    room.o[..n * width].fill(0.0);
                    let (p, v, o) = (&room.s[..], Elements::F32(&part.v[..keys * d]), &mut room.o[..]);
                    Weighted { p, p_stride: keys, rows: n, v, seen: &|i| 0..first + i + 1, d, o, o_stride: width }
                        .run(level);
                    for (i, sum) in sums[..n].iter().enumerate() {
                        each::divide(level, &mut out[(first + i) * d..][..d], &room.o[i * width..][..d], *sum);
                    }
                }
                (out, lse)
            };
            (0..group).map(head).collect::<Vec<_>>()
        });
        for (part, heads) in parts {
            for (h, (values, sums)) in heads.into_iter().enumerate() {
                let h = part.kv_head * group + h;
                for r in 0..part.len {
                    each::store(level, &mut out[(part.start + r) * op.q_dim() + h * d..][..d], &values[r * d..][..d]);
                    lse[(part.start + r) * op.n_heads + h] = sums[r];
                }
            }
        }
    }

    /// Sizes were checked.
    #[expect(clippy::too_many_arguments, reason = "one argument a buffer, named as in the op")]
    pub(super) fn packed_bwd(
        &self,
        op: &AttnPacked,
        dqkv: &mut [A],
        dout: &[A],
        out: &[A],
        qkv: &[A],
        lse: &[f32],
        starts: &[u32],
    ) {
        let (d, group, level) = (op.head_dim, op.n_heads / op.n_kv_heads, self.f32s());
        let width = d.next_multiple_of(16);
        let parts = self.parts(op, qkv, starts, |part| {
            let mut room = Room::new(level, part.len, d);
            let zeros = vec![0f32; part.len * width];
            let mut to = Gradients { q: Vec::new(), k: zeros.clone(), v: zeros };
            for h in 0..group {
                let (rows, h) = ((part.start, part.len), part.kv_head * group + h);
                let q = self.head(qkv, op.qkv_dim(), rows, h, d);
                let [dout, out] = [dout, out].map(|x| self.head(x, op.q_dim(), rows, h, d));
                let lse: Vec<f32> = (0..part.len).map(|r| lse[(part.start + r) * op.n_heads + h]).collect();
                self.head_bwd(part, &mut room, &mut to, d, &q, &dout, &out, &lse);
            }
            to
        });
        for (part, from) in parts {
            for r in 0..part.len {
                let row = &mut dqkv[(part.start + r) * op.qkv_dim()..][..op.qkv_dim()];
                for (h, q) in from.q.iter().enumerate() {
                    each::store(level, &mut row[(part.kv_head * group + h) * d..][..d], &q[r * d..][..d]);
                }
                for (h, from) in [(op.n_heads, &from.k), (op.n_heads + op.n_kv_heads, &from.v)] {
                    each::store(level, &mut row[(h + part.kv_head) * d..][..d], &from[r * width..][..d]);
                }
            }
        }
    }

    /// One query head: its gradient, and what it adds to those of its key head.
    #[expect(clippy::too_many_arguments, reason = "what a head has")]
    fn head_bwd(
        &self,
        part: &Part,
        room: &mut Room,
        to: &mut Gradients,
        d: usize,
        q: &[f32],
        dout: &[f32],
        out: &[f32],
        lse: &[f32],
    ) {
        let (level, width, scale) = (self.f32s(), d.next_multiple_of(16), 1.0 / (d as f32).sqrt());
        let mut dq = vec![0f32; part.len * d];
        for first in (0..part.len).step_by(QUERIES) {
            let n = QUERIES.min(part.len - first);
            let keys = first + n;
            let (q, dout) = (&q[first * d..][..n * d], &dout[first * d..][..n * d]);
            let (k, v) = (&part.k[..keys * d], &part.v[..keys * d]);
            room.scores(level, q, k, d, false);
            room.scores(level, dout, v, d, true);
            for i in 0..n {
                let (s, ds) = (&mut room.s[i * keys..][..keys], &mut room.ds[i * keys..][..keys]);
                let sees = first + i + 1;
                rows::exp_scaled(level, &mut s[..sees], scale, lse[first + i], 1.0);
                let delta = rows::dot(level, &dout[i * d..][..d], &out[(first + i) * d..][..d]);
                rows::softmax_bwd(level, &mut ds[..sees], &s[..sees], delta, scale);
                s[sees..].fill(0.0);
                ds[sees..].fill(0.0);
            }
            room.o[..n * width].fill(0.0);
            let (p, o) = (&room.ds[..], &mut room.o[..]);
            let (v, seen) = (Elements::F32(k), &|i| 0..first + i + 1);
            Weighted { p, p_stride: keys, rows: n, v, seen, d, o, o_stride: width }.run(level);
            for i in 0..n {
                dq[(first + i) * d..][..d].copy_from_slice(&room.o[i * width..][..d]);
            }
            for (weights, of, o) in [(&room.s, dout, &mut to.v), (&room.ds, q, &mut to.k)] {
                turn(&mut room.turned, weights, n, keys);
                let (p, v) = (&room.turned[..], Elements::F32(of));
                Weighted { p, p_stride: n, rows: keys, v, seen: &|_| 0..n, d, o, o_stride: width }.run(level);
            }
        }
        to.q.push(dq);
    }
}

impl Room {
    fn new(level: Level, len: usize, d: usize) -> Room {
        let (line, width) = (lines(level, d), d.next_multiple_of(16));
        let zeros = |n: usize| vec![0f32; n];
        Room {
            x: vec![Line::default(); QUERIES * line],
            packed: vec![Line::default(); len * line],
            s: zeros(QUERIES * len),
            ds: zeros(QUERIES * len),
            turned: zeros(QUERIES * len),
            o: zeros(QUERIES * width),
        }
    }

    /// `s`, or `ds`, of the products of the rows of `q` with those of `k`, one row after the other.
    fn scores(&mut self, level: Level, q: &[f32], k: &[f32], d: usize, second: bool) {
        let (line, keys) = (lines(level, d), k.len() / d);
        for (q, x) in q.chunks_exact(d).zip(self.x.chunks_exact_mut(line)) {
            each::prepare(level, q, x);
        }
        let (x, w, packed) = (&self.x[..], Elements::F32(k).into(), &mut self.packed[..]);
        let y = if second { &mut self.ds } else { &mut self.s };
        Product { x, rows: q.len() / d, w, cols: keys, k: d, y, y_stride: keys, packed }.run(level);
    }
}

/// `to` [cols, rows] is the transpose of `from` [rows, cols].
pub(super) fn turn(to: &mut [f32], from: &[f32], rows: usize, cols: usize) {
    for (r, from) in from.chunks_exact(cols).take(rows).enumerate() {
        for (c, x) in from.iter().enumerate() {
            to[c * rows + r] = *x;
        }
    }
}
