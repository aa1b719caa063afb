//! The sampler's kernel makes the same choice as its definition, and the definition draws from the filtered softmax.

use crate::ptx;
use aoji::{
    backend::{Backend, DECODE_ROWS, SamplerState},
    cpu::Cpu,
    cuda::Cuda,
    ops::{
        Argmax, Sample,
        sample::{IN_PROMPT, Params},
    },
};
use half::bf16;

/// Splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    /// A number in [0, 1).
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 24) as f32
    }
    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
}

/// One call of the sampler.
#[derive(Debug, Clone)]
struct Call {
    params: Params,
    history: Vec<u32>,
    bias: Vec<f32>,
    mask: Vec<u32>,
    logits: Vec<f32>,
}

impl Call {
    fn new(params: Params, logits: &[f32]) -> Call {
        let n = logits.len();
        let mask = vec![0; n.div_ceil(32)];
        Call { params, history: vec![0; n], bias: vec![0.0; n], mask, logits: logits.to_vec() }
    }

    /// The chosen token, and everything else that the call changes.
    fn run<B: Backend>(&self, b: &B) -> (u32, u32, Vec<u32>, Vec<u32>) {
        let vocab = self.logits.len();
        let mut state = SamplerState::new(b, vocab, 1).unwrap();
        b.write(&mut state.params, 0, &self.params.words()).unwrap();
        b.write(&mut state.history, 0, &self.history).unwrap();
        b.write(&mut state.bias, 0, &self.bias).unwrap();
        b.write(&mut state.mask, 0, &self.mask).unwrap();
        let (mut token, mut pos) = (b.upload(&[u32::MAX]).unwrap(), b.upload(&[7]).unwrap());
        let logits = b.upload(&self.logits).unwrap();
        let SamplerState { params, history, bias, mask, scratch, outbox } = &mut state;
        let op = Sample { rows: 1, vocab, max_seq: 50 };
        b.sample(&op, &mut token, &mut pos, params, history, scratch, outbox, bias, mask, &logits).unwrap();
        let posted = b.take(outbox, 0).unwrap();
        let get = |buf: &B::Buf<u32>| b.download(buf).unwrap();
        assert_eq!(posted, get(&token)[0], "what the host is told");
        let mut heads = vec![f32::NAN; Argmax::scratch(DECODE_ROWS)];
        b.read(&mut heads, &state.scratch, 0).unwrap();
        assert!(heads.iter().all(|x| x.to_bits() == 0), "the first words of scratch are argmax's: {heads:?}");
        (get(&token)[0], get(&pos)[0], get(&state.params), get(&state.history))
    }

    /// Any parameters, logits with ties and special values.
    fn random(r: &mut Random, vocab: usize) -> Call {
        let scale = r.pick(&[0.0, 0.5, 3.0, 3.0, 20.0, 1e4, 1e38]);
        let step = r.pick(&[0.0, 0.0, 0.25, 2.0]); // logits on a grid have ties
        let special = r.pick(&[0, 0, 0, 3, 50]); // percent
        let values =
            [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, 0.0, f32::MAX, f32::MIN, f32::MIN_POSITIVE / 8.0];
        let infinite = r.below(4) == 0;
        let logit = |r: &mut Random| {
            if r.below(100) < special {
                let v = r.pick(&values);
                return if v == f32::INFINITY && !infinite { f32::NAN } else { v };
            }
            let x = (r.unit() + r.unit() + r.unit() - 1.5) * scale;
            if step > 0.0 { (x / step).round() * step } else { x }
        };
        let logits = (0..vocab).map(|_| logit(r)).collect();
        let seen = r.pick(&[0, 0, 10, 80]);
        let history = |r: &mut Random| match r.below(100) < seen {
            true => r.pick(&[1, 2, 5, IN_PROMPT, IN_PROMPT | 3, 1_000_003, u32::MAX >> 1, u32::MAX - 1]),
            false => 0,
        };
        let biased = r.pick(&[0, 0, 20, 100]);
        let bias = |r: &mut Random| match r.below(100) < biased {
            true => r.pick(&[f32::NEG_INFINITY, f32::NEG_INFINITY, 1.5, -3.0]),
            false => 0.0,
        };
        let params = Params {
            temperature: r.pick(&[0.0, 1e-3, 0.2, 0.7, 1.0, 1.0, 5.0, 100.0]),
            top_k: r.pick(&[0, 0, 1, 2, 5, 20, vocab as u32 - 1, vocab as u32, u32::MAX]),
            top_p: r.pick(&[1.0, 1.0, 1e-9, 0.1, 0.5, 0.9, 0.95, 0.999_999]),
            min_p: r.pick(&[0.0, 0.0, 1e-3, 0.05, 0.5, 1.0]),
            repetition_penalty: r.pick(&[1.0, 1.1, 0.5, 100.0]),
            frequency_penalty: r.pick(&[0.0, 0.3, -0.3, 100.0]),
            presence_penalty: r.pick(&[0.0, 0.3, -100.0]),
            seed: r.next(),
            draws: r.pick(&[0, 1, 9, u32::MAX]),
            min_tokens: r.pick(&[0, 0, 5, 10]),
            stop_ids: std::array::from_fn(|i| if i < 3 { r.below(vocab) as u32 } else { u32::MAX }),
            masked: r.below(4) == 0,
        };
        let allowed = r.pick(&[u32::MAX, 0xff00_ff0f, 0x1111_1111, 1]);
        Call {
            params,
            history: (0..vocab).map(|_| history(r)).collect(),
            bias: (0..vocab).map(|_| bias(r)).collect(),
            mask: (0..vocab.div_ceil(32)).map(|_| allowed).collect(),
            logits,
        }
    }
}

