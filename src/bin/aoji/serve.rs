//! `aoji serve`: serves OpenAI's APIs and Anthropic's over HTTP.

use crate::{
    common::{self, GenerationConfig, ModelArgs},
    guesses::Guesses,
};
use aoji::{
    BatchOptions, Engine, Error, Result, Template, hub,
    server::{Server, ServerOptions, ToolParser, UnknownFields, tokenizer_config},
};
use axum::serve::ListenerExt;
use clap::ValueEnum;
use std::{
    fs, io,
    net::SocketAddr,
    os::unix::{fs::FileTypeExt, net::UnixStream},
    path::{Path, PathBuf},
    process,
    time::Duration,
};
use tokio::{
    net::{TcpListener, UnixListener},
    signal::unix::{SignalKind, signal},
};

const AFTER_HELP: &str = "\
Routes: /v1/models, /v1/completions, /v1/chat/completions, /v1/responses, /v1/embeddings, /v1/messages (Anthropic's), /tokenize, /detokenize, /tokenizer_info, /health (the process lives), \
/ready (the model answers), /metrics (Prometheus), /version, /openapi.json (all routes and fields), / (a page to talk to the \
model). docs/server.md says what happens to each field of a request.

SIGTERM and Ctrl-C end it in order: it accepts no new requests, gives running answers --drain-seconds to finish, and then ends them; \
a second signal ends it at once.

Example: aoji serve -m werty1248/Llama-3-Ko-8B-Instruct-AOG --served-model-name aog
         curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
           -d '{\"messages\": [{\"role\": \"user\", \"content\": \"피보나치 수열이 뭐야?\"}]}'";

/// Arguments of `aoji serve`.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Address to listen on; 0.0.0.0 for all addresses of this machine
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    host: String,
    /// Port to listen on; 0 for any free one
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// Listen on a Unix socket instead of address and port
    #[arg(long, value_name = "PATH", conflicts_with_all = ["host", "port"])]
    unix_socket: Option<PathBuf>,
    /// Name of the model in requests and replies; repeatable [default: as --model]
    #[arg(long, value_name = "NAME")]
    served_model_name: Vec<String>,
    /// Answers that are generated at the same time, 1 to 64; more than 16 take turns
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = common::within(BatchOptions::SEQUENCES))]
    sequences: usize,
    /// Size of the cache of keys and values, in tokens, which all running answers and their prompts share. When it is full, new answers
    /// wait, and the newest running one may be put back and computed again later; its text is the same [default: --context for each
    /// answer, but for no more than 16, or as much of that as fits the memory]
    #[arg(long, value_name = "TOKENS")]
    cache_tokens: Option<usize>,
    /// Most tokens of a prompt that are computed between two tokens of other answers, 34 to 511
    #[arg(long, value_name = "TOKENS", default_value_t = 256, value_parser = common::within(BatchOptions::CHUNK))]
    prefill_chunk: usize,
    /// Guess the next tokens: ngram takes what came next where prompt or answer had the same text before; model=NAME asks a
    /// smaller model with the same vocabulary. Answers are the same, and come faster where guesses are right; the field
    /// speculate of a request overrides this
    #[arg(long, value_name = "ngram|model=NAME|off", default_value = "off")]
    speculate: Guesses,
    /// With ngram: guess also from the last TOKENS tokens of earlier answers to the same API key
    #[arg(long, value_name = "TOKENS", default_value_t = 0, value_parser = common::within(0..=1 << 16))]
    speculate_memory: usize,
    /// Answers that may wait besides the ones that run; more are refused with 429
    #[arg(long, value_name = "N", default_value_t = 64)]
    queue: usize,
    /// A key that requests must have; repeatable; without any key, every request is accepted
    #[arg(long, value_name = "KEY", env = "AOJI_API_KEY", hide_env_values = true)]
    api_key: Vec<String>,
    /// A file with more keys, one per line
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// A web origin whose pages may use the server, or *; repeatable
    #[arg(long, value_name = "ORIGIN")]
    cors: Vec<String>,
    /// Most bytes of a request
    #[arg(long, value_name = "BYTES", default_value_t = 16 << 20)]
    body_limit: usize,
    /// Seconds that running answers have to finish after SIGTERM
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    drain_seconds: u64,
    /// aog, aog-instruction-first, raw or a .jinja file [default: the model's own, else aog]
    #[arg(long, value_name = "NAME")]
    chat_template: Option<String>,
    /// How the model writes calls of functions: auto, by its template; llama3, hermes, mistral, json; none refuses tools
    #[arg(long, value_name = "FORMAT", default_value = "auto")]
    tool_parser: ToolParser,
    /// Whether sampling as the model's author recommends it is the default for requests that do not set it
    #[arg(long, value_name = "auto|none", default_value = "auto")]
    generation_config: GenerationConfig,
    /// What happens to fields that aoji does not know: warn names them in the header x-aoji-ignored-params
    #[arg(long, value_name = "warn|reject|ignore", default_value = "warn")]
    unknown_fields: UnknownFields,
    /// How the log on standard error is written
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    log_format: LogFormat,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    /// For people
    Text,
    /// One object per line
    Json,
}

impl Args {
    /// Sends the log to standard error: a line for each request, and what happens.
    pub fn start_log(&self, verbose: u8) {
        let level = if verbose > 1 { tracing::Level::DEBUG } else { tracing::Level::INFO };
        // A line that cannot be written is lost: to report it, the subscriber would use `eprintln!`, which panics.
        let log = tracing_subscriber::fmt().with_max_level(level).with_writer(io::stderr).log_internal_errors(false);
        let log = log.with_target(false);
        match self.log_format {
            LogFormat::Text => log.with_ansi(common::color()).init(),
            LogFormat::Json => log.json().flatten_event(true).init(),
        }
    }

