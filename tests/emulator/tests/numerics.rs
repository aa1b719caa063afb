//! Correct kernels through cudarc's safe API, against f64.
mod common;
use common::*;
use cudarc::driver::{DevicePtr, DevicePtrMut, LaunchConfig, sys};
use std::time::Instant;

#[test]
fn device() {
    let g = Gpu::new();
    assert_eq!(g.ctx.compute_capability().unwrap(), (9, 0));
    assert_eq!(g.ctx.name().unwrap(), "CUDA emulator");
    assert!(g.ctx.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT).unwrap() > 0);
    let (free, total) = g.ctx.mem_get_info().unwrap();
    assert!(free <= total && total == g.ctx.total_mem().unwrap());
    assert!(g.func("t_gemv").occupancy_max_active_blocks_per_multiprocessor(256, 100 << 10, None).unwrap() == 2);
    let m = g.ctx.load_module(cudarc::nvrtc::Ptx::from_binary(vec![0])).unwrap();
    assert_eq!(m.load_function("no_such_kernel").err().unwrap().0, sys::CUresult::CUDA_ERROR_NOT_FOUND);
    assert_eq!(
        g.ctx
            .load_module(cudarc::nvrtc::Ptx::from_binary(vec![0]))
            .unwrap()
            .load_function("t_gemv")
            .unwrap()
            .num_regs()
            .unwrap(),
        0
    );
}

#[test]
fn memory_streams_events() {
    let g = Gpu::new();
    let x = noise(1000, 1);
    let d = g.stream.clone_htod(&x).unwrap();
    let mut e = g.stream.alloc_zeros::<f32>(1000).unwrap();
    assert_eq!(g.stream.clone_dtoh(&e).unwrap(), vec![0.0; 1000]);
    let a = g.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).unwrap();
    g.stream.memcpy_dtod(&d, &mut e).unwrap();
    let b = g.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).unwrap();
    assert!(a.elapsed_ms(&b).unwrap() >= 0.0);
    assert_eq!(g.stream.clone_dtoh(&e).unwrap(), x);
    // another stream waits for this one
    let other = g.ctx.new_stream().unwrap();
    g.stream.memset_zeros(&mut e).unwrap();
    other.join(&g.stream).unwrap();
    assert_eq!(other.clone_dtoh(&e).unwrap(), vec![0.0; 1000]);
    // page-locked memory is read when the copy runs, not when it is issued
    let mut pinned = unsafe { g.ctx.alloc_pinned_with_flags::<f32>(4, 0) }.unwrap();
    pinned.as_mut_slice().unwrap().copy_from_slice(&[1.0, 2.0, 3.0, 4.0]);
    let mut f = g.stream.alloc_zeros::<f32>(4).unwrap();
    g.stream.memcpy_htod(&pinned, &mut f).unwrap();
    assert_eq!(g.stream.clone_dtoh(&f).unwrap(), [1.0, 2.0, 3.0, 4.0]);
    assert_eq!(cuda_emulator::last_fault(), None);
}

/// cudarc's own event tracking on, two streams: every argument waits for and records events.
#[test]
fn event_tracking() {
    use cudarc::driver::{CudaContext, PushKernelArg};
    cuda_emulator::install();
    let ctx = CudaContext::new(0).unwrap();
    let (a, b) = (ctx.new_stream().unwrap(), ctx.new_stream().unwrap());
    let f = ctx.load_module(cudarc::nvrtc::Ptx::from_binary(vec![0])).unwrap().load_function("t_advance").unwrap();
    let mut pos = a.clone_htod(&[5i32]).unwrap();
    for s in [&a, &b, &b, &a] {
        unsafe { s.launch_builder(&f).arg(&mut pos).launch(grid(1, 1, 32, 0)) }.unwrap();
    }
    assert_eq!(b.clone_dtoh(&pos).unwrap(), [9]);
    let s = ctx.default_stream();
    unsafe { s.launch_builder(&f).arg(&mut pos).launch(grid(1, 1, 32, 0)) }.unwrap();
    assert_eq!(s.clone_dtoh(&pos).unwrap(), [10]);
    ctx.synchronize().unwrap();
}

