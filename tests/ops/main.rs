//! Compares the kernel of every op with the reference in every case, and each variant of the kernel lab likewise.
//!
//! Without a GPU the kernels run on the emulated device with its checks on, and cases that are too large for it are left out.
//! `AOJI_TEST_GPU=1` runs all cases on the GPU instead.

mod compiled;
#[path = "../common/ptx.rs"]
mod ptx;

use aoji::{
    Result,
    bench::{self, Check, KernelOptions},
    cpu::Cpu,
    cuda::{
        Cuda, GemmBy, Launch,
        kernels::Module,
        lab::{LAB, Variant},
    },
    ops::{self, Op, Visitor},
};
use half::bf16;
use std::collections::BTreeSet;

/// The GPU, or the emulated one; and whether it is a real one.
fn device() -> (Cuda, bool) {
    let real = std::env::var_os("AOJI_TEST_GPU").is_some_and(|v| v == "1");
    if !real {
        cuda_emulator::install();
    }
    let mut cuda = Cuda::open(0).expect("a device");
    cuda.set_gemm(GemmBy::Own); // our kernels are what is tested here; tests/device/prefill.rs runs cuBLAS
    (cuda, real)
}

/// Whether a case launches a kernel of the variant that `cuda` has, or cannot be launched with it; the emulated device computes nothing
/// for the answer.
fn is_of<O: Op>(cuda: &Cuda, op: &O, variant: &Variant) -> bool {
    cuda_emulator::set_kernels(false);
    let launched = op.setup(cuda, 0).and_then(|mut io| cuda.launches(|| op.run(cuda, &mut io)));
    cuda_emulator::set_kernels(true);
    let kernels = variant.kernels();
    launched.map_or(true, |launched| launched.iter().any(|l| kernels.contains(&l.kernel)))
}

/// Runs all cases of an op on both backends, twice on the device: the same input must give the same bits. Of a variant, only those
/// that it is in. Returns the kernels that ran, or what is wrong.
fn check<O: Op>(cuda: &Cuda, real: bool, variant: Option<&Variant>) -> Result<BTreeSet<String>, String> {
    let cpu = Cpu::<bf16>::new().unwrap();
    let cases: Vec<O> = O::cases().into_iter().filter(|c| real || c.is_small()).collect();
    assert!(cases.len() >= 3, "{}: too few cases", O::STEM);
    let mut kernels = BTreeSet::new();
    for (seed, op) in cases.iter().enumerate() {
        if !real && variant.is_some_and(|v| !is_of(cuda, op, v)) {
            continue;
        }
        let seed = seed as u64;
        let mut run = || -> Result<Vec<f32>> {
            let mut io = op.setup(cuda, seed)?;
            kernels.extend(cuda.launches(|| op.run(cuda, &mut io))?.into_iter().map(|l| l.kernel));
            op.outputs(cuda, &io)
        };
        let reference = || -> Result<Vec<f32>> {
            let mut io = op.setup(&cpu, seed)?;
            op.run(&cpu, &mut io)?;
            op.outputs(&cpu, &io)
        };
        let fault = || if real { None } else { cuda_emulator::last_fault() };
        let got = run().map_err(|e| format!("{op:?}: {e}\n{:?}", fault()))?;
        let again = run().map_err(|e| format!("{op:?}, second run: {e}\n{:?}", fault()))?;
        let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        if bits(&got) != bits(&again) {
            return Err(format!("{op:?}: two runs differ"));
        }
        let want = reference().unwrap_or_else(|e| panic!("{op:?} on the CPU: {e}"));
        op.kernel_tolerance().compare(&got, &want).map_err(|e| format!("{op:?}: {e}"))?;
        if let Some(fault) = fault() {
            return Err(format!("{op:?}: {fault}"));
        }
    }
    Ok(kernels)
}

/// The results of an op on a device.
fn outputs<O: Op>(cuda: &Cuda, op: &O, seed: u64) -> Result<Vec<f32>, String> {
    let run = || -> Result<_> {
        let mut io = op.setup(cuda, seed)?;
        op.run(cuda, &mut io)?;
        op.outputs(cuda, &io)
    };
    run().map_err(|e| format!("{op:?}: {e}\n{:?}", cuda_emulator::last_fault()))
}

