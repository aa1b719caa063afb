//! Times the host's side of the start: reading tensors from the page cache into the buffers from which a GPU would take them,
//! compared with copying as many bytes in memory, with as many threads, into buffers of the same size. No device takes part.
//!
//! ```sh
//! cargo bench --bench load
//! ```

use aoji::{
    Config, Dtype, Result, Weights,
    ops::Rope,
    weights::reader::{self, BUFFERS, CHUNK, Part, Sink},
};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::{
    hint::black_box,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Duration,
};

/// 134 million parameters.
const CONFIG: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32768,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2
}"#;

/// A device that takes everything at once.
struct Nowhere;

impl Sink for Nowhere {
    type Buffer = Vec<u8>;
    fn buffer(&self, len: usize) -> Result<Vec<u8>> {
        Ok(vec![1; len]) // not 0, whose pages would be made in the loop
    }
    fn bytes<'b>(&self, buffer: &'b mut Vec<u8>) -> Result<&'b mut [u8]> {
        Ok(buffer)
    }
    fn send(&self, buffer: &mut Vec<u8>, parts: &[Part]) -> Result<()> {
        black_box((buffer, parts));
        Ok(())
    }
}

/// Copies each of `chunks` to a buffer, in as many threads as there are readers.
fn copy(chunks: &[&[u8]]) {
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..reader::readers() {
            scope.spawn(|| {
                let mut buffers = vec![vec![1; CHUNK]; BUFFERS];
                for turn in 0.. {
                    let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
                    let buffer = &mut buffers[turn % BUFFERS][..chunk.len()];
                    buffer.copy_from_slice(chunk);
                    black_box(buffer);
                }
            });
        }
    });
}

fn load(c: &mut Criterion) {
    let mut group = c.benchmark_group(format!("load, {} threads", reader::readers()));
    group.sample_size(20).measurement_time(Duration::from_secs(3));
    for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        aoji::synth::write(CONFIG, 1, dtype, 100 << 20, dir.path(), |_, _| {}).expect("room for 540 MB");
        let config = Config::from_dir(dir.path()).expect("as written");
        let open = || Weights::open(dir.path(), &config).expect("as written");
        let weights = open();
        group.throughput(Throughput::Bytes(weights.bytes()));
        if dtype == Dtype::Bf16 {
            let from: Vec<u8> = weights.tensors().flat_map(|t| t.bytes()).copied().collect();
            let chunks: Vec<&[u8]> = from.chunks(CHUNK).collect();
            group.bench_function("memcpy", |b| b.iter(|| copy(&chunks)));
            // mapped anew each time, as at a start
            group.bench_function("memcpy from the mapping", |b| {
                b.iter(|| {
                    let weights = open();
                    let chunks: Vec<&[u8]> = weights.tensors().flat_map(|t| t.bytes().chunks(CHUNK)).collect();
                    copy(&chunks);
                });
            });
        }
        group.bench_function(format!("read {dtype:?}"), |b| {
            b.iter(|| {
                let weights = open();
                let targets = weights.tensors().map(|t| (t, 0)).collect();
                reader::read_all(targets, &Nowhere, &mut |_| {}).expect("warm files");
            });
        });
    }
    group.finish();
}

/// What is computed while weights are on their way.
fn rope_table(c: &mut Criterion) {
    let config = Config::from_json("config.json".as_ref(), &aoji::synth::preset("llama3-8b").expect("known"), None);
    let frequencies = config.expect("a preset").rope_inv_freq();
    c.bench_function("rotary table, 8192 positions", |b| b.iter(|| Rope::table(black_box(&frequencies), 8192)));
}

criterion_group!(benches, load, rope_table);
criterion_main!(benches);
