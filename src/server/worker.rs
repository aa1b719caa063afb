//! The one thread that owns the batch. Handlers send it requests through channels and receive tokens the same way.

use super::{error::ApiError, metrics::Metrics};
use crate::{
    Batch, Constraint, Engine, Finish, GenerateOptions, Job, JobEvent, JobId, Load, TokenLogprobs,
    error::{Error, Result},
};
use std::{
    collections::HashMap,
    mem,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, Sender, TryRecvError, channel},
    },
    thread::{self, JoinHandle},
    time::Instant,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

/// The phase of a server's life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// The model has not generated a token yet.
    Starting,
    /// It answers requests.
    Ready,
    /// It finishes what it has accepted and accepts nothing new.
    Draining,
    /// The device failed, for this reason; nothing is answered any more.
    Failed(String),
}

/// What a request hears about its jobs.
#[derive(Debug)]
pub(super) enum Message {
    /// The prompt's own log-probabilities.
    Prompt(Vec<TokenLogprobs>),
    /// The prompt as one vector.
    Embedding(Vec<f32>),
    /// Tokens, and the text that is certain with them.
    Piece(Piece),
    /// The end.
    Finish(Finish),
    /// The constraint failed.
    Failed(String),
    /// The server ended it.
    Lost(String),
}

/// Tokens and the text that is certain with them.
#[derive(Debug, Default)]
pub(super) struct Piece {
    pub tokens: Vec<(u32, Option<TokenLogprobs>)>,
    pub text: String,
}

enum Command {
    Submit { request: u64, jobs: Vec<(Job, OwnedSemaphorePermit)>, events: Events, reply: oneshot::Sender<Result<()>> },
    Cancel { request: u64 },
    Stop,
}

type Events = mpsc::UnboundedSender<(usize, Message)>;

/// The handle by which requests reach the thread.
pub(super) struct Worker {
    commands: Sender<Command>,
    seats: Arc<Semaphore>,
    capacity: usize,
    next: AtomicU64,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// The jobs of a request. Dropping it cancels those that have not ended.
pub(super) struct Running {
    request: u64,
    commands: Sender<Command>,
    events: mpsc::UnboundedReceiver<(usize, Message)>,
    /// For each job, whether it has not ended yet.
    open: Vec<bool>,
}

impl Worker {
    /// Starts the thread. At most `capacity` jobs run or wait.
    pub fn start(
        engine: Engine,
        batch: Batch,
        capacity: usize,
        metrics: Arc<Metrics>,
        phase: watch::Sender<Phase>,
    ) -> Result<Worker> {
        let (commands, receiver) = channel();
        let work = Loop { batch, commands: receiver, jobs: HashMap::new(), metrics, phase };
        let thread = thread::Builder::new().name("aoji-engine".into());
        let spawned = thread.spawn(move || work.run(&engine));
        let thread = spawned.map_err(|e| Error::Memory(format!("the engine's thread does not start: {e}")))?;
        let (seats, thread) = (Arc::new(Semaphore::new(capacity)), Mutex::new(Some(thread)));
        Ok(Worker { commands, seats, capacity, next: AtomicU64::new(0), thread })
    }

    /// Whether there is room for `n` jobs. Asked before the work of making them; nothing is reserved yet.
    pub fn admit(&self, n: usize) -> Result<(), ApiError> {
        if n > self.capacity {
            let most = self.capacity;
            let message =
                format!("{n} answers are too many at once: this server takes at most {most} (--sequences and --queue)");
            return Err(ApiError::invalid("n", message));
        }
        if n > self.seats.available_permits() { Err(ApiError::queue_full(self.admitted())) } else { Ok(()) }
    }

    /// Submits the jobs of one request; their events carry the index in `jobs`.
    pub async fn submit(&self, jobs: Vec<Job>) -> Result<Running, ApiError> {
        let n = jobs.len();
        self.admit(n)?;
        let mut seats = Vec::with_capacity(n);
        for _ in 0..n {
            let seat = self.seats.clone().try_acquire_owned();
            seats.push(seat.map_err(|_| ApiError::queue_full(self.admitted()))?);
        }
        let (events, receiver) = mpsc::unbounded_channel();
        let (reply, answer) = oneshot::channel();
        let request = self.next.fetch_add(1, Ordering::Relaxed);
        // Made before the wait: if the client goes away meanwhile, dropping it cancels the jobs.
        let running = Running { request, commands: self.commands.clone(), events: receiver, open: vec![true; n] };
        let jobs = jobs.into_iter().zip(seats).collect();
        let sent = self.commands.send(Command::Submit { request, jobs, events, reply });
        let accepted = match sent {
            Ok(()) => answer.await.ok(),
            Err(_) => None,
        };
        let accepted = accepted.ok_or_else(|| ApiError::unavailable("the engine has stopped"))?;
        accepted.map_err(|e| ApiError::from_library(e, "prompt"))?;
        Ok(running)
    }

