//! Attention of prompts and of single tokens, by the same sums.
//!
//! The keys of a sequence are cut into parts of [`PART`], at positions that are multiples of it. For each row and head a part is
//! computed by itself (scores, their largest `m`, `p = exp(s - m)`, the sum of `p`, the values weighted by `p`), and the parts are
//! merged in their order (online softmax, Milakov & Gimelshein 2018). So the bits of a row depend on its position, its query and the
//! keys and values up to it; not on the rows beside it, on how the prompt was cut, or on the threads.
//!
//! A thread takes a tile of rows with all query heads of one key head, which read each key and value together. Where there are
//! fewer tiles than threads have use for, it takes one part of one instead.

use super::{
    Cpu, scratch,
    simd::{Product, Weighted, Weights, lines, rows as each},
};
use crate::ops::Act;

/// Keys of a part: their scores of a tile of queries, and keys and values of 64 columns, fit the first-level cache.
const PART: usize = 128;
/// Query heads of a tile of rows, at least where there are as many.
const QUERIES: usize = 32;

/// Where the keys of a row are.
#[derive(Clone, Copy)]
pub(super) struct Row {
    pub sequence: usize,
    /// Keys that it sees.
    pub len: usize,
}

/// Sizes of a call.
#[derive(Clone, Copy)]
pub(super) struct Attention {
    pub rows: usize,
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub head_dim: usize,
    pub max_seq: usize,
    /// Positions that are those of sequence 0.
    pub shared: usize,
}

/// One thread's queries and what becomes of them: `n` queries, head by head of each row.
struct Queries<'a> {
    n: usize,
    /// Columns of a row of sums.
    width: usize,
    /// [n, PART]
    s: &'a mut [f32],
    /// Weighted values of a part, `m` and the sum after them. [n, width + 2]
    part: &'a mut [f32],
    /// The same of all parts so far.
    all: &'a mut [f32],
}

impl Attention {
    fn group(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }

    /// Columns of sums: whole 16 of them.
    fn width(&self) -> usize {
        self.head_dim.next_multiple_of(16)
    }

    /// The keys `from..from + n` of a sequence and key head, in one or two pieces: `(keys before, keys, first element)`.
    fn pieces(&self, sequence: usize, kv_head: usize, from: usize, n: usize) -> [(usize, usize, usize); 2] {
        let at = |s: usize, t: usize| ((s * self.n_kv_heads + kv_head) * self.max_seq + t) * self.head_dim;
        let of_base = self.shared.saturating_sub(from).min(n);
        [(0, of_base, at(0, from)), (of_base, n - of_base, at(sequence, from + of_base))]
    }
}

impl<A: Act> Cpu<A> {
    /// `out` [rows, n_heads * head_dim] of `qkv` [rows, (n_heads + 2 n_kv_heads) * head_dim] and the cache. Rows of a tile have one
    /// sequence: with `consecutive` all have.
    pub(super) fn attention(
        &self,
        op: &Attention,
        consecutive: bool,
        out: &mut [A],
        qkv: &[A],
        (k, v): (&[A], &[A]),
        row: impl Fn(usize) -> Row + Sync,
    ) {
        let Attention { rows, n_heads, n_kv_heads, head_dim: d, .. } = *op;
        let (group, width) = (op.group(), op.width());
        let height = if consecutive { (QUERIES / group).max(1) } else { 1 };
        let longest = (0..rows).map(|r| row(r).len).max().unwrap_or(0);
        let (parts, tiles) = (longest.div_ceil(PART), rows.div_ceil(height) * n_kv_heads);
        let sizes = [rows, n_heads * d];
        if tiles >= 2 * self.pool.threads() || parts == 1 {
            return self.pool.tiles(out, sizes, [height, group * d], |first, col, mut out| {
                let (kv_head, tile) = (col / (group * d), out.rows());
                self.queries(op, first..first + tile, kv_head, qkv, &row, |q, prepared, longest| {
                    for part in 0..longest.div_ceil(PART) {
                        self.part(op, q, prepared, first..first + tile, kv_head, part, (k, v), &row);
                        for i in 0..q.n {
                            if part * PART < row(first + i / group).len {
                                let of = i * (width + 2)..(i + 1) * (width + 2);
                                self.merge(&mut q.all[of.clone()], &q.part[of], part == 0);
                            }
                        }
                    }
                    for i in 0..q.n {
                        self.finish(
                            &mut out.row(i / group)[i % group * d..][..d],
                            &q.all[i * (width + 2)..][..width + 2],
                        );
                    }
                });
            });
        }
        // [rows, n_kv_heads, parts][group, width + 2]
        let unit = group * (width + 2);
        scratch::with(&scratch::PARTS, rows * n_kv_heads * parts * unit, |all| {
            self.pool.tiles(all, [rows * n_kv_heads * parts, unit], [1, unit], |i, _, mut to| {
                let (r, kv_head, part) = (i / parts / n_kv_heads, i / parts % n_kv_heads, i % parts);
                if part * PART < row(r).len {
                    self.queries(op, r..r + 1, kv_head, qkv, &row, |q, prepared, _| {
                        self.part(op, q, prepared, r..r + 1, kv_head, part, (k, v), &row);
                        to.row(0).copy_from_slice(q.part);
                    });
                }
            });
            let all = &*all;
            self.pool.tiles(out, sizes, [1, group * d], |r, col, mut out| {
                let units = &all[(r * n_kv_heads + col / (group * d)) * parts * unit..][..parts * unit];
                scratch::with(&scratch::Y, width + 2, |sum| {
                    for h in 0..group {
                        for part in 0..row(r).len.div_ceil(PART) {
                            self.merge(sum, &units[part * unit + h * (width + 2)..][..width + 2], part == 0);
                        }
                        self.finish(&mut out.row(0)[h * d..][..d], sum);
                    }
                });
            });
        });
    }

