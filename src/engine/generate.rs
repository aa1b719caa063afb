//! Generates text in a session, as an iterator of events.

use crate::{
    engine::{
        load::Engine,
        sampler::Sampling,
        session::{Decode, Session},
        speculate::{ByModel, Companion, Drafter, Guesser, Speculate},
    },
    error::{Error, Result},
    text::{Found, StopStrings, TokenStream, Tokenizer},
};
use serde::Serialize;
use std::{collections::VecDeque, sync::Arc, time::Instant};

/// What to generate and when to stop.
#[derive(Debug, Clone, Default)]
pub struct GenerateOptions {
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Most tokens. When absent, the text may go on until the context is full.
    pub max_tokens: Option<usize>,
    /// The text ends before the first of these.
    pub stop: Vec<String>,
    /// Whether the stop string that ended the text stays in it.
    pub include_stop: bool,
    /// Whether special tokens appear in the text.
    pub keep_special: bool,
    /// Ids that end the text besides the model's own.
    pub stop_ids: Vec<u32>,
    /// Whether the text goes on after the model's own end-of-text tokens.
    pub ignore_eos: bool,
    /// Where guesses of the next tokens come from. The text comes faster where they are right, and is the same.
    pub speculate: Speculate,
    /// Tokens that may come, such as a text that is to be changed in a few places. They are used as guesses too, with
    /// any `speculate`.
    pub prediction: Vec<u32>,
    /// Other texts of which this one may repeat a part, as it may of the prompt; with [`Speculate::Ngram`].
    pub earlier: Vec<Arc<[u32]>>,
}

impl GenerateOptions {
    /// Checks that each option is in its range for this engine; the error names the option.
    ///
    /// # Errors
    /// `Input` for one that is not.
    pub fn check(&self, engine: &Engine) -> Result<()> {
        self.sampling.check(engine.config().vocab)?;
        self.check_length()?;
        self.check_guesses(engine)?;
        StopStrings::new(self.stop.clone()).map(drop)
    }

    /// Checks that the text may end before it must.
    pub(crate) fn check_length(&self) -> Result<()> {
        match (self.sampling.min_tokens, self.max_tokens) {
            (min, Some(max)) if min as usize > max => Err(Error::Input(format!(
                "min_tokens is {min}, allowed is 0 to max_tokens, which is {max}: lower min_tokens or raise max_tokens"
            ))),
            _ => Ok(()),
        }
    }

    fn check_guesses(&self, engine: &Engine) -> Result<()> {
        if self.speculate == Speculate::Model && engine.draft().is_none() {
            return Err(Error::Input(
                "a smaller model is to guess, and none was opened: --speculate model=NAME, Options::draft in the library".into(),
            ));
        }
        let (n, max, vocab) = (self.prediction.len(), engine.max_context(), engine.config().vocab);
        if n > max {
            return Err(Error::Input(format!("a prediction of {n} tokens: the context has {max}")));
        }
        let mut guesses = self.prediction.iter().chain(self.earlier.iter().flat_map(|text| text.iter()));
        match guesses.find(|t| **t as usize >= vocab) {
            Some(t) => Err(Error::Input(format!("a guess: token {t} is not below the vocabulary's {vocab}"))),
            None => Ok(()),
        }
    }

    /// What guesses the next tokens of a text that continues `prompt` with up to `room` tokens, if guesses are wanted. A
    /// prediction is preferred to a smaller model.
    pub(crate) fn guesser(&self, prompt: &[u32], room: usize, companion: Option<&Companion>) -> Option<Guesser> {
        match (self.speculate, companion) {
            (Speculate::Off | Speculate::Model, None) | (Speculate::Off, _) if self.prediction.is_empty() => None,
            (Speculate::Model, Some(companion)) if self.prediction.is_empty() => {
                Some(Guesser::Model(ByModel::new(companion.max_tokens().min(prompt.len() + room))))
            }
            _ => {
                let room = self.max_tokens.unwrap_or(room).min(room);
                let earlier = self.earlier.iter().map(|text| text.len() + 1).sum::<usize>();
                let mut drafter = Drafter::new(earlier + prompt.len(), &self.prediction, room);
                self.earlier.iter().for_each(|text| drafter.remember(text));
                Some(Guesser::Text(drafter))
            }
        }
    }
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// A stop id or a stop string.
    Stop,
    /// `max_tokens`, or the context is full.
    Length,
}