    /// Jobs that run or wait.
    pub fn admitted(&self) -> usize {
        self.capacity - self.seats.available_permits()
    }

    /// Ends all jobs and the thread.
    pub fn stop(&self) {
        let _ = self.commands.send(Command::Stop); // fails if the thread has ended, with all jobs
    }

    /// Waits for the thread's end.
    pub fn join(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let _ = thread.map(JoinHandle::join); // a panic was reported by the thread itself
    }
}

impl Running {
    /// The next event, with the index of its job; `None` after all have ended.
    pub async fn next(&mut self) -> Option<(usize, Message)> {
        if !self.is_open() {
            return None;
        }
        let gone = || (0, Message::Lost("the engine has stopped".into()));
        let (index, message) = self.events.recv().await.unwrap_or_else(gone);
        match message {
            Message::Lost(_) => self.open.fill(false), // one is enough: the request fails as a whole
            Message::Finish(_) | Message::Failed(_) => self.open[index] = false,
            Message::Prompt(_) | Message::Embedding(_) | Message::Piece(_) => {}
        }
        Some((index, message))
    }

    fn is_open(&self) -> bool {
        self.open.contains(&true)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.is_open() {
            let _ = self.commands.send(Command::Cancel { request: self.request });
        }
    }
}

/// What the thread knows of a job.
struct Seat {
    request: u64,
    index: usize,
    events: Events,
    /// Tokens whose text has not come yet.
    piece: Piece,
    since: Instant,
    first: Option<Instant>,
    last: Instant,
    permit: OwnedSemaphorePermit,
}

impl Seat {
    fn send(&self, message: Message) {
        let _ = self.events.send((self.index, message)); // a receiver that was dropped has cancelled its jobs
    }

    fn flush(&mut self) {
        if !self.piece.tokens.is_empty() || !self.piece.text.is_empty() {
            let piece = mem::take(&mut self.piece);
            self.send(Message::Piece(piece));
        }
    }
}

struct Loop {
    batch: Batch,
    commands: Receiver<Command>,
    jobs: HashMap<JobId, Seat>,
    metrics: Arc<Metrics>,
    phase: watch::Sender<Phase>,
}

impl Loop {
    fn run(mut self, engine: &Engine) {
        // The device's code may panic; then the requests get an error, and /ready reports it.
        let result = catch_unwind(AssertUnwindSafe(|| {
            self.probe(engine)?;
            self.work()
        }));
        let why = match result {
            Ok(Ok(())) => return, // told to stop, or nobody can send commands any more
            Ok(Err(e)) => e.to_string(),
            Err(panic) => format!("the engine panicked: {}", panic_text(&*panic)),
        };
        tracing::error!("the engine has stopped: {why}");
        self.phase.send_replace(Phase::Failed(why.clone()));
        self.end_all(&format!("the engine has stopped: {why}"));
        self.metrics.load(Load { running: 0, waiting: 0, tokens: 0, capacity: 1, put_back: 0 }); // the batch must not be used any more
    }

    /// Generates one token, so that "ready" is true.
    fn probe(&mut self, engine: &Engine) -> Result<()> {
        let token = engine.tokenizer()?.bos().unwrap_or(0);
        let options = GenerateOptions { max_tokens: Some(1), ..GenerateOptions::default() };
        self.batch.submit(Job { prompt: vec![token], options, ..Job::default() })?;
        while self.batch.step(&mut |_, _| {})? {}
        self.phase.send_if_modified(|phase| {
            let starting = *phase == Phase::Starting; // it may be draining already
            if starting {
                *phase = Phase::Ready;
            }
            starting
        });
        Ok(())
    }

    fn work(&mut self) -> Result<()> {
        let mut busy = false;
        loop {
            // Without work, it sleeps until a command comes; with work, it only checks for commands.
            loop {
                let command = match busy {
                    true => self.commands.try_recv(),
                    false => self.commands.recv().map_err(|_| TryRecvError::Disconnected),
                };
                match command {
                    Ok(Command::Stop) => {
                        self.end_all("the server is shutting down");
                        return Ok(());
                    }
                    Ok(Command::Submit { request, jobs, events, reply }) => {
                        let accepted = self.submit(request, jobs, &events);
                        let _ = reply.send(accepted); // a receiver that was dropped has cancelled its jobs
                    }
                    Ok(Command::Cancel { request }) => self.cancel(request),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return Ok(()),
                }
                busy = true;
            }
            let (jobs, metrics) = (&mut self.jobs, &self.metrics);
            metrics.load(self.batch.load());
            busy = self.batch.step(&mut |id, event| tell(jobs, metrics, id, event))?;
            jobs.values_mut().for_each(Seat::flush);
            metrics.load(self.batch.load());
        }
    }

