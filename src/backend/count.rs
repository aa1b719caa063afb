//! A backend that computes nothing, and adds up what each op reads, writes and computes: the least that a step can
//! cost.
//!
//! The forward pass itself is what is counted, so the count cannot drift from it. Bytes are those of the device: bf16
//! activations and weights.

mod train;

use crate::{
    backend::{Backend, Buffer, DECODE_ROWS, Out, Shaped, definition},
    error::{Error, Result},
    files::{
        config::Config,
        weights::{Tensor, Weights},
    },
    model::{self, Model, Rows, Scratch, kv::Kv},
    ops::{
        AddRmsNorm, Argmax, AttnDecode, AttnPrefill, Cost, Element, Embed, Gemm, Gemv, HeadNorm, KvAppend, KvDtype,
        LogProb, NormGateUp, NormHead, NormHeadArgmax, NormQkvRopeAppend, Op, RmsNorm, Rope, Sample, StreamRead,
        Swiglu,
    },
};
use half::bf16;
use std::{
    collections::BTreeMap,
    marker::PhantomData,
    sync::{Mutex, PoisonError},
};

/// Calls and cost of each op, by its stem.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Costs(pub BTreeMap<&'static str, (u64, Cost)>);

impl Costs {
    /// The sum over all ops.
    pub fn total(&self) -> Cost {
        let mut total = Cost::default();
        self.0.values().for_each(|(_, c)| total += *c);
        total
    }
}

/// The counting backend.
#[derive(Default)]
pub struct Count {
    costs: Mutex<Costs>,
}

/// A buffer without content.
pub struct Length<T> {
    len: usize,
    kind: PhantomData<T>,
}

impl<T: Element> Buffer for Length<T> {
    fn len(&self) -> usize {
        self.len
    }
}

/// A weight without content: `(rows, cols)`, and whether it has a bias.
pub struct Shape(usize, usize, bool);

impl Shaped for Shape {
    fn shape(&self) -> (usize, usize) {
        (self.0, self.1)
    }
}

impl Count {
    /// Nothing counted yet.
    pub fn new() -> Count {
        Count::default()
    }