fn emulated() -> Cuda {
    cuda_emulator::install();
    Cuda::open(0).unwrap()
}

fn assert_same(cuda: &Cuda, call: &Call) {
    let (want, got) = (call.run(&Cpu::<bf16>::new().unwrap()), call.run(cuda));
    assert_eq!(cuda_emulator::last_fault(), None);
    assert_eq!(got, want, "(token, pos, params, history) of the kernel and of the definition differ for {call:?}");
}

fn the_kernel_makes_the_same_choice() {
    let (cuda, mut r) = (emulated(), Random(1));
    // the source has every case; its PTX, which is interpreted, the first of each kind
    let cases = if cuda_emulator::code() == cuda_emulator::Code::Host { 500 } else { 150 };
    for i in 0..cases {
        let vocab = match i % 50 {
            0 => 130 + r.below(400),    // several warps
            25 => 1000 + r.below(4000), // several blocks
            _ => 1 + r.below(60),
        };
        assert_same(&cuda, &Call::random(&mut r, vocab));
    }
}

/// Ties across warps and blocks: of tokens with the threshold's value, those with the lowest ids are kept.
fn the_kernel_breaks_ties_by_id() {
    let (cuda, mut r) = (emulated(), Random(2));
    for (top_k, top_p) in [(1, 1.0), (150, 1.0), (0, 0.4), (299, 0.999), (257, 0.5), (2000, 0.9)] {
        for seed in 0..4 {
            let params = Params { temperature: 1.0, top_k, top_p, seed, ..Params::default() };
            let n = if seed == 0 { 2500 } else { 300 };
            assert_same(&cuda, &Call::new(params, &vec![1.5; n]));
            let two: Vec<f32> = (0..n).map(|_| r.pick(&[1.5, 1.0])).collect();
            assert_same(&cuda, &Call::new(params, &two));
        }
    }
}

/// Filters that end in each kind of bin of the histogram: the first, the last, one that has all logits, and none; and a
/// top_p that depends on which tokens of top_k's last bin are kept.
fn filters_end_in_any_bin() {
    let (cuda, mut r) = (emulated(), Random(3));
    let spread = |r: &mut Random, of: f32| (0..1500).map(|_| r.unit() * of).collect::<Vec<f32>>();
    // the octaves that a histogram covers are 28.4 wide at temperature 1
    for (width, temperature) in
        [(1e-3, 1.0), (0.02, 1.0), (0.5, 1.0), (28.0, 1.0), (40.0, 1.0), (8.0, 50.0), (8.0, 0.01)]
    {
        let logits = spread(&mut r, width);
        for (top_k, top_p) in [(1, 0.3), (7, 0.9), (700, 1.0), (1499, 0.999), (1400, 0.5), (0, 0.01), (0, 0.9999999)] {
            let params = Params { temperature, top_k, top_p, seed: r.next(), ..Params::default() };
            assert_same(&cuda, &Call::new(params, &logits));
        }
    }
}

