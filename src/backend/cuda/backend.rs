//! [`Backend`] for the GPU: memory, transfers, and each op's launch.

use super::{Buffer, Cuda, Graphs, Kind, Outbox, Weight, failed, packed, workspace};
use crate::{
    backend::{Backend, DECODE_ROWS, Out, definition},
    error::{Error, Result},
    files::{config::Config, weights::Tensor},
    ops::{
        AddRmsNorm, Argmax, AttnDecode, AttnPrefill, Element, Embed, Gemm, Gemv, HeadNorm, KvAppend, KvDtype, LogProb,
        NormGateUp, NormHead, NormHeadArgmax, NormQkvRopeAppend, PAGE, RmsNorm, Rope, Sample, StreamRead, Swiglu,
    },
};
use cudarc::driver::{CudaSlice, DevicePtr, DriverError, sys};
use half::bf16;
use std::marker::PhantomData;

impl Cuda {
    /// `len` values in memory that `alloc` gives for that many bytes.
    pub(super) fn buffer<T: Element>(
        &self,
        len: usize,
        alloc: impl FnOnce(usize) -> Result<CudaSlice<u8>, DriverError>,
    ) -> Result<Buffer<T>> {
        let bytes = (len * size_of::<T>()).max(1); // the driver refuses empty allocations
        let bytes = alloc(bytes).map_err(|e| match e {
            DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY) => {
                let free = self.free_memory().ok().flatten().unwrap_or(0);
                Error::Memory(format!("the GPU is out of memory: {bytes} bytes asked for, {free} free"))
            }
            e => failed(|| format!("allocating {bytes} bytes"))(e),
        })?;
        let address = bytes.device_ptr(&self.stream).0;
        Ok(Buffer { bytes, address, len, kind: PhantomData })
    }
}

impl Backend for Cuda {
    type Act = bf16;
    type Buf<T: Element> = Buffer<T>;
    type Weight = Weight;
    type Graphs = Graphs;
    type Outbox = Outbox;
    const LOOKAHEAD: usize = 2;
    const CHUNK: usize = 2048;
    const IS_GPU: bool = true;

    fn name(&self) -> String {
        self.info().name.clone()
    }

    fn free_memory(&self) -> Result<Option<u64>> {
        let (free, _) = self.context.mem_get_info().map_err(failed(|| "cuMemGetInfo".into()))?;
        Ok(Some(free as u64))
    }

    fn supports(&self, c: &Config) -> Result<()> {
        let &Config { dim, ffn_dim, vocab, n_heads, n_kv_heads, head_dim, max_seq, norm_eps: eps, .. } = c;
        let (rows, positions, any) = (DECODE_ROWS, max_seq, usize::MAX);
        let max_seq = max_seq.next_multiple_of(PAGE);
        let (kv_len, window, head_norm, kv) = (max_seq, max_seq, c.arch.qk_norm, KvDtype::Auto); // fp8 takes no other sizes
        AttnDecode { rows, n_heads, n_kv_heads, head_dim, max_seq, kv_len, window, kv }.check_kernel(any, any)?;
        let qkv =
            NormQkvRopeAppend { rows, dim, n_heads, n_kv_heads, head_dim, max_seq, positions, eps, head_norm, kv };
        let gains = head_norm.then_some((2, head_dim));
        qkv.check(any, any, any, any, any, any, any, dim, (qkv.qkv_dim(), dim), gains, any)?;
        NormGateUp { rows, dim, ffn_dim, eps }.check(any, any, dim, (2 * ffn_dim, dim))?;
        NormHead { rows, first: 0, dim, vocab, eps }.check(any, any, dim, (vocab, dim))
    }

    fn workspace_bytes(config: &Config, rows: usize) -> u64 {
        let (sums, counters) = workspace::most(config, rows);
        4 * (sums + counters) as u64
    }

    fn expect_rows(&self, config: &Config, rows: usize) -> Result<()> {
        self.begin_blas(rows);
        let (sums, counters) = workspace::most(config, rows);
        self.with_workspace(sums, counters, |_, _| Ok(()))
    }

