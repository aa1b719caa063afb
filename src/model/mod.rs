//! The architecture: weights bound to a backend, and the forward pass, written once for prefill and decode.

use crate::{
    backend::{Backend, DECODE_ROWS, Out, SamplerState},
    error::Result,
    files::{
        config::{Config, Dtype},
        lora::{self, Lora},
        weights::{LayerTensors, Tensor, Weights},
    },
    model::kv::Kv,
    ops::{AttnDecode, AttnPrefill, Embed, NormGateUp, NormHead, NormHeadArgmax, NormQkvRopeAppend, RmsNorm, Rope},
};
use std::{panic::resume_unwind, thread};

pub mod kv;
pub mod plan;

/// Most rows of logits that are computed at once.
pub(crate) const LOGIT_ROWS: usize = 64;

/// Weights of one layer on a backend.
pub struct Layer<B: Backend> {
    /// [1, dim]
    pub attn_norm: B::Weight,
    /// q, k and v stacked by rows. [q_dim + 2 kv_dim, dim]
    pub wqkv: B::Weight,
    /// [dim, q_dim]
    pub wo: B::Weight,
    /// [1, dim]
    pub ffn_norm: B::Weight,
    /// gate and up stacked by rows. [2 ffn_dim, dim]
    pub w_gate_up: B::Weight,
    /// [dim, ffn_dim]
    pub w_down: B::Weight,
}

/// A model on a backend.
pub struct Model<B: Backend> {
    /// Sizes.
    pub config: Config,
    /// [vocab, dim]
    pub embed: B::Weight,
    /// In order.
    pub layers: Vec<Layer<B>>,
    /// [1, dim]
    pub final_norm: B::Weight,
    /// [vocab, dim]; `None` when tied to `embed`.
    pub lm_head: Option<B::Weight>,
    /// Cosines and sines. [max_seq, head_dim]
    pub rope_table: B::Buf<f32>,
    /// Positions in `rope_table`.
    pub max_seq: usize,
}

/// What each weight of a model is made of: one tensor or several, one below the other. A tensor is what `part` makes of
/// whatever `weights` has of it.
pub fn stacks<T, P>(config: &Config, weights: &Weights<T>, part: impl Fn(&T) -> P) -> Vec<Vec<P>> {
    let layer = |t: &LayerTensors<T>| {
        [
            vec![part(&t.attn_norm)],
            vec![part(&t.wq), part(&t.wk), part(&t.wv)],
            vec![part(&t.wo)],
            vec![part(&t.ffn_norm)],
            vec![part(&t.w_gate), part(&t.w_up)],
            vec![part(&t.w_down)],
        ]
    };
    let mut stacks = vec![vec![part(&weights.embed)]];
    stacks.extend(weights.layers.iter().flat_map(layer));
    stacks.push(vec![part(&weights.final_norm)]);
    stacks.extend((!config.tied).then(|| vec![part(&weights.lm_head)]));
    stacks
}

/// The place of the embedding among the [`stacks`], of which single rows are read.
const EMBED: usize = 0;

/// What quantized weights that a backend [keeps](Backend::keeps) change, beside weights of 16 bits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Kept {
    /// Bytes that they save: in memory, and of what a step reads.
    pub saved: u64,
    /// Bytes of memory for the largest of them in 16 bits, which prompts need.
    pub room: u64,
}

impl Kept {
    /// Of a model; nothing when its weights are widened.
    pub fn of<B: Backend>(config: &Config, weights: &Weights, widen: bool) -> Kept {
        let mut kept = Kept::default();
        let is_head = |stack: &[Tensor]| !config.tied && stack[0].name() == weights.lm_head.name();
        for stack in stacks(config, weights, Tensor::clone).iter().skip(EMBED + 1).filter(|_| !widen) {
            let Some(bytes) = B::keeps(stack) else { continue };
            let wide: u64 = stack.iter().map(|t| 2 * (t.rows() * t.cols()) as u64).sum();
            kept.saved += wide - bytes;
            kept.room = if is_head(stack) { kept.room } else { wide.max(kept.room) };
        }
        kept
    }

    /// Bytes of the weights on the backend, with that room.
    pub fn bytes(self, config: &Config) -> u64 {
        config.weight_bytes() - self.saved + self.room
    }
}

