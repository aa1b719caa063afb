//! `aoji bench --server`: what HTTP costs. The same requests run once through the server and once directly on the batch beneath it.

use super::{Args, Header, table};
use crate::{common, guesses::Guesses};
use aoji::{
    BatchOptions, Engine, Error, GenerateOptions, Job, JobEvent, JobId, Result, bench,
    server::{Server, ServerOptions},
};
use axum::serve::ListenerExt;
use serde::Serialize;
use serde_json::json;
use std::{
    collections::HashMap,
    io::{self, BufRead, BufReader},
    net::SocketAddr,
    sync::{Barrier, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};
use tokio::{net::TcpListener, sync::oneshot};

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    header: Header,
    model: String,
    sequences: usize,
    /// Of the server.
    cache_tokens: usize,
    prompt_tokens: usize,
    tokens: usize,
    streams: Vec<Row>,
}

/// Results for this many requests at once.
#[derive(Serialize)]
struct Row {
    streams: usize,
    requests: usize,
    http: Side,
    engine: Side,
    /// What HTTP adds to a request, at the median of requests, divided by the tokens that were streamed during it: its
    /// own and those of the requests that ran at the same time.
    overhead_us_per_token: f64,
    /// The part of a request through HTTP that the engine does not report as its own (`timings` of the reply: queue,
    /// prompt and decoding), divided by its tokens, at the median. This is the way there and back; it leaves out that
    /// the engine is slower when it shares its cores.
    outside_us_per_token: f64,
    /// All tokens, divided by the time from the first request to the last answer, through HTTP.
    tokens_per_s: f64,
}

/// One of the two ways to get the answers.
#[derive(Serialize)]
struct Side {
    ttft_ms_p50: f64,
    ttft_ms_p99: f64,
    /// From the first token to the last, divided by the number of tokens minus one.
    ms_per_token_p50: f64,
    ms_per_token_p99: f64,
    total_ms_p50: f64,
}

/// One request: from its start to the first token and to the end.
#[derive(Clone, Copy)]
struct Timed {
    first: Duration,
    total: Duration,
    /// The engine's part of the time, as it reports it.
    engine: Duration,
}

/// Measures.
pub fn run(args: &Args) -> Result<()> {
    if args.repeat == 0 || args.tokens < 2 {
        return Err(Error::Input("--repeat must be at least 1 and --tokens at least 2".into()));
    }
    // as many sequences as the largest load has streams, as a server for it would be started
    let most = args.streams.iter().copied().max().unwrap_or(1);
    let sequences = most.clamp(BatchOptions::default().sequences, *BatchOptions::SEQUENCES.end());
    let engine = args.model.load(sequences, None, &Guesses::Off)?;
    let prompt_tokens = args.depth.first().copied().unwrap_or(0).max(1);
    let needed = prompt_tokens.saturating_add(args.tokens);
    if needed > engine.max_context() {
        return Err(Error::Context { needed, max: engine.max_context() });
    }
    let mut rows = Vec::new();
    for &streams in &args.streams {
        common::note(format_args!("{streams} streams"));
        let (engine, tokens, repeat) = (&engine, args.tokens, args.repeat);
        let load = Load { engine, sequences, streams, prompt_tokens, tokens, repeat };
        let (engine, _) = load.alone()?;
        let (http, wall) = load.served()?;
        let streamed = (args.tokens * streams.min(sequences)) as f64;
        let overhead = (ms(median(&http, |t| t.total)) - ms(median(&engine, |t| t.total))) * 1e3 / streamed;
        rows.push(Row {
            streams,
            requests: http.len(),
            http: Side::of(&http, args.tokens),
            engine: Side::of(&engine, args.tokens),
            overhead_us_per_token: overhead,
            outside_us_per_token: ms(median(&http, |t| t.total.saturating_sub(t.engine))) * 1e3 / args.tokens as f64,
            tokens_per_s: (http.len() * args.tokens) as f64 / wall.as_secs_f64(),
        });
    }
    let header = header(&engine);
    let model = args.model.model.clone();
    let (tokens, cache_tokens) = (args.tokens, engine.plan().cache_tokens);
    let report = Report { header, model, sequences, cache_tokens, prompt_tokens, tokens, streams: rows };
    if args.json { common::print_json(&report) } else { common::print(&text(&report)) }
}

fn header(engine: &Engine) -> Header {
    #[cfg(feature = "cuda")]
    if let Some(cuda) = engine.cuda() {
        return Header::of_gpu(cuda.info());
    }
    Header::new(engine.device())
}