#[test]
fn rms_norm() {
    let g = Gpu::new();
    for (rows, dim, threads) in [(5usize, 256usize, 64u32), (3, 4096, 256), (2, 104, 32)] {
        let (x, w) = (halves(&noise(rows * dim, 2)), halves(&noise(dim, 3)));
        let (xd, wd) = (g.stream.clone_htod(&x).unwrap(), g.stream.clone_htod(&w).unwrap());
        let mut y = unsafe { g.stream.alloc::<bf16>(rows * dim) }.unwrap();
        launch!(g, "t_rms_norm", grid(rows as u32, 1, threads, 0), &mut y, &xd, &wd, &(dim as i32), &1e-6f32).unwrap();
        let want: Vec<f64> = (0..rows)
            .flat_map(|r| {
                let row: Vec<f64> = x[r * dim..][..dim].iter().map(|v| v.to_f64()).collect();
                let s = 1.0 / (row.iter().map(|v| v * v).sum::<f64>() / dim as f64 + 1e-6).sqrt();
                (0..dim).map(|i| row[i] * s * w[i].to_f64()).collect::<Vec<_>>()
            })
            .collect();
        let e = error(&g.stream.clone_dtoh(&y).unwrap(), &want);
        assert!(e < 4e-3, "{e}");
    }
}

#[test]
fn gemv() {
    let g = Gpu::new();
    for (n, k) in [(100usize, 512usize), (1024, 2048)] {
        let (w, x) = (halves(&noise(n * k, 4)), halves(&noise(k, 5)));
        let (wd, xd) = (g.stream.clone_htod(&w).unwrap(), g.stream.clone_htod(&x).unwrap());
        let mut y = unsafe { g.stream.alloc::<bf16>(n) }.unwrap();
        let t = Instant::now();
        launch!(g, "t_gemv", grid(n.div_ceil(8) as u32, 1, 256, 0), &mut y, &wd, &xd, &(n as i32), &(k as i32))
            .unwrap();
        let got = g.stream.clone_dtoh(&y).unwrap();
        println!("gemv {n}x{k}: {:?}", t.elapsed());
        let want: Vec<f64> = (0..n).map(|r| (0..k).map(|i| w[r * k + i].to_f64() * x[i].to_f64()).sum()).collect();
        assert!(error(&got, &want) < 4e-3);
    }
}

#[test]
fn decode_attention_last_block_merges() {
    let g = Gpu::new();
    let (d, group, kv, splits, len) = (64usize, 4usize, 2usize, 5usize, 333usize);
    let (q, k, v) =
        (halves(&noise(kv * group * d, 6)), halves(&noise(len * kv * d, 7)), halves(&noise(len * kv * d, 8)));
    let (qd, kd, vd) =
        (g.stream.clone_htod(&q).unwrap(), g.stream.clone_htod(&k).unwrap(), g.stream.clone_htod(&v).unwrap());
    let want: Vec<f64> =
        (0..kv * group).flat_map(|h| attend(&q[h * d..][..d], &k, &v, len, kv * d, h / group * d, 0.125)).collect();
    let mut count = g.stream.alloc_zeros::<u32>(kv).unwrap();
    for name in ["t_decode_attn_fence", "t_decode_attn_acq_rel"] {
        let mut part = unsafe { g.stream.alloc::<f32>(kv * group * splits * (d + 2)) }.unwrap();
        let mut out = unsafe { g.stream.alloc::<bf16>(kv * group * d) }.unwrap();
        let t = Instant::now();
        for _ in 0..2 {
            let cfg = grid(kv as u32, splits as u32, 128, (4 * group * (d + 2) * 4) as u32);
            launch!(
                g,
                name,
                cfg,
                &mut out,
                &mut part,
                &mut count,
                &qd,
                &kd,
                &vd,
                &(len as i32),
                &((kv * d) as i32),
                &0.125f32
            )
            .unwrap();
        }
        let e = error(&g.stream.clone_dtoh(&out).unwrap(), &want);
        println!("{name}: 2 x {len} keys {:?}", t.elapsed());
        assert!(e < 4e-3, "{name}: {e}");
        assert_eq!(g.stream.clone_dtoh(&count).unwrap(), [0, 0]);
    }
}