/// As [`check`] for the op of a variant, with the variant in the place of shipped kernels. Returns those of its kernels
/// that no case runs, or what is wrong.
fn check_variant(variant: &'static Variant) -> Result<Vec<String>, String> {
    struct OfOp<'a>(&'a Variant, Cuda, bool, Option<Result<BTreeSet<String>, String>>);
    impl Visitor for OfOp<'_> {
        fn op<O: Op>(&mut self) -> Result<()> {
            if O::STEM == self.0.op {
                self.3 = Some(check::<O>(&self.1, self.2, Some(self.0)));
            }
            Ok(())
        }
    }
    let wrong = |e: String| format!("kernels/lab/{}.cu: {e}", variant.module.stem);
    let (cuda, real) = device();
    let cuda = cuda.with_variant(variant).map_err(|e| e.to_string())?;
    let mut of_op = OfOp(variant, cuda, real, None);
    ops::each(&mut of_op).unwrap();
    let ran = of_op.3.ok_or_else(|| wrong(format!("{} is no op", variant.op)))?.map_err(wrong)?;
    let (checked, rest): (Vec<_>, Vec<_>) = variant.kernels().into_iter().partition(|k| ran.contains(k));
    if checked.is_empty() {
        return Err(wrong(format!("no case of {} runs {}", variant.op, rest.join(", "))));
    }
    Ok(rest)
}

/// Each `kernels/lab/*.cu`: it has to be as right as the kernel that it replaces.
#[test]
fn lab() {
    for variant in LAB {
        let rest = check_variant(variant).unwrap_or_else(|e| panic!("{e}"));
        for kernel in rest {
            println!("{kernel} is run by no case of {}: see docs/kernel-lab.md", variant.op);
        }
    }
}

/// A variant as build.rs makes it from a file of the lab; the emulated device does not look at the image.
fn variant(name: &'static str, launch: &'static str, kernels: &[&str]) -> &'static Variant {
    cuda_emulator::clear_faults(); // of the one before
    let entry = |k: &&str| format!("ptxas info    : Compiling entry function '{k}' for 'sm_90'\n");
    let ptxas = kernels.iter().map(entry).collect::<String>().leak();
    let module = Module { stem: format!("rms_norm_{name}").leak(), hash: "", image: &[0], ptxas };
    Box::leak(Box::new(Variant { op: "rms_norm", name, launch, module }))
}

