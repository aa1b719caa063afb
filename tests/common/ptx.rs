//! The kernels as nvcc compiled them: the emulated device interprets the PTX that the machine code of this build was made from.

#[path = "../../build/arch.rs"]
mod arch;

use aoji::cuda::kernels::IMAGES;
use cuda_emulator::Code;
use std::path::{Path, PathBuf};

/// Compute capabilities that the kernels are compiled for; first those on which tests find the most.
#[allow(dead_code)] // of one file
pub const CAPABILITIES: [u32; 6] = [90, 80, 120, 100, 86, 89];

/// The architecture of the PTX that a device's code is made from.
fn architecture(capability: u32) -> String {
    arch::of_ptx(&capability.to_string()).into()
}

/// Where the build keeps its PTX.
fn directory() -> PathBuf {
    Path::new(env!("OUT_DIR")).join("ptx")
}

/// Whether the tests run on a GPU, which has machine code.
pub fn is_gpu() -> bool {
    std::env::var_os("AOJI_TEST_GPU").is_some_and(|v| v == "1")
}

/// Whether this build has PTX for a capability; it should if it has machine code.
pub fn is_built(capability: u32) -> bool {
    let arch = architecture(capability);
    let built = IMAGES.split(',').any(|image| arch::of_ptx(image) == arch);
    let kept = directory().join(&arch);
    assert!(!built || kept.is_dir(), "this build has kernels for {IMAGES}, but no {}", kept.display());
    built
}

/// The PTX of a kernel's file, as the compiler left it.
#[allow(dead_code)] // of one file
pub fn text(capability: u32, stem: &str) -> String {
    let path = directory().join(architecture(capability)).join(format!("{stem}.ptx"));
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Whether a kernel is one of quantized weights, which tests/device/packed.rs runs.
#[allow(dead_code)] // of two files
pub fn is_packed(kernel: &str) -> bool {
    kernel.split('_').any(|part| ["q8", "i8", "f8", "q4", "i4"].contains(&part))
}

/// Runs `test` on an emulated device of this compute capability that runs the kernels' PTX. The test is skipped, with
/// the reason printed, if the build has no PTX (`AOJI_CUDA_ARCHS`, `AOJI_SKIP_KERNELS`) and if the tests run on a GPU.
pub fn with_ptx(capability: u32, test: impl FnOnce()) {
    if is_gpu() {
        return println!("skipped: a GPU runs machine code");
    }
    if !is_built(capability) {
        return println!("skipped: this build has no kernels for sm_{}", architecture(capability));
    }
    cuda_emulator::install();
    cuda_emulator::add_ptx(&directory());
    cuda_emulator::with_code(Code::Ptx, Some(capability), test);
}

/// `both_codes!(name, ...)`: each of these functions is a test of the kernels' source (`host::name`) and of their PTX
/// (`ptx_90::name`, `ptx_80::name`).
#[macro_export]
macro_rules! both_codes {
    ($($name:ident),* $(,)?) => {
        mod host {
            $(#[test] fn $name() { super::$name(); })*
        }
        mod ptx_90 {
            $(#[test] fn $name() { super::ptx::with_ptx(90, super::$name); })*
        }
        mod ptx_80 {
            $(#[test] fn $name() { super::ptx::with_ptx(80, super::$name); })*
        }
    };
}
