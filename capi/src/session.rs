//! Sessions: tokens to logits, log-probabilities and text.

use super::{
    Failure, Outcome, aoji_status, elements,
    engine::{aoji_engine, engine},
    event::aoji_event,
    given, guard, room, text,
};
use aoji::{Generation, Session};
use std::{
    cell::UnsafeCell,
    ffi::c_char,
    path::Path,
    ptr::{self, NonNull},
    sync::atomic::{AtomicBool, Ordering},
};

/// A sequence of tokens with its KV cache (the keys and values of attention). Any thread may use it, but only one at a
/// time.
pub struct aoji_session {
    /// Whether somebody uses it.
    busy: AtomicBool,
    inner: UnsafeCell<Inner>,
}

pub(super) struct Inner {
    /// Borrows `*session`, which nobody else touches while it is there.
    pub generation: Option<Generation<'static>>,
    pub session: NonNull<Session>,
    /// What `aoji_next` gave last, and the text that it points to.
    pub event: Option<aoji_event>,
    pub text: Vec<u8>,
    /// Set after a panic, which may have left anything behind.
    broken: bool,
}

/// A session goes from thread to thread, so it has to allow that.
const _: fn() = || {
    fn moves<T: Send>() {}
    moves::<Session>();
    moves::<Generation<'static>>();
};

impl Drop for Inner {
    fn drop(&mut self) {
        self.generation = None;
        // SAFETY: from `Box::into_raw`, freed here only, and its one borrower is gone.
        drop(unsafe { Box::from_raw(self.session.as_ptr()) });
    }
}

impl Inner {
    fn new(session: Session) -> Inner {
        let session = NonNull::from(Box::leak(Box::new(session)));
        Inner { generation: None, session, event: None, text: Vec::new(), broken: false }
    }

    /// The session itself; a generation in it has ended.
    pub fn session(&mut self) -> &mut Session {
        self.generation = None;
        // SAFETY: alive as long as `self`, and its one borrower is gone.
        unsafe { self.session.as_mut() }
    }
}

/// Runs `body` on a session, unless it is in use: by another thread, or by a call whose callback made this call.
///
/// # Safety
/// `session` is NULL or a handle that was not freed.
pub(super) unsafe fn with(session: *mut aoji_session, body: impl FnOnce(&mut Inner) -> Outcome) -> aoji_status {
    guard(|| {
        // SAFETY: not NULL, so a live handle; only `busy` and the cell are reached through it.
        let session = unsafe { given("session", session)?.as_ref() };
        if session.busy.swap(true, Ordering::Acquire) {
            let text = "the session is in use: by another thread, or by the call that made this callback".into();
            return Err(Failure { status: aoji_status::Input, text });
        }
        let _free = Free(&session.busy);
        // SAFETY: whoever found `busy` unset is alone until it is unset again, after `inner` is gone.
        let inner = unsafe { &mut *session.inner.get() };
        if inner.broken {
            let text = "an earlier call on this session failed by a bug of aoji: free it".into();
            return Err(Failure { status: aoji_status::Internal, text });
        }
        inner.broken = true; // stays set if `body` panics
        let outcome = body(inner);
        inner.broken = false;
        outcome
    })
}

/// Marks a session as free, also after a panic.
struct Free<'a>(&'a AtomicBool);

impl Drop for Free<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Makes an empty session with room for `max_tokens` tokens, or with 0 as many as the engine allows. It keeps the model
/// alive. If the call fails, `*session` is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aoji_session_new(
    engine: *const aoji_engine,
    max_tokens: usize,
    session: *mut *mut aoji_session,
) -> aoji_status {
    guard(|| {
        let out = given("session", session)?;
        // SAFETY: not NULL, so a place for a handle.
        unsafe { out.write(ptr::null_mut()) };
        // SAFETY: as the caller promises.
        let engine = &unsafe { self::engine(engine) }?.engine;
        let made = engine.session(if max_tokens > 0 { max_tokens } else { engine.max_context() })?;
        let session = aoji_session { busy: AtomicBool::new(false), inner: UnsafeCell::new(Inner::new(made)) };
        // SAFETY: as above.
        unsafe { out.write(Box::into_raw(Box::new(session))) };
        Ok(())
    })
}

/// Frees a handle and its memory on the device; NULL is allowed. From a callback of a call on the same session, it does
/// nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aoji_session_free(session: *mut aoji_session) {
    guard(|| {
        let Some(handle) = NonNull::new(session) else { return Ok(()) };
        // SAFETY: a handle of `aoji_session_new` that was not freed.
        if unsafe { handle.as_ref() }.busy.swap(true, Ordering::Acquire) {
            return Err(Failure { status: aoji_status::Input, text: "the session is in use: it is not freed".into() });
        }
        // SAFETY: as above, and nobody uses it.
        drop(unsafe { Box::from_raw(session) });
        Ok(())
    });
}

/// Makes the session hold exactly `tokens`, at least one, and computes only what differs from the tokens that it
/// already holds; the logits after the last token are then ready. `reused`, which may be NULL, gets how many tokens did
/// not have to be computed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aoji_sync(
    session: *mut aoji_session,
    tokens: *const u32,
    count: usize,
    reused: *mut usize,
) -> aoji_status {
    let body = |inner: &mut Inner| {
        // SAFETY: as the caller promises.
        let same = inner.session().sync(unsafe { elements("tokens", tokens, count) }?)?;
        if let Some(reused) = NonNull::new(reused) {
            // SAFETY: not NULL, so valid.
            unsafe { reused.write(same) };
        }
        Ok(())
    };
    // SAFETY: as the caller promises.
    unsafe { with(session, body) }
}

