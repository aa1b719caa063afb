//! `aoji serve` as a process.

use super::http;
use serde_json::{Value, json};
use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Child, ChildStderr, Command, Stdio},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

struct Process {
    child: Child,
    log: BufReader<ChildStderr>,
}

impl Process {
    fn start(args: &[&str]) -> Process {
        let mut command = Command::new(env!("CARGO_BIN_EXE_aoji"));
        command.args(["serve", "--device", "cpu", "--log-format", "json"]).args(args);
        let mut child = command.env("AOJI_API_KEY", "secret").stderr(Stdio::piped()).spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        Process { child, log }
    }

    /// The next line of the log with this message.
    fn line(&mut self, message: &str) -> Value {
        loop {
            let mut line = String::new();
            assert!(self.log.read_line(&mut line).unwrap() > 0, "it ended without {message:?}");
            let value: Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"));
            if value["message"].as_str().unwrap().starts_with(message) {
                return value;
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn serves_logs_and_ends() {
    let mut process = Process::start(&["--host", "localhost", "--port", "0", "--served-model-name", "m"]);
    let line = process.line("listening on http://");
    let address: SocketAddr =
        line["message"].as_str().unwrap().strip_prefix("listening on http://").unwrap().parse().unwrap();
    let target = http::Target::Tcp(address);
    let key = [("Authorization", "Bearer secret"), ("X-Request-Id", "id-1")];
    let body = json!({"model": "m", "prompt": "가", "max_tokens": 3, "ignore_eos": true, "stream": true});
    http::post(&target, "/v1/completions", &[], &body).await.error(401);
    assert_eq!(process.line("request")["status"], 401);
    http::post(&target, "/v1/completions", &key, &body).await.events();
    let line = process.line("request");
    for (name, value) in [
        ("id", json!("id-1")),
        ("method", json!("POST")),
        ("path", json!("/v1/completions")),
        ("status", json!(200)),
        ("tokens", json!(3)),
    ] {
        assert_eq!(line[name], value, "{name}");
    }
    assert!(
        line["ttft_ms"].as_f64().unwrap() > 0.0
            && line["ms"].as_f64().unwrap() > 0.0
            && line["prompt_tokens"].as_u64().unwrap() > 0
    );
    // Of a client that goes away it says how far it came.
    let long = json!({"prompt": "가", "max_tokens": 900, "n": 4, "ignore_eos": true, "stream": true}).to_string();
    let headers = [("Content-Type", "application/json"), ("Authorization", "Bearer secret")];
    let mut stream = http::connect(&target).await;
    let head = http::head("POST", "/v1/completions", &headers, long.len());
    stream.write_all((head + &long).as_bytes()).await.unwrap();
    stream.read_exact(&mut [0; 1000]).await.unwrap();
    drop(stream);
    let line = process.line("request");
    assert!(line["status"] == 499 && line["tokens"].as_u64().unwrap() > 0, "{line}");
    let kill = Command::new("kill").args(["-TERM", &process.child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    assert_eq!(process.child.wait().unwrap().code(), Some(0));
}

#[tokio::test]
async fn on_a_unix_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    // A socket that nobody listens on is in nobody's way.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let keys = dir.path().join("keys");
    // As some editors write it, the file begins with a byte order mark.
    std::fs::write(&keys, "\u{feff}one\n\n two \n").unwrap();
    let mut process =
        Process::start(&["--unix-socket", path.to_str().unwrap(), "--api-key-file", keys.to_str().unwrap()]);
    process.line("listening on");
    for key in ["Bearer secret", "Bearer one", "Bearer two"] {
        let reply =
            http::request(&http::Target::Unix(path.clone()), "GET", "/v1/models", &[("Authorization", key)], "").await;
        assert_eq!(reply.json()["data"][0]["id"], "demo");
    }
}

/// A log that cannot be written, as on a full disk, is lost; answers are not.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_log_that_cannot_be_written() {
    let dir = tempfile::tempdir().unwrap();
    for format in ["text", "json"] {
        let path = dir.path().join(format);
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_aoji"));
        command.args(["serve", "--device", "cpu", "--log-format", format, "--unix-socket", path.to_str().unwrap()]);
        let mut child = command.stderr(full).spawn().unwrap();
        while child.try_wait().unwrap().is_none() && std::os::unix::net::UnixStream::connect(&path).is_err() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        let mut statuses = Vec::new();
        for _ in 0..3 {
            statuses.push(http::request(&http::Target::Unix(path.clone()), "GET", "/health", &[], "").await.status);
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(statuses, [200; 3], "{format}");
    }
}

#[test]
fn wrong_use() {
    let error = |args: &[&str]| {
        let output =
            Command::new(env!("CARGO_BIN_EXE_aoji")).args(["serve", "--device", "cpu"]).args(args).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(error(&["--port", "99999"]).contains("99999"));
    assert!(error(&["--sequences", "65"]).contains("65 is not in 1..=64"));
    assert!(error(&["--prefill-chunk", "33"]).contains("33 is not in 34..=511"));
    assert!(error(&["--unknown-fields", "x"]).contains("warn, reject or ignore"));
    assert!(error(&["--host", "nowhere"]).contains("nowhere"));
    assert!(error(&["--unix-socket", "/nowhere/x"]).contains("/nowhere/x"));
    assert!(error(&["--port", "0", "--api-key-file", "/nowhere"]).contains("/nowhere"));
    assert!(error(&["--unix-socket", "a", "--port", "1"]).contains("--port"));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    assert!(error(&["--port", &port]).contains(&port));
}
