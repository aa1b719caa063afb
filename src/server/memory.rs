//! Earlier answers, from which the tokens of later ones may be guessed: answers to the same API key, or to everybody if there are no
//! keys. The content of an answer never depends on them. Its speed does, and could tell somebody about them, so keys do not share.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
};

/// Answers that are kept.
#[derive(Debug, Default)]
struct Kept {
    answers: VecDeque<Arc<[u32]>>,
    tokens: usize,
}

/// The latest answers, for each key at most a number of tokens.
#[derive(Debug)]
pub(super) struct Memory {
    most: usize,
    keys: Mutex<HashMap<usize, Kept>>,
}

impl Memory {
    /// An empty memory; with `most` 0 it stays empty.
    pub fn new(most: usize) -> Memory {
        Memory { most, keys: Mutex::default() }
    }

    /// The answers to this key, the oldest first.
    pub fn of(&self, key: usize) -> Vec<Arc<[u32]>> {
        let keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        keys.get(&key).map(|kept| kept.answers.iter().cloned().collect()).unwrap_or_default()
    }

    /// Keeps the end of an answer, and drops as much of the oldest ones.
    fn add(&self, key: usize, answer: &[u32]) {
        let answer = &answer[answer.len().saturating_sub(self.most)..];
        if answer.is_empty() {
            return;
        }
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        let Kept { answers, tokens } = keys.entry(key).or_default();
        answers.push_back(answer.into());
        *tokens += answer.len();
        while *tokens > self.most
            && let Some(oldest) = answers.pop_front()
        {
            *tokens -= oldest.len();
        }
    }
}

/// The answers of one request, before they go to the memory.
pub(super) struct Remembering {
    memory: Arc<Memory>,
    key: usize,
    answers: Vec<Vec<u32>>,
}

impl Remembering {
    /// For `n` answers to this key.
    pub fn new(memory: Arc<Memory>, key: usize, n: usize) -> Remembering {
        Remembering { memory, key, answers: vec![Vec::new(); n] }
    }

    /// Adds tokens of an answer.
    pub fn add(&mut self, index: usize, tokens: impl Iterator<Item = u32>) {
        if self.memory.most > 0 {
            self.answers[index].extend(tokens);
        }
    }

    /// Ends an answer, which then goes to the memory.
    pub fn end(&mut self, index: usize) {
        self.memory.add(self.key, &self.answers[index]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_answers_of_a_key_are_kept() {
        let memory = Arc::new(Memory::new(5));
        for (key, answers) in [(0, [&[1, 2, 3][..], &[4, 5]]), (7, [&[6], &[1, 2, 3, 4, 5, 6, 7]])] {
            let mut of_request = Remembering::new(memory.clone(), key, 2);
            for (i, answer) in answers.into_iter().enumerate() {
                of_request.add(i, answer.iter().copied());
                of_request.end(i);
            }
        }
        assert_eq!(memory.of(0), [Arc::from([1, 2, 3]), Arc::from([4, 5])]);
        assert_eq!(memory.of(7), [Arc::from([3, 4, 5, 6, 7])]);
        memory.add(0, &[8]);
        assert_eq!(memory.of(0), [Arc::from([4, 5]), Arc::from([8])]);
        assert!(memory.of(1).is_empty());
        Memory::new(0).add(0, &[1]);
    }
}
