//! `aoji pull` against a server on this machine that behaves as the hub does, or misbehaves.
#[path = "../../../src/bin/aoji/pull/mod.rs"]
#[allow(dead_code)] // the environment's part is for the command
mod pull;

mod choice;
mod transfer;

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aoji::Error;
use aoji::hub::{Cache, Repo};
use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const REPO: &str = "owner/model";

#[derive(Clone, Debug)]
struct Request {
    method: String,
    path: String,
    headers: HashMap<String, String>,
}

#[derive(Clone, Default)]
struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// Send only this many bytes of the body, then close.
    cut: Option<usize>,
}

impl Answer {
    fn status(status: u16) -> Answer {
        Answer { status, ..Answer::default() }
    }

    fn ok(body: impl Into<Vec<u8>>) -> Answer {
        Answer { status: 200, body: body.into(), ..Answer::default() }
    }

    fn with(mut self, name: &str, value: impl ToString) -> Answer {
        self.headers.push((name.into(), value.to_string()));
        self
    }
}

/// A server with an answer for every request; it remembers the requests.
struct Server {
    endpoint: String,
    log: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    fn start(answer: impl Fn(&Request, u16) -> Answer + Send + Sync + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let log = Arc::new(Mutex::new(Vec::new()));
        let server = Server { endpoint: format!("http://127.0.0.1:{port}"), log: log.clone() };
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if let Some(request) = read(&stream) {
                    log.lock().unwrap().push(request.clone());
                    write(&stream, &request, answer(&request, port));
                }
            }
        });
        server
    }

    fn requests(&self, start: &str) -> Vec<Request> {
        self.log.lock().unwrap().iter().filter(|r| r.path.starts_with(start)).cloned().collect()
    }
}

fn read(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines().map_while(|l| l.ok());
    let first = lines.next()?;
    let mut words = first.split(' ').map(str::to_string);
    let (method, path) = (words.next()?, words.next()?);
    let headers = lines
        .take_while(|l| !l.is_empty())
        .filter_map(|l| l.split_once(": ").map(|(k, v)| (k.to_ascii_lowercase(), v.to_string())))
        .collect();
    Some(Request { method, path, headers })
}

/// The client may have gone, so write errors are of no interest.
fn write(mut stream: &TcpStream, request: &Request, answer: Answer) {
    let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\n", answer.status);
    if !answer.headers.iter().any(|(name, _)| name == "Content-Length") {
        head += &format!("Content-Length: {}\r\n", answer.body.len());
    }
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    let _ = stream.write_all(format!("{head}\r\n").as_bytes());
    if request.method != "HEAD" {
        let _ = stream.write_all(&answer.body[..answer.cut.unwrap_or(answer.body.len())]);
    }
}

/// The files of the hub: small ones, and large ones for which it redirects to the storage.
#[derive(Clone, Default)]
struct Files {
    small: HashMap<String, Vec<u8>>,
    large: HashMap<String, Vec<u8>>,
}

impl Files {
    fn one() -> Files {
        let mut files = Files::default();
        for name in ["config.json", "tokenizer.json", "README.md", "pytorch_model.bin", "model.gguf"] {
            files.small.insert(name.into(), format!("content of {name}").into_bytes());
        }
        files.large.insert("model.safetensors".into(), large(1));
        files
    }

    fn sharded() -> Files {
        let mut files = Files::one();
        files.large = HashMap::from([("a.safetensors".into(), large(1)), ("b.safetensors".into(), large(2))]);
        files.large.insert("consolidated.safetensors".into(), large(3));
        let index = r#"{"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "a.safetensors"}}"#;
        files.small.insert("model.safetensors.index.json".into(), index.into());
        files
    }

