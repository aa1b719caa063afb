//! A backend that watches another one: it adds up the squares of what each matrix is multiplied with, column by column.
//!
//! Fused ops run as their definitions, so that every product passes here with its input in a buffer. Each input is read back to the
//! host: right for a calibration, too slow for anything else.

use crate::{
    backend::{Backend, Out, Shaped},
    error::{Error, Result},
    files::{config::Config, quantize::Inputs, weights::Tensor},
    ops::{
        Act, AddRmsNorm, Argmax, AttnDecode, AttnPrefill, Element, Embed, Gemm, Gemv, HeadNorm, KvAppend, LogProb,
        RmsNorm, Rope, Sample, StreamRead, Swiglu,
    },
};
use half::bf16;
use rayon::prelude::*;
use std::sync::{Mutex, PoisonError};

/// Columns that a thread adds up.
const COLUMNS: usize = 256;

/// `B`, watched.
pub struct Observe<B: Backend> {
    inner: B,
    seen: Mutex<Vec<Seen>>,
}

/// What one weight was multiplied with.
struct Seen {
    /// The tensors that it is made of.
    names: Vec<String>,
    /// Sums of squares, a column each; empty before the first product.
    squares: Vec<f64>,
    rows: usize,
}

/// A weight, and which of the watched ones it is.
pub struct Watched<B: Backend> {
    inner: B::Weight,
    index: usize,
}

impl<B: Backend> Shaped for Watched<B> {
    fn shape(&self) -> (usize, usize) {
        self.inner.shape()
    }
}

impl<B: Backend> Observe<B> {
    /// Nothing seen yet.
    pub fn new(inner: B) -> Self {
        Observe { inner, seen: Mutex::default() }
    }

    /// The mean squares of all inputs so far, by the names of the tensors.
    ///
    /// # Errors
    /// `Input` where an input was no finite number.
    pub fn inputs(&self) -> Result<Inputs> {
        let mut inputs = Inputs::default();
        for Seen { names, squares, rows } in &*self.seen.lock().unwrap_or_else(PoisonError::into_inner) {
            let means: Vec<f32> = squares.iter().map(|sum| (sum / *rows as f64) as f32).collect();
            if let Some(i) = means.iter().position(|mean| !mean.is_finite()) {
                let what = "is not a finite number on this text: the model's weights are broken, or beyond what bf16 can compute with";
                return Err(Error::Input(format!("input {i} of {} {what}", names.join(", "))));
            }
            if !means.is_empty() {
                names.iter().for_each(|name| inputs.insert(name, means.clone()));
            }
        }
        Ok(inputs)
    }

    /// Adds the first `rows` rows of `x`, which is multiplied with `w`.
    pub fn see(&self, rows: usize, x: &B::Buf<B::Act>, w: &Watched<B>) -> Result<()> {
        let cols = w.shape().1;
        let mut acts = vec![B::Act::from_f32(0.0); rows * cols];
        self.inner.read(&mut acts, x, 0)?;
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = &mut seen[w.index];
        seen.squares.resize(cols, 0.0);
        seen.rows += rows;
        // row after row in each column: the order of a sum does not depend on threads
        seen.squares.par_chunks_mut(COLUMNS).enumerate().for_each(|(i, sums)| {
            for row in acts.chunks_exact(cols) {
                let row = &row[i * COLUMNS..];
                sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(x.to_f32()).powi(2));
            }
        });
        Ok(())
    }

    fn watched(&self, inner: B::Weight, names: Vec<String>) -> Watched<B> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.push(Seen { names, squares: Vec::new(), rows: 0 });
        Watched { inner, index: seen.len() - 1 }
    }
}

/// The same epilogue for the backend that is watched.
fn epilogue<'a, B: Backend>(out: Out<'a, Observe<B>>) -> Out<'a, B> {
    match out {
        Out::Store(out) => Out::Store(out),
        Out::Add(out) => Out::Add(out),
        Out::F32(out) => Out::F32(out),
    }
}

