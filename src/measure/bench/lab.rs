//! Compares variants of the kernel lab with the shipped kernels: the same case, the same inputs, timed in turn.

use super::{
    Times,
    case::{Bench, Case, Check, KernelOptions, KernelResult, ready},
    ratio::Ratio,
};
use crate::{
    backend::cuda::{Cuda, lab::Variant},
    error::Result,
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
    pub(super) fn case(
        &mut self,
        case: &dyn Case,
        shipped: &mut Bench,
        options: &KernelOptions,
    ) -> Option<KernelResult> {
        let mut result = case.result(Some(self.variant.name));
        let kernels = self.variant.kernels();
        let mut run = || -> Result<()> {
            let mut bench = ready(&self.cuda, case, options, &mut result)?;
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

    /// A failed result if none of the cases has run the variant.
    pub(super) fn unused(&self, cases: &[Box<dyn Case>]) -> Option<KernelResult> {
        let result = cases.first()?.result(Some(self.variant.name));
        let kernels = self.variant.kernels().into_iter().collect::<Vec<_>>().join(", ");
        let why = format!("no case that ran launches one of its kernels ({kernels}): it has not been checked");
        (!self.used).then_some(KernelResult { case: "no case".into(), check: Check::Failed(why), ..result })
    }
}

/// Times of the variant, and their ratio to the shipped kernel's. The two take turns in going first.
fn in_turn(variant: &mut Bench, shipped: &mut Bench, options: &KernelOptions) -> Result<(Times, Ratio)> {
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
