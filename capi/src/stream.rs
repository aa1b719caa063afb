//! Generating text from a session: the options, and two ways to receive the events, by callback or step by step.

use super::{
    Failure, Outcome, aoji_status, elements,
    event::{aoji_event, aoji_event_kind, aoji_reason, event},
    given,
    session::{Inner, aoji_session, with},
    text,
};
use aoji::{Event, FinishReason, GenerateOptions, Result, Sampling, Session, Speculate};
use std::{
    ffi::{c_char, c_void},
    ptr,
};

/// Called before each part of a prompt with the number of tokens computed so far, and their total. If it returns not 0,
/// the call ends.
pub type aoji_prompt_progress = Option<unsafe extern "C" fn(user: *mut c_void, done: usize, total: usize) -> i32>;

/// Added to the logit of a token.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct aoji_logit_bias {
    /// Id of the token.
    token: u32,
    /// Added to its logit; minus infinity forbids it.
    bias: f32,
}

/// How tokens are chosen and when a text ends. Zero is the default of every field but `size`: the most likely token is
/// taken.
#[repr(C)]
pub struct aoji_generate_options {
    /// sizeof(aoji_generate_options).
    size: usize,
    /// Most tokens; 0: until the text ends or the session is full.
    max_tokens: usize,
    /// Divides the logits; 0 takes the most likely token.
    temperature: f32,
    /// Only this many of the most likely tokens; 0 is off.
    top_k: u32,
    /// Only the most likely tokens that together have this probability; 0 and 1 are off.
    top_p: f32,
    /// Only tokens with at least this share of the most likely one's probability; 0 is off.
    min_p: f32,
    /// Divides the logits of tokens in prompt and answer; 0 and 1 are off.
    repetition_penalty: f32,
    /// Taken from a token's logit for each time that it is in the answer.
    frequency_penalty: f32,
    /// Taken from the logit of each token in the answer.
    presence_penalty: f32,
    /// The text does not end before it has this many tokens.
    min_tokens: u32,
    /// The same seed and prompt give the same text.
    seed: u64,
    /// Added to the logits of single tokens.
    logit_bias: *const aoji_logit_bias,
    /// How many.
    logit_bias_count: usize,
    /// The text ends before the first of these texts.
    stop: *const *const c_char,
    /// How many.
    stop_count: usize,
    /// Tokens that end the text besides the model's own.
    stop_ids: *const u32,
    /// How many.
    stop_id_count: usize,
    /// Not 0: a text of `stop` that ends the text stays in it.
    include_stop: i32,
    /// Not 0: special tokens appear in the text.
    keep_special: i32,
    /// Not 0: the model's own tokens do not end the text.
    ignore_eos: i32,
    /// NULL: no reports.
    prompt_progress: aoji_prompt_progress,
    /// First argument of `prompt_progress`.
    user: *mut c_void,
    /// Not 0: the next tokens are guessed; the text is the same, and comes faster where guesses are right. 1: the guesses
    /// come from text that was there before; 2: from the engine's draft model.
    speculate: i32,
    /// Tokens that may come; they are used as guesses too, even without `speculate`.
    prediction: *const u32,
    /// How many.
    prediction_count: usize,
}

/// Called with each event, which is valid until the callback returns; if it returns not 0, the generation ends. It must
/// return: no exception and no longjmp.
pub type aoji_callback = Option<unsafe extern "C" fn(user: *mut c_void, event: *const aoji_event) -> i32>;

impl Inner {
    fn start(&mut self, prompt: &[u32], given: &aoji_generate_options) -> Outcome {
        self.session();
        // SAFETY: alive until `self` is dropped, which ends the generation first; `session()` also does before it lends it again.
        let session: &'static mut Session = unsafe { self.session.as_mut() };
        // SAFETY: what the options point to is valid, as the caller promises.
        let options = unsafe { generate_options(given) }?;
        let go_on = &mut |done, total| {
            // SAFETY: a function of this type, as the caller promises.
            given.prompt_progress.is_none_or(|progress| unsafe { progress(given.user, done, total) } == 0)
        };
        self.generation = session.generate_with(prompt, &options, go_on)?;
        if self.generation.is_some() { Ok(()) } else { Err(cancelled("prompt_progress")) }
    }

    /// The next event.
    fn next(&mut self) -> Result<Option<&aoji_event>> {
        let Some(generation) = &mut self.generation else { return Ok(None) };
        let Some(next) = generation.next().transpose()? else {
            self.generation = None;
            return Ok(None);
        };
        let timings = generation.timings();
        self.text.clear();
        let mut event = match next {
            Event::Token(token) => aoji_event { token, ..event(aoji_event_kind::Token, timings) },
            Event::Text(text) => {
                let length = text.len();
                self.text.extend(text.into_bytes());
                aoji_event { length, ..event(aoji_event_kind::Text, timings) }
            }
            Event::Finish(reason, timings) => {
                let reason = match reason {
                    FinishReason::Stop => aoji_reason::Stop,
                    FinishReason::Length => aoji_reason::Length,
                };
                aoji_event { reason, ..event(aoji_event_kind::Finish, timings) }
            }
        };
        self.text.push(0);
        event.text = self.text.as_ptr().cast();
        Ok(Some(self.event.insert(event)))
    }
}