    /// What was counted so far.
    pub fn costs(&self) -> Costs {
        self.costs.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The cost of the forward pass of `rows` tokens and of the last one's logits, when that one is at position
    /// `kv_len - 1` and keys and values are stored as `kv`.
    ///
    /// ```
    /// # fn main() -> aoji::Result<()> {
    /// let json = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    ///     "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}"#;
    /// let config = aoji::Config::from_json(std::path::Path::new("config.json"), json, None)?;
    /// let step = aoji::count::Count::forward_cost(&config, aoji::KvDtype::Auto, 1, 10)?;
    /// assert_eq!(step.0["attn_decode"].0, 2); // one call a layer
    /// assert!(step.total().read > 100_000, "the weights are read once, and the KV cache");
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// No rows, or more rows than positions.
    pub fn forward_cost(config: &Config, kv: KvDtype, rows: usize, kv_len: usize) -> Result<Costs> {
        if rows == 0 || rows > kv_len {
            return Err(Error::Input(format!(
                "{rows} rows that end at position {kv_len}: there must be 1 to {kv_len}"
            )));
        }
        let b = Count::new();
        let model = b.model(config, kv_len)?;
        let mut s = Scratch::new(&b, config, rows, 1, kv_len)?;
        let mut kv = Kv::new(&b, config, kv, 1, kv_len)?;
        model.forward(&b, &mut s, &mut kv, &Rows::new(&b, rows)?, rows, kv_len)?;
        model.head(&b, &mut s, rows - 1, 1)?;
        Ok(b.costs())
    }

    /// A model without content, with room for `positions`.
    ///
    /// # Errors
    /// A weight that is neither a vector nor a matrix.
    pub(crate) fn model(&self, config: &Config, positions: usize) -> Result<Model<Count>> {
        let shapes = Weights::table(config, |_, shape| match *shape {
            [cols] => Ok((1, cols)),
            [rows, cols] => Ok((rows, cols)),
            _ => Err(Error::Input(format!("a weight of shape {shape:?}: expected a vector or a matrix"))),
        })?;
        let stack = |parts: Vec<(usize, usize)>| Shape(parts.iter().map(|s| s.0).sum(), parts[0].1, false);
        let stacks = model::stacks(config, &shapes, |shape| *shape).into_iter().map(stack).collect();
        let mut model = Model::bind(config, stacks, self.alloc(positions * config.head_dim)?, positions);
        model.set_biases(self, &shapes.layers, |(_, n)| vec![0.0; *n])?;
        Ok(model)
    }

    pub(super) fn add(&self, stem: &'static str, cost: Cost) -> Result<()> {
        let mut costs = self.costs.lock().unwrap_or_else(PoisonError::into_inner);
        let (calls, sum) = costs.0.entry(stem).or_default();
        *calls += 1;
        *sum += cost;
        Ok(())
    }

    pub(super) fn op<O: Op>(&self, op: &O) -> Result<()> {
        self.add(O::STEM, op.cost())
    }

    /// An op of such a cost, and the bias of `w`, which it adds to `rows` rows.
    fn biased<O: Op>(&self, mut cost: Cost, rows: usize, w: &Shape) -> Result<()> {
        if w.2 {
            cost += Cost { read: 2 * w.0 as u64, write: 0, flops: (rows * w.0) as u64 };
        }
        self.add(O::STEM, cost)
    }

    /// A matrix product: its cost is that of a store in bf16, an epilogue adds to it.
    fn product<O: Op>(&self, op: &O, out: &Out<'_, Count>, rows: usize, w: &Shape) -> Result<()> {
        let (mut cost, n) = (op.cost(), (rows * w.0) as u64);
        match out {
            Out::Store(_) => {}
            Out::Add(_) => cost += Cost { read: 2 * n, write: 0, flops: n },
            Out::F32(_) => cost.write += 2 * n,
        }
        self.biased::<O>(cost, rows, w)
    }
}

type Buf<T> = Length<T>;

impl Backend for Count {
    type Act = bf16;
    type Buf<T: Element> = Length<T>;
    type Weight = Shape;
    type Graphs = ();
    type Outbox = ();
    const LOOKAHEAD: usize = 0;
    const CHUNK: usize = 2048;
    const IS_GPU: bool = false;

    fn name(&self) -> String {
        "count of bytes and operations".into()
    }
    fn free_memory(&self) -> Result<Option<u64>> {
        Ok(None)
    }
    fn alloc<T: Element>(&self, len: usize) -> Result<Buf<T>> {
        Ok(Length { len, kind: PhantomData })
    }
    fn write<T: Element>(&self, _dst: &mut Buf<T>, _at: usize, _src: &[T]) -> Result<()> {
        Ok(())
    }
    fn copy<T: Element>(&self, _buf: &mut Buf<T>, _to: usize, _from: usize, _len: usize) -> Result<()> {
        Ok(())
    }
    fn read<T: Element>(&self, dst: &mut [T], _src: &Buf<T>, _at: usize) -> Result<()> {
        dst.fill(T::zeroed());
        Ok(())
    }
    fn weights(&self, stacks: &[Vec<Tensor>], _progress: &mut dyn FnMut(u64)) -> Result<Vec<Shape>> {
        let shape = |parts: &Vec<Tensor>| {
            Shape(parts.iter().map(Tensor::rows).sum(), parts.first().map_or(0, Tensor::cols), false)
        };
        Ok(stacks.iter().map(shape).collect())
    }
    fn weight_from(&self, rows: usize, cols: usize, _data: &[bf16]) -> Result<Shape> {
        Ok(Shape(rows, cols, false))
    }
    fn set_bias(&self, w: &mut Shape, _bias: &[f32]) -> Result<()> {
        w.2 = true;
        Ok(())
    }
    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
    fn outbox(&self, _sequences: usize) -> Result<()> {
        Ok(())
    }
    fn take(&self, (): &mut (), _sequence: usize) -> Result<u32> {
        Ok(0)
    }
    fn skip(&self, (): &mut (), _sequence: usize, _n: usize) {}