    fn alloc<T: Element>(&self, len: usize) -> Result<Buffer<T>> {
        self.buffer(len, |bytes| self.stream.alloc_zeros(bytes))
    }

    fn write<T: Element>(&self, dst: &mut Buffer<T>, at: usize, src: &[T]) -> Result<()> {
        let src: &[u8] = bytemuck::cast_slice(src);
        let at = at * size_of::<T>();
        let mut dst = dst.bytes.try_slice_mut(at..at + src.len()).ok_or_else(|| Error::Op {
            op: "write",
            what: format!("{} bytes at {at} do not fit the buffer", src.len()),
        })?;
        self.stream.memcpy_htod(src, &mut dst).map_err(failed(|| format!("writing {} bytes", src.len())))
    }

    fn copy<T: Element>(&self, buf: &mut Buffer<T>, to: usize, from: usize, len: usize) -> Result<()> {
        let [to, from, len] = [to, from, len].map(|n| n * size_of::<T>());
        // two parts of one buffer: one is read, the other written
        let split = to.max(from);
        let fits = to.min(from) + len <= split && split + len <= buf.bytes.len();
        if !fits {
            let what = format!("{len} bytes from {from} to {to} overlap or do not fit the buffer");
            return Err(Error::Op { op: "copy", what });
        }
        let what = || failed(|| format!("copying {len} bytes on the GPU"));
        let (mut low, mut high) = buf.bytes.split_at_mut(split);
        match to < from {
            true => self.stream.memcpy_dtod(&high.slice(..len), &mut low.slice_mut(to..to + len)).map_err(what()),
            false => self.stream.memcpy_dtod(&low.slice(from..from + len), &mut high.slice_mut(..len)).map_err(what()),
        }
    }

    fn read<T: Element>(&self, dst: &mut [T], src: &Buffer<T>, at: usize) -> Result<()> {
        let dst: &mut [u8] = bytemuck::cast_slice_mut(dst);
        let (at, len) = (at * size_of::<T>(), dst.len());
        let src = src
            .bytes
            .try_slice(at..at + len)
            .ok_or_else(|| Error::Op { op: "read", what: format!("{len} bytes at {at} are beyond the buffer") })?;
        let what = || failed(move || format!("reading {len} bytes"));
        self.stream.memcpy_dtoh(&src, dst).map_err(what())?;
        self.stream.synchronize().map_err(what())
    }

    fn keeps(stack: &[Tensor]) -> Option<u64> {
        let rows: usize = stack.iter().map(Tensor::rows).sum();
        packed::kind(stack).map(|kind| kind.bytes(rows, stack[0].cols()) as u64)
    }

    fn weights(&self, stacks: &[Vec<Tensor>], progress: &mut dyn FnMut(u64)) -> Result<Vec<Weight>> {
        if stacks.iter().flatten().all(Tensor::is_plain) {
            return self.upload_weights(stacks, progress);
        }
        let one = |stack: &Vec<Tensor>| match packed::kind(stack) {
            Some(kind) => {
                let weight = self.packed(stack, kind)?;
                progress(stack.iter().map(Tensor::file_bytes).sum());
                Ok(weight)
            }
            None => {
                let what = format!("{stack:?} is neither plain nor of a kind that the kernels take");
                Err(Error::Op { op: "weights", what })
            }
        };
        stacks.iter().map(one).collect()
    }

    fn weight_from(&self, rows: usize, cols: usize, data: &[bf16]) -> Result<Weight> {
        Ok(Weight { data: self.upload(data)?, rows, cols, kind: Kind::Bf16, bias: None })
    }

    fn set_bias(&self, w: &mut Weight, bias: &[f32]) -> Result<()> {
        if bias.len() != w.rows {
            return Err(Error::Op {
                op: "weights",
                what: format!("a bias of {} values for {} rows", bias.len(), w.rows),
            });
        }
        w.bias = Some(self.upload(&bias.iter().copied().map(bf16::from_f32).collect::<Vec<_>>())?);
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        self.kernels.get()?; // loaded in the background
        self.stream.synchronize().map_err(failed(|| "waiting for the GPU".into()))
    }

