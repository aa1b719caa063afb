//! The boundary between the model and the hardware: the ops of this architecture, with shapes.
//!
//! Four implementers: [`crate::cpu::Cpu`] (the reference), `cuda::Cuda` (kernels), [`crate::count::Count`] (bytes and flops)
//! and [`crate::lockstep::Lockstep`] (two backends side by side).
//!
//! Contract: an op allocates nothing, synchronises nothing and reads nothing back, so that a sequence of ops can be captured
//! in a CUDA graph. What changes from step to step (token, position, sampler state) lives in device buffers. An output is a
//! `&mut`, an input a `&`, so Rust's borrow rules state which argument a kernel writes.
//!
//! A fused op is a provided method whose default body is its definition. A backend that overrides it states in its kernel
//! which roundings the fusion removes.

use crate::{
    config::Config,
    error::Result,
    kv::Kv,
    model::{Model, Scratch},
    ops::{
        Act, AddRmsNorm, Argmax, AttnDecode, AttnPrefill, Element, Embed, Gemm, Gemv, KvAppend, RmsNorm, Rope, Sample,
        Swiglu,
    },
    weights::Tensor,
};
use half::bf16;

/// Most rows that the gemv and the decode attention take; more rows go to the gemm and the prefill attention.
pub const DECODE_ROWS: usize = crate::tiles::DECODE_ROWS as usize;

/// A buffer in the memory of a backend.
pub trait Buffer: Send + Sync {
    /// Elements.
    fn len(&self) -> usize;
    /// No elements.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<T: Element> Buffer for Vec<T> {
    fn len(&self) -> usize {
        self.len()
    }
}