/// Times and counts of one generation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Timings {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// How many of these were in the cache already.
    pub reused_tokens: usize,
    /// Seconds from the start to the prompt's last logits.
    pub prompt_seconds: f64,
    /// Tokens generated, including the one that ended the text.
    pub tokens: usize,
    /// Seconds from the prompt's last logits to the last token.
    pub decode_seconds: f64,
    /// Seconds from the start to the first token.
    pub first_token_seconds: f64,
    /// Guesses of tokens that were tried; see [`GenerateOptions::speculate`].
    pub drafted_tokens: usize,
    /// How many of these were right.
    pub accepted_tokens: usize,
}

impl Timings {
    /// Tokens generated a second.
    pub fn tokens_per_second(&self) -> f64 {
        if self.decode_seconds > 0.0 { self.tokens as f64 / self.decode_seconds } else { 0.0 }
    }

    /// Counts one more token of a text that began at `begin`.
    pub(crate) fn count(&mut self, begin: Instant) {
        let now = begin.elapsed().as_secs_f64();
        self.tokens += 1;
        if self.tokens == 1 {
            self.first_token_seconds = now;
        }
        self.decode_seconds = now - self.prompt_seconds;
    }
}

/// What a generation yields, in the order it happens.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A token was chosen.
    Token(u32),
    /// Text that is certain: whole characters, and no part of a stop string.
    Text(String),
    /// The end; nothing follows.
    Finish(FinishReason, Timings),
}

/// What ended a text early.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoppedBy {
    /// A stop id.
    Token(u32),
    /// A stop string.
    Text(String),
}

/// What a token adds to its text.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Written {
    /// Text that is certain now.
    pub text: String,
    /// The text ends here.
    pub end: Option<(FinishReason, Option<StoppedBy>)>,
}

/// Turns the tokens of one text into text, and knows where it ends.
pub(crate) struct Writer {
    stop_ids: Vec<u32>,
    stream: Option<TokenStream>,
    stops: StopStrings,
    stop: Vec<String>,
    include_stop: bool,
    left: usize,
    /// Tokens so far.
    count: usize,
    /// Stop strings that end in the text of the first tokens, so many, do not count.
    min_tokens: usize,
}

impl Writer {
    /// For a text of at most `room` tokens that continues `prompt`.
    ///
    /// # Errors
    /// `Input` for options out of range.
    pub fn new(engine: &Engine, options: &GenerateOptions, prompt: &[u32], room: usize) -> Result<Writer> {
        options.check(engine)?;
        let (stops, stop) = (StopStrings::new(options.stop.clone())?, options.stop.clone());
        if !options.stop.is_empty() {
            engine.tokenizer()?; // stop strings need text
        }
        let stream = |t: &Tokenizer| if options.keep_special { t.stream_with_special() } else { t.stream() };
        let stream = engine.tokenizer().ok().map(|t| stream(t).after(prompt));
        let mut stop_ids = options.stop_ids.clone();
        if !options.ignore_eos {
            stop_ids.extend(&engine.config().eos);
        }
        let left = options.max_tokens.unwrap_or(room).min(room);
        let (include_stop, min_tokens) = (options.include_stop, options.sampling.min_tokens as usize);
        Ok(Writer { stop_ids, stream, stops, stop, include_stop, left, count: 0, min_tokens })
    }

    /// Ids that end the text.
    pub fn stop_ids(&self) -> &[u32] {
        &self.stop_ids
    }

    /// How many tokens may still come.
    pub fn left(&self) -> usize {
        self.left
    }

    /// Takes the next token.
    pub fn push(&mut self, token: u32) -> Written {
        self.left = self.left.saturating_sub(1);
        self.count += 1;
        if self.stop_ids.contains(&token) {
            return self.finish(FinishReason::Stop, Some(StoppedBy::Token(token)));
        }
        let piece = self.stream.as_mut().and_then(|s| s.push(token)).unwrap_or_default();
        let written = self.text(&piece);
        match written.end {
            None if self.left == 0 => {
                let rest = self.finish(FinishReason::Length, None);
                Written { text: written.text + &rest.text, end: rest.end }
            }
            _ => written,
        }
    }

