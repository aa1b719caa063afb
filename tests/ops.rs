//! Every op, every case: the kernel against the reference.
//!
//! Without a GPU the kernels run on the emulated device with its checks on, and the cases too large for it are left to a GPU.
//! `AOJI_TEST_GPU=1` runs all cases on the GPU instead.

use aoji::{
    Result,
    cpu::Cpu,
    cuda::{Cuda, GemmBy},
    ops::{self, Op, Visitor},
};
use half::bf16;

/// The GPU, or the emulated one; and whether it is a real one.
fn device() -> (Cuda, bool) {
    let real = std::env::var_os("AOJI_TEST_GPU").is_some_and(|v| v == "1");
    if !real {
        cuda_emulator::install();
    }
    let mut cuda = Cuda::open(0).expect("a device");
    cuda.set_gemm(GemmBy::Own); // our kernels are what is tested here; tests/prefill.rs runs cuBLAS
    (cuda, real)
}

/// Runs all cases of an op on both backends, twice on the device: the same input gives the same bits.
fn check<O: Op>() {
    let (cuda, real) = device();
    let cpu = Cpu::<bf16>::new();
    let cases: Vec<O> = O::cases().into_iter().filter(|c| real || c.is_small()).collect();
    assert!(cases.len() >= 3, "{}: too few cases", O::STEM);
    for (seed, op) in cases.iter().enumerate() {
        let run = |seed| -> Result<Vec<f32>> {
            let mut io = op.setup(&cuda, seed)?;
            op.run(&cuda, &mut io)?;
            op.outputs(&cuda, &io)
        };
        let reference = |seed| -> Result<Vec<f32>> {
            let mut io = op.setup(&cpu, seed)?;
            op.run(&cpu, &mut io)?;
            op.outputs(&cpu, &io)
        };
        let seed = seed as u64;
        let got = run(seed).unwrap_or_else(|e| panic!("{op:?}: {e}\n{:?}", cuda_emulator::last_fault()));
        let again = run(seed).unwrap_or_else(|e| panic!("{op:?}, second run: {e}\n{:?}", cuda_emulator::last_fault()));
        let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&got), bits(&again), "{op:?}: two runs differ");
        let want = reference(seed).unwrap_or_else(|e| panic!("{op:?} on the CPU: {e}"));
        op.tolerance().compare(&got, &want).unwrap_or_else(|e| panic!("{op:?}: {e}"));
        if !real {
            assert_eq!(cuda_emulator::last_fault(), None, "{op:?}");
        }
    }
}

/// Each launch of a trace has a span for each block, in which its times are in order, and ends before the next is ready.
#[test]
fn a_trace_shows_each_block() {
    struct First<'a>(&'a Cuda);
    impl Visitor for First<'_> {
        fn op<O: Op>(&mut self) -> Result<()> {
            let (cuda, op) = (self.0, &O::cases()[0]);
            let mut io = op.setup(cuda, 1)?;
            cuda.trace_start(1 << 10)?;
            op.run(cuda, &mut io)?;
            op.run(cuda, &mut io)?;
            let launches = cuda.trace_stop()?;
            assert_eq!(launches.len(), 2, "{op:?}");
            for l in &launches {
                assert_eq!(l.case, format!("{op:?}"));
                assert!(l.kernel.starts_with(O::STEM), "{} of {op:?}", l.kernel);
                assert!(l.spans.is_empty() || l.cost == op.cost(), "{op:?}");
                for s in &l.spans {
                    assert!(0 < s.begin && s.begin <= s.ready && s.ready <= s.end, "{op:?}: {s:?}");
                    assert!(s.sm < cuda.info().sm_count, "{op:?}: {s:?}");
                }
            }
            let done = launches[0].spans.iter().map(|s| s.end).max();
            assert!(done <= launches[1].spans.iter().map(|s| s.ready).min(), "{launches:?}");
            Ok(())
        }
    }
    let (cuda, _) = device();
    ops::each(&mut First(&cuda)).unwrap();

    let op = &ops::RmsNorm { rows: 3, first: 0, dim: 64, eps: 1e-5 };
    let mut io = op.setup(&cuda, 1).unwrap();
    assert!(cuda.trace_stop().unwrap_err().to_string().contains("no trace"));
    cuda.trace_start(5).unwrap();
    assert!(cuda.trace_start(5).unwrap_err().to_string().contains("already"));
    op.run(&cuda, &mut io).unwrap();
    op.run(&cuda, &mut io).unwrap();
    let full = cuda.trace_stop().unwrap_err().to_string();
    assert!(full.contains("5 blocks, 6 were launched"), "{full}");
    // a launch that finds no room runs all the same
    let cpu = Cpu::<bf16>::new();
    let mut reference = op.setup(&cpu, 1).unwrap();
    op.run(&cpu, &mut reference).unwrap();
    let want = op.outputs(&cpu, &reference).unwrap();
    op.tolerance().compare(&op.outputs(&cuda, &io).unwrap(), &want).unwrap();
}

macro_rules! op_tests {
    ($($stem:ident: $op:ty),* $(,)?) => {
        $(#[test] fn $stem() { check::<$op>() })*

        #[test]
        fn no_op_is_forgotten() {
            struct Stems(Vec<&'static str>);
            impl Visitor for Stems {
                fn op<O: Op>(&mut self) -> Result<()> {
                    self.0.push(O::STEM);
                    Ok(())
                }
            }
            let mut stems = Stems(Vec::new());
            ops::each(&mut stems).unwrap();
            assert_eq!(stems.0, [$(stringify!($stem)),*]);
        }
    };
}

op_tests! {
    embed: ops::Embed,
    rms_norm: ops::RmsNorm,
    add_rms_norm: ops::AddRmsNorm,
    gemm: ops::Gemm,
    gemv: ops::Gemv,
    rope: ops::Rope,
    kv_append: ops::KvAppend,
    attn_prefill: ops::AttnPrefill,
    attn_decode: ops::AttnDecode,
    swiglu: ops::Swiglu,
    norm_qkv_rope_append: ops::NormQkvRopeAppend,
    norm_gate_up: ops::NormGateUp,
    norm_head: ops::NormHead,
    argmax: ops::Argmax,
    sample: ops::Sample,
    stream_read: ops::StreamRead,
}
