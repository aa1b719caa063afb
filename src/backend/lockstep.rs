//! Two backends side by side: each op runs on the CPU reference and on a device, and every output is compared.
//!
//! After a comparison the reference goes on with the device's result, so an error is reported at the op that made it,
//! and not where it finally shows. A fused op first runs by its definition, op by op on both sides; then the device's
//! own version runs from the same inputs and is compared as a whole. This is the slowest way to run a model, but it
//! finds the first wrong number: the first op that differs is an [`Error::Disagree`].

mod both;
mod compare;

pub use both::{Both, BothWeight};
use compare::Progress;

use crate::{
    backend::{Backend, Out, cpu::Cpu, definition},
    error::{Error, Result},
    files::{config::Config, weights::Tensor},
    ops::{
        AddRmsNorm, Argmax, AttnDecode, AttnPrefill, Element, Embed, Gemm, Gemv, HeadNorm, KvAppend, LogProb,
        NormGateUp, NormHead, NormHeadArgmax, NormQkvRopeAppend, Op, RmsNorm, Rope, Sample, StreamRead, Swiglu,
    },
};
use half::bf16;
use std::{
    collections::VecDeque,
    fmt::{self, Debug},
    sync::Mutex,
};

/// The CPU reference and `device` in lockstep.
pub struct Lockstep<D: Backend<Act = bf16>> {
    host: Cpu<bf16>,
    device: D,
    progress: Mutex<Progress>,
}

/// How a fused op is named in messages, to tell it from the ops of its definition.
struct Fused<'a, O>(&'a O);

impl<O: Debug> Debug for Fused<'_, O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}, fused", self.0)
    }
}

impl<D: Backend<Act = bf16>> Lockstep<D> {
    /// The reference beside `device`.
    ///
    /// # Errors
    /// Those of [`Cpu::open`].
    pub fn new(device: D) -> Result<Self> {
        Ok(Lockstep { host: Cpu::new()?, device, progress: Mutex::default() })
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }
}

/// A matrix product on both sides, with its epilogue.
macro_rules! product {
    ($self:ident, $method:ident, $op:ident, $out:ident, $x:ident, $w:ident) => {{
        $self.count_op();
        let len = $op.rows * $op.n;
        macro_rules! epilogue {
            ($kind:ident, $buf:ident) => {{
                $self.host.$method($op, Out::$kind(&mut $buf.host), &$x.host, &$w.host)?;
                $self.device.$method($op, Out::$kind(&mut $buf.device), &$x.device, &$w.device)?;
                $self.settle($op, stringify!($kind), $op.tolerance(), $buf, len)
            }};
        }
        match $out {
            Out::Store(out) => epilogue!(Store, out),
            Out::Add(out) => epilogue!(Add, out),
            Out::F32(out) => epilogue!(F32, out),
        }
    }};
}

impl<D: Backend<Act = bf16>> Backend for Lockstep<D> {
    type Act = bf16;
    type Buf<T: Element> = Both<T, D>;
    type Weight = BothWeight<D>;
    type Graphs = ();
    type Outbox = (Vec<VecDeque<u32>>, D::Outbox);
    const LOOKAHEAD: usize = 0;
    const CHUNK: usize = D::CHUNK;
    const IS_GPU: bool = D::IS_GPU;

