//! The KV cache: keys and values of all tokens so far. No other file knows its layout.
//!
//! Keys and values lie in pages of [`PAGE`] tokens, taken from one pool. For each layer, `k` and `v` are [pages,
//! n_kv_heads, PAGE, head_dim]: the keys of one head in a page lie one after the other, so that a block of the attention
//! kernel can stream them. A token is found by one number, its *place*: `sequence * max_seq + position`. A table says
//! for each PAGE places which page has them; sequences whose texts begin alike may name the same page. A place is written
//! when its token is computed; places beyond the present length of a sequence are never read.

use crate::{
    backend::Backend,
    error::Result,
    files::{config::Config, session_file::Sink},
    ops::{Act, PAGE},
};
use std::ops::Range;

/// Keys and values of all layers and sequences.
pub struct Kv<B: Backend> {
    /// Per layer, [pages, n_kv_heads, PAGE, head_dim].
    pub k: Vec<B::Buf<B::Act>>,
    /// Per layer, [pages, n_kv_heads, PAGE, head_dim].
    pub v: Vec<B::Buf<B::Act>>,
    /// The table: a page for each PAGE places. [sequences, max_seq / PAGE]
    pub pages: B::Buf<u32>,
    /// Positions of a sequence: a multiple of PAGE.
    pub max_seq: usize,
    /// The table, as the host knows it.
    table: Vec<u32>,
    /// For each sequence, how many positions from the first on have a page and are below its capacity in tokens.
    room: Vec<usize>,
    max_tokens: usize,
}

/// Pages that hold this many tokens of one sequence.
pub fn pages_for(tokens: usize) -> usize {
    tokens.div_ceil(PAGE)
}

impl<B: Backend> Kv<B> {
    /// Bytes of the keys and values of this many tokens.
    pub fn bytes(config: &Config, tokens: usize) -> u64 {
        (2 * config.n_layers * config.kv_dim() * size_of::<B::Act>()) as u64 * tokens as u64
    }

    /// An empty cache, in which each sequence has the pages for `max_tokens` tokens to itself.
    pub fn new(b: &B, config: &Config, sequences: usize, max_tokens: usize) -> Result<Self> {
        let each = pages_for(max_tokens);
        let mut kv = Kv::with_pool(b, config, sequences, max_tokens, sequences * each)?;
        let all: Vec<u32> = (0..(sequences * each) as u32).collect();
        for (sequence, pages) in all.chunks_exact(each).enumerate() {
            kv.set_pages(b, sequence, 0, pages)?;
        }
        Ok(kv)
    }

    /// An empty cache with a pool of `pages` pages, of which [`Kv::set_pages`] gives some to its sequences.
    pub fn with_pool(b: &B, config: &Config, sequences: usize, max_tokens: usize, pages: usize) -> Result<Self> {
        let layer = || b.alloc(pages * config.kv_dim() * PAGE);
        let max_seq = pages_for(max_tokens) * PAGE;
        let table = vec![0; sequences * max_seq / PAGE];
        Ok(Kv {
            k: (0..config.n_layers).map(|_| layer()).collect::<Result<_>>()?,
            v: (0..config.n_layers).map(|_| layer()).collect::<Result<_>>()?,
            pages: b.alloc(table.len())?,
            max_seq,
            table,
            room: vec![0; sequences],
            max_tokens,
        })
    }

    /// The place of a position.
    pub fn place(&self, sequence: usize, pos: usize) -> u32 {
        debug_assert!(pos < self.room(sequence), "position {pos} of sequence {sequence} has no page");
        (sequence * self.max_seq + pos) as u32
    }

    /// Capacity of a sequence in tokens.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// How many positions of a sequence, from the first on, can be written.
    pub fn room(&self, sequence: usize) -> usize {
        self.room[sequence]
    }

    /// Gives a sequence `pages` from its page `first` on, and takes those after them away. The caller ensures that a page which
    /// several sequences have is never written by a step.
    pub fn set_pages(&mut self, b: &B, sequence: usize, first: usize, pages: &[u32]) -> Result<()> {
        let at = sequence * (self.max_seq / PAGE) + first;
        self.table[at..at + pages.len()].copy_from_slice(pages);
        self.room[sequence] = ((first + pages.len()) * PAGE).min(self.max_tokens);
        if pages.is_empty() { Ok(()) } else { b.write(&mut self.pages, at, pages) }
    }

    /// Copies page `from` to page `to`, another one.
    pub fn copy_page(&mut self, b: &B, config: &Config, to: u32, from: u32) -> Result<()> {
        let len = config.kv_dim() * PAGE;
        self.k
            .iter_mut()
            .chain(&mut self.v)
            .try_for_each(|buf| b.copy(buf, to as usize * len, from as usize * len, len))
    }

    /// The pages of the first `len` positions of sequence 0, and the positions that each has.
    fn pages_of_first(&self, len: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
        self.table.iter().enumerate().take(pages_for(len)).map(move |(i, page)| {
            let first = i * PAGE;
            (*page as usize, first..len.min(first + PAGE))
        })
    }

    /// Gives the bytes of the first `len` positions of sequence 0: of each layer its keys and then its values, head by head.
    pub(crate) fn save(&self, b: &B, config: &Config, len: usize, to: &mut Sink<'_>) -> Result<()> {
        let (d, zero) = (config.head_dim, B::Act::from_f32(0.0));
        let (mut heads, mut of_page) = (vec![zero; config.kv_dim() * len], vec![zero; config.kv_dim() * PAGE]);
        for buf in self.k.iter().zip(&self.v).flat_map(|(k, v)| [k, v]) {
            for (page, at) in self.pages_of_first(len) {
                b.read(&mut of_page, buf, page * config.kv_dim() * PAGE)?;
                for (head, keys) in heads.chunks_exact_mut(len * d).zip(of_page.chunks_exact(PAGE * d)) {
                    head[at.start * d..at.end * d].copy_from_slice(&keys[..at.len() * d]);
                }
            }
            to(bytemuck::cast_slice(&heads))?;
        }
        Ok(())
    }

    /// The way back; `bytes` are whole.
    pub(crate) fn load(&mut self, b: &B, config: &Config, len: usize, bytes: &[u8]) -> Result<()> {
        let (d, pages) = (config.head_dim, self.pages_of_first(len).collect::<Vec<_>>());
        let mut layers = bytes.chunks_exact(config.kv_dim() * len * size_of::<B::Act>());
        let mut of_page = vec![B::Act::from_f32(0.0); config.kv_dim() * PAGE];
        for buf in self.k.iter_mut().zip(&mut self.v).flat_map(|(k, v)| [k, v]) {
            // a file's bytes need not be aligned
            let heads: Vec<B::Act> = bytemuck::pod_collect_to_vec(layers.next().unwrap_or_default());
            for (page, at) in &pages {
                for (head, keys) in heads.chunks_exact(len * d).zip(of_page.chunks_exact_mut(PAGE * d)) {
                    keys[..at.len() * d].copy_from_slice(&head[at.start * d..at.end * d]);
                }
                b.write(buf, page * config.kv_dim() * PAGE, &of_page)?;
            }
        }
        Ok(())
    }
}
