//! The architecture: weights bound to a backend, and the forward pass, written once for both prefill (a prompt) and
//! decode (one token after the other).

use crate::{
    backend::{Backend, DECODE_ROWS, Out, SamplerState},
    error::Result,
    files::{
        config::{Config, Dtype},
        lora::{self, Lora},
        quantize, threads,
        weights::{LayerTensors, Tensor, Weights},
    },
    model::kv::Kv,
    ops::{
        AttnDecode, AttnPrefill, Embed, KvDtype, NormGateUp, NormHead, NormHeadArgmax, NormQkvRopeAppend, RmsNorm, Rope,
    },
};
use std::thread;

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
    /// Gains of q heads, and below them of k heads, where these are normed. [2, head_dim]
    pub head_norm: Option<B::Weight>,
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

/// What each weight of a model is made of: one tensor or several, one below the other; without biases, which
/// [`Model::set_biases`] adds. A tensor is what `part` makes of whatever `weights` has of it.
pub fn stacks<T, P>(config: &Config, weights: &Weights<T>, part: impl Fn(&T) -> P) -> Vec<Vec<P>> {
    let mut stacks = vec![vec![part(&weights.embed)]];
    for t in &weights.layers {
        stacks.extend([vec![part(&t.attn_norm)], vec![part(&t.wq), part(&t.wk), part(&t.wv)]]);
        stacks.extend(t.head_norms.as_ref().map(|gains| gains.iter().map(&part).collect()));
        stacks.extend([
            vec![part(&t.wo)],
            vec![part(&t.ffn_norm)],
            vec![part(&t.w_gate), part(&t.w_up)],
            vec![part(&t.w_down)],
        ]);
    }
    stacks.push(vec![part(&weights.final_norm)]);
    stacks.extend((!config.tied).then(|| vec![part(&weights.lm_head)]));
    stacks
}

/// Index of the embedding among the [`stacks`]. Only single rows of it are read.
const EMBED: usize = 0;

/// The bytes of a stack of which something is quantized, where it stays so.
fn kept<B: Backend>(i: usize, stack: &[Tensor]) -> Option<u64> {
    let quantized = stack.iter().any(|t| t.format().is_quantized()) && (i > EMBED || B::KEEPS_EMBED);
    quantized.then(|| B::keeps(stack)).flatten()
}

/// What quantized weights that a backend [keeps](Backend::keeps) change, beside weights of 16 bits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Kept {
    /// Bytes of memory that they save.
    pub saved: u64,
    /// Bytes that they save of what a step reads.
    pub unread: u64,
    /// Bytes of memory for the largest of them in 16 bits, which prompts need.
    pub room: u64,
    /// Bytes of all weights, quantized or not, that are read [in their mapped file](Backend::in_file) and need no memory.
    pub in_file: u64,
}

/// What is done to weights on their way to a backend.
#[derive(Clone, Copy, Default)]
pub struct Changes<'a> {
    /// Adapters that are added.
    pub lora: &'a [Lora],
    /// They are quantized, with the adapters added, if they are not yet.
    pub quantize: Option<&'a quantize::Options>,
    /// Quantized ones become plain, also where the backend [keeps](Backend::keeps) them.
    pub widen: bool,
}

impl Kept {
    /// For a model. `weights` are as they will be: quantized where `changes` say so. What is widened (converted to 16 bits) is not kept.
    pub fn of<B: Backend>(config: &Config, weights: &Weights, changes: Changes<'_>) -> Kept {
        let mut kept = Kept::default();
        let anew = |t: &Tensor| {
            let quantized = changes.quantize.is_some() && !t.is_plain();
            quantized || changes.lora.iter().any(|lora| lora.factors(t.name()).is_some())
        };
        let is_head = |stack: &[Tensor]| !config.tied && stack[0].name() == weights.lm_head.name();
        for (i, stack) in stacks(config, weights, Tensor::clone).iter().enumerate() {
            let bytes = if changes.widen { None } else { self::kept::<B>(i, stack) };
            let stays = |t: &&Tensor| (t.is_plain() || bytes.is_some()) && !anew(t);
            kept.in_file += stack.iter().filter(stays).map(B::in_file).sum::<u64>();
            let Some(bytes) = bytes else { continue };
            let wide: u64 = stack.iter().map(|t| 2 * (t.rows() * t.cols()) as u64).sum();
            kept.saved += wide.saturating_sub(bytes);
            kept.unread += if i == EMBED && !config.tied { 0 } else { wide.saturating_sub(bytes) };
            kept.room = if is_head(stack) || !B::IS_GPU { kept.room } else { wide.max(kept.room) };
        }
        kept
    }

