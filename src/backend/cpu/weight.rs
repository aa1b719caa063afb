//! Weights as the CPU reads them: straight from the mapped file where their format and alignment allow.

use super::{quantized::Quantized, simd::Rows};
use crate::{
    backend::Shaped,
    error::Result,
    files::{config::Dtype, weights::Tensor},
    ops::{Act, expect},
};
use half::{bf16, f16};

/// A matrix, stacked by rows from parts that stay where they are.
pub struct Weight {
    parts: Vec<Part>,
    cols: usize,
    /// What products add to each column of their result.
    bias: Option<Vec<f32>>,
}

struct Part {
    rows: usize,
    data: Data,
}

enum Data {
    /// In the mapped file, in bf16 or f32 and aligned.
    Mapped(Tensor),
    Bf16(Vec<bf16>),
    F32(Vec<f32>),
    Quantized(Quantized),
}

/// Rows of weights, or of keys and values, one after the other.
#[derive(Clone, Copy, Debug)]
pub(super) enum Elements<'a> {
    /// bf16
    Bf16(&'a [bf16]),
    /// f32
    F32(&'a [f32]),
}

impl<'a> Elements<'a> {
    /// Elements.
    pub(super) fn len(self) -> usize {
        match self {
            Elements::Bf16(w) => w.len(),
            Elements::F32(w) => w.len(),
        }
    }

    /// Elements `at..at + len`.
    pub(super) fn part(self, at: usize, len: usize) -> Elements<'a> {
        match self {
            Elements::Bf16(w) => Elements::Bf16(&w[at..at + len]),
            Elements::F32(w) => Elements::F32(&w[at..at + len]),
        }
    }

    /// Of activations.
    pub(super) fn of<A: Act>(a: &'a [A]) -> Elements<'a> {
        match size_of::<A>() {
            2 => Elements::Bf16(bytemuck::cast_slice(a)),
            _ => Elements::F32(bytemuck::cast_slice(a)),
        }
    }
}

impl Weight {
    /// Stacks `parts`; quantized ones are those that products [take](Quantized::takes). f32 activations keep f32 and f16 weights exact; bf16 activations round weights to bf16, as the GPU does.
    pub(super) fn new<A: Act>(parts: &[Tensor]) -> Weight {
        let exact = size_of::<A>() == 4;
        let data = |t: &Tensor| {
            if !t.is_plain() {
                return Data::Quantized(Quantized::new(t));
            }
            if Self::stays::<A>(t) {
                return Data::Mapped(t.clone());
            }
            let bytes = t.bytes();
            let f32s: Vec<f32> = match t.dtype() {
                Dtype::Bf16 => return Data::Bf16(bytemuck::pod_collect_to_vec(bytes)),
                Dtype::F32 => bytemuck::pod_collect_to_vec(bytes),
                Dtype::F16 => bytemuck::pod_collect_to_vec::<u8, f16>(bytes).into_iter().map(f16::to_f32).collect(),
            };
            if exact { Data::F32(f32s) } else { Data::Bf16(f32s.into_iter().map(bf16::from_f32).collect()) }
        };
        let cols = parts.first().map_or(0, Tensor::cols);
        Weight { parts: parts.iter().map(|t| Part { rows: t.rows(), data: data(t) }).collect(), cols, bias: None }
    }

    /// Whether products read a tensor that is not quantized where it lies.
    pub(super) fn stays<A: Act>(t: &Tensor) -> bool {
        match t.dtype() {
            Dtype::Bf16 => bytemuck::try_cast_slice::<u8, bf16>(t.bytes()).is_ok(),
            Dtype::F32 => size_of::<A>() == 4 && bytemuck::try_cast_slice::<u8, f32>(t.bytes()).is_ok(),
            Dtype::F16 => false,
        }
    }

    /// A matrix of given values.
    pub(super) fn from_values(rows: usize, cols: usize, data: &[bf16]) -> Weight {
        Weight { parts: vec![Part { rows, data: Data::Bf16(data.to_vec()) }], cols, bias: None }
    }

    /// Gives it a bias for each row. bf16 activations round it to bf16, as the GPU does.
    pub(super) fn set_bias<A: Act>(&mut self, bias: &[f32]) -> Result<()> {
        let rows = self.shape().0;
        expect("weight", bias.len() == rows, || format!("a bias of {} values for {rows} rows", bias.len()))?;
        self.bias = Some(bias.iter().map(|x| A::from_f32(*x).to_f32()).collect());
        Ok(())
    }

    /// The bias of each row.
    pub(super) fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.shape().0 * self.cols
    }

    /// No elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its elements, rows of one part after the other.
    pub fn to_f32(&self) -> Vec<f32> {
        let of = |part: &Part| match &part.data {
            Data::Quantized(q) => q.tensor().to_f32(),
            data => match data.elements() {
                Elements::Bf16(w) => w.iter().map(|w| w.to_f32()).collect::<Vec<_>>(),
                Elements::F32(w) => w.to_vec(),
            },
        };
        self.parts.iter().flat_map(of).collect()
    }

    /// The rows `first..first + rows` where they lie: `(rows before, rows, they)` of each part that has some.
    pub(super) fn rows(&self, first: usize, rows: usize) -> impl Iterator<Item = (usize, usize, Rows<'_>)> {
        let mut start = 0;
        self.parts.iter().flat_map(move |part| {
            let (from, to) = (first.max(start), (first + rows).min(start + part.rows));
            let before = start;
            start += part.rows;
            let (from, to) = (from.saturating_sub(before), to.saturating_sub(before));
            part.rows(from, to, self.cols).map(move |(from, to, w)| (before + from - first, to - from, w))
        })
    }

    /// The rows `first..first + rows` of a weight that is not quantized, as [`Weight::rows`].
    pub(super) fn elements(&self, first: usize, rows: usize) -> impl Iterator<Item = (usize, usize, Elements<'_>)> {
        self.rows(first, rows).map(|(at, rows, w)| match w {
            Rows::Plain(w) => (at, rows, w),
            other => unreachable!("{other:?} in training, which widens"),
        })
    }

    /// The elements of a weight of one part that is not quantized.
    pub(super) fn single(&self) -> Result<Elements<'_>> {
        let plain = |part: &&Part| !matches!(part.data, Data::Quantized(_));
        let one = self.parts.first().filter(|_| self.parts.len() == 1).filter(plain);
        expect("weight", one.is_some(), || format!("stacked of {} parts, expected one of numbers", self.parts.len()))?;
        Ok(self.parts[0].data.elements())
    }

    /// Some of it are codes of 8 bits. A row alone is multiplied by them in f32: to make bf16 of them costs more than it saves.
    pub(super) fn has_bytes(&self) -> bool {
        self.parts.iter().any(|part| matches!(&part.data, Data::Quantized(q) if q.tensor().format().bits() == 8))
    }

    /// The tensor of a weight that is one quantized matrix.
    pub(super) fn quantized(&self) -> Option<&Tensor> {
        match &self.parts[..] {
            [Part { data: Data::Quantized(q), .. }] => Some(q.tensor()),
            _ => None,
        }
    }
}

