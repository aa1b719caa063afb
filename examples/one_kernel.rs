//! Calls one kernel alone on the GPU and compares it with its definition: `cargo run --release --example one_kernel`.

use aoji::{
    cpu::Cpu,
    cuda::Cuda,
    ops::{Op, RmsNorm},
};
use half::bf16;

fn main() -> aoji::Result<()> {
    let op = RmsNorm { rows: 1, first: 0, dim: 4096, eps: 1e-5 };
    let (cpu, cuda) = (Cpu::<bf16>::new()?, Cuda::open(0)?);

    let mut io = op.setup(&cpu, 1)?; // the same inputs on both, from the seed
    op.run(&cpu, &mut io)?;
    let want = op.outputs(&cpu, &io)?;

    let mut io = op.setup(&cuda, 1)?;
    op.run(&cuda, &mut io)?;
    let got = op.outputs(&cuda, &io)?;

    let milliseconds = cuda.time(|| op.run(&cuda, &mut io))?;
    println!("{op:?} on {}: {milliseconds} ms, {:?}", cuda.info().name, op.cost());
    op.tolerance().compare(&got, &want).map_err(aoji::Error::Disagree)
}