impl<B: Backend> Backend for Observe<B> {
    type Act = B::Act;
    type Buf<T: Element> = B::Buf<T>;
    type Weight = Watched<B>;
    type Graphs = ();
    type Outbox = B::Outbox;
    const LOOKAHEAD: usize = 0;
    const CHUNK: usize = B::CHUNK;
    const IS_GPU: bool = B::IS_GPU;
    const OVERCOMMITS: bool = B::OVERCOMMITS;

    fn name(&self) -> String {
        format!("{}, watched", self.inner.name())
    }
    fn free_memory(&self) -> Result<Option<u64>> {
        self.inner.free_memory()
    }
    fn supports(&self, config: &Config) -> Result<()> {
        self.inner.supports(config)
    }
    fn workspace_bytes(config: &Config, rows: usize) -> u64 {
        B::workspace_bytes(config, rows)
    }
    fn expect_rows(&self, config: &Config, rows: usize) -> Result<()> {
        self.inner.expect_rows(config, rows)
    }
    fn alloc<T: Element>(&self, len: usize) -> Result<B::Buf<T>> {
        self.inner.alloc(len)
    }
    fn write<T: Element>(&self, dst: &mut B::Buf<T>, at: usize, src: &[T]) -> Result<()> {
        self.inner.write(dst, at, src)
    }
    fn copy<T: Element>(&self, buf: &mut B::Buf<T>, to: usize, from: usize, len: usize) -> Result<()> {
        self.inner.copy(buf, to, from, len)
    }
    fn read<T: Element>(&self, dst: &mut [T], src: &B::Buf<T>, at: usize) -> Result<()> {
        self.inner.read(dst, src, at)
    }
    fn in_file(t: &Tensor) -> u64 {
        B::in_file(t)
    }
    fn weights(&self, stacks: &[Vec<Tensor>], progress: &mut dyn FnMut(u64)) -> Result<Vec<Watched<B>>> {
        let names = |stack: &Vec<Tensor>| stack.iter().map(|t| t.name().to_string()).collect();
        let weights = self.inner.weights(stacks, progress)?.into_iter().zip(stacks);
        Ok(weights.map(|(weight, stack)| self.watched(weight, names(stack))).collect())
    }
    fn weight_from(&self, rows: usize, cols: usize, data: &[bf16]) -> Result<Watched<B>> {
        Ok(self.watched(self.inner.weight_from(rows, cols, data)?, Vec::new()))
    }
    fn set_bias(&self, w: &mut Watched<B>, bias: &[f32]) -> Result<()> {
        self.inner.set_bias(&mut w.inner, bias)
    }
    fn synchronize(&self) -> Result<()> {
        self.inner.synchronize()
    }
    fn outbox(&self, sequences: usize) -> Result<B::Outbox> {
        self.inner.outbox(sequences)
    }
    fn take(&self, outbox: &mut B::Outbox, sequence: usize) -> Result<u32> {
        self.inner.take(outbox, sequence)
    }
    fn skip(&self, outbox: &mut B::Outbox, sequence: usize, n: usize) {
        self.inner.skip(outbox, sequence, n);
    }