fn cancelled(by: &str) -> Failure {
    Failure { status: aoji_status::Cancelled, text: format!("{by} ended it") }
}

/// # Safety
/// What the options point to is valid.
unsafe fn generate_options(given: &aoji_generate_options) -> Result<GenerateOptions> {
    let or_one = |x: f32| if x == 0.0 { 1.0 } else { x };
    // SAFETY: lists and texts, as the caller promises.
    let (bias, stop, stop_ids, prediction) = unsafe {
        let stop = elements("stop", given.stop, given.stop_count)?.iter();
        (
            elements("logit_bias", given.logit_bias, given.logit_bias_count)?,
            stop.map(|&s| text("stop", s).map(String::from)).collect::<Result<Vec<_>>>()?,
            elements("stop_ids", given.stop_ids, given.stop_id_count)?,
            elements("prediction", given.prediction, given.prediction_count)?,
        )
    };
    Ok(GenerateOptions {
        sampling: Sampling {
            temperature: given.temperature,
            top_k: given.top_k,
            top_p: or_one(given.top_p),
            min_p: given.min_p,
            repetition_penalty: or_one(given.repetition_penalty),
            frequency_penalty: given.frequency_penalty,
            presence_penalty: given.presence_penalty,
            logit_bias: bias.iter().map(|b| (b.token, b.bias)).collect(),
            seed: given.seed,
            min_tokens: given.min_tokens,
        },
        max_tokens: (given.max_tokens > 0).then_some(given.max_tokens),
        stop,
        include_stop: given.include_stop != 0,
        keep_special: given.keep_special != 0,
        stop_ids: stop_ids.to_vec(),
        ignore_eos: given.ignore_eos != 0,
        speculate: match given.speculate {
            0 => Speculate::Off,
            2 => Speculate::Model,
            _ => Speculate::Ngram,
        },
        prediction: prediction.to_vec(),
        earlier: Vec::new(),
    })
}

/// Computes the part of a prompt that the session does not hold, and begins to continue the prompt; `aoji_next` gives
/// the events. `options` may be NULL. Any other call on the session ends the generation.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aoji_start(
    session: *mut aoji_session,
    prompt: *const u32,
    count: usize,
    options: *const aoji_generate_options,
) -> aoji_status {
    let body = |inner: &mut Inner| {
        // SAFETY: as the caller promises; all bytes of the options may be zero: numbers and pointers that may be NULL.
        let (prompt, options) = unsafe { (elements("prompt", prompt, count)?, super::options(options)?) };
        inner.start(prompt, &options)
    };
    // SAFETY: as the caller promises.
    unsafe { with(session, body) }
}

/// Waits for the next event of the generation. The event is valid until the next call on the session; it is NULL after
/// the end, or if nothing was started.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aoji_next(session: *mut aoji_session, event: *mut *const aoji_event) -> aoji_status {
    let body = |inner: &mut Inner| {
        let out = given("event", event)?;
        // SAFETY: not NULL, so a place for a pointer.
        unsafe { out.write(ptr::null()) };
        let next = inner.next()?;
        // SAFETY: as above.
        unsafe { out.write(next.map_or(ptr::null(), ptr::from_ref)) };
        Ok(())
    };
    // SAFETY: as the caller promises.
    unsafe { with(session, body) }
}

/// Ends the generation, which may otherwise go on in the background for a few tokens. The tokens that it gave stay in
/// the session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aoji_stop(session: *mut aoji_session) -> aoji_status {
    let body = |inner: &mut Inner| {
        inner.session();
        Ok(())
    };
    // SAFETY: as the caller promises.
    unsafe { with(session, body) }
}

/// `aoji_start`, then calls `callback` with each event until the end.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aoji_generate(
    session: *mut aoji_session,
    prompt: *const u32,
    count: usize,
    options: *const aoji_generate_options,
    callback: aoji_callback,
    user: *mut c_void,
) -> aoji_status {
    let body = |inner: &mut Inner| {
        let callback = callback.ok_or_else(|| super::wrong("callback is NULL".into()))?;
        // SAFETY: as the caller promises; all bytes of the options may be zero: numbers and pointers that may be NULL.
        let (prompt, options) = unsafe { (elements("prompt", prompt, count)?, super::options(options)?) };
        inner.start(prompt, &options)?;
        while let Some(event) = inner.next()? {
            // SAFETY: a function of this type, as the caller promises; the event is valid until the next one.
            if unsafe { callback(user, event) } != 0 {
                inner.session();
                return Err(cancelled("callback"));
            }
        }
        Ok(())
    };
    // SAFETY: as the caller promises.
    unsafe { with(session, body) }
}
