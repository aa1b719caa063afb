//! Finds where a text was the same before, with a suffix automaton (Blumer et al. 1985): adding a token takes constant
//! amortised time.
//!
//! A state stands for all substrings that end at the same positions. The suffix link of the state of the whole text
//! leads to the longest suffix that also occurs earlier; the guess is what came after it there. Each state remembers
//! two such places, and how often the token that came after each was right, so that the better place is used.

use std::collections::HashMap;

/// Number of a state; the root's is 0.
type Id = u32;
/// The root's suffix link.
const NONE: Id = u32::MAX;
/// A number that no token has. No substring goes across it.
const BREAK: u32 = u32::MAX;
/// How many states, from the longest suffix on, learn from each token.
const LEARN: usize = 8;

/// A position in the text where the substrings of a state end.
#[derive(Debug, Clone, Copy, Default)]
struct Place {
    /// Index of the last token.
    end: u32,
    /// Grows by one when the token after it was right, and shrinks when it was wrong; 0 is an empty place.
    right: u32,
}

#[derive(Debug, Clone, Copy)]
struct State {
    /// Length of the longest substring, in tokens.
    len: u32,
    link: Id,
    /// Its first edge, or `NONE`.
    edges: u32,
    places: [Place; 2],
}

/// A transition from one state to another by a token; the edges of a state form a list.
#[derive(Debug, Clone, Copy)]
struct Edge {
    token: u32,
    to: Id,
    next: u32,
}

/// A text and all of its substrings.
#[derive(Debug)]
pub struct Suffixes {
    text: Vec<u32>,
    states: Vec<State>,
    edges: Vec<Edge>,
    /// The edge of a state and a token.
    index: HashMap<(Id, u32), u32>,
    last: Id,
}

impl Suffixes {
    /// For an empty text that will have about this many tokens.
    pub fn new(tokens: usize) -> Suffixes {
        let root = State { len: 0, link: NONE, edges: NONE, places: Default::default() };
        let mut states = Vec::with_capacity(2 * tokens + 1);
        states.push(root);
        let (edges, index) = (Vec::with_capacity(3 * tokens), HashMap::with_capacity(3 * tokens));
        Suffixes { text: Vec::with_capacity(tokens), states, edges, index, last: 0 }
    }

    /// Separates what follows from what was before: no guess goes across this point.
    pub fn cut(&mut self) {
        self.push(BREAK);
    }

    /// Appends a token to the text.
    pub fn push(&mut self, token: u32) {
        self.learn(token);
        let at = self.text.len() as u32;
        self.text.push(token);
        let places = [Place { end: at, right: 1 }, Place::default()];
        let new = self.add(State { len: at + 1, link: 0, edges: NONE, places });
        let mut from = std::mem::replace(&mut self.last, new);
        while from != NONE && !self.index.contains_key(&(from, token)) {
            self.connect(from, token, new);
            from = self.states[from as usize].link;
        }
        let Some(&edge) = self.index.get(&(from, token)) else { return };
        let to = self.edges[edge as usize].to;
        let len = self.states[from as usize].len + 1;
        if self.states[to as usize].len == len {
            self.states[new as usize].link = to;
            return;
        }
        // only the shorter substrings of this state end here too, so the state is split
        let clone = self.add(State { len, edges: NONE, ..self.states[to as usize] });
        let mut edge = self.states[to as usize].edges;
        while edge != NONE {
            let Edge { token, to, next } = self.edges[edge as usize];
            self.connect(clone, token, to);
            edge = next;
        }
        while from != NONE
            && let Some(&edge) = self.index.get(&(from, token))
            && self.edges[edge as usize].to == to
        {
            self.edges[edge as usize].to = clone;
            from = self.states[from as usize].link;
        }
        (self.states[to as usize].link, self.states[new as usize].link) = (clone, clone);
    }

    fn add(&mut self, state: State) -> Id {
        self.states.push(state);
        (self.states.len() - 1) as Id
    }

    fn connect(&mut self, from: Id, token: u32, to: Id) {
        let next = std::mem::replace(&mut self.states[from as usize].edges, self.edges.len() as u32);
        self.index.insert((from, token), self.edges.len() as u32);
        self.edges.push(Edge { token, to, next });
    }

    /// The state of the longest suffix that also occurs earlier; the root when there is none.
    fn longest(&self) -> Id {
        match self.states[self.last as usize].link {
            NONE => 0,
            link => link,
        }
    }