/// The reports on variants that are planted in tests/emulator/tests/kernels/lab.cu.
#[test]
fn a_wrong_variant_is_found() {
    let (_, real) = device();
    if real {
        return println!("skipped: the planted kernels are only on the emulated device");
    }
    let planted = |name, launch, kernels: &[&str]| check_variant(variant(name, launch, kernels));
    assert_eq!(planted("warp", "threads 32", &["rms_norm_bf16__warp"]), Ok(vec![]));
    let says = |result: Result<Vec<String>, String>, expected: &[&str]| {
        let error = result.expect_err("a variant that is wrong");
        for text in expected.iter().chain(&["kernels/lab/rms_norm_"]) {
            assert!(error.contains(text), "no {text:?} in {error}");
        }
    };
    let run = |name, kernel| planted(name, "", &[kernel]);
    says(run("biased", "rms_norm_bf16__biased"), &["RmsNorm { rows: 1, first: 0, dim: 8", "relative L2 error"]);
    says(run("x", "rms_norm_bf17__x"), &["rms_norm_bf17__x is no <shipped kernel>__x", "rms_norm has rms_norm_bf16"]);
    says(run("x", "swiglu_bf16__x"), &["swiglu_bf16__x"]); // on no device
    says(planted("x", "", &[]), &["it has no kernel"]);
    says(planted("warp", "threads 0", &["rms_norm_bf16__warp"]), &["threads is 0"]);
    says(planted("warp", "warps 1", &["rms_norm_bf16__warp"]), &["\"warps 1\": expected threads"]);
    // of another op: right or wrong, nothing of rms_norm runs it
    says(run("idle", "swiglu_bf16__idle"), &["no case of rms_norm runs swiglu_bf16__idle"]);
    says(run("outside", "rms_norm_bf16__outside"), &["RmsNorm { rows: 1", "lab.cu:"]);
    let warp = variant("warp", "threads 32", &["rms_norm_bf16__warp"]);
    let biased = variant("biased", "", &["rms_norm_bf16__biased"]);
    let error = Cuda::open_with(0, &[warp, biased]).err().expect("a place taken twice").to_string();
    assert!(
        error.contains("rms_norm_biased.cu: rms_norm_bf16__biased: rms_norm_bf16__warp already replaces"),
        "{error}"
    );

    // the same said by the bench, of each case
    let variants = vec![warp, biased, variant("idle", "", &["swiglu_bf16__idle"])];
    let options = KernelOptions { stem: None, small: true, check: false, repeat: 1, once: true, variants };
    let mut results = Vec::new();
    bench::kernels(&device().0, &options, &mut |r| results.push(r)).unwrap();
    let of = |name| results.iter().filter(move |r| r.variant == name && r.op == "rms_norm");
    let cases = of(None).count();
    assert_eq!(results.len(), 3 * cases + 1, "only the variants' op runs");
    assert!(cases >= 3 && of(None).chain(of(Some("warp"))).all(|r| r.check == Check::Passed && r.times.is_some()));
    assert!(of(Some("warp")).all(|r| r.launches[0].grid.threads == 32 && r.ratio.is_some()));
    assert!(of(Some("biased")).any(|r| matches!(&r.check, Check::Failed(why) if why.contains("relative L2 error"))));
    let idle: Vec<_> = of(Some("idle")).map(|r| (r.case.as_str(), &r.check)).collect();
    assert!(matches!(&idle[..], [("no case", Check::Failed(why))] if why.contains("swiglu_bf16__idle")), "{idle:?}");
    cuda_emulator::clear_faults();
}

/// Each launch of a trace has a span for each block, in which its times are in order, and ends before the next is ready.
#[test]
fn a_trace_shows_each_block() {
    struct First<'a>(&'a Cuda);
    impl Visitor for First<'_> {
        fn op<O: Op>(&mut self) -> Result<()> {
            if O::STEM == ops::train::LinearCe::STEM {
                return Ok(()); // its products are launches of other ops
            }
            let (cuda, op) = (self.0, &O::cases()[0]);
            let mut io = op.setup(cuda, 1)?;
            cuda.trace_start(1 << 10)?;
            op.run(cuda, &mut io)?;
            op.run(cuda, &mut io)?;
            let launches = cuda.trace_stop()?;
            let (first, second) = launches.split_at(launches.len() / 2);
            let kernels = |l: &[Launch]| l.iter().map(|l| l.kernel.clone()).collect::<Vec<_>>();
            assert!(!first.is_empty() && kernels(first) == kernels(second), "{op:?}: {launches:?}");
            let mut cost = ops::Cost::default();
            first.iter().for_each(|l| cost += l.cost);
            assert!(first.iter().all(|l| l.spans.is_empty()) || cost == op.cost(), "{op:?}: {cost:?}");
            for l in &launches {
                assert_eq!(l.case, format!("{op:?}"));
                assert!(l.kernel.starts_with(O::STEM), "{} of {op:?}", l.kernel);
                for s in &l.spans {
                    assert!(0 < s.begin && s.begin <= s.ready && s.ready <= s.end, "{op:?}: {s:?}");
                    assert!(s.sm < cuda.info().sm_count, "{op:?}: {s:?}");
                }
            }
            for pair in launches.windows(2) {
                let done = pair[0].spans.iter().map(|s| s.end).max();
                assert!(done <= pair[1].spans.iter().map(|s| s.ready).min(), "{launches:?}");
            }
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
    let cpu = Cpu::<bf16>::new().unwrap();
    let mut reference = op.setup(&cpu, 1).unwrap();
    op.run(&cpu, &mut reference).unwrap();
    let want = op.outputs(&cpu, &reference).unwrap();
    op.kernel_tolerance().compare(&op.outputs(&cuda, &io).unwrap(), &want).unwrap();
}