    fn submit(&mut self, request: u64, jobs: Vec<(Job, OwnedSemaphorePermit)>, events: &Events) -> Result<()> {
        for (index, (job, permit)) in jobs.into_iter().enumerate() {
            let id = match self.batch.submit(job) {
                Ok(id) => id,
                Err(e) => {
                    self.cancel(request); // all of a request, or nothing
                    return Err(e);
                }
            };
            let (events, since, piece) = (events.clone(), Instant::now(), Piece::default());
            let seat = Seat { request, index, events, piece, since, first: None, last: since, permit };
            self.jobs.insert(id, seat);
        }
        Ok(())
    }

    fn cancel(&mut self, request: u64) {
        let meant = self.jobs.iter().filter(|(_, seat)| seat.request == request);
        let ids: Vec<JobId> = meant.map(|(id, _)| *id).collect();
        for id in ids {
            self.batch.cancel(id);
            if let Some(seat) = self.jobs.remove(&id) {
                self.metrics.cancelled(seat.first.is_some());
            }
        }
    }

    fn end_all(&mut self, why: &str) {
        self.jobs.drain().for_each(|(_, seat)| end(Some(seat), Message::Lost(why.into())));
    }
}

/// Passes an event on to the request that it belongs to.
fn tell(jobs: &mut HashMap<JobId, Seat>, metrics: &Metrics, id: JobId, event: JobEvent) {
    let Some(seat) = jobs.get_mut(&id) else { return };
    match event {
        JobEvent::Prompt(logprobs) => seat.send(Message::Prompt(logprobs)),
        JobEvent::Embedding(vector) => seat.send(Message::Embedding(vector)),
        JobEvent::Token(token, logprobs) => {
            // If the token completes some text, that is the next event, and both are sent together.
            seat.flush();
            let now = Instant::now();
            match seat.first {
                None => {
                    seat.first = Some(now);
                    metrics.first_token(now - seat.since);
                }
                Some(_) => metrics.next_token(now - seat.last),
            }
            seat.last = now;
            seat.piece.tokens.push((token, logprobs));
        }
        JobEvent::Text(text) => {
            seat.piece.text.push_str(&text);
            seat.flush();
        }
        JobEvent::Finish(finish) => {
            metrics.finished(&finish, seat.since.elapsed());
            end(jobs.remove(&id), Message::Finish(finish));
        }
        JobEvent::Failed(why) => {
            metrics.failed();
            end(jobs.remove(&id), Message::Failed(why));
        }
    }
}

/// Sends the last message of a job. The job's place is freed before that, so that a client that has its answer may ask
/// again at once.
fn end(seat: Option<Seat>, message: Message) {
    let Some(mut seat) = seat else { return };
    seat.flush();
    drop(seat.permit);
    let _ = seat.events.send((seat.index, message));
}

/// A constraint that may panic without ending the engine's thread and all other jobs.
pub(super) struct Guarded<C>(pub C);

impl<C: Constraint> Constraint for Guarded<C> {
    fn allowed(&mut self, mask: &mut [u32]) -> Result<(), String> {
        guard(|| self.0.allowed(mask))
    }

    fn accept(&mut self, token: u32) -> Result<(), String> {
        guard(|| self.0.accept(token))
    }

    fn expected(&mut self) -> Vec<u32> {
        catch_unwind(AssertUnwindSafe(|| self.0.expected())).unwrap_or_default()
    }

    fn allows(&mut self, tokens: &[u32]) -> usize {
        catch_unwind(AssertUnwindSafe(|| self.0.allows(tokens))).unwrap_or(0)
    }
}

fn guard(f: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    // After a panic the job ends and its constraint is not asked again.
    catch_unwind(AssertUnwindSafe(f))
        .unwrap_or_else(|panic| Err(format!("the constraint panicked: {}", panic_text(&*panic))))
}

/// The message of a panic.
pub(super) fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Panics;

    impl Constraint for Panics {
        fn allowed(&mut self, _: &mut [u32]) -> Result<(), String> {
            panic!("on purpose");
        }

        fn accept(&mut self, _: u32) -> Result<(), String> {
            Ok(())
        }
    }

    #[test]
    fn a_panicking_constraint_ends_its_job_alone() {
        let mut guarded = Guarded(Panics);
        assert_eq!(guarded.allowed(&mut []), Err("the constraint panicked: on purpose".into()));
        assert_eq!(guarded.accept(1), Ok(()));
    }
}