/// Each filter ends where it should. A single draw would not show that, so a draw is tried at each of its places.
fn every_draw_of_a_small_row() {
    let cuda = emulated();
    let logits: Vec<f32> = (0..40).map(|i| (i * 17 % 40) as f32 * 0.02).collect(); // some of them share a bin
    for (top_k, top_p, min_p) in [(0, 1.0, 0.0), (9, 1.0, 0.0), (0, 0.25, 0.0), (21, 0.6, 0.0), (30, 0.95, 0.55)] {
        for draws in 0..40 {
            let params = Params { temperature: 1.0, top_k, top_p, min_p, draws, seed: 5, ..Params::default() };
            assert_same(&cuda, &Call::new(params, &logits));
        }
    }
}

fn the_largest_logits_of_several_rows_go_to_their_sequences() {
    let (cuda, max_seq, rows) = (emulated(), 9, DECODE_ROWS);
    for vocab in [5, 1100, 3000] {
        let logits: Vec<f32> = (0..rows).flat_map(|r| aoji::ops::noise(vocab, r as u64)).collect();
        let mut state = SamplerState::new(&cuda, vocab, rows).unwrap();
        let places: Vec<u32> = (0..rows).map(|r| ((rows - 1 - r) * max_seq + r % max_seq) as u32).collect();
        let (mut token, mut pos) = (cuda.upload(&vec![u32::MAX; rows]).unwrap(), cuda.upload(&places).unwrap());
        let op = Argmax { rows, vocab, max_seq };
        let device = cuda.upload(&logits).unwrap();
        cuda.argmax(&op, &mut token, &mut pos, &mut state.scratch, &mut state.outbox, &device).unwrap();
        let (mut want, mut want_pos) = (vec![0; rows], places);
        op.reference(&mut want, &mut want_pos, &logits);
        assert_eq!((cuda.download(&token).unwrap(), cuda.download(&pos).unwrap()), (want.clone(), want_pos));
        for (r, want) in want.into_iter().enumerate() {
            assert_eq!(cuda.take(&mut state.outbox, rows - 1 - r).unwrap(), want, "row {r} of {vocab} logits");
        }
        assert_eq!(cuda_emulator::last_fault(), None);
    }
}

fn without_a_choice() {
    let (cuda, cpu) = (emulated(), Cpu::<bf16>::new().unwrap());
    let on = Params { temperature: 1.0, top_k: 3, top_p: 0.9, min_p: 0.1, ..Params::default() };
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let check = |p: Params, logits: &[f32], want: u32, why: &str| {
        let call = Call::new(p, logits);
        assert_eq!(call.run(&cpu).0, want, "{why}");
        assert_same(&cuda, &call);
    };
    check(on, &[-inf, nan, -inf], 0, "everything is forbidden: the lowest id");
    check(on, &[nan, -50.0, -inf], 1, "one candidate, however unlikely");
    check(on, &[3.0, inf, 5.0, inf], 1, "infinite is certain: the lowest id");
    check(on, &[2.0], 0, "a vocabulary of one");
    check(Params { top_k: 1, ..on }, &[1.0, 4.0, 4.0], 1, "top_k 1 is greedy");
    check(Params { top_p: 1e-30, ..on }, &[1.0, 4.0, 3.9], 1, "a tiny top_p is greedy");
    check(Params { min_p: 1.0, ..on }, &[1.0, 3.9, 4.0], 2, "min_p 1 is greedy");
    check(Params { temperature: 1e-3, top_p: 1.0, ..on }, &[1.0, 3.9, 4.0], 2, "a low temperature is greedy");
    check(Params::default(), &[-0.0, 0.0], 0, "zeros are equal");
    check(Params { temperature: -1.0, ..on }, &[1.0, 2.0], 1, "no temperature is greedy");
    let held = Params { min_tokens: 2, draws: 1, stop_ids: [1, 9, 9, 9, 9, 9, 9, 9], ..Params::default() };
    check(held, &[1.0, 2.0, 0.0], 0, "a stop id before min_tokens");
    check(Params { draws: 2, ..held }, &[1.0, 2.0, 0.0], 1, "a stop id after min_tokens");
}

