//! Where the ops find keys and values: the cache lies in pages, and a table says which page holds which places.
//!
//! Keys, and likewise values, are `[pages of the cache, n_kv_heads, PAGE, head_dim]`. A token is found by its
//! [place](crate::model::kv), `sequence * max_seq + position`, where `max_seq` is a multiple of [`PAGE`]: its page is
//! `pages[place / PAGE]`, in which it is row `place % PAGE` of each head.

use super::expect;
use crate::{error::Result, tiles};

/// Tokens of a page: those that the decode attention takes at a time.
pub const PAGE: usize = tiles::ATTN_TILE as usize;

/// The first element of a place's key or value.
pub(crate) fn element_at(pages: &[u32], place: usize, n_kv_heads: usize, kv_head: usize, head_dim: usize) -> usize {
    ((pages[place / PAGE] as usize * n_kv_heads + kv_head) * PAGE + place % PAGE) * head_dim
}

/// Checks what can be known of cache and table on the host: the rest is the caller's promise.
pub(super) fn expect_paged(
    op: &'static str,
    [n_kv_heads, head_dim, max_seq]: [usize; 3],
    [k, v, pages]: [usize; 3],
    sizes: &dyn std::fmt::Debug,
) -> Result<()> {
    expect(op, max_seq > 0 && max_seq.is_multiple_of(PAGE), || {
        format!("{sizes:?}: max_seq must be a multiple of the {PAGE} tokens of a page")
    })?;
    let page = n_kv_heads * PAGE * head_dim;
    expect(op, page > 0 && k >= page && v >= page && pages >= max_seq / PAGE, || {
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
pub fn to_pages<T: Copy>(whole: &[T], pages: &[u32], [n_kv_heads, max_seq, head_dim]: [usize; 3]) -> Vec<T> {
    let mut paged = whole.to_vec();
    for (i, row) in whole.chunks_exact(head_dim).enumerate() {
        let (head, position) = (i / max_seq, i % max_seq);
        let place = head / n_kv_heads * max_seq + position;
        let at = element_at(pages, place, n_kv_heads, head % n_kv_heads, head_dim);
        paged[at..at + head_dim].copy_from_slice(row);
    }
    paged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_has_a_row_of_its_own() {
        for sequences in 1..6 {
            let (heads, max_seq) = (2, 3 * PAGE);
            let pages = scrambled(sequences, max_seq);
            let mut sorted = pages.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..pages.len() as u32).collect::<Vec<_>>());
            let whole: Vec<usize> = (0..sequences * heads * max_seq).collect();
            let mut paged = to_pages(&whole, &pages, [heads, max_seq, 1]);
            assert_ne!(paged, whole);
            let at = element_at(&pages, (sequences - 1) * max_seq + 70, heads, 1, 1);
            assert_eq!(paged[at], ((sequences - 1) * heads + 1) * max_seq + 70);
            paged.sort_unstable();
            assert_eq!(paged, whole);
        }
    }

    #[test]
    fn what_is_no_cache_is_named() {
        let check = |max_seq, k, pages| expect_paged("op", [2, 8, max_seq], [k, 1024, pages], &"sizes");
        assert!(check(128, 1024, 2).is_ok());
        let text = |r: Result<()>| r.unwrap_err().to_string();
        assert!(text(check(100, 1024, 2)).ends_with("max_seq must be a multiple of the 64 tokens of a page"));
        assert!(text(check(128, 1023, 2)).contains("k has 1023 elements, v 1024 and pages 2"));
        assert!(text(check(128, 1024, 1)).contains("pages 1"));
    }
}
