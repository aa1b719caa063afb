//! The KV cache: keys and values of all tokens so far. No other file knows its layout.
//!
//! Keys and values lie in pages of [`PAGE`] tokens, taken from one pool. For each layer, `k` and `v` are [pages,
//! n_kv_heads, PAGE, head_dim]: the keys of one head in a page lie one after the other, so that a block of the attention
//! kernel can stream them. A token is found by one number, its *place*: `sequence * max_seq + position`. A table says
//! for each PAGE places which page has them; sequences whose texts begin alike may name the same page. A place is written
//! when its token is computed; places beyond the present length of a sequence are never read.
//!
//! In fp8 ([`KvDtype`]) a row has a byte an element and one for its scale, and the buffers' elements are only their room: see `ops/paged.rs`.

use crate::{
    backend::Backend,
    error::Result,
    files::{config::Config, session_file::Sink},
    ops::{Act, KvDtype, PAGE},
};
use std::ops::Range;

/// Keys and values of all layers and sequences.
pub struct Kv<B: Backend> {
    /// How keys and values are stored.
    pub dtype: KvDtype,
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
    pub fn bytes(config: &Config, dtype: KvDtype, tokens: usize) -> u64 {
        let row = dtype.row_bytes(config.head_dim, size_of::<B::Act>());
        (2 * config.n_layers * config.n_kv_heads * row) as u64 * tokens as u64
    }

    /// An empty cache, in which each sequence has the pages for `max_tokens` tokens to itself.
    pub fn new(b: &B, config: &Config, dtype: KvDtype, sequences: usize, max_tokens: usize) -> Result<Self> {
        let each = pages_for(max_tokens);
        let mut kv = Kv::with_pool(b, config, dtype, sequences, max_tokens, sequences * each)?;
        let all: Vec<u32> = (0..(sequences * each) as u32).collect();
        for (sequence, pages) in all.chunks_exact(each).enumerate() {
            kv.set_pages(b, sequence, 0, pages)?;
        }
        Ok(kv)
    }

    /// An empty cache with a pool of `pages` pages, of which [`Kv::set_pages`] gives some to its sequences.
    pub fn with_pool(
        b: &B,
        config: &Config,
        dtype: KvDtype,
        sequences: usize,
        max_tokens: usize,
        pages: usize,
    ) -> Result<Self> {
        let layer = || b.alloc(pages * Self::page_len(config, dtype));
        let max_seq = pages_for(max_tokens) * PAGE;
        let table = vec![0; sequences * max_seq / PAGE];
        Ok(Kv {
            dtype,
            k: (0..config.n_layers).map(|_| layer()).collect::<Result<_>>()?,
            v: (0..config.n_layers).map(|_| layer()).collect::<Result<_>>()?,
            pages: b.alloc(table.len())?,
            max_seq,
            table,
            room: vec![0; sequences],
            max_tokens,
        })
    }

    /// Elements of a page's buffer.
    fn page_len(config: &Config, dtype: KvDtype) -> usize {
        config.n_kv_heads * dtype.head_len::<B::Act>(config.head_dim)
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
        let len = Self::page_len(config, self.dtype);
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

    /// Gives the bytes of the first `len` positions of sequence 0: of each layer its keys and then its values, head by head; of a row in
    /// fp8 its codes and then its scale.
    pub(crate) fn save(&self, b: &B, config: &Config, len: usize, to: &mut Sink<'_>) -> Result<()> {
        let rows = Rows::of::<B>(config, self.dtype);
        let (mut heads, mut page) = (vec![0; config.n_kv_heads * len * rows.bytes()], self.zeros(config));
        for buf in self.k.iter().zip(&self.v).flat_map(|(k, v)| [k, v]) {
            for (number, at) in self.pages_of_first(len) {
                let first = number * page.len();
                b.read(&mut page, buf, first)?;
                let of_page = bytemuck::cast_slice(&page).chunks_exact(PAGE * rows.bytes());
                for (head, of_page) in heads.chunks_exact_mut(len * rows.bytes()).zip(of_page) {
                    let head = &mut head[at.start * rows.bytes()..at.end * rows.bytes()];
                    rows.each(at.len(), |in_page, in_row| head[in_row].copy_from_slice(&of_page[in_page]));
                }
            }
            to(&heads)?;
        }
        Ok(())
    }

    /// The way back; `bytes` are whole.
    pub(crate) fn load(&mut self, b: &B, config: &Config, len: usize, bytes: &[u8]) -> Result<()> {
        let rows = Rows::of::<B>(config, self.dtype);
        let (pages, mut page) = (self.pages_of_first(len).collect::<Vec<_>>(), self.zeros(config));
        let mut layers = bytes.chunks_exact(config.n_kv_heads * len * rows.bytes());
        for buf in self.k.iter_mut().zip(&mut self.v).flat_map(|(k, v)| [k, v]) {
            let heads = layers.next().unwrap_or_default();
            for (number, at) in &pages {
                let first = number * page.len();
                let of_page = bytemuck::cast_slice_mut(&mut page).chunks_exact_mut(PAGE * rows.bytes());
                for (head, of_page) in heads.chunks_exact(len * rows.bytes()).zip(of_page) {
                    let head = &head[at.start * rows.bytes()..at.end * rows.bytes()];
                    rows.each(at.len(), |in_page, in_row| of_page[in_page].copy_from_slice(&head[in_row]));
                }
                b.write(buf, first, &page)?;
            }
        }
        Ok(())
    }

    /// Room for a page of one buffer.
    fn zeros(&self, config: &Config) -> Vec<B::Act> {
        vec![B::Act::from_f32(0.0); Self::page_len(config, self.dtype)]
    }
}

/// The parts of which a row of a head consists: one, or in fp8 codes and a scale. `(bytes, where those of row 0 lie in a page)`
struct Rows(Vec<(usize, usize)>);

impl Rows {
    fn of<B: Backend>(config: &Config, dtype: KvDtype) -> Rows {
        let d = config.head_dim;
        Rows(match dtype {
            KvDtype::Auto => vec![(d * size_of::<B::Act>(), 0)],
            KvDtype::Fp8 => vec![(d, 0), (1, PAGE * d)],
        })
    }

    /// Of a row.
    fn bytes(&self) -> usize {
        self.0.iter().map(|(bytes, _)| bytes).sum()
    }

    /// Calls `f` for each part of the first rows with its bytes in the page and in rows that lie one after the other.
    fn each(&self, rows: usize, mut f: impl FnMut(Range<usize>, Range<usize>)) {
        for row in 0..rows {
            let mut at = row * self.bytes();
            for (bytes, first) in &self.0 {
                let in_page = first + row * bytes;
                f(in_page..in_page + bytes, at..at + bytes);
                at += bytes;
            }
        }
    }
}
