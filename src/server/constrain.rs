//! Constraints on the text of an answer: that it is JSON that follows a schema, matches a regular expression, is one of
//! several texts, or follows a grammar. Before each token, llguidance decides which ones may come next.

use crate::{Constraint, Tokenizer, error::Result};
use llguidance::{
    JsonCompileOptions, Matcher, ParserFactory,
    api::TopLevelGrammar,
    earley::SlicedBiasComputer,
    toktrie::{ApproximateTokEnv, InferenceCapabilities, TokRxInfo, TokTrie},
};
use serde_json::{Value, json};
use std::sync::Arc;

/// What an answer must look like.
#[derive(Debug, Clone)]
pub enum Format {
    /// Any JSON object.
    JsonObject,
    /// JSON that follows a schema.
    JsonSchema(Value),
    /// A text that a regular expression matches as a whole.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A text of a grammar in llguidance's variant of Lark.
    Lark(String),
}

/// Makes constraints for the vocabulary of a model.
pub struct Grammars {
    factory: ParserFactory,
    vocab: usize,
    tokenizer: Tokenizer,
}

/// A [`Constraint`] that enforces a [`Format`]. A clone begins where the original began.
pub struct Grammar {
    matcher: Matcher,
    vocab: usize,
    tokenizer: Tokenizer,
}

impl Grammars {
    /// For a model with `vocab` ids whose tokens are those of `tokenizer`; the tokens `eos` end a text.
    ///
    /// # Errors
    /// A text that says why answers cannot be constrained: no id ends a text, or one is outside of the vocabulary.
    pub fn new(tokenizer: &Tokenizer, vocab: usize, eos: &[u32]) -> Result<Grammars, String> {
        let Some(&first) = eos.first() else {
            return Err("the model has no token that ends a text".into());
        };
        if let Some(id) = eos.iter().find(|&&id| id as usize >= vocab) {
            return Err(format!("token {id} ends a text and is not below the vocabulary's {vocab}"));
        }
        let word = |id: u32| {
            if !tokenizer.is_special(id) && !eos.contains(&id) {
                return tokenizer.token_bytes(id);
            }
            // A token that is special or ends a text stands for no text. This mark keeps it out of everything except
            // grammars that name it.
            let name = tokenizer.token(id).unwrap_or_default();
            [&[TokTrie::SPECIAL_TOKEN_MARKER], name.as_bytes()].concat()
        };
        let words: Vec<Vec<u8>> = (0..vocab as u32).map(word).collect();
        let trie = TokTrie::from(&TokRxInfo::new(vocab as u32, first), &words).with_eos_tokens(eos);
        // How the tokenizer would cut a text matters only for tokens that are forced. None are here: they are only expected.
        let env: llguidance::toktrie::TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let capabilities = InferenceCapabilities::default();
        let factory = ParserFactory::new(&env, capabilities, &SlicedBiasComputer::general_slices());
        let mut factory = factory.map_err(|e| e.to_string())?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Ok(Grammars { factory, vocab, tokenizer: tokenizer.clone() })
    }

    /// A constraint for `format`.
    ///
    /// # Errors
    /// What is wrong with the format.
    pub fn compile(&self, format: &Format) -> Result<Grammar, String> {
        let grammar = match format {
            Format::JsonObject => TopLevelGrammar::from_json_schema(compact(&json!({"type": "object"}))),
            Format::JsonSchema(schema) => TopLevelGrammar::from_json_schema(compact(schema)),
            Format::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Format::Choice(texts) if texts.is_empty() => return Err("there is nothing to choose from".into()),
            Format::Choice(texts) => TopLevelGrammar::from_regex(&choice(texts)),
            Format::Lark(grammar) => TopLevelGrammar::from_lark(grammar.clone()),
        };
        let mut matcher = Matcher::new(self.factory.create_parser(grammar));
        match matcher.get_error() {
            Some(why) => Err(why),
            None => {
                matcher.grammar_warnings().iter().for_each(|warning| tracing::info!("a grammar: {warning}"));
                Ok(Grammar { matcher, vocab: self.vocab, tokenizer: self.tokenizer.clone() })
            }
        }
    }
}

/// The schema with an instruction to write no blanks: a greedy model that may write blanks can go on doing so for ever.
pub(super) fn compact(schema: &Value) -> Value {
    with(schema, JsonCompileOptions { whitespace_flexible: false, ..JsonCompileOptions::default() })
}

/// The schema with an instruction to write a blank after each colon and comma and nowhere else, as in the calls of
/// functions that models are trained with. `lenient` leaves out what cannot be enforced.
pub(super) fn spaced(schema: &Value, lenient: bool) -> Value {
    let (item_separator, key_separator) = (", ".into(), ": ".into());
    let options =
        JsonCompileOptions { whitespace_flexible: false, item_separator, key_separator, lenient, ..Default::default() };
    with(schema, options)
}

fn with(schema: &Value, options: JsonCompileOptions) -> Value {
    let mut schema = schema.clone();
    options.apply_to(&mut schema);
    schema
}

/// A regular expression that matches these texts. Strings of a Lark grammar cannot have all characters, and llguidance
/// takes at most 2000 of them as alternatives.
fn choice(texts: &[String]) -> String {
    let escaped: Vec<_> = texts.iter().map(|text| fancy_regex::escape(text)).collect();
    format!("(?:{})", escaped.join("|"))
}

impl Clone for Grammar {
    fn clone(&self) -> Self {
        let Grammar { matcher, vocab, tokenizer } = self;
        Grammar { matcher: matcher.deep_clone(), vocab: *vocab, tokenizer: tokenizer.clone() }
    }
}

impl Constraint for Grammar {
    fn allowed(&mut self, mask: &mut [u32]) -> Result<(), String> {
        let allowed = self.matcher.compute_mask_or_eos().map_err(|e| e.to_string())?;
        let words = self.vocab.div_ceil(32).min(mask.len());
        mask[..words].copy_from_slice(&allowed.as_slice()[..words]);
        if mask.iter().all(|word| *word == 0) {
            return Err("no token of the model can follow here in the required format".into());
        }
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<(), String> {
        if self.matcher.is_stopped() {
            let ends = self.matcher.compute_mask_or_eos().map_err(|e| e.to_string())?;
            // Where a logit_bias forbids all that is allowed, the sampler takes token 0.
            return match ends.is_allowed(token) {
                true => Ok(()),
                false => Err(format!(
                    "the required format has ended, and token {token} came instead of one that ends the text: leave those \
                     out of logit_bias"
                )),
            };
        }
        self.matcher.consume_token(token).map_err(|e| e.to_string())
    }

    /// The tokens of the text that must follow, without the last one, which may become longer.
    fn expected(&mut self) -> Vec<u32> {
        let bytes = self.matcher.compute_ff_bytes();
        let whole = std::str::from_utf8(&bytes).map_or_else(|e| e.valid_up_to(), str::len);
        let text = String::from_utf8_lossy(&bytes[..whole]);
        let mut tokens = self.tokenizer.encode_plain(&text).unwrap_or_default();
        tokens.pop();
        let allowed = self.allows(&tokens);
        tokens.truncate(allowed);
        tokens
    }

    fn allows(&mut self, tokens: &[u32]) -> usize {
        self.matcher.validate_tokens(tokens).unwrap_or(0)
    }
}
