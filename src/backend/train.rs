//! The ops of training, for backends that have them: the backward pass is written with these.
//!
//! As in [`Backend`], an output is a `&mut`, an input a `&`, and the argument order is outputs, inputs, weights. Sizes and definitions are
//! in [`crate::ops::train`].

use crate::{
    backend::Backend,
    error::Result,
    files::config::Config,
    ops::train::{
        AdamW, AttnBwd, AttnPacked, GradNorm, LinearCe, LinearDx, LoraDown, LoraDx, LoraGrad, LoraUp, RmsNormBwd,
        SwigluBwd,
    },
};

/// How long the calls of a kernel took.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct KernelTime {
    /// Name of the function, or `cublas`.
    pub kernel: String,
    /// Calls.
    pub calls: u64,
    /// Milliseconds in all.
    pub ms: f64,
}

/// A backend that can train adapters.
pub trait TrainBackend: Backend {
    /// Checks that its ops take the sizes of a model and the rank of an adapter, before anything is loaded.
    ///
    /// # Errors
    /// `Op` names what they do not take.
    fn trains(&self, config: &Config, _rank: usize) -> Result<()> {
        self.supports(config)
    }
    /// Bytes of its own memory that the ops of a micro-batch of `rows` tokens need at most.
    fn training_bytes(_config: &Config, _rank: usize, _rows: usize) -> u64 {
        0
    }
    /// Runs `ops`, and measures each of its kernels by itself: name, calls, milliseconds. Nothing where a backend has no kernels.
    ///
    /// # Errors
    /// Those of `ops`.
    fn times(&self, ops: impl FnOnce() -> Result<()>) -> Result<Vec<KernelTime>> {
        ops().map(|()| Vec::new())
    }
    /// `dst[..len] = src[..len]`
    fn copy_from(&self, dst: &mut Self::Buf<Self::Act>, src: &Self::Buf<Self::Act>, len: usize) -> Result<()>;
    /// `u = drop(x) A^T`
    fn lora_down(
        &self,
        op: &LoraDown,
        u: &mut Self::Buf<f32>,
        x: &Self::Buf<Self::Act>,
        params: &Self::Buf<f32>,
    ) -> Result<()>;
    /// `y += scale u Bt`, in some columns of `y`.
    fn lora_up(
        &self,
        op: &LoraUp,
        y: &mut Self::Buf<Self::Act>,
        u: &Self::Buf<f32>,
        params: &Self::Buf<f32>,
    ) -> Result<()>;
    /// Causal attention within documents.
    fn attn_packed(
        &self,
        op: &AttnPacked,
        out: &mut Self::Buf<Self::Act>,
        lse: &mut Self::Buf<f32>,
        qkv: &Self::Buf<Self::Act>,
        starts: &Self::Buf<u32>,
    ) -> Result<()>;
    /// Loss of the labelled rows, and the gradient of `x`.
    #[expect(clippy::too_many_arguments, reason = "one argument a buffer, named as in the kernel")]
    fn linear_ce(
        &self,
        op: &LinearCe,
        loss: &mut Self::Buf<f32>,
        dx: &mut Self::Buf<Self::Act>,
        x: &Self::Buf<Self::Act>,
        at: &Self::Buf<u32>,
        target: &Self::Buf<u32>,
        w: &Self::Weight,
    ) -> Result<()>;
    /// The gradient of the norm's input.
    fn rms_norm_bwd(
        &self,
        op: &RmsNormBwd,
        dx: &mut Self::Buf<Self::Act>,
        dy: &Self::Buf<Self::Act>,
        x: &Self::Buf<Self::Act>,
        w: &Self::Weight,
    ) -> Result<()>;
    /// `dx = dy w`
    fn linear_dx(
        &self,
        op: &LinearDx,
        dx: &mut Self::Buf<Self::Act>,
        dy: &Self::Buf<Self::Act>,
        w: &Self::Weight,
    ) -> Result<()>;
    /// `du`, and the gradients of an adapter's factors, added to `grads`.
    #[expect(clippy::too_many_arguments, reason = "one argument a buffer, named as in the kernel")]
    fn lora_grad(
        &self,
        op: &LoraGrad,
        du: &mut Self::Buf<f32>,
        grads: &mut Self::Buf<f32>,
        dy: &Self::Buf<Self::Act>,
        x: &Self::Buf<Self::Act>,
        u: &Self::Buf<f32>,
        params: &Self::Buf<f32>,
    ) -> Result<()>;
    /// `dx += drop(du A)`
    fn lora_dx(
        &self,
        op: &LoraDx,
        dx: &mut Self::Buf<Self::Act>,
        du: &Self::Buf<f32>,
        params: &Self::Buf<f32>,
    ) -> Result<()>;
    /// The gradients of gate and up.
    fn swiglu_bwd(
        &self,
        op: &SwigluBwd,
        d_gate_up: &mut Self::Buf<Self::Act>,
        dh: &Self::Buf<Self::Act>,
        gate_up: &Self::Buf<Self::Act>,
    ) -> Result<()>;
    /// The gradients of q, k and v.
    #[expect(clippy::too_many_arguments, reason = "one argument a buffer, named as in the kernel")]
    fn attn_bwd(
        &self,
        op: &AttnBwd,
        dqkv: &mut Self::Buf<Self::Act>,
        dout: &Self::Buf<Self::Act>,
        out: &Self::Buf<Self::Act>,
        qkv: &Self::Buf<Self::Act>,
        lse: &Self::Buf<f32>,
        starts: &Self::Buf<u32>,
    ) -> Result<()>;
    /// The length of the gradient.
    fn grad_norm(&self, op: &GradNorm, norm: &mut Self::Buf<f32>, grads: &Self::Buf<f32>) -> Result<()>;
    /// One update of the parameters; zeroes `grads`.
    fn adamw(
        &self,
        op: &AdamW,
        params: &mut Self::Buf<f32>,
        m: &mut Self::Buf<f32>,
        v: &mut Self::Buf<f32>,
        grads: &mut Self::Buf<f32>,
        norm: &Self::Buf<f32>,
    ) -> Result<()>;
}
