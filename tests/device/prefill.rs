//! Checks of the ops of a prefill that `tests/ops` does not make: the epilogues of the matrix product, and that the bits of a row
//! do not depend on how a prompt was cut into chunks.

use crate::ptx;
use aoji::{
    KvDtype,
    backend::{Backend, Out},
    cpu::Cpu,
    cuda::{Cuda, GemmBy, MANY_ROWS, cublas_version},
    ops::{AttnPrefill, Gemm, Op, Tolerance, noise, scrambled, to_pages},
};
use half::bf16;

fn real() -> bool {
    std::env::var_os("AOJI_TEST_GPU").is_some_and(|v| v == "1")
}

/// The GPU when `AOJI_TEST_GPU=1`, else the emulated one; our own kernels.
fn device() -> Cuda {
    if !real() {
        cuda_emulator::install();
    }
    let mut cuda = Cuda::open(0).expect("a device");
    cuda.set_gemm(GemmBy::Own);
    cuda
}

fn values(len: usize, seed: u64) -> Vec<bf16> {
    noise(len, seed).into_iter().map(bf16::from_f32).collect()
}

/// `out` of all three epilogues; `Add` adds to a residual that is `noise` of seed 3.
fn epilogues<B: Backend<Act = bf16>>(b: &B, op: &Gemm) -> [Vec<f32>; 3] {
    let Gemm { rows, n, k } = *op;
    let x = b.upload(&values(rows * k, 1)).unwrap();
    let w = b.weight_from(n, k, &values(n * k, 2)).unwrap();
    let nan = vec![bf16::NAN; rows * n];
    let (mut store, mut add) = (b.upload(&nan).unwrap(), b.upload(&values(rows * n, 3)).unwrap());
    let mut wide = b.upload(&vec![f32::NAN; rows * n]).unwrap();
    b.gemm(op, Out::Store(&mut store), &x, &w).unwrap();
    b.gemm(op, Out::Add(&mut add), &x, &w).unwrap();
    b.gemm(op, Out::F32(&mut wide), &x, &w).unwrap();
    let f32s = |v: Vec<bf16>| v.into_iter().map(bf16::to_f32).collect();
    [f32s(b.download(&store).unwrap()), f32s(b.download(&add).unwrap()), b.download(&wide).unwrap()]
}

fn every_epilogue_of_both_tiles() {
    let cuda = device();
    // an odd and an even row length in each tile
    let one_part = [(200, 201, true), (200, 200, true), (70, 121, false), (70, 122, false)].map(|case| (case, 72));
    // three parts, the last not full
    let parts = [(200, 200, true), (70, 121, false), (17, 70, false)].map(|case| (case, 904));
    for ((rows, n, large), k) in one_part.into_iter().chain(parts) {
        let op = Gemm { rows, n, k };
        assert_eq!(k.div_ceil(op.part()), if k == 72 { 1 } else { 3 }, "{op:?}");
        if cuda.info().sm_count == 4 {
            assert_eq!(op.tile(4).side == 128, large, "{op:?}: the emulated device has 4 multiprocessors");
        }
        let ([store, add, wide], [store_want, add_want, wide_want]) =
            (epilogues(&cuda, &op), epilogues(&Cpu::<bf16>::new().unwrap(), &op));
        op.tolerance().compare(&store, &store_want).unwrap_or_else(|e| panic!("store, {op:?}: {e}"));
        op.tolerance().compare(&add, &add_want).unwrap_or_else(|e| panic!("add, {op:?}: {e}"));
        // no rounding hides the sums here: products in another order differ by some 2^-24 of their size
        let exact = Tolerance { l2: 1e-6, worst: 1e-6 };
        exact.compare(&wide, &wide_want).unwrap_or_else(|e| panic!("f32, {op:?}: {e}"));
        for i in 0..rows * n {
            assert_eq!(store[i], bf16::from_f32(wide[i]).to_f32(), "{op:?}: store and f32 differ at {i}");
        }
    }
}

fn a_row_of_gemm_has_the_same_bits_in_every_call() {
    let cuda = device();
    for k in [200, 776] {
        bits_of_rows(&cuda, 200, k); // 776: three parts, which the large tile's blocks take in turn
    }
}

fn bits_of_rows(cuda: &Cuda, n: usize, k: usize) {
    let x = values(200 * k, 1);
    let w = cuda.weight_from(n, k, &values(n * k, 2)).unwrap();
    let run = |first: usize, rows: usize| -> Vec<u32> {
        let x = cuda.upload(&x[first * k..][..rows * k]).unwrap();
        let mut out = cuda.alloc::<f32>(rows * n).unwrap();
        cuda.gemm(&Gemm { rows, n, k }, Out::F32(&mut out), &x, &w).unwrap();
        cuda.download(&out).unwrap().into_iter().map(f32::to_bits).collect()
    };
    let all = run(0, 200);
    for (first, rows) in [(0, 70), (70, 130), (199, 1), (3, 64)] {
        assert_eq!(run(first, rows), all[first * n..][..rows * n], "k {k}: rows {first}..{}", first + rows);
    }
}