fn rows_are_drawn_each_for_its_own_sequence() {
    let (cuda, max_seq, sequences) = (emulated(), 9, 5);
    for (vocab, rows) in [(3, 5), (70, 2), (1000, 3), (4099, 5)] {
        let mut r = Random(vocab as u64);
        let calls: Vec<Call> = (0..sequences).map(|_| Call::random(&mut r, vocab)).collect();
        // row i is of sequence 4 - i
        let all = |part: &dyn Fn(&Call) -> Vec<u32>| calls.iter().flat_map(part).collect::<Vec<u32>>();
        let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
        let floats = |words: Vec<u32>| words.into_iter().map(f32::from_bits).collect::<Vec<f32>>();
        let mut state = SamplerState::new(&cuda, vocab, sequences).unwrap();
        cuda.write(&mut state.params, 0, &all(&|c| c.params.words().to_vec())).unwrap();
        cuda.write(&mut state.history, 0, &all(&|c| c.history.clone())).unwrap();
        cuda.write(&mut state.bias, 0, &floats(all(&|c| bits(&c.bias)))).unwrap();
        cuda.write(&mut state.mask, 0, &all(&|c| c.mask.clone())).unwrap();
        let logits: Vec<f32> = (0..rows).flat_map(|i| calls[4 - i].logits.clone()).collect();
        let places: Vec<u32> = (0..rows).map(|i| ((4 - i) * max_seq + i) as u32).collect();
        let (mut token, mut pos) = (cuda.upload(&vec![u32::MAX; rows]).unwrap(), cuda.upload(&places).unwrap());
        let SamplerState { params, history, bias, mask, scratch, outbox } = &mut state;
        let (op, logits) = (Sample { rows, vocab, max_seq }, cuda.upload(&logits).unwrap());
        cuda.sample(&op, &mut token, &mut pos, params, history, scratch, outbox, bias, mask, &logits).unwrap();
        let (token, pos) = (cuda.download(&token).unwrap(), cuda.download(&pos).unwrap());
        let (params, history) = (cuda.download(params).unwrap(), cuda.download(history).unwrap());
        for i in 0..rows {
            let sequence = 4 - i;
            let (want, _, want_params, want_history) = calls[sequence].run(&Cpu::<bf16>::new().unwrap());
            assert_eq!((token[i], pos[i]), (want, places[i] + 1), "row {i} of {rows}, {vocab} logits");
            assert_eq!(params[sequence * want_params.len()..][..want_params.len()], want_params);
            assert_eq!(history[sequence * vocab..][..vocab], want_history);
            assert_eq!(cuda.take(outbox, sequence).unwrap(), want);
        }
        assert_eq!(cuda_emulator::last_fault(), None);
    }
}

/// What a call of several rows changes, and what the host is told, by sequence.
type Drawn = (Vec<u32>, Vec<u32>, Vec<u32>, Vec<u32>, Vec<Vec<u32>>);

/// Draws rows of several sequences, whose states are those of `calls`.
fn draw_rows<B: Backend>(b: &B, op: &Sample, calls: &[Call], guesses: &[u32], places: &[u32], logits: &[f32]) -> Drawn {
    let mut state = SamplerState::new(b, op.vocab, calls.len()).unwrap();
    for (s, call) in calls.iter().enumerate() {
        let words = call.params.words();
        b.write(&mut state.params, s * words.len(), &words).unwrap();
        b.write(&mut state.history, s * op.vocab, &call.history).unwrap();
        b.write(&mut state.bias, s * op.vocab, &call.bias).unwrap();
        b.write(&mut state.mask, s * call.mask.len(), &call.mask).unwrap();
    }
    let (mut token, mut pos, logits) =
        (b.upload(guesses).unwrap(), b.upload(places).unwrap(), b.upload(logits).unwrap());
    let SamplerState { params, history, bias, mask, scratch, outbox } = &mut state;
    b.sample(op, &mut token, &mut pos, params, history, scratch, outbox, bias, mask, &logits).unwrap();
    let get = |buf: &B::Buf<u32>| b.download(buf).unwrap();
    let (token, pos) = (get(&token), get(&pos));
    // every row that counts has moved on, and its sequence's host gets its token
    let told = (0..calls.len()).map(|s| {
        let rows = (0..op.rows).filter(|&r| op.sequence(places[r]) == s && pos[r] != places[r]);
        rows.map(|_| b.take(outbox, s).unwrap()).collect()
    });
    let told = told.collect();
    let mut heads = vec![f32::NAN; Argmax::scratch(DECODE_ROWS)];
    b.read(&mut heads, scratch, 0).unwrap();
    assert!(heads.iter().all(|x| x.to_bits() == 0), "the first words of scratch are argmax's: {heads:?}");
    (token, pos, get(params), get(history), told)
}

