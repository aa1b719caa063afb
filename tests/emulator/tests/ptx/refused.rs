//! Text that is not PTX, or parameters that the kernel does not take, give a CUDA error whose text names the kernel and the line.

use crate::{common::*, launch, launch_buffer, module, open};
use cudarc::driver::sys::CUresult as R;

fn says(text: &str, code: R, expected: &[&str]) {
    if std::env::var_os("AOJI_TEST_GPU").is_some() {
        return println!("skipped: these are the emulator's texts");
    }
    let error = launch(text, grid(1, 1, 32, 0), &[1; 64], 64).expect_err(text);
    let fault = cuda_emulator::last_fault().expect("a text");
    assert_eq!(error.0, code, "{fault}");
    expected.iter().for_each(|e| assert!(fault.contains(e), "no {e:?} in {fault}"));
}

#[test]
fn text_that_is_no_ptx() {
    let bad = |text: &str, expected: &[&str]| says(text, R::CUDA_ERROR_INVALID_PTX, expected);
    bad("// nothing", &["image:1", "does not begin with .version"]);
    bad(".version 9.0\n.target sm_90a\n.adress_size 64\n", &["image:3", "\".adress_size\""]);
    bad(".version 9.0\n.target sm_90a\n.visible .entry k(", &["image:3", "ends too early"]);
    let line =
        |body: &str, expected: &[&str]| bad(&module(body, ""), &[&["image:11:", "in kernel k"], expected].concat());
    line("frobnicate.u32 %tid, %tid;", &["unknown instruction \"frobnicate.u32 %tid, %tid\""]);
    line("add.s32.funny %tid, %tid, 1;", &["unknown instruction", "add.s32.funny"]);
    line("ld.global.L2::cache_hint.u32 %tid, [%in], %out;", &["unknown instruction"]);
    line("add.s32 %tid, %tid, %out;", &["operands that do not fit", "add.s32 %tid, %tid, %out"]);
    line("add.s32 1, %tid, %tid;", &["operands that do not fit"]);
    line("add.s32 %tid, %tid, %nobody;", &["an unknown name"]);
    line("ld.global.u32 %tid, [%nobody];", &["unknown address \"%nobody\""]);
    line("bra NOWHERE;", &["unknown label \"NOWHERE\""]);
    line("@%tid bra NOWHERE;", &["\"%tid\" is no predicate"]);
    line("call (%tid), f, (%tid);", &["f"]);
    bad(&module("add.s32 %tid, %tid, 1 2;", ""), &["expected \";\" and found \"2\""]);
    line("ld.relaxed.global.u32 %tid, [%in];", &["unknown instruction"]); // of no scope
    line("mov.u32 %ctaid.x, %tid;", &["operands that do not fit"]);
    line("mov.b64 {{%tid, %tid}}, %in;", &["braces in braces"]);
    line(".reg .b32 %many<4294967296>;", &["4294967296 is more than"]);
    line(".shared .align 3 .b8 odd[4];", &["a power of two"]);
    line(".shared .b8 large[50000];", &["over 48 KiB"]);
    line(".local .b8 large[50000];", &["more than 32 KiB of local memory"]);
    line(".pragma \"x\" { ; }", &["\"}\" without \"{\""]);
    bad(".version 9.0\n.file 1 a\n", &["image:2", "a path in quotes"]);
    bad(".version 9.0\n.visible .entry k(.param .u64 a) {", &["image:2", "ends too early", "in kernel k"]);
    bad(
        ".version 9.0\n.visible .entry k() { ret; }\n.visible .entry k() { ret; }",
        &["image:3", "kernel k is there twice"],
    );
    bad(".version 9.0\n.visible .entry k(.param .funny a) { ret; }", &["image:2", "unknown type", "in kernel k"]);
}

#[test]
fn a_kernel_that_is_not_there() {
    let fault = |e: cudarc::driver::DriverError| (e.0, cuda_emulator::last_fault().unwrap_or_default());
    let m = open().ctx.load_module(cudarc::nvrtc::Ptx::from_src(module("", ""))).unwrap();
    let (code, text) = fault(m.load_function("other").unwrap_err());
    assert_eq!(code, R::CUDA_ERROR_NOT_FOUND);
    assert!(
        std::env::var_os("AOJI_TEST_GPU").is_some() || text.contains("no kernel named other is in the PTX"),
        "{text}"
    );
}

