//! The boundary between the model and the hardware: the ops of this architecture, with their shapes.
//!
//! Five implementers, and one for tests (`cpu/tests/definition.rs`): [`crate::backend::cpu::Cpu`] (the reference), `cuda::Cuda` (kernels), [`crate::backend::count::Count`] (bytes and flops),
//! [`crate::backend::lockstep::Lockstep`] (two backends side by side) and [`crate::backend::observe::Observe`] (another one, watched).
//!
//! Contract: an op allocates nothing, synchronises nothing and reads nothing back, so that a sequence of ops can be captured
//! in a CUDA graph. What changes from step to step (token, position, sampler state) lives in device buffers. An output is a
//! `&mut`, an input a `&`, so Rust's borrow rules state which argument a kernel writes.
//!
//! A fused op does the work of several ops in one kernel. It is a provided method whose default body is its definition.
//! A backend that overrides it states in its kernel which roundings the fusion removes.

use crate::{
    error::Result,
    files::{config::Config, weights::Tensor},
    ops::{
        Act, AddRmsNorm, Argmax, AttnDecode, AttnPrefill, Element, Embed, Gemm, Gemv, HeadNorm, KvAppend, LogProb,
        NormGateUp, NormHead, NormHeadArgmax, NormQkvRopeAppend, RmsNorm, Rope, Sample, StreamRead, Swiglu,
    },
};
use half::bf16;

pub mod count;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod lockstep;
pub mod observe;
pub mod train;

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

