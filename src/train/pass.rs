//! The forward and backward pass of a micro-batch, written once with the ops.
//!
//! For its backward pass a layer keeps its input, the rotated q, k and v, attention's result and sums, the residual
//! stream between its two halves, gate and up, and the adapters' `u`. Norms and SwiGLU are computed again, and dropout
//! masks follow from the position. With `recompute` only the inputs of the layers are kept, and the backward pass of a
//! layer begins with its forward pass: the same ops on the same numbers, so the same bits.

use super::adapter::{Adapter, Site};
use crate::{
    backend::{Out, train::TrainBackend},
    error::{Error, Result},
    files::config::Config,
    model::Model,
    ops::{
        Act, Embed, RmsNorm, Rope, Swiglu,
        train::{
            AttnBwd, AttnPacked, Dropout, LinearCe, LinearDx, LoraDown, LoraDx, LoraGrad, LoraUp, RmsNormBwd, SwigluBwd,
        },
    },
};

/// Documents that go through the model together, one after the other.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MicroBatch {
    /// Token ids. `[rows]`
    pub tokens: Vec<u32>,
    /// Position of each in its document. `[rows]`
    pub pos: Vec<u32>,
    /// The first row of each document, and the number of rows.
    pub starts: Vec<u32>,
    /// Rows whose next token is learned. `[labels]`
    pub at: Vec<u32>,
    /// That token. `[labels]`
    pub target: Vec<u32>,
    /// Which row of the data each document is.
    pub documents: Vec<usize>,
}

impl MicroBatch {
    /// Adds a document; `labels` are the indices of its tokens that are learned.
    pub fn push(&mut self, tokens: &[u32], labels: impl Iterator<Item = usize>, number: usize) {
        if self.starts.is_empty() {
            self.starts.push(0);
        }
        let first = self.tokens.len();
        self.tokens.extend(tokens);
        self.pos.extend(0..tokens.len() as u32);
        self.starts.push(self.tokens.len() as u32);
        for i in labels.filter(|i| *i > 0) {
            self.at.push((first + i - 1) as u32);
            self.target.push(tokens[i]);
        }
        self.documents.push(number);
    }

    /// Tokens.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }
}

/// What a pass computes beside the loss.
#[derive(Debug, Clone, Copy)]
pub struct Training {
    /// Seed of the dropout masks.
    pub seed: u64,
    /// Number of the micro-batch in the run.
    pub step: u32,
    /// Weight of each label in the loss.
    pub scale: f32,
}

/// Sizes of the memory of a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Most tokens of a micro-batch.
    pub rows: usize,
    /// Whether only the layers' inputs are kept.
    pub recompute: bool,
}

/// What one layer keeps.
struct Saved<B: TrainBackend> {
    /// q and k rotated. [rows, q_dim + 2 kv_dim]
    qkv: B::Buf<B::Act>,
    /// [rows, q_dim]
    att: B::Buf<B::Act>,
    /// [rows, n_heads]
    lse: B::Buf<f32>,
    /// The residual stream after attention. [rows, dim]
    mid: B::Buf<B::Act>,
    /// [rows, 2 ffn_dim]
    gate_up: B::Buf<B::Act>,
    /// Of each adapted matrix. [rows, rank]
    u: Vec<B::Buf<f32>>,
}

/// Model, adapter and the memory of a pass.
pub struct Pass<B: TrainBackend> {
    model: Model<B>,
    adapter: Adapter,
    sizes: Sizes,
    /// Cosines, and negated sines, which rotate back. [max_seq, head_dim]
    rope_back: B::Buf<f32>,
    /// The residual stream before each layer, and after the last. [rows, dim]
    x: Vec<B::Buf<B::Act>>,
    saved: Vec<Saved<B>>,
    /// Normed. [rows, dim]
    xb: B::Buf<B::Act>,
    /// [rows, ffn_dim]
    hb: B::Buf<B::Act>,
    /// Gradients: those of the residual stream, `xb`, `hb`, `gate_up`, `att`, `qkv`, and `u`.
    dx: B::Buf<B::Act>,
    dxb: B::Buf<B::Act>,
    dhb: B::Buf<B::Act>,
    d_gate_up: B::Buf<B::Act>,
    datt: B::Buf<B::Act>,
    dqkv: B::Buf<B::Act>,
    du: B::Buf<f32>,
    loss: B::Buf<f32>,
    tokens: B::Buf<u32>,
    pos: B::Buf<u32>,
    starts: B::Buf<u32>,
    at: B::Buf<u32>,
    target: B::Buf<u32>,
}

