//! Runs every case of every op on the CPU backend, with all instructions of this machine and on one thread and several,
//! and compares it with the definition.

use super::{definition::Definition, others};
use crate::{
    backend::{
        cpu::{Cpu, level::Level, simd::pool::Pool},
        train::TrainBackend,
    },
    error::Result,
    ops::{self, Act, Cost, Op, Visitor, train::Real},
};
use half::bf16;
use std::{marker::PhantomData, sync::Arc};

/// More arithmetic or memory than this takes the definition too long.
const FLOPS: u64 = 20_000_000;
const BYTES: u64 = 64 << 20;

struct Check<A>(PhantomData<A>);

fn outputs<O: Op, B: TrainBackend>(op: &O, b: &B) -> Result<Vec<f32>> {
    let mut io = op.setup(b, 3)?;
    op.run(b, &mut io)?;
    op.outputs(b, &io)
}

impl<A: Act + Real> Visitor for Check<A> {
    fn op<O: Op>(&mut self) -> Result<()> {
        let cpu = |level, threads| Cpu::<A>::with(level, Arc::new(Pool::new(threads)));
        let short = |c: Cost| c.flops <= FLOPS && c.read + c.write <= BYTES;
        let cases: Vec<O> = O::cases().into_iter().filter(|op| short(op.cost())).collect();
        assert!(cases.len() >= 3, "{}: too few cases", O::STEM);
        for op in cases.into_iter().chain(O::odd()) {
            let want = outputs(&op, &Definition::<A>(PhantomData))?;
            let got = outputs(&op, &cpu(Level::best(), 2))?;
            op.tolerance().compare(&got, &want).unwrap_or_else(|e| panic!("{op:?}: {e}"));
            if !op.is_small() {
                continue;
            }
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            let same = |level, threads| {
                let other = outputs(&op, &cpu(level, threads))?;
                assert!(bits(&other) == bits(&got), "{op:?} has other bits on {level}, {threads} threads");
                Ok(())
            };
            same(Level::Portable, 3)?;
            same(Level::best(), 1)?;
            others().into_iter().try_for_each(|level| same(level, 1))?;
        }
        Ok(())
    }
}

#[test]
fn every_op_is_its_definition_in_bf16() {
    ops::each(&mut Check::<bf16>(PhantomData)).unwrap();
}

#[test]
fn every_op_is_its_definition_in_f32() {
    ops::each(&mut Check::<f32>(PhantomData)).unwrap();
}
