//! Correct kernels through cudarc's safe API, against f64.
mod common;
use common::*;
use cudarc::driver::{DevicePtr, LaunchConfig, sys};

#[test]
fn rms_norm() {
    let g = Gpu::new();
    for (rows, dim, threads) in [(5usize, 256usize, 64u32), (3, 4096, 256), (2, 104, 32)] {
        let (x, w) = (halves(&noise(rows * dim, 2)), halves(&noise(dim, 3)));
        let (xd, wd) = (g.upload(&x), g.upload(&w));
        let mut y = g.uninit::<bf16>(rows * dim);
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
        let (wd, xd) = (g.upload(&w), g.upload(&x));
        let mut y = g.uninit::<bf16>(n);
        launch!(g, "t_gemv", grid(n.div_ceil(8) as u32, 1, 256, 0), &mut y, &wd, &xd, &(n as i32), &(k as i32))
            .unwrap();
        let got = g.stream.clone_dtoh(&y).unwrap();
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
    let (qd, kd, vd) = (g.upload(&q), g.upload(&k), g.upload(&v));
    let want: Vec<f64> =
        (0..kv * group).flat_map(|h| attend(&q[h * d..][..d], &k, &v, len, kv * d, h / group * d, 0.125)).collect();
    let mut count = g.stream.alloc_zeros::<u32>(kv).unwrap();
    for name in ["t_decode_attn_fence", "t_decode_attn_acq_rel"] {
        let mut part = g.uninit::<f32>(kv * group * splits * (d + 2));
        let mut out = g.uninit::<bf16>(kv * group * d);
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
        assert!(e < 4e-3, "{name}: {e}");
        assert_eq!(g.stream.clone_dtoh(&count).unwrap(), [0, 0]);
    }
}

#[test]
fn prefill_attention_mma() {
    let g = Gpu::new();
    let (d, heads, kv, t) = (64usize, 4usize, 2usize, 100usize);
    let (q, k, v) = (halves(&noise(t * heads * d, 9)), halves(&noise(t * kv * d, 10)), halves(&noise(t * kv * d, 11)));
    let (qd, kd, vd) = (g.upload(&q), g.upload(&k), g.upload(&v));
    let mut out = g.uninit::<bf16>(t * heads * d);
    let cfg = grid(t.div_ceil(64) as u32, heads as u32, 128, 5 * 64 * 72 * 2);
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
    let xd = g.upload(&x);
    let mut out = g.uninit::<i32>(1);
    launch!(g, "t_argmax", grid(1, 1, 1024, 0), &mut out, &xd, &(n as i32)).unwrap();
    assert_eq!(g.stream.clone_dtoh(&out).unwrap(), [77_777]);
}

#[test]
fn warp_primitives() {
    let g = Gpu::new();
    let x: Vec<i32> = (0..32).map(|i| i * 37 % 41).collect();
    let xd = g.upload(&x);
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
fn cooperative_grid() {
    use cudarc::driver::PushKernelArg;
    let g = Gpu::new();
    let x = noise(10_000, 15);
    let xd = g.upload(&x);
    let f = g.func("t_grid_sum");
    let mut out = g.uninit::<f32>(1);
    let mut part = g.uninit::<f32>(16);
    let cfg = |n| LaunchConfig { grid_dim: (n, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 };
    // SAFETY: the arguments are those of t_grid_sum.
    unsafe {
        g.stream.launch_builder(&f).arg(&mut out).arg(&mut part).arg(&xd).arg(&10_000i32).launch_cooperative(cfg(16))
    }
    .unwrap();
    assert!((g.stream.clone_dtoh(&out).unwrap()[0] - x.iter().sum::<f32>()).abs() < 1e-3);
    // SAFETY: as above.
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
    let (xd, wd) = (g.upload(&x), g.upload(&w));
    let mut y = g.uninit::<bf16>(m * n);
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
    // SAFETY: cfg describes these three buffers.
    unsafe { b.gemm(cfg(), &wd, &xd, &mut y) }.unwrap();
    assert!(error(&g.stream.clone_dtoh(&y).unwrap(), &want) < 4e-3);
    g.stream.memset_zeros(&mut y).unwrap();
    // SAFETY: as above.
    let graph = g.capture(|| unsafe { b.gemm(cfg(), &wd, &xd, &mut y) }.unwrap()).unwrap().unwrap();
    graph.launch().unwrap();
    assert!(error(&g.stream.clone_dtoh(&y).unwrap(), &want) < 4e-3);
}

/// Each block notes when and where it ran; the kernel that may start early is ready only when the other is done.
#[test]
fn traces() {
    let g = Gpu::new();
    let (blocks, words) = (3 * 2, 4);
    let mut spans = g.stream.alloc_zeros::<u64>(2 * blocks * words).unwrap();
    let first = spans.device_ptr(&g.stream).0;
    let second = first + (8 * blocks * words) as u64;
    launch!(g, "t_trace", grid(3, 2, 64, 0), &mut spans).unwrap();
    g.launch_pdl("t_trace", blocks as u32, 64, &mut [arg(&second)]);
    let got = g.stream.clone_dtoh(&spans).unwrap();
    assert_eq!(cuda_emulator::last_fault(), None);
    let spans: Vec<&[u64]> = got.chunks(words).collect();
    for (i, s) in spans.iter().enumerate() {
        assert!(0 < s[0] && s[0] < s[1] && s[1] < s[2], "block {i}: {s:?}");
        assert_eq!(s[3] as usize, i % blocks % 4, "the multiprocessor of block {i}");
    }
    let (first, second) = spans.split_at(blocks);
    let start = first.iter().map(|s| s[0]).min().unwrap();
    assert_eq!(
        second.iter().filter(|s| s[0] < start).count(),
        4,
        "one block for each multiprocessor runs ahead: {got:?}"
    );
    let done = first.iter().map(|s| s[2]).max();
    assert!(done < second.iter().map(|s| s[1]).min(), "ready before its predecessor was done: {got:?}");
    // off: nothing is written, and nothing of it read
    launch!(g, "t_trace", grid(2, 1, 64, 0), &0u64).unwrap();
    g.stream.synchronize().unwrap();
    assert_eq!(cuda_emulator::last_fault(), None);
}

/// Tests of one process run in parallel, so work, faults and their texts stay with the thread that enqueued the work.
#[test]
fn threads() {
    std::thread::scope(|s| {
        for i in 0..8i32 {
            s.spawn(move || {
                let g = Gpu::new();
                for round in 0..5 {
                    let mut pos = g.upload(&[i * 100]);
                    for _ in 0..7 {
                        launch!(g, "t_advance", grid(1, 1, 32, 0), &mut pos).unwrap();
                    }
                    assert_eq!(g.stream.clone_dtoh(&pos).unwrap(), [i * 100 + 7], "{round}");
                    assert_eq!(cuda_emulator::last_fault(), None);
                }
                if i % 2 == 1 {
                    let mut garbage = g.uninit::<i32>(1);
                    launch!(g, "t_advance", grid(1, 1, 32, 0), &mut garbage).unwrap();
                    assert!(g.stream.synchronize().is_err());
                    assert!(cuda_emulator::last_fault().unwrap().contains("uninitialised"));
                }
            });
        }
    });
}
