//! Where the ops find keys and values: the cache lies in pages, and a table says which page holds which places.
//!
//! Keys, and likewise values, are `[pages of the cache, n_kv_heads, PAGE, head_dim]`. A token is found by its
//! [place](crate::model::kv), `sequence * max_seq + position`, where `max_seq` is a multiple of [`PAGE`]: its page is
//! `pages[place / PAGE]`, in which it is row `place % PAGE` of each head.
//!
//! In fp8 a page's head is [`PAGE`] rows of `head_dim` codes of e4m3, and then the [`PAGE`] bytes of their scales: a row, which is one
//! token's key or value of one head, means `code * 2^(scale - 127)`. The scale is a function of the row alone, so what is read depends
//! on no other token. The bytes lie one after the other in the buffer, whose elements are then no activations.

use super::{Act, expect};
use crate::{error::Result, files::format::e4m3, tiles};
use std::{fmt, str::FromStr};

/// Tokens of a page: those that the decode attention takes at a time.
pub const PAGE: usize = tiles::ATTN_TILE as usize;

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvDtype {
    /// As they are computed: bf16, or f32 where activations are.
    #[default]
    Auto,
    /// Bytes of e4m3, with a power of two as scale for each token and head.
    Fp8,
}

impl KvDtype {
    /// All of them.
    pub const ALL: [KvDtype; 2] = [KvDtype::Auto, KvDtype::Fp8];

    /// Bytes of a token's key, or value, of one head; `act_bytes` are those of an activation.
    pub fn row_bytes(self, head_dim: usize, act_bytes: usize) -> usize {
        match self {
            KvDtype::Auto => head_dim * act_bytes,
            KvDtype::Fp8 => head_dim + 1,
        }
    }

    /// As names of kernels have it.
    #[cfg(feature = "cuda")]
    pub(crate) fn kernels(self) -> &'static str {
        match self {
            KvDtype::Auto => "bf16",
            KvDtype::Fp8 => "fp8",
        }
    }

    /// Elements of a buffer of `A` that one head of a page takes.
    pub(crate) fn head_len<A: Act>(self, head_dim: usize) -> usize {
        PAGE * self.row_bytes(head_dim, size_of::<A>()) / size_of::<A>()
    }
}

impl fmt::Display for KvDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            KvDtype::Auto => "auto",
            KvDtype::Fp8 => "fp8",
        })
    }
}

impl FromStr for KvDtype {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let found = KvDtype::ALL.into_iter().find(|dtype| dtype.to_string() == s);
        found.ok_or_else(|| format!("{s:?}: expected auto or fp8"))
    }
}

/// Keys, or values, in the memory of the host: how they lie and which page has which places.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Paged<'a> {
    pub dtype: KvDtype,
    pub pages: &'a [u32],
    pub n_kv_heads: usize,
    pub head_dim: usize,
}