/// A variant of the lab may have another grid than the op says: its blocks still have spans of their own, and a launch
/// that has no room for them does not run.
#[test]
fn a_trace_of_a_variant_has_its_blocks() {
    let (_, real) = device();
    if real {
        return println!("skipped: the planted kernels are only on the emulated device");
    }
    let op = &ops::RmsNorm { rows: 3, first: 0, dim: 64, eps: 1e-5 };
    let trace = |v: &'static Variant, room| -> Result<Vec<usize>> {
        let cuda = Cuda::open_with(0, &[v])?;
        let mut io = op.setup(&cuda, 1)?;
        cuda.trace_start(room)?;
        let ran = op.run(&cuda, &mut io).and_then(|()| op.run(&cuda, &mut io));
        let launches = cuda.trace_stop();
        ran?;
        let launches = launches?;
        assert!(launches.iter().all(|l| l.kernel.ends_with(v.name)), "{launches:?}");
        Ok(launches.iter().map(|l| l.spans.len()).collect())
    };
    let twice = variant("traced", "blocks x*2", &["rms_norm_bf16__traced"]);
    assert_eq!(trace(twice, 12).unwrap(), [6, 6]);
    let error = trace(twice, 11).unwrap_err().to_string();
    assert!(error.contains("rms_norm_bf16__traced") && error.contains("room for 11 blocks"), "{error}");
    // one that leaves the parameter out notes nothing
    assert_eq!(trace(variant("warp", "threads 32", &["rms_norm_bf16__warp"]), 12).unwrap(), [0, 0]);
    assert_eq!(cuda_emulator::last_fault(), None);
}

macro_rules! op_tests {
    ($($stem:ident: $op:ty),* $(,)?) => {
        $(#[test] fn $stem() {
            let (cuda, real) = device();
            check::<$op>(&cuda, real, None).unwrap_or_else(|e| panic!("{e}"));
        })*

        mod ptx_of {
            $(#[test] fn $stem() {
                super::compiled::check_shipped::<$op>();
            })*
        }

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
    embed: aoji::ops::Embed,
    rms_norm: aoji::ops::RmsNorm,
    add_rms_norm: aoji::ops::AddRmsNorm,
    gemm: aoji::ops::Gemm,
    gemv: aoji::ops::Gemv,
    head_norm: aoji::ops::HeadNorm,
    rope: aoji::ops::Rope,
    kv_append: aoji::ops::KvAppend,
    attn_prefill: aoji::ops::AttnPrefill,
    attn_decode: aoji::ops::AttnDecode,
    swiglu: aoji::ops::Swiglu,
    norm_qkv_rope_append: aoji::ops::NormQkvRopeAppend,
    norm_gate_up: aoji::ops::NormGateUp,
    norm_head: aoji::ops::NormHead,
    norm_head_argmax: aoji::ops::NormHeadArgmax,
    argmax: aoji::ops::Argmax,
    sample: aoji::ops::Sample,
    log_prob: aoji::ops::LogProb,
    lora_down: aoji::ops::train::LoraDown,
    lora_up: aoji::ops::train::LoraUp,
    attn_packed: aoji::ops::train::AttnPacked,
    linear_ce: aoji::ops::train::LinearCe,
    rms_norm_bwd: aoji::ops::train::RmsNormBwd,
    linear_dx: aoji::ops::train::LinearDx,
    lora_grad: aoji::ops::train::LoraGrad,
    lora_dx: aoji::ops::train::LoraDx,
    swiglu_bwd: aoji::ops::train::SwigluBwd,
    attn_bwd: aoji::ops::train::AttnBwd,
    grad_norm: aoji::ops::train::GradNorm,
    adamw: aoji::ops::train::AdamW,
    stream_read: aoji::ops::StreamRead,
}