/// Where the result of a matrix product goes, and what happens to it on the way: the epilogue.
pub enum Out<'a, B: Backend> {
    /// Rounded to the activation type.
    Store(&'a mut B::Buf<B::Act>),
    /// Added in f32 to what is there, then rounded once: a residual connection.
    Add(&'a mut B::Buf<B::Act>),
    /// Kept in f32: logits.
    F32(&'a mut B::Buf<f32>),
}

/// Weights on a backend know their shape.
pub trait Shaped: Send + Sync {
    /// `(rows, cols)`; a vector is one row.
    fn shape(&self) -> (usize, usize);
}

/// What argmax and sampler keep on the device between steps, for each sequence; created by a session.
pub struct SamplerState<B: Backend> {
    /// See [`crate::ops::sample::Params`]: temperature, filters, penalties, seed and draw counter, as 32-bit words. [sequences, SAMPLE_PARAMS]
    pub params: B::Buf<u32>,
    /// Per token id: how often it was generated, with the top bit set when it is in the prompt. [sequences, vocab]
    pub history: B::Buf<u32>,
    /// Added to the logits; `-inf` forbids. [sequences, vocab]
    pub bias: B::Buf<f32>,
    /// A bit for each token id: whether it is allowed. Used if the parameters say so. [sequences, ceil(vocab / 32)]
    pub mask: B::Buf<u32>,
    /// Of `sample` and `argmax`; the words of [`Argmax::scratch`] are 0 before and after each of them. [[`Sample::scratch`]]
    pub scratch: B::Buf<f32>,
    /// The chosen tokens on their way to the host.
    pub outbox: B::Outbox,
}

impl<B: Backend> SamplerState<B> {
    /// Buffers for this many sequences, all zeros.
    pub fn new(b: &B, vocab: usize, sequences: usize) -> Result<Self> {
        Ok(SamplerState {
            params: b.alloc(sequences * crate::tiles::SAMPLE_PARAMS as usize)?,
            history: b.alloc(sequences * vocab)?,
            bias: b.alloc(sequences * vocab)?,
            mask: b.alloc(sequences * vocab.div_ceil(32))?,
            scratch: b.alloc(Sample::scratch(DECODE_ROWS, vocab))?, // one sequence may have all rows, with guesses
            outbox: b.outbox(sequences)?,
        })
    }

    /// Bytes of the buffers. An outbox, which has one word on the device for each sequence, is not counted.
    pub fn bytes(vocab: usize, sequences: usize) -> u64 {
        let of_sequence = crate::tiles::SAMPLE_PARAMS as usize + 2 * vocab + vocab.div_ceil(32);
        4 * (sequences * of_sequence + Sample::scratch(DECODE_ROWS, vocab)) as u64
    }
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
    /// Chosen tokens of each sequence on their way to the host, oldest first; `argmax` and `sample` append to it. See
    /// [`Backend::take`].
    type Outbox: Send;

    /// How many steps a session enqueues ahead of the token that it waits for.
    const LOOKAHEAD: usize;
    /// Rows of a chunk of a prompt.
    const CHUNK: usize;
    /// Whether it is a GPU.
    const IS_GPU: bool;
    /// It reads single rows of a quantized matrix.
    const KEEPS_EMBED: bool = false;
    /// A buffer takes memory only as far as it is written.
    const OVERCOMMITS: bool = false;

    /// Name of the device, for people.
    fn name(&self) -> String;
    /// Bytes that can still be allocated, where that is limited.
    fn free_memory(&self) -> Result<Option<u64>>;
    /// Checks that its ops take the sizes of a model, before anything is loaded.
    ///
    /// # Errors
    /// `Op` names the op and what sizes it takes.
    fn supports(&self, _config: &Config) -> Result<()> {
        Ok(())
    }
    /// Bytes of its own memory that products of up to `rows` rows of a model need.
    fn workspace_bytes(_config: &Config, _rows: usize) -> u64 {
        0
    }
    /// Products of up to `rows` rows will come: the backend may begin to prepare for them.
    fn expect_rows(&self, _config: &Config, _rows: usize) -> Result<()> {
        Ok(())
    }
    /// A buffer of zeros.
    fn alloc<T: Element>(&self, len: usize) -> Result<Self::Buf<T>>;
    /// Writes `src` to `dst[at..]`.
    fn write<T: Element>(&self, dst: &mut Self::Buf<T>, at: usize, src: &[T]) -> Result<()>;
    /// Copies `buf[from..from + len]` to `buf[to..]`; the ranges do not overlap.
    fn copy<T: Element>(&self, buf: &mut Self::Buf<T>, to: usize, from: usize, len: usize) -> Result<()>;
    /// Reads `src[at..]` into `dst`; waits for the ops that write it.
    fn read<T: Element>(&self, dst: &mut [T], src: &Self::Buf<T>, at: usize) -> Result<()>;
    /// Whether a stack of tensors of which some are quantized can go to [`Backend::weights`] as it is, and the bytes of it there then. All others
    /// are [plain](Tensor::is_plain).
    fn keeps(_stack: &[Tensor]) -> Option<u64> {
        None
    }
    /// Bytes of a tensor, [kept](Backend::keeps) or plain, that are read where they lie in its mapped file and need no memory; of a
    /// plain one all count as 16 bits an element, or none.
    fn in_file(_tensor: &Tensor) -> u64 {
        0
    }
    /// Makes a matrix from each stack of tensors, by rows, converted to what the backend computes with; `progress` gets
    /// the bytes of the files as they are done.
    fn weights(&self, stacks: &[Vec<Tensor>], progress: &mut dyn FnMut(u64)) -> Result<Vec<Self::Weight>>;
    /// Gives a matrix a bias for each of its rows, which every product with it adds.
    fn set_bias(&self, w: &mut Self::Weight, bias: &[f32]) -> Result<()>;
    /// A matrix [rows, cols] of given values.
    fn weight_from(&self, rows: usize, cols: usize, data: &[bf16]) -> Result<Self::Weight>;
    /// Waits until everything enqueued is done, and all that ops need is loaded.
    fn synchronize(&self) -> Result<()>;

    /// An empty outbox for this many sequences.
    fn outbox(&self, sequences: usize) -> Result<Self::Outbox>;
    /// Waits for a sequence's oldest token and takes it out.
    ///
    /// # Errors
    /// When the device fails, or has nothing left to do and no token came.
    fn take(&self, outbox: &mut Self::Outbox, sequence: usize) -> Result<u32>;
    /// Drops the oldest `n` tokens of a sequence, which need not have arrived yet.
    fn skip(&self, outbox: &mut Self::Outbox, sequence: usize, n: usize);

    /// Runs a sequence of ops that is always the same for the same `key`, so a backend may record it once and replay
    /// it.
    fn replay(&self, _graphs: &mut Self::Graphs, _key: usize, ops: &mut dyn FnMut() -> Result<()>) -> Result<()> {
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
    /// `out (+)= x w^T`, and the bias of `w`, for at most [`DECODE_ROWS`] rows.
    fn gemv(&self, op: &Gemv, out: Out<'_, Self>, x: &Self::Buf<Self::Act>, w: &Self::Weight) -> Result<()>;
    /// `out (+)= x w^T`, and the bias of `w`.
    fn gemm(&self, op: &Gemm, out: Out<'_, Self>, x: &Self::Buf<Self::Act>, w: &Self::Weight) -> Result<()>;
    /// Norms the q and k heads of `qkv` in place.
    fn head_norm(&self, op: &HeadNorm, qkv: &mut Self::Buf<Self::Act>, gains: &Self::Weight) -> Result<()>;
    /// Rotates the q and k heads of `qkv` in place, half-split.
    fn rope(
        &self,
        op: &Rope,
        qkv: &mut Self::Buf<Self::Act>,
        pos: &Self::Buf<u32>,
        table: &Self::Buf<f32>,
    ) -> Result<()>;
    /// Copies the k and v heads of `qkv` to their places in the cache, whose table is `pages`.
    fn kv_append(
        &self,
        op: &KvAppend,
        k: &mut Self::Buf<Self::Act>,
        v: &mut Self::Buf<Self::Act>,
        qkv: &Self::Buf<Self::Act>,
        pos: &Self::Buf<u32>,
        pages: &Self::Buf<u32>,
    ) -> Result<()>;
    /// Causal attention of many consecutive positions.
    #[expect(clippy::too_many_arguments, reason = "one argument a buffer, named as in the kernel")]
    fn attn_prefill(
        &self,
        op: &AttnPrefill,
        out: &mut Self::Buf<Self::Act>,
        qkv: &Self::Buf<Self::Act>,
        k: &Self::Buf<Self::Act>,
        v: &Self::Buf<Self::Act>,
        pos: &Self::Buf<u32>,
        pages: &Self::Buf<u32>,
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
        pages: &Self::Buf<u32>,
    ) -> Result<()>;
    /// `hb = silu(gate) * up`
    fn swiglu(&self, op: &Swiglu, hb: &mut Self::Buf<Self::Act>, gate_up: &Self::Buf<Self::Act>) -> Result<()>;
    /// `token[r] = argmax(logits[r])` and `pos[r] += 1`; the token also goes to its sequence's outbox. Rows after a wrong guess are
    /// left out, see [`Argmax`]. `scratch` as in [`SamplerState`].
    fn argmax(
        &self,
        op: &Argmax,
        token: &mut Self::Buf<u32>,
        pos: &mut Self::Buf<u32>,
        scratch: &mut Self::Buf<f32>,
        outbox: &mut Self::Outbox,
        logits: &Self::Buf<f32>,
    ) -> Result<()>;
    /// Draws `token[r]` from `logits[r]` as the sequence's `params` say, and `pos[r] += 1`; the token also goes to the
    /// sequence's outbox. Updates history and draw counter. Rows after a wrong guess are left out, see [`Sample`].
    #[expect(clippy::too_many_arguments, reason = "one argument a buffer, named as in the kernel")]
    fn sample(
        &self,
        op: &Sample,
        token: &mut Self::Buf<u32>,
        pos: &mut Self::Buf<u32>,
        params: &mut Self::Buf<u32>,
        history: &mut Self::Buf<u32>,
        scratch: &mut Self::Buf<f32>,
        outbox: &mut Self::Outbox,
        bias: &Self::Buf<f32>,
        mask: &Self::Buf<u32>,
        logits: &Self::Buf<f32>,
    ) -> Result<()>;
    /// `out = ln softmax(logits)[target]`, and whether each target is the greedy choice.
    fn log_prob(
        &self,
        op: &LogProb,
        out: &mut Self::Buf<f32>,
        greedy: &mut Self::Buf<u32>,
        logits: &Self::Buf<f32>,
        target: &Self::Buf<u32>,
    ) -> Result<()>;

    /// Reads `x` as fast as memory allows; see [`StreamRead`].
    fn stream_read(&self, op: &StreamRead, out: &mut Self::Buf<u32>, x: &Self::Buf<u32>) -> Result<()>;

    /// `out (+)= x w^T`, and the bias of `w`: `x` [rows, k], `w` [n, k], `out` [rows, n].
    fn matmul(&self, rows: usize, out: Out<'_, Self>, x: &Self::Buf<Self::Act>, w: &Self::Weight) -> Result<()> {
        let (n, k) = w.shape();
        if rows <= DECODE_ROWS {
            self.gemv(&Gemv { rows, n, k }, out, x, w)
        } else {
            self.gemm(&Gemm { rows, n, k }, out, x, w)
        }
    }

    /// `qkv = norm(x) w^T`, and the bias of `w`; q and k normed with the gains `heads` and rotated, k and v appended to the cache.
    /// `xb` and `arrived` are scratch, the second 0 before and after.
    #[expect(clippy::too_many_arguments, reason = "one argument a buffer, named as in the kernel")]
    fn norm_qkv_rope_append(
        &self,
        op: &NormQkvRopeAppend,
        qkv: &mut Self::Buf<Self::Act>,
        k: &mut Self::Buf<Self::Act>,
        v: &mut Self::Buf<Self::Act>,
        xb: &mut Self::Buf<Self::Act>,
        _arrived: &mut Self::Buf<u32>,
        x: &Self::Buf<Self::Act>,
        pos: &Self::Buf<u32>,
        pages: &Self::Buf<u32>,
        gain: &Self::Weight,
        w: &Self::Weight,
        heads: Option<&Self::Weight>,
        table: &Self::Buf<f32>,
    ) -> Result<()> {
        definition::norm_qkv_rope_append(self, op, qkv, k, v, xb, x, pos, pages, gain, w, heads, table)
    }

    /// `hb = silu(norm(x) w_gate^T) * (norm(x) w_up^T)`, `w` is gate over up. `xb` and `gate_up` are scratch.
    #[expect(clippy::too_many_arguments, reason = "one argument a buffer, named as in the kernel")]
    fn norm_gate_up(
        &self,
        op: &NormGateUp,
        hb: &mut Self::Buf<Self::Act>,
        xb: &mut Self::Buf<Self::Act>,
        gate_up: &mut Self::Buf<Self::Act>,
        x: &Self::Buf<Self::Act>,
        gain: &Self::Weight,
        w: &Self::Weight,
    ) -> Result<()> {
        definition::norm_gate_up(self, op, hb, xb, gate_up, x, gain, w)
    }

    /// `logits = norm(x[first..]) w^T`. `xb` is scratch.
    fn norm_head(
        &self,
        op: &NormHead,
        logits: &mut Self::Buf<f32>,
        xb: &mut Self::Buf<Self::Act>,
        x: &Self::Buf<Self::Act>,
        gain: &Self::Weight,
        w: &Self::Weight,
    ) -> Result<()> {
        definition::norm_head(self, op, logits, xb, x, gain, w)
    }

    /// `token[r] = argmax(norm(x[r]) w^T)` and `pos[r] += 1`; the tokens also go to the outbox. `scratch` as in
    /// [`SamplerState`]; `logits` and `xb` are scratch.
    #[expect(clippy::too_many_arguments, reason = "one argument a buffer, named as in the kernel")]
    fn norm_head_argmax(
        &self,
        op: &NormHeadArgmax,
        token: &mut Self::Buf<u32>,
        pos: &mut Self::Buf<u32>,
        scratch: &mut Self::Buf<f32>,
        outbox: &mut Self::Outbox,
        logits: &mut Self::Buf<f32>,
        xb: &mut Self::Buf<Self::Act>,
        x: &Self::Buf<Self::Act>,
        gain: &Self::Weight,
        w: &Self::Weight,
    ) -> Result<()> {
        definition::norm_head_argmax(self, op, token, pos, scratch, outbox, logits, xb, x, gain, w)
    }
}

pub mod definition {
    //! The fused ops written with the other ops. A backend that overrides one is compared with this by `tests/ops` and
    //! by [`crate::backend::lockstep`].
    use super::{Backend, NormGateUp, NormHead, NormHeadArgmax, NormQkvRopeAppend, Out, Result};

    /// `qkv = norm(x) w^T`, and the bias of `w`; q and k normed and rotated, k and v appended to the cache.
    #[expect(clippy::too_many_arguments, reason = "one argument a buffer, named as in the kernel")]
    pub fn norm_qkv_rope_append<B: Backend>(
        b: &B,
        op: &NormQkvRopeAppend,
        qkv: &mut B::Buf<B::Act>,
        k: &mut B::Buf<B::Act>,
        v: &mut B::Buf<B::Act>,
        xb: &mut B::Buf<B::Act>,
        x: &B::Buf<B::Act>,
        pos: &B::Buf<u32>,
        pages: &B::Buf<u32>,
        gain: &B::Weight,
        w: &B::Weight,
        heads: Option<&B::Weight>,
        table: &B::Buf<f32>,
    ) -> Result<()> {
        b.rms_norm(&op.norm(), xb, x, gain)?;
        b.matmul(op.rows, Out::Store(qkv), xb, w)?;
        if let Some(gains) = heads {
            b.head_norm(&op.heads(), qkv, gains)?;
        }
        b.rope(&op.rope(), qkv, pos, table)?;
        b.kv_append(&op.append(), k, v, qkv, pos, pages)
    }

    /// `hb = silu(norm(x) w_gate^T) * (norm(x) w_up^T)`
    #[expect(clippy::too_many_arguments, reason = "one argument a buffer, named as in the kernel")]
    pub fn norm_gate_up<B: Backend>(
        b: &B,
        op: &NormGateUp,
        hb: &mut B::Buf<B::Act>,
        xb: &mut B::Buf<B::Act>,
        gate_up: &mut B::Buf<B::Act>,
        x: &B::Buf<B::Act>,
        gain: &B::Weight,
        w: &B::Weight,
    ) -> Result<()> {
        b.rms_norm(&op.norm(), xb, x, gain)?;
        b.matmul(op.rows, Out::Store(gate_up), xb, w)?;
        b.swiglu(&op.swiglu(), hb, gate_up)
    }

    /// `logits = norm(x[first..]) w^T`
    pub fn norm_head<B: Backend>(
        b: &B,
        op: &NormHead,
        logits: &mut B::Buf<f32>,
        xb: &mut B::Buf<B::Act>,
        x: &B::Buf<B::Act>,
        gain: &B::Weight,
        w: &B::Weight,
    ) -> Result<()> {
        b.rms_norm(&op.norm(), xb, x, gain)?;
        b.matmul(op.rows, Out::F32(logits), xb, w)
    }

    /// `token[r] = argmax(norm(x[r]) w^T)`, `pos[r] += 1`, and the tokens to the outbox.
    #[expect(clippy::too_many_arguments, reason = "one argument a buffer, named as in the kernel")]
    pub fn norm_head_argmax<B: Backend>(
        b: &B,
        op: &NormHeadArgmax,
        token: &mut B::Buf<u32>,
        pos: &mut B::Buf<u32>,
        scratch: &mut B::Buf<f32>,
        outbox: &mut B::Outbox,
        logits: &mut B::Buf<f32>,
        xb: &mut B::Buf<B::Act>,
        x: &B::Buf<B::Act>,
        gain: &B::Weight,
        w: &B::Weight,
    ) -> Result<()> {
        b.norm_head(&op.head(), logits, xb, x, gain, w)?;
        b.argmax(&op.argmax(), token, pos, scratch, outbox, logits)
    }
}
