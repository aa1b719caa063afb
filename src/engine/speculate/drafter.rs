//! Makes the guesses for one text, and estimates how far to trust them.

use super::suffixes::Suffixes;
use crate::backend::DECODE_ROWS;

/// Longer suffixes count as suffixes of this length.
const LONGEST: usize = 12;
/// Weight, in tokens, of what is assumed about a length of suffix before anything was observed.
const PRIOR: f32 = 4.0;
/// Each new token multiplies the weight of earlier observations by this.
const FORGET: f32 = 0.97;

/// A guess.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draft {
    /// The token.
    pub token: u32,
    /// How likely this guess and all guesses before it are right.
    pub chance: f32,
}

/// How often guesses of one kind were right, and how often they were made; older observations count less.
#[derive(Debug, Clone, Copy)]
pub(super) struct Trust {
    pub right: f32,
    pub tried: f32,
}

impl Trust {
    /// Counts one more guess.
    pub fn count(&mut self, right: bool) {
        self.right = self.right * FORGET + f32::from(u8::from(right));
        self.tried = self.tried * FORGET + 1.0;
    }
}

/// The guesses for one text: what came next where the text was the same before.
///
/// ```
/// let mut drafter = aoji::Drafter::new(4, &[], 100);
/// drafter.read(&[1, 2, 3, 1]);
/// assert_eq!(drafter.drafts(2)[0].token, 2);
/// drafter.push(2);
/// assert_eq!(drafter.drafts(1)[0].token, 3);
/// ```
#[derive(Debug)]
pub struct Drafter {
    suffixes: Suffixes,
    prediction: Vec<u32>,
    /// How many tokens of the prediction the answer has followed; `None` once it has left the prediction.
    followed: Option<usize>,
    /// By the length of the suffix that led to a guess.
    trust: [Trust; LONGEST + 1],
    /// The next tokens as guessed, and the length of the suffix that they were found by.
    next: Vec<u32>,
    suffix: usize,
    drafts: Vec<Draft>,
}

impl Drafter {
    /// For a text that continues a prompt of `prompt` tokens, which are still to be read, with up to `room` tokens;
    /// `prediction` is what may come, or empty.
    pub fn new(prompt: usize, prediction: &[u32], room: usize) -> Drafter {
        let mut suffixes = Suffixes::new(prompt + prediction.len() + room.min(4096) + 1);
        if !prediction.is_empty() {
            prediction.iter().for_each(|&t| suffixes.push(t));
            suffixes.cut();
        }
        let trust = std::array::from_fn(|len| {
            let chance = 0.9 * (1.0 - 0.7f32.powi(len as i32)); // 0.27 after one token, 0.69 after four
            Trust { right: PRIOR * chance, tried: PRIOR }
        });
        let (next, drafts) = (Vec::with_capacity(DECODE_ROWS), Vec::with_capacity(DECODE_ROWS));
        Drafter { suffixes, prediction: prediction.to_vec(), followed: Some(0), trust, next, suffix: 0, drafts }
    }

    /// Reads another text, of which this one may repeat a part. It must come before anything of the prompt.
    pub fn remember(&mut self, text: &[u32]) {
        text.iter().for_each(|&t| self.suffixes.push(t));
        self.suffixes.cut();
    }

    /// Reads more of the prompt.
    pub fn read(&mut self, prompt: &[u32]) {
        prompt.iter().for_each(|&t| self.suffixes.push(t));
        self.look();
    }

    /// Looks up the next tokens.
    fn look(&mut self) {
        if let Some(rest) = self.followed.and_then(|n| self.prediction.get(n..)).filter(|rest| !rest.is_empty()) {
            self.next.clear();
            self.next.extend(rest.iter().take(DECODE_ROWS - 1));
            self.suffix = LONGEST;
            return;
        }
        self.suffix = self.suffixes.guess(DECODE_ROWS - 1, &mut self.next);
    }

    /// The text goes on with this token. Trust changes by whether it was guessed, even if the guess was not tried.
    pub fn push(&mut self, token: u32) {
        if let Some(next) = self.next.first() {
            self.trust[self.suffix.min(LONGEST)].count(*next == token);
        }
        self.followed = self.followed.filter(|&n| self.prediction.get(n) == Some(&token)).map(|n| n + 1);
        self.suffixes.push(token);
        self.look();
    }

    /// The guesses of the next tokens, at most `most`.
    pub fn drafts(&mut self, most: usize) -> &[Draft] {
        self.drafts.clear();
        let mut chance = 1.0;
        for (i, &token) in self.next.iter().take(most).enumerate() {
            // if this guess is right, the next one comes after a suffix that is longer by one
            let Trust { right, tried } = self.trust[(self.suffix + i).min(LONGEST)];
            chance *= right / tried;
            self.drafts.push(Draft { token, chance });
        }
        &self.drafts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(drafter: &mut Drafter, most: usize) -> Vec<u32> {
        drafter.drafts(most).iter().map(|d| d.token).collect()
    }

    #[test]
    fn a_prediction_is_guessed_from_the_first_token_on() {
        let prompt: Vec<u32> = (0..40).map(|i| i % 7).collect();
        let mut drafter = Drafter::new(prompt.len(), &[100, 101, 102, 103], 50);
        drafter.read(&prompt);
        assert_eq!(tokens(&mut drafter, 15), [100, 101, 102, 103]);
        drafter.push(100);
        assert_eq!(tokens(&mut drafter, 2), [101, 102]);
        drafter.push(9); // another word in its place
        drafter.push(102);
        assert_eq!(tokens(&mut drafter, 15), [103]);
    }

    #[test]
    fn other_texts_are_remembered_and_do_not_run_into_this_one() {
        let mut drafter = Drafter::new(20, &[], 50);
        drafter.remember(&[50, 51, 52, 53]);
        drafter.remember(&[1]);
        drafter.read(&[2, 3, 50, 51]);
        assert_eq!(tokens(&mut drafter, 15), [52, 53]);
        drafter.push(1);
        assert!(tokens(&mut drafter, 15).is_empty(), "after 1 came the end of a text");
    }

    #[test]
    fn trust_follows_what_was_right() {
        let mut drafter = Drafter::new(4, &[], 50);
        drafter.read(&[1, 2, 3, 4]);
        let chance = |drafter: &mut Drafter| drafter.drafts(1).first().map_or(0.0, |d| d.chance);
        drafter.push(1);
        let before = chance(&mut drafter);
        assert!((0.2..0.4).contains(&before), "{before}");
        for other in 100..130 {
            drafter.push(other); // never what came after 1
            drafter.push(1);
        }
        let after = chance(&mut drafter);
        assert!(after < before / 3.0, "{after} after {before}");
        let chances: Vec<f32> = drafter.drafts(15).iter().map(|d| d.chance).collect();
        assert!(chances.is_sorted_by(|a, b| a >= b), "{chances:?}");
    }
}