    fn options(&self, engine: &Engine) -> Result<ServerOptions> {
        let mut keys = self.api_key.clone();
        if let Some(path) = &self.api_key_file {
            let text = common::read_lines(path)?;
            keys.extend(text.lines().map(str::trim).filter(|key| !key.is_empty()).map(String::from));
            if keys.is_empty() {
                return Err(Error::File { path: path.clone(), what: "has no key, expected one per line".into() });
            }
        }
        let names = match self.served_model_name.is_empty() {
            true => vec![self.model.model.clone()],
            false => self.served_model_name.clone(),
        };
        let template = self.model.template(engine, self.chat_template.as_deref())?;
        let mut tokenizer_config = match self.model.model.as_str() {
            "demo" => serde_json::Map::new(),
            name => tokenizer_config(&hub::resolve(name)?)?,
        };
        if let Template::Jinja(jinja) = &template
            && jinja.path().extension().is_none_or(|e| e != "json" && e != "gguf")
        {
            let source = common::read_file(jinja.path())?;
            tokenizer_config.insert("chat_template".into(), source.into());
        }
        Ok(ServerOptions {
            names,
            sequences: self.sequences,
            prefill_chunk: self.prefill_chunk,
            queue: self.queue,
            keys,
            cors: self.cors.clone(),
            body_limit: self.body_limit,
            template: Some(template),
            tool_parser: self.tool_parser,
            unknown_fields: self.unknown_fields,
            sampling: self.generation_config.sampling(engine),
            speculate: self.speculate.speculate(),
            speculate_memory: self.speculate_memory,
            tokenizer_config,
        })
    }
}

/// Serves until a signal ends it.
pub fn run(args: Args) -> Result<()> {
    // Few threads are enough: they only move bytes, and the engine has its own threads.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).max_blocking_threads(8).enable_all().build();
    let runtime = runtime.map_err(|source| Error::Io { path: "threads of the server".into(), source })?;
    let result = runtime.block_on(serve(&args));
    runtime.shutdown_timeout(Duration::from_secs(1)); // do not wait for requests that were cut off
    result
}

async fn serve(args: &Args) -> Result<()> {
    // The socket comes first, so that a port that is taken is reported before the model is loaded.
    let socket = Socket::open(args).await?;
    let engine = tokio::task::block_in_place(|| args.model.load(args.sequences, args.cache_tokens, &args.speculate))?;
    tracing::info!("{}", args.model.describe(&engine));
    tracing::info!("{} answers at a time, with a cache of {} tokens", args.sequences, engine.plan().cache_tokens);
    args.generation_config.announce(&engine, |text| tracing::info!("{text}"));
    let options = args.options(&engine)?;
    if let Socket::Tcp(_, address) = &socket
        && options.keys.is_empty()
        && !address.ip().is_loopback()
    {
        tracing::warn!("everybody who can reach {address} can use the model; --api-key keeps others out");
    }
    let server = Server::start(engine, options)?;
    server.ready().await?;
    let shutdown = signals()?;
    let drain = Duration::from_secs(args.drain_seconds);
    let finished = match socket {
        Socket::Tcp(listener, address) => {
            tracing::info!("listening on http://{address}");
            // A token is a small packet, and the next one must not wait until it is confirmed.
            let listener = listener.tap_io(|io| {
                let _ = io.set_nodelay(true);
            });
            server.serve(listener, shutdown, drain).await
        }
        Socket::Unix(listener, path) => {
            tracing::info!("listening on {}", path.display());
            let finished = server.serve(listener, shutdown, drain).await;
            let _ = fs::remove_file(&path);
            finished
        }
    };
    // The device is released before the program ends.
    tokio::task::block_in_place(|| server.close());
    if !finished {
        tracing::warn!("answers were cut off after {} s", args.drain_seconds);
    }
    Ok(())
}

enum Socket {
    Tcp(TcpListener, SocketAddr),
    Unix(UnixListener, PathBuf),
}

impl Socket {
    async fn open(args: &Args) -> Result<Socket> {
        if let Some(path) = &args.unix_socket {
            remove_stale(path)?;
            let listener = UnixListener::bind(path).map_err(|source| Error::Io { path: path.clone(), source })?;
            return Ok(Socket::Unix(listener, path.clone()));
        }
        let path = || PathBuf::from(format!("{}:{}", args.host, args.port));
        let bound = async {
            let listener = TcpListener::bind((args.host.as_str(), args.port)).await?;
            let address = listener.local_addr()?;
            Ok(Socket::Tcp(listener, address))
        };
        bound.await.map_err(|source| Error::Io { path: path(), source })
    }
}

/// Removes a socket that a server which no longer runs has left behind.
fn remove_stale(path: &Path) -> Result<()> {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    if is_socket && UnixStream::connect(path).is_err() {
        fs::remove_file(path).map_err(|source| Error::Io { path: path.into(), source })?;
    }
    Ok(())
}

/// Ready when a signal asks the server to end; a second signal ends the process at once.
fn signals() -> Result<impl Future<Output = ()>> {
    let watch = |kind| signal(kind).map_err(|source| Error::Io { path: "signals".into(), source });
    let (mut terminate, mut interrupt) = (watch(SignalKind::terminate())?, watch(SignalKind::interrupt())?);
    let (ended, shutdown) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        let mut ended = Some(ended);
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            match ended.take() {
                Some(ended) => drop(ended.send(())), // the receiver lives as long as the server
                None => process::exit(130),
            }
            tracing::info!("finishing the running answers; a second signal ends them at once");
        }
    });
    Ok(async move {
        let _ = shutdown.await;
    })
}
