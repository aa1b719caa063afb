//! Measures kernels: all cases of all ops, one call at a time.

use super::{
    case::{Bench, Case, Check, KernelOptions, KernelResult, ready},
    lab,
};
use crate::{
    backend::cuda::Cuda,
    error::{Error, Result},
    ops::{self, Op, Visitor},
};

/// Runs all cases of all ops. `each` gets every result as soon as it is known: first the shipped kernel's, then each
/// variant's. A case that fails does not stop the others.
///
/// # Errors
/// `Input` when no op has the name; what opening the GPU for a variant says.
pub fn kernels(cuda: &Cuda, options: &KernelOptions, each: &mut dyn FnMut(KernelResult)) -> Result<()> {
    struct All<'a> {
        cuda: &'a Cuda,
        options: &'a KernelOptions,
        each: &'a mut dyn FnMut(KernelResult),
        stems: Vec<&'static str>,
        found: bool,
    }
    impl Visitor for All<'_> {
        fn op<O: Op>(&mut self) -> Result<()> {
            self.stems.push(O::STEM);
            let variants = &self.options.variants;
            let of_variant = variants.is_empty() || variants.iter().any(|v| v.op == O::STEM);
            if !self.options.stem.as_ref().map_or(of_variant, |s| s == O::STEM) {
                return Ok(());
            }
            self.found = true;
            self.cases(O::STEM, &O::cases().into_iter().map(|c| Box::new(c) as Box<dyn Case>).collect::<Vec<_>>())
        }
    }
    impl All<'_> {
        fn cases(&mut self, stem: &str, cases: &[Box<dyn Case>]) -> Result<()> {
            let mut labs = lab::open(self.cuda, stem, &self.options.variants)?;
            let small = self.options.small || self.cuda.info().is_emulated();
            for case in cases.iter().filter(|c| !small || c.is_small()) {
                let (mut bench, result) = shipped(self.cuda, &**case, self.options);
                (self.each)(result);
                for lab in labs.iter_mut() {
                    if let Some(result) = bench.as_mut().and_then(|bench| lab.case(&**case, bench, self.options)) {
                        (self.each)(result);
                    }
                }
            }
            labs.iter().filter_map(|lab| lab.unused(cases)).for_each(&mut self.each);
            Ok(())
        }
    }
    let mut all = All { cuda, options, each, stems: Vec::new(), found: false };
    ops::each(&mut all)?;
    match (&options.stem, all.found) {
        (Some(stem), false) => {
            Err(Error::Input(format!("there is no op {stem:?}; there are {}", all.stems.join(", "))))
        }
        _ => Ok(()),
    }
}

/// Checks and times a case with the shipped kernels. If that fails, the first value is `None`.
fn shipped<'a>(cuda: &'a Cuda, case: &dyn Case, options: &KernelOptions) -> (Option<Bench<'a>>, KernelResult) {
    let mut result = case.result(None);
    let mut run = || -> Result<Bench> {
        let mut bench = ready(cuda, case, options, &mut result)?;
        result.times = Some(bench.times(options.repeat, !options.once)?);
        Ok(bench)
    };
    let bench = run().map_err(|e| result.check = Check::Failed(e.to_string())).ok();
    (bench, result)
}