impl Paged<'_> {
    /// The first element of the page's head that a place is in, and the place's row there.
    fn find<A: Act>(&self, place: usize, kv_head: usize) -> (usize, usize) {
        let head = self.pages[place / PAGE] as usize * self.n_kv_heads + kv_head;
        (head * self.dtype.head_len::<A>(self.head_dim), place % PAGE)
    }

    /// Where the elements of a place lie that is stored as it is computed.
    pub fn elements<A: Act>(&self, place: usize, kv_head: usize) -> std::ops::Range<usize> {
        debug_assert_eq!(self.dtype, KvDtype::Auto);
        let (head, row) = self.find::<A>(place, kv_head);
        head + row * self.head_dim..head + (row + 1) * self.head_dim
    }

    /// The codes and the scales of `n` keys or values from a place on that are in the same page.
    pub fn fp8_rows<'b, A: Act>(&self, cache: &'b [A], place: usize, kv_head: usize, n: usize) -> (&'b [u8], &'b [u8]) {
        debug_assert_eq!(self.dtype, KvDtype::Fp8);
        let ((at, first), d) = (self.find::<A>(place, kv_head), self.head_dim);
        let head = &cache[at..][..self.dtype.head_len::<A>(d)];
        let (codes, scales) = bytemuck::cast_slice(head).split_at(PAGE * d);
        (&codes[first * d..][..n * d], &scales[first..][..n])
    }

    /// The key or value of a place.
    pub fn row<A: Act>(&self, cache: &[A], place: usize, kv_head: usize) -> Vec<A> {
        match self.dtype {
            KvDtype::Auto => cache[self.elements::<A>(place, kv_head)].to_vec(),
            KvDtype::Fp8 => {
                let mut row = vec![A::from_f32(0.0); self.head_dim];
                let (codes, scale) = self.fp8_rows(cache, place, kv_head, 1);
                e4m3::read_row(codes, scale[0], &mut row);
                row
            }
        }
    }

    /// Stores the key or value of a place.
    pub fn store<A: Act>(&self, cache: &mut [A], place: usize, kv_head: usize, row: &[A]) {
        let (at, i) = self.find::<A>(place, kv_head);
        let (d, head) = (self.head_dim, &mut cache[at..][..self.dtype.head_len::<A>(self.head_dim)]);
        match self.dtype {
            KvDtype::Auto => head[i * d..][..d].copy_from_slice(row),
            KvDtype::Fp8 => {
                let (codes, scales) = bytemuck::cast_slice_mut(head).split_at_mut(PAGE * d);
                scales[i] = e4m3::write_row(&mut codes[i * d..][..d], row);
            }
        }
    }
}

/// Checks what can be known of cache and table on the host: the rest is the caller's promise. `A` is the type of the buffers.
pub(super) fn expect_paged<A: Act>(
    op: &'static str,
    dtype: KvDtype,
    [n_kv_heads, head_dim, max_seq]: [usize; 3],
    [k, v, pages]: [usize; 3],
    sizes: &dyn std::fmt::Debug,
) -> Result<()> {
    expect(op, max_seq > 0 && max_seq.is_multiple_of(PAGE), || {
        format!("{sizes:?}: max_seq must be a multiple of the {PAGE} tokens of a page")
    })?;
    let page = n_kv_heads * dtype.head_len::<A>(head_dim);
    expect(op, n_kv_heads * head_dim > 0 && k >= page && v >= page && pages >= max_seq / PAGE, || {
        format!("k has {k} elements, v {v} and pages {pages}, {sizes:?}")
    })
}

/// For cases: a table for sequences of `max_seq` positions together, in which neighbours are seldom side by side.
pub fn scrambled(sequences: usize, max_seq: usize) -> Vec<u32> {
    let n = sequences * max_seq / PAGE;
    let step = [7, 11, 13, 17].into_iter().find(|step| !n.is_multiple_of(*step)).unwrap_or(1);
    (0..n).map(|i| ((i + 1) * step % n) as u32).collect()
}