/// Writes the session's computed tokens, with their keys and values, to a file. A file that is there is replaced once the new one is
/// complete.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aoji_session_save(session: *mut aoji_session, path: *const c_char) -> aoji_status {
    let body = |inner: &mut Inner| {
        // SAFETY: as the caller promises.
        let path = unsafe { text("path", path) }?;
        Ok(inner.session().save(Path::new(path), "")?)
    };
    // SAFETY: as the caller promises.
    unsafe { with(session, body) }
}

/// Replaces what the session holds with a file of `aoji_session_save`, of the same model, device and version of aoji. `count`, which may
/// be NULL, gets how many tokens it has. If the call fails, the session stays as it was.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aoji_session_load(
    session: *mut aoji_session,
    path: *const c_char,
    count: *mut usize,
) -> aoji_status {
    let body = |inner: &mut Inner| {
        // SAFETY: as the caller promises.
        let path = unsafe { text("path", path) }?;
        let session = inner.session();
        session.load(Path::new(path))?;
        if let Some(count) = NonNull::new(count) {
            // SAFETY: not NULL, so valid.
            unsafe { count.write(session.tokens().len()) };
        }
        Ok(())
    };
    // SAFETY: as the caller promises.
    unsafe { with(session, body) }
}

/// Copies the logits after the last token of the session; there are as many as tokens in the vocabulary.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aoji_logits(session: *mut aoji_session, logits: *mut f32, capacity: usize) -> aoji_status {
    let body = |inner: &mut Inner| {
        let session = inner.session();
        room("logits", session.engine().config().vocab, capacity)?;
        let buffer = given("logits", logits)?;
        let values = session.logits()?;
        // SAFETY: the buffer has room for `capacity` floats, and these are no more; the library's own are elsewhere.
        unsafe { buffer.as_ptr().copy_from_nonoverlapping(values.as_ptr(), values.len()) };
        Ok(())
    };
    // SAFETY: as the caller promises.
    unsafe { with(session, body) }
}

/// Natural logarithms of the probabilities of the tokens of `continuation` after `prefix`, each given the tokens before
/// it. They go one by one to `logprobs`, and their sum to `sum`; either may be NULL. For many continuations, the prefix
/// is computed once.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aoji_score(
    session: *mut aoji_session,
    prefix: *const u32,
    prefix_count: usize,
    continuation: *const u32,
    continuation_count: usize,
    logprobs: *mut f32,
    sum: *mut f64,
) -> aoji_status {
    let body = |inner: &mut Inner| {
        // SAFETY: as the caller promises.
        let prefix = unsafe { elements("prefix", prefix, prefix_count) }?;
        // SAFETY: as the caller promises.
        let continuation = unsafe { elements("continuation", continuation, continuation_count) }?;
        let scores = inner.session().score(prefix, &[continuation])?;
        let scored = &scores.continuations[0];
        if let Some(sum) = NonNull::new(sum) {
            // SAFETY: not NULL, so valid.
            unsafe { sum.write(scored.sum()) };
        }
        if let Some(logprobs) = NonNull::new(logprobs) {
            for (i, token) in scored.0.iter().enumerate() {
                // SAFETY: room for as many as the continuation has tokens, which `scored` has.
                unsafe { logprobs.add(i).write(token.logprob) };
            }
        }
        Ok(())
    };
    // SAFETY: as the caller promises.
    unsafe { with(session, body) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{aoji_last_error, engine::*, options};
    use std::ffi::CStr;

    fn last() -> String {
        // SAFETY: a text of this thread that nothing replaces meanwhile.
        unsafe { CStr::from_ptr(aoji_last_error()) }.to_str().unwrap().into()
    }

    /// No panic gets out, and what it left behind is not used again.
    #[test]
    fn a_bug_breaks_its_session_and_nothing_else() {
        let (mut engine, mut session) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: valid texts and places, and handles that are freed once.
        unsafe {
            let mut options: aoji_open_options = options(ptr::null()).unwrap();
            (options.size, options.device) = (size_of::<aoji_open_options>(), c"cpu".as_ptr());
            assert_eq!(aoji_open(c"demo".as_ptr(), &options, &mut engine), aoji_status::Ok);
            assert_eq!(aoji_session_new(engine, 8, &mut session), aoji_status::Ok);
            assert_eq!(with(session, |_| panic!("at {}", 7)), aoji_status::Internal);
            assert_eq!(last(), "bug in aoji: at 7");
            assert_eq!(aoji_sync(session, [1].as_ptr(), 1, ptr::null_mut()), aoji_status::Internal);
            assert!(last().contains("an earlier call") && last().ends_with("free it"), "{}", last());
            aoji_session_free(session);
            assert_eq!(aoji_session_new(engine, 8, &mut session), aoji_status::Ok);
            assert_eq!(aoji_sync(session, [1].as_ptr(), 1, ptr::null_mut()), aoji_status::Ok);
            aoji_session_free(session);
            aoji_engine_free(engine);
        }
        assert_eq!(guard(|| panic!("text without arguments")), aoji_status::Internal);
        assert_eq!(last(), "bug in aoji: text without arguments");
    }
}
