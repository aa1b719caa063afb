//! The pool of pages: who has which page of the KV cache, and which pages hold the beginnings of prompts that others may use.
//!
//! Pages of prompts form a tree: a page is known by the page before it and its own tokens. A whole page is shared by reference, since
//! nobody writes it any more; of one in which a prompt ends, or that goes on differently, the common part is copied. Pages that no job
//! has stay in the tree until a page is wanted and none is free: then the one goes that was not used for the longest time.

use crate::ops::PAGE;
use std::collections::{BTreeSet, HashMap};

/// All pages.
pub struct Pool {
    pages: Vec<Page>,
    /// Pages that hold nothing of use.
    free: Vec<u32>,
    /// Pages of the tree that no job has, by when they were used. A page is always younger than those after it in the tree: see
    /// [`Pool::give_back`].
    idle: BTreeSet<(u64, u32)>,
    /// For each page of the tree, those after it; for `None`, first pages.
    after: HashMap<Option<u32>, Vec<u32>>,
    clock: u64,
}

#[derive(Default, Clone)]
struct Page {
    /// Jobs that have it.
    jobs: u32,
    /// When the last of them gave it back.
    used: u64,
    /// What it holds of a prompt, if it is in the tree.
    node: Option<Node>,
}

#[derive(Clone)]
struct Node {
    before: Option<u32>,
    /// At most PAGE; fewer if the prompt ends in it.
    tokens: Vec<u32>,
}

/// What the tree holds of a prompt.
#[derive(Debug, Default, PartialEq)]
pub struct Found {
    /// Whole pages from the first on.
    pub pages: Vec<u32>,
    /// The page after these, of which the first tokens, so many, are the prompt's.
    pub rest: Option<(u32, usize)>,
}

impl Found {
    /// How many tokens.
    pub fn tokens(&self) -> usize {
        self.pages.len() * PAGE + self.rest.map_or(0, |(_, n)| n)
    }
}

impl Pool {
    /// This many free pages.
    pub fn new(pages: usize) -> Pool {
        Pool {
            pages: vec![Page::default(); pages],
            free: (0..pages as u32).rev().collect(),
            idle: BTreeSet::new(),
            after: HashMap::new(),
            clock: 0,
        }
    }

    /// How many pages there are.
    pub fn size(&self) -> usize {
        self.pages.len()
    }

    /// Pages that could be taken.
    pub fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// A page for one job, to be written by it.
    pub fn take(&mut self) -> Option<u32> {
        let page = match self.free.pop() {
            Some(page) => page,
            None => {
                let (_, page) = self.idle.pop_first()?;
                self.forget(page);
                page
            }
        };
        self.pages[page as usize].jobs = 1;
        Some(page)
    }

    /// One more job has these pages.
    pub fn share(&mut self, pages: &[u32]) {
        for &page in pages {
            let Page { jobs, used, .. } = &mut self.pages[page as usize];
            *jobs += 1;
            if *jobs == 1 {
                self.idle.remove(&(*used, page));
            }
        }
    }

    /// A job gives up pages that follow each other in its sequence.
    pub fn give_back(&mut self, pages: &[u32]) {
        // The last one first. Whoever has a page has those before it too, so these are given up later, at a later time, and a page
        // that is forgotten never leaves one after it behind.
        for &page in pages.iter().rev() {
            self.clock += 1;
            let Page { jobs, used, node } = &mut self.pages[page as usize];
            *jobs -= 1;
            match (*jobs, &node) {
                (0, Some(_)) => {
                    *used = self.clock;
                    self.idle.insert((*used, page));
                }
                (0, None) => self.free.push(page),
                _ => {}
            }
        }
    }

