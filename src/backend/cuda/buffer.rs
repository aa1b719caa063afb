//! Typed device memory.

use super::packed::Kind;
use crate::{backend, ops::Element};
use cudarc::driver::CudaSlice;
use std::marker::PhantomData;

/// `len` values of type `T` on the device.
pub struct Buffer<T> {
    /// Owns the memory; freed on the stream when dropped.
    pub(super) bytes: CudaSlice<u8>,
    pub(super) address: u64,
    pub(super) len: usize,
    pub(super) kind: PhantomData<T>,
}

impl<T> Buffer<T> {
    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// No elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl<T: Element> backend::Buffer for Buffer<T> {
    fn len(&self) -> usize {
        self.len
    }
}

/// A matrix [rows, cols] on the device.
pub struct Weight {
    /// Its elements; for a packed (quantized) matrix its records, as words of 16 bits.
    pub data: Buffer<half::bf16>,
    /// `n` of a matrix product.
    pub rows: usize,
    /// `k` of a matrix product.
    pub cols: usize,
    /// How its data is encoded.
    pub kind: Kind,
    /// What products add to each column of their result. `[rows]`
    pub bias: Option<Buffer<half::bf16>>,
}

impl backend::Shaped for Weight {
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }
}
