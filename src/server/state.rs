//! A model that is served, and what all of its requests share.

use super::{
    calls::CallFormat,
    constrain::Grammars,
    error::ApiError,
    memory::Memory,
    metrics::Metrics,
    options::{ServerOptions, cors},
    worker::{Phase, Worker},
};
use crate::{
    BatchOptions, Engine, Template, Tokenizer,
    error::{Error, Result},
};
use axum::http::StatusCode;
use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, OnceLock},
    thread,
    time::{SystemTime, UNIX_EPOCH},
};
use tokio::sync::watch;

/// A model that is served. Clones share it; the engine's thread ends when the last clone and the last request are gone.
#[derive(Clone)]
pub struct Server(pub(super) Arc<State>);

/// What all requests share.
pub(super) struct State {
    pub engine: Engine,
    pub tokenizer: Tokenizer,
    pub template: Template,
    /// How the model writes calls of functions; `None` where it is never asked for any.
    pub calls: Option<CallFormat>,
    pub options: ServerOptions,
    pub worker: Worker,
    pub metrics: Arc<Metrics>,
    pub phase: watch::Sender<Phase>,
    /// Earlier answers.
    pub memory: Arc<Memory>,
    pub grammars: OnceLock<Result<Grammars, String>>,
    pub fingerprint: String,
    pub created: u64,
}

impl Server {
    /// Makes the batch and starts its thread, which first generates one token; see [`Server::ready`].
    ///
    /// # Errors
    /// `Input` for a model without a tokenizer, options out of range, an impossible name, key or origin, or a way to
    /// write calls that the template does not know; and what [`Engine::batch`] refuses.
    pub fn start(engine: Engine, options: ServerOptions) -> Result<Server> {
        let tokenizer = engine.tokenizer()?.clone();
        let Some(name) = options.names.first() else {
            return Err(Error::Input("the served model needs a name".into()));
        };
        if options.keys.iter().any(String::is_empty) {
            return Err(Error::Input("an API key is empty: everybody would have it".into()));
        }
        let _ = cors(&options.cors)?; // only checked here: the router makes its own
        let template = options.template.clone().unwrap_or_else(|| engine.template().clone());
        let calls = CallFormat::of(options.tool_parser, &template)?;
        let (max_tokens, chunk) = (engine.max_context(), options.prefill_chunk);
        let batch =
            engine.batch(&BatchOptions { sequences: options.sequences, max_tokens, cache_tokens: None, chunk })?;
        let metrics = Arc::new(Metrics::new(name, engine.device(), &batch.load()));
        let phase = watch::Sender::new(Phase::Starting);
        let capacity = options.sequences.saturating_add(options.queue).min(tokio::sync::Semaphore::MAX_PERMITS);
        let worker = Worker::start(engine.clone(), batch, capacity, metrics.clone(), phase.clone())?;
        let memory = Arc::new(Memory::new(options.speculate_memory));
        let (grammars, fingerprint) = (OnceLock::new(), fingerprint(&engine));
        let created = now();
        let state = State {
            engine,
            tokenizer,
            template,
            calls,
            options,
            worker,
            metrics,
            phase,
            memory,
            grammars,
            fingerprint,
            created,
        };
        let server = Server(Arc::new(state));
        // This takes hundreds of milliseconds for a large vocabulary, and the first request with a schema should not
        // wait for it; unless the system gives no more threads.
        let state = server.0.clone();
        let _ = thread::Builder::new().spawn(move || {
            let _ = state.grammars(); // an error is reported to the requests that need them
        });
        Ok(server)
    }

    /// The phase of its life that it is in.
    pub fn phase(&self) -> Phase {
        self.0.phase.borrow().clone()
    }

    /// Waits until the model has generated a token.
    ///
    /// # Errors
    /// `Input` with the reason when it cannot.
    pub async fn ready(&self) -> Result<()> {
        let mut phase = self.0.phase.subscribe();
        let known = phase.wait_for(|phase| *phase != Phase::Starting).await;
        match known.as_deref() {
            Ok(Phase::Failed(why)) => Err(Error::Input(format!("the model does not run: {why}"))),
            _ => Ok(()),
        }
    }

    /// Refuses new requests; those that have been accepted are finished.
    pub fn drain(&self) {
        self.0.phase.send_if_modified(|phase| {
            let open = matches!(phase, Phase::Starting | Phase::Ready);
            if open {
                *phase = Phase::Draining;
            }
            open
        });
    }

    /// Ends all answers at once, with an error, and then the engine's thread; nothing is answered after that.
    pub fn stop(&self) {
        self.drain();
        self.0.worker.stop();
    }

    /// [`Server::stop`], then waits until the thread has released the device.
    pub fn close(&self) {
        self.stop();
        self.0.worker.join();
    }
}

impl State {
    /// Whether there is room for `n` answers.
    pub fn admit(&self, n: usize) -> Result<(), ApiError> {
        self.worker.admit(n).inspect_err(|e| self.refused(e))
    }

    /// Counts a request that is not let in.
    pub fn refused(&self, error: &ApiError) {
        if error.status == StatusCode::TOO_MANY_REQUESTS {
            self.metrics.rejected("queue_full");
        }
    }

    /// The grammars that can constrain answers, made when first asked for.
    pub fn grammars(&self) -> Result<&Grammars, &str> {
        let config = self.engine.config();
        let made = self.grammars.get_or_init(|| Grammars::new(&self.tokenizer, config.vocab, &config.eos));
        made.as_ref().map_err(String::as_str)
    }
}

/// A name for what the numbers in a response depend on, as far as the server knows: the version, the model's sizes, the
/// device. Not the weights themselves.
fn fingerprint(engine: &Engine) -> String {
    let mut hasher = DefaultHasher::new();
    format!("{:?} {} {}", engine.config(), engine.device(), engine.is_gpu()).hash(&mut hasher);
    format!("aoji-{}-{:016x}", env!("CARGO_PKG_VERSION"), hasher.finish())
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