    /// What the tree holds of a prompt, up to its first `most` tokens.
    pub fn find(&self, prompt: &[u32], most: usize) -> Found {
        let (mut found, mut left, mut before) = (Found::default(), &prompt[..most.min(prompt.len())], None);
        loop {
            let common = |page: u32| {
                let tokens = self.pages[page as usize].node.iter().flat_map(|n| &n.tokens);
                tokens.zip(left).take_while(|(a, b)| a == b).count()
            };
            let pages = self.after.get(&before).into_iter().flatten();
            match pages.map(|&page| (page, common(page))).max_by_key(|(_, n)| *n) {
                Some((page, PAGE)) => {
                    found.pages.push(page);
                    (left, before) = (&left[PAGE..], Some(page));
                }
                Some((page, n)) if n > 0 => {
                    found.rest = Some((page, n));
                    return found;
                }
                _ => return found,
            }
        }
    }

    /// Puts a page of a prompt into the tree, after the page `before`, which is there. `false` if the same tokens are there already.
    pub fn hold(&mut self, before: Option<u32>, page: u32, tokens: &[u32]) -> bool {
        let after = self.after.entry(before).or_default();
        let holds = |other: &u32| self.pages[*other as usize].node.iter().any(|n| n.tokens.starts_with(tokens));
        if after.iter().any(holds) {
            return false;
        }
        after.push(page);
        self.pages[page as usize].node = Some(Node { before, tokens: tokens.to_vec() });
        true
    }