    /// `f` of the prepared queries of rows and of room for what becomes of them, and the most keys that one of the rows sees.
    fn queries(
        &self,
        op: &Attention,
        rows: std::ops::Range<usize>,
        kv_head: usize,
        qkv: &[A],
        row: &impl Fn(usize) -> Row,
        f: impl FnOnce(&mut Queries<'_>, &[super::simd::Line], usize),
    ) {
        let (d, group, width) = (op.head_dim, op.group(), op.width());
        let (n, line) = (rows.len() * group, lines(self.level, d));
        let qkv_dim = (op.n_heads + 2 * op.n_kv_heads) * d;
        let longest = rows.clone().map(|r| row(r).len).max().unwrap_or(0);
        scratch::with(&scratch::X, n * line, |prepared| {
            for (i, to) in prepared.chunks_exact_mut(line).enumerate() {
                let at = (rows.start + i / group) * qkv_dim + (kv_head * group + i % group) * d;
                each::prepare(self.level, &qkv[at..][..d], to);
            }
            scratch::with(&scratch::QUERIES, n * (PART + 2 * (width + 2)), |memory| {
                let (s, memory) = memory.split_at_mut(n * PART);
                let (part, all) = memory.split_at_mut(n * (width + 2));
                f(&mut Queries { n, width, s, part, all }, prepared, longest);
            });
        });
    }

    /// `q.part` of one part of the keys.
    #[expect(clippy::too_many_arguments, reason = "what a part is made of")]
    fn part(
        &self,
        op: &Attention,
        q: &mut Queries<'_>,
        prepared: &[super::simd::Line],
        rows: std::ops::Range<usize>,
        kv_head: usize,
        part: usize,
        (k, v): (&[A], &[A]),
        row: &impl Fn(usize) -> Row,
    ) {
        let (d, level, from, width) = (op.head_dim, self.level, part * PART, q.width);
        let longest = rows.clone().map(|r| row(r).len).max().unwrap_or(0);
        let keys = PART.min(longest - from);
        let pieces = op.pieces(row(rows.start).sequence, kv_head, from, keys);
        for (before, cols, at) in pieces {
            let w = Weights::of(&k[at..][..cols * d]);
            scratch::with(&scratch::PACKED, cols * lines(level, d), |packed| {
                let (x, y) = (prepared, &mut q.s[before..]);
                Product { x, rows: q.n, w, cols, k: d, y, y_stride: PART, packed }.run(level);
            });
        }
        let scale = 1.0 / (d as f32).sqrt();
        for (i, (s, part)) in q.s.chunks_exact_mut(PART).zip(q.part.chunks_exact_mut(width + 2)).enumerate() {
            let sees = row(rows.start + i / op.group()).len.saturating_sub(from).min(keys);
            let (m, sum) = each::softmax(level, &mut s[..sees], scale);
            s[sees..].fill(0.0);
            part[..width].fill(0.0);
            (part[width], part[width + 1]) = (m, sum);
        }
        for (before, n, at) in pieces {
            let (p, v) = (&q.s[before..], Weights::of(&v[at..][..n * d]));
            Weighted { p, p_stride: PART, rows: q.n, v, n, d, o: q.part, o_stride: width + 2 }.run(level);
        }
    }

    /// `all` with one part more; the first one is that part.
    fn merge(&self, all: &mut [f32], part: &[f32], first: bool) {
        if first {
            return all.copy_from_slice(part);
        }
        let width = all.len() - 2;
        let (ours, theirs) = (all[width], part[width]);
        let m = if theirs > ours { theirs } else { ours };
        let [a, b] = [ours, theirs].map(|x| each::exp_of(self.level, x - m));
        each::mix(self.level, &mut all[..width], a, &part[..width], b);
        all[width + 1] = all[width + 1] * a + part[width + 1] * b;
        all[width] = m;
    }

    /// A head of the result.
    fn finish(&self, out: &mut [A], all: &[f32]) {
        each::divide(self.level, out, &all[..out.len()], all[all.len() - 1]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        backend::{
            Backend,
            cpu::simd::{Level, pool::Pool},
        },
        ops::{AttnDecode, AttnPrefill, noise},
    };
    use half::bf16;
    use std::sync::Arc;

    fn values<A: Act>(len: usize, seed: u64, scale: f32) -> Vec<A> {
        noise(len, seed).into_iter().map(|x| A::from_f32(x * scale)).collect()
    }

    /// `rows` rows of the second sequence that end at `kv_len`, in chunks of `chunk`, from caches that are NaN where nothing is to
    /// be read; against the definition.
    fn run<A: Act>(cpu: &Cpu<A>, op: &AttnPrefill, chunk: usize) -> Vec<u32> {
        let AttnPrefill { rows, shared, n_heads, n_kv_heads, head_dim: d, max_seq, kv_len, .. } = *op;
        let qkv = values::<A>(rows * op.qkv_dim(), 1, 6.0);
        let cache = |seed| {
            let mut cache = values::<A>(2 * n_kv_heads * max_seq * d, seed, 1.0);
            for (i, head) in cache.chunks_exact_mut(max_seq * d).enumerate() {
                let nan = if i < n_kv_heads { shared..max_seq } else { kv_len..max_seq };
                head[nan.start * d..nan.end * d].fill(A::from_f32(f32::NAN));
                if i >= n_kv_heads {
                    head[..shared * d].fill(A::from_f32(f32::NAN));
                }
            }
            cache
        };
        let (k, v) = (cache(2), cache(3));
        let pos: Vec<u32> = (0..rows).map(|r| (max_seq + kv_len - rows + r) as u32).collect();
        let mut out = vec![A::from_f32(f32::NAN); rows * n_heads * d];
        for first in (0..rows).step_by(chunk) {
            let part = chunk.min(rows - first);
            let op = AttnPrefill { rows: part, first, kv_len: kv_len - rows + first + part, ..op.clone() };
            cpu.attn_prefill(&op, &mut out, &qkv, &k, &v, &pos).unwrap();
        }
        let mut want = vec![A::from_f32(f32::NAN); out.len()];
        op.reference(&mut want, &qkv, &k, &v, &pos);
        let limit = if size_of::<A>() == 2 { 0.01 } else { 1e-5 };
        for (i, (got, want)) in out.iter().zip(&want).enumerate() {
            let (got, want) = (got.to_f32(), want.to_f32());
            assert!((got - want).abs() <= limit * (want.abs() + 0.1), "{got} is not {want}, output {i} of {op:?}");
        }
        if shared == 0 {
            let single = AttnDecode { rows: 1, n_heads, n_kv_heads, head_dim: d, max_seq, kv_len };
            let (last, mut decoded) = (rows - 1, vec![A::from_f32(f32::NAN); n_heads * d]);
            let qkv = qkv[last * op.qkv_dim()..].to_vec();
            cpu.attn_decode(&single, &mut decoded, &mut vec![], &mut vec![], &qkv, &k, &v, &vec![pos[last]]).unwrap();
            let bits = |out: &[A]| out.iter().map(|x| x.to_f32().to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&decoded), bits(&out[last * n_heads * d..]), "decode and prefill differ: {op:?}");
        }
        out.iter().map(|x| x.to_f32().to_bits()).collect()
    }

    #[test]
    fn the_definition_and_the_same_bits_however_it_is_cut() {
        let case = |rows, kv_len, (n_heads, n_kv_heads, head_dim), shared| {
            let max_seq = kv_len + 5;
            AttnPrefill { rows, first: 0, shared, n_heads, n_kv_heads, head_dim, max_seq, kv_len }
        };
        let cases = [
            case(1, 1, (1, 1, 8), 0),
            case(9, 9, (4, 2, 24), 0),
            case(3, 300, (9, 3, 64), 0),    // several parts, few rows
            case(70, 193, (2, 1, 128), 0),  // rows across the end of a part
            case(20, 290, (8, 2, 64), 150), // a part of which some keys are of sequence 0
            case(131, 131, (2, 2, 16), 0),
        ];
        for op in cases {
            let best = Cpu::<bf16>::new();
            let want = run(&best, &op, op.rows);
            for chunk in [1, 7, 50] {
                assert_eq!(run(&best, &op, chunk), want, "chunks of {chunk}: {op:?}");
            }
            let threads = |n| Arc::new(Pool::new(n));
            assert_eq!(run(&Cpu::<bf16>::with(Level::best(), threads(1)), &op, op.rows), want, "one thread: {op:?}");
            assert_eq!(run(&Cpu::<bf16>::with(Level::Portable, threads(5)), &op, op.rows), want, "portable: {op:?}");
            run(&Cpu::<f32>::new(), &op, op.rows);
        }
    }
}
