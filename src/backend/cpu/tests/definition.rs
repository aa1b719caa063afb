//! A backend whose ops are their definitions: the `reference` of each op, on plain memory.

use crate::{
    backend::{Backend, Out, Shaped, train::TrainBackend},
    error::{Error, Result},
    files::weights::Tensor,
    ops::{
        train::{
            AdamW, AttnBwd, AttnPacked, GradNorm, LinearCe, LinearDx, LoraDown, LoraDx, LoraGrad, LoraUp, Real,
            RmsNormBwd, SwigluBwd,
        },
        *,
    },
};
use half::bf16;
use std::{collections::VecDeque, marker::PhantomData};

/// Definitions with activations of type `A`.
pub struct Definition<A>(pub PhantomData<A>);

/// A matrix [rows, cols].
pub struct Matrix {
    rows: usize,
    cols: usize,
    data: Vec<bf16>,
    bias: Option<Vec<f32>>,
}

impl Shaped for Matrix {
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }
}

impl<A: Act> Backend for Definition<A> {
    type Act = A;
    type Buf<T: Element> = Vec<T>;
    type Weight = Matrix;
    type Graphs = ();
    type Outbox = Vec<VecDeque<u32>>;
    const LOOKAHEAD: usize = 0;
    const CHUNK: usize = 128;
    const IS_GPU: bool = false;

