//! The lockstep backend passes when both sides agree, and names the op when they do not.

use aoji::{
    Config, Error, KvDtype, Result, Tensor, Weights,
    backend::{Backend, Out, SamplerState, definition},
    cpu::{Cpu, Weight},
    cuda::Cuda,
    kv::Kv,
    lockstep::Lockstep,
    model::{self, Model, Rows, Scratch},
    ops::{
        Act, AddRmsNorm, Argmax, AttnDecode, AttnPrefill, Element, Embed, Gemm, Gemv, HeadNorm, KvAppend, LogProb,
        NormGateUp, NormHead, NormQkvRopeAppend, RmsNorm, Rope, Sample, StreamRead, Swiglu, noise, sample::Params,
    },
};
use half::bf16;
use std::{collections::VecDeque, path::Path};

const MAX_SEQ: usize = 40;

fn config() -> Config {
    let json = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 192,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 96,
        "max_position_embeddings": 40, "torch_dtype": "bfloat16"}"#;
    Config::from_json(Path::new("config.json"), json, None).unwrap()
}

/// A model of random weights and a session's buffers, which hold a prompt of 12 tokens and two more.
struct Run<D: Backend<Act = bf16>> {
    b: Lockstep<D>,
    model: Model<Lockstep<D>>,
    rows: Rows<Lockstep<D>>,
    s: Scratch<Lockstep<D>>,
    kv: Kv<Lockstep<D>>,
    sampler: SamplerState<Lockstep<D>>,
}

impl<D: Backend<Act = bf16>> Run<D> {
    fn new(device: D) -> Self {
        Run::with(device, KvDtype::Auto)
    }

    fn with(device: D, kv: KvDtype) -> Self {
        let (b, c) = (Lockstep::new(device).unwrap(), config());
        let shapes =
            Weights::table(&c, |_, shape| Ok((shape[..shape.len() - 1].iter().product(), shape[shape.len() - 1])));
        let table = b.upload(&Rope::table(&c.rope_inv_freq(), MAX_SEQ)).unwrap();
        let weight = |(parts, seed): (Vec<(usize, usize)>, u64)| {
            let (rows, cols): (usize, usize) = (parts.iter().map(|p| p.0).sum(), parts[0].1);
            let scale = if rows == 1 { 1.0 } else { 0.15 };
            let data: Vec<bf16> = noise(rows * cols, seed).into_iter().map(|x| bf16::from_f32(x * scale)).collect();
            b.weight_from(rows, cols, &data).unwrap()
        };
        let stacks = model::stacks(&c, &shapes.unwrap(), |shape| *shape);
        let model = Model::bind(&c, stacks.into_iter().zip(1..).map(weight).collect(), table, MAX_SEQ);
        let s = Scratch::new(&b, &c, 12, 1, MAX_SEQ).unwrap();
        let kv = Kv::new(&b, &c, kv, 1, MAX_SEQ).unwrap();
        let params = Params { temperature: 0.9, top_k: 20, top_p: 0.9, seed: 5, ..Params::default() };
        let mut sampler = SamplerState::new(&b, c.vocab, 1).unwrap();
        b.write(&mut sampler.params, 0, &params.words()).unwrap();
        let rows = Rows::new(&b, 12).unwrap();
        Run { b, model, rows, s, kv, sampler }
    }

    fn all(&mut self) -> Result<()> {
        let Run { b, model, rows, s, kv, sampler } = self;
        let vocab = model.config.vocab;
        let prompt: Vec<u32> = (0..12).map(|i| i * 7 % 96).collect();
        rows.set(b, &prompt, &(0..12).collect::<Vec<u32>>())?;
        model.forward(b, s, kv, rows, 12, 12)?;
        model.head(b, s, 11, 1)?;
        b.write(&mut rows.pos, 0, &[11])?;
        let SamplerState { params, history, bias, mask, scratch, outbox } = sampler;
        let op = Argmax { rows: 1, vocab, max_seq: MAX_SEQ };
        b.argmax(&op, &mut rows.tokens, &mut rows.pos, scratch, outbox, &s.logits)?;
        model.forward(b, s, kv, rows, 1, 13)?;
        model.head(b, s, 0, 1)?;
        let op = Sample { rows: 1, vocab, max_seq: MAX_SEQ };
        let Rows { tokens, pos } = rows;
        b.sample(&op, tokens, pos, params, history, scratch, outbox, bias, mask, &s.logits)?;
        b.skip(outbox, 0, 1);
        b.take(outbox, 0)?;
        model.forward(b, s, kv, rows, 1, 14)?;
        model.head_argmax(b, s, rows, 1, MAX_SEQ, sampler)?;
        b.take(&mut sampler.outbox, 0)?;
        model.forward(b, s, kv, rows, 1, 15)
    }