#[test]
fn prefill_attention_mma() {
    let g = Gpu::new();
    let (d, heads, kv, t) = (64usize, 4usize, 2usize, 100usize);
    let (q, k, v) = (halves(&noise(t * heads * d, 9)), halves(&noise(t * kv * d, 10)), halves(&noise(t * kv * d, 11)));
    let (qd, kd, vd) =
        (g.stream.clone_htod(&q).unwrap(), g.stream.clone_htod(&k).unwrap(), g.stream.clone_htod(&v).unwrap());
    let mut out = unsafe { g.stream.alloc::<bf16>(t * heads * d) }.unwrap();
    let cfg = grid(t.div_ceil(64) as u32, heads as u32, 128, 5 * 64 * 72 * 2);
    let at = Instant::now();
    launch!(
        g,
        "t_prefill_attn_d64",
        cfg,
        &mut out,
        &qd,
        &kd,
        &vd,
        &(t as i32),
        &((heads * d) as i32),
        &((kv * d) as i32),
        &((heads / kv) as i32),
        &0.125f32
    )
    .unwrap();
    let got = g.stream.clone_dtoh(&out).unwrap();
    println!("prefill {t} tokens {heads} heads: {:?}", at.elapsed());
    let want: Vec<f64> = (0..t * heads)
        .flat_map(|i| attend(&q[i * d..][..d], &k, &v, i / heads + 1, kv * d, i % heads / (heads / kv) * d, 0.125))
        .collect();
    let e = error(&got, &want);
    assert!(e < 1e-2, "{e}");
}

#[test]
fn argmax_of_a_large_row() {
    let g = Gpu::new();
    let n = 128_256;
    let mut x = noise(n, 12);
    (x[77_777], x[90_000]) = (1.5, 1.5); // the first of two equal ones wins
    let xd = g.stream.clone_htod(&x).unwrap();
    let mut out = unsafe { g.stream.alloc::<i32>(1) }.unwrap();
    let t = Instant::now();
    launch!(g, "t_argmax", grid(1, 1, 1024, 0), &mut out, &xd, &(n as i32)).unwrap();
    assert_eq!(g.stream.clone_dtoh(&out).unwrap(), [77_777]);
    println!("argmax {n}: {:?}", t.elapsed());
}

#[test]
fn warp_primitives() {
    let g = Gpu::new();
    let x: Vec<i32> = (0..32).map(|i| i * 37 % 41).collect();
    let xd = g.stream.clone_htod(&x).unwrap();
    let mut out = g.stream.alloc_zeros::<i32>(32 * 16).unwrap();
    launch!(g, "t_warp", grid(1, 1, 32, 0), &mut out, &xd).unwrap();
    let got = g.stream.clone_dtoh(&out).unwrap();
    let ballot = x.iter().enumerate().fold(0u32, |a, (i, v)| a | ((v & 1) as u32) << i);
    let or = x.iter().fold(0, |a, v| a | v);
    for l in 0..32usize {
        let v = x[l];
        let want = [
            x[5],
            x[(l & !7) + 1],
            if l < 3 { v } else { x[l - 3] },
            if l % 16 + 3 < 16 { x[l + 3] } else { v },
            x[l ^ 9],
            ballot as i32,
            x.contains(&7) as i32,
            1,
            x.iter().sum(),
            *x.iter().max().unwrap(),
            or,
            v.count_ones() as i32,
            if v == 0 { 0 } else { v.trailing_zeros() as i32 + 1 },
            v.leading_zeros() as i32,
            ballot.count_ones() as i32,
            *x.iter().max().unwrap(),
        ];
        for (k, w) in want.iter().enumerate() {
            assert_eq!(got[32 * k + l], *w, "primitive {k} lane {l}");
        }
    }
}

#[test]
fn graph_replayed_three_times() {
    let g = Gpu::new();
    let x = noise(8, 13);
    let xd = g.stream.clone_htod(&x).unwrap();
    let mut pos = g.stream.clone_htod(&[2i32]).unwrap();
    let mut out = g.stream.alloc_zeros::<f32>(8).unwrap();
    let graph = g
        .capture(|| {
            launch!(g, "t_step", grid(1, 1, 32, 0), &mut out, &xd, &pos).unwrap();
            launch!(g, "t_advance", grid(1, 1, 32, 0), &mut pos).unwrap();
        })
        .unwrap()
        .unwrap();
    assert_eq!(g.stream.clone_dtoh(&pos).unwrap(), [2], "capture must run nothing");
    for _ in 0..3 {
        graph.launch().unwrap();
    }
    assert_eq!(g.stream.clone_dtoh(&pos).unwrap(), [5]);
    let got = g.stream.clone_dtoh(&out).unwrap();
    assert_eq!(got, [0.0, 0.0, 2.0 * x[2], 2.0 * x[3], 2.0 * x[4], 0.0, 0.0, 0.0]);
}

