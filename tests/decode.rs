//! What `tests/ops.rs` does not cover of the ops of a decode step: the epilogues of the matrix-vector product, and that the
//! bits of a row do not depend on the other rows or on how the launch was sized.

use aoji::{
    backend::{Backend, Out},
    cpu::Cpu,
    cuda::Cuda,
    ops::{Gemv, Op, Tolerance, noise},
};
use half::bf16;

/// The GPU when `AOJI_TEST_GPU=1`, else the emulated one.
fn device() -> Cuda {
    if std::env::var_os("AOJI_TEST_GPU").is_none_or(|v| v != "1") {
        cuda_emulator::install();
    }
    Cuda::open(0).expect("a device")
}

fn values(len: usize, seed: u64) -> Vec<bf16> {
    noise(len, seed).into_iter().map(bf16::from_f32).collect()
}

/// `out` of all three epilogues; the residual that `Add` adds to is `noise` of seed 3.
fn epilogues<B: Backend<Act = bf16>>(b: &B, op: &Gemv) -> [Vec<f32>; 3] {
    let Gemv { rows, n, k } = *op;
    let x = b.upload(&values(rows * k, 1)).unwrap();
    let w = b.weight_from(n, k, &values(n * k, 2)).unwrap();
    let mut store = b.upload(&vec![bf16::NAN; rows * n]).unwrap();
    let mut add = b.upload(&values(rows * n, 3)).unwrap();
    let mut wide = b.upload(&vec![f32::NAN; rows * n]).unwrap();
    b.gemv(op, Out::Store(&mut store), &x, &w).unwrap();
    b.gemv(op, Out::Add(&mut add), &x, &w).unwrap();
    b.gemv(op, Out::F32(&mut wide), &x, &w).unwrap();
    let f32s = |v: Vec<bf16>| v.into_iter().map(bf16::to_f32).collect();
    [f32s(b.download(&store).unwrap()), f32s(b.download(&add).unwrap()), b.download(&wide).unwrap()]
}

#[test]
fn gemv_in_every_epilogue() {
    let cuda = device();
    for (rows, n, k) in [(1, 33, 80), (3, 17, 1104), (8, 16, 64)] {
        let op = Gemv { rows, n, k };
        let ([store, add, wide], [_, add_want, wide_want]) =
            (epilogues(&cuda, &op), epilogues(&Cpu::<bf16>::new(), &op));
        op.tolerance().compare(&add, &add_want).unwrap_or_else(|e| panic!("add, {op:?}: {e}"));
        // no rounding hides the sums here: about a thousand products in another order differ by some 2^-23 of their size
        let exact = Tolerance { l2: 1e-6, worst: 2e-6 };
        exact.compare(&wide, &wide_want).unwrap_or_else(|e| panic!("f32, {op:?}: {e}"));
        let residual = noise(rows * n, 3);
        for i in 0..rows * n {
            assert_eq!(store[i], bf16::from_f32(wide[i]).to_f32(), "{op:?}: store and f32 differ at {i}");
            assert_eq!(add[i], bf16::from_f32(residual[i] + wide[i]).to_f32(), "{op:?}: add and f32 differ at {i}");
        }
    }
}

#[test]
fn a_row_of_gemv_has_the_same_bits_beside_any_others() {
    let cuda = device();
    let (n, k) = (37, 1288);
    let w_all = values(n * k, 2);
    // rows [first, first + rows) of x, columns [0, n) of out
    let run = |first: usize, rows: usize, n: usize| -> Vec<Vec<u32>> {
        let x = cuda.upload(&values(8 * k, 1)[first * k..][..rows * k]).unwrap();
        let w = cuda.weight_from(n, k, &w_all[..n * k]).unwrap();
        let mut out = cuda.alloc::<f32>(rows * n).unwrap();
        cuda.gemv(&Gemv { rows, n, k }, Out::F32(&mut out), &x, &w).unwrap();
        cuda.download(&out).unwrap().chunks(n).map(|r| r.iter().map(|x| x.to_bits()).collect()).collect()
    };
    let all = run(0, 8, n);
    for rows in 1..8 {
        for first in [0, 8 - rows] {
            assert_eq!(run(first, rows, n), all[first..][..rows], "rows {first}..{}", first + rows);
        }
    }
    for n in [1, 16, 20] {
        let want: Vec<_> = all.iter().map(|r| r[..n].to_vec()).collect();
        assert_eq!(run(0, 8, n), want, "the first {n} columns");
    }
}
