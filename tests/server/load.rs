//! More requests than there is room for, clients that go away, and the shutdown of the server.

use super::{Site, http, question};
use aoji::{
    Device, Engine, Options,
    server::{Phase, Server, ServerOptions},
};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixListener,
    sync::oneshot,
};

/// One answer at a time, and one that waits.
fn narrow() -> ServerOptions {
    ServerOptions { sequences: 1, queue: 1, ..ServerOptions::default() }
}

/// An answer that takes a while.
fn long(more: Value) -> Value {
    let mut body = json!({"prompt": "오늘", "max_tokens": 900, "ignore_eos": true});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// Sends a request and does not wait for the reply.
async fn begin(site: &Site, body: &Value) -> Box<dyn http::Stream> {
    let mut stream = http::connect(&site.target()).await;
    let body = body.to_string();
    let head = http::head("POST", "/v1/completions", &[("Content-Type", "application/json")], body.len());
    stream.write_all((head + &body).as_bytes()).await.unwrap();
    stream
}

#[tokio::test]
async fn a_full_queue() {
    let site = Site::with(narrow()).await;
    let first = begin(&site, &long(json!({"n": 2, "max_tokens": 400}))).await;
    site.busy(2.0).await;
    let refused = site.post("/v1/completions", &json!({"prompt": "가", "max_tokens": 1})).await;
    assert_eq!(refused.error(429)["code"], "queue_full");
    assert_eq!(refused.header("retry-after"), "1");
    assert_eq!(http::finish(first).await.status, 200);
    assert_eq!(site.post("/v1/completions", &json!({"prompt": "가", "max_tokens": 1})).await.status, 200);
    assert!(site.metric("aoji:admission_rejections_total{reason=\"queue_full\"}").await >= 1.0);
}

#[tokio::test]
async fn many_at_once() {
    let site = Site::new().await;
    let one = |i: usize| {
        let target = site.target();
        let body = question(json!({"stream": i.is_multiple_of(2)}));
        tokio::spawn(async move { http::post(&target, "/v1/chat/completions", &[], &body).await })
    };
    let expected = super::answer().1;
    for (i, reply) in (0..40).map(one).collect::<Vec<_>>().into_iter().enumerate() {
        let reply = reply.await.unwrap();
        match i % 2 {
            0 => {
                let events = reply.events();
                let texts = events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str());
                assert_eq!(texts.collect::<String>(), expected);
            }
            _ => assert_eq!(reply.json()["choices"][0]["message"]["content"], json!(expected)),
        }
    }
}

/// More answers than there is memory for, and than a step has rows: some are put back, and all are what they are elsewhere.
#[tokio::test]
async fn a_full_cache_changes_no_answer() {
    const N: usize = 24;
    let sizes = Options { context: Some(512), sequences: N, cache_tokens: Some(1024), ..Options::default() };
    let engine = Engine::open("demo", &Options { device: Device::Cpu, ..sizes }).unwrap();
    let server = Server::start(engine, ServerOptions { sequences: N, ..ServerOptions::default() }).unwrap();
    let (narrow, wide) = (Site::of(server, Duration::from_secs(30)).await, Site::new().await);
    let texts = async |site: &Site| {
        let one = |i: usize| {
            let target = site.target();
            let body = json!({"prompt": format!("{i}. 오늘은"), "max_tokens": 200, "ignore_eos": true, "seed": i});
            tokio::spawn(async move { http::post(&target, "/v1/completions", &[], &body).await })
        };
        let mut texts = Vec::new();
        for reply in (0..N).map(one).collect::<Vec<_>>() {
            texts.push(reply.await.unwrap().json()["choices"][0]["text"].clone());
        }
        texts
    };
    assert_eq!(texts(&narrow).await, texts(&wide).await);
    assert!(narrow.metric("aoji:num_preemptions_total").await > 0.0);
    assert_eq!(wide.metric("aoji:num_preemptions_total").await, 0.0);
    narrow.until("aoji:kv_cache_usage_perc", 0.0).await;
}

/// A prompt that fills a cache of one context, again and again: it needs the very page from which it could copy.
#[tokio::test]
async fn a_prompt_that_fills_the_cache_is_answered_each_time() {
    let site = Site::with(narrow()).await;
    let prompt = |salt: u32| [vec![2046], (0..999).map(|i| 70 + (i * salt) % 50).collect()].concat();
    let answer = async |site: &Site, salt| {
        let body = json!({"prompt": prompt(salt), "max_tokens": 4, "temperature": 0, "logprobs": 1});
        site.complete(body).await["choices"][0]["logprobs"].take()
    };
    let first = answer(&site, 1).await;
    assert_eq!(answer(&site, 1).await, first);
    assert_eq!(answer(&site, 3).await, answer(&Site::new().await, 3).await);
    assert_eq!(answer(&site, 1).await, first);
}

#[tokio::test]
async fn who_goes_away_while_waiting_frees_the_place() {
    let site = Site::with(narrow()).await;
    let first = begin(&site, &long(json!({}))).await;
    site.busy(1.0).await;
    let second = begin(&site, &long(json!({}))).await;
    site.busy(2.0).await;
    drop(second);
    site.until("aoji:request_cancelled_total{phase=\"prefill\"}", 1.0).await;
    assert_eq!(http::finish(first).await.status, 200);
    site.until("aoji:num_requests_waiting", 0.0).await;
    assert_eq!(site.post("/v1/completions", &json!({"prompt": "가", "n": 2, "max_tokens": 1})).await.status, 200);
}