    /// Takes a page out of the tree; none is after it.
    fn forget(&mut self, page: u32) {
        let Some(Node { before, .. }) = self.pages[page as usize].node.take() else { return };
        debug_assert!(!self.after.contains_key(&Some(page)), "page {page} has others after it");
        if let Some(after) = self.after.get_mut(&before) {
            after.retain(|other| *other != page);
            if after.is_empty() {
                self.after.remove(&before);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tokens(len: usize, salt: u32) -> Vec<u32> {
        (0..len as u32).map(|i| i * 7 + salt).collect()
    }

    /// Takes pages for a prompt of which `reused` tokens are found, and puts them into the tree.
    fn add(pool: &mut Pool, prompt: &[u32]) -> Vec<u32> {
        let mut pages = pool.find(prompt, prompt.len()).pages;
        pool.share(&pages);
        for part in prompt.chunks(PAGE).skip(pages.len()) {
            let page = pool.take().unwrap();
            pool.hold(pages.last().copied(), page, part);
            pages.push(page);
        }
        pages
    }

    #[test]
    fn a_prompt_is_found_as_far_as_it_is_the_same() {
        let mut pool = Pool::new(8);
        let prompt = tokens(200, 1);
        let pages = add(&mut pool, &prompt);
        let found = pool.find(&prompt, 183);
        assert_eq!(found, Found { pages: pages[..2].to_vec(), rest: Some((pages[2], 183 - 128)) });
        assert_eq!(found.tokens(), 183);
        let rest = Some((pages[3], 8));
        assert_eq!(pool.find(&tokens(300, 1), 283), Found { pages: pages[..3].to_vec(), rest });
        let mut other = prompt.clone();
        other[100] = 0;
        assert_eq!(pool.find(&other, 200), Found { pages: pages[..1].to_vec(), rest: Some((pages[1], 36)) });
        assert_eq!(pool.find(&tokens(200, 2), 200), Found::default());
        assert_eq!(pool.find(&prompt, 0), Found::default());
    }

    #[test]
    fn the_same_tokens_are_held_once() {
        let mut pool = Pool::new(8);
        let first = add(&mut pool, &tokens(70, 1));
        let again = pool.take().unwrap();
        assert!(!pool.hold(None, again, &tokens(64, 1)));
        assert!(
            !pool.hold(Some(first[0]), again, &tokens(70, 1)[64..68]),
            "it is the beginning of a page that is held"
        );
        assert!(pool.hold(Some(first[0]), again, &tokens(90, 1)[64..]), "longer than what is held");
        assert_eq!(pool.find(&tokens(90, 1), 90).rest, Some((again, 26)));
    }

    #[test]
    fn the_page_that_was_not_used_for_longest_goes_and_the_last_of_a_prompt_first() {
        let mut pool = Pool::new(6);
        let [old, new] = [1, 2].map(|salt| add(&mut pool, &tokens(150, salt)));
        pool.give_back(&old);
        pool.give_back(&new);
        assert_eq!(pool.available(), 6);
        assert_eq!([(); 4].map(|()| pool.take().unwrap()), [old[2], old[1], old[0], new[2]]);
        assert_eq!(pool.find(&tokens(150, 2), 150).pages, new[..2]);
        pool.share(&new[..2]);
        assert_eq!((pool.take(), pool.available()), (None, 0), "all pages are in use");
    }

    #[derive(Debug, Clone)]
    enum Action {
        /// A job with a prompt of this kind and length, and this many pages for its answer.
        Begin(u32, usize, usize),
        /// The end of one of the jobs.
        End(usize),
        Grow(usize),
    }

    fn action() -> impl Strategy<Value = Action> {
        prop_oneof![
            (0..3u32, 1..400usize, 0..3usize).prop_map(|(kind, len, more)| Action::Begin(kind, len, more)),
            any::<usize>().prop_map(Action::End),
            any::<usize>().prop_map(Action::Grow),
        ]
    }

    /// Prompts of a kind begin alike and go on alike for a while.
    fn prompt(kind: u32, len: usize) -> Vec<u32> {
        (0..len).map(|i| if i < 150 { kind } else { (len / 100) as u32 }).collect()
    }

    proptest! {
        #[test]
        fn a_page_has_one_writer_and_all_come_back(size in 7..40usize, actions in prop::collection::vec(action(), 1..80)) {
            let mut pool = Pool::new(size);
            // pages of each job, and how many of them are shared
            let mut jobs: Vec<(Vec<u32>, usize)> = Vec::new();
            for action in actions {
                match action {
                    Action::Begin(kind, len, more) => {
                        let prompt = prompt(kind, len);
                        let found = pool.find(&prompt, len.saturating_sub(17));
                        prop_assert!(found.tokens() <= len.saturating_sub(17));
                        for (page, part) in found.pages.iter().zip(prompt.chunks(PAGE)) {
                            prop_assert_eq!(&pool.pages[*page as usize].node.as_ref().unwrap().tokens[..], part);
                        }
                        let mut pages = found.pages;
                        pool.share(&pages);
                        let (shared, mut held) = (pages.len(), pages.len());
                        for i in shared..len.div_ceil(PAGE) + more {
                            let Some(page) = pool.take() else { break };
                            if let Some(part) = prompt.chunks(PAGE).nth(i).filter(|_| held == i) {
                                held += usize::from(pool.hold(pages.last().copied(), page, part));
                            }
                            pages.push(page);
                        }
                        jobs.push((pages, shared));
                    }
                    Action::End(i) if !jobs.is_empty() => {
                        let (pages, _) = jobs.swap_remove(i % jobs.len());
                        pool.give_back(&pages);
                    }
                    Action::Grow(i) if !jobs.is_empty() => {
                        let i = i % jobs.len();
                        jobs[i].0.extend(pool.take());
                    }
                    _ => {}
                }
                let mut written = std::collections::HashMap::new();
                for (pages, shared) in &jobs {
                    for page in &pages[*shared..] {
                        *written.entry(*page).or_insert(0) += 1;
                    }
                }
                prop_assert!(written.values().all(|jobs| *jobs == 1), "a page is written by two jobs");
                for (i, page) in pool.pages.iter().enumerate() {
                    let having = jobs.iter().filter(|(pages, _)| pages.contains(&(i as u32))).count();
                    prop_assert_eq!(page.jobs as usize, having);
                }
                let used = pool.pages.iter().filter(|p| p.jobs > 0).count();
                prop_assert_eq!(used + pool.available(), size);
            }
            jobs.iter().for_each(|(pages, _)| pool.give_back(pages));
            prop_assert_eq!(pool.available(), size);
            let mut all: Vec<u32> = std::iter::from_fn(|| pool.take()).collect();
            all.sort_unstable();
            prop_assert_eq!(all, (0..size as u32).collect::<Vec<_>>());
            prop_assert!(pool.after.is_empty());
        }
    }
}
