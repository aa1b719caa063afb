//! Products, attention and steps on the CPU; `cargo bench --bench cpu -- gemv` runs those of one kind.
//!
//! Sizes are those of SmolLM2-135M and Llama-3-8B. `step` is a step of the model that `AOJI_MODEL` names, by default the demo model.
//! Throughput counts the bytes that an op must move; `AOJI_CPU` chooses the instructions.

use aoji::{
    Device, Engine, KvDtype, Options, Result, Sampling,
    cpu::Cpu,
    ops::{AttnDecode, AttnPrefill, Gemm, Gemv, Op, Sample},
};
use criterion::{Criterion, Throughput};
use half::bf16;

fn op<O: Op>(c: &mut Criterion, cpu: &Cpu<bf16>, name: &str, cases: &[O]) -> Result<()> {
    let mut group = c.benchmark_group(name);
    for op in cases {
        let cost = op.cost();
        group.throughput(Throughput::Bytes(cost.read + cost.write));
        let mut io = op.setup(cpu, 0)?;
        group.bench_function(format!("{op:?}"), |b| b.iter(|| op.run(cpu, &mut io).expect("sizes fit")));
    }
    group.finish();
    Ok(())
}

fn step(c: &mut Criterion) -> Result<()> {
    let model = std::env::var("AOJI_MODEL").unwrap_or_else(|_| "demo".into());
    let engine = Engine::open(&model, &Options { device: Device::Cpu, context: Some(1024), ..Options::default() })?;
    let mut group = c.benchmark_group("step");
    let drawn = Sampling { temperature: 0.8, top_k: 40, top_p: 0.95, ..Sampling::default() };
    for (choice, sampling) in [("greedy", Sampling::default()), ("drawn", drawn)] {
        for depth in [1, 512] {
            let prompt = aoji::bench::tokens(depth, engine.config().vocab, 1);
            let mut session = engine.session(1024)?;
            group.bench_function(format!("{model}, {choice}, at depth {depth}"), |b| {
                b.iter_custom(|n| {
                    let mut time = std::time::Duration::ZERO;
                    for first in (0..n).step_by(64) {
                        session.sync(&prompt).expect("it fits");
                        let mut decode = session.decode(&sampling, &[]).expect("it fits");
                        drop(decode.next());
                        let begin = std::time::Instant::now();
                        decode.take((n - first).min(64) as usize).for_each(|token| assert!(token.is_ok()));
                        time += begin.elapsed();
                    }
                    time
                });
            });
        }
    }
    group.finish();
    Ok(())
}

fn main() -> Result<()> {
    let cpu = Cpu::<bf16>::new()?;
    let mut c = Criterion::default().configure_from_args().sample_size(20);
    let gemv = |rows, n, k| Gemv { rows, n, k };
    op(
        &mut c,
        &cpu,
        "gemv",
        &[gemv(1, 49_152, 576), gemv(4, 49_152, 576), gemv(16, 49_152, 576), gemv(1, 28_672, 4096)],
    )?;
    let gemm = |rows, n, k| Gemm { rows, n, k };
    op(
        &mut c,
        &cpu,
        "gemm",
        &[gemm(128, 3072, 576), gemm(512, 3072, 576), gemm(128, 576, 1536), gemm(128, 4096, 4096)],
    )?;
    let decode = |kv_len, kv| AttnDecode {
        rows: 1,
        n_heads: 9,
        n_kv_heads: 3,
        head_dim: 64,
        max_seq: kv_len,
        kv_len,
        window: kv_len,
        kv,
    };
    let (auto, fp8) = (KvDtype::Auto, KvDtype::Fp8);
    let decodes = [decode(128, auto), decode(512, auto), decode(8192, auto), decode(512, fp8), decode(8192, fp8)];
    op(&mut c, &cpu, "attn_decode", &decodes)?;
    let prefill = |rows, kv_len, kv| AttnPrefill {
        rows,
        first: 0,
        shared: 0,
        n_heads: 9,
        n_kv_heads: 3,
        head_dim: 64,
        max_seq: kv_len,
        kv_len,
        window: kv_len,
        kv,
    };
    op(
        &mut c,
        &cpu,
        "attn_prefill",
        &[prefill(128, 128, auto), prefill(128, 512, auto), prefill(128, 8192, auto), prefill(128, 512, fp8)],
    )?;
    op(&mut c, &cpu, "sample", &[Sample { rows: 1, vocab: 49_152, max_seq: 50 }])?;
    step(&mut c)?;
    c.final_summary();
    Ok(())
}
