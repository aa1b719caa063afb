//! The prefix cache: which keys and values of earlier prompts each sequence still holds, and which sequence a new
//! prompt should take so that most of it is already computed.

/// Copying the beginning of a prompt from another sequence is worth it from this many tokens on: a copy is two
/// transfers a layer and head, while computing a few tokens more hardly lengthens a pass over the weights.
const WORTH_COPYING: usize = 32;

/// What the cache of a sequence holds.
#[derive(Debug, Default)]
pub struct Held {
    /// A prompt, or its beginning.
    pub tokens: Vec<u32>,
    /// When it was last used, by the batch's clock.
    pub used: u64,
    /// A job uses it.
    pub busy: bool,
}

/// Where a prompt goes.
#[derive(Debug, PartialEq)]
pub struct Choice {
    /// Its sequence.
    pub sequence: usize,
    /// Tokens that need not be computed.
    pub reused: usize,
    /// The other sequence that they are copied from, if any.
    pub from: Option<usize>,
}

/// Chooses the sequence for a prompt of which up to `most` tokens may be reused: the free one that holds most of it. If
/// a busy sequence holds more, the beginning is copied from there. It is also copied if taking the free one would
/// destroy a cache that is mostly something else, while another sequence has been idle for longer. `None` when all are
/// busy.
pub fn choose(held: &[Held], prompt: &[u32], most: usize) -> Option<Choice> {
    let common = |i: usize| held[i].tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count().min(most);
    let free = || (0..held.len()).filter(|&i| !held[i].busy);
    let oldest = |other: Option<usize>| free().filter(|&i| Some(i) != other).min_by_key(|&i| held[i].used);
    let best_free = free().max_by_key(|&i| (common(i), std::cmp::Reverse(held[i].used)))?;
    let best = (0..held.len()).max_by_key(|&i| common(i)).unwrap_or(best_free);
    let in_place = Choice { sequence: best_free, reused: common(best_free), from: None };
    let copied = |from: usize| {
        let sequence = oldest(Some(from))?;
        Some(Choice { sequence, reused: common(from), from: Some(from) })
    };
    if held[best].busy && common(best) >= common(best_free) + WORTH_COPYING {
        return copied(best).or(Some(in_place));
    }
    let lost = held[best_free].tokens.len() - common(best_free);
    match common(best_free) {
        n if lost <= n => Some(in_place),
        n if n >= WORTH_COPYING => copied(best_free).or(Some(in_place)),
        // too little to copy: the sequence that has been idle the longest
        _ => oldest(None).map(|sequence| Choice { sequence, reused: common(sequence), from: None }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(len: u32, first: u32, used: u64, busy: bool) -> Held {
        Held { tokens: (first..first + len).collect(), used, busy }
    }

    fn tokens(len: u32, first: u32) -> Vec<u32> {
        (first..first + len).collect()
    }

    #[test]
    fn a_conversation_goes_on_where_it_was() {
        let h = [held(100, 0, 1, false), held(100, 500, 2, false), held(0, 0, 0, false)];
        let choice = choose(&h, &tokens(150, 500), 141);
        assert_eq!(choice, Some(Choice { sequence: 1, reused: 100, from: None }));
    }

    #[test]
    fn what_a_busy_sequence_holds_is_copied_to_the_one_idle_longest() {
        let h = [held(100, 0, 5, false), held(100, 500, 9, true), held(20, 900, 2, false)];
        assert_eq!(choose(&h, &tokens(150, 500), 141), Some(Choice { sequence: 2, reused: 100, from: Some(1) }));
        assert_eq!(choose(&h, &tokens(150, 500), 31), Some(Choice { sequence: 2, reused: 0, from: None }));
    }

    #[test]
    fn a_short_common_beginning_does_not_cost_another_its_cache() {
        let mut prompt = tokens(40, 0);
        prompt.extend(tokens(60, 700));
        let h = [held(1000, 0, 5, false), held(10, 900, 3, false)];
        assert_eq!(choose(&h, &prompt, 91), Some(Choice { sequence: 1, reused: 40, from: Some(0) }));
        let alone = [held(1000, 0, 5, false)];
        assert_eq!(choose(&alone, &prompt, 91), Some(Choice { sequence: 0, reused: 40, from: None }));
    }

    #[test]
    fn nothing_is_free() {
        assert_eq!(choose(&[held(9, 0, 1, true)], &[1], 0), None);
    }
}