#[test]
fn a_parameter_block_of_the_wrong_size() {
    let g = open();
    let text = module("st.global.u64 [%out], %in;", "");
    let f = g.ctx.load_module(cudarc::nvrtc::Ptx::from_src(text)).unwrap().load_function("k").unwrap();
    let out = g.stream.alloc_zeros::<u64>(1).unwrap();
    let (address, _) = cudarc::driver::DevicePtr::device_ptr(&out, &g.stream);
    let buffer = [address.to_le_bytes(), 42u64.to_le_bytes()].concat();
    let launch = |size| launch_buffer(&g, &f, grid(1, 1, 1, 0), &buffer, size);
    launch(16).unwrap();
    assert_eq!(g.stream.clone_dtoh(&out).unwrap(), [42]);
    assert_eq!(launch(24).unwrap_err().0, R::CUDA_ERROR_INVALID_VALUE);
    if std::env::var_os("AOJI_TEST_GPU").is_none() {
        let text = cuda_emulator::last_fault().unwrap();
        assert!(text.contains("a parameter buffer of 24 bytes where the kernel (image) has 16 launching k"), "{text}");
    }
}

/// Faults of instructions that cannot be provoked from a kernel's source.
#[test]
fn accesses_in_the_wrong_space() {
    let faults = |body: &str, code: R, expected: &str| {
        says(&module(body, ".shared .align 16 .b8 s[64];"), code, &[expected, "image:11", "[k block (0,0,0) thread"])
    };
    let failed = R::CUDA_ERROR_LAUNCH_FAILED;
    let generic = ".reg .b64 %a; mov.u64 %a, s; cvta.shared.u64 %a, %a;";
    faults(&format!("{generic} st.shared.u32 [%a], %tid;"), failed, "is no address of the shared window");
    faults(&format!("{generic} st.global.u32 [%a], %tid;"), failed, "is shared memory, accessed as global");
    faults(".reg .b64 %a; cvta.to.shared.u64 %a, %out;", failed, "which is not shared memory of this block");
    faults(
        "ld.global.v4.u32 {%tid, %tid, %tid, %tid}, [%in+8];",
        R::CUDA_ERROR_MISALIGNED_ADDRESS,
        "misaligned 16-byte access",
    );
    faults("ld.shared.u32 %tid, [s];", failed, "read of uninitialised shared memory");
    faults("st.shared.u32 [s+64], %tid;", R::CUDA_ERROR_ILLEGAL_ADDRESS, "out-of-bounds shared write");
    faults("st.shared.u32 [s], %tid;", failed, "shared memory race: write after unsynchronised write");
    faults(
        "mov.u32 %tid, 7; shfl.sync.idx.b32 %tid, %tid, 9, 31, 0xff;",
        failed,
        "shfl reads lane 9 which is not in mask 000000ff",
    );
    faults("mov.u32 %tid, 1; bar.sync %tid, 40;", failed, "thread count 40 is not a multiple of 32");
    faults("trap;", failed, "trap");
    let out_of_bounds = R::CUDA_ERROR_ILLEGAL_ADDRESS;
    faults(
        "ld.param.u64 %out, [out+16];",
        out_of_bounds,
        "out-of-bounds read of a parameter: 8 bytes at offset 16 of 16",
    );
    faults("ld.param.u64 %out, [out-8];", out_of_bounds, "out-of-bounds read of a parameter");
    faults(
        ".local .align 8 .b8 l[16]; mov.u64 %out, l; st.local.u64 [%out-8], %in;",
        out_of_bounds,
        "out-of-bounds local access",
    );
    faults(
        ".local .align 8 .b8 l[16]; mov.u64 %out, l; cvta.local.u64 %out, %out; st.u32 [%out+16], %tid;",
        out_of_bounds,
        "no memory of this thread",
    );
    faults(
        ".reg .b64 %a; mov.u64 %a, out; cvta.param.u64 %a, %a; st.u32 [%a], %tid;",
        out_of_bounds,
        "parameters are only read",
    );
    faults(
        "mov.u32 %tid, -1; L: .branchtargets A, B; brx.idx %tid, L; A: B: ret;",
        failed,
        "brx.idx 4294967295 of 2 targets",
    );
    faults("cp.async.wait_group -1;", failed, "cp.async.wait_group of -1 groups");
    faults(
        &format!("{generic} mov.u32 %tid, s; cp.async.ca.shared.global [%tid], [%a], 4;"),
        failed,
        "is shared memory, accessed as global",
    );
    // all of its warps go on, and none comes to an end
    faults("FOREVER: bar.sync 0; bra FOREVER;", failed, "a loop without an end");
    faults(".reg .pred %p; FOREVER: setp.eq.u32 %p, %tid, %tid; @%p bra FOREVER;", failed, "a loop without an end");
}

