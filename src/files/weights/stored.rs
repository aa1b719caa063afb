//! Tensors whose bytes are not simply their elements in order: quantized tensors, and tensors of GGUF files that keep
//! their rows in another order. Their values are computed row by row while they are loaded.

use super::{Shard, Tensor};
use crate::files::{
    config::Dtype,
    format::{Format, Grouped, Parts},
};
use rayon::prelude::*;
use std::{ops::Range, sync::Arc};

/// Rows whose values one thread computes at once: words of GPTQ and AWQ hold codes of several rows.
const ROWS: usize = 32;

/// How a tensor lies in its files.
pub(in crate::files) struct Stored {
    /// What its bytes are.
    pub format: Format,
    /// Its rows, or the elements of a vector, are those of heads of so many, in the order x0, x(h/2), x1, x(h/2 + 1), ... : pairs that rotate are neighbours.
    /// Here the halves are apart.
    pub paired: Option<usize>,
    /// Tensors beside it.
    pub scales: Option<Piece>,
    /// See [`Parts::zeros`].
    pub zeros: Option<Piece>,
    /// See [`Parts::groups`].
    pub groups: Option<Piece>,
}

/// A range of a file.
pub(in crate::files) struct Piece {
    pub shard: Arc<Shard>,
    pub range: Range<usize>,
}

impl Piece {
    pub fn bytes(&self) -> &[u8] {
        &self.shard.bytes()[self.range.clone()]
    }
}

impl Stored {
    /// A tensor that is nothing but bytes of a format.
    pub fn of(format: Format) -> Stored {
        Stored { format, paired: None, scales: None, zeros: None, groups: None }
    }

    /// The parts of a matrix whose codes are `bytes`.
    fn parts<'a>(&'a self, bytes: &'a [u8]) -> Parts<'a> {
        Parts {
            codes: bytes,
            scales: self.scales.as_ref().map_or(&[], Piece::bytes),
            zeros: self.zeros.as_ref().map(Piece::bytes),
            groups: self.groups.as_ref().map(Piece::bytes),
        }
    }

    fn beside(&self) -> impl Iterator<Item = &Piece> {
        [&self.scales, &self.zeros, &self.groups].into_iter().flatten()
    }

    /// Which row of the file is row `i` of the tensor.
    fn row(&self, i: usize) -> usize {
        let Some(head) = self.paired else { return i };
        let (first, i) = (i / head * head, i % head);
        first + if i < head / 2 { 2 * i } else { 2 * (i - head / 2) + 1 }
    }
}

impl Tensor {
    /// A tensor of a file that was checked: `range` lies in it, and is as long as `stored` says.
    pub(in crate::files) fn new(
        shard: Arc<Shard>,
        name: String,
        [rows, cols]: [usize; 2],
        range: Range<usize>,
        stored: Stored,
    ) -> Tensor {
        let (dtype, stored) = match stored.format {
            Format::Plain(dtype) if stored.paired.is_none() => (dtype, None),
            Format::Plain(dtype) => (dtype, Some(Arc::new(stored))),
            _ => (Dtype::F32, Some(Arc::new(stored))),
        };
        Tensor { shard, name: name.into(), dtype, rows, cols, range, stored }
    }

    /// How its bytes make its values.
    pub fn format(&self) -> Format {
        self.stored.as_ref().map_or(Format::Plain(self.dtype), |stored| stored.format)
    }

    /// Whether its bytes are simply its elements in order. Backends compute with such tensors only;
    /// [`Model::load`](crate::model::Model::load) converts all others.
    pub fn is_plain(&self) -> bool {
        self.stored.is_none()
    }

    /// Its rows are those of heads of so many, whose halves are in turn in the file: rows 0 and `h / 2` first.
    pub(crate) fn paired(&self) -> Option<usize> {
        self.stored.as_ref().and_then(|stored| stored.paired)
    }

    /// It has zero points of its own.
    pub(crate) fn has_zeros(&self) -> bool {
        self.stored.as_ref().is_some_and(|stored| stored.zeros.is_some())
    }

    /// Bytes of its files that are its own: elements or codes, scales, zero points.
    pub fn file_bytes(&self) -> u64 {
        let beside = self.stored.iter().flat_map(|s| s.beside()).map(|piece| piece.range.len());
        (self.range.len() + beside.sum::<usize>()) as u64
    }

