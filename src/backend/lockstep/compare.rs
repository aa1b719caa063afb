//! How the two are compared, and what an error says of where they were.

use super::{Both, Lockstep};
use crate::{
    backend::Backend,
    error::{Error, Result},
    ops::{Element, NormHead, NormQkvRopeAppend, Op, Tolerance},
};
use half::bf16;
use std::{fmt::Debug, sync::PoisonError};

#[derive(Default)]
pub(super) struct Progress {
    /// Ops so far.
    ops: u64,
    /// The fused op that came last.
    stage: Option<&'static str>,
    /// Layers begun in this pass.
    layers: usize,
}

/// Types that can be compared, as f32 and without loss.
pub(super) trait Compared: Element {
    fn compared(self) -> f32;
}
impl Compared for bf16 {
    fn compared(self) -> f32 {
        self.to_f32()
    }
}
impl Compared for f32 {
    fn compared(self) -> f32 {
        self
    }
}

impl<D: Backend<Act = bf16>> Lockstep<D> {
    pub(super) fn enter(&self, fused: &'static str) {
        let mut p = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        p.layers += usize::from(fused == NormQkvRopeAppend::STEM); // with which a layer begins
        p.stage = Some(fused);
    }

    pub(super) fn disagree(&self, op: &dyn Debug, output: &str, what: &str) -> Error {
        let p = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        let stage = match (p.stage, p.layers) {
            (Some(NormHead::STEM), _) => ", in or after norm_head".into(),
            (Some(fused), n @ 1..) => format!(", in or after {fused} of layer {}", n - 1),
            _ => String::new(),
        };
        Error::Disagree(format!("op {}{stage}: {op:?}: {output}: {what}", p.ops))
    }

    pub(super) fn begin_pass(&self) {
        let mut p = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        (p.stage, p.layers) = (None, 0);
    }

    pub(super) fn count_op(&self) {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).ops += 1;
    }

    /// Compares the first `len` elements of an output, then gives the device's values to the reference.
    pub(super) fn settle<T: Compared>(
        &self,
        op: &dyn Debug,
        output: &str,
        tolerance: Tolerance,
        buf: &mut Both<T, D>,
        len: usize,
    ) -> Result<()> {
        let Both { host, device } = buf;
        let mut got = vec![T::zeroed(); len];
        self.device.read(&mut got, device, 0)?;
        let f32s = |v: &[T]| v.iter().map(|x| x.compared()).collect::<Vec<f32>>();
        let same = tolerance.compare(&f32s(&got), &f32s(&host[..len]));
        same.map_err(|what| self.disagree(op, output, &what))?;
        host[..len].copy_from_slice(&got);
        Ok(())
    }

    /// As `settle` for all of a buffer, whose bits must be equal: integers, or a cache, in which a write to a wrong place shows.
    pub(super) fn settle_bits<T: Element>(&self, op: &dyn Debug, output: &str, buf: &mut Both<T, D>) -> Result<()> {
        let Both { host, device } = buf;
        let got = self.device.download(device)?;
        match got.iter().zip(&*host).position(|(g, w)| bytemuck::bytes_of(g) != bytemuck::bytes_of(w)) {
            None => Ok(()),
            Some(i) => Err(self.disagree(op, output, &format!("element {i} is {:?}, expected {:?}", got[i], host[i]))),
        }
    }
}
