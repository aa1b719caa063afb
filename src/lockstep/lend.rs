//! Fused ops take whole structs of buffers. The device's halves are lent to structs of its own for a call and come back
//! after it, whatever its result.

use super::{Both, Lockstep};
use crate::{
    backend::{Backend, SamplerState},
    cpu::Cpu,
    error::Result,
    kv::Kv,
    model::{Layer, Model, Scratch},
    ops::Element,
};
use half::bf16;
use std::sync::{Arc, PoisonError};

impl<D: Backend<Act = bf16>> Lockstep<D> {
    /// Takes the device's half out; an empty buffer is there meanwhile.
    fn take<T: Element>(&self, buf: &Both<T, D>) -> Result<D::Buf<T>> {
        let mut half = buf.device.write().unwrap_or_else(PoisonError::into_inner);
        Ok(std::mem::replace(&mut *half, self.device.alloc(0)?))
    }

    /// Puts it back.
    fn put<T: Element>(buf: &Both<T, D>, half: D::Buf<T>) {
        *buf.device.write().unwrap_or_else(PoisonError::into_inner) = half;
    }

    /// Runs a fused op of the device on its halves.
    pub(super) fn fused(
        &self,
        m: &Model<Self>,
        s: &mut Scratch<Self>,
        kv: &Kv<Self>,
        op: impl FnOnce(&D, &Model<D>, &mut Scratch<D>, &mut Kv<D>) -> Result<()>,
    ) -> Result<()> {
        let take = |v: &[Both<bf16, D>]| v.iter().map(|b| self.take(b)).collect::<Result<Vec<_>>>();
        let mut cache = Kv { k: take(&kv.k)?, v: take(&kv.v)?, max_seq: kv.max_seq };
        let result = self.fused_without_cache(m, s, |d, m, s| op(d, m, s, &mut cache));
        let put =
            |to: &[Both<bf16, D>], from: Vec<D::Buf<bf16>>| to.iter().zip(from).for_each(|(b, h)| Self::put(b, h));
        put(&kv.k, cache.k);
        put(&kv.v, cache.v);
        result
    }

    /// As `fused`, for one that leaves the cache alone.
    pub(super) fn fused_without_cache(
        &self,
        m: &Model<Self>,
        s: &mut Scratch<Self>,
        op: impl FnOnce(&D, &Model<D>, &mut Scratch<D>) -> Result<()>,
    ) -> Result<()> {
        let twin = self.twin(m)?;
        let mut lent = Scratch {
            tokens: self.take(&s.tokens)?,
            pos: self.take(&s.pos)?,
            x: self.take(&s.x)?,
            xb: self.take(&s.xb)?,
            qkv: self.take(&s.qkv)?,
            att: self.take(&s.att)?,
            gate_up: self.take(&s.gate_up)?,
            hb: self.take(&s.hb)?,
            attn_part: self.take(&s.attn_part)?,
            attn_arrived: self.take(&s.attn_arrived)?,
            logits: self.take(&s.logits)?,
            rows: s.rows,
            logit_rows: s.logit_rows,
        };
        let result = op(&self.device, &twin, &mut lent);
        Self::put(&s.tokens, lent.tokens);
        Self::put(&s.pos, lent.pos);
        Self::put(&s.x, lent.x);
        Self::put(&s.xb, lent.xb);
        Self::put(&s.qkv, lent.qkv);
        Self::put(&s.att, lent.att);
        Self::put(&s.gate_up, lent.gate_up);
        Self::put(&s.hb, lent.hb);
        Self::put(&s.attn_part, lent.attn_part);
        Self::put(&s.attn_arrived, lent.attn_arrived);
        Self::put(&s.logits, lent.logits);
        result
    }

    /// The model of the device's halves of `m`, made once for each model.
    fn twin(&self, m: &Model<Self>) -> Result<Arc<Model<D>>> {
        let mut twin = self.twin.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(t) = twin.as_ref().filter(|t| Arc::ptr_eq(&t.embed, &m.embed.device)) {
            return Ok(t.clone());
        }
        let layers = m.layers.iter().map(|l| Layer {
            attn_norm: l.attn_norm.device.clone(),
            wqkv: l.wqkv.device.clone(),
            wo: l.wo.device.clone(),
            ffn_norm: l.ffn_norm.device.clone(),
            w_gate_up: l.w_gate_up.device.clone(),
            w_down: l.w_down.device.clone(),
        });
        let made = Arc::new(Model {
            config: m.config.clone(),
            embed: m.embed.device.clone(),
            layers: layers.collect(),
            final_norm: m.final_norm.device.clone(),
            lm_head: m.lm_head.as_ref().map(|w| w.device.clone()),
            rope_table: self.device.upload(&m.rope_table.host)?,
            max_seq: m.max_seq,
        });
        *twin = Some(made.clone());
        Ok(made)
    }

    /// Both halves of the sampler's state.
    pub(super) fn lend_sampler(
        &self,
        s: &mut SamplerState<Self>,
    ) -> Result<(SamplerState<Cpu<bf16>>, SamplerState<D>)> {
        let device = SamplerState {
            params: self.take(&s.params)?,
            history: self.take(&s.history)?,
            bias: self.take(&s.bias)?,
            scratch: self.take(&s.scratch)?,
        };
        let host = SamplerState {
            params: std::mem::take(&mut s.params.host),
            history: std::mem::take(&mut s.history.host),
            bias: std::mem::take(&mut s.bias.host),
            scratch: std::mem::take(&mut s.scratch.host),
        };
        Ok((host, device))
    }

    /// Puts them back.
    pub(super) fn return_sampler(
        &self,
        s: &mut SamplerState<Self>,
        host: SamplerState<Cpu<bf16>>,
        device: SamplerState<D>,
    ) {
        fn back<T: Element, D: Backend<Act = bf16>>(buf: &mut Both<T, D>, host: Vec<T>, device: D::Buf<T>) {
            buf.host = host;
            *buf.device_mut() = device;
        }
        back(&mut s.params, host.params, device.params);
        back(&mut s.history, host.history, device.history);
        back(&mut s.bias, host.bias, device.bias);
        back(&mut s.scratch, host.scratch, device.scratch);
    }
}
