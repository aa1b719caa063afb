//! The CPU backend, with the same bits on every CPU.
//!
//! `Cpu<f32>` keeps activations in f32; Hugging Face's float32 goldens are compared with it. `Cpu<bf16>` rounds where
//! the kernels round; the kernels are compared with it. Products and attention are in `matmul.rs` and `attention.rs`,
//! built on the instructions and threads of `simd/`. An op that takes only a few microseconds of a step runs as its
//! definition.

mod attention;
mod level;
mod matmul;
mod packed;
mod quantized;
mod rows;
mod sample;
mod scratch;
mod simd;
mod sums;
#[cfg(test)]
mod tests;
mod train;
mod train_rows;
mod weight;

pub use weight::Weight;

use crate::{
    backend::{Backend, Out},
    error::{Error, Result},
    files::weights::Tensor,
    ops::{
        Act, AddRmsNorm, Argmax, AttnDecode, AttnPrefill, Element, Embed, Gemm, Gemv, HeadNorm, KvAppend, LogProb,
        Paged, RmsNorm, Rope, Sample, StreamRead, Swiglu, guesses::Counted, sample::Lengths,
    },
};
use attention::{Attention, Row};
use half::bf16;
use level::Level;
use quantized::Quantized;
use rows as each;
use simd::pool::Pool;
use std::{collections::VecDeque, marker::PhantomData, num::NonZeroUsize, sync::Arc};

/// The CPU, with activations of type `A`.
#[derive(Clone)]
pub struct Cpu<A> {
    /// The instructions of products.
    level: Level,
    pool: Arc<Pool>,
    activations: PhantomData<A>,
}

/// Most threads of a [`Cpu`].
const MAX_THREADS: usize = 1024;

/// The sets of instructions that this CPU has, as `AOJI_CPU` names them, the best last.
pub fn instructions() -> impl Iterator<Item = &'static str> {
    Level::here().map(Level::name)
}

impl<A: Act> Cpu<A> {
    /// [`Cpu::open`] with the process's threads.
    ///
    /// # Errors
    /// Those of [`Cpu::open`].
    pub fn new() -> Result<Self> {
        Cpu::open(None)
    }

    /// With the best instructions of the CPU, or those that `AOJI_CPU` names; and with this many threads of its own, or
    /// the process's threads: one for each physical core.
    ///
    /// # Errors
    /// `Input` when `AOJI_CPU` names no instructions that the CPU has, or for more than 1024 threads.
    pub fn open(threads: Option<NonZeroUsize>) -> Result<Self> {
        let level = Level::chosen()?;
        let pool = match threads.map(NonZeroUsize::get) {
            None => Pool::global().clone(),
            Some(n) if n > MAX_THREADS => {
                return Err(Error::Input(format!("{n} threads, allowed is 1 to {MAX_THREADS}")));
            }
            Some(n) => Arc::new(Pool::new(n)),
        };
        Ok(Cpu::with(level, pool))
    }

    fn with(level: Level, pool: Arc<Pool>) -> Self {
        let level = if size_of::<A>() == 4 { level.of_f32() } else { level };
        Cpu { level, pool, activations: PhantomData }
    }

    /// With given instructions and so many threads of its own.
    #[cfg(test)]
    pub(crate) fn on(instructions: &str, threads: usize) -> Result<Self> {
        Ok(Cpu::with(Level::named(instructions)?, Arc::new(Pool::new(threads))))
    }

    /// Its threads.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Calls `f(at, part)` for every `len` elements of `out`, which begin at element `at`, on its threads.
    ///
    /// # Panics
    /// If `len` is 0.
    pub fn chunks<T: Send + Sync>(&self, out: &mut [T], len: usize, f: impl Fn(usize, &mut [T]) + Sync) {
        self.pool.tiles(out, [1, out.len()], [1, len], |_, at, mut tile| f(at, tile.row(0)));
    }

    /// How many rows one thread takes at a time, so that the work is worth a thread.
    fn height(rows: usize, cols: usize) -> usize {
        if rows * cols < MANY { rows } else { (MANY / 4).div_ceil(cols) }
    }
}

/// Bytes of memory that the system can still give without taking it from other programs, where it says so.
fn available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

/// From this many elements on, work is shared by the threads.
const MANY: usize = 1 << 14;

/// Runs `$body` with `$w` bound to the elements of a weight that is one matrix, bf16 or f32.
macro_rules! with_elements {
    ($weight:expr, |$w:ident| $body:expr) => {
        match $weight.single()? {
            weight::Elements::Bf16($w) => $body,
            weight::Elements::F32($w) => $body,
        }
    };
}