    fn embed(&self, op: &Embed, x: &mut B::Buf<B::Act>, tokens: &B::Buf<u32>, table: &Watched<B>) -> Result<()> {
        self.inner.embed(op, x, tokens, &table.inner)
    }
    fn rms_norm(&self, op: &RmsNorm, out: &mut B::Buf<B::Act>, x: &B::Buf<B::Act>, w: &Watched<B>) -> Result<()> {
        self.inner.rms_norm(op, out, x, &w.inner)
    }
    fn add_rms_norm(
        &self,
        op: &AddRmsNorm,
        out: &mut B::Buf<B::Act>,
        x: &mut B::Buf<B::Act>,
        d: &B::Buf<B::Act>,
        w: &Watched<B>,
    ) -> Result<()> {
        self.inner.add_rms_norm(op, out, x, d, &w.inner)
    }
    fn gemv(&self, op: &Gemv, out: Out<'_, Self>, x: &B::Buf<B::Act>, w: &Watched<B>) -> Result<()> {
        self.see(op.rows, x, w)?;
        self.inner.gemv(op, epilogue(out), x, &w.inner)
    }
    fn gemm(&self, op: &Gemm, out: Out<'_, Self>, x: &B::Buf<B::Act>, w: &Watched<B>) -> Result<()> {
        self.see(op.rows, x, w)?;
        self.inner.gemm(op, epilogue(out), x, &w.inner)
    }
    fn head_norm(&self, op: &HeadNorm, qkv: &mut B::Buf<B::Act>, gains: &Watched<B>) -> Result<()> {
        self.inner.head_norm(op, qkv, &gains.inner)
    }
    fn rope(&self, op: &Rope, qkv: &mut B::Buf<B::Act>, pos: &B::Buf<u32>, table: &B::Buf<f32>) -> Result<()> {
        self.inner.rope(op, qkv, pos, table)
    }
    fn kv_append(
        &self,
        op: &KvAppend,
        k: &mut B::Buf<B::Act>,
        v: &mut B::Buf<B::Act>,
        qkv: &B::Buf<B::Act>,
        pos: &B::Buf<u32>,
        pages: &B::Buf<u32>,
    ) -> Result<()> {
        self.inner.kv_append(op, k, v, qkv, pos, pages)
    }
    fn attn_prefill(
        &self,
        op: &AttnPrefill,
        out: &mut B::Buf<B::Act>,
        qkv: &B::Buf<B::Act>,
        k: &B::Buf<B::Act>,
        v: &B::Buf<B::Act>,
        pos: &B::Buf<u32>,
        pages: &B::Buf<u32>,
    ) -> Result<()> {
        self.inner.attn_prefill(op, out, qkv, k, v, pos, pages)
    }
    fn attn_decode(
        &self,
        op: &AttnDecode,
        out: &mut B::Buf<B::Act>,
        part: &mut B::Buf<f32>,
        arrived: &mut B::Buf<u32>,
        qkv: &B::Buf<B::Act>,
        k: &B::Buf<B::Act>,
        v: &B::Buf<B::Act>,
        pos: &B::Buf<u32>,
        pages: &B::Buf<u32>,
    ) -> Result<()> {
        self.inner.attn_decode(op, out, part, arrived, qkv, k, v, pos, pages)
    }
    fn swiglu(&self, op: &Swiglu, hb: &mut B::Buf<B::Act>, gate_up: &B::Buf<B::Act>) -> Result<()> {
        self.inner.swiglu(op, hb, gate_up)
    }
    fn argmax(
        &self,
        op: &Argmax,
        token: &mut B::Buf<u32>,
        pos: &mut B::Buf<u32>,
        scratch: &mut B::Buf<f32>,
        outbox: &mut B::Outbox,
        logits: &B::Buf<f32>,
    ) -> Result<()> {
        self.inner.argmax(op, token, pos, scratch, outbox, logits)
    }
    fn sample(
        &self,
        op: &Sample,
        token: &mut B::Buf<u32>,
        pos: &mut B::Buf<u32>,
        params: &mut B::Buf<u32>,
        history: &mut B::Buf<u32>,
        scratch: &mut B::Buf<f32>,
        outbox: &mut B::Outbox,
        bias: &B::Buf<f32>,
        mask: &B::Buf<u32>,
        logits: &B::Buf<f32>,
    ) -> Result<()> {
        self.inner.sample(op, token, pos, params, history, scratch, outbox, bias, mask, logits)
    }
    fn log_prob(
        &self,
        op: &LogProb,
        out: &mut B::Buf<f32>,
        greedy: &mut B::Buf<u32>,
        logits: &B::Buf<f32>,
        target: &B::Buf<u32>,
    ) -> Result<()> {
        self.inner.log_prob(op, out, greedy, logits, target)
    }
    fn stream_read(&self, op: &StreamRead, out: &mut B::Buf<u32>, x: &B::Buf<u32>) -> Result<()> {
        self.inner.stream_read(op, out, x)
    }
}
