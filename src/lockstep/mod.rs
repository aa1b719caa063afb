//! Two backends side by side: each op runs on the CPU reference and on a device, and every output is compared.
//!
//! After a comparison the reference goes on with the device's result, so an error is reported at the op that made it and not
//! where it is seen at last. A fused op runs by its definition first, op by op on both sides; then the device's own version
//! runs from the same inputs and is compared as a whole. This is the slowest way to run a model and finds the first wrong
//! number: its first differing op is an [`Error::Disagree`].

mod lend;

use crate::{
    backend::{Backend, Buffer, Out, SamplerState, Shaped, definition},
    cpu::{self, Cpu},
    error::{Error, Result},
    kv::Kv,
    model::{Model, Scratch},
    ops::{
        AddRmsNorm, Argmax, AttnDecode, AttnPrefill, Element, Embed, Gemm, Gemv, KvAppend, Op, RmsNorm, Rope, Sample,
        Swiglu, Tolerance,
    },
    weights::Tensor,
};
use half::bf16;
use std::{
    fmt::{self, Debug},
    sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard},
};

/// For fused ops. A fusion leaves out the rounding of an intermediate to bf16, which is up to 2^-9 of each element; the results
/// then differ by as much relative to their size (L2 2e-3), and by their own rounding. Allowed is twice that.
const FUSED: Tolerance = Tolerance { l2: 4e-3, worst: 1.6e-2 };

/// The CPU reference and `device` in lockstep.
pub struct Lockstep<D: Backend<Act = bf16>> {
    host: Cpu<bf16>,
    device: D,
    progress: Mutex<Progress>,
    /// The device's halves of the model in use, for its fused ops.
    twin: Mutex<Option<Arc<Model<D>>>>,
}

#[derive(Default)]
struct Progress {
    /// Ops so far.
    ops: u64,
    /// The fused op and the layer that came last.
    stage: Option<(&'static str, usize)>,
}

/// A buffer on both sides.
pub struct Both<T: Element, D: Backend<Act = bf16>> {
    host: Vec<T>,
    /// Locked because [`lend`] borrows it from behind a `&`.
    device: RwLock<D::Buf<T>>,
}

impl<T: Element, D: Backend<Act = bf16>> Buffer for Both<T, D> {
    fn len(&self) -> usize {
        self.host.len()
    }
}

impl<T: Element, D: Backend<Act = bf16>> Both<T, D> {
    /// The device's half.
    pub fn device(&self) -> RwLockReadGuard<'_, D::Buf<T>> {
        self.device.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device's half.
    pub fn device_mut(&mut self) -> &mut D::Buf<T> {
        self.device.get_mut().unwrap_or_else(PoisonError::into_inner)
    }

    /// Both halves.
    fn halves(&mut self) -> (&mut Vec<T>, &mut D::Buf<T>) {
        (&mut self.host, self.device.get_mut().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A weight on both sides.
pub struct BothWeight<D: Backend> {
    /// The reference's.
    pub host: cpu::Weight,
    /// The device's, shared with the model that its fused ops see.
    pub device: Arc<D::Weight>,
}

impl<D: Backend> Shaped for BothWeight<D>
where
    D::Weight: Shaped,
{
    fn shape(&self) -> (usize, usize) {
        self.host.shape()
    }
}

/// How a fused op is named in messages, as the ops are by their `Debug`.
struct Fused(String);

impl Debug for Fused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, fused", self.0)
    }
}

/// What can be compared: as f32, exactly.
trait Compared: Element {
    fn compared(self) -> f32;
}
impl Compared for bf16 {
    fn compared(self) -> f32 {
        self.to_f32()
    }
}
impl Compared for f32 {
    fn compared(self) -> f32 {
        self
    }
}

impl<D: Backend<Act = bf16>> Lockstep<D> {
    /// The reference beside `device`.
    pub fn new(device: D) -> Self {
        Lockstep { host: Cpu::new(), device, progress: Mutex::default(), twin: Mutex::default() }
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    fn enter(&self, fused: &'static str, layer: usize) {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).stage = Some((fused, layer));
    }

    fn disagree(&self, op: &dyn Debug, output: &str, what: &str) -> Error {
        let p = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        let stage = p.stage.map_or(String::new(), |(fused, l)| format!(", in or after {fused} of layer {l}"));
        Error::Disagree(format!("op {}{stage}: {op:?}: {output}: {what}", p.ops))
    }

    fn count_op(&self) {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).ops += 1;
    }

