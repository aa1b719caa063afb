//! Each op's cases on a GPU; `cargo bench --bench kernels -- gemv` runs those of one op.
//!
//! The same measurement as `aoji bench --kernels`, with criterion's statistics and its comparison with the run before.

use aoji::{Result, bench::Bench, cuda::Cuda, ops, ops::Op, ops::Visitor};
use criterion::{Criterion, Throughput};
use std::time::Duration;

struct All<'a> {
    criterion: &'a mut Criterion,
    cuda: &'a Cuda,
}

impl Visitor for All<'_> {
    fn op<O: Op>(&mut self) -> Result<()> {
        let mut group = self.criterion.benchmark_group(O::STEM);
        for op in O::cases() {
            let cost = op.cost();
            group.throughput(Throughput::Bytes(cost.read + cost.write));
            group.bench_function(format!("{op:?}"), |b| {
                // made here, so that cases that were not asked for take no memory
                let mut bench = Bench::new(self.cuda, op.clone(), false).unwrap_or_else(|e| panic!("{op:?}: {e}"));
                bench.times(1, true).unwrap_or_else(|e| panic!("{op:?}: {e}"));
                b.iter_custom(|n| {
                    let ms = (0..n).map(|_| bench.time().unwrap_or_else(|e| panic!("{op:?}: {e}"))).sum::<f64>();
                    Duration::from_secs_f64(ms / 1e3)
                });
            });
        }
        group.finish();
        Ok(())
    }
}

fn main() -> Result<()> {
    let cuda = match Cuda::open(0) {
        Ok(cuda) if !cuda.info().is_emulated() => cuda,
        Ok(_) => {
            println!("nothing to measure: this is the emulated device");
            return Ok(());
        }
        Err(e) => {
            println!("nothing to measure: {e}");
            return Ok(());
        }
    };
    let mut criterion = Criterion::default().configure_from_args().sample_size(20);
    ops::each(&mut All { criterion: &mut criterion, cuda: &cuda })?;
    criterion.final_summary();
    Ok(())
}
