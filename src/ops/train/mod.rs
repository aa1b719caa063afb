//! The ops of training: what a LoRA adapter adds to the forward pass, and the backward pass.
//!
//! Each file is built as in [`crate::ops`]: one struct with all sizes, `check`, `reference`, and the [`TrainOp`] impl
//! with `cost`, `cases` and tolerance. The op is called through [`TrainBackend`]. Every reference computes in f64,
//! whatever the type of its buffers. So each backward op can be checked against central differences of its forward op
//! in f64 (at the end of each file), and every backend is checked against the reference.
//!
//! Gradients of activations have the type and the shape of the activations. Adapters are f32: all factors of a model
//! are in one buffer of parameters, and their gradients at the same indices of another one. Both factors are stored by
//! rows: `A` [r, k] as PEFT has it, and `Bt` [r, n], the transpose of PEFT's `lora_B`.

use super::{Act, Cost, Tolerance};
use crate::{
    backend::{Backend, cpu::Cpu, train::TrainBackend},
    error::Result,
};
use half::bf16;

mod adamw;
mod attn_bwd;
mod attn_packed;
mod dropout;
mod grad_norm;
mod linear_ce;
mod linear_dx;
mod lora_down;
mod lora_dx;
mod lora_grad;
mod lora_up;
mod rms_norm_bwd;
mod swiglu_bwd;

pub use adamw::{AdamW, Factors};
pub use attn_bwd::AttnBwd;
pub use attn_packed::AttnPacked;
pub use dropout::Dropout;
pub use grad_norm::GradNorm;
pub use linear_ce::LinearCe;
pub use linear_dx::LinearDx;
pub use lora_down::LoraDown;
pub use lora_dx::LoraDx;
pub use lora_grad::LoraGrad;
pub use lora_up::LoraUp;
pub use rms_norm_bwd::RmsNormBwd;
pub use swiglu_bwd::SwigluBwd;

/// A number of a buffer, for references: read exactly, rounded once when written.
pub trait Real: Copy + Default + std::fmt::Debug {
    /// Exact.
    fn get(self) -> f64;
    /// Rounds to nearest.
    fn put(x: f64) -> Self;
}
impl Real for f64 {
    fn get(self) -> f64 {
        self
    }
    fn put(x: f64) -> f64 {
        x
    }
}
impl Real for f32 {
    fn get(self) -> f64 {
        f64::from(self)
    }
    fn put(x: f64) -> f32 {
        x as f32
    }
}
impl Real for bf16 {
    fn get(self) -> f64 {
        self.to_f64()
    }
    fn put(x: f64) -> bf16 {
        bf16::from_f64(x)
    }
}

/// What tests need of an op of training; [`crate::ops::Op`] is the same for the others.
pub trait TrainOp: Sized + Clone + std::fmt::Debug {
    /// Name of the op and of `src/ops/train/<stem>.rs`.
    const STEM: &'static str;
    /// The buffers of one call.
    type Io<B: TrainBackend>;

    /// Edge shapes first.
    fn cases() -> Vec<Self>;
    /// Bytes moved and arithmetic done by one call, at least.
    fn cost(&self) -> Cost;
    /// How far a backend may be from the reference.
    fn tolerance(&self) -> Tolerance;
    /// Allocates the buffers of one call; inputs are functions of `seed` and index, never zeros; outputs are poisoned.
    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>>;
    /// One call of the op through the backend.
    fn run<B: TrainBackend>(&self, b: &B, io: &mut Self::Io<B>) -> Result<()>;
    /// The same call by the reference.
    fn define<A: Act + Real>(&self, io: &mut Self::Io<Cpu<A>>);
    /// The outputs of the last call as f32, in order.
    fn outputs<B: TrainBackend>(&self, b: &B, io: &Self::Io<B>) -> Result<Vec<f32>>;
}

/// Calls [`TrainVisitor::op`] once for each op of training. The one list of them.
///
/// # Errors
/// The visitor's.
pub fn each(v: &mut impl TrainVisitor) -> Result<()> {
    v.op::<LoraDown>()?;
    v.op::<LoraUp>()?;
    v.op::<AttnPacked>()?;
    v.op::<LinearCe>()?;
    v.op::<RmsNormBwd>()?;
    v.op::<LinearDx>()?;
    v.op::<LoraGrad>()?;
    v.op::<LoraDx>()?;
    v.op::<SwigluBwd>()?;
    v.op::<AttnBwd>()?;
    v.op::<GradNorm>()?;
    v.op::<AdamW>()
}

/// A loop body over all ops of training; see [`each`].
pub trait TrainVisitor {
    /// Called with each op's type.
    fn op<O: TrainOp>(&mut self) -> Result<()>;
}

/// [`super::noise`] as f32 in a backend's memory.
pub(crate) fn noise_f32<B: Backend>(b: &B, len: usize, seed: u64, scale: f32) -> Result<B::Buf<f32>> {
    let v: Vec<f32> = super::noise(len, seed).into_iter().map(|x| x * scale).collect();
    b.upload(&v)
}

/// f32 in a backend's memory that are NaN.
pub(crate) fn poison_f32<B: Backend>(b: &B, len: usize) -> Result<B::Buf<f32>> {
    b.upload(&vec![f32::NAN; len])
}

#[cfg(test)]
pub(crate) mod checks {
    //! Backward passes against central differences of the forward pass, in f64.
    use crate::ops::noise;

    /// Different numbers for each seed.
    pub fn values(len: usize, seed: u64, scale: f64) -> Vec<f64> {
        noise(len, seed).into_iter().map(|x| f64::from(x) * scale).collect()
    }

    /// `sum(a * b)`
    pub fn dot(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    /// Asserts that `got` is the gradient of `f` at `x`: each element within 1e-6 of the central difference, relative
    /// to the largest.
    pub fn gradient(name: &str, f: impl Fn(&[f64]) -> f64, x: &[f64], got: &[f64]) {
        assert_eq!(x.len(), got.len(), "{name}");
        let (h, mut x) = (1e-5, x.to_vec());
        let want: Vec<f64> = (0..x.len())
            .map(|i| {
                let at = x[i];
                x[i] = at + h;
                let up = f(&x);
                x[i] = at - h;
                let down = f(&x);
                x[i] = at;
                (up - down) / (2.0 * h)
            })
            .collect();
        let largest = want.iter().fold(1e-3, |m: f64, w| m.max(w.abs()));
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            assert!((got - want).abs() < 1e-6 * largest, "{name}: {got} at {i}, the difference is {want}");
        }
    }
}