    fn embed(&self, op: &Embed, _x: &mut Buf<bf16>, _tokens: &Buf<u32>, _table: &Shape) -> Result<()> {
        self.op(op)
    }
    fn rms_norm(&self, op: &RmsNorm, _out: &mut Buf<bf16>, _x: &Buf<bf16>, _w: &Shape) -> Result<()> {
        self.op(op)
    }
    fn add_rms_norm(
        &self,
        op: &AddRmsNorm,
        _out: &mut Buf<bf16>,
        _x: &mut Buf<bf16>,
        _d: &Buf<bf16>,
        _w: &Shape,
    ) -> Result<()> {
        self.op(op)
    }
    fn gemv(&self, op: &Gemv, out: Out<'_, Self>, _x: &Buf<bf16>, w: &Shape) -> Result<()> {
        self.product(op, &out, op.rows, w)
    }
    fn gemm(&self, op: &Gemm, out: Out<'_, Self>, _x: &Buf<bf16>, w: &Shape) -> Result<()> {
        self.product(op, &out, op.rows, w)
    }
    fn head_norm(&self, op: &HeadNorm, _qkv: &mut Buf<bf16>, _gains: &Shape) -> Result<()> {
        self.op(op)
    }
    fn rope(&self, op: &Rope, _qkv: &mut Buf<bf16>, _pos: &Buf<u32>, _table: &Buf<f32>) -> Result<()> {
        self.op(op)
    }
    fn kv_append(
        &self,
        op: &KvAppend,
        _k: &mut Buf<bf16>,
        _v: &mut Buf<bf16>,
        _qkv: &Buf<bf16>,
        _pos: &Buf<u32>,
        _pages: &Buf<u32>,
    ) -> Result<()> {
        self.op(op)
    }
    fn attn_prefill(
        &self,
        op: &AttnPrefill,
        _out: &mut Buf<bf16>,
        _qkv: &Buf<bf16>,
        _k: &Buf<bf16>,
        _v: &Buf<bf16>,
        _pos: &Buf<u32>,
        _pages: &Buf<u32>,
    ) -> Result<()> {
        self.op(op)
    }
    fn attn_decode(
        &self,
        op: &AttnDecode,
        _out: &mut Buf<bf16>,
        _part: &mut Buf<f32>,
        _arrived: &mut Buf<u32>,
        _qkv: &Buf<bf16>,
        _k: &Buf<bf16>,
        _v: &Buf<bf16>,
        _pos: &Buf<u32>,
        _pages: &Buf<u32>,
    ) -> Result<()> {
        self.op(op)
    }
    fn swiglu(&self, op: &Swiglu, _hb: &mut Buf<bf16>, _gate_up: &Buf<bf16>) -> Result<()> {
        self.op(op)
    }
    fn argmax(
        &self,
        op: &Argmax,
        _token: &mut Buf<u32>,
        _pos: &mut Buf<u32>,
        _scratch: &mut Buf<f32>,
        (): &mut (),
        _logits: &Buf<f32>,
    ) -> Result<()> {
        self.op(op)
    }
    fn sample(
        &self,
        op: &Sample,
        _token: &mut Buf<u32>,
        _pos: &mut Buf<u32>,
        _params: &mut Buf<u32>,
        _history: &mut Buf<u32>,
        _scratch: &mut Buf<f32>,
        (): &mut (),
        _bias: &Buf<f32>,
        _mask: &Buf<u32>,
        _logits: &Buf<f32>,
    ) -> Result<()> {
        self.op(op)
    }
    fn log_prob(
        &self,
        op: &LogProb,
        _out: &mut Buf<f32>,
        _greedy: &mut Buf<u32>,
        _logits: &Buf<f32>,
        _target: &Buf<u32>,
    ) -> Result<()> {
        self.op(op)
    }
    fn stream_read(&self, op: &StreamRead, _out: &mut Buf<u32>, _x: &Buf<u32>) -> Result<()> {
        self.op(op)
    }

