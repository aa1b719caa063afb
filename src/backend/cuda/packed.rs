//! Quantized weights on the device: which kinds the products of a decode step read directly, and how tensors are turned
//! into the records that `kernels/common/packed.cuh` describes.

use super::{
    Cuda,
    weight::{COLUMNS, Kind, ROWS, SCALES, Weight},
};
use crate::{
    backend::Backend,
    error::{Error, Result},
    files::{
        format::{Format, Layout},
        weights::Tensor,
    },
    ops::{Grid, Ring, product},
    tiles,
};
use half::{bf16, f16};
use rayon::prelude::*;

impl Kind {
    /// The kind whose records hold a tensor exactly, if one does.
    fn of(t: &Tensor) -> Option<Kind> {
        let kind = match t.format() {
            Format::Plain(_) => return None,
            Format::Block(block) => match block.name {
                "Q8_0" => Kind::Q8,
                "Q4_0" => Kind::Q4,
                _ => return None,
            },
            Format::Grouped(g) => {
                let wide = g.group[1].is_multiple_of(COLUMNS) || g.group[1] >= t.cols();
                match (g.layout, g.layout.bits()) {
                    (Layout::E4m3, _) if wide => Kind::F8,
                    (_, 8) if wide => Kind::I8,
                    (_, 4) if wide => Kind::I4,
                    (Layout::Int8 | Layout::Packed { .. } | Layout::Gptq { .. }, 8) if g.group[1] == 32 => Kind::Q8,
                    _ => return None,
                }
            }
        };
        let whole = t.rows().is_multiple_of(ROWS) && t.cols().is_multiple_of(8);
        (whole && kind.holds(t)?).then_some(kind)
    }

    /// Whether this kind holds the tensor's scales and zero points exactly; `None` if columns are not in the order of
    /// their groups.
    fn holds(self, t: &Tensor) -> Option<bool> {
        if matches!(t.format(), Format::Block(_)) || self == Kind::F8 {
            return t.scales(0).map(|_| true);
        }
        let (bias, narrow) = (f32::from(self.bias(t)), self != Kind::I8);
        let exact = |s: f32| !narrow || f16::from_f32(s).to_f32() == s;
        let zero = |z: f32| match self {
            Kind::I4 => (0.0..=15.0).contains(&(z + bias)),
            _ => z == bias,
        };
        let rows = (0..t.rows()).into_par_iter().map(|r| {
            let (scales, zeros) = t.scales(r)?;
            Some(scales.into_iter().all(exact) && zeros.into_iter().all(zero))
        });
        rows.try_reduce(|| true, |a, b| Some(a && b))
    }

    /// For 8 bits: the difference between codes without sign and codes with sign, which is their zero point. For 4
    /// bits: what is added to codes with sign.
    fn bias(self, t: &Tensor) -> u8 {
        match (self, t.format()) {
            (Kind::I4, Format::Grouped(g)) if matches!(g.layout, Layout::Packed { .. }) => 8,
            (Kind::I8 | Kind::Q8, Format::Grouped(g)) if matches!(g.layout, Layout::Gptq { .. }) => 128,
            _ => 0,
        }
    }

    /// The records of 8 rows, from row `first` on, of a tensor that it [holds](Kind::holds).
    fn pack(self, t: &Tensor, first: usize, out: &mut [u8]) {
        let (cols, record) = (t.cols(), self.record().expect("a packed kind"));
        let mut codes = vec![0f32; ROWS * cols];
        t.codes(first, &mut codes);
        let bias = f32::from(self.bias(t));
        let scales: Vec<(Vec<f32>, Vec<f32>)> = (first..first + ROWS).map(|r| t.scales(r).expect("held")).collect();
        let group_of_tensor = t.format().group();
        for (stage, out) in out.chunks_exact_mut(record).enumerate() {
            let (columns, words) = out.split_at_mut(record - SCALES);
            for (g, (scales, zeros)) in scales.iter().enumerate() {
                let at = |column: usize| column / group_of_tensor;
                let scale = |column: usize| scales.get(at(column)).copied().unwrap_or(0.0);
                let zero = |column: usize| zeros.get(at(column)).map_or(0.0, |z| z + bias);
                let code = |column: usize| (column < cols).then(|| codes[g * cols + column]);
                let from = stage * COLUMNS;
                for column in 0..COLUMNS {
                    // of each half, lane c has columns 8c to 8c + 7: four pairs, with those of the other half eight
                    let (half, c, odd) = (column / 32, column % 32 / 8, column % 2);
                    let pair = half * 4 + column % 8 / 2;
                    let lane = 4 * g + c;
                    match self {
                        Kind::Q4 | Kind::I4 => {
                            let nothing = if self == Kind::Q4 { 8.0 } else { zero(from) };
                            let q =
                                code(from + column).map_or(nothing, |q| q + if self == Kind::I4 { bias } else { 0.0 });
                            let bit = pair % 4 * 4 + odd * 16;
                            columns[lane * 8 + half * 4 + bit / 8] |= (q as u8) << (bit % 8);
                        }
                        Kind::F8 => {
                            let q =
                                if from + column < cols { t.bytes()[(first + g) * cols + from + column] } else { 0 };
                            columns[lane * 16 + pair / 2 * 4 + pair % 2 + 2 * odd] = q;
                        }
                        _ => {
                            let q = code(from + column).map_or(0.0, |q| q - bias);
                            columns[lane * 16 + pair / 2 * 4 + pair % 2 + 2 * odd] = (q + 128.0) as u8;
                        }
                    }
                }
                let half = |x: f32| u32::from(f16::from_f32(x).to_bits());
                let word = match self {
                    Kind::I8 | Kind::F8 => scale(from).to_bits(),
                    Kind::I4 => half(scale(from)) | u32::from(bf16::from_f32(-zero(from) / 64.0).to_bits()) << 16,
                    _ => half(scale(from)) | half(scale(from + self.group())) << 16,
                };
                words[4 * g..4 * g + 4].copy_from_slice(&word.to_le_bytes());
            }
        }
    }
}