    fn name(&self) -> String {
        format!("{} in lockstep with {}", self.device.name(), self.host.name())
    }
    fn free_memory(&self) -> Result<Option<u64>> {
        self.device.free_memory()
    }
    fn supports(&self, config: &Config) -> Result<()> {
        self.device.supports(config)
    }
    fn alloc<T: Element>(&self, len: usize) -> Result<Both<T, D>> {
        Ok(Both { host: self.host.alloc(len)?, device: self.device.alloc(len)? })
    }
    fn write<T: Element>(&self, dst: &mut Both<T, D>, at: usize, src: &[T]) -> Result<()> {
        self.device.write(&mut dst.device, at, src)?;
        self.host.write(&mut dst.host, at, src)
    }
    fn copy<T: Element>(&self, buf: &mut Both<T, D>, to: usize, from: usize, len: usize) -> Result<()> {
        self.device.copy(&mut buf.device, to, from, len)?;
        self.host.copy(&mut buf.host, to, from, len)
    }
    fn read<T: Element>(&self, dst: &mut [T], src: &Both<T, D>, at: usize) -> Result<()> {
        self.device.read(dst, &src.device, at)
    }
    fn weights(&self, stacks: &[Vec<Tensor>], progress: &mut dyn FnMut(u64)) -> Result<Vec<BothWeight<D>>> {
        let host = self.host.weights(stacks, &mut |_| {})?;
        let both = host.into_iter().zip(self.device.weights(stacks, progress)?);
        Ok(both.map(|(host, device)| BothWeight { host, device }).collect())
    }
    fn weight_from(&self, rows: usize, cols: usize, data: &[bf16]) -> Result<BothWeight<D>> {
        let device = self.device.weight_from(rows, cols, data)?;
        Ok(BothWeight { host: self.host.weight_from(rows, cols, data)?, device })
    }
    fn set_bias(&self, w: &mut BothWeight<D>, bias: &[f32]) -> Result<()> {
        self.host.set_bias(&mut w.host, bias)?;
        self.device.set_bias(&mut w.device, bias)
    }
    fn synchronize(&self) -> Result<()> {
        self.device.synchronize()
    }
    fn outbox(&self, sequences: usize) -> Result<Self::Outbox> {
        Ok((self.host.outbox(sequences)?, self.device.outbox(sequences)?))
    }
    fn take(&self, (host, device): &mut Self::Outbox, sequence: usize) -> Result<u32> {
        let (ours, theirs) = (self.host.take(host, sequence)?, self.device.take(device, sequence)?);
        match ours == theirs {
            true => Ok(ours),
            false => Err(Error::Disagree(format!("the outbox has token {theirs}, expected {ours}"))),
        }
    }
    fn skip(&self, (host, device): &mut Self::Outbox, sequence: usize, n: usize) {
        self.host.skip(host, sequence, n);
        self.device.skip(device, sequence, n);
    }