#[test]
fn graph_update_and_node_parameters() {
    let g = Gpu::new();
    let xd = g.stream.clone_htod(&noise(8, 14)).unwrap();
    let mut pos = g.stream.clone_htod(&[0i32]).unwrap();
    let mut other = g.stream.clone_htod(&[10i32]).unwrap();
    let graph = g.capture(|| launch!(g, "t_advance", grid(1, 1, 32, 0), &mut pos).unwrap()).unwrap().unwrap();
    graph.launch().unwrap();
    let (mut n, p) = (1, other.device_ptr_mut(&g.stream).0);
    let mut node = std::ptr::null_mut();
    unsafe {
        sys::cuGraphGetNodes(graph.cu_graph(), &mut node, &mut n).result().unwrap();
        let mut kp: sys::CUDA_KERNEL_NODE_PARAMS = std::mem::zeroed();
        sys::cuGraphKernelNodeGetParams_v2(node, &mut kp).result().unwrap();
        let mut params = [arg(&p)];
        kp.kernelParams = params.as_mut_ptr();
        sys::cuGraphExecKernelNodeSetParams_v2(graph.cu_graph_exec(), node, &kp).result().unwrap();
    }
    graph.launch().unwrap();
    assert_eq!((g.stream.clone_dtoh(&pos).unwrap()[0], g.stream.clone_dtoh(&other).unwrap()[0]), (1, 11));
    drop(xd);
}

/// Calls a program makes beyond the safe layer: memory pool, captured copies from page-locked memory, graph update, forked capture.
#[test]
fn lower_level_calls() {
    use cudarc::driver::result;
    let g = Gpu::new();
    let pool = unsafe { result::device::get_default_mem_pool(g.ctx.cu_device()) }.unwrap();
    let mut keep = u64::MAX;
    unsafe {
        result::mem_pool::set_attribute(
            pool,
            sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
            &mut keep as *mut u64 as *mut _,
        )
    }
    .unwrap();
    let mut pinned = unsafe { g.ctx.alloc_pinned_with_flags::<i32>(1, 0) }.unwrap();
    pinned.as_mut_slice().unwrap()[0] = 1;
    let mut pos = g.stream.alloc_zeros::<i32>(1).unwrap();
    let (d, host) =
        (pos.device_ptr_mut(&g.stream).0, unsafe { std::slice::from_raw_parts(pinned.as_ptr().unwrap(), 1) });
    let side = g.ctx.new_stream().unwrap();
    let (fork, join) = (g.ctx.new_event(None).unwrap(), g.ctx.new_event(None).unwrap());
    let f = g.func("t_advance");
    let enqueue = || {
        use cudarc::driver::PushKernelArg;
        unsafe { result::memcpy_htod_async(d, host, g.stream.cu_stream()) }.unwrap();
        fork.record(&g.stream).unwrap();
        side.wait(&fork).unwrap();
        unsafe { side.launch_builder(&f).arg(&d).launch(grid(1, 1, 32, 0)) }.unwrap();
        join.record(&side).unwrap();
        g.stream.wait(&join).unwrap();
    };
    let graph = g.capture(enqueue).unwrap().unwrap();
    graph.upload().unwrap();
    pinned.as_mut_slice().unwrap()[0] = 9;
    graph.launch().unwrap();
    assert_eq!(g.stream.clone_dtoh(&pos).unwrap(), [10], "the copy reads page-locked memory at replay");
    g.stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    enqueue();
    let again = unsafe { result::stream::end_capture(g.stream.cu_stream()) }.unwrap();
    let mut info: sys::CUgraphExecUpdateResultInfo = unsafe { std::mem::zeroed() };
    unsafe { sys::cuGraphExecUpdate_v2(graph.cu_graph_exec(), again, &mut info) }.result().unwrap();
    unsafe { result::graph::destroy(again) }.unwrap();
    graph.launch().unwrap();
    assert_eq!(g.stream.clone_dtoh(&pos).unwrap(), [10]);
    g.ctx.check_err().unwrap();
}

