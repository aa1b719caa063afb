//! Speculation: several tokens a step where the text can be foreseen, with the bits that it has without.
//!
//! A drafter guesses how the text goes on. The step then computes the last token and the guesses behind it as rows of one
//! sequence, which takes little longer than one row where memory is the limit, and a token is chosen by the logits of each row
//! as if there had been no guesses: with its own draw, and with penalties over the tokens chosen before it. A guess that is the
//! token chosen costs no step of its own; the first that is not ends the step, and what was computed behind it is overwritten
//! later (Leviathan et al. 2023, with a draw that is a function of seed and position in the place of rejection sampling).
//!
//! A row has the same bits beside any other rows, and a token is a function of its logits, the parameters, the seed and the
//! number of the draw. So which drafts there are, how many, and how long a step took decide when a token comes, and never which.

mod budget;
mod drafter;
mod suffixes;
#[cfg(test)]
mod tests;

pub(crate) use budget::{Costs, share};
pub use drafter::{Draft, Drafter};

use crate::error::{Error, Result};
use std::str::FromStr;

/// Where guesses of the next tokens come from. They change how fast a text comes and no bit of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Speculate {
    /// There are none: a token a step.
    #[default]
    Off,
    /// What followed in prompt and answer where the text was the same before.
    Ngram,
}

impl FromStr for Speculate {
    type Err = Error;

    /// `off` or `ngram`.
    fn from_str(text: &str) -> Result<Speculate> {
        match text {
            "off" => Ok(Speculate::Off),
            "ngram" => Ok(Speculate::Ngram),
            _ => Err(Error::Input(format!("{text:?} is no way to speculate; expected ngram or off"))),
        }
    }
}
