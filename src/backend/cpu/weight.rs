//! Weights as the CPU reads them: straight from the mapped file where its dtype and alignment allow.

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
}

/// Rows of weights, or of keys and values, by their format.
#[derive(Clone, Copy)]
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
    /// Stacks `parts`. f32 activations keep f32 and f16 weights exact; bf16 activations round weights to bf16, as the GPU does.
    pub(super) fn new<A: Act>(parts: &[Tensor]) -> Weight {
        let exact = size_of::<A>() == 4;
        let data = |t: &Tensor| {
            let bytes = t.bytes();
            let f32s: Vec<f32> = match t.dtype() {
                Dtype::Bf16 if bytemuck::try_cast_slice::<u8, bf16>(bytes).is_ok() => return Data::Mapped(t.clone()),
                Dtype::F32 if exact && bytemuck::try_cast_slice::<u8, f32>(bytes).is_ok() => {
                    return Data::Mapped(t.clone());
                }
                Dtype::Bf16 => return Data::Bf16(bytemuck::pod_collect_to_vec(bytes)),
                Dtype::F32 => bytemuck::pod_collect_to_vec(bytes),
                Dtype::F16 => bytemuck::pod_collect_to_vec::<u8, f16>(bytes).into_iter().map(f16::to_f32).collect(),
            };
            if exact { Data::F32(f32s) } else { Data::Bf16(f32s.into_iter().map(bf16::from_f32).collect()) }
        };
        let cols = parts.first().map_or(0, Tensor::cols);
        Weight { parts: parts.iter().map(|t| Part { rows: t.rows(), data: data(t) }).collect(), cols }
    }

    /// A matrix of given values.
    pub(super) fn from_values(rows: usize, cols: usize, data: &[bf16]) -> Weight {
        Weight { parts: vec![Part { rows, data: Data::Bf16(data.to_vec()) }], cols }
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
        let of = |part: &Part| match part.elements() {
            Elements::Bf16(w) => w.iter().map(|w| w.to_f32()).collect::<Vec<_>>(),
            Elements::F32(w) => w.to_vec(),
        };
        self.parts.iter().flat_map(of).collect()
    }

    /// The rows `first..first + rows` where they lie: `(rows before, rows, their elements)` of each part that has some.
    pub(super) fn rows(&self, first: usize, rows: usize) -> impl Iterator<Item = (usize, usize, Elements<'_>)> {
        let cols = self.cols;
        let mut start = 0;
        self.parts.iter().filter_map(move |part| {
            let (from, to) = (first.max(start), (first + rows).min(start + part.rows));
            let at = from.saturating_sub(start);
            start += part.rows;
            (from < to).then(|| (from - first, to - from, part.elements().part(at * cols, (to - from) * cols)))
        })
    }

    /// The elements of a weight of one part.
    pub(super) fn single(&self) -> Result<Elements<'_>> {
        expect("weight", self.parts.len() == 1, || format!("stacked of {} parts, expected one", self.parts.len()))?;
        Ok(self.parts[0].elements())
    }
}

impl Part {
    fn elements(&self) -> Elements<'_> {
        match &self.data {
            // alignment was checked when it was made
            Data::Mapped(t) if t.dtype() == Dtype::F32 => Elements::F32(bytemuck::cast_slice(t.bytes())),
            Data::Mapped(t) => Elements::Bf16(bytemuck::cast_slice(t.bytes())),
            Data::Bf16(v) => Elements::Bf16(v),
            Data::F32(v) => Elements::F32(v),
        }
    }
}

impl Shaped for Weight {
    fn shape(&self) -> (usize, usize) {
        (self.parts.iter().map(|p| p.rows).sum(), self.cols)
    }
}
