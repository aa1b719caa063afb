//! A value that a thread of its own makes while the caller does something else.

use std::{
    panic,
    sync::{Mutex, OnceLock, PoisonError},
    thread::{self, JoinHandle},
};

/// A value that may be on its way.
pub(super) struct Background<T> {
    value: OnceLock<T>,
    /// Taken by whoever waits for it.
    thread: Mutex<Option<JoinHandle<T>>>,
}

impl<T> Default for Background<T> {
    fn default() -> Self {
        Background { value: OnceLock::new(), thread: Mutex::default() }
    }
}

impl<T: Send + 'static> Background<T> {
    /// Begins to make it, unless that has begun already, or the system gives no more threads.
    pub fn begin(&self, make: impl FnOnce() -> T + Send + 'static) {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_none() && self.value.get().is_none() {
            *thread = thread::Builder::new().spawn(make).ok();
        }
    }

    /// Waits for the value; if nobody has begun, `make` makes it now.
    pub fn get_or(&self, make: impl FnOnce() -> T) -> &T {
        self.value.get_or_init(|| self.wait().unwrap_or_else(make))
    }
}

impl<T> Background<T> {
    fn wait(&self) -> Option<T> {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        Some(thread.join().unwrap_or_else(|e| panic::resume_unwind(e)))
    }
}

impl<T> Drop for Background<T> {
    fn drop(&mut self) {
        self.wait(); // the thread must not use the driver while the process ends
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_made_once() {
        let b = Background::default();
        b.begin(|| 1);
        b.begin(|| panic!("it is on its way"));
        assert_eq!((*b.get_or(|| 2), *b.get_or(|| 3)), (1, 1));
        b.begin(|| panic!("it is there"));
        let b = Background::default();
        assert_eq!((*b.get_or(|| 2), *b.get_or(|| 3)), (2, 2));
    }
}
