//! How long kernels take, and how fast PTX is interpreted: `cargo test -p cuda-emulator --test timing -- --ignored --nocapture`.
mod common;
use common::*;
use std::time::Instant;

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
    let x = g.upload(&halves(&noise(4 << 20, 1)));
    let out = g.uninit::<bf16>(4 << 20);
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
    let (part, mut count) = (g.uninit::<f32>(1 << 20), g.stream.alloc_zeros::<u32>(8).unwrap());
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

/// The interpreter's speed on one core: at least 20 million lane instructions a second.
#[test]
#[ignore = "timing; run with --ignored --nocapture --test-threads 1"]
fn ptx() {
    with_ptx(|| {
        let g = Gpu::new();
        let x = g.upload(&halves(&noise(4 << 20, 1)));
        let out = g.uninit::<bf16>(4 << 20);
        let rate = |what: &str, f: &dyn Fn()| {
            f(); // parsed before it is timed
            let (before, t) = (cuda_emulator::lane_instructions(), Instant::now());
            f();
            let (lanes, s) = (cuda_emulator::lane_instructions() - before, t.elapsed().as_secs_f64());
            println!(
                "{what}: {lanes} lane instructions in {:.1} ms, {:.0} million a second",
                s * 1e3,
                lanes as f64 / s / 1e6
            );
            lanes as f64 / s
        };
        let rates = [
            rate("gemv 2048x2048", &|| {
                launch!(g, "t_gemv", grid(256, 1, 256, 0), &out, &x, &x, &2048i32, &2048i32).unwrap();
                g.stream.synchronize().unwrap()
            }),
            rate("rms_norm 64x256", &|| {
                launch!(g, "t_rms_norm", grid(64, 1, 64, 0), &out, &x, &x, &256i32, &1e-6f32).unwrap();
                g.stream.synchronize().unwrap()
            }),
            rate("prefill attention 200 tokens, 8 heads, d 64", &|| {
                let smem = 5 * 64 * 72 * 2;
                launch!(
                    g,
                    "t_prefill_attn_d64",
                    grid(4, 8, 128, smem),
                    &out,
                    &x,
                    &x,
                    &x,
                    &200i32,
                    &512i32,
                    &128i32,
                    &4i32,
                    &0.125f32
                )
                .unwrap();
                g.stream.synchronize().unwrap()
            }),
        ];
        assert!(rates.iter().all(|r| *r > 20e6));
    });
}
