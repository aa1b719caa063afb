//! What is no PTX, or not what the kernel takes, is a CUDA error whose text names the kernel and the line.

use crate::{common::*, launch, module, open};
use cudarc::driver::sys::{self, CUresult as R};

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

/// `extra` of cuLaunchKernel: a buffer in the kernel's layout.
fn launch_buffer(bytes: usize, wrong_by: usize) -> Result<Vec<u64>, cudarc::driver::DriverError> {
    let g = open();
    let text = module("st.global.u64 [%out], %in;", "");
    let f = g.ctx.load_module(cudarc::nvrtc::Ptx::from_src(text)).unwrap().load_function("k").unwrap();
    let out = g.stream.alloc_zeros::<u64>(1)?;
    let (address, _) = cudarc::driver::DevicePtr::device_ptr(&out, &g.stream);
    let buffer = [address, 42];
    let size = bytes + wrong_by;
    let mut extra = [
        std::ptr::without_provenance_mut(1),
        arg(&buffer),
        std::ptr::without_provenance_mut(2),
        arg(&size),
        std::ptr::null_mut(),
    ];
    // SAFETY: the buffer holds the kernel's two parameters, and everything lives until the call returns.
    unsafe {
        sys::cuLaunchKernel(
            f.cu_function(),
            1,
            1,
            1,
            1,
            1,
            1,
            0,
            g.stream.cu_stream(),
            std::ptr::null_mut(),
            extra.as_mut_ptr(),
        )
    }
    .result()?;
    g.stream.clone_dtoh(&out)
}

#[test]
fn a_parameter_block_of_the_wrong_size() {
    assert_eq!(launch_buffer(16, 0).unwrap(), [42]);
    assert_eq!(launch_buffer(16, 8).unwrap_err().0, R::CUDA_ERROR_INVALID_VALUE);
    if std::env::var_os("AOJI_TEST_GPU").is_none() {
        let text = cuda_emulator::last_fault().unwrap();
        assert!(text.contains("a parameter buffer of 24 bytes where the kernel (image) has 16 launching k"), "{text}");
    }
}

/// Faults of instructions that no kernel's source can be made to show.
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
    faults(".reg .pred %p; FOREVER: setp.eq.u32 %p, %tid, %tid; @%p bra FOREVER;", failed, "a loop without an end");
}
