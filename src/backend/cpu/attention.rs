//! Attention of prompts and of single tokens, which both use the same sums.
//!
//! The keys of a sequence are cut into parts of [`PART`], at positions that are multiples of it. For each row and head
//! a part is computed by itself: scores, their largest `m`, `p = exp(s - m)`, the sum of `p`, and the values weighted
//! by `p`. Then the parts are merged in their order (online softmax, Milakov & Gimelshein 2018). So the bits of a row
//! depend on its position, its query and the keys and values up to it; not on the other rows, on how the prompt was
//! cut, or on the threads.
//!
//! The keys of a part are in one or more pages, whose products and sums follow each other as if they lay side by side.
//!
//! A thread takes a tile of rows with all query heads of one key head, which read each key and value together. Where there are
//! fewer tiles than threads have use for, it takes one part of one instead, and the parts are merged after as many as that takes.
//! What a row does not see, keys and values of later tokens and of those before its window, has no part in its sums: its parts begin
//! with the one that its window begins in.

use super::{
    Cpu,
    level::Level,
    rows as each, scratch,
    simd::{Line, Product, Weighted, lines, pool::Tile},
    weight::Elements,
};
use crate::ops::{Act, KvDtype, PAGE, Paged};
use std::ops::Range;

/// Keys of a part: their scores of a tile of queries, and keys and values of 64 columns, fit the first-level cache.
const PART: usize = 128;
/// Query heads in a tile of rows, if there are that many.
const QUERIES: usize = 32;

/// Where the keys of a row are.
#[derive(Clone, Copy)]
pub(super) struct Row {
    /// The first place of its sequence.
    pub base: usize,
    /// Keys up to it.
    pub len: usize,
}

impl Row {
    /// The row of a place.
    pub(super) fn of(place: u32, max_seq: usize) -> Row {
        let pos = place as usize % max_seq;
        Row { base: place as usize - pos, len: pos + 1 }
    }
}

/// Sizes of a call, and where keys and values are.
#[derive(Clone, Copy)]
pub(super) struct Attention<'a> {
    pub rows: usize,
    pub n_heads: usize,
    pub kv: Paged<'a>,
    /// Positions below this are read from sequence 0.
    pub shared: usize,
    /// Keys that a row sees at most: the last ones.
    pub window: usize,
}

/// A tile: some rows, and a key head with its query heads.
struct Queries<'a, R> {
    op: &'a Attention<'a>,
    first: usize,
    rows: usize,
    kv_head: usize,
    row: &'a R,
}

impl Attention<'_> {
    fn group(&self) -> usize {
        self.n_heads / self.kv.n_kv_heads
    }

    /// Columns of a sum, rounded up to a multiple of 16.
    fn width(&self) -> usize {
        self.kv.head_dim.next_multiple_of(16)
    }

    /// The `keys`, counted from position `from` on, of a sequence, in pieces that lie side by side: `(keys before, keys, first
    /// place)`.
    fn pieces(&self, base: usize, from: usize, mut keys: Range<usize>) -> impl Iterator<Item = (usize, usize, usize)> {
        std::iter::from_fn(move || {
            let at = from + keys.start;
            let (place, end) = if at < self.shared { (at, self.shared) } else { (base + at, usize::MAX) };
            let n = end.min(from + keys.end).min(at / PAGE * PAGE + PAGE).checked_sub(at).filter(|n| *n > 0)?;
            let before = keys.start;
            keys.start += n;
            Some((before, n, place))
        })
    }

    /// Calls `f` with `n` keys or values from a place on: where they lie, or as they are read from fp8.
    fn with_rows<A: Act>(
        &self,
        level: Level,
        cache: &[A],
        (place, kv_head): (usize, usize),
        n: usize,
        f: impl FnOnce(Elements<'_>),
    ) {
        let len = n * self.kv.head_dim;
        match self.kv.dtype {
            KvDtype::Auto => f(Elements::of(&cache[self.kv.elements::<A>(place, kv_head).start..][..len])),
            KvDtype::Fp8 => scratch::with(&scratch::ROWS, (len * size_of::<A>()).div_ceil(4), |words: &mut [u32]| {
                let rows = &mut bytemuck::cast_slice_mut::<u32, A>(words)[..len];
                let (codes, scales) = self.kv.fp8_rows(cache, place, kv_head, n);
                each::from_fp8(level, codes, scales, rows);
                f(Elements::of(rows));
            }),
        }
    }
}

