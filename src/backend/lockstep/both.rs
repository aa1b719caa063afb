//! What both backends have of a model.

use crate::{
    backend::{Backend, Buffer, Shaped, cpu},
    ops::Element,
};
use half::bf16;

/// A buffer on both sides.
pub struct Both<T: Element, D: Backend<Act = bf16>> {
    pub(super) host: Vec<T>,
    /// The device's half.
    pub device: D::Buf<T>,
}

impl<T: Element, D: Backend<Act = bf16>> Buffer for Both<T, D> {
    fn len(&self) -> usize {
        self.host.len()
    }
}

/// A weight on both sides.
pub struct BothWeight<D: Backend> {
    /// The reference's.
    pub host: cpu::Weight,
    /// The device's.
    pub device: D::Weight,
}

impl<D: Backend> Shaped for BothWeight<D>
where
    D::Weight: Shaped,
{
    fn shape(&self) -> (usize, usize) {
        self.host.shape()
    }
}
