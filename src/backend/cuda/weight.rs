//! A matrix on the device, and how its weights are stored there.

use super::Buffer;
use crate::backend;

/// Rows and columns of a record.
pub(super) const ROWS: usize = 8;
pub(super) const COLUMNS: usize = 64;
/// Bytes of a record beside its codes: 4 for each row.
pub(super) const SCALES: usize = 4 * ROWS;

/// How the weights of a matrix are stored on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// bf16, row by row.
    #[default]
    Bf16,
    /// 8-bit integers with an f16 scale for each 32 columns.
    Q8,
    /// 8-bit integers with an f32 scale for each 64 columns.
    I8,
    /// e4m3 with an f32 scale for each 64 columns.
    F8,
    /// 4-bit integers less 8, with an f16 scale for each 32 columns.
    Q4,
    /// 4-bit integers less a zero point, with an f16 scale for each 64 columns.
    I4,
}

impl Kind {
    /// Its name in the names of kernels.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Bf16 => "bf16",
            Kind::Q8 => "q8",
            Kind::I8 => "i8",
            Kind::F8 => "f8",
            Kind::Q4 => "q4",
            Kind::I4 => "i4",
        }
    }

    /// Bytes of a record; `None` for bf16, which has no records.
    pub fn record(self) -> Option<usize> {
        match self {
            Kind::Bf16 => None,
            Kind::Q8 | Kind::I8 | Kind::F8 => Some(ROWS * COLUMNS + SCALES),
            Kind::Q4 | Kind::I4 => Some(ROWS * COLUMNS / 2 + SCALES),
        }
    }

    /// Bytes of a matrix.
    pub fn bytes(self, rows: usize, cols: usize) -> usize {
        self.record().map_or(2 * rows * cols, |record| rows / ROWS * cols.div_ceil(COLUMNS) * record)
    }

    /// Columns that share a scale.
    pub(super) fn group(self) -> usize {
        if matches!(self, Kind::Q8 | Kind::Q4) { COLUMNS / 2 } else { COLUMNS }
    }
}

/// A matrix [rows, cols] on the device.
pub struct Weight {
    /// Its elements; for a packed (quantized) matrix its records, as words of 16 bits.
    pub data: Buffer<half::bf16>,
    /// `n` of a matrix product.
    pub rows: usize,
    /// `k` of a matrix product.
    pub cols: usize,
    /// How its data is encoded.
    pub kind: Kind,
    /// What products add to each column of their result. `[rows]`
    pub bias: Option<Buffer<half::bf16>>,
}

impl backend::Shaped for Weight {
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }
}