/// How many elements of the activation type, and how many f32 and u32 words, a pass needs.
fn elements(c: &Config, adapter: &Adapter, s: Sizes) -> (usize, usize) {
    let qkv = c.q_dim() + 2 * c.kv_dim();
    let kept = if s.recompute { 1 } else { c.n_layers };
    let saved = qkv + c.q_dim() + c.dim + 2 * c.ffn_dim;
    let work = 3 * c.dim + 4 * c.ffn_dim + c.q_dim() + qkv;
    let u = adapter.layers.first().map_or(0, |sites| sites.iter().flatten().count()) * adapter.shape.rank;
    let acts = (c.n_layers + 1) * c.dim + kept * saved + work;
    (s.rows * acts, s.rows * (kept * (c.n_heads + u) + adapter.shape.rank + 6))
}

/// How many bytes the activations of a pass take on a backend.
pub fn bytes<B: TrainBackend>(c: &Config, adapter: &Adapter, s: Sizes) -> u64 {
    let (acts, words) = elements(c, adapter, s);
    (acts * size_of::<B::Act>() + words * 4) as u64
}

impl<B: TrainBackend> Pass<B> {
    /// Allocates all that a pass needs.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn new(b: &B, model: Model<B>, adapter: Adapter, sizes: Sizes) -> Result<Self> {
        let (c, rows) = (model.config.clone(), sizes.rows);
        let qkv = c.q_dim() + 2 * c.kv_dim();
        let act = |width: usize| b.alloc::<B::Act>(rows * width);
        let saved = || -> Result<Saved<B>> {
            Ok(Saved {
                qkv: act(qkv)?,
                att: act(c.q_dim())?,
                lse: b.alloc(rows * c.n_heads)?,
                mid: act(c.dim)?,
                gate_up: act(2 * c.ffn_dim)?,
                u: (0..7)
                    .map(|i| b.alloc(adapter.layers[0][i].iter().len() * rows * adapter.shape.rank))
                    .collect::<Result<_>>()?,
            })
        };
        let mut table = b.download(&model.rope_table)?;
        for row in table.chunks_exact_mut(c.head_dim) {
            row[c.head_dim / 2..].iter_mut().for_each(|sin| *sin = -*sin);
        }
        let words = || b.alloc::<u32>(rows);
        let kept = if sizes.recompute { 1 } else { c.n_layers };
        Ok(Pass {
            rope_back: b.upload(&table)?,
            x: (0..=c.n_layers).map(|_| act(c.dim)).collect::<Result<_>>()?,
            saved: (0..kept).map(|_| saved()).collect::<Result<_>>()?,
            xb: act(c.dim)?,
            hb: act(c.ffn_dim)?,
            dx: act(c.dim)?,
            dxb: act(c.dim)?,
            dhb: act(c.ffn_dim)?,
            d_gate_up: act(2 * c.ffn_dim)?,
            datt: act(c.q_dim())?,
            dqkv: act(qkv)?,
            du: b.alloc(rows * adapter.shape.rank)?,
            loss: b.alloc(rows)?,
            tokens: words()?,
            pos: words()?,
            starts: b.alloc(rows + 1)?,
            at: words()?,
            target: words()?,
            model,
            adapter,
            sizes,
        })
    }

    /// The adapter.
    pub fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// The loss of each label; with `training`, the gradient of their weighted sum is added to `grads`.
    ///
    /// # Errors
    /// Of the backend; `Input` when the micro-batch is larger than the memory.
    pub fn run(
        &mut self,
        b: &B,
        batch: &MicroBatch,
        params: &B::Buf<f32>,
        grads: &mut B::Buf<f32>,
        training: Option<Training>,
    ) -> Result<Vec<f32>> {
        let rows = batch.rows();
        if rows > self.sizes.rows || batch.starts.len() > self.sizes.rows + 1 {
            let most = self.sizes.rows;
            return Err(Error::Input(format!("a micro-batch has {rows} tokens, there is room for {most}")));
        }
        b.write(&mut self.tokens, 0, &batch.tokens)?;
        b.write(&mut self.pos, 0, &batch.pos)?;
        b.write(&mut self.starts, 0, &batch.starts)?;
        b.write(&mut self.at, 0, &batch.at)?;
        b.write(&mut self.target, 0, &batch.target)?;

        let Config { dim, vocab, n_layers, norm_eps: eps, .. } = self.model.config;
        let call = Call { rows, documents: batch.documents.len(), training };
        b.embed(&Embed { rows, dim, vocab }, &mut self.x[0], &self.tokens, &self.model.embed)?;
        for l in 0..n_layers {
            self.forward(b, params, &call, l)?;
        }
        let norm = RmsNorm { rows, first: 0, dim, eps };
        b.rms_norm(&norm, &mut self.xb, &self.x[n_layers], &self.model.final_norm)?;
        let head = self.model.lm_head.as_ref().unwrap_or(&self.model.embed);
        let scale = training.map_or(0.0, |t| t.scale);
        let op = LinearCe { rows, labels: batch.at.len(), dim, vocab, scale, backward: training.is_some() };
        b.linear_ce(&op, &mut self.loss, &mut self.dxb, &self.xb, &self.at, &self.target, head)?;
        if training.is_some() {
            let op = RmsNormBwd { rows, dim, eps, add: false };
            b.rms_norm_bwd(&op, &mut self.dx, &self.dxb, &self.x[n_layers], &self.model.final_norm)?;
            for l in (0..n_layers).rev() {
                if self.sizes.recompute {
                    self.forward(b, params, &call, l)?;
                }
                self.backward(b, params, grads, &call, l)?;
            }
        }
        let mut losses = vec![0f32; batch.at.len()];
        b.read(&mut losses, &self.loss, 0)?;
        Ok(losses)
    }

    /// In the last pass, the first layer whose result has a number that is not finite.
    ///
    /// # Errors
    /// When the backend fails.
    pub fn first_not_finite(&self, b: &B, rows: usize) -> Result<Option<usize>> {
        let mut x = vec![B::Act::from_f32(0.0); rows * self.model.config.dim];
        for (l, buf) in self.x.iter().enumerate() {
            b.read(&mut x, buf, 0)?;
            if x.iter().any(|x| !x.to_f32().is_finite()) {
                return Ok(Some(l));
            }
        }
        Ok(None)
    }

    /// Computes `x[l + 1]` from `x[l]`, and keeps what the backward pass needs.
    fn forward(&mut self, b: &B, params: &B::Buf<f32>, call: &Call, l: usize) -> Result<()> {
        let Config { dim, ffn_dim, n_heads, n_kv_heads, head_dim, norm_eps: eps, .. } = self.model.config;
        let (rows, w, sites) = (call.rows, &self.model.layers[l], &self.adapter.layers[l]);
        let kept = if self.sizes.recompute { 0 } else { l };
        let (s, (before, after)) = (&mut self.saved[kept], self.x.split_at_mut(l + 1));
        let (x, next) = (&before[l], &mut after[0]);
        let adapt = Adapt { b, adapter: &self.adapter, params, call };

        let norm = RmsNorm { rows, first: 0, dim, eps };
        b.rms_norm(&norm, &mut self.xb, x, &w.attn_norm)?;
        b.matmul(rows, Out::Store(&mut s.qkv), &self.xb, &w.wqkv)?; // qkv [rows, q_dim + 2 kv_dim] = xb wqkv^T
        for (site, u) in sites[..3].iter().zip(&mut s.u[..3]) {
            adapt.forward(site, u, &mut s.qkv, &self.xb)?;
        }
        let max_seq = self.model.max_seq;
        let rope = Rope { rows, n_heads, n_kv_heads, head_dim, max_seq, positions: max_seq };
        b.rope(&rope, &mut s.qkv, &self.pos, &self.model.rope_table)?;
        let op = AttnPacked { rows, documents: call.documents, n_heads, n_kv_heads, head_dim };
        b.attn_packed(&op, &mut s.att, &mut s.lse, &s.qkv, &self.starts)?; // att [rows, q_dim]
        b.copy_from(&mut s.mid, x, rows * dim)?;
        b.matmul(rows, Out::Add(&mut s.mid), &s.att, &w.wo)?; // mid = x + att wo^T
        adapt.forward(&sites[3], &mut s.u[3], &mut s.mid, &s.att)?;

        b.rms_norm(&norm, &mut self.xb, &s.mid, &w.ffn_norm)?;
        b.matmul(rows, Out::Store(&mut s.gate_up), &self.xb, &w.w_gate_up)?; // [rows, 2 ffn_dim]
        for (site, u) in sites[4..6].iter().zip(&mut s.u[4..6]) {
            adapt.forward(site, u, &mut s.gate_up, &self.xb)?;
        }
        b.swiglu(&Swiglu { rows, ffn_dim }, &mut self.hb, &s.gate_up)?;
        b.copy_from(next, &s.mid, rows * dim)?;
        b.matmul(rows, Out::Add(next), &self.hb, &w.w_down)?; // next = mid + hb w_down^T
        adapt.forward(&sites[6], &mut s.u[6], next, &self.hb)
    }

    /// Computes `dx` for `x[l]` from that for `x[l + 1]`, and the gradients of the layer's adapters. Below the first
    /// layer nothing is trained.
    fn backward(&mut self, b: &B, params: &B::Buf<f32>, grads: &mut B::Buf<f32>, call: &Call, l: usize) -> Result<()> {
        let Config { dim, ffn_dim, n_heads, n_kv_heads, head_dim, norm_eps: eps, .. } = self.model.config;
        let (q_dim, kv_dim) = (self.model.config.q_dim(), self.model.config.kv_dim());
        let (rows, w, sites) = (call.rows, &self.model.layers[l], &self.adapter.layers[l]);
        let (s, x) = (&self.saved[if self.sizes.recompute { 0 } else { l }], &self.x[l]);
        let adapt = Adapt { b, adapter: &self.adapter, params, call };
        let du = &mut self.du;

        b.swiglu(&Swiglu { rows, ffn_dim }, &mut self.hb, &s.gate_up)?;
        b.linear_dx(&LinearDx { rows, n: dim, k: ffn_dim }, &mut self.dhb, &self.dx, &w.w_down)?;
        adapt.backward(&sites[6], grads, Some(&mut self.dhb), du, &self.dx, &self.hb, &s.u[6])?;
        b.swiglu_bwd(&SwigluBwd { rows, ffn_dim }, &mut self.d_gate_up, &self.dhb, &s.gate_up)?;
        let norm = RmsNorm { rows, first: 0, dim, eps };
        b.rms_norm(&norm, &mut self.xb, &s.mid, &w.ffn_norm)?;
        b.linear_dx(&LinearDx { rows, n: 2 * ffn_dim, k: dim }, &mut self.dxb, &self.d_gate_up, &w.w_gate_up)?;
        for (site, u) in sites[4..6].iter().zip(&s.u[4..6]) {
            adapt.backward(site, grads, Some(&mut self.dxb), du, &self.d_gate_up, &self.xb, u)?;
        }
        let norm_bwd = RmsNormBwd { rows, dim, eps, add: true };
        b.rms_norm_bwd(&norm_bwd, &mut self.dx, &self.dxb, &s.mid, &w.ffn_norm)?;

        b.linear_dx(&LinearDx { rows, n: dim, k: q_dim }, &mut self.datt, &self.dx, &w.wo)?;
        adapt.backward(&sites[3], grads, Some(&mut self.datt), du, &self.dx, &s.att, &s.u[3])?;
        let op = AttnBwd(AttnPacked { rows, documents: call.documents, n_heads, n_kv_heads, head_dim });
        b.attn_bwd(&op, &mut self.dqkv, &self.datt, &s.att, &s.qkv, &s.lse, &self.starts)?;
        let max_seq = self.model.max_seq;
        let rope = Rope { rows, n_heads, n_kv_heads, head_dim, max_seq, positions: max_seq };
        b.rope(&rope, &mut self.dqkv, &self.pos, &self.rope_back)?;
        b.rms_norm(&norm, &mut self.xb, x, &w.attn_norm)?;
        if l > 0 {
            b.linear_dx(&LinearDx { rows, n: q_dim + 2 * kv_dim, k: dim }, &mut self.dxb, &self.dqkv, &w.wqkv)?;
        }
        for (site, u) in sites[..3].iter().zip(&s.u[..3]) {
            let dxb = if l > 0 { Some(&mut self.dxb) } else { None };
            adapt.backward(site, grads, dxb, du, &self.dqkv, &self.xb, u)?;
        }
        if l > 0 {
            b.rms_norm_bwd(&norm_bwd, &mut self.dx, &self.dxb, x, &w.attn_norm)?;
        }
        Ok(())
    }
}

