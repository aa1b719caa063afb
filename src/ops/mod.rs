//! The ops of the Llama architecture, one file for each.
//!
//! An op is one struct that holds all its sizes. Everything else is a method of it, in the same order in every file:
//! `check` (buffer lengths and limits), `cost` (bytes and flops), `grid` (launch geometry, a pure function),
//! `reference` (the plainest loops, which define what the op computes), `launch` (the CUDA kernel of the same name),
//! and the [`Op`] impl whose `cases` feed the tests, the roofline bench and the README's kernel table.
//!
//! Argument order everywhere: outputs, inputs, weights, sizes, scalars. Shapes are `[rows, cols]`, row-major.

use crate::{
    backend::{Backend, train::TrainBackend},
    error::{Error, Result},
};
use half::bf16;

mod add_rms_norm;
mod argmax;
mod attn_decode;
mod attn_prefill;
mod embed;
mod gemm;
mod gemv;
pub(crate) mod guesses;
mod head_norm;
mod kv_append;
mod log_prob;
mod norm_gate_up;
mod norm_head;
mod norm_head_argmax;
mod norm_qkv_rope_append;
mod paged;
mod rms_norm;
mod rope;
pub mod sample;
mod stream_read;
mod swiglu;
pub mod train;

pub use add_rms_norm::AddRmsNorm;
pub use argmax::Argmax;
pub use attn_decode::AttnDecode;
pub use attn_prefill::AttnPrefill;
pub use embed::Embed;
pub use gemm::Gemm;
#[cfg(feature = "cuda")]
pub(crate) use gemv::product;
pub use gemv::{Gemv, Ring};
pub use head_norm::HeadNorm;
pub use kv_append::KvAppend;
pub use log_prob::LogProb;
pub use norm_gate_up::NormGateUp;
pub use norm_head::NormHead;
pub use norm_head_argmax::NormHeadArgmax;
pub use norm_qkv_rope_append::NormQkvRopeAppend;
pub(crate) use paged::Paged;
pub use paged::{KvDtype, PAGE, scrambled, to_pages};
pub use rms_norm::RmsNorm;
pub use rope::Rope;
pub use sample::Sample;
pub use stream_read::StreamRead;
pub use swiglu::Swiglu;

/// The one list of all ops: calls [`Visitor::op`] once for each, in the order of a layer, forwards and then backwards.
/// Ops that only measure come last.
pub fn each(v: &mut impl Visitor) -> Result<()> {
    v.op::<Embed>()?;
    v.op::<RmsNorm>()?;
    v.op::<AddRmsNorm>()?;
    v.op::<Gemm>()?;
    v.op::<Gemv>()?;
    v.op::<HeadNorm>()?;
    v.op::<Rope>()?;
    v.op::<KvAppend>()?;
    v.op::<AttnPrefill>()?;
    v.op::<AttnDecode>()?;
    v.op::<Swiglu>()?;
    v.op::<NormQkvRopeAppend>()?;
    v.op::<NormGateUp>()?;
    v.op::<NormHead>()?;
    v.op::<NormHeadArgmax>()?;
    v.op::<Argmax>()?;
    v.op::<Sample>()?;
    v.op::<LogProb>()?;
    v.op::<train::LoraDown>()?;
    v.op::<train::LoraUp>()?;
    v.op::<train::AttnPacked>()?;
    v.op::<train::LinearCe>()?;
    v.op::<train::RmsNormBwd>()?;
    v.op::<train::LinearDx>()?;
    v.op::<train::LoraGrad>()?;
    v.op::<train::LoraDx>()?;
    v.op::<train::SwigluBwd>()?;
    v.op::<train::AttnBwd>()?;
    v.op::<train::GradNorm>()?;
    v.op::<train::AdamW>()?;
    v.op::<StreamRead>()
}

/// A loop body over all ops; see [`each`].
pub trait Visitor {
    /// Called with each op's type.
    fn op<O: Op>(&mut self) -> Result<()>;
}

/// What tests, benches and the kernel table need of an op. Its backends are those that have all ops, also those of training.
pub trait Op: Sized + Clone + std::fmt::Debug + 'static {
    /// Name of the op, of `src/ops/<stem>.rs` or `src/ops/train/<stem>.rs`, and of `kernels/<stem>.cu`.
    const STEM: &'static str;
    /// The buffers of one call.
    type Io<B: TrainBackend>;

    /// Edge shapes first (1, odd, just past a tile), then the shapes of Llama-3-8B.
    fn cases() -> Vec<Self>;
    /// Shapes that the CPU takes and the kernels do not.
    fn odd() -> Vec<Self> {
        Vec::new()
    }
    /// Whether the case is small enough for the emulated device, which runs some 10 million accesses a second.
    fn is_small(&self) -> bool {
        let c = self.cost();
        c.read + c.write < 4 << 20 && c.flops < 40_000_000
    }
    /// Bytes that one call must move, and arithmetic that it must do, at least.
    fn cost(&self) -> Cost;
    /// How far a backend may be from the reference.
    fn tolerance(&self) -> Tolerance;
    /// How far the kernel may be, where it rounds on the way what the definition does not.
    fn kernel_tolerance(&self) -> Tolerance {
        self.tolerance()
    }
    /// Allocates the buffers of one call; inputs are functions of `seed` and index, never zeros; outputs are poisoned.
    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>>;
    /// One call of the op through the backend.
    fn run<B: TrainBackend>(&self, b: &B, io: &mut Self::Io<B>) -> Result<()>;
    /// The outputs of the last call as f32, in order.
    fn outputs<B: TrainBackend>(&self, b: &B, io: &Self::Io<B>) -> Result<Vec<f32>>;
}

