//! Planted bugs: each must be reported as a CUDA error whose text names it, and its correct twin must not.
mod common;
use common::*;
use cuda_emulator::{Code, code};
use cudarc::driver::{DriverError, sys::CUresult as R};

/// A cooperative launch, for blocks that wait for each other.
fn run_together(name: &str) -> Result<Vec<f32>, DriverError> {
    use cudarc::driver::PushKernelArg;
    let g = Gpu::new();
    let (x, mut o) = (g.stream.clone_htod(&noise(128, 1))?, g.stream.alloc_zeros::<f32>(128)?);
    // SAFETY: kernel(out, x, k).
    unsafe {
        g.stream.launch_builder(&g.func(name)).arg(&mut o).arg(&x).arg(&0i32).launch_cooperative(grid(2, 1, 32, 0))
    }?;
    g.stream.clone_dtoh(&o)
}
/// Launches kernel(out, x, k) with out[len] f32 and x[128] f32, and waits.
fn run(name: &str, cfg: cudarc::driver::LaunchConfig, zeroed: bool, k: i32) -> Result<Vec<f32>, DriverError> {
    let g = Gpu::new();
    cuda_emulator::clear_faults();
    let x = g.stream.clone_htod(&noise(128, 1))?;
    let mut o = if zeroed { g.stream.alloc_zeros::<f32>(128)? } else { g.uninit::<f32>(128) };
    launch!(g, name, cfg, &mut o, &x, &k)?;
    let r = g.stream.clone_dtoh(&o)?;
    g.stream.synchronize()?;
    Ok(r)
}
#[track_caller]
fn reports(name: &str, cfg: cudarc::driver::LaunchConfig, zeroed: bool, k: i32, code: R, text: &str) {
    let e = run(name, cfg, zeroed, k).expect_err(name);
    let f = cuda_emulator::last_fault().expect("a text");
    if std::env::var_os("CUDA_EMULATOR_SCHEDULE").is_none() {
        // another schedule may meet another face of the bug first
        assert_eq!(e.0, code, "{f}");
        assert!(f.contains(text), "{name}: {f}");
    }
}
const FAILED: R = R::CUDA_ERROR_LAUNCH_FAILED;