    /// Bytes of the weights on the backend, including `room`.
    pub fn bytes(self, config: &Config) -> u64 {
        config.weight_bytes() - self.saved + self.room
    }
}

impl<B: Backend> Model<B> {
    /// Brings the weights to the backend. `max_seq` bounds the positions; `progress` gets the bytes as they are done. Quantized weights
    /// stay as they are where the backend [keeps](Backend::keeps) them.
    pub fn load(
        b: &B,
        config: &Config,
        weights: &Weights,
        changes: Changes<'_>,
        max_seq: usize,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self> {
        thread::scope(|scope| {
            // made while the weights are on their way: a long context has a large table
            let table = threads::beside(scope, || Rope::table_of(config, max_seq));
            let stacks = stacks(config, weights, Tensor::clone);
            let unchanged = changes.lora.is_empty() && changes.quantize.is_none();
            let loaded = match unchanged && stacks.iter().flatten().all(Tensor::is_plain) {
                true => b.weights(&stacks, progress)?,
                false => Self::converted(b, weights, stacks, changes, progress)?,
            };
            let mut model = Self::bind(config, loaded, b.upload(&table())?, max_seq);
            model.set_biases(b, &weights.layers, Tensor::to_f32)?;
            let biases: u64 = weights.layers.iter().flat_map(|t| t.biases.iter()).map(Tensor::file_bytes).sum();
            if biases > 0 {
                progress(biases);
            }
            Ok(model)
        })
    }

    /// Gives each matrix the biases of its rows, where the architecture has them. `values` are those of one.
    pub fn set_biases<T>(&mut self, b: &B, layers: &[LayerTensors<T>], values: impl Fn(&T) -> Vec<f32>) -> Result<()> {
        let set = |w: &mut B::Weight, biases: Option<&[T]>| match biases {
            Some(biases) => b.set_bias(w, &biases.iter().flat_map(&values).collect::<Vec<_>>()),
            None => Ok(()),
        };
        for (w, LayerTensors { biases, .. }) in self.layers.iter_mut().zip(layers) {
            set(&mut w.wqkv, biases.qkv.as_ref().map(<[T; 3]>::as_slice))?;
            set(&mut w.wo, biases.o.as_ref().map(<[T; 1]>::as_slice))?;
            set(&mut w.w_gate_up, biases.gate_up.as_ref().map(<[T; 2]>::as_slice))?;
            set(&mut w.w_down, biases.down.as_ref().map(<[T; 1]>::as_slice))?;
        }
        Ok(())
    }

    /// The weights as a backend can take them, changed. One after the other: those of one at a time are in the host's memory.
    fn converted(
        b: &B,
        weights: &Weights,
        stacks: Vec<Vec<Tensor>>,
        Changes { lora, quantize, widen }: Changes<'_>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Vec<B::Weight>> {
        let dtype = if size_of::<B::Act>() == 4 { Dtype::F32 } else { Dtype::Bf16 };
        let plain = |t: &Tensor| {
            // one that was quantized just now has the adapters
            let lora = if quantize.is_some() && !t.is_plain() { &[] } else { lora };
            let t = t.plain(if lora.is_empty() { dtype } else { Dtype::F32 });
            match lora::merged(lora, &t, dtype) {
                Some(bytes) => t.with_bytes(dtype, bytes),
                None => t,
            }
        };
        let mut loaded = Vec::with_capacity(stacks.len());
        for (i, stack) in stacks.into_iter().enumerate() {
            let bytes = stack.iter().map(Tensor::file_bytes).sum();
            let stack = match quantize {
                Some(options) => stack.iter().map(|t| options.tensor(weights, lora, t)).collect::<Result<_>>()?,
                None => stack,
            };
            let changed = quantize.is_some() || lora.is_empty();
            let keep = !widen && changed && kept::<B>(i, &stack).is_some();
            let stack = if keep { stack } else { stack.iter().map(plain).collect() };
            loaded.extend(b.weights(&[stack], &mut |_| {})?);
            progress(bytes);
        }
        Ok(loaded)
    }

    /// Makes a model from the weights that a backend made of its [`stacks`], in their order.
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
            head_norm: config.arch.qk_norm.then(&mut next),
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

    /// Computes `s.x[..rows]`, the residual stream after the last layer, from the first `rows` tokens of `at`, and
    /// writes their keys and values to the cache. Up to [`DECODE_ROWS`] tokens may belong to any sequences; more tokens
    /// are consecutive tokens of one sequence. `kv_len` is above every position.
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

    /// [`Model::forward`] for several parts, each of which is consecutive tokens of one sequence.
    pub fn forward_parts(&self, b: &B, s: &mut Scratch<B>, kv: &mut Kv<B>, at: &Rows<B>, parts: &[Part]) -> Result<()> {
        let Config { n_heads, n_kv_heads, head_dim, .. } = self.config;
        let rows = parts.iter().map(|p| p.rows).sum();
        self.layers(b, s, kv, at, rows, |s, kv, l| {
            let mut first = 0;
            for &Part { rows, kv_len, shared } in parts {
                let (max_seq, window) = (kv.max_seq, self.config.arch.window(l, kv.max_seq));
                let op = AttnPrefill {
                    rows,
                    first,
                    shared,
                    n_heads,
                    n_kv_heads,
                    head_dim,
                    max_seq,
                    kv_len,
                    window,
                    kv: kv.dtype,
                };
                b.attn_prefill(&op, &mut s.att, &s.qkv, &kv.k[l], &kv.v[l], &at.pos, &kv.pages)?;
                first += rows;
            }
            Ok(())
        })
    }

    /// All layers; `attend(s, kv, l)` computes `s.att` from `s.qkv` and the cache.
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
        let head_norm = self.config.arch.qk_norm;
        let qkv = NormQkvRopeAppend {
            rows,
            dim,
            n_heads,
            n_kv_heads,
            head_dim,
            max_seq,
            positions,
            eps,
            head_norm,
            kv: kv.dtype,
        };
        let gate_up = NormGateUp { rows, dim, ffn_dim, eps };
        b.embed(&Embed { rows, dim, vocab }, &mut s.x, &at.tokens, &self.embed)?; // x [rows, dim]
        for (l, w) in self.layers.iter().enumerate() {
            let (k, v, pages, pos) = (&mut kv.k[l], &mut kv.v[l], &kv.pages, &at.pos);
            // qkv [rows, q_dim + 2 kv_dim] of norm(x), heads normed and rotated; the cache
            b.norm_qkv_rope_append(
                &qkv,
                &mut s.qkv,
                k,
                v,
                &mut s.xb,
                &mut s.attn_arrived,
                &s.x,
                pos,
                pages,
                &w.attn_norm,
                &w.wqkv,
                w.head_norm.as_ref(),
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

    /// `att = attention(q, cache)` for few rows, with the keys split over blocks.
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
        let (max_seq, window) = (kv.max_seq, self.config.arch.window(l, kv.max_seq));
        let op = AttnDecode { rows, n_heads, n_kv_heads, head_dim, max_seq, kv_len, window, kv: kv.dtype };
        let (k, v, part, arrived) = (&kv.k[l], &kv.v[l], &mut s.attn_part, &mut s.attn_arrived);
        b.attn_decode(&op, &mut s.att, part, arrived, &s.qkv, k, v, &at.pos, &kv.pages)
    }

    /// Computes `s.xb[..rows]`, the normed rows `first..first + rows` of `s.x`: the hidden states that go into the
    /// head.
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

    /// Writes the most likely tokens after the first `rows` rows of `s.x` to the tokens of `at` and to the outbox,
    /// where the host waits for them. `s.logits` is undefined afterwards.
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

/// Rows of a pass that are consecutive tokens of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// How many.
    pub rows: usize,
    /// A bound above each of their positions.
    pub kv_len: usize,
    /// Positions below this are read from sequence 0 and not from their own.
    pub shared: usize,
}

/// Tokens that go through the model together, and their places (a place is a sequence and a position in one number).
pub struct Rows<B: Backend> {
    /// Token ids. `[rows]`
    pub tokens: B::Buf<u32>,
    /// Their [places](crate::model::kv). `[rows]`
    pub pos: B::Buf<u32>,
}

impl<B: Backend> Rows<B> {
    /// Room for this many.
    pub fn new(b: &B, rows: usize) -> Result<Self> {
        Ok(Rows { tokens: b.alloc(rows)?, pos: b.alloc(rows)? })
    }

    /// Sets the first rows to these.
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
    /// Counters of finished blocks, of that and of [`NormQkvRopeAppend`].
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
        let (kv_len, window, kv) = (max_seq, max_seq, KvDtype::Auto); // in any format
        let attn = AttnDecode { rows: decode_rows, n_heads, n_kv_heads, head_dim, max_seq, kv_len, window, kv };
        (
            [c.dim, c.dim, qkv, c.q_dim(), 2 * c.ffn_dim, c.ffn_dim].map(|n| n * rows),
            [attn.part_len(), logit_rows * c.vocab],
            attn.arrived_len().max(c.n_heads + c.n_kv_heads), // a head that is normed has one
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