impl Part {
    /// Rows `from..to`: `(first, last + 1, they)` of each run.
    fn rows(&self, from: usize, to: usize, cols: usize) -> impl Iterator<Item = (usize, usize, Rows<'_>)> {
        let (plain, quantized) = match &self.data {
            Data::Quantized(q) => (None, Some(q.rows(from, to))),
            data if from < to => (Some(Rows::Plain(data.elements().part(from * cols, (to - from) * cols))), None),
            _ => (None, None),
        };
        plain.map(|w| (from, to, w)).into_iter().chain(quantized.into_iter().flatten())
    }
}

impl Data {
    /// Of what is not quantized.
    fn elements(&self) -> Elements<'_> {
        match self {
            // alignment was checked when it was made
            Data::Mapped(t) if t.dtype() == Dtype::F32 => Elements::F32(bytemuck::cast_slice(t.bytes())),
            Data::Mapped(t) => Elements::Bf16(bytemuck::cast_slice(t.bytes())),
            Data::Bf16(v) => Elements::Bf16(v),
            Data::F32(v) => Elements::F32(v),
            Data::Quantized(q) => unreachable!("{:?} has no elements", q.tensor()),
        }
    }
}

impl Shaped for Weight {
    fn shape(&self) -> (usize, usize) {
        (self.parts.iter().map(|p| p.rows).sum(), self.cols)
    }
}