/// The arguments of one pass.
struct Call {
    rows: usize,
    documents: usize,
    training: Option<Training>,
}

/// An adapted matrix, forwards and backwards.
struct Adapt<'a, B: TrainBackend> {
    b: &'a B,
    adapter: &'a Adapter,
    params: &'a B::Buf<f32>,
    call: &'a Call,
}

impl<B: TrainBackend> Adapt<'_, B> {
    fn dropout(&self, site: &Site) -> Dropout {
        self.call.training.map_or(Dropout::NONE, |t| self.adapter.dropout(site, t.seed, t.step))
    }

    /// Adds the adapter of a matrix to its columns of `y`.
    fn forward(
        &self,
        site: &Option<Site>,
        u: &mut B::Buf<f32>,
        y: &mut B::Buf<B::Act>,
        x: &B::Buf<B::Act>,
    ) -> Result<()> {
        let Some(site) = site else { return Ok(()) };
        let (rows, rank, &Site { k, n, a, b, stride, at, .. }) = (self.call.rows, self.adapter.shape.rank, site);
        self.b.lora_down(&LoraDown { rows, k, rank, a, dropout: self.dropout(site) }, u, x, self.params)?;
        self.b.lora_up(&LoraUp { rows, n, rank, b, stride, at, scale: self.adapter.scale() }, y, u, self.params)
    }

    /// Adds the gradients of its factors to `grads`, and to `dx` what the input gets through the adapter.
    #[expect(clippy::too_many_arguments, reason = "those of the ops")]
    fn backward(
        &self,
        site: &Option<Site>,
        grads: &mut B::Buf<f32>,
        dx: Option<&mut B::Buf<B::Act>>,
        du: &mut B::Buf<f32>,
        dy: &B::Buf<B::Act>,
        x: &B::Buf<B::Act>,
        u: &B::Buf<f32>,
    ) -> Result<()> {
        let Some(site) = site else { return Ok(()) };
        let (rows, rank, &Site { k, n, a, b, stride, at, .. }) = (self.call.rows, self.adapter.shape.rank, site);
        let (dropout, scale) = (self.dropout(site), self.adapter.scale());
        let op = LoraGrad { rows, k, n, rank, a, b, stride, at, scale, dropout };
        self.b.lora_grad(&op, du, grads, dy, x, u, self.params)?;
        match dx {
            Some(dx) => self.b.lora_dx(&LoraDx { rows, k, rank, a, dropout }, dx, du, self.params),
            None => Ok(()),
        }
    }
}