    fn embed(&self, op: &Embed, x: &mut Both<bf16, D>, tokens: &Both<u32, D>, table: &BothWeight<D>) -> Result<()> {
        self.begin_pass();
        self.count_op();
        let Both { host, device } = &mut *x;
        self.host.embed(op, host, &tokens.host, &table.host)?;
        self.device.embed(op, device, &tokens.device, &table.device)?;
        self.settle(op, "x", op.tolerance(), x, op.rows * op.dim)
    }
    fn rms_norm(&self, op: &RmsNorm, out: &mut Both<bf16, D>, x: &Both<bf16, D>, w: &BothWeight<D>) -> Result<()> {
        self.count_op();
        let Both { host, device } = &mut *out;
        self.host.rms_norm(op, host, &x.host, &w.host)?;
        self.device.rms_norm(op, device, &x.device, &w.device)?;
        self.settle(op, "out", op.tolerance(), out, op.rows * op.dim)
    }
    fn add_rms_norm(
        &self,
        op: &AddRmsNorm,
        out: &mut Both<bf16, D>,
        x: &mut Both<bf16, D>,
        d: &Both<bf16, D>,
        w: &BothWeight<D>,
    ) -> Result<()> {
        self.count_op();
        self.host.add_rms_norm(op, &mut out.host, &mut x.host, &d.host, &w.host)?;
        self.device.add_rms_norm(op, &mut out.device, &mut x.device, &d.device, &w.device)?;
        self.settle(op, "x", op.tolerance(), x, op.rows * op.dim)?;
        self.settle(op, "out", op.tolerance(), out, op.rows * op.dim)
    }
    fn gemv(&self, op: &Gemv, out: Out<'_, Self>, x: &Both<bf16, D>, w: &BothWeight<D>) -> Result<()> {
        product!(self, gemv, op, out, x, w)
    }
    fn gemm(&self, op: &Gemm, out: Out<'_, Self>, x: &Both<bf16, D>, w: &BothWeight<D>) -> Result<()> {
        product!(self, gemm, op, out, x, w)
    }
    fn head_norm(&self, op: &HeadNorm, qkv: &mut Both<bf16, D>, gains: &BothWeight<D>) -> Result<()> {
        self.count_op();
        let Both { host, device } = &mut *qkv;
        self.host.head_norm(op, host, &gains.host)?;
        self.device.head_norm(op, device, &gains.device)?;
        self.settle(op, "qkv", op.tolerance(), qkv, op.rows * op.qkv_dim())
    }
    fn rope(&self, op: &Rope, qkv: &mut Both<bf16, D>, pos: &Both<u32, D>, table: &Both<f32, D>) -> Result<()> {
        self.count_op();
        let Both { host, device } = &mut *qkv;
        self.host.rope(op, host, &pos.host, &table.host)?;
        self.device.rope(op, device, &pos.device, &table.device)?;
        self.settle(op, "qkv", op.tolerance(), qkv, op.rows * op.qkv_dim())
    }
    fn kv_append(
        &self,
        op: &KvAppend,
        k: &mut Both<bf16, D>,
        v: &mut Both<bf16, D>,
        qkv: &Both<bf16, D>,
        pos: &Both<u32, D>,
        pages: &Both<u32, D>,
    ) -> Result<()> {
        self.count_op();
        self.host.kv_append(op, &mut k.host, &mut v.host, &qkv.host, &pos.host, &pages.host)?;
        self.device.kv_append(op, &mut k.device, &mut v.device, &qkv.device, &pos.device, &pages.device)?;
        self.settle_bits(op, "k", k)?; // all of it: a copy to a wrong place shows
        self.settle_bits(op, "v", v)
    }
    fn attn_prefill(
        &self,
        op: &AttnPrefill,
        out: &mut Both<bf16, D>,
        qkv: &Both<bf16, D>,
        k: &Both<bf16, D>,
        v: &Both<bf16, D>,
        pos: &Both<u32, D>,
        pages: &Both<u32, D>,
    ) -> Result<()> {
        self.count_op();
        let Both { host, device } = &mut *out;
        self.host.attn_prefill(op, host, &qkv.host, &k.host, &v.host, &pos.host, &pages.host)?;
        self.device.attn_prefill(op, device, &qkv.device, &k.device, &v.device, &pos.device, &pages.device)?;
        self.settle(op, "out", op.tolerance(), out, (op.first + op.rows) * op.n_heads * op.head_dim)
    }
    fn attn_decode(
        &self,
        op: &AttnDecode,
        out: &mut Both<bf16, D>,
        part: &mut Both<f32, D>,
        arrived: &mut Both<u32, D>,
        qkv: &Both<bf16, D>,
        k: &Both<bf16, D>,
        v: &Both<bf16, D>,
        pos: &Both<u32, D>,
        pages: &Both<u32, D>,
    ) -> Result<()> {
        self.count_op();
        let (host, host_part, host_arrived) = (&mut out.host, &mut part.host, &mut arrived.host);
        let (q, p, table) = (&qkv.host, &pos.host, &pages.host);
        self.host.attn_decode(op, host, host_part, host_arrived, q, &k.host, &v.host, p, table)?;
        let (device, part, arrived) = (&mut out.device, &mut part.device, &mut arrived.device);
        let (q, p, table) = (&qkv.device, &pos.device, &pages.device);
        self.device.attn_decode(op, device, part, arrived, q, &k.device, &v.device, p, table)?;
        self.settle(op, "out", op.tolerance(), out, op.rows * op.n_heads * op.head_dim)
    }
    fn swiglu(&self, op: &Swiglu, hb: &mut Both<bf16, D>, gate_up: &Both<bf16, D>) -> Result<()> {
        self.count_op();
        let Both { host, device } = &mut *hb;
        self.host.swiglu(op, host, &gate_up.host)?;
        self.device.swiglu(op, device, &gate_up.device)?;
        self.settle(op, "hb", op.tolerance(), hb, op.rows * op.ffn_dim)
    }
    fn argmax(
        &self,
        op: &Argmax,
        token: &mut Both<u32, D>,
        pos: &mut Both<u32, D>,
        scratch: &mut Both<f32, D>,
        (host, device): &mut Self::Outbox,
        logits: &Both<f32, D>,
    ) -> Result<()> {
        self.count_op();
        self.host.argmax(op, &mut token.host, &mut pos.host, &mut scratch.host, host, &logits.host)?;
        self.device.argmax(op, &mut token.device, &mut pos.device, &mut scratch.device, device, &logits.device)?;
        self.settle_bits(op, "token", token)?;
        self.settle_bits(op, "pos", pos)
    }
    fn sample(
        &self,
        op: &Sample,
        token: &mut Both<u32, D>,
        pos: &mut Both<u32, D>,
        params: &mut Both<u32, D>,
        history: &mut Both<u32, D>,
        scratch: &mut Both<f32, D>,
        (host, device): &mut Self::Outbox,
        bias: &Both<f32, D>,
        mask: &Both<u32, D>,
        logits: &Both<f32, D>,
    ) -> Result<()> {
        self.count_op();
        let Both { host: t, device: dt } = token;
        let Both { host: p, device: dp } = params;
        let Both { host: h, device: dh } = history;
        let Both { host: s, device: ds } = scratch;
        self.host.sample(op, t, &mut pos.host, p, h, s, host, &bias.host, &mask.host, &logits.host)?;
        let (bias, mask, logits) = (&bias.device, &mask.device, &logits.device);
        self.device.sample(op, dt, &mut pos.device, dp, dh, ds, device, bias, mask, logits)?;
        self.settle_bits(op, "token", token)?;
        self.settle_bits(op, "pos", pos)?;
        self.settle_bits(op, "params", params)?;
        self.settle_bits(op, "history", history)
    }

