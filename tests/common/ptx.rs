//! The kernels as nvcc compiled them: the emulated device interprets the PTX that the machine code of this build was made from.

use cuda_emulator::Code;
use std::path::Path;

#[allow(dead_code)] // of one file
/// Compute capabilities whose PTX is run: each instruction set that a kernel's source distinguishes.
pub const CAPABILITIES: [u32; 4] = [90, 80, 100, 120];

struct Host(Option<u32>);

impl Drop for Host {
    fn drop(&mut self) {
        cuda_emulator::set_code(Code::Host, self.0);
    }
}

/// Runs `test` on an emulated device of this compute capability that runs the kernels' PTX. With the reason printed it is
/// skipped where the build has none (`AOJI_CUDA_ARCHS`, `AOJI_SKIP_KERNELS`) and where the tests run on a GPU.
pub fn with_ptx(capability: u32, test: impl FnOnce()) {
    if std::env::var_os("AOJI_TEST_GPU").is_some_and(|v| v == "1") {
        return println!("skipped: a GPU runs machine code");
    }
    let dir = Path::new(concat!(env!("OUT_DIR"), "/ptx"));
    let arch = if capability == 90 { "90a".to_string() } else { capability.to_string() };
    if !dir.join(&arch).is_dir() {
        return println!("skipped: this build has no kernels for sm_{arch}");
    }
    cuda_emulator::install();
    cuda_emulator::add_ptx(dir);
    cuda_emulator::set_code(Code::Ptx, Some(capability));
    let _host = Host(Some(90)); // also after a panic: the thread may go on with another test
    test();
}

/// The text of all kernels for a capability.
#[allow(dead_code)] // of one file
pub fn texts(capability: u32) -> String {
    let arch = if capability == 90 { "90a".to_string() } else { capability.to_string() };
    let dir = std::fs::read_dir(Path::new(concat!(env!("OUT_DIR"), "/ptx")).join(arch)).expect("the build's PTX");
    dir.map(|f| std::fs::read_to_string(f.unwrap().path()).unwrap()).collect()
}

/// `both_codes!(name, ...)`: each of these functions is a test of the kernels' source (`host::name`) and of their PTX
/// (`ptx_90a::name`, `ptx_80::name`).
#[macro_export]
macro_rules! both_codes {
    ($($name:ident),* $(,)?) => {
        mod host {
            $(#[test] fn $name() { super::$name(); })*
        }
        mod ptx_90a {
            $(#[test] fn $name() { super::ptx::with_ptx(90, super::$name); })*
        }
        mod ptx_80 {
            $(#[test] fn $name() { super::ptx::with_ptx(80, super::$name); })*
        }
    };
}
