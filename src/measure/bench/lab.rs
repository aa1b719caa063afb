//! Variants of the lab against the shipped kernels: the same case, the same inputs, timed in turn.

use super::{Bench, Check, KernelOptions, KernelResult, Times, kernels::ready};
use crate::{
    backend::cuda::{Cuda, lab::Variant},
    error::Result,
    ops::Op,
};
use serde::Serialize;

/// A time as a multiple of another, from pairs of runs one right after the other. What drifts, as clocks and temperature do,
/// is the same for both of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Ratio {
    /// Median over the pairs.
    pub p50: f64,
    /// From here to `high` the true median is with at least 95% confidence; of fewer than six pairs, the lowest.
    pub low: f64,
    /// The other end.
    pub high: f64,
}

impl Ratio {
    /// Of at least one pair `(this, other)`. The interval is that of order statistics: it asks nothing of the distribution.
    pub fn new(pairs: &[(f64, f64)]) -> Ratio {
        let mut r: Vec<f64> = pairs.iter().map(|(this, other)| this / other).collect();
        r.sort_by(f64::total_cmp);
        let n = r.len();
        // how many of n pairs are below the median: Binomial(n, 1/2), of which this half width holds 95%
        let width = 0.98 * (n as f64).sqrt();
        let low = ((n as f64 / 2.0 - width) as usize).saturating_sub(1);
        Ratio { p50: (r[(n - 1) / 2] + r[n / 2]) / 2.0, low: r[low], high: r[n - 1 - low] }
    }

    /// What it says: `faster`, `slower`, or `no difference` when the interval holds 1.
    pub fn verdict(&self) -> &'static str {
        match () {
            () if self.high < 1.0 => "faster",
            () if self.low > 1.0 => "slower",
            () => "no difference",
        }
    }
}

/// A variant, loaded.
pub(super) struct Lab {
    variant: &'static Variant,
    cuda: Cuda,
    /// A case ran one of its kernels.
    used: bool,
}

/// Loads the variants of an op.
pub(super) fn open(cuda: &Cuda, stem: &str, variants: &[&'static Variant]) -> Result<Vec<Lab>> {
    let of_op = variants.iter().filter(|v| v.op == stem);
    of_op.map(|variant| Ok(Lab { variant, cuda: cuda.with_variant(variant)?, used: false })).collect()
}

impl Lab {
    /// Checks the variant and times it in turn with the shipped kernel; nothing when the case runs none of its kernels.
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

    /// The failure of a variant that no case has run.
    pub(super) fn unused<O: Op>(&self) -> Option<KernelResult> {
        let result = KernelResult::new(O::cases().first()?, Some(self.variant.name));
        let kernels = self.variant.kernels().into_iter().collect::<Vec<_>>().join(", ");
        let why = format!("no case that ran launches one of its kernels ({kernels}): it has not been checked");
        (!self.used).then_some(KernelResult { case: "no case".into(), check: Check::Failed(why), ..result })
    }
}

/// Times of the variant, and their ratio to the shipped kernel's. Who is first changes from pair to pair.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_and_what_it_is_worth() {
        let pairs =
            |ratios: &[f64]| -> Ratio { Ratio::new(&ratios.iter().map(|r| (2.0 * r, 2.0)).collect::<Vec<_>>()) };
        assert_eq!(pairs(&[0.5]), Ratio { p50: 0.5, low: 0.5, high: 0.5 });
        assert_eq!(pairs(&[1.5, 0.5, 0.75]), Ratio { p50: 0.75, low: 0.5, high: 1.5 });
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        // Binomial(100, 1/2) is from 40 to 60 in 96.5% of all cases
        assert_eq!(pairs(&hundred), Ratio { p50: 50.5, low: 40.0, high: 61.0 });
        let verdict = |low, high| Ratio { p50: 1.0, low, high }.verdict();
        assert_eq!(verdict(0.8, 0.9), "faster");
        assert_eq!(verdict(1.1, 1.2), "slower");
        assert_eq!(verdict(0.9, 1.1), "no difference");
    }
}