#[test]
fn matrices_of_less_than_a_warp() {
    if std::env::var_os("AOJI_TEST_GPU").is_some() {
        return println!("skipped: these are the emulator's texts");
    }
    let load = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%tid}, [s];";
    let text = module(load, ".shared .align 16 .b8 s[64];");
    assert_eq!(launch(&text, grid(1, 1, 8, 0), &[1; 64], 64).unwrap_err().0, R::CUDA_ERROR_LAUNCH_FAILED);
    let fault = cuda_emulator::last_fault().unwrap();
    assert!(fault.contains("a warp of 8 threads: matrices take 32") && fault.contains("image:11"), "{fault}");
}

/// Accesses whose scope is one block do not synchronise with another block: a release of this kind hands nothing over,
/// and two blocks that share a counter in this way race.
#[test]
fn the_scope_of_a_block() {
    if std::env::var_os("AOJI_TEST_GPU").is_some() {
        return println!("skipped: these are the emulator's texts");
    }
    let two = |body: &str| {
        let block =
            ".reg .b32 %block, %x; .reg .pred %first, %waits; mov.u32 %block, %ctaid.x; setp.eq.u32 %first, %block, 0;";
        launch(&module(&format!("{block}\n{body}"), ""), grid(2, 1, 1, 0), &[1; 64], 64).map_err(|e| e.0)
    };
    let failed = R::CUDA_ERROR_LAUNCH_FAILED;
    for (first, then, fine) in
        [("gpu", "gpu", true), ("cta", "gpu", false), ("gpu", "cta", false), ("cta", "cta", false)]
    {
        let add = |scope: &str, guard: &str| format!("@{guard}%first red.relaxed.{scope}.global.add.u32 [%out], 1;");
        let got = two(&[add(first, ""), add(then, "!")].concat());
        assert_eq!(got.is_ok(), fine, "{first} {then}");
        if !fine {
            assert_eq!(got.unwrap_err(), failed);
            assert!(cuda_emulator::last_fault().unwrap().contains("global memory race"));
        }
    }
    // the first block writes and says so, the second waits for that and reads
    for (release, acquire, fine) in [("gpu", "gpu", true), ("cta", "gpu", false), ("gpu", "cta", false)] {
        let got = two(&format!(
            "@%first st.global.u32 [%out], 7; @%first st.release.{release}.global.u32 [%out+8], 1; @%first ret;\n\
             WAIT: ld.acquire.{acquire}.global.u32 %x, [%out+8]; setp.eq.u32 %waits, %x, 0; @%waits bra WAIT; ld.global.u32 %x, [%out]; st.global.u32 [%out+16], %x;"
        ));
        assert_eq!(got.map(|out| out[2]), if fine { Ok(7) } else { Err(failed) }, "{release} {acquire}");
        if !fine {
            assert!(cuda_emulator::last_fault().unwrap().contains("global memory race"));
        }
    }
    // within the block it is enough
    let counted =
        launch(&module("red.relaxed.cta.global.add.u32 [%out], 1;", ""), grid(1, 1, 64, 0), &[1; 64], 64).unwrap();
    assert_eq!(counted[0], 64);
}