impl<A: Act> Cpu<A> {
    fn norm<W: Act>(&self, op: &RmsNorm, out: &mut [A], x: &[A], w: &[W]) {
        let (rows, dim) = (op.rows, op.dim);
        self.pool.tiles(out, [rows, dim], [Self::height(rows, dim), dim], |first, _, mut tile| {
            for r in 0..tile.rows() {
                each::norm(self.level, tile.row(r), &x[(op.first + first + r) * dim..][..dim], w, op.eps);
            }
        });
    }

    /// Index of the largest, the first of several equals; NaN counts as the least.
    fn best(&self, x: &[f32]) -> usize {
        let max = each::max_of(self.level, x);
        x.iter().position(|x| *x == max).unwrap_or(0)
    }
}

impl<A: Act> Backend for Cpu<A> {
    type Act = A;
    type Buf<T: Element> = Vec<T>;
    type Weight = Weight;
    type Graphs = ();
    type Outbox = Vec<VecDeque<u32>>;
    const LOOKAHEAD: usize = 0;
    const CHUNK: usize = 128;
    const IS_GPU: bool = false;
    const KEEPS_EMBED: bool = true;
    const OVERCOMMITS: bool = true;

    fn name(&self) -> String {
        format!("CPU ({} activations, {}, {} threads)", A::NAME, self.level, self.pool.threads())
    }
    fn free_memory(&self) -> Result<Option<u64>> {
        Ok(available())
    }
    fn alloc<T: Element>(&self, len: usize) -> Result<Vec<T>> {
        // not `vec!`, which writes zeros of bf16: the system has zeros of its own, and a cache takes memory as it is used
        bytemuck::allocation::try_zeroed_vec(len).map_err(|()| {
            let mib = len.saturating_mul(size_of::<T>()).div_ceil(1 << 20);
            let what = "the system gives no more memory: a shorter context (`--context`) needs less";
            Error::Memory(format!("{mib} MiB for a buffer: {what}"))
        })
    }
    fn write<T: Element>(&self, dst: &mut Vec<T>, at: usize, src: &[T]) -> Result<()> {
        dst[at..at + src.len()].copy_from_slice(src);
        Ok(())
    }
    fn copy<T: Element>(&self, buf: &mut Vec<T>, to: usize, from: usize, len: usize) -> Result<()> {
        buf.copy_within(from..from + len, to);
        Ok(())
    }
    fn read<T: Element>(&self, dst: &mut [T], src: &Vec<T>, at: usize) -> Result<()> {
        dst.copy_from_slice(&src[at..at + dst.len()]);
        Ok(())
    }
    fn keeps(stack: &[Tensor]) -> Option<u64> {
        let taken = stack.iter().all(|t| t.is_plain() || Quantized::takes(t));
        let bytes = |t: &Tensor| if t.is_plain() { (2 * t.rows() * t.cols()) as u64 } else { Quantized::bytes(t) };
        taken.then(|| stack.iter().map(bytes).sum())
    }
    fn in_file(t: &Tensor) -> u64 {
        match t.is_plain() {
            false => Quantized::in_file(t),
            true if Weight::stays::<A>(t) => (2 * t.rows() * t.cols()) as u64,
            true => 0,
        }
    }
    fn weights(&self, stacks: &[Vec<Tensor>], progress: &mut dyn FnMut(u64)) -> Result<Vec<Weight>> {
        let weight = |parts: &Vec<Tensor>| {
            let weight = Weight::new::<A>(parts);
            progress(parts.iter().map(Tensor::file_bytes).sum());
            weight
        };
        Ok(stacks.iter().map(weight).collect())
    }
    fn weight_from(&self, rows: usize, cols: usize, data: &[bf16]) -> Result<Weight> {
        Ok(Weight::from_values(rows, cols, data))
    }
    fn set_bias(&self, w: &mut Weight, bias: &[f32]) -> Result<()> {
        w.set_bias::<A>(bias)
    }
    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
    fn outbox(&self, sequences: usize) -> Result<Vec<VecDeque<u32>>> {
        Ok(vec![VecDeque::new(); sequences])
    }
    fn take(&self, outbox: &mut Vec<VecDeque<u32>>, sequence: usize) -> Result<u32> {
        outbox[sequence].pop_front().ok_or_else(|| Error::Op { op: "take", what: "no token was chosen".into() })
    }
    fn skip(&self, outbox: &mut Vec<VecDeque<u32>>, sequence: usize, n: usize) {
        let tokens = &mut outbox[sequence];
        tokens.drain(..n.min(tokens.len()));
    }