/// Rows of one sequence are drawn as if one after the other, with penalties, `min_tokens` and draws as the guesses before them say, and
/// only as far as these are right; beside rows of another sequence.
fn guesses_are_drawn_until_one_is_wrong() {
    let (cuda, cpu, mut random) = (emulated(), Cpu::<bf16>::new().unwrap(), Random(4));
    let mut lengths = [0; DECODE_ROWS + 1];
    for i in 0..80 {
        let vocab = if i % 20 == 0 { 1100 } else { 1 + random.below(60) };
        let calls: Vec<Call> = (0..2).map(|_| Call::random(&mut random, vocab)).collect();
        let beside = random.below(DECODE_ROWS); // rows of sequence 1, which come first
        let rows = beside + 1 + random.below(DECODE_ROWS - beside);
        let op = Sample { rows, vocab, max_seq: 40 };
        let logits: Vec<f32> = (0..rows).flat_map(|_| Call::random(&mut random, vocab).logits).collect();
        let place = |r: usize| if r < beside { 40 + 3 + r } else { 24 + r - beside };
        let places: Vec<u32> = (0..rows).map(|r| place(r) as u32).collect();
        // what each sequence draws, a row at a time; then a guess may be changed
        let mut guesses = vec![u32::MAX; rows];
        let mut states = calls.clone();
        for r in 0..rows {
            let sequence = op.sequence(places[r]);
            let state = &mut states[sequence];
            let call = Call { logits: logits[r * vocab..][..vocab].to_vec(), ..state.clone() };
            let (token, _, params, history) = call.run(&cpu);
            (state.params, state.history) = (Params::from_words(&params), history);
            if r + 1 < rows && op.sequence(places[r + 1]) == sequence {
                guesses[r + 1] = if random.below(6) == 0 { random.below(vocab) as u32 } else { token };
            }
        }
        let want = draw_rows(&cpu, &op, &calls, &guesses, &places, &logits);
        let (mut token, mut pos) = (guesses.clone(), places.clone());
        let mut params: Vec<u32> = calls.iter().flat_map(|c| c.params.words()).collect();
        let mut history: Vec<u32> = calls.iter().flat_map(|c| c.history.clone()).collect();
        let bias: Vec<f32> = calls.iter().flat_map(|c| c.bias.clone()).collect();
        let mask: Vec<u32> = calls.iter().flat_map(|c| c.mask.clone()).collect();
        op.reference(&mut token, &mut pos, &mut params, &mut history, &bias, &mask, &logits);
        assert_eq!(
            (&want.0, &want.1, &want.2, &want.3),
            (&token, &pos, &params, &history),
            "the CPU's and the definition"
        );
        assert_eq!(draw_rows(&cuda, &op, &calls, &guesses, &places, &logits), want, "{op:?} {guesses:?} {calls:?}");
        assert_eq!(cuda_emulator::last_fault(), None);
        lengths[want.4[0].len()] += 1;
    }
    assert!(lengths[1] > 0 && lengths[5..].iter().sum::<i32>() > 5, "how many rows counted: {lengths:?}");
}

#[test]
fn penalties_and_bias() {
    let cpu = Cpu::<bf16>::new().unwrap();
    let token = |params: Params, history: [u32; 3], bias: [f32; 3], logits: [f32; 3]| {
        Call { history: history.to_vec(), bias: bias.to_vec(), ..Call::new(params, &logits) }.run(&cpu).0
    };
    let (off, none) = (Params::default(), [0.0; 3]);
    let repetition = Params { repetition_penalty: 2.0, ..off };
    assert_eq!(token(repetition, [1, IN_PROMPT, 0], none, [5.0, 5.5, 3.0]), 2, "prompt and answer are divided");
    assert_eq!(token(repetition, [0, IN_PROMPT, 1], none, [-3.0, -2.0, -1.8]), 0, "negative logits are multiplied");
    let frequency = Params { frequency_penalty: 1.0, ..off };
    assert_eq!(token(frequency, [3, IN_PROMPT, 0], none, [5.0, 4.0, 3.0]), 1, "the answer's count, not the prompt");
    let presence = Params { presence_penalty: 2.0, ..off };
    assert_eq!(token(presence, [3, IN_PROMPT | 1, 0], none, [5.0, 4.5, 3.5]), 2, "once, whatever the count");
    assert_eq!(token(off, [0; 3], [0.0, 2.0, f32::NEG_INFINITY], [4.0, 3.0, 9.0]), 1, "bias adds and forbids");
}

