//! Times the host's work: sampling, tokenizing, checking a model's files, and enqueuing a decode step.
//!
//! The step is enqueued to the emulated driver with its kernels switched off, so that only this program's own work and the calls into
//! the driver are timed. Calls of a real driver take other times.

use aoji::{
    Drafter, KvDtype, ModelFiles,
    backend::{Backend, SamplerState},
    bench,
    cuda::{Cuda, Graphs},
    kv::Kv,
    model::{Changes, Model, Rows, Scratch},
    ops::{Sample, noise, sample::Params},
};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::{
    hint::black_box,
    time::{Duration, Instant},
};

/// The sampler's reference over the vocabulary of Llama 3.
fn sampler(c: &mut Criterion) {
    let vocab = 128_256;
    let logits: Vec<f32> = noise(vocab, 1).into_iter().map(|x| 10.0 * x).collect();
    let params = Params {
        temperature: 0.8,
        top_k: 40,
        top_p: 0.95,
        min_p: 0.0,
        repetition_penalty: 1.0,
        frequency_penalty: 0.0,
        presence_penalty: 0.0,
        seed: 1,
        draws: 0,
        min_tokens: 0,
        stop_ids: [u32::MAX; 8],
        masked: false,
    };
    let mut state = params.words();
    let (mut token, mut pos, mut history, bias) = ([0], [0], vec![0; vocab], vec![0.0; vocab]);
    let mask = vec![0; vocab.div_ceil(32)];
    c.bench_function("sampler reference, 128256 logits", |b| {
        b.iter(|| {
            let op = Sample { rows: 1, vocab, max_seq: vocab };
            op.reference(&mut token, &mut pos, &mut state, &mut history, &bias, &mask, black_box(&logits));
        });
    });
}

/// Korean text through the demo model's tokenizer.
fn tokenizer(c: &mut Criterion) {
    let files = ModelFiles::open("demo").expect("the embedded model");
    let tokenizer = files.tokenizer.expect("its tokenizer");
    let text = "피보나치 수열은 앞의 두 수를 더해 다음 수를 만드는 수열입니다.\n".repeat(64);
    let ids = tokenizer.encode(&text, false).expect("plain text");
    let mut group = c.benchmark_group("tokenizer");
    group.throughput(Throughput::Bytes(text.len() as u64));
    group.bench_function("encode", |b| b.iter(|| tokenizer.encode(black_box(&text), false)));
    group.bench_function("decode", |b| b.iter(|| tokenizer.decode(black_box(&ids), true)));
    group.finish();
}

/// Opening and checking the embedded model: configuration, weights, tokenizer.
fn files(c: &mut Criterion) {
    c.bench_function("open and check the demo model's files", |b| b.iter(|| ModelFiles::open(black_box("demo"))));
}

/// One decode step of the demo model: what the host does for it.
fn step(c: &mut Criterion) {
    cuda_emulator::install();
    cuda_emulator::set_kernels(false);
    let cuda = match Cuda::open(0) {
        Ok(cuda) => cuda,
        Err(e) => return println!("one decode step: skipped: {e}"),
    };
    let files = ModelFiles::open("demo").expect("the embedded model");
    let (config, max_seq) = (&files.config, files.config.max_seq);
    let model =
        Model::load(&cuda, config, &files.weights, Changes::default(), max_seq, &mut |_| {}).expect("its weights");
    let mut s = Scratch::new(&cuda, config, 8, 1, max_seq).expect("memory");
    let mut kv = Kv::new(&cuda, config, KvDtype::Auto, 1, max_seq).expect("memory");
    let mut rows = Rows::new(&cuda, 1).expect("memory");
    let mut sampler = SamplerState::new(&cuda, config.vocab, 1).expect("memory");
    let mut graphs = Graphs::default();
    let mut enqueue = || {
        let mut step = || {
            model.forward(&cuda, &mut s, &mut kv, &rows, 1, max_seq)?;
            model.head_argmax(&cuda, &mut s, &mut rows, 1, max_seq, &mut sampler)
        };
        cuda.replay(&mut graphs, 0, &mut step).expect("a step");
    };
    // the first two steps load kernels and record
    (0..2).for_each(|_| enqueue());
    c.bench_function("enqueue one decode step (emulated driver, kernels off)", |b| {
        b.iter_custom(|n| {
            let begin = Instant::now();
            (0..n).for_each(|_| enqueue());
            let time = begin.elapsed();
            cuda.synchronize().expect("nothing runs"); // the driver's queue is its own affair
            time
        });
    });
}

/// What a token costs the guesses for the next ones: to read it, and to look for them, after 128K tokens.
fn drafter(c: &mut Criterion) {
    const PROMPT: usize = 1 << 17;
    // words of a few tokens that come again and again, in the vocabulary of Llama 3
    let words: Vec<Vec<u32>> = (0..3000).map(|i| bench::tokens(1 + i % 4, 128_256, i as u64)).collect();
    let text = bench::tokens(PROMPT, words.len(), 9).into_iter().flat_map(|i| words[i as usize].iter().copied());
    let text: Vec<u32> = text.collect();
    let read = || {
        let mut drafter = Drafter::new(PROMPT, &[], text.len() - PROMPT);
        drafter.read(&text[..PROMPT]);
        drafter
    };
    let (mut drafter, mut rest) = (read(), text[PROMPT..].iter());
    c.bench_function("guesses: a token after 128K others", |b| {
        b.iter_custom(|n| {
            let mut time = Duration::ZERO;
            for _ in 0..n {
                let token = rest.next().copied().unwrap_or_else(|| {
                    (drafter, rest) = (read(), text[PROMPT..].iter());
                    text[0]
                });
                let begin = Instant::now();
                drafter.push(token);
                black_box(drafter.drafts(15));
                time += begin.elapsed();
            }
            time
        });
    });
}

criterion_group!(benches, sampler, tokenizer, files, step, drafter);
criterion_main!(benches);