    fn disagreement(&mut self) -> String {
        match self.all() {
            Err(Error::Disagree(what)) => what,
            other => panic!("expected a disagreement, got {other:?}"),
        }
    }
}

#[test]
fn the_emulated_device_agrees() {
    cuda_emulator::install();
    for kv in KvDtype::ALL {
        let mut run = Run::with(Cuda::open(0).unwrap(), kv);
        run.all().unwrap_or_else(|e| panic!("{kv}: {e}\n{:?}", cuda_emulator::last_fault()));
        assert_eq!(cuda_emulator::last_fault(), None, "{kv}");
    }
}

#[test]
fn a_corrupt_weight_is_named_by_the_op_that_uses_it() {
    let mut run = Run::new(Cpu::<bf16>::new().unwrap());
    let data: Vec<bf16> = noise(128 * 192, 99).into_iter().map(bf16::from_f32).collect();
    let wrong = run.b.device().weight_from(128, 192, &data).unwrap();
    run.model.layers[1].w_down.device = wrong;
    let what = run.disagreement();
    // embed; norm, product, rope, append, attention, product, norm, product, swiglu, product of layer 0; the same of layer 1
    assert!(
        what.starts_with("op 21, in or after norm_gate_up of layer 1: Gemv { rows: 12, n: 128, k: 192 }: Add:"),
        "{what}"
    );
    assert!(what.contains("worst") && what.contains("at output"), "{what}");
}

#[test]
fn a_corrupt_input_is_named() {
    let mut run = Run::new(Cpu::<bf16>::new().unwrap());
    run.s.gate_up.device[5] = bf16::from_f32(3.0);
    run.s.gate_up.device[192 + 5] = bf16::from_f32(3.0);
    let (b, s) = (&run.b, &mut run.s);
    let what = b.swiglu(&Swiglu { rows: 1, ffn_dim: 192 }, &mut s.hb, &s.gate_up).unwrap_err().to_string();
    assert!(what.starts_with("op 1: Swiglu { rows: 1, ffn_dim: 192 }: hb:") && what.contains("at output 5:"), "{what}");
}

#[test]
fn a_wrong_op_is_named() {
    let what = Run::new(Wrong(Cpu::new().unwrap(), "swiglu")).disagreement();
    assert!(
        what.starts_with("op 10, in or after norm_gate_up of layer 0: Swiglu { rows: 12, ffn_dim: 192 }"),
        "{what}"
    );
}

#[test]
fn a_wrong_fused_op_is_named() {
    let fused = |name| Run::new(Wrong(Cpu::new().unwrap(), name)).disagreement();
    let what = fused("norm_gate_up");
    assert!(what.contains("norm_gate_up of layer 0: NormGateUp { rows: 12,") && what.contains("fused: hb:"), "{what}");
    let what = fused("norm_qkv_rope_append");
    assert!(what.contains("of layer 0: NormQkvRopeAppend { rows: 12,") && what.contains("fused: k:"), "{what}");
    let what = fused("norm_head");
    assert!(
        what.contains("after norm_head: NormHead { rows: 1, first: 11,") && what.contains("fused: logits:"),
        "{what}"
    );
    Run::new(Wrong(Cpu::new().unwrap(), "nothing")).all().unwrap();
}

