//! The events of a generation, as C gets them.

use aoji::Timings;
use std::ffi::c_char;

/// What an event is.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum aoji_event_kind {
    /// A token was chosen: `token`.
    Token = 0,
    /// Text that is certain (whole characters, and no part of a stop text): `text` and `length`.
    Text = 1,
    /// The end, because of `reason`; nothing follows.
    Finish = 2,
}

/// Why a text ended.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum aoji_reason {
    /// It has not ended.
    None = 0,
    /// A token or a text that ends it.
    Stop = 1,
    /// `max_tokens`, or the session is full.
    Length = 2,
}

/// One event. Events come in the order in which things happen. More fields may be added at the end.
#[repr(C)]
pub struct aoji_event {
    /// Which kind of event it is.
    pub(super) kind: aoji_event_kind,
    /// For AOJI_EVENT_KIND_TOKEN.
    pub(super) token: u32,
    /// For AOJI_EVENT_KIND_TEXT, with a NUL after it; else empty.
    pub(super) text: *const c_char,
    /// Bytes of `text`.
    pub(super) length: usize,
    /// For AOJI_EVENT_KIND_FINISH.
    pub(super) reason: aoji_reason,
    /// Tokens of the prompt.
    pub(super) prompt_tokens: usize,
    /// How many of these the session held already.
    pub(super) reused_tokens: usize,
    /// Tokens so far, including the one that ended the text.
    pub(super) tokens: usize,
    /// Seconds that the prompt took.
    pub(super) prompt_seconds: f64,
    /// Seconds from the end of the prompt to the last token.
    pub(super) decode_seconds: f64,
    /// Guesses of tokens that were tried.
    pub(super) drafted_tokens: usize,
    /// How many of these guesses were right.
    pub(super) accepted_tokens: usize,
}

/// An event without the fields that belong to one kind only.
pub(super) fn event(kind: aoji_event_kind, t: Timings) -> aoji_event {
    aoji_event {
        kind,
        token: 0,
        text: c"".as_ptr(),
        length: 0,
        reason: aoji_reason::None,
        prompt_tokens: t.prompt_tokens,
        reused_tokens: t.reused_tokens,
        tokens: t.tokens,
        prompt_seconds: t.prompt_seconds,
        decode_seconds: t.decode_seconds,
        drafted_tokens: t.drafted_tokens,
        accepted_tokens: t.accepted_tokens,
    }
}