#[tokio::test]
async fn who_goes_away_frees_the_sequence() {
    let site = Site::with(narrow()).await;
    for stream in [true, false] {
        let cancelled = site.metric("aoji:request_cancelled_total{phase=\"decode\"}").await;
        let before = site.metric("aoji:generation_tokens_total").await;
        let mut client = begin(&site, &long(json!({"stream": stream}))).await;
        if stream {
            let mut bytes = [0; 600];
            client.read_exact(&mut bytes).await.unwrap();
        } else {
            while site.metric("aoji:generation_tokens_total").await < before + 3.0 {}
        }
        drop(client);
        site.until("aoji:request_cancelled_total{phase=\"decode\"}", cancelled + 1.0).await;
        site.until("aoji:num_requests_running", 0.0).await;
        assert!(site.metric("aoji:generation_tokens_total").await < before + 900.0);
    }
}

#[tokio::test]
async fn a_long_answer_does_not_hold_up_a_short_one() {
    let site = Site::new().await;
    let first = begin(&site, &long(json!({}))).await;
    site.until("aoji:num_requests_running", 1.0).await;
    site.complete(json!({"prompt": "가", "max_tokens": 2})).await;
    assert_eq!(
        site.metric("aoji:request_success_total{finished_reason=\"length\"}").await,
        1.0,
        "the short one is first"
    );
    assert_eq!(http::finish(first).await.status, 200);
}

/// A client that does not read does not hold up others.
#[tokio::test]
async fn a_slow_reader() {
    let site = Site::new().await;
    let slow = begin(&site, &long(json!({"stream": true, "max_tokens": 300, "return_token_ids": true}))).await;
    for _ in 0..3 {
        assert_eq!(site.post("/v1/completions", &json!({"prompt": "가", "max_tokens": 2})).await.status, 200);
    }
    let events = http::finish(slow).await.events();
    let tokens = events.iter().flat_map(|e| e["choices"][0]["token_ids"].as_array().cloned().unwrap_or_default());
    assert_eq!(tokens.count(), 300, "it still gets everything");
}

/// A client that sends one byte at a time is understood, and does not hold up others.
#[tokio::test]
async fn a_slow_writer() {
    let site = Site::new().await;
    let mut stream = http::connect(&site.target()).await;
    let body = json!({"prompt": "가", "max_tokens": 1}).to_string();
    let request = http::head("POST", "/v1/completions", &[], body.len()) + &body;
    for (i, byte) in request.bytes().enumerate() {
        stream.write_all(&[byte]).await.unwrap();
        if i % 50 == 0 {
            assert_eq!(site.get("/health").await.status, 200);
        }
    }
    assert_eq!(http::finish(stream).await.status, 200);
    drop(begin(&site, &json!({})).await); // and one that goes away without waiting
    let mut half = http::connect(&site.target()).await;
    half.write_all(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{").await.unwrap();
    drop(half);
    assert_eq!(site.server.phase(), Phase::Ready);
}

#[tokio::test]
async fn running_answers_are_finished_at_the_end() {
    let site = Site::new().await;
    let running = begin(&site, &long(json!({"stream": true, "max_tokens": 200}))).await;
    site.busy(1.0).await;
    let (server, target) = (site.server.clone(), site.target());
    let stopped = tokio::spawn(site.stop());
    let events = http::finish(running).await.events();
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "length");
    assert!(stopped.await.unwrap(), "all were finished");
    assert_eq!(server.phase(), Phase::Draining);
    let http::Target::Tcp(address) = target else { unreachable!() };
    assert!(tokio::net::TcpStream::connect(address).await.is_err(), "nobody listens");
}

#[tokio::test]
async fn answers_are_cut_off_after_the_time_to_drain() {
    let site = Site::draining(ServerOptions::default(), Duration::ZERO).await;
    let mut running = begin(&site, &long(json!({"stream": true}))).await;
    let whole = begin(&site, &long(json!({}))).await;
    site.busy(2.0).await;
    let mut first = [0]; // a stream that has not begun would be answered as the other one is, with 503
    running.read_exact(&mut first).await.unwrap();
    let stopped = tokio::spawn(site.stop());
    http::finish(whole).await.error(503);
    let events = http::finish(first.as_slice().chain(running)).await.events();
    assert_eq!(events.last().unwrap()["error"]["type"], "server_error");
    assert!(!stopped.await.unwrap());
}

#[tokio::test]
async fn a_unix_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("aoji.sock");
    let site = Site::new().await;
    let listener = UnixListener::bind(&path).unwrap();
    let (shutdown, signal) = oneshot::channel::<()>();
    let server = site.server.clone();
    let serving =
        tokio::spawn(async move { server.serve(listener, async { drop(signal.await) }, Duration::from_secs(5)).await });
    let target = http::Target::Unix(path);
    let reply = http::post(&target, "/v1/chat/completions", &[], &question(json!({}))).await;
    assert_eq!(reply.json()["choices"][0]["message"]["content"], json!(super::answer().1));
    drop(shutdown);
    assert!(serving.await.unwrap());
}
