//! How the two are compared, and what an error says of where they were.

use super::{Both, Lockstep};
use crate::{
    backend::{Backend, Buffer},
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

    /// As `settle` for a cache: what the rows wrote is within the tolerance, and all else is equal, so that a write to a wrong place
    /// shows. `heads` is where each row's heads begin, of `head_dim` elements.
    pub(super) fn settle_cache(
        &self,
        op: &dyn Debug,
        output: &str,
        tolerance: Tolerance,
        cache: &mut Both<bf16, D>,
        (heads, head_dim): (&[usize], usize),
    ) -> Result<()> {
        let got = self.device.download(&cache.device)?;
        let written =
            |v: &[bf16]| heads.iter().flat_map(|at| &v[*at..at + head_dim]).map(|x| x.to_f32()).collect::<Vec<_>>();
        let same = tolerance.compare(&written(&got), &written(&cache.host));
        same.map_err(|what| self.disagree(op, output, &what))?;
        heads.iter().for_each(|at| cache.host[*at..at + head_dim].copy_from_slice(&got[*at..at + head_dim]));
        let len = cache.len();
        self.settle(op, output, Tolerance::EXACT, cache, len)
    }

    /// As `settle` for all of a buffer of integers, which must be equal.
    pub(super) fn settle_words(&self, op: &dyn Debug, output: &str, buf: &mut Both<u32, D>) -> Result<()> {
        let Both { host, device } = buf;
        let got = self.device.download(device)?;
        match got.iter().zip(&*host).position(|(g, w)| g != w) {
            None => Ok(()),
            Some(i) => Err(self.disagree(op, output, &format!("element {i} is {}, expected {}", got[i], host[i]))),
        }
    }
}