    fn stream_read(&self, op: &StreamRead, out: &mut Both<u32, D>, x: &Both<u32, D>) -> Result<()> {
        self.count_op();
        self.host.stream_read(op, &mut out.host, &x.host)?;
        self.device.stream_read(op, &mut out.device, &x.device)?;
        self.settle_bits(op, "out", out)
    }
    fn log_prob(
        &self,
        op: &LogProb,
        out: &mut Both<f32, D>,
        greedy: &mut Both<u32, D>,
        logits: &Both<f32, D>,
        target: &Both<u32, D>,
    ) -> Result<()> {
        self.count_op();
        self.host.log_prob(op, &mut out.host, &mut greedy.host, &logits.host, &target.host)?;
        self.device.log_prob(op, &mut out.device, &mut greedy.device, &logits.device, &target.device)?;
        self.settle(op, "out", op.tolerance(), out, op.rows * op.targets)?;
        self.settle_bits(op, "greedy", greedy)
    }

    fn norm_qkv_rope_append(
        &self,
        op: &NormQkvRopeAppend,
        qkv: &mut Both<bf16, D>,
        k: &mut Both<bf16, D>,
        v: &mut Both<bf16, D>,
        xb: &mut Both<bf16, D>,
        arrived: &mut Both<u32, D>,
        x: &Both<bf16, D>,
        pos: &Both<u32, D>,
        pages: &Both<u32, D>,
        gain: &BothWeight<D>,
        w: &BothWeight<D>,
        heads: Option<&BothWeight<D>>,
        table: &Both<f32, D>,
    ) -> Result<()> {
        self.enter(NormQkvRopeAppend::STEM);
        definition::norm_qkv_rope_append(self, op, qkv, k, v, xb, x, pos, pages, gain, w, heads, table)?;
        let (dqkv, dk, dv, dxb) = (&mut qkv.device, &mut k.device, &mut v.device, &mut xb.device);
        let (gain, w, heads, table) = (&gain.device, &w.device, heads.map(|h| &h.device), &table.device);
        let (arrived, x) = (&mut arrived.device, &x.device);
        let (p, t) = (&pos.device, &pages.device);
        self.device.norm_qkv_rope_append(op, dqkv, dk, dv, dxb, arrived, x, p, t, gain, w, heads, table)?;
        let fused = &Fused(op);
        self.settle(fused, "qkv", op.tolerance(), qkv, op.rows * op.qkv_dim())?;
        // the cache has what the device has in qkv, and all else is as it was
        self.host.kv_append(&op.append(), &mut k.host, &mut v.host, &qkv.host, &pos.host, &pages.host)?;
        self.settle_bits(fused, "k", k)?;
        self.settle_bits(fused, "v", v)
    }