fn attention_has_the_same_bits_however_the_prompt_is_cut() {
    let cuda = device();
    for (head_dim, kv) in [(64, KvDtype::Auto), (128, KvDtype::Auto), (64, KvDtype::Fp8), (96, KvDtype::Fp8)] {
        let (rows, n_heads, n_kv_heads, max_seq) = (150, 2, 1, 192); // two blocks; five tiles of keys, the last not full
        let table = scrambled(1, max_seq);
        let pages = cuda.upload(&table).unwrap();
        let op = |rows, kv_len| AttnPrefill {
            rows,
            first: 0,
            shared: 0,
            n_heads,
            n_kv_heads,
            head_dim,
            max_seq,
            kv_len,
            window: max_seq,
            kv,
        };
        let width = op(rows, rows).qkv_dim();
        let qkv: Vec<bf16> = values(rows * width, 1).into_iter().map(|x| x * bf16::from_f32(6.0)).collect();
        let [k, v] = [2, 3].map(|seed| values(max_seq * head_dim, seed));
        let run = |first: usize, kv_len: usize| -> Vec<u16> {
            // the cache as it is when these rows are computed: nothing past them
            let cache = |v: &[bf16]| {
                let mut v = v.to_vec();
                v[kv_len * head_dim..].fill(bf16::NAN);
                cuda.upload(&to_pages(kv, &v, &table, [n_kv_heads, max_seq, head_dim])).unwrap()
            };
            let qkv = cuda.upload(&qkv[first * width..kv_len * width]).unwrap();
            let pos = cuda.upload(&(first as u32..kv_len as u32).collect::<Vec<_>>()).unwrap();
            let mut out = cuda.upload(&vec![bf16::NAN; (kv_len - first) * n_heads * head_dim]).unwrap();
            let op = op(kv_len - first, kv_len);
            cuda.attn_prefill(&op, &mut out, &qkv, &cache(&k), &cache(&v), &pos, &pages).unwrap();
            cuda.download(&out).unwrap().into_iter().map(bf16::to_bits).collect()
        };
        let whole = run(0, rows);
        for cuts in [[0, 64, 128, 150], [0, 1, 65, 150], [0, 100, 149, 150], [0, 17, 49, 150]] {
            let pieces: Vec<u16> = cuts.windows(2).flat_map(|c| run(c[0], c[1])).collect();
            assert_eq!(pieces, whole, "head_dim {head_dim}, {kv}, cut at {cuts:?}");
        }
    }
}

#[test]
fn attention_refuses_other_head_dims() {
    let cuda = device();
    let op = AttnPrefill {
        rows: 1,
        first: 0,
        shared: 0,
        n_heads: 1,
        n_kv_heads: 1,
        head_dim: 8,
        max_seq: 64,
        kv_len: 1,
        window: 1,
        kv: KvDtype::Auto,
    };
    let mut io = op.setup(&cuda, 1).unwrap();
    let e = op.run(&cuda, &mut io).unwrap_err().to_string();
    assert_eq!(e, "attn_prefill: head_dim is 8, the kernels are for 64, 80, 96 and 128");
}

#[test]
fn cublas_agrees_with_the_reference() {
    let mut cuda = device();
    match cublas_version() {
        Ok(version) => println!("cuBLAS {version}"),
        Err(e) if real() => return println!("skipped: {e}"),
        Err(e) => panic!("the emulated cuBLAS: {e}"),
    }
    cuda.set_gemm(GemmBy::Cublas);
    let op = Gemm { rows: 33, n: 50, k: 72 };
    let (got, want) = (epilogues(&cuda, &op), epilogues(&Cpu::<bf16>::new().unwrap(), &op));
    for (i, tolerance) in [op.tolerance(), op.tolerance(), Tolerance { l2: 1e-6, worst: 1e-6 }].iter().enumerate() {
        tolerance.compare(&got[i], &want[i]).unwrap_or_else(|e| panic!("epilogue {i}, {op:?}: {e}"));
    }
}

/// The library is looked for only once in a process, so the test runs itself in a process of its own.
#[test]
fn without_cublas_ours_is_taken_unless_cublas_was_asked_for() {
    if std::env::var("AOJI_CUBLAS_DIR").is_ok_and(|d| d == "/nowhere") {
        return without_cublas();
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "prefill::without_cublas_ours_is_taken_unless_cublas_was_asked_for"])
        .env("AOJI_CUBLAS_DIR", "/nowhere")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

fn without_cublas() {
    let mut cuda = device();
    let op = Gemm { rows: MANY_ROWS, n: 1, k: 8 };
    cuda.set_gemm(GemmBy::Auto);
    let (got, want) = (epilogues(&cuda, &op), epilogues(&Cpu::<bf16>::new().unwrap(), &op));
    op.tolerance().compare(&got[0], &want[0]).unwrap();
    cuda.set_gemm(GemmBy::Cublas);
    let mut io = op.setup(&cuda, 1).unwrap();
    let e = op.run(&cuda, &mut io).unwrap_err().to_string();
    assert!(e.starts_with("AOJI_GEMM=cublas: opening cuBLAS: no libcublas.so.13 or .12 in /nowhere"), "{e}");
}

both_codes!(
    every_epilogue_of_both_tiles,
    a_row_of_gemm_has_the_same_bits_in_every_call,
    attention_has_the_same_bits_however_the_prompt_is_cut,
);
