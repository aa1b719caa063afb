//! The ops of training, counted.

use super::{Count, Length, Shape};
use crate::{
    backend::train::TrainBackend,
    error::Result,
    ops::{
        Cost,
        train::{
            AdamW, AttnBwd, AttnPacked, GradNorm, LinearCe, LinearDx, LoraDown, LoraDx, LoraGrad, LoraUp, RmsNormBwd,
            SwigluBwd,
        },
    },
};
use half::bf16;

type Acts = Length<bf16>;
type Floats = Length<f32>;
type Words = Length<u32>;

impl TrainBackend for Count {
    fn copy_from(&self, _dst: &mut Acts, _src: &Acts, len: usize) -> Result<()> {
        self.add("copy_from", Cost { read: 2 * len as u64, write: 2 * len as u64, flops: 0 })
    }
    fn lora_down(&self, op: &LoraDown, _u: &mut Floats, _x: &Acts, _params: &Floats) -> Result<()> {
        self.op(op)
    }
    fn lora_up(&self, op: &LoraUp, _y: &mut Acts, _u: &Floats, _params: &Floats) -> Result<()> {
        self.op(op)
    }
    fn attn_packed(
        &self,
        op: &AttnPacked,
        _out: &mut Acts,
        _lse: &mut Floats,
        _qkv: &Acts,
        _starts: &Words,
    ) -> Result<()> {
        self.op(op)
    }
    fn linear_ce(
        &self,
        op: &LinearCe,
        _loss: &mut Floats,
        _dx: &mut Acts,
        _x: &Acts,
        _at: &Words,
        _target: &Words,
        _w: &Shape,
    ) -> Result<()> {
        self.op(op)
    }
    fn rms_norm_bwd(&self, op: &RmsNormBwd, _dx: &mut Acts, _dy: &Acts, _x: &Acts, _w: &Shape) -> Result<()> {
        self.op(op)
    }
    fn linear_dx(&self, op: &LinearDx, _dx: &mut Acts, _dy: &Acts, _w: &Shape) -> Result<()> {
        self.op(op)
    }
    fn lora_grad(
        &self,
        op: &LoraGrad,
        _du: &mut Floats,
        _grads: &mut Floats,
        _dy: &Acts,
        _x: &Acts,
        _u: &Floats,
        _params: &Floats,
    ) -> Result<()> {
        self.op(op)
    }
    fn lora_dx(&self, op: &LoraDx, _dx: &mut Acts, _du: &Floats, _params: &Floats) -> Result<()> {
        self.op(op)
    }
    fn swiglu_bwd(&self, op: &SwigluBwd, _d_gate_up: &mut Acts, _dh: &Acts, _gate_up: &Acts) -> Result<()> {
        self.op(op)
    }
    fn attn_bwd(
        &self,
        op: &AttnBwd,
        _dqkv: &mut Acts,
        _dout: &Acts,
        _out: &Acts,
        _qkv: &Acts,
        _lse: &Floats,
        _starts: &Words,
    ) -> Result<()> {
        self.op(op)
    }
    fn grad_norm(&self, op: &GradNorm, _norm: &mut Floats, _grads: &Floats) -> Result<()> {
        self.op(op)
    }
    fn adamw(
        &self,
        op: &AdamW,
        _params: &mut Floats,
        _m: &mut Floats,
        _v: &mut Floats,
        _grads: &mut Floats,
        _norm: &Floats,
    ) -> Result<()> {
        self.op(op)
    }
}