    fn outbox(&self, sequences: usize) -> Result<Outbox> {
        self.new_outbox(sequences)
    }

    fn take(&self, outbox: &mut Outbox, sequence: usize) -> Result<u32> {
        self.take_token(outbox, sequence)
    }

    fn skip(&self, outbox: &mut Outbox, sequence: usize, n: usize) {
        Cuda::skip_tokens(outbox, sequence, n);
    }

    fn replay(&self, graphs: &mut Graphs, key: usize, ops: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        Cuda::replay(self, graphs, key, ops)
    }

    fn embed(&self, op: &Embed, x: &mut Buffer<bf16>, tokens: &Buffer<u32>, table: &Weight) -> Result<()> {
        op.launch(self, x, tokens, table)
    }
    fn rms_norm(&self, op: &RmsNorm, out: &mut Buffer<bf16>, x: &Buffer<bf16>, w: &Weight) -> Result<()> {
        op.launch(self, out, x, &w.data)
    }
    fn add_rms_norm(
        &self,
        op: &AddRmsNorm,
        out: &mut Buffer<bf16>,
        x: &mut Buffer<bf16>,
        d: &Buffer<bf16>,
        w: &Weight,
    ) -> Result<()> {
        op.launch(self, out, x, d, &w.data)
    }
    fn gemv(&self, op: &Gemv, out: Out<'_, Self>, x: &Buffer<bf16>, w: &Weight) -> Result<()> {
        op.launch(self, out, x, w)
    }
    fn gemm(&self, op: &Gemm, out: Out<'_, Self>, x: &Buffer<bf16>, w: &Weight) -> Result<()> {
        self.with_bf16(w, |plain| op.launch(self, out, x, plain, w.bias.as_ref()))
    }
    fn head_norm(&self, op: &HeadNorm, qkv: &mut Buffer<bf16>, gains: &Weight) -> Result<()> {
        op.launch(self, qkv, gains)
    }
    fn rope(&self, op: &Rope, qkv: &mut Buffer<bf16>, pos: &Buffer<u32>, table: &Buffer<f32>) -> Result<()> {
        op.launch(self, qkv, pos, table)
    }
    fn kv_append(
        &self,
        op: &KvAppend,
        k: &mut Buffer<bf16>,
        v: &mut Buffer<bf16>,
        qkv: &Buffer<bf16>,
        pos: &Buffer<u32>,
        pages: &Buffer<u32>,
    ) -> Result<()> {
        op.launch(self, k, v, qkv, pos, pages)
    }
    fn attn_prefill(
        &self,
        op: &AttnPrefill,
        out: &mut Buffer<bf16>,
        qkv: &Buffer<bf16>,
        k: &Buffer<bf16>,
        v: &Buffer<bf16>,
        pos: &Buffer<u32>,
        pages: &Buffer<u32>,
    ) -> Result<()> {
        op.launch(self, out, qkv, k, v, pos, pages)
    }
    fn attn_decode(
        &self,
        op: &AttnDecode,
        out: &mut Buffer<bf16>,
        part: &mut Buffer<f32>,
        arrived: &mut Buffer<u32>,
        qkv: &Buffer<bf16>,
        k: &Buffer<bf16>,
        v: &Buffer<bf16>,
        pos: &Buffer<u32>,
        pages: &Buffer<u32>,
    ) -> Result<()> {
        op.launch(self, out, part, arrived, qkv, k, v, pos, pages)
    }
    fn swiglu(&self, op: &Swiglu, hb: &mut Buffer<bf16>, gate_up: &Buffer<bf16>) -> Result<()> {
        op.launch(self, hb, gate_up)
    }
    fn argmax(
        &self,
        op: &Argmax,
        token: &mut Buffer<u32>,
        pos: &mut Buffer<u32>,
        scratch: &mut Buffer<f32>,
        outbox: &mut Outbox,
        logits: &Buffer<f32>,
    ) -> Result<()> {
        op.launch(self, token, pos, scratch, outbox, logits)
    }
    fn sample(
        &self,
        op: &Sample,
        token: &mut Buffer<u32>,
        pos: &mut Buffer<u32>,
        params: &mut Buffer<u32>,
        history: &mut Buffer<u32>,
        scratch: &mut Buffer<f32>,
        outbox: &mut Outbox,
        bias: &Buffer<f32>,
        mask: &Buffer<u32>,
        logits: &Buffer<f32>,
    ) -> Result<()> {
        op.launch(self, token, pos, params, history, scratch, outbox, bias, mask, logits)
    }