impl<B: Backend> Model<B> {
    /// Brings the weights to the backend, with `lora` added. `max_seq` bounds the positions; `progress` gets the bytes as they
    /// are done. Quantized weights stay as they are where the backend [keeps](Backend::keeps) them, unless `widen`.
    pub fn load(
        b: &B,
        config: &Config,
        weights: &Weights,
        lora: &[Lora],
        max_seq: usize,
        widen: bool,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self> {
        thread::scope(|scope| {
            // while the weights are on their way: long contexts have large tables
            let table = scope.spawn(|| Rope::table_of(config, max_seq));
            let stacks = stacks(config, weights, Tensor::clone);
            let loaded = match lora {
                [] if stacks.iter().flatten().all(Tensor::is_plain) => b.weights(&stacks, progress)?,
                _ => Self::converted(b, stacks, lora, widen, progress)?,
            };
            let table = table.join().unwrap_or_else(|panic| resume_unwind(panic));
            Ok(Self::bind(config, loaded, b.upload(&table)?, max_seq))
        })
    }

    /// The weights as a backend can take them: the values of quantized ones, `lora` added. One after the other: those of one at
    /// a time are in the host's memory.
    fn converted(
        b: &B,
        stacks: Vec<Vec<Tensor>>,
        lora: &[Lora],
        widen: bool,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Vec<B::Weight>> {
        let dtype = if size_of::<B::Act>() == 4 { Dtype::F32 } else { Dtype::Bf16 };
        let convert = |t: &Tensor| {
            let t = t.plain(if lora.is_empty() { dtype } else { Dtype::F32 });
            match lora::merged(lora, &t, dtype) {
                Some(bytes) => t.with_bytes(dtype, bytes),
                None => t,
            }
        };
        let mut loaded = Vec::with_capacity(stacks.len());
        for (i, stack) in stacks.into_iter().enumerate() {
            let keep = !widen && lora.is_empty() && i > EMBED && B::keeps(&stack).is_some();
            let stack_of = if keep { stack.clone() } else { stack.iter().map(convert).collect() };
            loaded.extend(b.weights(&[stack_of], &mut |_| {})?);
            progress(stack.iter().map(Tensor::file_bytes).sum());
        }
        Ok(loaded)
    }

    /// A model of what a backend made of its [`stacks`], in their order.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn bind(config: &Config, loaded: Vec<B::Weight>, rope_table: B::Buf<f32>, max_seq: usize) -> Self {
        let mut loaded = loaded.into_iter();
        let mut next = || loaded.next().expect("a weight for each stack");
        let embed = next();
        let mut layer = || Layer {
            attn_norm: next(),
            wqkv: next(),
            wo: next(),
            ffn_norm: next(),
            w_gate_up: next(),
            w_down: next(),
        };
        let layers = (0..config.n_layers).map(|_| layer()).collect();
        let final_norm = next();
        let lm_head = (!config.tied).then(next);
        Model { config: config.clone(), embed, layers, final_norm, lm_head, rope_table, max_seq }
    }

    /// `s.x[..rows]`, the residual stream after the last layer, from the first `rows` tokens of `at`; their keys and values go to
    /// the cache. Up to [`DECODE_ROWS`] tokens may be of any sequences, more are consecutive ones of one. `kv_len` is above every
    /// position.
    pub fn forward(
        &self,
        b: &B,
        s: &mut Scratch<B>,
        kv: &mut Kv<B>,
        at: &Rows<B>,
        rows: usize,
        kv_len: usize,
    ) -> Result<()> {
        match rows <= DECODE_ROWS {
            true => self.layers(b, s, kv, at, rows, |s, kv, l| self.attn_decode(b, s, kv, at, l, rows, kv_len)),
            false => self.forward_parts(b, s, kv, at, &[Part { rows, kv_len, shared: 0 }]),
        }
    }

    /// [`Model::forward`] of several parts, each of consecutive tokens of one sequence.
    pub fn forward_parts(&self, b: &B, s: &mut Scratch<B>, kv: &mut Kv<B>, at: &Rows<B>, parts: &[Part]) -> Result<()> {
        let Config { n_heads, n_kv_heads, head_dim, .. } = self.config;
        let rows = parts.iter().map(|p| p.rows).sum();
        self.layers(b, s, kv, at, rows, |s, kv, l| {
            let mut first = 0;
            for &Part { rows, kv_len, shared } in parts {
                let max_seq = kv.max_seq;
                let op = AttnPrefill { rows, first, shared, n_heads, n_kv_heads, head_dim, max_seq, kv_len };
                b.attn_prefill(&op, &mut s.att, &s.qkv, &kv.k[l], &kv.v[l], &at.pos)?;
                first += rows;
            }
            Ok(())
        })
    }

    /// All layers; `attend(s, kv, l)` makes `s.att` of `s.qkv` and the cache.
    fn layers(
        &self,
        b: &B,
        s: &mut Scratch<B>,
        kv: &mut Kv<B>,
        at: &Rows<B>,
        rows: usize,
        attend: impl Fn(&mut Scratch<B>, &Kv<B>, usize) -> Result<()>,
    ) -> Result<()> {
        let Config { dim, ffn_dim, vocab, n_heads, n_kv_heads, head_dim, norm_eps: eps, .. } = self.config;
        let (max_seq, positions) = (kv.max_seq, self.max_seq);
        let qkv = NormQkvRopeAppend { rows, dim, n_heads, n_kv_heads, head_dim, max_seq, positions, eps };
        let gate_up = NormGateUp { rows, dim, ffn_dim, eps };
        b.embed(&Embed { rows, dim, vocab }, &mut s.x, &at.tokens, &self.embed)?; // x [rows, dim]
        for (l, w) in self.layers.iter().enumerate() {
            let (k, v, pos) = (&mut kv.k[l], &mut kv.v[l], &at.pos);
            // qkv [rows, q_dim + 2 kv_dim] of norm(x), rotated; the cache
            b.norm_qkv_rope_append(
                &qkv,
                &mut s.qkv,
                k,
                v,
                &mut s.xb,
                &s.x,
                pos,
                &w.attn_norm,
                &w.wqkv,
                &self.rope_table,
            )?;
            attend(s, kv, l)?; // att [rows, q_dim]
            b.matmul(rows, Out::Add(&mut s.x), &s.att, &w.wo)?; // x += att wo^T
            // hb [rows, ffn_dim] = silu(norm(x) w_gate^T) * (norm(x) w_up^T)
            b.norm_gate_up(&gate_up, &mut s.hb, &mut s.xb, &mut s.gate_up, &s.x, &w.ffn_norm, &w.w_gate_up)?;
            b.matmul(rows, Out::Add(&mut s.x), &s.hb, &w.w_down)?; // x += hb w_down^T
        }
        Ok(())
    }

    /// `att = attention(q, cache)` of few rows, split by keys.
    #[expect(clippy::too_many_arguments, reason = "those of forward, and the layer")]
    fn attn_decode(
        &self,
        b: &B,
        s: &mut Scratch<B>,
        kv: &Kv<B>,
        at: &Rows<B>,
        l: usize,
        rows: usize,
        kv_len: usize,
    ) -> Result<()> {
        let Config { n_heads, n_kv_heads, head_dim, .. } = self.config;
        let op = AttnDecode { rows, n_heads, n_kv_heads, head_dim, max_seq: kv.max_seq, kv_len };
        let (k, v) = (&kv.k[l], &kv.v[l]);
        b.attn_decode(&op, &mut s.att, &mut s.attn_part, &mut s.attn_arrived, &s.qkv, k, v, &at.pos)
    }

    /// `s.xb[..rows]`, the normed rows `first..first + rows` of `s.x`: the hidden states that the head is given.
    pub fn final_norm(&self, b: &B, s: &mut Scratch<B>, first: usize, rows: usize) -> Result<()> {
        let Config { dim, norm_eps: eps, .. } = self.config;
        b.rms_norm(&RmsNorm { rows, first, dim, eps }, &mut s.xb, &s.x, &self.final_norm)
    }

    /// `s.logits[..rows]` from rows `first..first + rows` of `s.x`.
    pub fn head(&self, b: &B, s: &mut Scratch<B>, first: usize, rows: usize) -> Result<()> {
        let Config { dim, vocab, norm_eps: eps, .. } = self.config;
        let w = self.lm_head.as_ref().unwrap_or(&self.embed);
        let op = NormHead { rows, first, dim, vocab, eps };
        b.norm_head(&op, &mut s.logits, &mut s.xb, &s.x, &self.final_norm, w)
    }

    /// The most likely tokens after the first `rows` rows of `s.x`, to those of `at` and the outbox. `s.logits` is anything
    /// afterwards.
    pub fn head_argmax(
        &self,
        b: &B,
        s: &mut Scratch<B>,
        at: &mut Rows<B>,
        rows: usize,
        max_seq: usize,
        sampler: &mut SamplerState<B>,
    ) -> Result<()> {
        let Config { dim, vocab, norm_eps: eps, .. } = self.config;
        let w = self.lm_head.as_ref().unwrap_or(&self.embed);
        let (op, gain) = (NormHeadArgmax { rows, dim, vocab, max_seq, eps }, &self.final_norm);
        let (scratch, outbox) = (&mut sampler.scratch, &mut sampler.outbox);
        let (Scratch { logits, xb, x, .. }, Rows { tokens, pos }) = (s, at);
        b.norm_head_argmax(&op, tokens, pos, scratch, outbox, logits, xb, x, gain, w)
    }
}

/// Consecutive rows of a pass that are consecutive tokens of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// How many.
    pub rows: usize,
    /// Above each of their positions.
    pub kv_len: usize,
    /// Positions before them that are those of sequence 0 and not of their own.
    pub shared: usize,
}