/// Draws with consecutive counters follow the softmax in f64, filtered as the options say: their chi-square is below
/// its 99.9% quantile. Seeds are fixed, so the test always has the same result.
#[test]
fn draws_follow_the_filtered_softmax() {
    let (cpu, draws) = (Cpu::<bf16>::new().unwrap(), 4000u32);
    let logits: Vec<f32> = (0..12).map(|i| (i * 7 % 12) as f32 * 0.31 - 1.0).collect(); // no ties
    let options: [(f32, u32, f32, f32); 7] = [
        (1.0, 0, 1.0, 0.0),
        (0.5, 0, 1.0, 0.0),
        (3.0, 0, 1.0, 0.0),
        (1.0, 5, 1.0, 0.0),
        (1.0, 0, 0.8, 0.0),
        (1.0, 0, 1.0, 0.2),
        (0.9, 9, 0.9, 0.15),
    ];
    for (seed, (temperature, top_k, top_p, min_p)) in options.into_iter().enumerate() {
        // the distribution, from scratch
        let max = logits.iter().copied().fold(f32::MIN, f32::max);
        let mut p: Vec<(usize, f64)> =
            logits.iter().map(|y| (f64::from(y - max) / f64::from(temperature)).exp()).enumerate().collect();
        p.sort_by(|a, b| b.1.total_cmp(&a.1));
        p.truncate(if top_k > 0 { top_k as usize } else { p.len() });
        let total: f64 = p.iter().map(|p| p.1).sum();
        let mut sum = 0.0;
        p.retain(|p| {
            let keep = sum < f64::from(top_p) * total;
            sum += p.1;
            keep && p.1 >= f64::from(min_p)
        });
        let total: f64 = p.iter().map(|p| p.1).sum();

        let mut counts = [0u32; 12];
        for draw in 0..draws {
            let seed = seed as u64;
            let params = Params { temperature, top_k, top_p, min_p, seed, draws: draw, ..Params::default() };
            counts[Call::new(params, &logits).run(&cpu).0 as usize] += 1;
        }
        let drawn: u32 = p.iter().map(|p| counts[p.0]).sum();
        assert_eq!(drawn, draws, "a filtered token was drawn: {counts:?}");
        let chi: f64 = p
            .iter()
            .map(|(i, p)| {
                let expected = p / total * f64::from(draws);
                (f64::from(counts[*i]) - expected).powi(2) / expected
            })
            .sum();
        // Wilson and Hilferty's approximation of the quantile
        let n = (p.len() - 1) as f64;
        let limit = n * (1.0 - 2.0 / (9.0 * n) + 3.0902 * (2.0 / (9.0 * n)).sqrt()).powi(3);
        assert!(chi < limit, "chi-square {chi:.1} of {n} degrees of freedom, allowed {limit:.1}: {counts:?}");
    }
}

/// At the sizes of Llama-3-8B, on the CPU: the token is always one that the filters keep.
#[test]
fn a_large_vocabulary() {
    let (cpu, vocab) = (Cpu::<bf16>::new().unwrap(), 128_256);
    let logits: Vec<f32> = aoji::ops::noise(vocab, 3).into_iter().map(|x| x * 12.0).collect();
    let mut order: Vec<usize> = (0..vocab).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    for seed in 0..5 {
        let params = Params { temperature: 1.0, top_k: 1000, top_p: 0.7, seed, ..Params::default() };
        let token = Call::new(params, &logits).run(&cpu).0 as usize;
        assert!(order[..1000].contains(&token), "{token} is not among the first 1000");
        let free = Call::new(Params { top_k: 0, top_p: 1.0, ..params }, &logits).run(&cpu).0 as usize;
        assert!(logits[free] > 12.0 - 28.5, "{free} has no weight");
    }
}

both_codes!(
    the_kernel_makes_the_same_choice,
    the_kernel_breaks_ties_by_id,
    filters_end_in_any_bin,
    every_draw_of_a_small_row,
    the_largest_logits_of_several_rows_go_to_their_sequences,
    without_a_choice,
    rows_are_drawn_each_for_its_own_sequence,
    guesses_are_drawn_until_one_is_wrong,
);