    // fused if there are few rows, as on the device
    fn norm_qkv_rope_append(
        &self,
        op: &NormQkvRopeAppend,
        qkv: &mut Buf<bf16>,
        k: &mut Buf<bf16>,
        v: &mut Buf<bf16>,
        xb: &mut Buf<bf16>,
        _arrived: &mut Buf<u32>,
        x: &Buf<bf16>,
        pos: &Buf<u32>,
        pages: &Buf<u32>,
        gain: &Shape,
        w: &Shape,
        heads: Option<&Shape>,
        table: &Buf<f32>,
    ) -> Result<()> {
        match op.rows <= DECODE_ROWS {
            true => self.biased::<NormQkvRopeAppend>(op.cost(), op.rows, w),
            false => definition::norm_qkv_rope_append(self, op, qkv, k, v, xb, x, pos, pages, gain, w, heads, table),
        }
    }
    fn norm_gate_up(
        &self,
        op: &NormGateUp,
        hb: &mut Buf<bf16>,
        xb: &mut Buf<bf16>,
        gate_up: &mut Buf<bf16>,
        x: &Buf<bf16>,
        gain: &Shape,
        w: &Shape,
    ) -> Result<()> {
        match op.rows <= DECODE_ROWS {
            true => self.biased::<NormGateUp>(op.cost(), op.rows, w),
            false => definition::norm_gate_up(self, op, hb, xb, gate_up, x, gain, w),
        }
    }
    fn norm_head(
        &self,
        op: &NormHead,
        logits: &mut Buf<f32>,
        xb: &mut Buf<bf16>,
        x: &Buf<bf16>,
        gain: &Shape,
        w: &Shape,
    ) -> Result<()> {
        match op.rows <= DECODE_ROWS {
            true => self.op(op),
            false => definition::norm_head(self, op, logits, xb, x, gain, w),
        }
    }
    fn norm_head_argmax(
        &self,
        op: &NormHeadArgmax,
        _token: &mut Buf<u32>,
        _pos: &mut Buf<u32>,
        _scratch: &mut Buf<f32>,
        (): &mut (),
        _logits: &mut Buf<f32>,
        _xb: &mut Buf<bf16>,
        _x: &Buf<bf16>,
        _gain: &Shape,
        _w: &Shape,
    ) -> Result<()> {
        self.op(op)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn llama_3_8b() -> Config {
        let json = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
            "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "vocab_size": 128256, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
            "tie_word_embeddings": false, "torch_dtype": "bfloat16"}"#;
        Config::from_json(std::path::Path::new("config.json"), json, None).unwrap()
    }

    #[test]
    fn a_token_reads_each_weight_once_and_the_cache_up_to_it() {
        let c = llama_3_8b();
        let embedding = 2 * (c.vocab * c.dim) as u64; // of which one row is read
        let weights = c.weight_bytes() - embedding;
        let [near, far] = [1, 8192].map(|kv_len| Count::forward_cost(&c, KvDtype::Auto, 1, kv_len).unwrap());
        let (total, calls) = (near.total(), |stem| near.0[stem].0);
        assert!(total.read > weights && total.read < weights + weights / 500, "{} of {weights}", total.read);
        let fused = [calls("norm_qkv_rope_append"), calls("norm_gate_up"), calls("norm_head")];
        assert_eq!((fused, [calls("gemv"), calls("attn_decode"), calls("embed")]), ([32, 32, 1], [64, 32, 1]));
        let cache = 8191 * Kv::<Count>::bytes(&c, KvDtype::Auto, 1);
        assert_eq!(far.total().read - total.read, cache);
    }

    #[test]
    fn a_prompt_reads_the_weights_once_and_computes_rows_times_as_much() {
        let c = llama_3_8b();
        let (one, many) = (
            Count::forward_cost(&c, KvDtype::Auto, 1, 1).unwrap(),
            Count::forward_cost(&c, KvDtype::Auto, 512, 512).unwrap(),
        );
        assert!(many.total().read < one.total().read * 2);
        let matrices = 2 * (c.weight_bytes() / 2 - 2 * (c.vocab * c.dim) as u64); // without embedding and head
        assert!(many.0["gemm"].1.flops >= 512 * (matrices - matrices / 1000), "but for the norms' gains");
        assert_eq!((many.0["gemm"].0, many.0["attn_prefill"].0, many.0["norm_head"].0), (128, 32, 1));
    }

    #[test]
    fn rows_must_fit_positions() {
        assert!(Count::forward_cost(&llama_3_8b(), KvDtype::Auto, 0, 1).is_err());
        assert!(Count::forward_cost(&llama_3_8b(), KvDtype::Auto, 9, 8).is_err());
    }
}
