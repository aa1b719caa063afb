//! The ops of training on the GPU: each op's launch, and the memory of logits.

use super::{Buffer, Cuda, Kind, Weight, failed, workspace};
use crate::{
    backend::{
        Backend,
        train::{KernelTime, TrainBackend},
    },
    error::{Error, Result},
    files::config::Config,
    ops::{
        Element,
        train::{
            AdamW, AttnBwd, AttnPacked, Dropout, GradNorm, LinearCe, LinearDx, LoraDown, LoraDx, LoraGrad, LoraUp,
            RmsNormBwd, SwigluBwd,
        },
    },
};
use half::bf16;
use std::{collections::BTreeMap, sync::PoisonError};

/// Of some labelled rows: see `kernels/linear_ce.cu`.
pub(crate) struct Logits {
    /// [chunk, dim]
    pub x: Buffer<bf16>,
    /// [chunk, vocab]
    pub logits: Buffer<f32>,
    /// [chunk, vocab]
    pub dlogits: Buffer<bf16>,
    /// [chunk, dim]
    pub dx: Buffer<bf16>,
}

impl Cuda {
    /// Enqueues work with memory for `chunk` labels. It is allocated when it is first needed, or needed larger.
    pub(crate) fn with_logits(
        &self,
        op: &LinearCe,
        chunk: usize,
        enqueue: impl FnOnce(&mut Logits) -> Result<()>,
    ) -> Result<()> {
        let mut place = self.logits.lock().unwrap_or_else(PoisonError::into_inner);
        let (rows, all) = (chunk * op.dim, chunk * op.vocab);
        // what is freed here is freed on the stream, after the calls that use it
        let enough = place.take().filter(|s| s.x.len() >= rows && s.logits.len() >= all);
        let scratch = match enough {
            Some(enough) => enough,
            None => Logits {
                x: self.alloc(rows)?,
                logits: self.alloc(all)?,
                dlogits: self.alloc(all)?,
                dx: self.alloc(rows)?,
            },
        };
        enqueue(place.insert(scratch))
    }

    /// Zeroes the first `len` elements.
    pub(crate) fn zero<T: Element>(&self, buf: &mut Buffer<T>, len: usize) -> Result<()> {
        let bytes = len * size_of::<T>();
        let what = || failed(move || format!("zeroing {bytes} bytes"));
        self.timed("zero", || self.stream.memset_zeros(&mut buf.bytes.slice_mut(..bytes)).map_err(what()))
    }
}

/// A weight as the kernels of training take it.
fn plain<'a>(op: &'static str, w: &'a Weight) -> Result<&'a Weight> {
    match w.kind {
        Kind::Bf16 => Ok(w),
        kind => Err(Error::Op { op, what: format!("w is stored as {}, the kernel takes bf16", kind.name()) }),
    }
}

impl TrainBackend for Cuda {
    fn trains(&self, config: &Config, rank: usize) -> Result<()> {
        self.supports(config)?;
        let &Config { dim, ffn_dim, vocab, n_heads, n_kv_heads, head_dim, .. } = config;
        let eights = [("hidden_size", dim), ("intermediate_size", ffn_dim), ("vocab_size", vocab), ("lora_r", rank)];
        if let Some((name, n)) = eights.iter().find(|(_, n)| !n.is_multiple_of(8)) {
            return Err(Error::Op {
                op: "training",
                what: format!("{name} is {n}, the kernels take multiples of 8; the CPU takes any: --device cpu"),
            });
        }
        AttnPacked { rows: 1, documents: 1, n_heads, n_kv_heads, head_dim }.check_kernel("attn_packed")
    }

    fn training_bytes(config: &Config, rank: usize, rows: usize) -> u64 {
        let &Config { dim, ffn_dim, vocab, n_heads, .. } = config;
        let (q_dim, qkv) = (config.q_dim(), config.q_dim() + 2 * config.kv_dim());
        let forward = workspace::most(config, rows);
        let turned = [(dim, qkv), (q_dim, dim), (dim, 2 * ffn_dim), (ffn_dim, dim), (dim, vocab)];
        let turned = turned.map(|(k, n)| crate::ops::Gemm::most_workspace(rows, k, n).0);
        let widest = dim.max(ffn_dim).max(qkv);
        let (k, n) = (widest, widest);
        let lora = LoraGrad { rows, k, n, rank, a: 0, b: 0, stride: n, at: 0, scale: 1.0, dropout: Dropout::NONE };
        let sums = [forward.0, rows * n_heads, lora.workspace().0].into_iter().chain(turned).max().unwrap_or(0);
        let ce = LinearCe { rows, labels: rows, dim, vocab, scale: 1.0, backward: true };
        let chunk = ce.chunk().min(rows);
        (4 * sums + chunk * (4 * dim + 6 * vocab)) as u64
    }

