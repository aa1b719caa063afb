//! The element types of plain tensors: their names, and their values.

use half::{bf16, f16};
use std::fmt;

/// Element type of a tensor in a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// bfloat16, the upper half of an f32.
    Bf16,
    /// IEEE 754 binary16.
    F16,
    /// IEEE 754 binary32.
    F32,
}

impl Dtype {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::F32 => 4,
        }
    }

    /// Elements in little-endian order as f32, exactly. `bytes` is whole elements of any alignment.
    pub fn to_f32(self, bytes: &[u8]) -> Vec<f32> {
        let mut values = vec![0f32; bytes.len() / self.bytes()];
        self.read(bytes, &mut values);
        values
    }

    /// The first elements of `bytes`, as many as `values` holds; see [`Dtype::to_f32`].
    pub(crate) fn read(self, bytes: &[u8], values: &mut [f32]) {
        fn each<const N: usize>(bytes: &[u8], values: &mut [f32], value: impl Fn([u8; N]) -> f32) {
            values.iter_mut().zip(bytes.as_chunks().0).for_each(|(x, b)| *x = value(*b));
        }
        match self {
            Dtype::Bf16 => each(bytes, values, |b| bf16::from_le_bytes(b).to_f32()),
            Dtype::F16 => each(bytes, values, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::F32 => each(bytes, values, f32::from_le_bytes),
        }
    }

    /// Rounds `values` into `out`, elements in little-endian order.
    pub fn round(self, values: &[f32], out: &mut [u8]) {
        fn each<const N: usize>(values: &[f32], out: &mut [u8], bytes: impl Fn(f32) -> [u8; N]) {
            out.as_chunks_mut().0.iter_mut().zip(values).for_each(|(b, x)| *b = bytes(*x));
        }
        match self {
            Dtype::Bf16 => each(values, out, |x| bf16::from_f32(x).to_le_bytes()),
            Dtype::F16 => each(values, out, |x| f16::from_f32(x).to_le_bytes()),
            Dtype::F32 => each(values, out, f32::to_le_bytes),
        }
    }

    /// The name in `config.json` (`torch_dtype`).
    pub fn hf_name(self) -> &'static str {
        match self {
            Dtype::Bf16 => "bfloat16",
            Dtype::F16 => "float16",
            Dtype::F32 => "float32",
        }
    }

    /// What safetensors call it.
    pub(crate) fn safetensors(self) -> safetensors::Dtype {
        match self {
            Dtype::Bf16 => safetensors::Dtype::BF16,
            Dtype::F16 => safetensors::Dtype::F16,
            Dtype::F32 => safetensors::Dtype::F32,
        }
    }

    /// That of a safetensors file; the error says what was expected and what was found.
    pub(crate) fn of(dtype: safetensors::Dtype) -> Result<Dtype, [String; 2]> {
        let all = [Dtype::Bf16, Dtype::F16, Dtype::F32];
        let found = all.into_iter().find(|own| own.safetensors() == dtype);
        found.ok_or_else(|| ["dtype BF16, F16 or F32".into(), format!("dtype {dtype:?}")])
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Dtype::Bf16 => "bf16",
            Dtype::F16 => "f16",
            Dtype::F32 => "f32",
        })
    }
}
