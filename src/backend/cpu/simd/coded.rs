//! Rows of quantized weights whose scales are beside their codes.

/// What codes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// 8 bits, with sign once the zero point is taken off.
    Int8,
    /// e4m3, with scales that are 2^8 of what they would be.
    E4m3,
    /// 4 bits, the lower ones first.
    Int4,
}

/// Rows of codes.
#[derive(Clone, Copy, Debug)]
pub struct Coded<'a> {
    pub kind: Kind,
    /// [rows, width]
    pub codes: &'a [u8],
    pub width: usize,
    /// [rows, groups]
    pub scales: &'a [f32],
    /// Not of e4m3. [rows, groups]
    pub zeros: &'a [u8],
    pub groups: usize,
    /// A group has `32 << shift` columns.
    pub shift: u32,
}