    /// Compares the first `len` elements of an output and gives the device's to the reference.
    fn settle<T: Compared>(
        &self,
        op: &dyn Debug,
        output: &str,
        tolerance: Tolerance,
        buf: &mut Both<T, D>,
        len: usize,
    ) -> Result<()> {
        let (host, device) = buf.halves();
        let mut got = vec![T::zeroed(); len];
        self.device.read(&mut got, device, 0)?;
        let f32s = |v: &[T]| v.iter().map(|x| x.compared()).collect::<Vec<f32>>();
        let same = tolerance.compare(&f32s(&got), &f32s(&host[..len]));
        same.map_err(|what| self.disagree(op, output, &what))?;
        host[..len].copy_from_slice(&got);
        Ok(())
    }

    /// As `settle` for all of a buffer of integers, which must be equal.
    fn settle_words(&self, op: &dyn Debug, output: &str, buf: &mut Both<u32, D>) -> Result<()> {
        let (host, device) = buf.halves();
        let got = self.device.download(device)?;
        match got.iter().zip(&*host).position(|(g, w)| g != w) {
            None => Ok(()),
            Some(i) => Err(self.disagree(op, output, &format!("element {i} is {}, expected {}", got[i], host[i]))),
        }
    }

    /// The sampler's outputs. Its scratch is nobody's business.
    fn settle_choice(
        &self,
        op: &dyn Debug,
        token: &mut Both<u32, D>,
        pos: &mut Both<u32, D>,
        state: &mut SamplerState<Self>,
    ) -> Result<()> {
        self.settle_words(op, "token", token)?;
        self.settle_words(op, "pos", pos)?;
        self.settle_words(op, "params", &mut state.params)?;
        self.settle_words(op, "history", &mut state.history)
    }
}

/// A matrix product on both sides, with its epilogue.
macro_rules! product {
    ($self:ident, $method:ident, $op:ident, $out:ident, $x:ident, $w:ident) => {{
        $self.count_op();
        let len = $op.rows * $op.n;
        macro_rules! epilogue {
            ($kind:ident, $buf:ident) => {{
                let (host, device) = $buf.halves();
                $self.host.$method($op, Out::$kind(host), &$x.host, &$w.host)?;
                $self.device.$method($op, Out::$kind(device), &$x.device(), &$w.device)?;
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
    type Fetch = u32;
    const LOOKAHEAD: usize = 0;
    const CHUNK: usize = D::CHUNK;
    const IS_GPU: bool = D::IS_GPU;

    fn name(&self) -> String {
        format!("{} in lockstep with {}", self.device.name(), self.host.name())
    }
    fn free_memory(&self) -> Result<Option<u64>> {
        self.device.free_memory()
    }
    fn alloc<T: Element>(&self, len: usize) -> Result<Both<T, D>> {
        Ok(Both { host: self.host.alloc(len)?, device: RwLock::new(self.device.alloc(len)?) })
    }
    fn write<T: Element>(&self, dst: &mut Both<T, D>, at: usize, src: &[T]) -> Result<()> {
        let (host, device) = dst.halves();
        self.device.write(device, at, src)?;
        self.host.write(host, at, src)
    }
    fn read<T: Element>(&self, dst: &mut [T], src: &Both<T, D>, at: usize) -> Result<()> {
        self.device.read(dst, &src.device(), at)
    }
    fn weights(&self, stacks: &[Vec<Tensor>], progress: &mut dyn FnMut(u64)) -> Result<Vec<BothWeight<D>>> {
        let host = self.host.weights(stacks, &mut |_| {})?;
        let both = host.into_iter().zip(self.device.weights(stacks, progress)?);
        Ok(both.map(|(host, device)| BothWeight { host, device: Arc::new(device) }).collect())
    }
    fn weight_from(&self, rows: usize, cols: usize, data: &[bf16]) -> Result<BothWeight<D>> {
        let device = Arc::new(self.device.weight_from(rows, cols, data)?);
        Ok(BothWeight { host: self.host.weight_from(rows, cols, data)?, device })
    }
    fn synchronize(&self) -> Result<()> {
        self.device.synchronize()
    }
    fn fetch(&self, src: &Both<u32, D>) -> Result<u32> {
        let mut word = [0];
        self.read(&mut word, src, 0)?;
        Ok(word[0])
    }
    fn fetched(&self, fetch: u32) -> Result<u32> {
        Ok(fetch)
    }

    fn embed(&self, op: &Embed, x: &mut Both<bf16, D>, tokens: &Both<u32, D>, table: &BothWeight<D>) -> Result<()> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).stage = None; // a pass begins
        self.count_op();
        let (host, device) = x.halves();
        self.host.embed(op, host, &tokens.host, &table.host)?;
        self.device.embed(op, device, &tokens.device(), &table.device)?;
        self.settle(op, "x", op.tolerance(), x, op.rows * op.dim)
    }
    fn rms_norm(&self, op: &RmsNorm, out: &mut Both<bf16, D>, x: &Both<bf16, D>, w: &BothWeight<D>) -> Result<()> {
        self.count_op();
        let (host, device) = out.halves();
        self.host.rms_norm(op, host, &x.host, &w.host)?;
        self.device.rms_norm(op, device, &x.device(), &w.device)?;
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
        let ((host, device), (host_x, device_x)) = (out.halves(), x.halves());
        self.host.add_rms_norm(op, host, host_x, &d.host, &w.host)?;
        self.device.add_rms_norm(op, device, device_x, &d.device(), &w.device)?;
        self.settle(op, "x", op.tolerance(), x, op.rows * op.dim)?;
        self.settle(op, "out", op.tolerance(), out, op.rows * op.dim)
    }
    fn gemv(&self, op: &Gemv, out: Out<'_, Self>, x: &Both<bf16, D>, w: &BothWeight<D>) -> Result<()> {
        product!(self, gemv, op, out, x, w)
    }
    fn gemm(&self, op: &Gemm, out: Out<'_, Self>, x: &Both<bf16, D>, w: &BothWeight<D>) -> Result<()> {
        product!(self, gemm, op, out, x, w)
    }
    fn rope(&self, op: &Rope, qkv: &mut Both<bf16, D>, pos: &Both<u32, D>, table: &Both<f32, D>) -> Result<()> {
        self.count_op();
        let (host, device) = qkv.halves();
        self.host.rope(op, host, &pos.host, &table.host)?;
        self.device.rope(op, device, &pos.device(), &table.device())?;
        self.settle(op, "qkv", op.tolerance(), qkv, op.rows * op.qkv_dim())
    }
    fn kv_append(
        &self,
        op: &KvAppend,
        k: &mut Both<bf16, D>,
        v: &mut Both<bf16, D>,
        qkv: &Both<bf16, D>,
        pos: &Both<u32, D>,
    ) -> Result<()> {
        self.count_op();
        let ((host_k, device_k), (host_v, device_v)) = (k.halves(), v.halves());
        self.host.kv_append(op, host_k, host_v, &qkv.host, &pos.host)?;
        self.device.kv_append(op, device_k, device_v, &qkv.device(), &pos.device())?;
        let cache = k.len(); // all of it: a copy to a wrong place shows
        self.settle(op, "k", op.tolerance(), k, cache)?;
        self.settle(op, "v", op.tolerance(), v, cache)
    }
    fn attn_prefill(
        &self,
        op: &AttnPrefill,
        out: &mut Both<bf16, D>,
        qkv: &Both<bf16, D>,
        k: &Both<bf16, D>,
        v: &Both<bf16, D>,
        pos: &Both<u32, D>,
    ) -> Result<()> {
        self.count_op();
        let (host, device) = out.halves();
        self.host.attn_prefill(op, host, &qkv.host, &k.host, &v.host, &pos.host)?;
        self.device.attn_prefill(op, device, &qkv.device(), &k.device(), &v.device(), &pos.device())?;
        self.settle(op, "out", op.tolerance(), out, op.rows * op.n_heads * op.head_dim)
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
    ) -> Result<()> {
        self.count_op();
        let ((host, device), (host_part, part), (host_arrived, arrived)) =
            (out.halves(), part.halves(), arrived.halves());
        let (q, p) = (qkv.device(), pos.device());
        self.host.attn_decode(op, host, host_part, host_arrived, &qkv.host, &k.host, &v.host, &pos.host)?;
        self.device.attn_decode(op, device, part, arrived, &q, &k.device(), &v.device(), &p)?;
        self.settle(op, "out", op.tolerance(), out, op.rows * op.n_heads * op.head_dim)
    }
    fn swiglu(&self, op: &Swiglu, hb: &mut Both<bf16, D>, gate_up: &Both<bf16, D>) -> Result<()> {
        self.count_op();
        let (host, device) = hb.halves();
        self.host.swiglu(op, host, &gate_up.host)?;
        self.device.swiglu(op, device, &gate_up.device())?;
        self.settle(op, "hb", op.tolerance(), hb, op.rows * op.ffn_dim)
    }
    fn argmax(
        &self,
        op: &Argmax,
        token: &mut Both<u32, D>,
        pos: &mut Both<u32, D>,
        state: &mut SamplerState<Self>,
        logits: &Both<f32, D>,
    ) -> Result<()> {
        self.count_op();
        let (mut host, mut device) = self.lend_sampler(state)?;
        let ((ht, dt), (hp, dp)) = (token.halves(), pos.halves());
        let result = (self.host.argmax(op, ht, hp, &mut host, &logits.host))
            .and_then(|()| self.device.argmax(op, dt, dp, &mut device, &logits.device()));
        self.return_sampler(state, host, device);
        result?;
        self.settle_choice(op, token, pos, state)
    }
    fn sample(
        &self,
        op: &Sample,
        token: &mut Both<u32, D>,
        pos: &mut Both<u32, D>,
        state: &mut SamplerState<Self>,
        logits: &Both<f32, D>,
    ) -> Result<()> {
        self.count_op();
        let (mut host, mut device) = self.lend_sampler(state)?;
        let ((ht, dt), (hp, dp)) = (token.halves(), pos.halves());
        let result = (self.host.sample(op, ht, hp, &mut host, &logits.host))
            .and_then(|()| self.device.sample(op, dt, dp, &mut device, &logits.device()));
        self.return_sampler(state, host, device);
        result?;
        self.settle_choice(op, token, pos, state)
    }

    fn norm_qkv_rope_append(
        &self,
        m: &Model<Self>,
        s: &mut Scratch<Self>,
        kv: &mut Kv<Self>,
        l: usize,
        rows: usize,
    ) -> Result<()> {
        self.enter("norm_qkv_rope_append", l);
        definition::norm_qkv_rope_append(self, m, s, kv, l, rows)?;
        self.fused(m, s, kv, |d, m, s, kv| d.norm_qkv_rope_append(m, s, kv, l, rows))?;
        let op = &Fused(format!("norm_qkv_rope_append({rows} rows, layer {l})"));
        self.settle(op, "qkv", FUSED, &mut s.qkv, rows * (m.config.q_dim() + 2 * m.config.kv_dim()))?;
        let cache = kv.k[l].len();
        self.settle(op, "k", FUSED, &mut kv.k[l], cache)?;
        self.settle(op, "v", FUSED, &mut kv.v[l], cache)
    }

    fn attn(
        &self,
        m: &Model<Self>,
        s: &mut Scratch<Self>,
        kv: &Kv<Self>,
        l: usize,
        rows: usize,
        kv_len: usize,
    ) -> Result<()> {
        self.enter("attn", l);
        definition::attn(self, m, s, kv, l, rows, kv_len)?;
        self.fused(m, s, kv, |d, m, s, kv| d.attn(m, s, kv, l, rows, kv_len))?;
        let op = &Fused(format!("attn({rows} rows, layer {l}, {kv_len} positions)"));
        self.settle(op, "att", FUSED, &mut s.att, rows * m.config.q_dim())
    }

    fn norm_gate_up(&self, m: &Model<Self>, s: &mut Scratch<Self>, l: usize, rows: usize) -> Result<()> {
        self.enter("norm_gate_up", l);
        definition::norm_gate_up(self, m, s, l, rows)?;
        self.fused_without_cache(m, s, |d, m, s| d.norm_gate_up(m, s, l, rows))?;
        let op = &Fused(format!("norm_gate_up({rows} rows, layer {l})"));
        self.settle(op, "hb", FUSED, &mut s.hb, rows * m.config.ffn_dim)
    }
}