/// What the clients ask at the same time, and how often.
struct Load<'a> {
    engine: &'a Engine,
    sequences: usize,
    streams: usize,
    prompt_tokens: usize,
    tokens: usize,
    repeat: usize,
}

impl Load<'_> {
    /// A prompt whose beginning no earlier prompt had.
    fn prompt(&self, run: usize, stream: usize) -> Vec<u32> {
        let vocab = self.engine.config().vocab;
        let mut tokens = bench::tokens(self.prompt_tokens, vocab, (run * self.streams + stream) as u64);
        tokens[0] = ((run * self.streams + stream) % vocab) as u32;
        tokens
    }

    /// Through the batch. The first run warms up and is not counted.
    fn alone(&self) -> Result<(Vec<Timed>, Duration)> {
        let max_tokens = self.prompt_tokens + self.tokens;
        let sizes = BatchOptions { sequences: self.sequences, max_tokens, ..BatchOptions::default() };
        let mut batch = self.engine.batch(&sizes)?;
        let (mut timed, mut wall) = (Vec::new(), Duration::ZERO);
        for run in 0..=self.repeat {
            let begin = Instant::now();
            for stream in 0..self.streams {
                let options =
                    GenerateOptions { max_tokens: Some(self.tokens), ignore_eos: true, ..GenerateOptions::default() };
                batch.submit(Job { prompt: self.prompt(run, stream), options, ..Job::default() })?;
            }
            let (mut first, mut ended) = (HashMap::<JobId, Duration>::new(), Vec::new());
            let mut each = |id, event| match event {
                JobEvent::Token(..) => {
                    first.entry(id).or_insert_with(|| begin.elapsed());
                }
                JobEvent::Finish(_) => ended.push((id, begin.elapsed())),
                _ => {}
            };
            while batch.step(&mut each)? {}
            if run > 0 {
                wall += begin.elapsed();
                timed.extend(ended.iter().map(|&(id, total)| Timed { first: first[&id], total, engine: total }));
            }
        }
        Ok((timed, wall))
    }

    /// Through HTTP, each stream a thread and a connection of its own.
    fn served(&self) -> Result<(Vec<Timed>, Duration)> {
        let options = ServerOptions { sequences: self.sequences, queue: self.streams, ..ServerOptions::default() };
        let site = Site::start(self.engine.clone(), options)?;
        let barrier = Barrier::new(self.streams);
        let stream = |stream: usize| -> Result<Vec<(Instant, Timed)>> {
            let agent = ureq::Agent::new_with_defaults();
            let mut timed = Vec::new();
            for run in 0..=self.repeat {
                let body = json!({
                    "prompt": self.prompt(run, stream), "max_tokens": self.tokens, "temperature": 0,
                    "ignore_eos": true, "stream": true,
                });
                barrier.wait();
                let begin = Instant::now();
                let one = ask(&agent, site.address, &body, self.tokens);
                if run > 0 {
                    timed.push((begin, one?));
                } else {
                    one?;
                }
            }
            Ok(timed)
        };
        // No stream begins before each has a thread: it would wait for the others at the barrier.
        let may_begin = Mutex::new(false);
        let lock = || may_begin.lock().unwrap_or_else(PoisonError::into_inner);
        let all = thread::scope(|scope| -> Result<Vec<Vec<_>>> {
            let (stream, lock, mut gate) = (&stream, &lock, lock());
            let begin = |i| move || if *lock() { stream(i) } else { Ok(Vec::new()) };
            let spawn = |i| thread::Builder::new().spawn_scoped(scope, begin(i)).map_err(no_thread);
            let threads = (0..self.streams).map(spawn).collect::<Result<Vec<_>>>()?;
            *gate = true;
            drop(gate);
            threads.into_iter().map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
        })?;
        let all: Vec<(Instant, Timed)> = all.concat();
        let ends = all.iter().map(|(begin, t)| *begin + t.total).max();
        let begins = all.iter().map(|(begin, _)| *begin).min();
        let wall = ends.zip(begins).map_or(Duration::ZERO, |(end, begin)| end - begin);
        Ok((all.into_iter().map(|(_, t)| t).collect(), wall))
    }
}

fn no_thread(source: io::Error) -> Error {
    Error::Io { path: "threads of server and streams".into(), source }
}