    /// Appends the part of a piece that is before a stop string, and cannot become one.
    fn text(&mut self, piece: &str) -> Written {
        if self.count <= self.min_tokens {
            return Written { text: self.stops.pass(piece), end: None };
        }
        let Found { mut text, stopped } = self.stops.push(piece);
        let end = stopped.map(|i| (FinishReason::Stop, Some(StoppedBy::Text(self.stop[i].clone()))));
        if let Some(i) = stopped.filter(|_| self.include_stop) {
            text.push_str(&self.stop[i]);
        }
        Written { text, end }
    }

    /// Ends the text. What was held back comes now; a stop string may still be completed in it.
    pub fn finish(&mut self, reason: FinishReason, by: Option<StoppedBy>) -> Written {
        let piece = self.stream.as_mut().and_then(TokenStream::finish).unwrap_or_default();
        let mut written = self.text(&piece);
        if written.end.is_none() {
            written.text += &self.stops.finish();
            written.end = Some((reason, by));
        }
        written
    }
}

/// Iterator of events; dropping it cancels.
pub struct Generation<'a> {
    decode: Decode<'a>,
    writer: Writer,
    queue: VecDeque<Event>,
    begin: Instant,
    timings: Timings,
    done: bool,
}

impl Session {
    /// Continues `prompt`: computes the part of it that the session does not hold, then decodes. Without a tokenizer the events
    /// carry no text.
    ///
    /// # Errors
    /// `Context` when the prompt leaves no room for a token; `Input` for options out of range.
    pub fn generate(&mut self, prompt: &[u32], options: &GenerateOptions) -> Result<Generation<'_>> {
        let generation = self.generate_with(prompt, options, &mut |_, _| true)?;
        Ok(generation.expect("nobody cancelled it"))
    }

    /// [`Session::generate`] with the progress reports of [`Session::sync_with`], which can cancel it before the first
    /// token; it is `None` then.
    pub fn generate_with(
        &mut self,
        prompt: &[u32],
        options: &GenerateOptions,
        go_on: &mut dyn FnMut(usize, usize) -> bool,
    ) -> Result<Option<Generation<'_>>> {
        if prompt.len() >= self.max_tokens() {
            return Err(Error::Context { needed: prompt.len() + 1, max: self.max_tokens() });
        }
        let writer = Writer::new(self.engine(), options, prompt, self.max_tokens() - prompt.len())?;
        let begin = Instant::now();
        let (reused_tokens, complete) = self.sync_with(prompt, go_on)?;
        if !complete {
            return Ok(None);
        }
        let room = self.max_tokens() - prompt.len();
        let mut guesser = options.guesser(prompt, room, self.companion());
        if let Some(guesser) = &mut guesser {
            guesser.read(prompt); // meanwhile the device computes
        }
        self.wait()?; // a device may still be computing the prompt, and this is part of its time
        let prompt_seconds = begin.elapsed().as_secs_f64();
        let timings = Timings { prompt_tokens: prompt.len(), reused_tokens, prompt_seconds, ..Timings::default() };
        let decode = self.decode_with(&options.sampling, writer.stop_ids(), guesser, writer.left())?;
        Ok(Some(Generation { decode, writer, queue: VecDeque::new(), begin, timings, done: false }))
    }
}