    fn norm_gate_up(
        &self,
        op: &NormGateUp,
        hb: &mut Both<bf16, D>,
        xb: &mut Both<bf16, D>,
        gate_up: &mut Both<bf16, D>,
        x: &Both<bf16, D>,
        gain: &BothWeight<D>,
        w: &BothWeight<D>,
    ) -> Result<()> {
        self.enter(NormGateUp::STEM);
        definition::norm_gate_up(self, op, hb, xb, gate_up, x, gain, w)?;
        let (dhb, dxb, dgate_up) = (&mut hb.device, &mut xb.device, &mut gate_up.device);
        self.device.norm_gate_up(op, dhb, dxb, dgate_up, &x.device, &gain.device, &w.device)?;
        // Compared with f32: results that round in different places are farther apart (worst 2.7e-2) than either is
        // from f32 (1.9e-2).
        let (f32s, n) = (Cpu::<f32>::new()?, op.rows * op.ffn_dim);
        let x: Vec<f32> = x.host.iter().map(|x| x.to_f32()).collect();
        let (mut want, mut xb, mut gate_up) = (vec![0.0; n], vec![0.0; op.rows * op.dim], vec![0.0; 2 * n]);
        definition::norm_gate_up(&f32s, op, &mut want, &mut xb, &mut gate_up, &x, &gain.host, &w.host)?;
        hb.host.iter_mut().zip(&want).for_each(|(h, w)| *h = bf16::from_f32(*w));
        self.settle(&Fused(op), "hb", op.tolerance(), hb, n)
    }

    fn norm_head(
        &self,
        op: &NormHead,
        logits: &mut Both<f32, D>,
        xb: &mut Both<bf16, D>,
        x: &Both<bf16, D>,
        gain: &BothWeight<D>,
        w: &BothWeight<D>,
    ) -> Result<()> {
        self.enter(NormHead::STEM);
        definition::norm_head(self, op, logits, xb, x, gain, w)?;
        let (dlogits, dxb) = (&mut logits.device, &mut xb.device);
        self.device.norm_head(op, dlogits, dxb, &x.device, &gain.device, &w.device)?;
        self.settle(&Fused(op), "logits", op.tolerance(), logits, op.rows * op.vocab)
    }

    fn norm_head_argmax(
        &self,
        op: &NormHeadArgmax,
        token: &mut Both<u32, D>,
        pos: &mut Both<u32, D>,
        scratch: &mut Both<f32, D>,
        outbox: &mut Self::Outbox,
        logits: &mut Both<f32, D>,
        xb: &mut Both<bf16, D>,
        x: &Both<bf16, D>,
        gain: &BothWeight<D>,
        w: &BothWeight<D>,
    ) -> Result<()> {
        let [guesses, before] = [&token.host, &pos.host].map(|words| words[..op.rows].to_vec());
        definition::norm_head_argmax(self, op, token, pos, scratch, outbox, logits, xb, x, gain, w)?;
        // then the fused kernel from the same places; its tokens are the ones that the host gets
        let counted = before.iter().zip(&pos.host).filter(|(before, now)| before != now);
        counted.for_each(|(&p, _)| self.device.skip(&mut outbox.1, p as usize / op.max_seq, 1));
        self.device.write(&mut token.device, 0, &guesses)?;
        self.device.write(&mut pos.device, 0, &before)?;
        let (dtoken, dpos, dscratch) = (&mut token.device, &mut pos.device, &mut scratch.device);
        let (dlogits, dxb, outbox) = (&mut logits.device, &mut xb.device, &mut outbox.1);
        let (gain, w) = (&gain.device, &w.device);
        self.device.norm_head_argmax(op, dtoken, dpos, dscratch, outbox, dlogits, dxb, &x.device, gain, w)?;
        self.settle_bits(&Fused(op), "token", token)?;
        self.settle_bits(&Fused(op), "pos", pos)
    }
}
