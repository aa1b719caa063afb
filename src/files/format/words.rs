//! Words in which formats of Hugging Face checkpoints pack their codes.

/// Words of 32 bits.
pub(super) fn words(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b))
}

/// Word `i`.
pub(super) fn word(bytes: &[u8], i: usize) -> u32 {
    u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
}
