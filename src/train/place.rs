//! Where a run computes.

use super::run::{Outcome, TuneEvent, Tuner};
use crate::{
    backend::{Backend, cpu::Cpu},
    engine::Device,
    error::{Error, Result},
};
use half::bf16;
use std::num::NonZeroUsize;

/// A device that was opened, and that takes a run.
pub struct Place(pub(crate) On);

/// The device.
pub(crate) enum On {
    Bf16(Cpu<bf16>),
    F32(Cpu<f32>),
    #[cfg(feature = "cuda")]
    Cuda(Box<crate::backend::cuda::Cuda>),
}

impl Place {
    /// Opens a device for a run. [`Device::Auto`] is the first GPU, if there is one and the run has `bf16: true`, else the CPU;
    /// `threads` is how many compute there, by default one a physical core.
    ///
    /// # Errors
    /// `NoGpu` for a GPU that is not there; those of [`Tuner::fits`].
    pub fn open(tuner: &Tuner, device: Device, threads: Option<NonZeroUsize>) -> Result<Place> {
        let bf16 = tuner.config().bf16;
        let gpu = match device {
            Device::Cpu => None,
            Device::Cuda(n) => Some(Place::cuda(tuner, n)?),
            Device::Auto if !bf16 => None,
            Device::Auto => match Place::cuda(tuner, 0) {
                Err(Error::NoGpu(why)) => {
                    tracing::info!("training on the CPU: {why}");
                    None
                }
                opened => Some(opened?),
            },
        };
        let on = match (gpu, bf16) {
            (Some(gpu), _) => gpu,
            (None, true) => On::Bf16(Cpu::open(threads)?),
            (None, false) => On::F32(Cpu::open(threads)?),
        };
        match &on {
            On::Bf16(b) => tuner.fits(b)?,
            On::F32(b) => tuner.fits(b)?,
            #[cfg(feature = "cuda")]
            On::Cuda(b) => tuner.fits(&**b)?,
        }
        Ok(Place(on))
    }

    #[cfg(feature = "cuda")]
    fn cuda(tuner: &Tuner, n: usize) -> Result<On> {
        if !tuner.config().bf16 {
            return Err(Error::Input(
                "bf16 is false, and a GPU trains in bf16: set bf16: true, or --device cpu".into(),
            ));
        }
        crate::backend::cuda::Cuda::open(n).map(|cuda| On::Cuda(Box::new(cuda)))
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda(_: &Tuner, _: usize) -> Result<On> {
        Err(Error::NoGpu("this binary was built without the feature `cuda`".into()))
    }

    /// Name of the device, for people.
    pub fn name(&self) -> String {
        match &self.0 {
            On::Bf16(b) => b.name(),
            On::F32(b) => b.name(),
            #[cfg(feature = "cuda")]
            On::Cuda(b) => b.name(),
        }
    }

    /// As [`Tuner::run`], here.
    ///
    /// # Errors
    /// As [`Tuner::run`].
    pub fn run(self, tuner: Tuner, event: &mut dyn FnMut(TuneEvent<'_>) -> bool) -> Result<Outcome> {
        match self.0 {
            On::Bf16(b) => tuner.run_on(b, event),
            On::F32(b) => tuner.run_on(b, event),
            #[cfg(feature = "cuda")]
            On::Cuda(b) => tuner.run_on(*b, event),
        }
    }
}

impl Tuner {
    /// Runs to the end on the CPU, or until `event` returns `false`: then it writes a checkpoint from which the run can go on.
    ///
    /// # Errors
    /// `Input` at the first loss or gradient that is not finite, with step, layer and rows; those of [`Tuner::fits`]; those of
    /// writing. The last checkpoint stays.
    pub fn run(self, threads: Option<NonZeroUsize>, event: &mut dyn FnMut(TuneEvent<'_>) -> bool) -> Result<Outcome> {
        Place::open(&self, Device::Cpu, threads)?.run(self, event)
    }
}
