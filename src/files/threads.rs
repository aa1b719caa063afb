//! Threads, of which the system may give no more: `ulimit -u`, or the limit of a container.

use std::{
    panic::resume_unwind,
    thread::{self, Scope},
};

/// Begins `work` in a thread of its own. The returned function waits for what `work` returns, or, if there was no thread, does the
/// work itself.
pub(crate) fn beside<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    work: impl FnOnce() -> T + Copy + Send + 'scope,
) -> impl FnOnce() -> T {
    let thread = thread::Builder::new().spawn_scoped(scope, work);
    move || match thread {
        Ok(thread) => thread.join().unwrap_or_else(|panic| resume_unwind(panic)),
        Err(_) => work(),
    }
}
