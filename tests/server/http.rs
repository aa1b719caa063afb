//! A small HTTP client, written by hand so that it can also break the rules.

use serde_json::Value;
use std::{collections::HashMap, net::SocketAddr, path::PathBuf};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UnixStream},
};

/// Where a server listens.
#[derive(Clone)]
pub enum Target {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: HashMap<String, String>,
    pub body: String,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    /// The error, which must be in OpenAI's shape.
    pub fn error(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.body);
        assert_eq!(self.header("content-type"), "application/json");
        let error = self.json()["error"].take();
        assert!(error["message"].as_str().is_some_and(|m| !m.is_empty()), "{error}");
        assert!(error["type"].is_string() && error.get("param").is_some() && error.get("code").is_some(), "{error}");
        error
    }

    /// The data of the events of a stream, the last one of which must be `[DONE]`.
    pub fn events(&self) -> Vec<Value> {
        assert_eq!((self.status, self.header("content-type")), (200, "text/event-stream"), "{}", self.body);
        let blocks = self.body.strip_suffix("\n\n").expect("an empty line at the end").split("\n\n");
        let mut data: Vec<&str> = blocks
            .filter(|block| !block.starts_with(':'))
            .map(|block| block.strip_prefix("data: ").unwrap_or_else(|| panic!("not one line of data: {block:?}")))
            .collect();
        assert_eq!(data.pop(), Some("[DONE]"));
        data.iter().map(|data| serde_json::from_str(data).unwrap_or_else(|e| panic!("{e}: {data}"))).collect()
    }
}

pub async fn connect(target: &Target) -> Box<dyn Stream> {
    match target {
        Target::Tcp(address) => Box::new(TcpStream::connect(address).await.expect("the server listens")),
        Target::Unix(path) => Box::new(UnixStream::connect(path).await.expect("the server listens")),
    }
}

/// The bytes of a request.
pub fn head(method: &str, path: &str, headers: &[(&str, &str)], length: usize) -> String {
    let mut text =
        format!("{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: {length}\r\n");
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    text + "\r\n"
}

pub async fn request(target: &Target, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Reply {
    bytes(target, method, path, headers, body.as_bytes()).await
}

pub async fn post(target: &Target, path: &str, headers: &[(&str, &str)], body: &Value) -> Reply {
    let headers = [&[("Content-Type", "application/json")], headers].concat();
    request(target, "POST", path, &headers, &body.to_string()).await
}

pub async fn bytes(target: &Target, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
    let mut stream = connect(target).await;
    stream.write_all(head(method, path, headers, body.len()).as_bytes()).await.unwrap();
    let _ = stream.write_all(body).await; // a server may refuse a body before it has all of it
    finish(stream).await
}

/// Reads all bytes that still come.
pub async fn rest(mut stream: Box<dyn Stream>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes).await; // a reset is an end too
    bytes
}

/// Reads a reply to its end.
pub async fn finish(mut stream: impl AsyncRead + Unpin) -> Reply {
    let mut bytes = Vec::new();
    let read = stream.read_to_end(&mut bytes).await;
    assert!(!bytes.is_empty(), "no reply: {read:?}");
    parse(&bytes)
}

fn parse(bytes: &[u8]) -> Reply {
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n").expect("the end of the head");
    let head = std::str::from_utf8(&bytes[..end]).unwrap();
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).and_then(|s| s.parse().ok()).expect("a status");
    let headers: HashMap<String, String> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_string()))
        .collect();
    let mut body = bytes[end + 4..].to_vec();
    if headers.get("transfer-encoding").is_some_and(|e| e == "chunked") {
        body = dechunk(&body);
    }
    Reply { status, headers, body: String::from_utf8(body).expect("UTF-8") }
}

fn dechunk(mut bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    while let Some(end) = bytes.windows(2).position(|w| w == b"\r\n") {
        let length = usize::from_str_radix(std::str::from_utf8(&bytes[..end]).unwrap(), 16).unwrap();
        out.extend(&bytes[end + 2..end + 2 + length]);
        bytes = &bytes[end + 2 + length + 2..];
    }
    out
}