impl Generation<'_> {
    /// Times and counts so far.
    pub fn timings(&self) -> Timings {
        self.timings
    }

    /// Queues the events of one more token.
    fn advance(&mut self) -> Result<()> {
        let token = if self.writer.left() > 0 { self.decode.next().transpose()? } else { None };
        let written = match token {
            None => self.writer.finish(FinishReason::Length, None),
            Some(token) => {
                self.timings.count(self.begin);
                (self.timings.drafted_tokens, self.timings.accepted_tokens) = self.decode.drafted();
                self.queue.push_back(Event::Token(token));
                self.writer.push(token)
            }
        };
        if !written.text.is_empty() {
            self.queue.push_back(Event::Text(written.text));
        }
        if let Some((reason, _)) = written.end {
            self.done = true;
            self.queue.push_back(Event::Finish(reason, self.timings));
        }
        Ok(())
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Event>;

    fn next(&mut self) -> Option<Result<Event>> {
        loop {
            if let Some(event) = self.queue.pop_front() {
                return Some(Ok(event));
            }
            if self.done {
                return None;
            }
            if let Err(e) = self.advance() {
                self.done = true;
                return Some(Err(e));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, Options};

    fn engine() -> Engine {
        Engine::open("demo", &Options { device: Device::Cpu, ..Options::default() }).unwrap()
    }

    fn options(min_tokens: u32, stop: &[&str]) -> GenerateOptions {
        let sampling = Sampling { min_tokens, ..Sampling::default() };
        GenerateOptions { sampling, stop: stop.iter().map(|s| s.to_string()).collect(), ..GenerateOptions::default() }
    }

    /// As vLLM does it: a stop string counts where it ends after the first `min_tokens` tokens, wherever it begins.
    #[test]
    fn a_stop_string_counts_only_after_min_tokens() {
        let engine = engine();
        let letter = |c: char| engine.tokenizer().unwrap().encode(&c.to_string(), false).unwrap();
        let tokens: Vec<u32> = "abcabca".chars().flat_map(letter).collect();
        assert_eq!(tokens.len(), 7, "a token for each letter");
        let written = |options: &GenerateOptions| {
            let mut writer = Writer::new(&engine, options, &[], tokens.len()).unwrap();
            let (mut text, mut pieces) = (String::new(), tokens.iter().map(|&t| writer.push(t)));
            loop {
                let piece = pieces.next().expect("it ends by its length at the latest");
                text += &piece.text;
                if let Some((_, by)) = piece.end {
                    return (text, by.map(|by| if let StoppedBy::Text(stop) = by { stop } else { String::new() }));
                }
            }
        };
        for (min_tokens, stop, text, by) in [
            (0, &["bc"][..], "a", Some("bc")),
            (2, &["bc"], "a", Some("bc")), // it begins in a token that must come and ends after it
            (3, &["bc"], "abca", Some("bc")),
            (5, &["bc"], "abca", Some("bc")),
            (6, &["bc"], "abcabca", None),
            (7, &["bc"], "abcabca", None),
            (3, &["ab", "cab"], "ab", Some("cab")), // both end at the fifth token: the longer one
            (5, &["ca"], "abcab", Some("ca")),
            (6, &["ca"], "abcab", Some("ca")),
            (7, &["ca", "a"], "abcabca", None), // the last token must come, and nothing after it
            (0, &["x", "abcabcab"], "abcabca", None), // what was held back comes at the end
            (7, &["x", "abcabcab"], "abcabca", None),
        ] {
            let found = written(&options(min_tokens, stop));
            assert_eq!(found, (text.to_string(), by.map(String::from)), "min_tokens {min_tokens}, {stop:?}");
        }
        let kept = GenerateOptions { include_stop: true, ..options(3, &["bc"]) };
        assert_eq!(written(&kept), ("abcabc".to_string(), Some("bc".to_string())));
    }

    #[test]
    fn options_out_of_range_are_named() {
        let engine = engine();
        let limited = |min_tokens, max_tokens| GenerateOptions { max_tokens, ..options(min_tokens, &[]) };
        for (right, max_tokens) in [(5, Some(5)), (0, Some(0)), (5000, None)] {
            limited(right, max_tokens).check(&engine).unwrap();
        }
        for (wrong, said) in [
            (limited(6, Some(5)), "min_tokens is 6, allowed is 0 to max_tokens, which is 5"),
            (options(0, &["x", ""]), "stop string 2 is empty"),
            (GenerateOptions { speculate: Speculate::Model, ..options(0, &[]) }, "--speculate model=NAME"),
            (GenerateOptions { prediction: vec![2048], ..options(0, &[]) }, "token 2048"),
        ] {
            let error = wrong.check(&engine).unwrap_err().to_string();
            assert!(error.contains(said), "no {said:?} in {error}");
            assert_eq!(Writer::new(&engine, &wrong, &[], 9).err().map(|e| e.to_string()), Some(error));
        }
    }
}