#[test]
fn cooperative_grid() {
    use cudarc::driver::PushKernelArg;
    let g = Gpu::new();
    let x = noise(10_000, 15);
    let xd = g.stream.clone_htod(&x).unwrap();
    let f = g.func("t_grid_sum");
    let mut out = unsafe { g.stream.alloc::<f32>(1) }.unwrap();
    let mut part = unsafe { g.stream.alloc::<f32>(16) }.unwrap();
    let cfg = |n| LaunchConfig { grid_dim: (n, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 };
    unsafe {
        g.stream.launch_builder(&f).arg(&mut out).arg(&mut part).arg(&xd).arg(&10_000i32).launch_cooperative(cfg(16))
    }
    .unwrap();
    assert!((g.stream.clone_dtoh(&out).unwrap()[0] - x.iter().sum::<f32>()).abs() < 1e-3);
    let e = unsafe {
        g.stream.launch_builder(&f).arg(&mut out).arg(&mut part).arg(&xd).arg(&10_000i32).launch_cooperative(cfg(4000))
    };
    assert_eq!(e.err().unwrap().0, sys::CUresult::CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE);
}

#[test]
fn cublas_gemm_also_captured() {
    use cudarc::cublas::{CudaBlas, Gemm, GemmConfig, sys as blas};
    let g = Gpu::new();
    let (m, n, k) = (33usize, 48usize, 80usize); // y[m,n] = x[m,k] w[n,k]^T, row-major
    let (x, w) = (halves(&noise(m * k, 16)), halves(&noise(n * k, 17)));
    let (xd, wd) = (g.stream.clone_htod(&x).unwrap(), g.stream.clone_htod(&w).unwrap());
    let mut y = unsafe { g.stream.alloc::<bf16>(m * n) }.unwrap();
    let b = CudaBlas::new(g.stream.clone()).unwrap();
    let cfg = || GemmConfig {
        transa: blas::cublasOperation_t::CUBLAS_OP_T,
        transb: blas::cublasOperation_t::CUBLAS_OP_N,
        m: n as i32,
        n: m as i32,
        k: k as i32,
        alpha: bf16::ONE,
        lda: k as i32,
        ldb: k as i32,
        beta: bf16::ZERO,
        ldc: n as i32,
    };
    let want: Vec<f64> =
        (0..m * n).map(|i| (0..k).map(|t| x[i / n * k + t].to_f64() * w[i % n * k + t].to_f64()).sum()).collect();
    unsafe { b.gemm(cfg(), &wd, &xd, &mut y) }.unwrap();
    assert!(error(&g.stream.clone_dtoh(&y).unwrap(), &want) < 4e-3);
    g.stream.memset_zeros(&mut y).unwrap();
    let graph = g.capture(|| unsafe { b.gemm(cfg(), &wd, &xd, &mut y) }.unwrap()).unwrap().unwrap();
    graph.launch().unwrap();
    assert!(error(&g.stream.clone_dtoh(&y).unwrap(), &want) < 4e-3);
}

fn tensor_map(ptr: u64, cols: usize, rows: usize) -> sys::CUtensorMap {
    use sys::*;
    let mut t: CUtensorMap = unsafe { std::mem::zeroed() };
    let (dim, stride, b, one) = ([cols as u64, rows as u64], [cols as u64 * 2], [64u32, 64], [1u32, 1]);
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
    let mut y = unsafe { g.stream.alloc::<bf16>(t * n) }?;
    let (mx, mw) = (tensor_map(xd.device_ptr(&g.stream).0, k, t), tensor_map(wd.device_ptr(&g.stream).0, k, n));
    let f = g.func(name);
    let yp = y.device_ptr_mut(&g.stream).0;
    let sizes = [t as i32, n as i32, k as i32];
    let mut a = [arg(&yp), arg(&mx), arg(&mw), arg(&sizes[0]), arg(&sizes[1]), arg(&sizes[2])];
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
    let t = Instant::now();
    let e = wg_gemm("t_wg_gemm").unwrap();
    println!("wg_gemm 100x192x256: {:?}", t.elapsed());
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
    let xd = g.stream.clone_htod(&x).unwrap();
    let mut y = unsafe { g.stream.alloc::<f32>(x.len()) }.unwrap();
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

/// Tests of one process run in parallel: work, faults and their texts stay with the thread that enqueued them.
#[test]
fn threads() {
    std::thread::scope(|s| {
        for i in 0..8i32 {
            s.spawn(move || {
                let g = Gpu::new();
                for round in 0..5 {
                    let mut pos = g.stream.clone_htod(&[i * 100]).unwrap();
                    for _ in 0..7 {
                        launch!(g, "t_advance", grid(1, 1, 32, 0), &mut pos).unwrap();
                    }
                    assert_eq!(g.stream.clone_dtoh(&pos).unwrap(), [i * 100 + 7], "{round}");
                    assert_eq!(cuda_emulator::last_fault(), None);
                }
                if i % 2 == 1 {
                    let mut garbage = unsafe { g.stream.alloc::<i32>(1) }.unwrap();
                    launch!(g, "t_advance", grid(1, 1, 32, 0), &mut garbage).unwrap();
                    assert!(g.stream.synchronize().is_err());
                    assert!(cuda_emulator::last_fault().unwrap().contains("uninitialised"));
                }
            });
        }
    });
}

#[test]
#[ignore = "timing; run with --ignored --nocapture --test-threads 1"]
fn timing() {
    let g = Gpu::new();
    let best = |f: &dyn Fn()| {
        (0..5)
            .map(|_| {
                let t = Instant::now();
                f();
                t.elapsed()
            })
            .min()
            .unwrap()
    };
    let x = g.stream.clone_htod(&halves(&noise(4 << 20, 1))).unwrap();
    let out = unsafe { g.stream.alloc::<bf16>(4 << 20) }.unwrap();
    for (n, k) in [(768i32, 256i32), (2048, 2048), (32000, 64)] {
        println!(
            "gemv {n}x{k}: {:?}",
            best(&|| {
                launch!(g, "t_gemv", grid(n as u32 / 8, 1, 256, 0), &out, &x, &x, &n, &k).unwrap();
                g.stream.synchronize().unwrap()
            })
        );
    }
    for (rows, dim, threads) in [(64u32, 256i32, 64u32), (4, 4096, 256)] {
        println!(
            "rms_norm {rows}x{dim}: {:?}",
            best(&|| {
                launch!(g, "t_rms_norm", grid(rows, 1, threads, 0), &out, &x, &x, &dim, &1e-6f32).unwrap();
                g.stream.synchronize().unwrap()
            })
        );
    }
    for t in [64i32, 200] {
        println!(
            "prefill attention {t} tokens, 8 heads, d 64: {:?}",
            best(&|| {
                launch!(
                    g,
                    "t_prefill_attn_d64",
                    grid(t as u32 / 64 + 1, 8, 128, 5 * 64 * 72 * 2),
                    &out,
                    &x,
                    &x,
                    &x,
                    &t,
                    &512i32,
                    &128i32,
                    &4i32,
                    &0.125f32
                )
                .unwrap();
                g.stream.synchronize().unwrap()
            })
        );
    }
    let (part, mut count) =
        (unsafe { g.stream.alloc::<f32>(1 << 20) }.unwrap(), g.stream.alloc_zeros::<u32>(8).unwrap());
    println!(
        "decode attention 500 keys, 8 heads, 8 splits: {:?}",
        best(&|| {
            launch!(
                g,
                "t_decode_attn_fence",
                grid(2, 8, 128, 4 * 4 * 66 * 4),
                &out,
                &part,
                &count,
                &x,
                &x,
                &x,
                &500i32,
                &128i32,
                &0.125f32
            )
            .unwrap();
            g.stream.synchronize().unwrap()
        })
    );
    g.stream.memset_zeros(&mut count).unwrap();
    println!(
        "empty launch + synchronize, 1 block of 32: {:?}",
        best(&|| {
            launch!(g, "t_warp", grid(1, 1, 32, 0), &out, &x).unwrap();
            g.stream.synchronize().unwrap()
        })
    );
    println!(
        "1000 such launches: {:?}",
        best(&|| {
            for _ in 0..1000 {
                launch!(g, "t_step", grid(1, 1, 32, 0), &out, &x, &count).unwrap();
            }
            g.stream.synchronize().unwrap()
        })
    );
}

#[test]
fn whole_process_by_library_path() {
    let out = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_process", "--ignored", "--nocapture"])
        .env("LD_LIBRARY_PATH", cuda_emulator::library_dir())
        .env("CUDA_EMULATOR_SM_COUNT", "7")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(
        out.status.success() && text.contains("child: 7 SMs, 42"),
        "{text}{}",
        String::from_utf8_lossy(&out.stderr)
    );
}
#[test]
#[ignore = "run by whole_process_by_library_path"]
fn child_process() {
    let g = Gpu::open(); // no install(): found through LD_LIBRARY_PATH
    let sms = g.ctx.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT).unwrap();
    let mut pos = g.stream.clone_htod(&[41i32]).unwrap();
    launch!(g, "t_advance", grid(1, 1, 32, 0), &mut pos).unwrap();
    println!("child: {sms} SMs, {}", g.stream.clone_dtoh(&pos).unwrap()[0]);
}
