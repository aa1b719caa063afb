//! The one table of the architectures: which tensors a model has, by Hugging Face's names.

use super::Tensor;
use crate::{
    error::{Error, Result},
    files::config::Config,
};

pub(super) const EMBED: &str = "model.embed_tokens.weight";
pub(super) const HEAD: &str = "lm_head.weight";

/// All tensors of a model. `T` is what is known of each: [`Tensor`], its data in a checkpoint.
#[derive(Clone, Debug)]
pub struct Weights<T = Tensor> {
    /// One row per token, `[vocab, dim]`.
    pub embed: T,
    /// The layers, first to last.
    pub layers: Vec<LayerTensors<T>>,
    /// Gain of the last RMSNorm, `[dim]`.
    pub final_norm: T,
    /// From the residual stream to logits, `[vocab, dim]`; the embedding when the configuration ties them.
    pub lm_head: T,
}

/// The tensors of one layer. A matrix is `[out, in]`, row-major.
#[derive(Clone, Debug)]
pub struct LayerTensors<T = Tensor> {
    /// Gain of the RMSNorm before attention, `[dim]`.
    pub attn_norm: T,
    /// Queries, `[q_dim, dim]`; rows of a head in half-split rotary order.
    pub wq: T,
    /// Keys, `[kv_dim, dim]`; rows of a head in half-split rotary order.
    pub wk: T,
    /// Values, `[kv_dim, dim]`.
    pub wv: T,
    /// Attention output, `[dim, q_dim]`.
    pub wo: T,
    /// Gain of the RMSNorm before the feed-forward layer, `[dim]`.
    pub ffn_norm: T,
    /// Gate (the side that SiLU is applied to), `[ffn_dim, dim]`.
    pub w_gate: T,
    /// Up projection, `[ffn_dim, dim]`.
    pub w_up: T,
    /// Down projection, `[dim, ffn_dim]`.
    pub w_down: T,
    /// Gains of the RMSNorm of q heads and of k heads, `[head_dim]` each, where the architecture has it.
    pub head_norms: Option<[T; 2]>,
    /// What is added to products, `[out]` each.
    pub biases: Biases<T>,
}

/// The biases that the architecture has in a layer, in the order in which the matrices are stacked.
#[derive(Clone, Debug)]
pub struct Biases<T = Tensor> {
    /// Of q, k and v.
    pub qkv: Option<[T; 3]>,
    /// Of the output of attention.
    pub o: Option<[T; 1]>,
    /// Of gate and up.
    pub gate_up: Option<[T; 2]>,
    /// Of down.
    pub down: Option<[T; 1]>,
}

impl<T> Biases<T> {
    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        let (attention, ffn) =
            (self.qkv.iter().flatten().chain(self.o.iter().flatten()), self.gate_up.iter().flatten());
        attention.chain(ffn).chain(self.down.iter().flatten())
    }
}

impl<T> Weights<T> {
    /// The one table of the architecture: field, Hugging Face name, shape. Calls `bind` once for every tensor that
    /// a checkpoint of `config` must have, in the order of transformers' modules (which decides what falls into which
    /// shard).
    ///
    /// # Errors
    /// The first that `bind` returns.
    pub fn table(config: &Config, mut bind: impl FnMut(String, &[usize]) -> Result<T>) -> Result<Weights<T>>
    where
        T: Clone,
    {
        let &Config { dim, ffn_dim, vocab, head_dim, .. } = config;
        let (q_dim, kv_dim, arch) = (config.q_dim(), config.kv_dim(), &config.arch);

        let embed = bind(EMBED.into(), &[vocab, dim])?;
        let mut layers = Vec::with_capacity(config.n_layers);
        for l in 0..config.n_layers {
            let mut bind = |name: &str, shape: &[usize]| bind(format!("model.layers.{l}.{name}"), shape);
            let linear = |bind: &mut dyn FnMut(&str, &[usize]) -> Result<T>,
                          name: &str,
                          has_bias: bool,
                          [rows, cols]: [usize; 2]| {
                let weight = bind(&format!("{name}.weight"), &[rows, cols])?;
                let bias = has_bias.then(|| bind(&format!("{name}.bias"), &[rows])).transpose()?;
                Ok::<_, Error>((weight, bias))
            };
            let (wq, bq) = linear(&mut bind, "self_attn.q_proj", arch.qkv_bias, [q_dim, dim])?;
            let (wk, bk) = linear(&mut bind, "self_attn.k_proj", arch.qkv_bias, [kv_dim, dim])?;
            let (wv, bv) = linear(&mut bind, "self_attn.v_proj", arch.qkv_bias, [kv_dim, dim])?;
            let (wo, bo) = linear(&mut bind, "self_attn.o_proj", arch.o_bias, [dim, q_dim])?;
            let head_norms = match arch.qk_norm {
                true => {
                    Some([bind("self_attn.q_norm.weight", &[head_dim])?, bind("self_attn.k_norm.weight", &[head_dim])?])
                }
                false => None,
            };
            let (w_gate, b_gate) = linear(&mut bind, "mlp.gate_proj", arch.ffn_bias, [ffn_dim, dim])?;
            let (w_up, b_up) = linear(&mut bind, "mlp.up_proj", arch.ffn_bias, [ffn_dim, dim])?;
            let (w_down, b_down) = linear(&mut bind, "mlp.down_proj", arch.ffn_bias, [dim, ffn_dim])?;
            layers.push(LayerTensors {
                wq,
                wk,
                wv,
                wo,
                w_gate,
                w_up,
                w_down,
                head_norms,
                biases: Biases {
                    qkv: bq.zip(bk).zip(bv).map(|((q, k), v)| [q, k, v]),
                    o: bo.map(|o| [o]),
                    gate_up: b_gate.zip(b_up).map(|(gate, up)| [gate, up]),
                    down: b_down.map(|down| [down]),
                },
                attn_norm: bind("input_layernorm.weight", &[dim])?,
                ffn_norm: bind("post_attention_layernorm.weight", &[dim])?,
            });
        }
        let final_norm = bind("model.norm.weight".into(), &[dim])?;
        let lm_head = if config.tied { embed.clone() } else { bind(HEAD.into(), &[vocab, dim])? };
        Ok(Weights { embed, layers, final_norm, lm_head })
    }
}