/// Where a matrix product goes, and what happens to it on the way: its epilogue.
pub enum Out<'a, B: Backend> {
    /// Rounded to the activation type.
    Store(&'a mut B::Buf<B::Act>),
    /// Added to what is there in f32, then rounded once: a residual connection.
    Add(&'a mut B::Buf<B::Act>),
    /// Kept in f32: logits.
    F32(&'a mut B::Buf<f32>),
}

/// A model's weights on a backend carry their shape.
pub trait Shaped: Send + Sync {
    /// `(rows, cols)`; a vector is one row.
    fn shape(&self) -> (usize, usize);
}

/// What the sampler keeps on the device between steps; made by a session.
pub struct SamplerState<B: Backend> {
    /// See [`crate::ops::sample::Params`]: temperature, filters, penalties, seed and draw counter, as 32-bit words.
    pub params: B::Buf<u32>,
    /// Per token id: how often it was generated, with the top bit set when it is in the prompt. `[vocab]`
    pub history: B::Buf<u32>,
    /// Added to the logits; `-inf` forbids. `[vocab]`
    pub bias: B::Buf<f32>,
    /// Adjusted logits of `sample`, partial results of `argmax`. Its first word is 0 before and after each of them.
    /// `vocab` words, or [`Argmax::scratch`] if more.
    pub scratch: B::Buf<f32>,
}

/// The ops, and the memory they work on.
pub trait Backend: Sized + Send + Sync + 'static {
    /// Type of activations and of the KV cache.
    type Act: Act;
    /// Memory of the backend.
    type Buf<T: Element>: Buffer;
    /// A weight matrix or vector.
    type Weight: Shaped;
    /// Captured steps of one session; see [`Backend::replay`].
    type Graphs: Default + Send;
    /// A value on its way to the host; see [`Backend::fetch`].
    type Fetch: Send;

    /// Steps that a session enqueues ahead of the token it waits for.
    const LOOKAHEAD: usize;
    /// Rows of a chunk of a prompt.
    const CHUNK: usize;
    /// It is a GPU.
    const IS_GPU: bool;

    /// Name of the device, for people.
    fn name(&self) -> String;
    /// Bytes that can still be allocated, where that is limited.
    fn free_memory(&self) -> Result<Option<u64>>;
    /// A buffer of zeros.
    fn alloc<T: Element>(&self, len: usize) -> Result<Self::Buf<T>>;
    /// Writes `src` to `dst[at..]`.
    fn write<T: Element>(&self, dst: &mut Self::Buf<T>, at: usize, src: &[T]) -> Result<()>;
    /// Reads `src[at..]` into `dst`; waits for the ops that write it.
    fn read<T: Element>(&self, dst: &mut [T], src: &Self::Buf<T>, at: usize) -> Result<()>;
    /// For each stack of tensors the matrix of them one below the other, converted to what the backend computes with;
    /// `progress` gets the bytes of the files as they are done.
    fn weights(&self, stacks: &[Vec<Tensor>], progress: &mut dyn FnMut(u64)) -> Result<Vec<Self::Weight>>;
    /// A matrix [rows, cols] of given values.
    fn weight_from(&self, rows: usize, cols: usize, data: &[bf16]) -> Result<Self::Weight>;
    /// Waits until everything enqueued is done, and all that ops need is loaded.
    fn synchronize(&self) -> Result<()>;

    /// Starts reading `src[0]`; the value is that of this point in the order of ops.
    fn fetch(&self, src: &Self::Buf<u32>) -> Result<Self::Fetch>;
    /// Waits for the value.
    fn fetched(&self, fetch: Self::Fetch) -> Result<u32>;

    /// Runs a sequence of ops that is the same each time for the same `key`; a backend may record it once and replay it.
    fn replay(&self, _graphs: &mut Self::Graphs, _key: usize, ops: impl FnOnce() -> Result<()>) -> Result<()> {
        ops()
    }

    /// A buffer with the content of `src`.
    fn upload<T: Element>(&self, src: &[T]) -> Result<Self::Buf<T>> {
        let mut buf = self.alloc(src.len())?;
        self.write(&mut buf, 0, src)?;
        Ok(buf)
    }
    /// The content of a buffer.
    fn download<T: Element>(&self, src: &Self::Buf<T>) -> Result<Vec<T>> {
        let mut v = vec![T::zeroed(); src.len()];
        self.read(&mut v, src, 0)?;
        Ok(v)
    }

    /// `x[r] = table[tokens[r]]`
    fn embed(
        &self,
        op: &Embed,
        x: &mut Self::Buf<Self::Act>,
        tokens: &Self::Buf<u32>,
        table: &Self::Weight,
    ) -> Result<()>;
    /// `out = norm(x) * w`
    fn rms_norm(
        &self,
        op: &RmsNorm,
        out: &mut Self::Buf<Self::Act>,
        x: &Self::Buf<Self::Act>,
        w: &Self::Weight,
    ) -> Result<()>;
    /// `x += d`, then `out = norm(x) * w`
    fn add_rms_norm(
        &self,
        op: &AddRmsNorm,
        out: &mut Self::Buf<Self::Act>,
        x: &mut Self::Buf<Self::Act>,
        d: &Self::Buf<Self::Act>,
        w: &Self::Weight,
    ) -> Result<()>;
    /// `out (+)= x w^T` for at most [`DECODE_ROWS`] rows.
    fn gemv(&self, op: &Gemv, out: Out<'_, Self>, x: &Self::Buf<Self::Act>, w: &Self::Weight) -> Result<()>;
    /// `out (+)= x w^T`
    fn gemm(&self, op: &Gemm, out: Out<'_, Self>, x: &Self::Buf<Self::Act>, w: &Self::Weight) -> Result<()>;
    /// Rotates the q and k heads of `qkv` in place, half-split.
    fn rope(
        &self,
        op: &Rope,
        qkv: &mut Self::Buf<Self::Act>,
        pos: &Self::Buf<u32>,
        table: &Self::Buf<f32>,
    ) -> Result<()>;
    /// Copies the k and v heads of `qkv` to their places in the cache.
    fn kv_append(
        &self,
        op: &KvAppend,
        k: &mut Self::Buf<Self::Act>,
        v: &mut Self::Buf<Self::Act>,
        qkv: &Self::Buf<Self::Act>,
        pos: &Self::Buf<u32>,
    ) -> Result<()>;
    /// Causal attention of many consecutive positions.
    fn attn_prefill(
        &self,
        op: &AttnPrefill,
        out: &mut Self::Buf<Self::Act>,
        qkv: &Self::Buf<Self::Act>,
        k: &Self::Buf<Self::Act>,
        v: &Self::Buf<Self::Act>,
        pos: &Self::Buf<u32>,
    ) -> Result<()>;
    /// Causal attention of at most [`DECODE_ROWS`] rows over a long cache, split by keys. `part` and `arrived` are scratch.
    #[expect(clippy::too_many_arguments, reason = "one argument a buffer, named as in the kernel")]
    fn attn_decode(
        &self,
        op: &AttnDecode,
        out: &mut Self::Buf<Self::Act>,
        part: &mut Self::Buf<f32>,
        arrived: &mut Self::Buf<u32>,
        qkv: &Self::Buf<Self::Act>,
        k: &Self::Buf<Self::Act>,
        v: &Self::Buf<Self::Act>,
        pos: &Self::Buf<u32>,
    ) -> Result<()>;
    /// `hb = silu(gate) * up`
    fn swiglu(&self, op: &Swiglu, hb: &mut Self::Buf<Self::Act>, gate_up: &Self::Buf<Self::Act>) -> Result<()>;
    /// `token[0] = argmax(logits[0])`, `pos[0] += 1`.
    fn argmax(
        &self,
        op: &Argmax,
        token: &mut Self::Buf<u32>,
        pos: &mut Self::Buf<u32>,
        state: &mut SamplerState<Self>,
        logits: &Self::Buf<f32>,
    ) -> Result<()>;
    /// `token[0]` drawn from `logits[0]` as the state says, `pos[0] += 1`; updates history and draw counter.
    fn sample(
        &self,
        op: &Sample,
        token: &mut Self::Buf<u32>,
        pos: &mut Self::Buf<u32>,
        state: &mut SamplerState<Self>,
        logits: &Self::Buf<f32>,
    ) -> Result<()>;

    /// `out (+)= x w^T`: `x` [rows, k], `w` [n, k], `out` [rows, n].
    fn matmul(&self, rows: usize, out: Out<'_, Self>, x: &Self::Buf<Self::Act>, w: &Self::Weight) -> Result<()> {
        let (n, k) = w.shape();
        if rows <= DECODE_ROWS {
            self.gemv(&Gemv { rows, n, k }, out, x, w)
        } else {
            self.gemm(&Gemm { rows, n, k }, out, x, w)
        }
    }

    /// `qkv = norm(x) wqkv^T`, q and k rotated, k and v appended to the cache.
    fn norm_qkv_rope_append(
        &self,
        m: &Model<Self>,
        s: &mut Scratch<Self>,
        kv: &mut Kv<Self>,
        l: usize,
        rows: usize,
    ) -> Result<()> {
        definition::norm_qkv_rope_append(self, m, s, kv, l, rows)
    }

    /// `att = attention(q, cache)`
    fn attn(
        &self,
        m: &Model<Self>,
        s: &mut Scratch<Self>,
        kv: &Kv<Self>,
        l: usize,
        rows: usize,
        kv_len: usize,
    ) -> Result<()> {
        definition::attn(self, m, s, kv, l, rows, kv_len)
    }

    /// `hb = silu(norm(x) w_gate^T) * (norm(x) w_up^T)`
    fn norm_gate_up(&self, m: &Model<Self>, s: &mut Scratch<Self>, l: usize, rows: usize) -> Result<()> {
        definition::norm_gate_up(self, m, s, l, rows)
    }
}

pub mod definition {
    //! What the fused ops compute, in terms of the others. A backend that overrides one is compared with this by
    //! [`crate::lockstep`].
    use super::{
        AttnDecode, AttnPrefill, Backend, Config, DECODE_ROWS, Kv, KvAppend, Model, Out, Result, Rope, Scratch, Swiglu,
    };

    /// `qkv = norm(x) wqkv^T`, q and k rotated, k and v appended to the cache.
    pub fn norm_qkv_rope_append<B: Backend>(
        b: &B,
        m: &Model<B>,
        s: &mut Scratch<B>,
        kv: &mut Kv<B>,
        l: usize,
        rows: usize,
    ) -> Result<()> {
        let Config { n_heads, n_kv_heads, head_dim, .. } = m.config;
        let w = &m.layers[l];
        b.rms_norm(&m.norm(rows, 0), &mut s.xb, &s.x, &w.attn_norm)?;
        b.matmul(rows, Out::Store(&mut s.qkv), &s.xb, &w.wqkv)?;
        let rope = Rope { rows, n_heads, n_kv_heads, head_dim, max_seq: m.max_seq };
        b.rope(&rope, &mut s.qkv, &s.pos, &m.rope_table)?;
        let append = KvAppend { rows, n_heads, n_kv_heads, head_dim, max_seq: kv.max_seq };
        b.kv_append(&append, &mut kv.k[l], &mut kv.v[l], &s.qkv, &s.pos)
    }

    /// `att = attention(q, cache)`
    pub fn attn<B: Backend>(
        b: &B,
        m: &Model<B>,
        s: &mut Scratch<B>,
        kv: &Kv<B>,
        l: usize,
        rows: usize,
        kv_len: usize,
    ) -> Result<()> {
        let Config { n_heads, n_kv_heads, head_dim, .. } = m.config;
        let (max_seq, k, v) = (kv.max_seq, &kv.k[l], &kv.v[l]);
        if rows <= DECODE_ROWS {
            let op = AttnDecode { rows, n_heads, n_kv_heads, head_dim, max_seq, kv_len };
            b.attn_decode(&op, &mut s.att, &mut s.attn_part, &mut s.attn_arrived, &s.qkv, k, v, &s.pos)
        } else {
            let op = AttnPrefill { rows, n_heads, n_kv_heads, head_dim, max_seq, kv_len };
            b.attn_prefill(&op, &mut s.att, &s.qkv, k, v, &s.pos)
        }
    }

    /// `hb = silu(norm(x) w_gate^T) * (norm(x) w_up^T)`
    pub fn norm_gate_up<B: Backend>(b: &B, m: &Model<B>, s: &mut Scratch<B>, l: usize, rows: usize) -> Result<()> {
        let w = &m.layers[l];
        b.rms_norm(&m.norm(rows, 0), &mut s.xb, &s.x, &w.ffn_norm)?;
        b.matmul(rows, Out::Store(&mut s.gate_up), &s.xb, &w.w_gate_up)?;
        b.swiglu(&Swiglu { rows, ffn_dim: m.config.ffn_dim }, &mut s.hb, &s.gate_up)
    }
}