/// The reference, but one op is wrong.
struct Wrong(Cpu<bf16>, &'static str);

impl Wrong {
    /// Spoils an output of the op of this name.
    fn spoil<A: Act>(&self, op: &str, out: &mut [A]) {
        if self.1 == op {
            out[3] = A::from_f32(out[3].to_f32() + 1.0);
        }
    }
}

fn inner<'a>(out: Out<'a, Wrong>) -> Out<'a, Cpu<bf16>> {
    match out {
        Out::Store(o) => Out::Store(o),
        Out::Add(o) => Out::Add(o),
        Out::F32(o) => Out::F32(o),
    }
}

type Acts = Vec<bf16>;
type Words = Vec<u32>;

impl Backend for Wrong {
    type Act = bf16;
    type Buf<T: Element> = Vec<T>;
    type Weight = Weight;
    type Graphs = ();
    type Outbox = Vec<VecDeque<u32>>;
    const LOOKAHEAD: usize = 0;
    const CHUNK: usize = 128;
    const IS_GPU: bool = false;

    fn name(&self) -> String {
        format!("wrong {}", self.1)
    }
    fn free_memory(&self) -> Result<Option<u64>> {
        self.0.free_memory()
    }
    fn alloc<T: Element>(&self, len: usize) -> Result<Vec<T>> {
        self.0.alloc(len)
    }
    fn write<T: Element>(&self, dst: &mut Vec<T>, at: usize, src: &[T]) -> Result<()> {
        self.0.write(dst, at, src)
    }
    fn copy<T: Element>(&self, buf: &mut Vec<T>, to: usize, from: usize, len: usize) -> Result<()> {
        self.0.copy(buf, to, from, len)
    }
    fn read<T: Element>(&self, dst: &mut [T], src: &Vec<T>, at: usize) -> Result<()> {
        self.0.read(dst, src, at)
    }
    fn weights(&self, stacks: &[Vec<Tensor>], progress: &mut dyn FnMut(u64)) -> Result<Vec<Weight>> {
        self.0.weights(stacks, progress)
    }
    fn weight_from(&self, rows: usize, cols: usize, data: &[bf16]) -> Result<Weight> {
        self.0.weight_from(rows, cols, data)
    }
    fn set_bias(&self, w: &mut Weight, bias: &[f32]) -> Result<()> {
        self.0.set_bias(w, bias)
    }
    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
    fn outbox(&self, sequences: usize) -> Result<Vec<VecDeque<u32>>> {
        self.0.outbox(sequences)
    }
    fn take(&self, outbox: &mut Vec<VecDeque<u32>>, sequence: usize) -> Result<u32> {
        self.0.take(outbox, sequence)
    }
    fn skip(&self, outbox: &mut Vec<VecDeque<u32>>, sequence: usize, n: usize) {
        self.0.skip(outbox, sequence, n);
    }
    fn embed(&self, op: &Embed, x: &mut Acts, tokens: &Words, table: &Weight) -> Result<()> {
        self.0.embed(op, x, tokens, table)
    }
    fn rms_norm(&self, op: &RmsNorm, out: &mut Acts, x: &Acts, w: &Weight) -> Result<()> {
        self.0.rms_norm(op, out, x, w)
    }
    fn add_rms_norm(&self, op: &AddRmsNorm, out: &mut Acts, x: &mut Acts, d: &Acts, w: &Weight) -> Result<()> {
        self.0.add_rms_norm(op, out, x, d, w)
    }
    fn gemv(&self, op: &Gemv, out: Out<'_, Self>, x: &Acts, w: &Weight) -> Result<()> {
        self.0.gemv(op, inner(out), x, w)
    }
    fn gemm(&self, op: &Gemm, out: Out<'_, Self>, x: &Acts, w: &Weight) -> Result<()> {
        self.0.gemm(op, inner(out), x, w)
    }
    fn head_norm(&self, op: &HeadNorm, qkv: &mut Acts, gains: &Weight) -> Result<()> {
        self.0.head_norm(op, qkv, gains)
    }
    fn rope(&self, op: &Rope, qkv: &mut Acts, pos: &Words, table: &Vec<f32>) -> Result<()> {
        self.0.rope(op, qkv, pos, table)
    }
    fn kv_append(
        &self,
        op: &KvAppend,
        k: &mut Acts,
        v: &mut Acts,
        qkv: &Acts,
        pos: &Words,
        pages: &Words,
    ) -> Result<()> {
        self.0.kv_append(op, k, v, qkv, pos, pages)
    }
    fn attn_prefill(
        &self,
        op: &AttnPrefill,
        out: &mut Acts,
        qkv: &Acts,
        k: &Acts,
        v: &Acts,
        pos: &Words,
        pages: &Words,
    ) -> Result<()> {
        self.0.attn_prefill(op, out, qkv, k, v, pos, pages)
    }
    fn attn_decode(
        &self,
        op: &AttnDecode,
        out: &mut Acts,
        part: &mut Vec<f32>,
        arrived: &mut Words,
        qkv: &Acts,
        k: &Acts,
        v: &Acts,
        pos: &Words,
        pages: &Words,
    ) -> Result<()> {
        self.0.attn_decode(op, out, part, arrived, qkv, k, v, pos, pages)
    }
    fn swiglu(&self, op: &Swiglu, hb: &mut Acts, gate_up: &Acts) -> Result<()> {
        self.0.swiglu(op, hb, gate_up)?;
        self.spoil("swiglu", hb);
        Ok(())
    }
    fn stream_read(&self, op: &StreamRead, out: &mut Words, x: &Words) -> Result<()> {
        self.0.stream_read(op, out, x)
    }
    fn argmax(
        &self,
        op: &Argmax,
        token: &mut Words,
        pos: &mut Words,
        scratch: &mut Vec<f32>,
        outbox: &mut Vec<VecDeque<u32>>,
        logits: &Vec<f32>,
    ) -> Result<()> {
        self.0.argmax(op, token, pos, scratch, outbox, logits)
    }
    fn sample(
        &self,
        op: &Sample,
        token: &mut Words,
        pos: &mut Words,
        params: &mut Words,
        history: &mut Words,
        scratch: &mut Vec<f32>,
        outbox: &mut Vec<VecDeque<u32>>,
        bias: &Vec<f32>,
        mask: &Words,
        logits: &Vec<f32>,
    ) -> Result<()> {
        self.0.sample(op, token, pos, params, history, scratch, outbox, bias, mask, logits)
    }
    fn log_prob(
        &self,
        op: &LogProb,
        out: &mut Vec<f32>,
        greedy: &mut Words,
        logits: &Vec<f32>,
        target: &Words,
    ) -> Result<()> {
        self.0.log_prob(op, out, greedy, logits, target)
    }