/// For cases: keys or values `[sequences, n_kv_heads, max_seq, head_dim]` as they lie in the pages of a table.
pub fn to_pages<A: Act>(
    dtype: KvDtype,
    whole: &[A],
    pages: &[u32],
    [n_kv_heads, max_seq, head_dim]: [usize; 3],
) -> Vec<A> {
    let paged = Paged { dtype, pages, n_kv_heads, head_dim };
    let mut cache = vec![A::from_f32(0.0); pages.len() * n_kv_heads * dtype.head_len::<A>(head_dim)];
    for (i, row) in whole.chunks_exact(head_dim).enumerate() {
        let (head, position) = (i / max_seq, i % max_seq);
        paged.store(&mut cache, head / n_kv_heads * max_seq + position, head % n_kv_heads, row);
    }
    cache
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn every_place_has_a_row_of_its_own() {
        for sequences in 1..6 {
            let (heads, max_seq) = (2, 3 * PAGE);
            let pages = scrambled(sequences, max_seq);
            let mut sorted = pages.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..pages.len() as u32).collect::<Vec<_>>());
            let whole: Vec<f32> = (0..sequences * heads * max_seq).map(|i| i as f32).collect();
            let mut paged = to_pages(KvDtype::Auto, &whole, &pages, [heads, max_seq, 1]);
            assert_ne!(paged, whole);
            let kv = Paged { dtype: KvDtype::Auto, pages: &pages, n_kv_heads: heads, head_dim: 1 };
            let (place, value) = ((sequences - 1) * max_seq + 70, ((sequences - 1) * heads + 1) * max_seq + 70);
            assert_eq!(paged[kv.elements::<f32>(place, 1)], [value as f32]);
            assert_eq!(kv.row(&paged, place, 1), [value as f32]);
            paged.sort_unstable_by(f32::total_cmp);
            assert_eq!(paged, whole);
        }
    }

    /// Each element of the cache is written by one row, whatever the format and the type of activations.
    fn rows_do_not_touch_one_another<A: Act>(dtype: KvDtype) {
        let (heads, d, pages) = (2, 32, [1, 0]);
        let row = |i: usize| (0..d).map(|j| A::from_f32((j as f32 - 9.0) * 2f32.powi(i as i32 % 40 - 20))).collect();
        let rows: Vec<Vec<A>> = (0..2 * PAGE * heads).map(row).collect();
        let kv = Paged { dtype, pages: &pages, n_kv_heads: heads, head_dim: d };
        let mut cache: Vec<A> = vec![A::zeroed(); rows.len() * dtype.row_bytes(d, size_of::<A>()) / size_of::<A>()];
        bytemuck::cast_slice_mut::<A, u8>(&mut cache).fill(0xFF);
        // whatever the order
        (0..rows.len()).rev().for_each(|i| kv.store(&mut cache, i / heads, i % heads, &rows[i]));
        for (i, want) in rows.iter().enumerate() {
            for (got, want) in kv.row(&cache, i / heads, i % heads).iter().zip(want) {
                let (got, want) = (got.to_f32(), want.to_f32());
                let limit = if dtype == KvDtype::Fp8 { want.abs() / 16.0 } else { 0.0 };
                assert!((got - want).abs() <= limit, "{got} is not {want}, row {i}");
            }
        }
        if dtype == KvDtype::Fp8 {
            let bytes: &[u8] = bytemuck::cast_slice(&cache);
            assert!(bytes.iter().all(|byte| *byte != 0xFF), "a byte was not written");
        }
    }

    #[test]
    fn rows_do_not_touch_one_another_in_any_format() {
        for dtype in KvDtype::ALL {
            rows_do_not_touch_one_another::<bf16>(dtype);
            rows_do_not_touch_one_another::<f32>(dtype);
        }
    }

    #[test]
    fn formats_have_names() {
        for dtype in KvDtype::ALL {
            assert_eq!(dtype.to_string().parse::<KvDtype>().unwrap(), dtype);
        }
        assert_eq!("int8".parse::<KvDtype>().unwrap_err(), "\"int8\": expected auto or fp8");
        assert_eq!(KvDtype::ALL.map(|dtype| dtype.row_bytes(128, 2)), [256, 129]);
        assert_eq!(KvDtype::ALL.map(|dtype| dtype.head_len::<f32>(128)), [64 * 128, 16 * 129]);
    }

    #[test]
    fn what_is_no_cache_is_named() {
        let auto =
            |max_seq, k, pages| expect_paged::<bf16>("op", KvDtype::Auto, [2, 8, max_seq], [k, 1024, pages], &"sizes");
        assert!(auto(128, 1024, 2).is_ok());
        let text = |r: Result<()>| r.unwrap_err().to_string();
        assert!(text(auto(100, 1024, 2)).ends_with("max_seq must be a multiple of the 64 tokens of a page"));
        assert!(text(auto(128, 1023, 2)).contains("k has 1023 elements, v 1024 and pages 2"));
        assert!(text(auto(128, 1024, 1)).contains("pages 1"));
        let fp8 = |k| expect_paged::<bf16>("op", KvDtype::Fp8, [2, 8, 128], [k, 1024, 2], &"sizes");
        assert!(fp8(64 * 9).is_ok());
        assert!(text(fp8(64 * 9 - 1)).contains("k has 575 elements"));
    }
}
