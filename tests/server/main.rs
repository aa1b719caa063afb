//! The HTTP server as its clients see it, in this process, on the embedded model.

mod anthropic;
mod browser;
mod command;
#[path = "../common/mod.rs"]
mod common;
mod constrain;
#[cfg(feature = "cuda")]
mod device;
mod echo;
mod embeddings;
mod errors;
mod fields;
mod forms;
mod http;
mod load;
mod pieces;
mod responses;
mod routes;
mod stream;
#[path = "../host/tokenizers.rs"]
mod tokenizers;
mod tools;

use aoji::{
    Device, Engine, GenerateOptions, Message, Options,
    server::{Server, ServerOptions},
};
use http::{Reply, Target};
use serde_json::{Value, json};
use std::{net::SocketAddr, sync::OnceLock, time::Duration};
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};

/// A question of the demo model's list.
const QUESTION: &str = "넌 누구니?";

/// The demo model on the CPU, loaded once.
fn engine() -> &'static Engine {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    ENGINE.get_or_init(|| {
        let options = Options { device: Device::Cpu, ..Options::default() };
        Engine::open("demo", &options).expect("the embedded model")
    })
}

/// The prompt of [`QUESTION`], and what the library answers to it, greedily.
fn answer() -> (Vec<u32>, String) {
    let tokenizer = engine().tokenizer().unwrap();
    let prompt = engine().template().encode(tokenizer, &[Message::new("user", QUESTION)], None).unwrap();
    let mut session = engine().session(1024).unwrap();
    let mut text = String::new();
    for event in session.generate(&prompt, &GenerateOptions::default()).unwrap() {
        if let aoji::Event::Text(piece) = event.unwrap() {
            text.push_str(&piece);
        }
    }
    assert!(text.contains("데모 모델"), "{text}");
    (prompt, text)
}

/// A server on a port of its own.
struct Site {
    server: Server,
    address: SocketAddr,
    shutdown: Option<oneshot::Sender<()>>,
    serving: JoinHandle<bool>,
}

impl Site {
    async fn new() -> Site {
        Site::with(ServerOptions { names: vec!["demo".into(), "other/name".into()], ..ServerOptions::default() }).await
    }

    async fn with(options: ServerOptions) -> Site {
        Site::draining(options, Duration::from_secs(30)).await
    }

    async fn draining(options: ServerOptions, drain: Duration) -> Site {
        Site::of(Server::start(engine().clone(), options).unwrap(), drain).await
    }

    async fn of(server: Server, drain: Duration) -> Site {
        server.ready().await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (shutdown, signal) = oneshot::channel();
        let serving = tokio::spawn({
            let server = server.clone();
            async move { server.serve(listener, async move { drop(signal.await) }, drain).await }
        });
        Site { server, address, shutdown: Some(shutdown), serving }
    }

    fn target(&self) -> Target {
        Target::Tcp(self.address)
    }

    async fn get(&self, path: &str) -> Reply {
        http::request(&self.target(), "GET", path, &[], "").await
    }

    async fn post(&self, path: &str, body: &Value) -> Reply {
        http::post(&self.target(), path, &[], body).await
    }

    /// Sends a request that is right; returns the answer.
    async fn ok(&self, path: &str, body: Value) -> Value {
        let reply = self.post(path, &body).await;
        assert_eq!(reply.status, 200, "{body}: {}", reply.body);
        reply.json()
    }

    /// Sends a request that is wrong; returns the error, whose shape is checked.
    async fn error(&self, path: &str, body: Value, status: u16) -> Value {
        let reply = self.post(path, &body).await;
        reply.error(status)
    }

    async fn complete(&self, body: Value) -> Value {
        self.ok("/v1/completions", body).await
    }

    async fn chat(&self, body: Value) -> Value {
        self.ok("/v1/chat/completions", body).await
    }

    /// A number of `/metrics`; 0 if nothing was counted yet.
    async fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").await.body;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.parse().unwrap())
    }

    /// Waits until a number of `/metrics` is `value`.
    async fn until(&self, name: &str, value: f64) {
        for _ in 0..600 {
            if self.metric(name).await == value {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let all = self.get("/metrics").await.body;
        let all: Vec<&str> = all.lines().filter(|l| !l.contains("bucket") && !l.starts_with("# ")).collect();
        panic!("{name} is not {value} in {all:#?}");
    }

    /// Waits until this many answers run or wait.
    async fn busy(&self, answers: f64) {
        let admitted =
            async || self.metric("aoji:num_requests_running").await + self.metric("aoji:num_requests_waiting").await;
        while admitted().await != answers {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Tells it to stop; returns whether all requests were finished.
    async fn stop(mut self) -> bool {
        drop(self.shutdown.take());
        self.serving.await.unwrap()
    }
}

/// A chat of one question, with `more` fields.
fn question(more: Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": QUESTION}], "temperature": 0});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}