    fn norm_qkv_rope_append(
        &self,
        op: &NormQkvRopeAppend,
        qkv: &mut Acts,
        k: &mut Acts,
        v: &mut Acts,
        xb: &mut Acts,
        _arrived: &mut Words,
        x: &Acts,
        pos: &Words,
        pages: &Words,
        gain: &Weight,
        w: &Weight,
        heads: Option<&Weight>,
        table: &Vec<f32>,
    ) -> Result<()> {
        definition::norm_qkv_rope_append(self, op, qkv, k, v, xb, x, pos, pages, gain, w, heads, table)?;
        self.spoil("norm_qkv_rope_append", k);
        Ok(())
    }
    fn norm_gate_up(
        &self,
        op: &NormGateUp,
        hb: &mut Acts,
        xb: &mut Acts,
        gate_up: &mut Acts,
        x: &Acts,
        gain: &Weight,
        w: &Weight,
    ) -> Result<()> {
        definition::norm_gate_up(self, op, hb, xb, gate_up, x, gain, w)?;
        self.spoil("norm_gate_up", hb);
        Ok(())
    }
    fn norm_head(
        &self,
        op: &NormHead,
        logits: &mut Vec<f32>,
        xb: &mut Acts,
        x: &Acts,
        gain: &Weight,
        w: &Weight,
    ) -> Result<()> {
        definition::norm_head(self, op, logits, xb, x, gain, w)?;
        self.spoil("norm_head", logits);
        Ok(())
    }
}
