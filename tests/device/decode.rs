//! Checks of the ops of a decode step that `tests/ops` does not make: the epilogues of the matrix-vector product; that the bits
//! of a row do not depend on the other rows or on the size of the launch; and that a recorded step is one chain in which
//! each kernel may start before the one before it is done.

use crate::ptx;
use aoji::{
    Config, KvDtype, Result,
    backend::{Backend, DECODE_ROWS, Out, SamplerState},
    cpu::Cpu,
    cuda::{Cuda, Graphs},
    kv::Kv,
    model::{self, Model, Rows, Scratch},
    ops::{
        AttnDecode, Gemv, NormGateUp, NormHead, NormHeadArgmax, NormQkvRopeAppend, Op, PAGE, Ring, Rope, Sample,
        Tolerance, noise, sample::Params, scrambled, to_pages,
    },
    weights::Weights,
};
use half::bf16;

/// The GPU when `AOJI_TEST_GPU=1`, else the emulated one.
fn device() -> Cuda {
    if std::env::var_os("AOJI_TEST_GPU").is_none_or(|v| v != "1") {
        cuda_emulator::install();
    }
    Cuda::open(0).expect("a device")
}

fn values(len: usize, seed: u64) -> Vec<bf16> {
    noise(len, seed).into_iter().map(bf16::from_f32).collect()
}

/// `out` of all three epilogues; `Add` adds to a residual that is `noise` of seed 3.
fn epilogues<B: Backend<Act = bf16>>(b: &B, op: &Gemv) -> [Vec<f32>; 3] {
    let Gemv { rows, n, k } = *op;
    let x = b.upload(&values(rows * k, 1)).unwrap();
    let w = b.weight_from(n, k, &values(n * k, 2)).unwrap();
    let mut store = b.upload(&vec![bf16::NAN; rows * n]).unwrap();
    let mut add = b.upload(&values(rows * n, 3)).unwrap();
    let mut wide = b.upload(&vec![f32::NAN; rows * n]).unwrap();
    b.gemv(op, Out::Store(&mut store), &x, &w).unwrap();
    b.gemv(op, Out::Add(&mut add), &x, &w).unwrap();
    b.gemv(op, Out::F32(&mut wide), &x, &w).unwrap();
    let f32s = |v: Vec<bf16>| v.into_iter().map(bf16::to_f32).collect();
    [f32s(b.download(&store).unwrap()), f32s(b.download(&add).unwrap()), b.download(&wide).unwrap()]
}

fn gemv_in_every_epilogue() {
    let cuda = device();
    for (rows, n, k) in [(1, 33, 80), (3, 17, 1104), (8, 16, 64), (9, 25, 80), (16, 33, 1104)] {
        let op = Gemv { rows, n, k };
        let ([store, add, wide], [_, add_want, wide_want]) =
            (epilogues(&cuda, &op), epilogues(&Cpu::<bf16>::new().unwrap(), &op));
        op.tolerance().compare(&add, &add_want).unwrap_or_else(|e| panic!("add, {op:?}: {e}"));
        // no rounding hides the sums here: a thousand products in another order differ by some 2^-23 of their size
        let exact = Tolerance { l2: 1e-6, worst: 2e-6 };
        exact.compare(&wide, &wide_want).unwrap_or_else(|e| panic!("f32, {op:?}: {e}"));
        let residual = noise(rows * n, 3);
        for i in 0..rows * n {
            assert_eq!(store[i], bf16::from_f32(wide[i]).to_f32(), "{op:?}: store and f32 differ at {i}");
            assert_eq!(add[i], bf16::from_f32(residual[i] + wide[i]).to_f32(), "{op:?}: add and f32 differ at {i}");
        }
    }
}

fn a_row_of_gemv_has_the_same_bits_beside_any_others() {
    let cuda = device();
    let (n, k) = (37, 1288);
    let w_all = values(n * k, 2);
    // rows [first, first + rows) of x, columns [0, n) of out
    let run = |first: usize, rows: usize, n: usize| -> Vec<Vec<u32>> {
        let x = cuda.upload(&values(DECODE_ROWS * k, 1)[first * k..][..rows * k]).unwrap();
        let w = cuda.weight_from(n, k, &w_all[..n * k]).unwrap();
        let mut out = cuda.alloc::<f32>(rows * n).unwrap();
        cuda.gemv(&Gemv { rows, n, k }, Out::F32(&mut out), &x, &w).unwrap();
        cuda.download(&out).unwrap().chunks(n).map(|r| r.iter().map(|x| x.to_bits()).collect()).collect()
    };
    rows_are_independent("gemv", |first, rows| run(first, rows, n));
    let all = run(0, DECODE_ROWS, n);
    for n in [16, 17, 20] {
        let want: Vec<_> = all.iter().map(|r| r[..n].to_vec()).collect();
        assert_eq!(run(0, DECODE_ROWS, n), want, "the first {n} columns");
    }
}

