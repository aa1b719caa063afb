//! Instructions of PTX one by one, compared with the text of the PTX ISA: expected values are written from there, not from the
//! emulator. Except for `Gpu::new`, nothing here knows of the emulator: with `AOJI_TEST_GPU=1` a GPU is asked instead.

#[path = "../common/mod.rs"]
mod common;

mod conversions;
mod damaged;
mod floats;
mod integers;
mod memory;
mod refused;
mod warps;

use common::*;
use cudarc::driver::{CudaFunction, DriverError, LaunchConfig, PushKernelArg, sys};

/// A module with one kernel `k`, whose parameters are the address where it writes and the address where it reads.
pub fn module(body: &str, shared: &str) -> String {
    format!(
        ".version 9.0\n.target sm_90a\n.address_size 64\n{shared}\n.visible .entry k(.param .u64 out, .param .u64 in)\n{{\n\
         .reg .b64 %out, %in; .reg .b32 %tid;\nld.param.u64 %out, [out];\nld.param.u64 %in, [in];\nmov.u32 %tid, %tid.x;\n\
         {body}\nret;\n}}\n"
    )
}

pub fn open() -> Gpu {
    let real = std::env::var_os("AOJI_TEST_GPU").is_some_and(|v| v == "1");
    if real { Gpu::open() } else { Gpu::new() }
}

/// Runs a kernel of [`module`] over `input` and gives the `n` words it wrote.
pub fn launch(text: &str, cfg: LaunchConfig, input: &[u64], n: usize) -> Result<Vec<u64>, DriverError> {
    let g = open();
    cuda_emulator::clear_faults();
    let kernel = g.ctx.load_module(cudarc::nvrtc::Ptx::from_src(text))?.load_function("k")?;
    let (x, mut out) = (g.upload(input), g.stream.alloc_zeros::<u64>(n)?);
    // SAFETY: the kernel's two parameters.
    unsafe { g.stream.launch_builder(&kernel).arg(&mut out).arg(&x).launch(cfg) }?;
    let out = g.stream.clone_dtoh(&out)?;
    g.stream.synchronize()?;
    Ok(out)
}

/// Launches with a buffer in the kernel's own layout: `extra` of cuLaunchKernel, which says how large it is.
pub fn launch_buffer(
    g: &Gpu,
    f: &CudaFunction,
    cfg: LaunchConfig,
    buffer: &[u8],
    size: usize,
) -> Result<(), DriverError> {
    let buffer: Vec<u64> = buffer.chunks(8).map(|c| (0..c.len()).map(|i| u64::from(c[i]) << (8 * i)).sum()).collect();
    let mut extra = [
        std::ptr::without_provenance_mut(1),
        buffer.as_ptr().cast_mut().cast(),
        std::ptr::without_provenance_mut(2),
        arg(&size),
        std::ptr::null_mut(),
    ];
    let ((x, y, z), (a, b, c)) = (cfg.grid_dim, cfg.block_dim);
    let (f, stream, none) = (f.cu_function(), g.stream.cu_stream(), std::ptr::null_mut());
    // SAFETY: a loaded function and a live stream; the emulator checks the size against the kernel's parameters before it reads
    // the buffer, which a driver does too, and everything lives until the call returns.
    unsafe { sys::cuLaunchKernel(f, x, y, z, a, b, c, cfg.shared_mem_bytes, stream, none, extra.as_mut_ptr()) }.result()
}

/// The results of `instruction`, where each lane takes one case. Its operands are `%a0 %a1 %a2` (64 bits of the case),
/// `%r0...` (the low 32 bits), `%f0...` (the same as f32), `%d0...` (64 bits as f64), `%h0...` (16 bits), `%q0...` (not
/// zero: true); its result is one of `%w` (b32), `%l` (b64), `%v` (f32), `%x` (f64), `%s` (b16), `%p` (true is 1).
pub fn results(instruction: &str, cases: &[Vec<u64>]) -> Vec<u64> {
    assert!(cases.len() <= 32);
    let mut body = String::from(
        ".reg .b64 %at, %l, %a<3>; .reg .b32 %w, %r<3>, %sel; .reg .b16 %s, %h<3>, %up; .reg .f32 %v, %f<3>; .reg .f64 %x, %d<3>;\n\
         .reg .pred %p, %q<3>;\nmul.wide.u32 %at, %tid, 24;\nadd.s64 %at, %at, %in;\n",
    );
    for i in 0..3 {
        body += &format!(
            "ld.global.u64 %a{i}, [%at+{}];\ncvt.u32.u64 %r{i}, %a{i};\nmov.b32 %f{i}, %r{i};\nmov.b64 %d{i}, %a{i};\n\
             cvt.u16.u64 %h{i}, %a{i};\nsetp.ne.s64 %q{i}, %a{i}, 0;\n",
            i * 8
        );
    }
    let store = if instruction.contains("%w") {
        "cvt.u64.u32 %l, %w;"
    } else if instruction.contains("%v") {
        "mov.b32 %w, %v;\ncvt.u64.u32 %l, %w;"
    } else if instruction.contains("%x") {
        "mov.b64 %l, %x;"
    } else if instruction.contains("%s") {
        "cvt.u64.u16 %l, %s;"
    } else if instruction.contains("%p") {
        "selp.u32 %w, 1, 0, %p;\ncvt.u64.u32 %l, %w;"
    } else {
        ""
    };
    let end = if instruction.ends_with(':') { "" } else { ";" }; // a label
    body += &format!(
        "{instruction}{end}\n{store}\nmul.wide.u32 %at, %tid, 8;\nadd.s64 %at, %at, %out;\nst.global.u64 [%at], %l;"
    );
    let mut input: Vec<u64> = cases.iter().flat_map(|c| (0..3).map(|i| c.get(i).copied().unwrap_or(0))).collect();
    input.resize(96, 0);
    let out = launch(&module(&body, ""), grid(1, 1, cases.len() as u32, 0), &input, 32);
    let out = out.unwrap_or_else(|e| panic!("{instruction}: {e}: {:?}", cuda_emulator::last_fault()));
    out[..cases.len()].to_vec()
}

/// `check!("add.s32 %w, %r0, %r1"; [1, 2] => 3, ...)`
#[macro_export]
macro_rules! check {
    ($instruction:expr; $([$($x:expr),*] => $want:expr),+ $(,)?) => {{
        let cases = [$(vec![$($x as u64),*]),+];
        let got = $crate::results($instruction, &cases);
        for ((case, got), want) in cases.iter().zip(got).zip([$($want as u64),+]) {
            assert_eq!(got, want, "{} of {case:x?}: {got:#x}, expected {want:#x}", $instruction);
        }
    }};
}