    fn times(&self, ops: impl FnOnce() -> Result<()>) -> Result<Vec<KernelTime>> {
        let set = |to| std::mem::replace(&mut *self.times.lock().unwrap_or_else(PoisonError::into_inner), to);
        set(Some(BTreeMap::new()));
        let result = ops();
        let times = set(None).unwrap_or_default();
        result.map(|()| times.into_iter().map(|(kernel, (calls, ms))| KernelTime { kernel, calls, ms }).collect())
    }

    fn copy_from(&self, dst: &mut Buffer<bf16>, src: &Buffer<bf16>, len: usize) -> Result<()> {
        let bytes = len * size_of::<bf16>();
        let what = || failed(move || format!("copying {bytes} bytes on the GPU"));
        let (Some(from), Some(mut to)) = (src.bytes.try_slice(..bytes), dst.bytes.try_slice_mut(..bytes)) else {
            let what = format!("{bytes} bytes from a buffer of {} to one of {}", src.bytes.len(), dst.bytes.len());
            return Err(Error::Op { op: "copy_from", what });
        };
        self.timed("copy", || self.stream.memcpy_dtod(&from, &mut to).map_err(what()))
    }
    fn lora_down(&self, op: &LoraDown, u: &mut Buffer<f32>, x: &Buffer<bf16>, params: &Buffer<f32>) -> Result<()> {
        op.launch(self, u, x, params)
    }
    fn lora_up(&self, op: &LoraUp, y: &mut Buffer<bf16>, u: &Buffer<f32>, params: &Buffer<f32>) -> Result<()> {
        op.launch(self, y, u, params)
    }
    fn attn_packed(
        &self,
        op: &AttnPacked,
        out: &mut Buffer<bf16>,
        lse: &mut Buffer<f32>,
        qkv: &Buffer<bf16>,
        starts: &Buffer<u32>,
    ) -> Result<()> {
        op.launch(self, out, lse, qkv, starts)
    }
    fn linear_ce(
        &self,
        op: &LinearCe,
        loss: &mut Buffer<f32>,
        dx: &mut Buffer<bf16>,
        x: &Buffer<bf16>,
        at: &Buffer<u32>,
        target: &Buffer<u32>,
        w: &Weight,
    ) -> Result<()> {
        op.launch(self, loss, dx, x, at, target, plain("linear_ce", w)?)
    }
    fn rms_norm_bwd(
        &self,
        op: &RmsNormBwd,
        dx: &mut Buffer<bf16>,
        dy: &Buffer<bf16>,
        x: &Buffer<bf16>,
        w: &Weight,
    ) -> Result<()> {
        op.launch(self, dx, dy, x, &plain("rms_norm_bwd", w)?.data)
    }
    fn linear_dx(&self, op: &LinearDx, dx: &mut Buffer<bf16>, dy: &Buffer<bf16>, w: &Weight) -> Result<()> {
        op.launch(self, dx, dy, plain("linear_dx", w)?)
    }
    fn lora_grad(
        &self,
        op: &LoraGrad,
        du: &mut Buffer<f32>,
        grads: &mut Buffer<f32>,
        dy: &Buffer<bf16>,
        x: &Buffer<bf16>,
        u: &Buffer<f32>,
        params: &Buffer<f32>,
    ) -> Result<()> {
        op.launch(self, du, grads, dy, x, u, params)
    }
    fn lora_dx(&self, op: &LoraDx, dx: &mut Buffer<bf16>, du: &Buffer<f32>, params: &Buffer<f32>) -> Result<()> {
        op.launch(self, dx, du, params)
    }
    fn swiglu_bwd(
        &self,
        op: &SwigluBwd,
        d_gate_up: &mut Buffer<bf16>,
        dh: &Buffer<bf16>,
        gate_up: &Buffer<bf16>,
    ) -> Result<()> {
        op.launch(self, d_gate_up, dh, gate_up)
    }
    fn attn_bwd(
        &self,
        op: &AttnBwd,
        dqkv: &mut Buffer<bf16>,
        dout: &Buffer<bf16>,
        out: &Buffer<bf16>,
        qkv: &Buffer<bf16>,
        lse: &Buffer<f32>,
        starts: &Buffer<u32>,
    ) -> Result<()> {
        op.launch(self, dqkv, dout, out, qkv, lse, starts)
    }
    fn grad_norm(&self, op: &GradNorm, norm: &mut Buffer<f32>, grads: &Buffer<f32>) -> Result<()> {
        op.launch(self, norm, grads)
    }
    fn adamw(
        &self,
        op: &AdamW,
        params: &mut Buffer<f32>,
        m: &mut Buffer<f32>,
        v: &mut Buffer<f32>,
        grads: &mut Buffer<f32>,
        norm: &Buffer<f32>,
    ) -> Result<()> {
        op.launch(self, params, m, v, grads, norm)
    }
}
