//! Work that takes long, in a thread of its own: Python's other threads run meanwhile, and Ctrl-C ends the waiting.

use crate::error::{AojiError, exception};
use aoji::Result;
use pyo3::{PyErr, PyResult, Python};
use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    thread,
    time::Duration,
};

/// How long Ctrl-C may wait to be seen.
const SIGNALS: Duration = Duration::from_millis(50);

/// Whoever waits has gone: the work is to end at the next place where it can.
#[derive(Clone, Default)]
pub struct Cancelled(Arc<AtomicBool>);

impl Cancelled {
    pub fn get(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Locks whatever another thread has left: what is guarded here is whole after each statement.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The result of `work`. After Ctrl-C what it holds is free when it has ended.
pub fn wait<T: Send + 'static>(py: Python, work: impl FnOnce(&Cancelled) -> Result<T> + Send + 'static) -> PyResult<T> {
    let (cancelled, (send, results)) = (Cancelled::default(), mpsc::sync_channel(1));
    let (seen, results) = (cancelled.clone(), Mutex::new(results));
    spawn(move || drop(send.send(work(&seen))))?; // a panic is a bug: it drops the channel
    match receive(py, || wait_for(&lock(&results))) {
        Ok(Some(result)) => result.map_err(exception),
        Ok(None) => Err(bug()),
        Err(signal) => {
            cancelled.set();
            Err(signal)
        }
    }
}

/// Begins `work` in a thread of its own.
pub fn spawn(work: impl FnOnce() + Send + 'static) -> PyResult<()> {
    thread::Builder::new().spawn(work).map(drop).map_err(|e| {
        AojiError::new_err(format!(
            "the system gives no more threads (ulimit -u, or a container's limit of processes): {e}"
        ))
    })
}

/// A thread has ended without a result.
pub fn bug() -> PyErr {
    AojiError::new_err("a bug of aoji: standard error has more")
}

/// What a channel has, or that it has nothing yet.
pub enum Waited<T> {
    Got(T),
    Closed,
    Nothing,
}

/// Waits for a moment.
pub fn wait_for<T>(channel: &Receiver<T>) -> Waited<T> {
    match channel.recv_timeout(SIGNALS) {
        Ok(got) => Waited::Got(got),
        Err(RecvTimeoutError::Disconnected) => Waited::Closed,
        Err(RecvTimeoutError::Timeout) => Waited::Nothing,
    }
}

/// Calls `moment` without the GIL until it has something; `None` when nothing will come. Between two calls Python looks after signals.
pub fn receive<T: Send>(py: Python, moment: impl Fn() -> Waited<T> + Sync) -> PyResult<Option<T>> {
    loop {
        match py.detach(&moment) {
            Waited::Got(got) => return Ok(Some(got)),
            Waited::Closed => return Ok(None),
            Waited::Nothing => py.check_signals()?,
        }
    }
}
