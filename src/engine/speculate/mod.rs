//! Speculation: a step gives several tokens where the text can be foreseen, and the answer has the same bits as
//! without.
//!
//! A drafter guesses how the text goes on. The step then computes the last token and the guesses after it as rows of
//! one sequence, which takes little longer than one row where memory is the limit. By the logits of each row a token is
//! chosen as if there had been no guesses: with its own random draw, and with penalties over the tokens chosen before
//! it. If the token chosen is the guess, the next row is valid too, and its token costs no step of its own. The first
//! wrong guess ends the step, and what was computed after it is overwritten later. (Leviathan et al. 2023; but instead
//! of rejection sampling, the draw is a function of seed and position.)
//!
//! Guesses come from the text itself, where it was the same before ([`Speculate::Ngram`]), from a text that the user predicts, or
//! from a smaller model ([`Speculate::Model`]).
//!
//! A row has the same bits whatever the other rows are, and a token is a function of its logits, the parameters, the seed and the
//! number of the draw. So the guesses, their number, and the time that a step takes can decide when a token comes, but never
//! which token it is.

mod budget;
mod drafter;
mod model;
mod suffixes;
#[cfg(test)]
mod tests;

pub(crate) use budget::{Costs, Offer, share};
pub use drafter::{Draft, Drafter};
pub(crate) use model::{ByModel, Companion, fits};

use crate::error::{Error, Result};
use std::str::FromStr;

/// Where guesses of the next tokens come from. They change how fast a text comes, and no bit of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Speculate {
    /// No guesses: one token a step.
    #[default]
    Off,
    /// The tokens that followed in prompt and answer where the text was the same before.
    Ngram,
    /// A smaller model with the same vocabulary: [`Options::draft`](crate::Options::draft) of the engine.
    Model,
}

impl FromStr for Speculate {
    type Err = Error;

    /// `off`, `ngram` or `model`.
    fn from_str(text: &str) -> Result<Speculate> {
        match text {
            "off" => Ok(Speculate::Off),
            "ngram" => Ok(Speculate::Ngram),
            "model" => Ok(Speculate::Model),
            _ => Err(Error::Input(format!("{text:?} is no way to speculate; expected ngram, model or off"))),
        }
    }
}

/// What guesses the next tokens of one text.
pub(crate) enum Guesser {
    /// The text itself, and the user's prediction.
    Text(Drafter),
    /// A smaller model.
    Model(ByModel),
}

impl Guesser {
    /// Reads more of the prompt.
    pub fn read(&mut self, prompt: &[u32]) {
        match self {
            Guesser::Text(drafter) => drafter.read(prompt),
            Guesser::Model(model) => model.read(prompt),
        }
    }

    /// The text goes on with a token.
    pub fn push(&mut self, token: u32) {
        match self {
            Guesser::Text(drafter) => drafter.push(token),
            Guesser::Model(model) => model.read(&[token]),
        }
    }

    /// What the next step may try, at most `most` guesses. `companion` is the smaller model, if there is one.
    pub fn offer(&mut self, most: usize, companion: Option<&Companion>) -> Offer<'_> {
        match self {
            Guesser::Text(drafter) => Offer { drafts: drafter.drafts(most), seconds: 0.0 },
            Guesser::Model(model) => {
                Offer { drafts: model.drafts(most), seconds: companion.map_or(0.0, Companion::seconds) }
            }
        }
    }

    /// The first guesses, this many. If they come from a model, [`Companion::guess`] must have made them before.
    pub fn guesses(&mut self, count: usize) -> impl Iterator<Item = u32> {
        let (drafts, guesses) = match self {
            Guesser::Text(drafter) => (drafter.drafts(count), &[][..]),
            Guesser::Model(model) => (&[][..], model.guesses()),
        };
        drafts.iter().map(|d| d.token).chain(guesses.iter().copied()).take(count)
    }

    /// Records that `drafted` guesses were tried, and the first `accepted` of them were right.
    pub fn tried(&mut self, drafted: usize, accepted: usize) {
        if let Guesser::Model(model) = self {
            model.tried(drafted, accepted);
        }
    }
}
