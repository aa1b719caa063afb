//! Compares variants of the kernel lab with the shipped kernels: the same case, the same inputs, timed in turn.

use super::{
    Times,
    case::{Bench, Check, KernelOptions, KernelResult, ready},
    ratio::Ratio,
};
use crate::{
    backend::cuda::{Cuda, lab::Variant},
    error::Result,
    ops::Op,
};

/// A variant, loaded.
pub(super) struct Lab {
    variant: &'static Variant,
    cuda: Cuda,
    /// Whether a case has run one of its kernels.
    used: bool,
}

/// Loads the variants of an op.
pub(super) fn open(cuda: &Cuda, stem: &str, variants: &[&'static Variant]) -> Result<Vec<Lab>> {
    let of_op = variants.iter().filter(|v| v.op == stem);
    of_op.map(|variant| Ok(Lab { variant, cuda: cuda.with_variant(variant)?, used: false })).collect()
}

impl Lab {
    /// Checks the variant, and times it in turn with the shipped kernel. `None` when the case runs none of its kernels.
    pub(super) fn case<O: Op>(
        &mut self,
        op: &O,
        shipped: &mut Bench<O>,
        options: &KernelOptions,
    ) -> Option<KernelResult> {
        let mut result = KernelResult::new(op, Some(self.variant.name));
        let kernels = self.variant.kernels();
        let mut run = || -> Result<()> {
            let mut bench = ready(&self.cuda, op, options, &mut result)?;
            if bench.launches().iter().any(|l| kernels.contains(&l.kernel)) {
                let (times, ratio) = in_turn(&mut bench, shipped, options)?;
                (result.times, result.ratio) = (Some(times), Some(ratio));
            }
            Ok(())
        };
        if let Err(e) = run() {
            result.check = Check::Failed(e.to_string());
        }
        let ran = result.times.is_some() || matches!(result.check, Check::Failed(_));
        self.used |= ran;
        ran.then_some(result)
    }

    /// A failed result if no case has run the variant.
    pub(super) fn unused<O: Op>(&self) -> Option<KernelResult> {
        let result = KernelResult::new(O::cases().first()?, Some(self.variant.name));
        let kernels = self.variant.kernels().into_iter().collect::<Vec<_>>().join(", ");
        let why = format!("no case that ran launches one of its kernels ({kernels}): it has not been checked");
        (!self.used).then_some(KernelResult { case: "no case".into(), check: Check::Failed(why), ..result })
    }
}

/// Times of the variant, and their ratio to the shipped kernel's. The two take turns in going first.
fn in_turn<O: Op>(variant: &mut Bench<O>, shipped: &mut Bench<O>, options: &KernelOptions) -> Result<(Times, Ratio)> {
    if !options.once {
        variant.times(1, true)?; // the shipped kernel has been timed already
    }
    let pair = |i: usize| -> Result<(f64, f64)> {
        if i.is_multiple_of(2) {
            let this = variant.time()?;
            return Ok((this, shipped.time()?));
        }
        let other = shipped.time()?;
        Ok((variant.time()?, other))
    };
    let pairs = (0..options.repeat).map(pair).collect::<Result<Vec<_>>>()?;
    Ok((Times::new(pairs.iter().map(|(this, _)| *this).collect()), Ratio::new(&pairs)))
}