fn a_row_of_attn_decode_has_the_same_bits_beside_any_others_in_any_bucket() {
    KvDtype::ALL.into_iter().for_each(rows_of_attn_decode_are_independent);
}

fn rows_of_attn_decode_are_independent(kv: KvDtype) {
    let cuda = device();
    let (n_heads, n_kv_heads, head_dim, max_seq) = (2, 1, 64, 3328);
    // three sequences of the same keys and values: a row's bits depend neither on which of them it is in nor on where its pages lie
    let table = scrambled(3, max_seq);
    let pages = cuda.upload(&table).unwrap();
    let cache = |seed| {
        let whole = values(n_kv_heads * max_seq * head_dim, seed).repeat(3);
        cuda.upload(&to_pages(kv, &whole, &table, [n_kv_heads, max_seq, head_dim])).unwrap()
    };
    let (k, v) = (cache(2), cache(3));
    // one key, the last key of a split, the first of the next, one of many, two tiles a split
    let positions = [0u32, 63, 64, 500, 3200];
    let qkv_dim = (n_heads + 2 * n_kv_heads) * head_dim;
    let qkv_all = values(positions.len() * qkv_dim, 1);
    let run_in = |sequence: &dyn Fn(usize) -> usize, which: &[usize], kv_len: usize| -> Vec<Vec<u16>> {
        let (rows, window) = (which.len(), max_seq);
        let op = AttnDecode { rows, n_heads, n_kv_heads, head_dim, max_seq, kv_len, window, kv };
        let qkv: Vec<bf16> = which.iter().flat_map(|r| &qkv_all[r * qkv_dim..][..qkv_dim]).copied().collect();
        let place = |r: &usize| (sequence(*r) * max_seq) as u32 + positions[*r];
        let pos: Vec<u32> = which.iter().map(place).collect();
        let mut out = cuda.upload(&vec![bf16::NAN; which.len() * n_heads * head_dim]).unwrap();
        let mut part = cuda.alloc(op.part_len()).unwrap();
        let mut arrived = cuda.alloc(op.arrived_len()).unwrap();
        let (qkv, pos) = (cuda.upload(&qkv).unwrap(), cuda.upload(&pos).unwrap());
        cuda.attn_decode(&op, &mut out, &mut part, &mut arrived, &qkv, &k, &v, &pos, &pages).unwrap();
        let out = cuda.download(&out).unwrap();
        out.chunks(n_heads * head_dim).map(|row| row.iter().map(|x| x.to_bits()).collect()).collect()
    };
    let run = |which: &[usize], kv_len| run_in(&|_| 0, which, kv_len);
    let all = run(&[0, 1, 2, 3, 4], max_seq);
    for step in [1, 2] {
        assert_eq!(run_in(&|r| r * step % 3, &[0, 1, 2, 3, 4], max_seq), all, "rows of three sequences");
    }
    for r in 0..positions.len() {
        let len = positions[r] as usize + 1;
        for kv_len in [len, len + 1, len.next_multiple_of(512), max_seq] {
            assert_eq!(run(&[r], kv_len.min(max_seq)), all[r..=r], "position {} alone, kv_len {kv_len}", positions[r]);
        }
    }
    assert_eq!(run(&[3, 1], 512), [all[3].clone(), all[1].clone()], "two rows in another order");
}

/// The bits of each row of `out`.
fn bits<T: Copy>(out: &[T], rows: usize, word: impl Fn(T) -> u32) -> Vec<Vec<u32>> {
    out.chunks(out.len() / rows).map(|row| row.iter().map(|x| word(*x)).collect()).collect()
}

/// Runs `run(first, rows)` for all rows at once and for fewer: each row has the same bits.
fn rows_are_independent(what: &str, run: impl Fn(usize, usize) -> Vec<Vec<u32>>) {
    let all = run(0, DECODE_ROWS);
    for rows in 1..DECODE_ROWS {
        for first in [0, DECODE_ROWS - rows] {
            assert_eq!(run(first, rows), all[first..][..rows], "{what}: rows {first}..{}", first + rows);
        }
    }
}