/// Tokens that go through the model together, and their places.
pub struct Rows<B: Backend> {
    /// Token ids. `[rows]`
    pub tokens: B::Buf<u32>,
    /// Their [places](crate::model::kv). `[rows]`
    pub pos: B::Buf<u32>,
}

impl<B: Backend> Rows<B> {
    /// Room for so many.
    pub fn new(b: &B, rows: usize) -> Result<Self> {
        Ok(Rows { tokens: b.alloc(rows)?, pos: b.alloc(rows)? })
    }

    /// Makes the first rows these.
    pub fn set(&mut self, b: &B, tokens: &[u32], places: &[u32]) -> Result<()> {
        b.write(&mut self.tokens, 0, tokens)?;
        b.write(&mut self.pos, 0, places)
    }
}

/// Activations of one session, allocated once.
pub struct Scratch<B: Backend> {
    /// Residual stream. [rows, dim]
    pub x: B::Buf<B::Act>,
    /// Normed. [rows, dim]
    pub xb: B::Buf<B::Act>,
    /// [rows, q_dim + 2 kv_dim]
    pub qkv: B::Buf<B::Act>,
    /// [rows, q_dim]
    pub att: B::Buf<B::Act>,
    /// [rows, 2 ffn_dim]
    pub gate_up: B::Buf<B::Act>,
    /// [rows, ffn_dim]
    pub hb: B::Buf<B::Act>,
    /// Partial results of the decode attention; see [`AttnDecode`].
    pub attn_part: B::Buf<f32>,
    /// Its counters of finished blocks.
    pub attn_arrived: B::Buf<u32>,
    /// [logit_rows, vocab] f32
    pub logits: B::Buf<f32>,
    /// Capacity in tokens.
    pub rows: usize,
    /// Capacity of `logits` in rows.
    pub logit_rows: usize,
}