impl<R: Fn(usize) -> Row> Queries<'_, R> {
    /// Queries: of each row the heads, one after the other.
    fn len(&self) -> usize {
        self.rows * self.op.group()
    }

    /// Elements of the sums of all its queries: for each the weighted values, `m` and the sum of the weights.
    fn unit(&self) -> usize {
        self.len() * (self.op.width() + 2)
    }

    /// The keys that a row sees.
    fn keys(&self, row: usize) -> Range<usize> {
        let len = (self.row)(self.first + row).len;
        len.saturating_sub(self.op.window)..len
    }

    /// The keys that a query sees of `PART` from `from` on, counted from there.
    fn sees(&self, query: usize, from: usize) -> Range<usize> {
        let Range { start, end } = self.keys(query / self.op.group());
        let end = end.saturating_sub(from).min(PART);
        start.saturating_sub(from).min(end)..end
    }

    /// The parts of the keys that its queries see.
    fn parts(&self) -> Range<usize> {
        let keys = || (0..self.rows).map(|r| self.keys(r));
        let (first, last) = (keys().map(|k| k.start).min(), keys().map(|k| k.end).max());
        first.unwrap_or(0) / PART..last.unwrap_or(0).div_ceil(PART)
    }
}

impl<A: Act> Cpu<A> {
    /// Computes `out` [rows, n_heads * head_dim] from `qkv` [rows, (n_heads + 2 n_kv_heads) * head_dim] and the cache.
    /// The rows of a tile belong to one sequence; with `consecutive`, all rows do.
    pub(super) fn attention(
        &self,
        op: &Attention<'_>,
        consecutive: bool,
        out: &mut [A],
        qkv: &[A],
        kv: (&[A], &[A]),
        row: impl Fn(usize) -> Row + Sync,
    ) {
        let Attention { rows, n_heads, kv: Paged { n_kv_heads, head_dim: d, .. }, .. } = *op;
        let (group, row) = (op.group(), &row);
        let height = if consecutive { (QUERIES / group).max(1) } else { 1 };
        let (down, sizes) = (rows.div_ceil(height), [rows, n_heads * d]);
        let tile = |first: usize, kv_head| Queries { op, first, rows: height.min(rows - first), kv_head, row };
        let (unit, tiles) = (tile(0, 0).unit(), down * n_kv_heads);
        let parts = Queries { rows, ..tile(0, 0) }.parts();
        if tiles >= 2 * self.pool.threads() || parts.len() == 1 {
            return self.pool.tiles(out, sizes, [height, group * d], |first, col, mut out| {
                let tile = tile(first, col / (group * d));
                scratch::with(&scratch::SUMS, unit, |sums| {
                    for part in tile.parts() {
                        scratch::with(&scratch::PARTS, unit, |of_part| {
                            self.part(&tile, part, of_part, qkv, kv);
                            self.merge(&tile, part, sums, of_part);
                        });
                    }
                    self.finish(&tile, &mut out, sums);
                });
            });
        }
        let wave = (8 * self.pool.threads()).div_ceil(tiles);
        let sums_of_tiles = if parts.len() > wave { tiles * unit } else { 0 };
        scratch::with(&scratch::SUMS_OF_TILES, sums_of_tiles, |sums| {
            scratch::with(&scratch::PARTS, tiles * wave * unit, |of_parts| {
                for begin in parts.clone().step_by(wave) {
                    let end = (begin + wave).min(parts.end);
                    let n = end - begin;
                    self.pool.tiles(of_parts, [tiles * n, unit], [1, unit], |i, _, mut to| {
                        let (tile, part) = (tile(i / n / n_kv_heads * height, i / n % n_kv_heads), begin + i % n);
                        if tile.parts().contains(&part) {
                            self.part(&tile, part, to.row(0), qkv, kv);
                        }
                    });
                    let merge = |tile: &Queries<'_, _>, i: usize, sums: &mut [f32]| {
                        let own = tile.parts();
                        for part in begin.max(own.start)..end.min(own.end) {
                            self.merge(tile, part, sums, &of_parts[(i * n + part - begin) * unit..][..unit]);
                        }
                    };
                    if end < parts.end {
                        self.pool.tiles(sums, [tiles, unit], [1, unit], |i, _, mut sums| {
                            merge(&tile(i / n_kv_heads * height, i % n_kv_heads), i, sums.row(0));
                        });
                        continue;
                    }
                    self.pool.tiles(out, sizes, [height, group * d], |first, col, mut out| {
                        let kv_head = col / (group * d);
                        let (tile, i) = (tile(first, kv_head), first / height * n_kv_heads + kv_head);
                        scratch::with(&scratch::SUMS, unit, |all| {
                            if begin > parts.start {
                                all.copy_from_slice(&sums[i * unit..][..unit]);
                            }
                            merge(&tile, i, all);
                            self.finish(&tile, &mut out, all);
                        });
                    });
                }
            });
        });
    }

    /// The sums of one part of the keys.
    fn part<R: Fn(usize) -> Row>(
        &self,
        tile: &Queries<'_, R>,
        part: usize,
        to: &mut [f32],
        qkv: &[A],
        kv: (&[A], &[A]),
    ) {
        let (op, level, n) = (tile.op, self.level, tile.len());
        let d = op.kv.head_dim;
        let (group, from, line) = (op.group(), part * PART, lines(level, d));
        let qkv_dim = (op.n_heads + 2 * op.kv.n_kv_heads) * d;
        let o_stride = op.width() + 2;
        let sees = |i| tile.sees(i, from);
        let (begin, end) = (0..n).map(sees).fold((PART, 0), |(a, b), keys| (a.min(keys.start), b.max(keys.end)));
        let pieces = || op.pieces((tile.row)(tile.first).base, from, begin..end);
        scratch::with(&scratch::SCORES, n * PART, |s| {
            scratch::with(&scratch::X, n * line, |x: &mut [Line]| {
                for (i, to) in x.chunks_exact_mut(line).enumerate() {
                    let at = (tile.first + i / group) * qkv_dim + (tile.kv_head * group + i % group) * d;
                    each::prepare(level, &qkv[at..][..d], to);
                }
                for (before, cols, at) in pieces() {
                    op.with_rows(level, kv.0, (at, tile.kv_head), cols, |keys| {
                        scratch::with(&scratch::PACKED, cols * line, |packed| {
                            let (w, y) = (keys.into(), &mut s[before..]);
                            Product { x, rows: n, w, cols, k: d, y, y_stride: PART, packed }.run(level);
                        });
                    });
                }
            });
            let scale = 1.0 / (d as f32).sqrt();
            for (i, (s, to)) in s.chunks_exact_mut(PART).zip(to.chunks_exact_mut(o_stride)).enumerate() {
                let (m, sum) = each::softmax(level, &mut s[sees(i)], scale);
                let (o, of_all) = to.split_at_mut(op.width());
                o.fill(0.0);
                of_all.copy_from_slice(&[m, sum]);
            }
            for (before, n_keys, at) in pieces() {
                let p = &s[before..];
                let seen = &|i| {
                    let Range { start, end } = sees(i);
                    let end = end.saturating_sub(before).min(n_keys);
                    start.saturating_sub(before).min(end)..end
                };
                op.with_rows(level, kv.1, (at, tile.kv_head), n_keys, |v| {
                    Weighted { p, p_stride: PART, rows: n, v, d, seen, o: to, o_stride }.run(level);
                });
            }
        });
    }

    /// Adds one part to `sums`, for the queries that see some of it.
    fn merge<R: Fn(usize) -> Row>(&self, tile: &Queries<'_, R>, part: usize, sums: &mut [f32], of_part: &[f32]) {
        let width = tile.op.width();
        let queries = sums.chunks_exact_mut(width + 2).zip(of_part.chunks_exact(width + 2)).enumerate();
        for (i, (all, one)) in queries.take(tile.len()).filter(|(i, _)| !tile.sees(*i, part * PART).is_empty()) {
            if part == tile.keys(i / tile.op.group()).start / PART {
                all.copy_from_slice(one);
                continue;
            }
            let (ours, theirs) = (all[width], one[width]);
            let m = if theirs > ours { theirs } else { ours };
            let [a, b] = [ours, theirs].map(|x| each::exp_of(self.level, x - m));
            each::mix(self.level, &mut all[..width], a, &one[..width], b);
            all[width + 1] = all[width + 1] * a + one[width + 1] * b;
            all[width] = m;
        }
    }

    /// The heads of the result.
    fn finish<R>(&self, tile: &Queries<'_, R>, out: &mut Tile<'_, A>, sums: &[f32]) {
        let (group, d, width) = (tile.op.group(), tile.op.kv.head_dim, tile.op.width());
        for (i, all) in sums.chunks_exact(width + 2).take(tile.rows * group).enumerate() {
            each::divide(self.level, &mut out.row(i / group)[i % group * d..][..d], &all[..d], all[width + 1]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        backend::{Backend, cpu::simd::pool::Pool},
        ops::{AttnDecode, AttnPrefill, noise, scrambled, to_pages},
    };
    use half::bf16;
    use std::sync::Arc;

    fn values<A: Act>(len: usize, seed: u64, scale: f32) -> Vec<A> {
        noise(len, seed).into_iter().map(|x| A::from_f32(x * scale)).collect()
    }

    /// `rows` rows of the second sequence that end at `kv_len`, in chunks of `chunk`, checked against the definition.
    /// The caches are NaN wherever nothing may be read, and their pages lie in disorder.
    fn run<A: Act>(cpu: &Cpu<A>, op: &AttnPrefill, chunk: usize) -> Vec<u32> {
        let AttnPrefill { rows, shared, n_heads, n_kv_heads, head_dim: d, max_seq, kv_len, window, kv, .. } = *op;
        let (qkv, pages) = (values::<A>(rows * op.qkv_dim(), 1, 6.0), scrambled(2, max_seq));
        let cache = |seed| {
            let mut cache = values::<A>(2 * n_kv_heads * max_seq * d, seed, 1.0);
            for (i, head) in cache.chunks_exact_mut(max_seq * d).enumerate() {
                let nan = if i < n_kv_heads { shared..max_seq } else { kv_len..max_seq };
                head[nan.start * d..nan.end * d].fill(A::from_f32(f32::NAN));
                if i >= n_kv_heads {
                    head[..shared * d].fill(A::from_f32(f32::NAN));
                }
                let unseen = (kv_len + 1 - rows).saturating_sub(window);
                head[..unseen * d].fill(A::from_f32(f32::NAN));
            }
            to_pages(kv, &cache, &pages, [n_kv_heads, max_seq, d])
        };
        let (k, v) = (cache(2), cache(3));
        let pos: Vec<u32> = (0..rows).map(|r| (max_seq + kv_len - rows + r) as u32).collect();
        let mut out = vec![A::from_f32(f32::NAN); rows * n_heads * d];
        for first in (0..rows).step_by(chunk) {
            let part = chunk.min(rows - first);
            let op = AttnPrefill { rows: part, first, kv_len: kv_len - rows + first + part, ..op.clone() };
            cpu.attn_prefill(&op, &mut out, &qkv, &k, &v, &pos, &pages).unwrap();
        }
        let mut want = vec![A::from_f32(f32::NAN); out.len()];
        op.reference(&mut want, &qkv, &k, &v, &pos, &pages);
        let limit = if size_of::<A>() == 2 { 0.01 } else { 1e-5 };
        for (i, (got, want)) in out.iter().zip(&want).enumerate() {
            let (got, want) = (got.to_f32(), want.to_f32());
            assert!((got - want).abs() <= limit * (want.abs() + 0.1), "{got} is not {want}, output {i} of {op:?}");
        }
        if shared == 0 {
            let single = AttnDecode { rows: 1, n_heads, n_kv_heads, head_dim: d, max_seq, kv_len, window, kv };
            let (last, mut decoded) = (rows - 1, vec![A::from_f32(f32::NAN); n_heads * d]);
            let qkv = qkv[last * op.qkv_dim()..].to_vec();
            let (mut part, mut arrived, pos) = (vec![], vec![], vec![pos[last]]);
            cpu.attn_decode(&single, &mut decoded, &mut part, &mut arrived, &qkv, &k, &v, &pos, &pages).unwrap();
            let bits = |out: &[A]| out.iter().map(|x| x.to_f32().to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&decoded), bits(&out[last * n_heads * d..]), "decode and prefill differ: {op:?}");
        }
        out.iter().map(|x| x.to_f32().to_bits()).collect()
    }

    #[test]
    fn the_definition_and_the_same_bits_however_it_is_cut() {
        let case = |rows, kv_len, (n_heads, n_kv_heads, head_dim), shared| {
            let max_seq = usize::next_multiple_of(kv_len, PAGE);
            let (window, kv) = (max_seq, KvDtype::Auto);
            AttnPrefill { rows, first: 0, shared, n_heads, n_kv_heads, head_dim, max_seq, kv_len, window, kv }
        };
        let fp8 = |op| AttnPrefill { kv: KvDtype::Fp8, ..op };
        let windowed = |window, op| AttnPrefill { window, ..op };
        let cases = [
            case(1, 1, (1, 1, 8), 0),
            case(9, 9, (4, 2, 24), 0),
            case(3, 300, (9, 3, 64), 0),    // several parts, few rows
            case(70, 193, (2, 1, 128), 0),  // rows across the end of a part
            case(20, 290, (8, 2, 64), 150), // a part of which some keys are of sequence 0
            case(131, 131, (2, 2, 16), 0),
            windowed(1, case(9, 140, (2, 1, 16), 0)),
            windowed(50, case(70, 300, (4, 2, 24), 0)), // rows whose windows begin in another part, and inside one
            windowed(128, case(3, 700, (9, 3, 64), 0)),
            windowed(130, case(20, 290, (8, 2, 64), 170)), // a window that begins in what is shared
            fp8(case(1, 1, (1, 1, 8), 0)),
            fp8(case(3, 300, (9, 3, 64), 0)),
            fp8(case(20, 290, (8, 2, 64), 150)),
            fp8(windowed(50, case(70, 300, (4, 2, 24), 0))),
        ];
        for op in cases {
            let best = Cpu::<bf16>::new().unwrap();
            let want = run(&best, &op, op.rows);
            for chunk in [1, 7, 50] {
                assert_eq!(run(&best, &op, chunk), want, "chunks of {chunk}: {op:?}");
            }
            let threads = |n| Arc::new(Pool::new(n));
            assert_eq!(run(&Cpu::<bf16>::with(Level::best(), threads(1)), &op, op.rows), want, "one thread: {op:?}");
            assert_eq!(run(&Cpu::<bf16>::with(Level::Portable, threads(5)), &op, op.rows), want, "portable: {op:?}");
            run(&Cpu::<f32>::new().unwrap(), &op, op.rows);
        }
    }

    #[test]
    fn what_comes_later_has_no_part() {
        let (rows, d) = (70, 64);
        let op = AttnPrefill {
            rows,
            first: 0,
            shared: 0,
            n_heads: 2,
            n_kv_heads: 1,
            head_dim: d,
            max_seq: 128,
            kv_len: rows,
            window: 128,
            kv: KvDtype::Auto,
        };
        let (qkv, pos) = (values::<bf16>(rows * op.qkv_dim(), 1, 6.0), (0..rows as u32).collect());
        let pages = vec![0, 1];
        let cache = |seed, fill: Option<f32>| {
            let mut cache = values::<bf16>(op.max_seq * d, seed, 1.0);
            for (i, x) in cache[30 * d..].iter_mut().enumerate() {
                *x = fill.map_or(*x, |fill| bf16::from_f32(if i % 2 == 0 { fill } else { -fill }));
            }
            cache
        };
        let run = |level, fill| {
            let (k, v, mut out) = (cache(2, fill), cache(3, fill), vec![bf16::NAN; rows * 2 * d]);
            Cpu::with(level, Arc::new(Pool::new(2))).attn_prefill(&op, &mut out, &qkv, &k, &v, &pos, &pages).unwrap();
            out[..30 * 2 * d].to_vec()
        };
        for level in Level::here() {
            let want = run(level, None);
            assert!(want.iter().all(|x| x.is_finite()));
            for fill in [f32::NAN, f32::INFINITY, 1e38] {
                assert_eq!(run(level, Some(fill)), want, "{level}: the keys and values after row 29 are {fill}");
            }
        }
    }
}