fn a_row_of_a_fused_product_has_the_same_bits_beside_any_others() {
    let cuda = device();
    let dim = 1288;
    let all = values(DECODE_ROWS * dim, 1);
    let x = |first: usize, rows: usize| cuda.upload(&all[first * dim..][..rows * dim]).unwrap();
    let gain = cuda.weight_from(1, dim, &values(dim, 2)).unwrap();
    let w = cuda.weight_from(48, dim, &values(48 * dim, 3)).unwrap();
    let eps = 1e-5;

    rows_are_independent("norm_head", |first, rows| {
        let (mut logits, mut xb) = (cuda.alloc(rows * 48).unwrap(), cuda.alloc(rows * dim).unwrap());
        let op = NormHead { rows, first: 0, dim, vocab: 48, eps };
        cuda.norm_head(&op, &mut logits, &mut xb, &x(first, rows), &gain, &w).unwrap();
        bits(&cuda.download(&logits).unwrap(), rows, f32::to_bits)
    });
    rows_are_independent("norm_gate_up", |first, rows| {
        let (mut hb, mut xb) = (cuda.alloc(rows * 24).unwrap(), cuda.alloc(rows * dim).unwrap());
        let mut gate_up = cuda.alloc(rows * 48).unwrap();
        let op = NormGateUp { rows, dim, ffn_dim: 24, eps };
        cuda.norm_gate_up(&op, &mut hb, &mut xb, &mut gate_up, &x(first, rows), &gain, &w).unwrap();
        bits(&cuda.download(&hb).unwrap(), rows, |x| x.to_bits().into())
    });
    let max_seq = PAGE;
    let table = cuda.upload(&Rope::table(&[1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001], max_seq)).unwrap();
    rows_are_independent("norm_qkv_rope_append", |first, rows| {
        let (mut qkv, mut xb) = (cuda.alloc(rows * 48).unwrap(), cuda.alloc(rows * dim).unwrap());
        let (mut k, mut v) = (cuda.alloc(max_seq * 16).unwrap(), cuda.alloc(max_seq * 16).unwrap());
        let pos = cuda.upload(&(first as u32..(first + rows) as u32).collect::<Vec<_>>()).unwrap();
        let (n_heads, n_kv_heads, head_dim) = (1, 1, 16);
        let (positions, head_norm, kv) = (max_seq, false, KvDtype::Auto);
        let op = NormQkvRopeAppend { rows, dim, n_heads, n_kv_heads, head_dim, max_seq, positions, eps, head_norm, kv };
        let x = x(first, rows);
        let (k, v, mut arrived) = (&mut k, &mut v, cuda.alloc(op.arrived_len()).unwrap());
        let (xb, pages) = (&mut xb, cuda.upload(&[0]).unwrap());
        cuda.norm_qkv_rope_append(&op, &mut qkv, k, v, xb, &mut arrived, &x, &pos, &pages, &gain, &w, None, &table)
            .unwrap();
        bits(&cuda.download(&qkv).unwrap(), rows, |x| x.to_bits().into())
    });
}

/// The outputs of an op's small cases with one row, with either depth of the ring of weights.
fn one_row_with<O: Op>(cuda: &mut Cuda, ring: Ring, rows: impl Fn(&O) -> usize) -> Vec<Vec<u32>> {
    cuda.set_ring(ring);
    let kind = if ring == Ring::Deep { "_r1_deep" } else { "_r1" };
    let cases: Vec<O> = O::cases().into_iter().filter(|c| c.is_small() && rows(c) == 1).collect();
    assert!(!cases.is_empty(), "{}", O::STEM);
    let run = |op: &O| {
        let mut io = op.setup(cuda, 7).unwrap();
        let ran = cuda.launches(|| op.run(cuda, &mut io)).unwrap();
        assert!(ran[0].kernel.ends_with(kind), "{ran:?}");
        op.outputs(cuda, &io).unwrap().into_iter().map(f32::to_bits).collect()
    };
    cases.iter().map(run).collect()
}

fn a_deep_ring_gives_the_bits_of_a_short_one() {
    fn check<O: Op>(cuda: &mut Cuda, rows: impl Fn(&O) -> usize) {
        let [short, deep] = [Ring::Short, Ring::Deep].map(|ring| one_row_with(cuda, ring, &rows));
        assert_eq!(short, deep, "{}", O::STEM);
    }
    let cuda = &mut device();
    check(cuda, |op: &Gemv| op.rows);
    check(cuda, |op: &NormGateUp| op.rows);
    check(cuda, |op: &NormHead| op.rows);
    check(cuda, |op: &NormQkvRopeAppend| op.rows);
    check(cuda, |op: &NormHeadArgmax| op.rows);
    let mut tokens = [Ring::Short, Ring::Deep].map(|ring| {
        cuda.set_ring(ring);
        let mut step = Step::new(cuda);
        (0..4).map(|_| step.run(cuda, true).unwrap()).collect::<Vec<_>>()
    });
    let [short, deep] = &mut tokens;
    assert_eq!(short, deep);
}

/// A tiny model on the device with the buffers of a session.
struct Step {
    model: Model<Cuda>,
    rows: Rows<Cuda>,
    s: Scratch<Cuda>,
    kv: Kv<Cuda>,
    sampler: SamplerState<Cuda>,
    graphs: Graphs,
}