    /// The place of a state whose next token was right more often.
    fn best(&self, state: Id) -> Option<Place> {
        let [a, b] = self.states[state as usize].places;
        let better = if (b.right, b.end) > (a.right, a.end) { b } else { a };
        Some(better).filter(|p| state != 0 && p.right > 0)
    }

    /// Teaches the suffixes that ended before this token whether their places foresaw it.
    fn learn(&mut self, token: u32) {
        let Some(here) = self.text.len().checked_sub(1).map(|i| i as u32) else { return };
        let mut state = self.longest();
        for _ in 0..LEARN {
            if state == 0 {
                return;
            }
            let State { places, link, .. } = &mut self.states[state as usize];
            let text = &self.text;
            let right = places.iter().position(|p| p.right > 0 && text[p.end as usize + 1] == token);
            match right {
                Some(i) => places[i] = Place { end: here, right: places[i].right + 1 },
                None => {
                    let [weak, strong] = if places[0].right <= places[1].right { [0, 1] } else { [1, 0] };
                    places[strong].right -= u32::from(places[strong].right > 1);
                    places[weak] = Place { end: here, right: 1 };
                }
            }
            state = *link;
        }
    }

    /// Writes to `next` what came after the longest suffix where it occurred earlier, at most `most` tokens. Returns
    /// the length of this suffix in tokens.
    pub fn guess(&self, most: usize, next: &mut Vec<u32>) -> usize {
        next.clear();
        let state = self.longest();
        let Some(place) = self.best(state) else { return 0 };
        let from = place.end as usize + 1;
        for at in from..from + most {
            // after the end of the text, the guesses themselves go on
            let token = self.text.get(at).copied().unwrap_or_else(|| next[at - self.text.len()]);
            if token == BREAK {
                break;
            }
            next.push(token);
        }
        self.states[state as usize].len as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The longest suffix of `text` that ends somewhere earlier too.
    fn longest(text: &[u32]) -> usize {
        let n = text.len();
        let len = |end: usize| (0..end).take_while(|i| text[end - 1 - i] == text[n - 1 - i]).count();
        (1..n).map(len).max().unwrap_or(0)
    }

    proptest! {
        #[test]
        fn the_suffix_is_the_longest_and_its_guess_came_after_it(text in prop::collection::vec(0..4u32, 1..120)) {
            let (mut s, mut next) = (Suffixes::new(8), Vec::new());
            for n in 1..=text.len() {
                s.push(text[n - 1]);
                let len = s.guess(5, &mut next);
                prop_assert_eq!(len, longest(&text[..n]), "after {:?}", &text[..n]);
                prop_assert_eq!(next.is_empty(), len == 0);
                let suffix = &text[n - len..n];
                // all of the guess that the text has came after an earlier place of the suffix
                let is_there = |at: usize| {
                    text[at..at + len] == *suffix
                        && (0..5).all(|i| next[i] == text[..n].get(at + len + i).copied().unwrap_or_else(|| next[at + len + i - n]))
                };
                prop_assert!(len == 0 || (0..n - len).any(is_there), "{:?} after {:?}", next, &text[..n]);
            }
        }
    }

    #[test]
    fn what_was_right_more_often_is_guessed() {
        let mut s = Suffixes::new(8);
        for token in [1, 2, 1, 2, 1, 3, 1, 2, 9, 1] {
            s.push(token);
        }
        let mut next = Vec::new();
        assert_eq!((s.guess(1, &mut next), &next[..]), (1, &[2][..]));
    }

    #[test]
    fn a_cut_is_not_crossed() {
        let mut s = Suffixes::new(8);
        [1, 2, 3].into_iter().for_each(|t| s.push(t));
        s.cut();
        [1, 2].into_iter().for_each(|t| s.push(t));
        let mut next = Vec::new();
        assert_eq!((s.guess(4, &mut next), &next[..]), (2, &[3][..]));
    }

    #[test]
    fn repetition_is_guessed_on_and_on() {
        let mut s = Suffixes::new(8);
        [7, 5, 6, 7, 5, 6, 7].into_iter().for_each(|t| s.push(t));
        let mut next = Vec::new();
        assert_eq!((s.guess(7, &mut next), &next[..]), (4, &[5, 6, 7, 5, 6, 7, 5][..]));
    }
}