/// One streamed completion.
fn ask(agent: &ureq::Agent, address: SocketAddr, body: &serde_json::Value, tokens: usize) -> Result<Timed> {
    let failed = |what: String| Error::Input(format!("a request to the server failed: {what}"));
    let begin = Instant::now();
    let reply = agent.post(format!("http://{address}/v1/completions")).send_json(body);
    let reply = reply.map_err(|e| failed(e.to_string()))?;
    let (mut first, mut last) = (None, String::new());
    for line in BufReader::new(reply.into_body().into_reader()).lines() {
        let line = line.map_err(|e| failed(e.to_string()))?;
        let Some(data) = line.strip_prefix("data: ") else { continue };
        first.get_or_insert_with(|| begin.elapsed());
        if data == "[DONE]" {
            let total = begin.elapsed();
            let said: serde_json::Value = serde_json::from_str(&last).unwrap_or_default();
            return match said["choices"][0]["finish_reason"].as_str() {
                Some("length") => {
                    let of = |part: &str| said["timings"][part].as_f64().unwrap_or(0.0) / 1e3;
                    let engine = Duration::from_secs_f64(of("queue_ms") + of("prefill_ms") + of("decode_ms"));
                    Ok(Timed { first: first.unwrap_or(total), total, engine })
                }
                _ => Err(failed(format!("it ended with {last} and not after {tokens} tokens"))),
            };
        }
        last = data.into();
    }
    Err(failed("the stream ended early".into()))
}

/// A server in this process, in threads of its own.
struct Site {
    address: SocketAddr,
    shutdown: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Site {
    fn start(engine: Engine, options: ServerOptions) -> Result<Site> {
        let failed = |source| Error::Io { path: "the server's socket".into(), source };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.map_err(failed)?;
        let server = Server::start(engine, options)?;
        let (listener, address) = runtime.block_on(async {
            server.ready().await?;
            let listener = TcpListener::bind("127.0.0.1:0").await.map_err(failed)?;
            let address = listener.local_addr().map_err(failed)?;
            Ok::<_, Error>((listener, address))
        })?;
        let (shutdown, signal) = oneshot::channel::<()>();
        let serve = move || {
            runtime.block_on(async {
                let listener = listener.tap_io(|io| {
                    let _ = io.set_nodelay(true);
                });
                server.serve(listener, async move { drop(signal.await) }, Duration::from_secs(10)).await;
            });
        };
        let thread = Some(thread::Builder::new().spawn(serve).map_err(no_thread)?);
        Ok(Site { address, shutdown: Some(shutdown), thread })
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        drop(self.shutdown.take());
        self.thread.take().map(thread::JoinHandle::join);
    }
}

impl Side {
    fn of(timed: &[Timed], tokens: usize) -> Side {
        let per_token = |t: &Timed| (t.total - t.first) / (tokens as u32 - 1);
        Side {
            ttft_ms_p50: ms(median(timed, |t| t.first)),
            ttft_ms_p99: ms(percentile(timed, 99, |t| t.first)),
            ms_per_token_p50: ms(median(timed, per_token)),
            ms_per_token_p99: ms(percentile(timed, 99, per_token)),
            total_ms_p50: ms(median(timed, |t| t.total)),
        }
    }
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

fn median(timed: &[Timed], of: impl Fn(&Timed) -> Duration) -> Duration {
    percentile(timed, 50, of)
}

/// A percentile of at least one request.
fn percentile(timed: &[Timed], percent: usize, of: impl Fn(&Timed) -> Duration) -> Duration {
    let mut times: Vec<Duration> = timed.iter().map(of).collect();
    times.sort();
    times[(times.len() * percent / 100).min(times.len() - 1)]
}

fn text(r: &Report) -> String {
    let row = |row: &Row| {
        let three = |x: f64| format!("{x:.3}");
        vec![
            row.streams.to_string(),
            row.requests.to_string(),
            three(row.http.ttft_ms_p50),
            three(row.engine.ttft_ms_p50),
            three(row.http.ms_per_token_p50),
            three(row.engine.ms_per_token_p50),
            three(row.http.ms_per_token_p99),
            format!("{:.1}", row.overhead_us_per_token),
            format!("{:.1}", row.outside_us_per_token),
            format!("{:.1}", row.tokens_per_s),
        ]
    };
    let columns = [
        "streams",
        "requests",
        "TTFT ms",
        "without HTTP",
        "ms/token",
        "without HTTP",
        "p99",
        "HTTP us/token",
        "outside engine",
        "tokens/s",
    ];
    let rows: Vec<Vec<String>> = r.streams.iter().map(row).collect();
    let (prompt, tokens, sequences) = (r.prompt_tokens, r.tokens, r.sequences);
    let head = format!(
        "{}{}: prompts of {prompt} tokens, answers of {tokens}; {sequences} sequences\n\n",
        r.header.text(),
        r.model
    );
    head + &table::table(&columns, &rows)
}