    fn norm_qkv_rope_append(
        &self,
        op: &NormQkvRopeAppend,
        qkv: &mut Buffer<bf16>,
        k: &mut Buffer<bf16>,
        v: &mut Buffer<bf16>,
        xb: &mut Buffer<bf16>,
        arrived: &mut Buffer<u32>,
        x: &Buffer<bf16>,
        pos: &Buffer<u32>,
        pages: &Buffer<u32>,
        gain: &Weight,
        w: &Weight,
        heads: Option<&Weight>,
        table: &Buffer<f32>,
    ) -> Result<()> {
        match op.rows <= DECODE_ROWS {
            true => op.launch(self, qkv, k, v, arrived, x, pos, pages, gain, w, heads, table),
            false => definition::norm_qkv_rope_append(self, op, qkv, k, v, xb, x, pos, pages, gain, w, heads, table),
        }
    }
    fn norm_gate_up(
        &self,
        op: &NormGateUp,
        hb: &mut Buffer<bf16>,
        xb: &mut Buffer<bf16>,
        gate_up: &mut Buffer<bf16>,
        x: &Buffer<bf16>,
        gain: &Weight,
        w: &Weight,
    ) -> Result<()> {
        match op.rows <= DECODE_ROWS {
            true => op.launch(self, hb, x, gain, w),
            false => definition::norm_gate_up(self, op, hb, xb, gate_up, x, gain, w),
        }
    }
    fn norm_head(
        &self,
        op: &NormHead,
        logits: &mut Buffer<f32>,
        xb: &mut Buffer<bf16>,
        x: &Buffer<bf16>,
        gain: &Weight,
        w: &Weight,
    ) -> Result<()> {
        if op.rows > DECODE_ROWS && w.kind == Kind::Bf16 {
            return definition::norm_head(self, op, logits, xb, x, gain, w);
        }
        // a packed head in bf16 would be the largest matrix of all
        (0..op.rows).step_by(DECODE_ROWS).try_for_each(|at| {
            let some = NormHead { rows: DECODE_ROWS.min(op.rows - at), first: op.first + at, ..op.clone() };
            some.launch(self, logits, at, x, gain, w)
        })
    }
    fn stream_read(&self, op: &StreamRead, out: &mut Buffer<u32>, x: &Buffer<u32>) -> Result<()> {
        op.launch(self, out, x)
    }
    fn log_prob(
        &self,
        op: &LogProb,
        out: &mut Buffer<f32>,
        greedy: &mut Buffer<u32>,
        logits: &Buffer<f32>,
        target: &Buffer<u32>,
    ) -> Result<()> {
        op.launch(self, out, greedy, logits, target)
    }
    fn norm_head_argmax(
        &self,
        op: &NormHeadArgmax,
        token: &mut Buffer<u32>,
        pos: &mut Buffer<u32>,
        scratch: &mut Buffer<f32>,
        outbox: &mut Outbox,
        _logits: &mut Buffer<f32>,
        _xb: &mut Buffer<bf16>,
        x: &Buffer<bf16>,
        gain: &Weight,
        w: &Weight,
    ) -> Result<()> {
        op.launch(self, token, pos, scratch, outbox, x, gain, w)
    }
}
