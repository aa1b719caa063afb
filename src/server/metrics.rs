//! The metrics for Prometheus, under vLLM's names with `aoji:` in place of `vllm:`.

use crate::{Finish, FinishReason, Load, ops::PAGE};
use prometheus_client::{
    encoding::prometheus_text,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::{Metric, Registry},
};
use std::{fmt, sync::atomic::AtomicU64, time::Duration};

/// One label and its value.
type Label = [(&'static str, &'static str); 1];

/// Upper ends of the buckets of durations of requests, in seconds.
const SECONDS: [f64; 17] =
    [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0];
/// The same for the time between two tokens.
const TOKEN_SECONDS: [f64; 14] =
    [0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.5, 1.0];
/// Upper ends of the buckets of `max_tokens`.
const TOKENS: [f64; 9] = [1.0, 16.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0, 16384.0];

/// All of them.
pub(super) struct Metrics {
    registry: Registry,
    running: Gauge,
    waiting: Gauge,
    kv_usage: Gauge<f64, AtomicU64>,
    preemptions: Counter,
    queue: Histogram,
    first_token: Histogram,
    inter_token: Histogram,
    e2e: Histogram,
    prefill: Histogram,
    decode: Histogram,
    prompt_tokens: Counter,
    cached_tokens: Counter,
    cache_queries: Counter,
    cache_hits: Counter,
    generated: Counter,
    drafted: Counter,
    accepted: Counter,
    success: Family<Label, Counter>,
    failed: Counter,
    cancelled: Family<Label, Counter>,
    rejected: Family<Label, Counter>,
    max_tokens: Histogram,
}

impl Metrics {
    /// All at zero, for the model `name` on `device` and an idle batch.
    pub fn new(name: &str, device: &str, load: &Load) -> Metrics {
        let mut registry = Registry::default();
        let r = &mut registry;
        let info = |key, value: &str| Info::new([(key, value.to_string())]);
        r.register("aoji:build", "Version of aoji", info("version", env!("CARGO_PKG_VERSION")));
        let model = [("model_name", name.to_string()), ("device", device.to_string())];
        r.register("aoji:model", "The model and where it runs", Info::new(model));
        let cache = [("block_size", PAGE.to_string()), ("num_gpu_blocks", (load.capacity / PAGE).to_string())];
        r.register("aoji:cache_config", "Tokens of a page of the KV cache, and how many pages", Info::new(cache));
        Metrics {
            running: add(r, "num_requests_running", "Answers that are being generated", Gauge::default()),
            waiting: add(r, "num_requests_waiting", "Answers that wait for a sequence", Gauge::default()),
            kv_usage: add(r, "kv_cache_usage_perc", "Share of the KV cache in use, 1 is all of it", Gauge::default()),
            preemptions: add(
                r,
                "num_preemptions",
                "Answers that were put back to be computed again, since the KV cache was full",
                Counter::default(),
            ),
            queue: seconds(r, "request_queue_time_seconds", "From the request to its sequence"),
            first_token: seconds(r, "time_to_first_token_seconds", "From the request to its first token"),
            inter_token: add(
                r,
                "inter_token_latency_seconds",
                "Between two tokens of an answer, at the engine",
                Histogram::new(TOKEN_SECONDS),
            ),
            e2e: seconds(r, "e2e_request_latency_seconds", "From the request to the end of its answer"),
            prefill: seconds(r, "request_prefill_time_seconds", "Computing the prompt"),
            decode: seconds(r, "request_decode_time_seconds", "From the end of the prompt to the last token"),
            prompt_tokens: add(r, "prompt_tokens", "Tokens of prompts", Counter::default()),
            cached_tokens: add(r, "prompt_tokens_cached", "Of these, the ones in the cache", Counter::default()),
            cache_queries: add(r, "prefix_cache_queries", "Tokens looked for in the cache", Counter::default()),
            cache_hits: add(r, "prefix_cache_hits", "Tokens found in the cache", Counter::default()),
            generated: add(r, "generation_tokens", "Tokens generated", Counter::default()),
            drafted: add(r, "spec_decode_num_draft_tokens", "Guesses of tokens that were tried", Counter::default()),
            accepted: add(
                r,
                "spec_decode_num_accepted_tokens",
                "Of these, the ones that were right",
                Counter::default(),
            ),
            success: add(r, "request_success", "Answers that ended, by finish reason", Family::default()),
            failed: add(r, "request_failed", "Answers that their constraint ended", Counter::default()),
            cancelled: add(
                r,
                "request_cancelled",
                "Answers whose client went away, before or after the first token",
                Family::default(),
            ),
            rejected: add(r, "admission_rejections", "Requests that were not let in", Family::default()),
            max_tokens: add(r, "request_params_max_tokens", "max_tokens of requests", Histogram::new(TOKENS)),
            registry,
        }
    }

    /// How busy the batch is.
    pub fn load(&self, load: Load) {
        self.running.set(load.running as i64);
        self.kv_usage.set(load.tokens as f64 / load.capacity.max(1) as f64);
        self.preemptions.inc_by(load.put_back.saturating_sub(self.preemptions.get()));
    }

    /// A job got its first token this long after it came.
    pub fn first_token(&self, after: Duration) {
        self.first_token.observe(after.as_secs_f64());
        self.generated.inc();
    }

    /// A job got another token this long after the one before.
    pub fn next_token(&self, after: Duration) {
        self.inter_token.observe(after.as_secs_f64());
        self.generated.inc();
    }

    /// A job ended this long after it came.
    pub fn finished(&self, finish: &Finish, after: Duration) {
        let t = &finish.timings;
        self.queue.observe(finish.queue_seconds);
        self.prefill.observe(t.prompt_seconds);
        self.decode.observe(t.decode_seconds);
        self.e2e.observe(after.as_secs_f64());
        self.prompt_tokens.inc_by(t.prompt_tokens as u64);
        self.cache_queries.inc_by(t.prompt_tokens as u64);
        self.cached_tokens.inc_by(t.reused_tokens as u64);
        self.cache_hits.inc_by(t.reused_tokens as u64);
        self.drafted.inc_by(t.drafted_tokens as u64);
        self.accepted.inc_by(t.accepted_tokens as u64);
        let reason = match finish.reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        };
        self.success.get_or_create(&[("finished_reason", reason)]).inc();
    }

    /// A job's constraint failed.
    pub fn failed(&self) {
        self.failed.inc();
    }

    /// A job was cancelled.
    pub fn cancelled(&self, had_a_token: bool) {
        let phase = if had_a_token { "decode" } else { "prefill" };
        self.cancelled.get_or_create(&[("phase", phase)]).inc();
    }

    /// A request was refused.
    pub fn rejected(&self, reason: &'static str) {
        self.rejected.get_or_create(&[("reason", reason)]).inc();
    }

    /// Records the `max_tokens` of a request.
    pub fn max_tokens(&self, n: usize) {
        self.max_tokens.observe(n as f64);
    }

    /// The text that Prometheus reads; `admitted` is the number of answers that are being worked on or wait.
    pub fn text(&self, admitted: usize) -> Result<String, fmt::Error> {
        // This includes answers that have not reached the batch yet.
        self.waiting.set((admitted as i64 - self.running.get()).max(0));
        let mut text = String::new();
        prometheus_text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// The type of [`Metrics::text`].
pub(super) const CONTENT_TYPE: &str = prometheus_text::CONTENT_TYPE;

fn add<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(format!("aoji:{name}"), help, metric.clone());
    metric
}

fn seconds(registry: &mut Registry, name: &str, help: &str) -> Histogram {
    add(registry, name, help, Histogram::new(SECONDS))
}
