//! Typed device memory.

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