/// Makes each of these functions a test of the kernels' source, and of the PTX that nvcc made of it.
macro_rules! both_codes {
    ($($name:ident),* $(,)?) => {
        mod host {
            $(#[test] fn $name() { super::$name(); })*
        }
        mod ptx {
            $(#[test] fn $name() { super::common::with_ptx(super::$name); })*
        }
    };
}
both_codes!(
    memory,
    faults_name_the_source_line,
    barriers_and_warps,
    other_blocks,
    correct_twins_are_silent,
    release_and_acquire,
    asynchronous_copies,
    a_fault_stays_in_its_stream,
);

fn memory() {
    let one = grid(1, 1, 128, 0);
    reports(
        "b_oob_read",
        one,
        false,
        1,
        R::CUDA_ERROR_ILLEGAL_ADDRESS,
        "out-of-bounds global read of 4 bytes, 512 bytes into an allocation of 512",
    );
    reports("b_oob_write", one, false, -1, R::CUDA_ERROR_ILLEGAL_ADDRESS, "out-of-bounds global write");
    match code() {
        Code::Host => reports("b_null", one, false, 3, R::CUDA_ERROR_ILLEGAL_ADDRESS, "null pointer read"),
        Code::Ptx => reports("b_null", one, false, 3, FAILED, "trap"), // which nvcc makes of it
    }
    reports("b_misaligned", one, false, 0, R::CUDA_ERROR_MISALIGNED_ADDRESS, "misaligned 16-byte");
    reports("b_uninit", one, false, 0, FAILED, "read of uninitialised global memory");
    reports("b_uninit_shared", grid(1, 1, 64, 0), false, 0, FAILED, "read of uninitialised shared memory");
    reports("b_neighbour", grid(1, 1, 32, 0), false, 32, R::CUDA_ERROR_ILLEGAL_ADDRESS, "out-of-bounds shared write");
    reports(
        "b_dynamic_too_small",
        grid(1, 1, 128, 508),
        false,
        0,
        R::CUDA_ERROR_ILLEGAL_ADDRESS,
        "out-of-bounds shared write of 4 bytes at offset 508 (dynamic part 508 bytes)",
    );
}
fn faults_name_the_source_line() {
    reports("b_oob_read", grid(1, 1, 128, 0), false, 1, R::CUDA_ERROR_ILLEGAL_ADDRESS, "bugs.cu:11");
    reports(
        "b_oob_read",
        grid(1, 1, 128, 0),
        false,
        1,
        R::CUDA_ERROR_ILLEGAL_ADDRESS,
        "[b_oob_read block (0,0,0) thread (127,0,0)]",
    );
}
fn barriers_and_warps() {
    let one = grid(1, 1, 128, 0);
    reports("b_no_barrier", one, false, 0, FAILED, "uninitialised shared memory");
    reports(
        "b_no_barrier_in_loop",
        one,
        false,
        0,
        FAILED,
        "shared memory race: write after unsynchronised read by thread",
    );
    reports("b_no_syncwarp", one, false, 0, FAILED, "shared memory");
    reports("b_wide_read_of_narrow_write", one, false, 0, FAILED, "shared memory race");
    reports("b_narrow_write_after_wide_read", one, false, 0, FAILED, "shared memory race");
    reports("b_named_barrier", one, false, 0, FAILED, "shared memory race");
    reports("b_divergent_barrier", one, false, 0, FAILED, "deadlock in b_divergent_barrier");
    reports("b_early_exit", one, false, 0, FAILED, "32 threads: exited");
    let shuffle = if code() == Code::Ptx { "shfl.sync.bfly" } else { "shfl.xor" };
    reports("b_shuffle_mask", one, false, 0, FAILED, shuffle);
}
fn other_blocks() {
    reports(
        "b_two_blocks_write",
        grid(2, 1, 32, 0),
        true,
        0,
        FAILED,
        "global memory race: write after unsynchronised write by thread 0 of another block",
    );
    reports("b_plain_add", grid(2, 1, 32, 0), true, 0, FAILED, "global memory race");
    reports(
        "b_read_of_atomic",
        grid(1, 1, 128, 0),
        true,
        0,
        FAILED,
        "global memory race: read after unsynchronised write by thread 0 (atomic)",
    );
    if std::env::var_os("CUDA_EMULATOR_SCHEDULE").is_none()
    // in reverse order it is the earlier block
    {
        reports("b_spin_on_later_block", grid(2, 1, 32, 0), true, 0, FAILED, "spin-wait without progress");
    }
}
fn correct_twins_are_silent() {
    let one = grid(1, 1, 128, 0);
    for k in ["ok_barrier", "ok_syncwarp", "ok_named_barrier"] {
        run(k, one, false, 0).unwrap();
    }
    run("ok_dynamic", grid(1, 1, 128, 512), false, 0).unwrap();
    let shifted = run("ok_mixed_sizes", one, false, 0).unwrap(); // each of the last 96 elements moves 32 down
    assert!((0..128).all(|t| shifted[t] == if t < 96 { t + 32 } else { t - 96 } as f32), "{shifted:?}");
    let (pairs, x) = (run("ok_pairs", one, false, 0).unwrap(), noise(128, 1)); // sixteen independent masks in one warp
    for t in 0..128 {
        let want = (x[t] + x[t ^ 1]) * 2f32.powi(t as i32 % 32 / 2);
        assert!((pairs[t] - want).abs() <= 1e-3 * (1.0 + want.abs()), "{t}");
    }
    assert_eq!(run("ok_atomic_add", grid(9, 1, 128, 0), true, 0).unwrap()[0], 9.0);
    assert_eq!(run_together("ok_release_acquire").unwrap()[2], 5.0);
    let g = Gpu::new();
    let x = g.upload(&[7u8; 64]);
    let mut o = g.uninit::<u8>(64);
    launch!(g, "ok_bytes", grid(1, 1, 64, 0), &mut o, &x, &1i32).unwrap();
    assert_eq!(g.stream.clone_dtoh(&o).unwrap(), [8u8; 64]);
    assert_eq!(cuda_emulator::last_fault(), None);
}
fn release_and_acquire() {
    assert_eq!(run_together("b_relaxed_flag").unwrap_err().0, FAILED);
    assert!(cuda_emulator::last_fault().unwrap().contains("of another block"));
    let g = Gpu::new();
    let (d, kv, splits, len) = (64usize, 1usize, 4usize, 40usize);
    let x = g.upload(&halves(&noise(len * d * 4, 2)));
    g.stream.synchronize().unwrap(); // the launches below are on other streams
    for (name, text) in [
        ("t_decode_no_release", "global memory race: read after unsynchronised write by thread"),
        ("t_decode_no_acquire", "acquire by the reader"),
        ("t_decode_no_barrier", "global memory race"),
    ] {
        let g = Gpu::new();
        let mut part = g.uninit::<f32>(4 * splits * (d + 2));
        let mut count = g.stream.alloc_zeros::<u32>(kv).unwrap();
        let mut out = g.uninit::<bf16>(4 * d);
        launch!(
            g,
            name,
            grid(1, splits as u32, 128, 4 * 4 * 66 * 4),
            &mut out,
            &mut part,
            &mut count,
            &x,
            &x,
            &x,
            &(len as i32),
            &(d as i32),
            &0.125f32
        )
        .unwrap();
        assert_eq!(g.stream.synchronize().unwrap_err().0, FAILED, "{name}");
        let f = cuda_emulator::last_fault().unwrap();
        assert!(f.contains(text), "{name}: {f}");
    }
}
fn asynchronous_copies() {
    let t = 200i32;
    for (name, text) in
        [("t_prefill_no_wait", "asynchronous copy in flight"), ("t_prefill_no_barrier", "shared memory race")]
    {
        let g = Gpu::new();
        let x = g.upload(&halves(&noise(t as usize * 64, 3)));
        let mut out = g.uninit::<bf16>(t as usize * 64);
        launch!(g, name, grid(4, 1, 128, 5 * 64 * 72 * 2), &mut out, &x, &x, &x, &t, &64i32, &64i32, &1i32, &0.125f32)
            .unwrap();
        assert!(g.stream.synchronize().is_err(), "{name}");
        let f = cuda_emulator::last_fault().unwrap();
        assert!(f.contains(text), "{name}: {f}");
    }
}
#[test]
fn launches_that_the_driver_refuses() {
    reports("ok_barrier", grid(1, 1, 1025, 0), false, 0, R::CUDA_ERROR_INVALID_VALUE, "invalid block of 1025 threads");
    reports(
        "ok_dynamic",
        grid(1, 1, 128, 49 << 10),
        false,
        0,
        R::CUDA_ERROR_INVALID_VALUE,
        "MAX_DYNAMIC_SHARED_SIZE_BYTES",
    );
    let g = Gpu::new();
    let f = g.big_smem("ok_dynamic", 100 << 10);
    let x = g.upload(&noise(128, 1));
    let mut o = g.uninit::<f32>(128);
    use cudarc::driver::PushKernelArg;
    // SAFETY: kernel(out, x, k).
    unsafe { g.stream.launch_builder(&f).arg(&mut o).arg(&x).arg(&0i32).launch(grid(1, 1, 128, 100 << 10)) }.unwrap();
    g.stream.synchronize().unwrap();
}
#[test]
fn captures_refuse_allocation_and_synchronisation() {
    let g = Gpu::new();
    for i in 0..3 {
        let e = g.capture(|| {
            let e = match i {
                0 => g.stream.alloc_zeros::<f32>(4).err(),
                1 => g.stream.synchronize().err(),
                // SAFETY: it must fail.
                _ => unsafe { cudarc::driver::result::malloc_sync(16) }.err(),
            };
            assert_eq!(e.unwrap().0, R::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        });
        assert_eq!(e.err().unwrap().0, R::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    }
    g.stream.synchronize().unwrap();
}
fn a_fault_stays_in_its_stream() {
    let g = Gpu::new();
    let x = g.upload(&noise(128, 1));
    let mut o = g.uninit::<f32>(128);
    launch!(g, "b_oob_read", grid(1, 1, 128, 0), &mut o, &x, &1i32).unwrap();
    assert!(g.stream.synchronize().is_err());
    assert!(g.stream.synchronize().is_err(), "sticky");
    run("ok_barrier", grid(1, 1, 128, 0), false, 0).unwrap();
}
