//! The reference: every op as its definition, on the CPU.
//!
//! `Cpu<f32>` keeps activations in f32 and is what Hugging Face's float32 goldens are compared with. `Cpu<bf16>` rounds where
//! the kernels round and is what they are compared with.

mod matmul;
mod weight;

pub use weight::Weight;

use crate::{
    backend::{Backend, Out},
    error::{Error, Result},
    files::weights::Tensor,
    ops::{
        Act, AddRmsNorm, Argmax, AttnDecode, AttnPrefill, Element, Embed, Gemm, Gemv, KvAppend, LogProb, RmsNorm, Rope,
        Sample, StreamRead, Swiglu, sample::Lengths,
    },
};
use half::bf16;
use std::{collections::VecDeque, marker::PhantomData};

/// The CPU, with activations of type `A`.
#[derive(Debug, Default, Clone, Copy)]
pub struct Cpu<A>(PhantomData<A>);

impl<A: Act> Cpu<A> {
    /// Nothing to set up.
    pub fn new() -> Self {
        Cpu(PhantomData)
    }
}

/// Runs `$body` with `$w` bound to the elements of a weight that is one matrix, bf16 or f32.
macro_rules! with_elements {
    ($weight:expr, |$w:ident| $body:expr) => {
        match $weight.single()? {
            weight::Elements::Bf16($w) => $body,
            weight::Elements::F32($w) => $body,
        }
    };
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

    fn name(&self) -> String {
        format!("CPU reference ({} activations, {} threads)", A::NAME, rayon::current_num_threads())
    }
    fn free_memory(&self) -> Result<Option<u64>> {
        Ok(None) // memory can be overcommitted, and weights stay in the mapped file
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
    fn weights(&self, stacks: &[Vec<Tensor>], progress: &mut dyn FnMut(u64)) -> Result<Vec<Weight>> {
        let weight = |parts: &Vec<Tensor>| {
            let weight = Weight::new::<A>(parts);
            progress(parts.iter().map(|t| t.bytes().len() as u64).sum());
            weight
        };
        Ok(stacks.iter().map(weight).collect())
    }
    fn weight_from(&self, rows: usize, cols: usize, data: &[bf16]) -> Result<Weight> {
        Ok(Weight::from_values(rows, cols, data))
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
        with_elements!(table, |w| op.reference(x, tokens, w));
        Ok(())
    }
    fn rms_norm(&self, op: &RmsNorm, out: &mut Vec<A>, x: &Vec<A>, w: &Weight) -> Result<()> {
        op.check(out.len(), x.len(), w.len())?;
        with_elements!(w, |w| op.reference(out, x, w));
        Ok(())
    }
    fn add_rms_norm(&self, op: &AddRmsNorm, out: &mut Vec<A>, x: &mut Vec<A>, d: &Vec<A>, w: &Weight) -> Result<()> {
        op.check(out.len(), x.len(), d.len(), w.len())?;
        with_elements!(w, |w| op.reference(out, x, d, w));
        Ok(())
    }
    fn gemv(&self, op: &Gemv, out: Out<'_, Self>, x: &Vec<A>, w: &Weight) -> Result<()> {
        op.check(out.len(), x.len(), crate::backend::Shaped::shape(w))?;
        matmul::matmul(op.rows, out, x, w);
        Ok(())
    }
    fn gemm(&self, op: &Gemm, out: Out<'_, Self>, x: &Vec<A>, w: &Weight) -> Result<()> {
        op.check(out.len(), x.len(), crate::backend::Shaped::shape(w))?;
        matmul::matmul(op.rows, out, x, w);
        Ok(())
    }
    fn rope(&self, op: &Rope, qkv: &mut Vec<A>, pos: &Vec<u32>, table: &Vec<f32>) -> Result<()> {
        op.check(qkv.len(), pos.len(), table.len())?;
        op.reference(qkv, pos, table);
        Ok(())
    }
    fn kv_append(&self, op: &KvAppend, k: &mut Vec<A>, v: &mut Vec<A>, qkv: &Vec<A>, pos: &Vec<u32>) -> Result<()> {
        op.check(k.len(), v.len(), qkv.len(), pos.len())?;
        op.reference(k, v, qkv, pos);
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
    ) -> Result<()> {
        op.check(out.len(), qkv.len(), k.len(), v.len(), pos.len())?;
        op.reference(out, qkv, k, v, pos);
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
    ) -> Result<()> {
        op.check(out.len(), qkv.len(), k.len(), v.len(), pos.len())?;
        op.reference(out, qkv, k, v, pos);
        Ok(())
    }
    fn swiglu(&self, op: &Swiglu, hb: &mut Vec<A>, gate_up: &Vec<A>) -> Result<()> {
        op.check(hb.len(), gate_up.len())?;
        op.reference(hb, gate_up);
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
        let sequence = pos[0] as usize / op.max_seq;
        op.reference(token, pos, logits);
        outbox[sequence].push_back(token[0]);
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
        let sequences: Vec<usize> = pos[..op.rows].iter().map(|&p| op.sequence(p)).collect();
        op.reference(token, pos, params, history, bias, mask, logits);
        sequences.into_iter().zip(&*token).for_each(|(s, t)| outbox[s].push_back(*t));
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
        op.reference(out, greedy, logits, target);
        Ok(())
    }
}