/// Bytes and floating-point operations of a call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// Bytes that must be read from device memory.
    pub read: u64,
    /// Bytes that must be written to device memory.
    pub write: u64,
    /// Floating-point operations; a multiply-add counts two.
    pub flops: u64,
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, c: Cost) {
        self.read += c.read;
        self.write += c.write;
        self.flops += c.flops;
    }
}

/// Launch geometry of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Blocks in x, y, z.
    pub blocks: [u32; 3],
    /// Threads in a block.
    pub threads: u32,
    /// Dynamic shared memory in bytes.
    pub shared: u32,
}

impl Grid {
    /// One thread per 8 elements (16 bytes of bf16) of each row. Rows are in x, the only direction with room for more than
    /// 65535.
    pub(crate) fn of_vectors(rows: usize, cols: usize) -> Grid {
        let threads = crate::tiles::VECTOR_THREADS;
        Grid { blocks: [rows as u32, cols.div_ceil(8 * threads as usize) as u32, 1], threads, shared: 0 }
    }
}

/// Allowed distance between a backend's result and the reference. Both bounds must hold.
#[derive(Debug, Clone, Copy)]
pub struct Tolerance {
    /// Relative L2 error over all outputs.
    pub l2: f32,
    /// `|got - want| <= abs + rel * |want|` for each output, where `abs` is `worst` times the RMS of all outputs and `rel`
    /// is `worst`.
    pub worst: f32,
}

impl Tolerance {
    /// Bit-exact.
    pub const EXACT: Tolerance = Tolerance { l2: 0.0, worst: 0.0 };
    /// One bf16 rounding of values whose f32 sums differ only in their order: a few elements are rounded to the
    /// neighbouring number (2^-8 relative).
    pub const BF16: Tolerance = Tolerance { l2: 1e-3, worst: 8.0e-3 };

    /// For a fused op, which leaves out a rounding of an intermediate to bf16, or rounds elsewhere. It cannot be
    /// tighter: `norm_head` and its definition are each off by up to 2.7e-3 (L2) from the same in f32, and by as much
    /// from each other. Ops with more roundings on the way have a tolerance of their own.
    pub const FUSED: Tolerance = Tolerance { l2: 4e-3, worst: 1.6e-2 };

    /// Compares `got` with `want`; the error names the worst element. The worst element is bounded by `worst` and left
    /// out of the sum: if one of 128 outputs is rounded to the other neighbour, that alone makes an L2 of up to 1.5e-3,
    /// and so does adding the same f32 numbers in another order (5 of 84000 random attentions were above 1e-3). Without
    /// the worst element the largest was 6.1e-4, for the kernel and for another order alike.
    pub fn compare(&self, got: &[f32], want: &[f32]) -> Result<(), String> {
        if got.len() != want.len() {
            return Err(format!("{} outputs, expected {}", got.len(), want.len()));
        }
        if let Some(i) = got.iter().zip(want).position(|(g, w)| g.is_nan() != w.is_nan()) {
            return Err(format!("output {i} is {}, expected {}", got[i], want[i]));
        }
        let rms = (want.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>() / want.len().max(1) as f64).sqrt();
        let (mut sum, mut largest, mut worst, mut at) = (0f64, 0f64, 0f64, 0);
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            if g == w || g.is_nan() {
                continue; // equal infinities too
            }
            let d = (f64::from(*g) - f64::from(*w)).abs();
            (sum, largest) = (sum + d * d, largest.max(d * d));
            let scaled = d / (rms + f64::from(*w).abs()).max(f64::MIN_POSITIVE);
            if scaled > worst {
                (worst, at) = (scaled, i);
            }
        }
        let l2 = ((sum - largest) / want.len().max(1) as f64).sqrt() / rms.max(f64::MIN_POSITIVE);
        if l2 > f64::from(self.l2) || worst > f64::from(self.worst) {
            return Err(format!(
                "relative L2 error {l2:.2e} (allowed {:.2e}), worst {worst:.2e} (allowed {:.2e}) at output {at}: got {}, \
                 expected {}",
                self.l2, self.worst, got[at], want[at]
            ));
        }
        Ok(())
    }
}