    fn answer(&self, request: &Request, port: u16) -> Answer {
        let names = || self.small.keys().chain(self.large.keys());
        if request.path == format!("/api/models/{REPO}/revision/main") {
            let mut names: Vec<_> = names().collect();
            names.sort(); // as a hub lists them
            let siblings: Vec<_> = names.into_iter().map(|name| serde_json::json!({"rfilename": name})).collect();
            return Answer::ok(serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string());
        }
        if let Some(name) = request.path.strip_prefix(&format!("/{REPO}/resolve/{COMMIT}/")) {
            if let Some(body) = self.small.get(name) {
                return Answer::ok(body.clone()).with("ETag", format!("W/\"etag-{}\"", name.replace('.', "-")));
            }
            if let Some(body) = self.large.get(name) {
                return Answer::status(302)
                    .with("Location", format!("http://localhost:{port}/storage/{name}"))
                    .with("X-Linked-ETag", format!("\"{}\"", sha256(body)))
                    .with("X-Linked-Size", body.len());
            }
        }
        if let Some(body) = request.path.strip_prefix("/storage/").and_then(|name| self.large.get(name)) {
            return match range(request) {
                0 => Answer::ok(body.clone()),
                from if from >= body.len() => Answer::status(416),
                from => Answer { status: 206, ..Answer::ok(&body[from..]) }
                    .with("Content-Range", format!("bytes {from}-{}/{}", body.len() - 1, body.len())),
            };
        }
        Answer::status(404)
    }

    fn serve(self) -> Server {
        Server::start(move |request, port| self.answer(request, port))
    }

    /// As `serve`, but `change` may change the answers from the storage.
    fn serve_storage(self, change: impl Fn(&Request, Answer) -> Answer + Send + Sync + 'static) -> Server {
        Server::start(move |request, port| match self.answer(request, port) {
            answer if request.path.starts_with("/storage/") => change(request, answer),
            answer => answer,
        })
    }
}

fn large(seed: u8) -> Vec<u8> {
    (0..3_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8 ^ seed).collect()
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

fn range(request: &Request) -> usize {
    let value = request.headers.get("range").map(|r| r.strip_prefix("bytes=").unwrap().trim_end_matches('-'));
    value.map_or(0, |from| from.parse().unwrap())
}

/// A cache in a temporary directory.
struct Place {
    dir: tempfile::TempDir,
    token: Option<String>,
    file: Option<String>,
}

impl Place {
    fn new() -> Place {
        Place { dir: tempfile::tempdir().unwrap(), token: None, file: None }
    }

    fn pull(&self, server: &Server) -> aoji::Result<PathBuf> {
        self.pull_repo(server, REPO)
    }

    fn pull_repo(&self, server: &Server, repo: &str) -> aoji::Result<PathBuf> {
        self.pull_revision(server, repo, "main")
    }

    fn pull_revision(&self, server: &Server, repo: &str, revision: &str) -> aoji::Result<PathBuf> {
        let options = pull::Options {
            endpoint: server.endpoint.clone(),
            token: self.token.clone(),
            cache: Cache::at(self.dir.path()),
            revision: revision.into(),
            file: self.file.clone(),
            progress: false,
            backoff: Duration::ZERO,
        };
        pull::fetch(repo, &options)
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("models--owner--model")
    }

    fn found(&self) -> Option<PathBuf> {
        Cache::at(self.dir.path()).snapshot(&Repo::parse(REPO).unwrap(), "main").unwrap()
    }

    fn incomplete(&self, of: &[u8]) -> PathBuf {
        self.root().join("blobs").join(format!("{}.incomplete", sha256(of)))
    }

    /// Asserts that the download fails with all of `words`, and that no reference leads to half a model.
    #[track_caller]
    fn fails(&self, server: &Server, words: &[&str]) {
        let error = self.pull(server).expect_err("must fail");
        assert!(matches!(error, Error::Download { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains(&server.endpoint), "{text}");
        for word in words {
            assert!(text.contains(word), "{text:?} lacks {word:?}");
        }
        assert_eq!(self.found(), None);
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