    fn embed(&self, op: &Embed, x: &mut Vec<A>, tokens: &Vec<u32>, table: &Weight) -> Result<()> {
        op.check(x.len(), tokens.len(), crate::backend::Shaped::shape(table))?;
        let Some(table) = table.quantized() else {
            with_elements!(table, |w| op.reference(x, tokens, w));
            return Ok(());
        };
        let mut values = vec![0f32; op.dim];
        for (x, t) in x.chunks_exact_mut(op.dim).zip(&tokens[..op.rows]) {
            table.values(*t as usize, &mut values);
            x.iter_mut().zip(&values).for_each(|(x, w)| *x = A::from_f32(*w));
        }
        Ok(())
    }
    fn rms_norm(&self, op: &RmsNorm, out: &mut Vec<A>, x: &Vec<A>, w: &Weight) -> Result<()> {
        op.check(out.len(), x.len(), w.len())?;
        with_elements!(w, |w| self.norm(op, out, x, w));
        Ok(())
    }
    fn add_rms_norm(&self, op: &AddRmsNorm, out: &mut Vec<A>, x: &mut Vec<A>, d: &Vec<A>, w: &Weight) -> Result<()> {
        op.check(out.len(), x.len(), d.len(), w.len())?;
        with_elements!(w, |w| op.reference(out, x, d, w));
        Ok(())
    }
    fn gemv(&self, op: &Gemv, out: Out<'_, Self>, x: &Vec<A>, w: &Weight) -> Result<()> {
        op.check(out.len(), x.len(), crate::backend::Shaped::shape(w))?;
        self.product(op.rows, out, x, w);
        Ok(())
    }
    fn gemm(&self, op: &Gemm, out: Out<'_, Self>, x: &Vec<A>, w: &Weight) -> Result<()> {
        op.check(out.len(), x.len(), crate::backend::Shaped::shape(w))?;
        self.product(op.rows, out, x, w);
        Ok(())
    }
    fn rope(&self, op: &Rope, qkv: &mut Vec<A>, pos: &Vec<u32>, table: &Vec<f32>) -> Result<()> {
        op.check(qkv.len(), pos.len(), table.len())?;
        let (dim, d) = (op.qkv_dim(), op.head_dim);
        self.pool.tiles(qkv, [op.rows, dim], [Self::height(op.rows, dim), dim], |first, _, mut tile| {
            for r in 0..tile.rows() {
                let cos_sin = &table[pos[first + r] as usize % op.max_seq * d..][..d];
                let heads = tile.row(r).chunks_exact_mut(d).take(op.n_heads + op.n_kv_heads);
                heads.for_each(|head| each::rotate(self.level, head, cos_sin));
            }
        });
        Ok(())
    }
    fn head_norm(&self, op: &HeadNorm, qkv: &mut Vec<A>, gains: &Weight) -> Result<()> {
        op.check(qkv.len(), crate::backend::Shaped::shape(gains))?;
        let (dim, d, gains) = (op.qkv_dim(), op.head_dim, gains.to_f32());
        let (of_q, of_k) = gains.split_at(d);
        self.pool.tiles(qkv, [op.rows, dim], [Self::height(op.rows, dim), dim], |_, _, mut tile| {
            for r in 0..tile.rows() {
                let (q, k) = tile.row(r).split_at_mut(op.n_heads * d);
                q.chunks_exact_mut(d).for_each(|head| each::norm_in_place(self.level, head, of_q, op.eps));
                let k = k.chunks_exact_mut(d).take(op.n_kv_heads);
                k.for_each(|head| each::norm_in_place(self.level, head, of_k, op.eps));
            }
        });
        Ok(())
    }
    fn kv_append(
        &self,
        op: &KvAppend,
        k: &mut Vec<A>,
        v: &mut Vec<A>,
        qkv: &Vec<A>,
        pos: &Vec<u32>,
        pages: &Vec<u32>,
    ) -> Result<()> {
        op.check::<A>(k.len(), v.len(), qkv.len(), pos.len(), pages.len())?;
        op.reference(k, v, qkv, pos, pages);
        Ok(())
    }
    fn attn_prefill(
        &self,
        op: &AttnPrefill,
        out: &mut Vec<A>,
        qkv: &Vec<A>,
        k: &Vec<A>,
        v: &Vec<A>,
        pos: &Vec<u32>,
        pages: &Vec<u32>,
    ) -> Result<()> {
        op.check::<A>(out.len(), qkv.len(), k.len(), v.len(), pos.len(), pages.len())?;
        let AttnPrefill { rows, first, shared, n_heads, n_kv_heads, head_dim, max_seq, window, kv, .. } = *op;
        let paged = Paged { dtype: kv, pages, n_kv_heads, head_dim };
        let sizes = Attention { rows, n_heads, kv: paged, shared, window };
        let row = |r: usize| Row::of(pos[first + r], max_seq);
        let (out, qkv) = (&mut out[first * n_heads * head_dim..], &qkv[first * op.qkv_dim()..]);
        self.attention(&sizes, true, out, qkv, (k, v), row);
        Ok(())
    }
    fn attn_decode(
        &self,
        op: &AttnDecode,
        out: &mut Vec<A>,
        _part: &mut Vec<f32>,
        _arrived: &mut Vec<u32>,
        qkv: &Vec<A>,
        k: &Vec<A>,
        v: &Vec<A>,
        pos: &Vec<u32>,
        pages: &Vec<u32>,
    ) -> Result<()> {
        op.check::<A>(out.len(), qkv.len(), k.len(), v.len(), pos.len(), pages.len())?;
        let AttnDecode { rows, n_heads, n_kv_heads, head_dim, max_seq, window, kv, .. } = *op;
        let paged = Paged { dtype: kv, pages, n_kv_heads, head_dim };
        let sizes = Attention { rows, n_heads, kv: paged, shared: 0, window };
        let row = |r: usize| Row::of(pos[r], max_seq);
        self.attention(&sizes, false, out, qkv, (k, v), row);
        Ok(())
    }
    fn swiglu(&self, op: &Swiglu, hb: &mut Vec<A>, gate_up: &Vec<A>) -> Result<()> {
        op.check(hb.len(), gate_up.len())?;
        let n = op.ffn_dim;
        self.pool.tiles(hb, [op.rows, n], [Self::height(op.rows, 2 * n), n], |first, _, mut tile| {
            for r in 0..tile.rows() {
                each::swiglu(self.level, tile.row(r), &gate_up[(first + r) * 2 * n..][..2 * n]);
            }
        });
        Ok(())
    }
    fn argmax(
        &self,
        op: &Argmax,
        token: &mut Vec<u32>,
        pos: &mut Vec<u32>,
        scratch: &mut Vec<f32>,
        outbox: &mut Vec<VecDeque<u32>>,
        logits: &Vec<f32>,
    ) -> Result<()> {
        op.check(token.len(), pos.len(), scratch.len(), logits.len())?;
        let mut counted = Counted::default();
        for (r, logits) in logits.chunks_exact(op.vocab).take(op.rows).enumerate() {
            let sequence = pos[r] as usize / op.max_seq;
            if !counted.next(sequence, token[r]) {
                continue;
            }
            token[r] = self.best(logits) as u32;
            counted.chose(token[r]);
            pos[r] = pos[r].wrapping_add(1);
            outbox[sequence].push_back(token[r]);
        }
        Ok(())
    }
    fn sample(
        &self,
        op: &Sample,
        token: &mut Vec<u32>,
        pos: &mut Vec<u32>,
        params: &mut Vec<u32>,
        history: &mut Vec<u32>,
        scratch: &mut Vec<f32>,
        outbox: &mut Vec<VecDeque<u32>>,
        bias: &Vec<f32>,
        mask: &Vec<u32>,
        logits: &Vec<f32>,
    ) -> Result<()> {
        op.check(Lengths {
            token: token.len(),
            pos: pos.len(),
            params: params.len(),
            history: history.len(),
            scratch: scratch.len(),
            bias: bias.len(),
            mask: mask.len(),
            logits: logits.len(),
        })?;
        let mut counted = Counted::default();
        for r in 0..op.rows {
            let s = op.sequence(pos[r]);
            if !counted.next(s, token[r]) {
                continue;
            }
            let chosen = self.draw(op, r, s, &op.params_of(params, s), history, bias, mask, logits);
            op.advance(r, chosen, token, pos, params, history);
            counted.chose(token[r]);
            outbox[s].push_back(token[r]);
        }
        Ok(())
    }
    fn stream_read(&self, op: &StreamRead, out: &mut Vec<u32>, x: &Vec<u32>) -> Result<()> {
        op.check(out.len(), x.len())?;
        op.reference(out, x);
        Ok(())
    }
    fn log_prob(
        &self,
        op: &LogProb,
        out: &mut Vec<f32>,
        greedy: &mut Vec<u32>,
        logits: &Vec<f32>,
        target: &Vec<u32>,
    ) -> Result<()> {
        op.check(out.len(), greedy.len(), logits.len(), target.len())?;
        scratch::with(&scratch::BEST, op.rows, |best| {
            self.pool.tiles(best, [op.rows, 1], [1, 1], |r, _, mut to| {
                let x = &logits[r * op.vocab..][..op.vocab];
                let i = self.best(x);
                to.row(0)[0] = (i, each::sum_exp(self.level, x, x[i]).ln());
            });
            for (i, t) in target[..op.rows * op.targets].iter().enumerate() {
                let (r, t) = (i / op.targets, *t as usize);
                let (best, log_sum) = best[r];
                let x = &logits[r * op.vocab..][..op.vocab];
                out[i] = (f64::from(x[t] - x[best]) - log_sum) as f32;
                greedy[i] = u32::from(t == best);
            }
        });
        Ok(())
    }
}