    fn name(&self) -> String {
        "the definitions".into()
    }
    fn free_memory(&self) -> Result<Option<u64>> {
        Ok(None)
    }
    fn alloc<T: Element>(&self, len: usize) -> Result<Vec<T>> {
        Ok(vec![T::zeroed(); len])
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
    fn weights(&self, _: &[Vec<Tensor>], _: &mut dyn FnMut(u64)) -> Result<Vec<Matrix>> {
        Err(Error::Input("cases make their weights themselves".into()))
    }
    fn weight_from(&self, rows: usize, cols: usize, data: &[bf16]) -> Result<Matrix> {
        Ok(Matrix { rows, cols, data: data.to_vec(), bias: None })
    }
    fn set_bias(&self, w: &mut Matrix, bias: &[f32]) -> Result<()> {
        w.bias = Some(bias.to_vec());
        Ok(())
    }
    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
    fn outbox(&self, sequences: usize) -> Result<Vec<VecDeque<u32>>> {
        Ok(vec![VecDeque::new(); sequences])
    }
    fn take(&self, outbox: &mut Vec<VecDeque<u32>>, sequence: usize) -> Result<u32> {
        outbox[sequence].pop_front().ok_or_else(|| Error::Input("nothing was chosen".into()))
    }
    fn skip(&self, outbox: &mut Vec<VecDeque<u32>>, sequence: usize, n: usize) {
        outbox[sequence].drain(..n);
    }

    fn embed(&self, op: &Embed, x: &mut Vec<A>, tokens: &Vec<u32>, table: &Matrix) -> Result<()> {
        op.reference(x, tokens, &table.data);
        Ok(())
    }
    fn rms_norm(&self, op: &RmsNorm, out: &mut Vec<A>, x: &Vec<A>, w: &Matrix) -> Result<()> {
        op.reference(out, x, &w.data);
        Ok(())
    }
    fn add_rms_norm(&self, op: &AddRmsNorm, out: &mut Vec<A>, x: &mut Vec<A>, d: &Vec<A>, w: &Matrix) -> Result<()> {
        op.reference(out, x, d, &w.data);
        Ok(())
    }
    fn gemv(&self, op: &Gemv, out: Out<'_, Self>, x: &Vec<A>, w: &Matrix) -> Result<()> {
        let mut y = vec![0f32; op.rows * op.n];
        op.reference(&mut y, x, &w.data);
        for y in y.chunks_exact_mut(op.n) {
            y.iter_mut().zip(w.bias.iter().flatten()).for_each(|(y, bias)| *y += bias);
        }
        match out {
            Out::Store(out) => out.iter_mut().zip(y).for_each(|(out, y)| *out = A::from_f32(y)),
            Out::Add(out) => out.iter_mut().zip(y).for_each(|(out, y)| *out = A::from_f32(out.to_f32() + y)),
            Out::F32(out) => out[..y.len()].copy_from_slice(&y),
        }
        Ok(())
    }
    fn gemm(&self, op: &Gemm, out: Out<'_, Self>, x: &Vec<A>, w: &Matrix) -> Result<()> {
        let Gemm { rows, n, k } = *op;
        self.gemv(&Gemv { rows, n, k }, out, x, w)
    }
    fn head_norm(&self, op: &HeadNorm, qkv: &mut Vec<A>, gains: &Matrix) -> Result<()> {
        op.reference(qkv, &gains.data);
        Ok(())
    }
    fn rope(&self, op: &Rope, qkv: &mut Vec<A>, pos: &Vec<u32>, table: &Vec<f32>) -> Result<()> {
        op.reference(qkv, pos, table);
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
        op.reference(out, qkv, k, v, pos, pages);
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
        op.reference(out, qkv, k, v, pos, pages);
        Ok(())
    }
    fn swiglu(&self, op: &Swiglu, hb: &mut Vec<A>, gate_up: &Vec<A>) -> Result<()> {
        op.reference(hb, gate_up);
        Ok(())
    }
    fn argmax(
        &self,
        op: &Argmax,
        token: &mut Vec<u32>,
        pos: &mut Vec<u32>,
        _scratch: &mut Vec<f32>,
        _outbox: &mut Vec<VecDeque<u32>>,
        logits: &Vec<f32>,
    ) -> Result<()> {
        op.reference(token, pos, logits);
        Ok(())
    }
    fn sample(
        &self,
        op: &Sample,
        token: &mut Vec<u32>,
        pos: &mut Vec<u32>,
        params: &mut Vec<u32>,
        history: &mut Vec<u32>,
        _scratch: &mut Vec<f32>,
        _outbox: &mut Vec<VecDeque<u32>>,
        bias: &Vec<f32>,
        mask: &Vec<u32>,
        logits: &Vec<f32>,
    ) -> Result<()> {
        op.reference(token, pos, params, history, bias, mask, logits);
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
        op.reference(out, greedy, logits, target);
        Ok(())
    }
    fn stream_read(&self, op: &StreamRead, out: &mut Vec<u32>, x: &Vec<u32>) -> Result<()> {
        op.reference(out, x);
        Ok(())
    }
}

impl<A: Act + Real> TrainBackend for Definition<A> {
    fn copy_from(&self, dst: &mut Vec<A>, src: &Vec<A>, len: usize) -> Result<()> {
        dst[..len].copy_from_slice(&src[..len]);
        Ok(())
    }
    fn lora_down(&self, op: &LoraDown, u: &mut Vec<f32>, x: &Vec<A>, params: &Vec<f32>) -> Result<()> {
        op.reference(u, x, params);
        Ok(())
    }
    fn lora_up(&self, op: &LoraUp, y: &mut Vec<A>, u: &Vec<f32>, params: &Vec<f32>) -> Result<()> {
        op.reference(y, u, params);
        Ok(())
    }
    fn attn_packed(
        &self,
        op: &AttnPacked,
        out: &mut Vec<A>,
        lse: &mut Vec<f32>,
        qkv: &Vec<A>,
        starts: &Vec<u32>,
    ) -> Result<()> {
        op.reference(out, lse, qkv, starts);
        Ok(())
    }
    fn linear_ce(
        &self,
        op: &LinearCe,
        loss: &mut Vec<f32>,
        dx: &mut Vec<A>,
        x: &Vec<A>,
        at: &Vec<u32>,
        target: &Vec<u32>,
        w: &Matrix,
    ) -> Result<()> {
        op.reference(loss, dx, x, at, target, &w.data);
        Ok(())
    }
    fn rms_norm_bwd(&self, op: &RmsNormBwd, dx: &mut Vec<A>, dy: &Vec<A>, x: &Vec<A>, w: &Matrix) -> Result<()> {
        op.reference(dx, dy, x, &w.data);
        Ok(())
    }
    fn linear_dx(&self, op: &LinearDx, dx: &mut Vec<A>, dy: &Vec<A>, w: &Matrix) -> Result<()> {
        op.reference(dx, dy, &w.data);
        Ok(())
    }
    fn lora_grad(
        &self,
        op: &LoraGrad,
        du: &mut Vec<f32>,
        grads: &mut Vec<f32>,
        dy: &Vec<A>,
        x: &Vec<A>,
        u: &Vec<f32>,
        params: &Vec<f32>,
    ) -> Result<()> {
        op.reference(du, grads, dy, x, u, params);
        Ok(())
    }
    fn lora_dx(&self, op: &LoraDx, dx: &mut Vec<A>, du: &Vec<f32>, params: &Vec<f32>) -> Result<()> {
        op.reference(dx, du, params);
        Ok(())
    }
    fn swiglu_bwd(&self, op: &SwigluBwd, d_gate_up: &mut Vec<A>, dh: &Vec<A>, gate_up: &Vec<A>) -> Result<()> {
        op.reference(d_gate_up, dh, gate_up);
        Ok(())
    }
    fn attn_bwd(
        &self,
        op: &AttnBwd,
        dqkv: &mut Vec<A>,
        dout: &Vec<A>,
        out: &Vec<A>,
        qkv: &Vec<A>,
        _lse: &Vec<f32>,
        starts: &Vec<u32>,
    ) -> Result<()> {
        op.reference(dqkv, dout, out, qkv, starts);
        Ok(())
    }
    fn grad_norm(&self, op: &GradNorm, norm: &mut Vec<f32>, grads: &Vec<f32>) -> Result<()> {
        op.reference(norm, grads);
        Ok(())
    }
    fn adamw(
        &self,
        op: &AdamW,
        params: &mut Vec<f32>,
        m: &mut Vec<f32>,
        v: &mut Vec<f32>,
        grads: &mut Vec<f32>,
        norm: &Vec<f32>,
    ) -> Result<()> {
        op.reference(params, m, v, grads, norm);
        Ok(())
    }
}
