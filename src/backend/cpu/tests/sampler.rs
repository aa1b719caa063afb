//! The CPU's sampler makes the choice of the definition for any parameters.

use crate::{
    backend::{Backend, SamplerState, cpu::Cpu},
    ops::{
        Sample, noise,
        sample::{IN_PROMPT, Params},
    },
};
use half::bf16;

/// Numbers below `n` from a seed.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % n
    }
    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
}

#[test]
fn it_makes_the_choice_of_the_definition() {
    let (cpu, mut r) = (Cpu::<bf16>::new().unwrap(), Random(1));
    for call in 0..3000 {
        let vocab = if call % 30 == 0 { 5000 + r.below(9000) } else { 1 + r.below(90) };
        let (scale, grid) = (r.pick(&[0.0, 0.02, 2.0, 20.0, 1e4, 1e38]), r.pick(&[0.0, 0.0, 0.25]));
        let special = r.pick(&[0, 0, 10, 95]);
        let logit = |x: f32, r: &mut Random| match r.below(100) < special {
            true => r.pick(&[f32::NAN, f32::NEG_INFINITY, -0.0, 0.0, f32::MAX, 1e-42]),
            false if grid > 0.0 => (x * scale / grid).round() * grid, // ties
            false => x * scale,
        };
        let mut logits: Vec<f32> = noise(vocab, call).into_iter().map(|x| logit(x, &mut r)).collect();
        if r.below(20) == 0 {
            logits[r.below(vocab)] = f32::INFINITY;
        }
        let params = Params {
            temperature: r.pick(&[0.0, 1e-3, 0.2, 1.0, 1.0, 5.0, 100.0]),
            top_k: r.pick(&[0, 0, 1, 2, 5, 40, vocab as u32 - 1, vocab as u32, u32::MAX]),
            top_p: r.pick(&[1.0, 1.0, 0.0, 1e-9, 0.1, 0.5, 0.9, 0.999_999]),
            min_p: r.pick(&[0.0, 0.0, 1e-3, 0.5, 1.0]),
            repetition_penalty: r.pick(&[1.0, 1.1, 0.5]),
            frequency_penalty: r.pick(&[0.0, 0.3]),
            presence_penalty: r.pick(&[0.0, -100.0]),
            seed: call,
            draws: r.pick(&[0, 9, u32::MAX]),
            min_tokens: r.pick(&[0, 10]),
            stop_ids: std::array::from_fn(|i| if i < 3 { r.below(vocab) as u32 } else { u32::MAX }),
            masked: r.below(4) == 0,
        };
        let history: Vec<u32> = (0..vocab).map(|_| r.pick(&[0, 0, 0, 1, 5, IN_PROMPT, IN_PROMPT | 3])).collect();
        let bias: Vec<f32> = (0..vocab).map(|_| r.pick(&[0.0, 0.0, 0.0, f32::NEG_INFINITY, 1.5])).collect();
        let mask = vec![r.pick(&[u32::MAX, 0xff00_ff0f, 1]); vocab.div_ceil(32)];
        let op = Sample { rows: 1, vocab, max_seq: 50 };
        let (mut token, mut pos) = (vec![u32::MAX], vec![7]);
        let (mut words, mut counts) = (params.words().to_vec(), history.clone());
        op.reference(&mut token, &mut pos, &mut words, &mut counts, &bias, &mask, &logits);

        let mut state = SamplerState::new(&cpu, vocab, 1).unwrap();
        cpu.write(&mut state.params, 0, &params.words()).unwrap();
        let (mut ours, mut place, mut history) = (vec![u32::MAX], vec![7], history);
        let SamplerState { params: p, scratch, outbox, .. } = &mut state;
        cpu.sample(&op, &mut ours, &mut place, p, &mut history, scratch, outbox, &bias, &mask, &logits).unwrap();
        assert_eq!(ours, token, "{params:?}, {vocab} logits, call {call}");
        assert_eq!((place, &*p, history), (pos, &words, counts), "what it changes, call {call}");
        assert_eq!(cpu.take(outbox, 0).unwrap(), token[0]);
    }
}
