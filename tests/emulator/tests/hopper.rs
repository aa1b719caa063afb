//! TMA, wgmma, bulk copies, programmatic dependent launch: correct against f64, and their planted bugs reported.
mod common;
use common::*;
use cudarc::driver::{DevicePtr, DevicePtrMut, sys};

fn tensor_map(ptr: u64, cols: usize, rows: usize) -> sys::CUtensorMap {
    use sys::*;
    // SAFETY: plain data.
    let mut t: CUtensorMap = unsafe { std::mem::zeroed() };
    let (dim, stride, b, one) = ([cols as u64, rows as u64], [cols as u64 * 2], [64u32, 64], [1u32, 1]);
    // SAFETY: ptr names rows x cols bf16, the arrays have the rank's length, t is written.
    unsafe {
        cuTensorMapEncodeTiled(
            &mut t,
            CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            2,
            ptr as _,
            dim.as_ptr(),
            stride.as_ptr(),
            b.as_ptr(),
            one.as_ptr(),
            CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE,
            CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .unwrap();
    t
}

fn wg_gemm(name: &str) -> Result<f64, cudarc::driver::DriverError> {
    let g = Gpu::new();
    let (t, n, k) = (100usize, 192usize, 256usize);
    let (x, w) = (halves(&noise(t * k, 18)), halves(&noise(n * k, 19)));
    let (xd, wd) = (g.stream.clone_htod(&x)?, g.stream.clone_htod(&w)?);
    let mut y = g.uninit::<bf16>(t * n);
    let (mx, mw) = (tensor_map(xd.device_ptr(&g.stream).0, k, t), tensor_map(wd.device_ptr(&g.stream).0, k, n));
    let f = g.func(name);
    let yp = y.device_ptr_mut(&g.stream).0;
    let sizes = [t as i32, n as i32, k as i32];
    let mut a = [arg(&yp), arg(&mx), arg(&mw), arg(&sizes[0]), arg(&sizes[1]), arg(&sizes[2])];
    // SAFETY: the arguments are those of the kernel, in its order.
    unsafe {
        cudarc::driver::result::launch_kernel(
            f.cu_function(),
            (n.div_ceil(64) as u32, t.div_ceil(64) as u32, 1),
            (160, 1, 1),
            32768,
            g.stream.cu_stream(),
            &mut a,
        )
    }?;
    let want: Vec<f64> =
        (0..t * n).map(|i| (0..k).map(|j| x[i / n * k + j].to_f64() * w[i % n * k + j].to_f64()).sum()).collect();
    Ok(error(&g.stream.clone_dtoh(&y)?, &want))
}

#[test]
fn tma_and_wgmma() {
    let e = wg_gemm("t_wg_gemm").unwrap();
    assert!(e < 4e-3, "{e}");
    for (bug, text) in [("t_wg_gemm_no_empty_wait", "in flight"), ("t_wg_gemm_wrong_tx", "in flight")] {
        assert!(wg_gemm(bug).is_err());
        let f = cuda_emulator::last_fault().unwrap();
        assert!(f.contains(text) || f.contains("more arrivals") || f.contains("race"), "{bug}: {f}");
    }
}

#[test]
fn bulk_copy() {
    let g = Gpu::new();
    let x = noise(4 * 256, 20);
    let xd = g.upload(&x);
    let mut y = g.uninit::<f32>(x.len());
    launch!(g, "t_bulk", grid(4, 1, 64, 1024), &mut y, &xd, &256i32).unwrap();
    assert_eq!(g.stream.clone_dtoh(&y).unwrap(), x.iter().map(|v| 2.0 * v).collect::<Vec<_>>());
    launch!(g, "t_bulk_no_wait", grid(4, 1, 64, 1024), &mut y, &xd, &256i32).unwrap();
    assert!(g.stream.synchronize().is_err());
    let f = cuda_emulator::last_fault().unwrap();
    assert!(f.contains("in flight") || f.contains("uninitialised"), "{f}");
}

/// y1 = 2 x + w; y2 = 2 y1 + w; … each launched with programmatic serialization after the other.
fn pdl_chain(name: &str, graph: bool) -> Result<Vec<f32>, cudarc::driver::DriverError> {
    let g = Gpu::new();
    let n = 300usize;
    let (x, w) = (g.stream.clone_htod(&vec![1f32; n])?, g.stream.clone_htod(&vec![3f32; n])?);
    let y = g.stream.alloc_zeros::<f32>(4 * n)?;
    g.stream.synchronize()?;
    let (xp, wp, yp) = (x.device_ptr(&g.stream).0, w.device_ptr(&g.stream).0, y.device_ptr(&g.stream).0);
    let enqueue = || {
        for i in 0..4u64 {
            let (to, from) = (yp + i * n as u64 * 4, if i == 0 { xp } else { yp + (i - 1) * n as u64 * 4 });
            g.launch_pdl(
                if i < 2 { "t_pdl" } else { name },
                3,
                128,
                &mut [arg(&to), arg(&from), arg(&wp), arg(&(n as i32))],
            );
        }
    };
    let exec = if graph {
        g.capture(enqueue)?
    } else {
        enqueue();
        None
    };
    if let Some(e) = &exec {
        e.launch()?;
        e.launch()?;
    }
    let r = g.stream.clone_dtoh(&y)?;
    g.stream.synchronize()?;
    Ok((0..4).map(|i| r[i * n + n - 1]).collect())
}

#[test]
fn programmatic_dependent_launch() {
    for graph in [false, true] {
        assert_eq!(pdl_chain("t_pdl", graph).unwrap(), [5.0, 13.0, 29.0, 61.0]);
        for bug in ["t_pdl_early", "t_pdl_no_wait"] {
            assert!(pdl_chain(bug, graph).is_err());
            let f = cuda_emulator::last_fault().unwrap();
            assert!(f.contains("griddepcontrol.wait must come first"), "{f}");
        }
    }
}
