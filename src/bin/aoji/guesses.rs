//! `--speculate`: where guesses of the next tokens come from.

use aoji::Speculate;
use std::str::FromStr;

/// Where guesses of the next tokens come from, as given to `--speculate`.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum Guesses {
    #[default]
    Off,
    Ngram,
    /// A model of this name.
    Model(String),
}

impl Guesses {
    /// The library's value for it.
    pub fn speculate(&self) -> Speculate {
        match self {
            Guesses::Off => Speculate::Off,
            Guesses::Ngram => Speculate::Ngram,
            Guesses::Model(_) => Speculate::Model,
        }
    }
}

impl FromStr for Guesses {
    type Err = String;

    fn from_str(text: &str) -> Result<Guesses, String> {
        match (text, text.strip_prefix("model=")) {
            ("off", _) => Ok(Guesses::Off),
            ("ngram", _) => Ok(Guesses::Ngram),
            (_, Some(name)) if !name.is_empty() => Ok(Guesses::Model(name.into())),
            _ => Err("expected ngram, model=NAME or off".into()),
        }
    }
}
