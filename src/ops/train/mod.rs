//! The ops of training: what a LoRA adapter adds to the forward pass, and the backward pass.
//!
//! Each file is built as in [`crate::ops`]. Ops are called through [`TrainBackend`](crate::backend::train::TrainBackend).
//! Every reference computes in f64, whatever the type of its buffers. So each backward op can be checked against central
//! differences of its forward op in f64 (at the end of each file), and every backend is checked against the reference.
//!
//! Gradients of activations have the type and the shape of the activations. Adapters are f32: all factors of a model
//! are in one buffer of parameters, and their gradients at the same indices of another one. Both factors are stored by
//! rows: `A` [r, k] as PEFT has it, and `Bt` [r, n], the transpose of PEFT's `lora_B`.

use super::{Grid, Tolerance};
use crate::{backend::Backend, error::Result, tiles};
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

/// For kernels that take each f32 of the factors as two bf16, which are it up to 2^-17: over the small cases an L2 of 3.2e-6, the worst element 2.6e-5.
const SPLIT: Tolerance = Tolerance { l2: 6e-6, worst: 5e-5 };

/// Launch of a product with few columns, `lora_narrow` of `kernels/common/lora.cuh`: blocks over rows and ranks.
fn narrow_grid(rows: usize, rank: usize) -> Grid {
    let (depth, ranks) = (tiles::LORA_DEPTH, tiles::LORA_RANKS);
    let stage = 2 * tiles::LORA_ROWS * depth + 4 * ranks * (depth + 8);
    let blocks = [rows.div_ceil(tiles::LORA_ROWS as usize) as u32, rank.div_ceil(ranks as usize) as u32, 1];
    Grid { blocks, threads: tiles::LORA_THREADS, shared: tiles::LORA_STAGES * stage }
}

/// Launch of a sum over ranks, `lora_wide` of `kernels/common/lora.cuh`: blocks over rows and columns.
fn wide_grid(rows: usize, n: usize) -> Grid {
    let blocks = [rows.div_ceil(tiles::LORA_ROWS as usize) as u32, n.div_ceil(tiles::LORA_COLS as usize) as u32, 1];
    Grid { blocks, threads: tiles::LORA_THREADS, shared: 0 }
}

/// The kernels read and write 16 bytes at a time, so the widths of what they take are multiples of 8, and places among the
/// parameters multiples of 4.
#[cfg(feature = "cuda")]
fn expect_chunks(op: &'static str, sizes: &dyn std::fmt::Debug, widths: &[usize], places: &[usize]) -> Result<()> {
    let fits = widths.iter().all(|n| n.is_multiple_of(8)) && places.iter().all(|n| n.is_multiple_of(4));
    super::expect(op, fits, || {
        format!(
            "{sizes:?}: the kernel needs widths and a rank that are multiples of 8, and places that are multiples of 4"
        )
    })
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