    /// The values of as many rows as `out` holds, from row `first` on.
    ///
    /// # Panics
    /// When `out` is not whole rows of this tensor.
    pub fn values(&self, first: usize, out: &mut [f32]) {
        let (cols, bytes) = (self.cols, self.bytes());
        assert!(out.len().is_multiple_of(cols) && first + out.len() / cols <= self.rows, "rows of {self:?}");
        let stored = self.stored.as_deref();
        if let Some(stored @ Stored { format: Format::Grouped(grouped), .. }) = stored {
            return Grouped::values(grouped, [self.rows, cols], stored.parts(bytes), first, out);
        }
        let format = self.format();
        if let (Some(stored @ Stored { paired: Some(_), .. }), 1) = (stored, self.rows) {
            let mut own = vec![0f32; cols];
            self.dtype.read(bytes, &mut own); // a vector is plain
            out.iter_mut().enumerate().for_each(|(i, x)| *x = own[stored.row(i)]);
            return;
        }
        let width = format.row_bytes(cols).expect("checked when it was opened");
        for (i, out) in (first..).zip(out.chunks_exact_mut(cols)) {
            let row = stored.map_or(i, |stored| stored.row(i));
            let row = &bytes[row * width..(row + 1) * width];
            match format {
                Format::Block(block) => block.values(row, out),
                _ => self.dtype.read(row, out),
            }
        }
    }

    /// The codes of as many rows as `out` holds, from row `first` on, of a tensor that has [scales](Tensor::scales): a value is
    /// `scale * (code - zero point)`.
    pub(crate) fn codes(&self, first: usize, out: &mut [f32]) {
        let Some(stored) = self.stored.as_deref() else { return };
        match stored.format {
            Format::Grouped(grouped) => {
                grouped.codes([self.rows, self.cols], stored.parts(self.bytes()), first, out);
            }
            Format::Block(block) => {
                let width = self.cols / block.weights * block.bytes;
                for (i, out) in (first..).zip(out.chunks_exact_mut(self.cols)) {
                    let row = &self.bytes()[stored.row(i) * width..][..width];
                    for (block_bytes, out) in row.chunks_exact(block.bytes).zip(out.chunks_exact_mut(block.weights)) {
                        block.split(block_bytes, out);
                    }
                }
            }
            Format::Plain(_) => {}
        }
    }

    /// The scales and the zero points of a row, for each [group](Format::group) of columns. `None` where values are not
    /// `scale * (code - zero point)`, and where columns are not in the order of their groups.
    pub(crate) fn scales(&self, row: usize) -> Option<(Vec<f32>, Vec<f32>)> {
        let stored = self.stored.as_deref()?;
        match stored.format {
            Format::Plain(_) => None,
            Format::Grouped(_) if stored.groups.is_some() => None,
            Format::Grouped(grouped) => {
                let groups = self.cols.div_ceil(grouped.group[1]);
                let (mut scales, mut zeros) = (vec![0f32; groups], vec![0f32; groups]);
                grouped.scales(self.rows, stored.parts(self.bytes()), row, &mut scales, &mut zeros);
                Some((scales, zeros))
            }
            Format::Block(block) => {
                let width = self.cols / block.weights * block.bytes;
                let blocks = self.bytes()[stored.row(row) * width..][..width].chunks_exact(block.bytes);
                let mut codes = vec![0f32; block.weights];
                let both: Option<Vec<[f32; 2]>> = blocks.map(|b| block.split(b, &mut codes)).collect();
                Some(both?.into_iter().map(|[scale, zero]| (scale, zero)).unzip())
            }
        }
    }

    /// The same tensor as plain elements in order, of type `dtype` unless it is plain already. For a quantized one this
    /// takes new memory.
    pub(crate) fn plain(&self, dtype: Dtype) -> Tensor {
        if self.is_plain() {
            return self.clone();
        }
        let (cols, width) = (self.cols, dtype.bytes());
        let mut bytes = vec![0; self.rows * cols * width];
        let parts = bytes.par_chunks_mut(ROWS * cols * width).enumerate();
        parts.for_each_init(Vec::new, |values, (i, out)| {
            values.resize(out.len() / width, 0f32);
            self.values(i * ROWS, values);
            dtype.round(values, out);
        });
        self.with_bytes(dtype, bytes)
    }

    /// The same tensor in another format, in memory of its own: its codes or blocks, and the scales of codes.
    pub(in crate::files) fn quantized(&self, format: Format, codes: Vec<u8>, scales: Vec<u8>) -> Tensor {
        let piece = |bytes: Vec<u8>| Piece { range: 0..bytes.len(), shard: Arc::new(self.shard.owned(bytes)) };
        let codes = piece(codes);
        let scales = (!scales.is_empty()).then(|| piece(scales));
        let stored = Stored { scales, ..Stored::of(format) };
        Tensor::new(codes.shard, self.name.to_string(), [self.rows, self.cols], codes.range, stored)
    }
}