impl<B: Backend> Scratch<B> {
    /// Elements of each buffer of the activation type, of f32, and counters, in the order of the fields.
    fn sizes(c: &Config, rows: usize, logit_rows: usize, max_seq: usize) -> ([usize; 6], [usize; 2], usize) {
        let qkv = c.q_dim() + 2 * c.kv_dim();
        let Config { n_heads, n_kv_heads, head_dim, .. } = *c;
        let decode_rows = crate::backend::DECODE_ROWS;
        let attn = AttnDecode { rows: decode_rows, n_heads, n_kv_heads, head_dim, max_seq, kv_len: max_seq };
        (
            [c.dim, c.dim, qkv, c.q_dim(), 2 * c.ffn_dim, c.ffn_dim].map(|n| n * rows),
            [attn.part_len(), logit_rows * c.vocab],
            attn.arrived_len(),
        )
    }

    /// Bytes of the buffers, and of the [`Rows`] that go with them.
    pub fn bytes(c: &Config, rows: usize, logit_rows: usize, max_seq: usize) -> u64 {
        let (act, f32s, arrived) = Self::sizes(c, rows, logit_rows, max_seq);
        let words = f32s.iter().sum::<usize>() + arrived + 2 * rows;
        (act.iter().sum::<usize>() * size_of::<B::Act>() + words * 4) as u64
    }

    /// Buffers for `rows` tokens at a time and `logit_rows` rows of logits.
    pub fn new(b: &B, c: &Config, rows: usize, logit_rows: usize, max_seq: usize) -> Result<Self> {
        let ([x, xb, qkv, att, gate_up, hb], [part, logits], arrived) = Self::sizes(c, rows, logit_rows, max_seq);
        Ok(Scratch {
            x: b.alloc(x)?,
            xb: b.alloc(xb)?,
            qkv: b.alloc(qkv)?,
            att: b.alloc(att)?,
            gate_up: b.alloc(gate_up)?,
            hb: b.alloc(hb)?,
            attn_part: b.alloc(part)?,
            attn_arrived: b.alloc(arrived)?,
            logits: b.alloc(logits)?,
            rows,
            logit_rows,
        })
    }
}