impl Step {
    fn new(cuda: &Cuda) -> Step {
        let json = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 192,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 96,
            "max_position_embeddings": 40, "torch_dtype": "bfloat16"}"#;
        let c = Config::from_json(std::path::Path::new("config.json"), json, None).unwrap();
        let shapes =
            Weights::table(&c, |_, shape| Ok((shape[..shape.len() - 1].iter().product(), shape[shape.len() - 1])));
        let table = cuda.upload(&Rope::table(&c.rope_inv_freq(), 40)).unwrap();
        let weight = |(parts, seed): (Vec<(usize, usize)>, u64)| {
            let (rows, cols): (usize, usize) = (parts.iter().map(|p| p.0).sum(), parts[0].1);
            cuda.weight_from(rows, cols, &values(rows * cols, seed)).unwrap()
        };
        let stacks = model::stacks(&c, &shapes.unwrap(), |shape| *shape);
        let model = Model::bind(&c, stacks.into_iter().zip(1..).map(weight).collect(), table, 40);
        let (rows, mut sampler) = (Rows::new(cuda, 1).unwrap(), SamplerState::new(cuda, c.vocab, 1).unwrap());
        let params = Params { temperature: 1.0, top_k: 20, top_p: 0.9, ..Params::default() };
        cuda.write(&mut sampler.params, 0, &params.words()).unwrap();
        let (s, kv) = (Scratch::new(cuda, &c, 8, 1, 40).unwrap(), Kv::new(cuda, &c, KvDtype::Auto, 1, 40).unwrap());
        Step { model, rows, s, kv, sampler, graphs: Graphs::default() }
    }

    /// Runs a step from the token and position that are on the device, and returns the token that it chooses.
    fn run(&mut self, cuda: &Cuda, greedy: bool) -> Result<u32> {
        let Step { model, rows, s, kv, sampler, graphs } = self;
        cuda.replay(graphs, 0, &mut || {
            model.forward(cuda, s, kv, rows, 1, 40)?;
            if !greedy {
                model.head(cuda, s, 0, 1)?;
                let SamplerState { params, history, bias, mask, scratch, outbox } = sampler;
                let (op, Rows { tokens, pos }) = (Sample { rows: 1, vocab: 96, max_seq: 40 }, &mut *rows);
                return cuda.sample(&op, tokens, pos, params, history, scratch, outbox, bias, mask, &s.logits);
            }
            model.head_argmax(cuda, s, rows, 1, 40, sampler)
        })?;
        cuda.take(&mut sampler.outbox, 0)
    }
}

fn a_recorded_step_is_one_chain_of_programmatic_edges() {
    let cuda = device();
    for greedy in [true, false] {
        let mut step = Step::new(&cuda);
        let tokens: Vec<u32> = (0..5).map(|_| step.run(&cuda, greedy).unwrap()).collect();
        let [edges] = step.graphs.edges().unwrap()[..] else { panic!("one recorded step") };
        let kernels = 2 * 5 + if greedy { 2 } else { 6 }; // five a layer, embedding, head, and four of the sampler
        assert_eq!((edges.nodes, edges.all), (kernels, kernels - 1), "{edges:?}");
        let overlaps = cuda.info().capability.0 >= 9;
        assert_eq!(edges.programmatic, if overlaps { kernels - 1 } else { 0 }, "{edges:?}");
        // the same tokens, step by step, without a graph
        let mut plain = Step::new(&cuda);
        let again: Vec<u32> = (0..5)
            .map(|_| {
                plain.graphs = Graphs::default();
                plain.run(&cuda, greedy).unwrap()
            })
            .collect();
        assert_eq!(again, tokens);
    }
}

fn waiting_for_a_token_ends_when_none_can_come() {
    let cuda = device();
    let mut outbox = cuda.outbox(1).unwrap();
    let said = cuda.take(&mut outbox, 0).unwrap_err().to_string();
    assert!(said.contains("nothing left to do, and token 1 did not come"), "{said}");

    if !cuda.info().is_emulated() {
        return println!("skipped: a fault would end the GPU's context");
    }
    let mut step = Step::new(&cuda);
    step.run(&cuda, true).unwrap();
    cuda.write(&mut step.rows.pos, 0, &[1 << 20]).unwrap(); // far beyond the cache
    let said = step.run(&cuda, true).unwrap_err().to_string();
    assert!(said.contains("waiting for a token"), "{said}");
    assert!(cuda_emulator::last_fault().unwrap().contains("out-of-bounds"));
}

both_codes!(
    gemv_in_every_epilogue,
    a_deep_ring_gives_the_bits_of_a_short_one,
    a_row_of_gemv_has_the_same_bits_beside_any_others,
    a_row_of_attn_decode_has_the_same_bits_beside_any_others_in_any_bucket,
    a_row_of_a_fused_product_has_the_same_bits_beside_any_others,
    a_recorded_step_is_one_chain_of_programmatic_edges,
    waiting_for_a_token_ends_when_none_can_come,
);
