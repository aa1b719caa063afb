//! Working memory of each thread, which is kept: an op allocates nothing after the first call of its size.

use super::simd::Line;
use std::{cell::Cell, thread::LocalKey};

thread_local! {
    /// Prepared rows of a product's `x`.
    pub(super) static X: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
    /// Keys or values that are stored in another format.
    pub(super) static ROWS: Cell<Vec<u32>> = const { Cell::new(Vec::new()) };
    /// An unpacked block of weights.
    pub(super) static PACKED: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
    /// A block of a product.
    pub(super) static Y: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    /// Scores of the queries of a tile.
    pub(super) static SCORES: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    /// Parts of attention before they are merged.
    pub(super) static PARTS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    /// The merged parts of a tile.
    pub(super) static SUMS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    /// The same for all tiles, between two waves of parts.
    pub(super) static SUMS_OF_TILES: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    /// The sampler's weights of tokens.
    pub(super) static WEIGHTS: Cell<Vec<u64>> = const { Cell::new(Vec::new()) };
    /// Tokens that it may draw.
    pub(super) static IDS: Cell<Vec<u32>> = const { Cell::new(Vec::new()) };
    /// A block of the second factor of sums of rows.
    pub(super) static PANEL: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    /// Activations in f32.
    pub(super) static WIDE: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    /// Logits of a chunk of labels.
    pub(super) static LOGITS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    /// The largest logit of each row, its place and the sum of the others' weights.
    pub(super) static BEST: Cell<Vec<(usize, f64)>> = const { Cell::new(Vec::new()) };
}

/// Calls `f` with at least `len` elements of this thread's memory, which contain anything.
pub(super) fn with<T: Clone + Default, R>(
    slot: &'static LocalKey<Cell<Vec<T>>>,
    len: usize,
    f: impl FnOnce(&mut [T]) -> R,
) -> R {
    let mut memory = slot.take();
    if memory.len() < len {
        memory.resize(len, T::default());
    }
    let result = f(&mut memory[..len]);
    slot.set(memory);
    result
}