/// The kind of a stack of tensors, if all have the same.
pub(super) fn kind(stack: &[Tensor]) -> Option<Kind> {
    let mut kinds = stack.iter().map(Kind::of);
    let first = kinds.next()??;
    let rows: usize = stack.iter().map(Tensor::rows).sum();
    (rows >= tiles::GEMV_TILE as usize && kinds.all(|kind| kind == Some(first))).then_some(first)
}

impl Weight {
    /// For a product of up to [`DECODE_ROWS`](crate::backend::DECODE_ROWS) rows with this matrix: the launch, and the
    /// end of the kernel's name.
    pub(crate) fn product(&self, rows: usize, norm: bool, ring: Ring) -> (Grid, &'static str) {
        let Some(record) = self.kind.record() else { return product(self.rows, rows, norm, ring) };
        let (kernel, stages) = match (rows, self.kind) {
            (1, Kind::Q4 | Kind::I4) => ("r1", tiles::GEMV_NARROW_STAGES),
            (1, _) => ("r1", tiles::GEMV_DEEP_STAGES),
            _ => ("r16", tiles::GEMV_STAGES),
        };
        let line = tiles::GEMV_STAGE as usize * size_of::<bf16>();
        let stage = (2 * record).next_multiple_of(line) + (rows + usize::from(norm)) * line;
        let blocks = self.rows.div_ceil(tiles::GEMV_TILE as usize) as u32;
        let shared = stage as u32 * stages * tiles::GEMV_WARPS;
        (Grid { blocks: [blocks, 1, 1], threads: tiles::GEMV_WARPS * 32, shared }, kernel)
    }
}

impl Cuda {
    /// Uploads a stack of tensors as records of a kind.
    pub(super) fn packed(&self, stack: &[Tensor], kind: Kind) -> Result<Weight> {
        let (rows, cols) = (stack.iter().map(Tensor::rows).sum(), stack[0].cols());
        if let Some(t) = stack.iter().find(|t| t.cols() != cols) {
            return Err(Error::Op { op: "weights", what: format!("{t:?} is stacked on a tensor of {cols} columns") });
        }
        let mut words = vec![bf16::ZERO; kind.bytes(rows, cols) / size_of::<bf16>()];
        let mut rest: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
        for t in stack {
            let (own, after) = rest.split_at_mut(kind.bytes(t.rows(), cols));
            let of_rows = kind.bytes(ROWS, cols);
            own.par_chunks_mut(of_rows).enumerate().for_each(|(i, out)| kind.pack(t, i * ROWS, out));
            rest = after;
        }
        Ok(Weight { data: self.upload(&words)?, rows, cols, kind, bias: None })
    }

    /// Enqueues work with a matrix in bf16. A packed matrix is first converted, in memory that all of them share.
    pub(super) fn with_bf16(&self, w: &Weight, enqueue: impl FnOnce(&Weight) -> Result<()>) -> Result<()> {
        if w.kind == Kind::Bf16 {
            return enqueue(w);
        }
        let mut widened = self.widened.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let room = match widened.take().filter(|room| room.data.len() >= w.rows * w.cols) {
            Some(enough) => enough,
            None => Weight { data: self.alloc(w.rows * w.cols)?, rows: 0, cols: 0, kind: Kind::Bf16, bias: None },
        };
        let room = widened.insert(Weight { rows: w.rows, cols: w.cols, ..room });
        let records = (w.rows / ROWS * w.cols.div_ceil(COLUMNS)) as u32;
        let threads = tiles::WIDEN_THREADS;
        let grid = Grid { blocks: [records.div_ceil(threads / 32), 1, 1], threads, shared: 0 };
        crate::ops::expect_ints("gemm", &[w.rows, w.cols])?;
        let args = [(&room.data).into(), (&w.data).into(), w.rows.into(), w.cols.into()];
        // SAFETY: `room` holds [rows, cols], `w.data` the records of as many; the arguments are those of the kernel, in order.
        // The stream runs it before what is enqueued with it, and after what used the memory before.
        unsafe { self.launch(&format!("gemm_{}_widen", w.kind.name()), &w.kind, grid, &args)? };
        enqueue(room)
    }
}