/// `Err` that names the op, the argument, its length and the expected length.
pub(crate) fn expect_len(op: &'static str, arg: &str, found: usize, expected: usize) -> Result<()> {
    expect(op, found == expected, || format!("{arg} has {found} elements, expected {expected}"))
}

/// `Err` with the message when a size or a limit is wrong.
pub(crate) fn expect(op: &'static str, ok: bool, what: impl FnOnce() -> String) -> Result<()> {
    if ok { Ok(()) } else { Err(Error::Op { op, what: what() }) }
}

/// Kernels take sizes as `int`: each of them must fit.
#[cfg(feature = "cuda")]
pub(crate) fn expect_ints(op: &'static str, sizes: &[usize]) -> Result<()> {
    let large = sizes.iter().find(|n| i32::try_from(**n).is_err());
    expect(op, large.is_none(), || format!("a size is {}, the kernel takes less than 2^31", large.unwrap_or(&0)))
}

/// A type of value in buffers: plain bytes, safe to copy between host and device.
pub trait Element: bytemuck::Pod + Send + Sync + std::fmt::Debug + 'static {}
impl Element for f32 {}
impl Element for bf16 {}
impl Element for u32 {}

/// An activation or weight type. Arithmetic is always in f32; `from_f32` is where a backend rounds.
pub trait Act: Element {
    /// As users name it.
    const NAME: &'static str;
    /// Rounds to nearest even.
    fn from_f32(x: f32) -> Self;
    /// Exact.
    fn to_f32(self) -> f32;
}

impl Act for f32 {
    const NAME: &'static str = "f32";
    fn from_f32(x: f32) -> f32 {
        x
    }
    fn to_f32(self) -> f32 {
        self
    }
}

impl Act for bf16 {
    const NAME: &'static str = "bf16";
    fn from_f32(x: f32) -> bf16 {
        bf16::from_f32(x)
    }
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
}

/// Deterministic inputs for cases: values in [-1, 1) that are bf16 numbers and differ between neighbours and between
/// rows, so that a wrong index is noticed.
pub fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut s = seed.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        (s >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| bf16::from_f32(next()).to_f32()).collect()
}

/// Deterministic numbers below `below` for cases: token ids.
pub(crate) fn noise_ids(len: usize, below: usize, seed: u64) -> Vec<u32> {
    noise(len, seed).into_iter().map(|x| ((x + 1.0) / 2.0 * below as f32) as u32 % below as u32).collect()
}

/// [`noise`] as an activation buffer.
pub(crate) fn noise_buf<B: Backend>(b: &B, len: usize, seed: u64, scale: f32) -> Result<B::Buf<B::Act>> {
    let v: Vec<B::Act> = noise(len, seed).into_iter().map(|x| B::Act::from_f32(x * scale)).collect();
    b.upload(&v)
}

/// [`noise`] as a weight matrix of standard deviation about `0.6 * scale`.
pub(crate) fn noise_weight<B: Backend>(b: &B, rows: usize, cols: usize, seed: u64, scale: f32) -> Result<B::Weight> {
    let v: Vec<bf16> = noise(rows * cols, seed).into_iter().map(|x| bf16::from_f32(x * scale)).collect();
    b.weight_from(rows, cols, &v)
}

/// An output buffer full of NaN, so that an element that no thread writes is noticed.
pub(crate) fn poison<B: Backend>(b: &B, len: usize) -> Result<B::Buf<B::Act>> {
    b.upload(&vec![B::Act::from_f32(f32::NAN); len])
}

/// Downloads activations as f32.
pub(crate) fn download<B: Backend>(b: &B, buf: &B::Buf<B::Act>) -> Result<Vec<f32>> {
    Ok(b.download(buf)?.into_iter().map(Act::to_f32).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_flipped_rounding_is_bounded_by_itself() {
        let want: Vec<f32> = (0..128).map(|i| 0.3 + i as f32 / 128.0).collect();
        let off = |at: &[usize], by: f32| -> Vec<f32> {
            want.iter().enumerate().map(|(i, w)| if at.contains(&i) { w * (1.0 + by) } else { *w }).collect()
        };
        let fails = |got: Vec<f32>| Tolerance::BF16.compare(&got, &want).is_err();
        assert!(!fails(off(&[127], 7.8e-3)), "a bf16 to the next");
        assert!(fails(off(&[126, 127], 7.8e-3)), "two of them are an L2 of 1e-3");
        assert!(fails(off(&[127], 3e-2)), "one that is off by more");
        let exact = Tolerance::EXACT;
        assert!(exact.compare(&off(&[5], 1e-6), &want).is_err() && exact.compare(&want, &want).is_ok());
    }
}
