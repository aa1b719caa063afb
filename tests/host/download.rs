//! `aoji pull` against a server on this machine that behaves as the hub does, or misbehaves.
#[path = "../../src/bin/aoji/pull.rs"]
#[allow(dead_code)] // the environment's part is for the command
mod pull;

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
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
    /// Send only so much of the body and close.
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

/// What the hub has: small files, and large ones that it redirects to the storage for.
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

    /// As `serve`, but what `change` makes of the answers from the storage.
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

#[test]
fn revisions_are_kept_where_the_hub_keeps_them() {
    for (revision, encoded) in [("refs/pr/1", "refs%2Fpr%2F1"), ("v1.0", "v1.0"), (COMMIT, COMMIT)] {
        let files = Files::one();
        let server = Server::start(move |request, port| {
            let path = request.path.replace(&format!("/revision/{encoded}"), "/revision/main");
            files.answer(&Request { path, ..request.clone() }, port)
        });
        let place = Place::new();
        let snapshot = place.pull_revision(&server, REPO, revision).unwrap();
        let reference = place.root().join("refs").join(revision);
        assert_eq!(fs::read_to_string(reference).unwrap(), COMMIT, "{revision}");
        assert_eq!(server.requests(&format!("/api/models/{REPO}/revision/{encoded}")).len(), 1);
        let cache = Cache::at(place.dir.path());
        let repo = Repo::parse(REPO).unwrap();
        assert_eq!(cache.revisions(&repo), [revision]);
        assert_eq!(cache.snapshot(&repo, revision).unwrap(), Some(snapshot));
    }
    let server = Files::one().serve();
    for bad in ["", "../main", "a b", "a//b", "/a", "a?b", "refs/.."] {
        let error = Place::new().pull_revision(&server, REPO, bad).unwrap_err().to_string();
        assert!(error.contains("expected a branch, a tag, a commit"), "{bad}: {error}");
    }
}

#[test]
fn offline_is_what_the_hub_takes_for_true() {
    for (value, is_true) in
        [("1", true), ("true", true), ("ON", true), ("Yes", true), ("false", false), ("0", false), ("no", false)]
    {
        assert_eq!(pull::is_true(value), is_true, "{value}");
    }
}

#[test]
fn downloads_into_the_layout_of_the_hub() {
    let (place, server) = (Place { token: Some("secret".into()), ..Place::new() }, Files::one().serve());
    let snapshot = place.pull(&server).unwrap();
    assert_eq!(place.found(), Some(snapshot.clone()));
    assert!(snapshot.ends_with(format!("snapshots/{COMMIT}")));
    assert_eq!(names(&snapshot), ["config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(fs::read(snapshot.join("tokenizer.json")).unwrap(), b"content of tokenizer.json");
    assert!(fs::read(snapshot.join("model.safetensors")).unwrap() == large(1));
    #[cfg(unix)]
    assert_eq!(
        fs::read_link(snapshot.join("model.safetensors")).unwrap(),
        Path::new("../../blobs").join(sha256(&large(1)))
    );
    assert_eq!(names(&place.root().join("blobs")).len(), 3);
    // The token goes to the hub, and not to the storage on another host.
    let authorized = |start| server.requests(start).iter().filter(|r| r.headers.contains_key("authorization")).count();
    assert_eq!(authorized("/owner/"), server.requests("/owner/").len());
    assert_eq!((server.requests("/storage/").len(), authorized("/storage/")), (1, 0));
}

#[test]
fn downloads_the_files_of_an_index() {
    let (place, server) = (Place::new(), Files::sharded().serve());
    let snapshot = place.pull(&server).unwrap();
    let expected = ["a.safetensors", "b.safetensors", "config.json", "model.safetensors.index.json", "tokenizer.json"];
    assert_eq!(names(&snapshot), expected);
    assert!(fs::read(snapshot.join("b.safetensors")).unwrap() == large(2));
}

#[test]
fn a_second_time_downloads_nothing() {
    let (place, server) = (Place::new(), Files::one().serve());
    let first = place.pull(&server).unwrap();
    let gets = || server.requests("/").iter().filter(|r| r.method == "GET" && !r.path.starts_with("/api")).count();
    let before = gets();
    assert_eq!(place.pull(&server).unwrap(), first);
    assert_eq!(gets(), before);
}

#[test]
fn resumes_what_an_earlier_run_left() {
    let (place, server) = (Place::new(), Files::one().serve());
    let path = place.incomplete(&large(1));
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, &large(1)[..1_000_000]).unwrap();
    let snapshot = place.pull(&server).unwrap();
    assert!(fs::read(snapshot.join("model.safetensors")).unwrap() == large(1));
    let requests = server.requests("/storage/");
    assert_eq!(requests.iter().map(range).collect::<Vec<_>>(), [1_000_000]);
    assert!(!path.exists());
}

#[test]
fn a_complete_leftover_is_only_checked() {
    let (place, server) = (Place::new(), Files::one().serve());
    let path = place.incomplete(&large(1));
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, large(1)).unwrap();
    place.pull(&server).unwrap();
    assert_eq!(server.requests("/storage/").len(), 0);
}

#[test]
fn a_leftover_that_is_too_long_is_dropped() {
    let (place, server) = (Place::new(), Files::one().serve());
    let path = place.incomplete(&large(1));
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, vec![0; 3_000_001]).unwrap();
    assert!(fs::read(place.pull(&server).unwrap().join("model.safetensors")).unwrap() == large(1));
}

#[test]
fn goes_on_within_one_run_when_the_connection_breaks() {
    let server = Files::one()
        .serve_storage(|request, answer| Answer { cut: (range(request) < 2_000_000).then_some(700_000), ..answer });
    let place = Place::new();
    let snapshot = place.pull(&server).unwrap();
    assert!(fs::read(snapshot.join("model.safetensors")).unwrap() == large(1));
    let from: Vec<usize> = server.requests("/storage/").iter().map(range).collect();
    assert_eq!(from, [0, 700_000, 1_400_000, 2_100_000]);
}

#[test]
fn gives_up_without_progress_and_resumes_later() {
    let place = Place::new();
    let broken = Files::one()
        .serve_storage(|request, answer| Answer { cut: Some(if range(request) == 0 { 500_000 } else { 0 }), ..answer });
    place.fails(&broken, &["interrupted", "same command"]);
    assert_eq!(broken.requests("/storage/").len(), 5);
    assert_eq!(fs::metadata(place.incomplete(&large(1))).unwrap().len(), 500_000);
    let server = Files::one().serve();
    place.pull(&server).unwrap();
    assert_eq!(server.requests("/storage/").iter().map(range).collect::<Vec<_>>(), [500_000]);
}

#[test]
fn starts_again_where_the_server_knows_no_ranges() {
    let place = Place::new();
    let path = place.incomplete(&large(1));
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, &large(9)[..1_000_000]).unwrap();
    let server = Files::one().serve_storage(|_, _| Answer::ok(large(1)));
    assert!(fs::read(place.pull(&server).unwrap().join("model.safetensors")).unwrap() == large(1));
}

#[test]
fn a_server_error_is_tried_again() {
    let asked = AtomicU32::new(0);
    let server = Files::one().serve_storage(move |_, answer| match asked.fetch_add(1, Ordering::Relaxed) {
        0 | 1 => Answer::status(503),
        _ => answer,
    });
    Place::new().pull(&server).unwrap();
    let server = Files::one().serve_storage(|_, _| Answer::status(503));
    Place::new().fails(&server, &["503", "later"]);
    assert_eq!(server.requests("/storage/").len(), 5);
}

#[test]
fn wrong_hash() {
    let place = Place::new();
    let server = Files::one().serve_storage(|_, answer| Answer { body: large(7), ..answer });
    place.fails(&server, &["sha256", &sha256(&large(7)), &sha256(&large(1)), "again"]);
    assert!(!place.incomplete(&large(1)).exists());
    assert!(!place.root().join("blobs").join(sha256(&large(1))).exists());
}

#[test]
fn wrong_size() {
    let server = Files::one().serve_storage(|_, _| Answer::ok(large(1)[..2_999_999].to_vec()));
    Place::new().fails(&server, &["interrupted"]);
    let longer = Files::one().serve_storage(|_, _| Answer::ok([large(1), vec![0]].concat()));
    Place::new().fails(&longer, &["3000001 of 3000000"]);
}

#[test]
fn refusals_say_what_to_do() {
    let refuse =
        |status, code: &'static str| Server::start(move |_, _| Answer::status(status).with("X-Error-Code", code));
    let without = Place::new();
    let with = Place { token: Some("secret".into()), ..Place::new() };
    without.fails(&refuse(401, "RepoNotFound"), &["401", "check the name", "HF_TOKEN"]);
    with.fails(&refuse(401, "RepoNotFound"), &["401", "token is not valid", "HF_TOKEN"]);
    without.fails(&refuse(401, "GatedRepo"), &["401", "gated", "/owner/model", "HF_TOKEN"]);
    with.fails(&refuse(403, "GatedRepo"), &["403", "gated", "accept its conditions at http", "/owner/model"]);
    with.fails(&refuse(403, ""), &["403", "no access"]);
    without.fails(&refuse(404, "RevisionNotFound"), &["404", "no revision \"main\""]);
    without.fails(&refuse(404, ""), &["404", "check the name"]);
    without.fails(&refuse(429, ""), &["429", "wait"]);
    without.fails(&refuse(500, ""), &["500", "later"]);
    without.fails(&refuse(418, ""), &["418", "HF_ENDPOINT"]);
    assert!(!format!("{:?}", with.pull(&refuse(401, "")).unwrap_err()).contains("secret"));
}

#[test]
fn refused_at_the_file() {
    let files = Files::one();
    let server = Server::start(move |request, port| match request.path.contains("/resolve/") {
        true => Answer::status(403).with("X-Error-Code", "GatedRepo"),
        false => files.answer(request, port),
    });
    Place::new().fails(&server, &["config.json", "403", "gated", "set HF_TOKEN"]);
}

#[test]
fn nobody_there() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port(); // closed again at once
    let server = Server { endpoint: format!("http://127.0.0.1:{port}"), log: Arc::default() };
    Place::new().fails(&server, &["cannot be reached", "network"]);
}

#[test]
fn not_a_hub() {
    Place::new().fails(&Server::start(|_, _| Answer::ok("<html>")), &["not a hub's"]);
    let bad_commit = Server::start(|_, _| Answer::ok(r#"{"sha": "../../x", "siblings": []}"#));
    Place::new().fails(&bad_commit, &["not a hub's", "../../x"]);
    let files = Files::one();
    let bad_etag = Server::start(move |request, port| match request.path.contains("/resolve/") {
        true => Answer::ok("x").with("ETag", "\"../../x\""),
        false => files.answer(request, port),
    });
    Place::new().fails(&bad_etag, &["../../x", "ETag"]);
}

#[test]
fn endless_redirects() {
    let files = Files::one();
    let server = Server::start(move |request, port| match request.path.contains("/resolve/") {
        true => Answer::status(307).with("Location", &request.path),
        false => files.answer(request, port),
    });
    Place::new().fails(&server, &["redirects without end"]);
}

#[test]
fn a_renamed_repository() {
    let files = Files::one();
    let server = Server::start(move |request, port| match request.path.replace("/old/name", "/owner/model") {
        path if path == request.path => files.answer(request, port),
        path => Answer::status(307).with("Location", path),
    });
    let place = Place::new();
    let snapshot = place.pull_repo(&server, "old/name").unwrap();
    assert!(snapshot.starts_with(place.dir.path().join("models--old--name")));
    assert!(fs::read(snapshot.join("model.safetensors")).unwrap() == large(1));
}

#[test]
fn repositories_that_are_no_models() {
    let mut files = Files::one();
    files.small.remove("config.json");
    Place::new().fails(&files.clone().serve(), &["no config.json"]);
    files.large.clear();
    files.small.remove("model.gguf");
    Place::new()
        .fails(&files.serve(), &["neither model.safetensors nor", "pytorch_model.bin, which aoji does not read"]);
}

/// A repository of GGUF files alone, as converters publish them.
#[test]
fn gguf_files_by_their_names() {
    let mut files = Files::default();
    for name in ["m-Q4_K_M.gguf", "m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf", "README.md"] {
        files.small.insert(name.into(), format!("content of {name}").into_bytes());
    }
    let server = files.clone().serve();
    Place::new().fails(&server, &["2 GGUF models", "--file", "m-Q4_K_M.gguf, m-Q8_0-00001-of-00002.gguf"]);
    let pull = |pattern: &str| {
        let place = Place { file: Some(pattern.into()), ..Place::new() };
        let snapshot = place.pull(&server).unwrap();
        names(&snapshot)
    };
    assert_eq!(pull("*Q4_K_M*"), ["m-Q4_K_M.gguf"]);
    assert_eq!(pull("m-Q8_0-*.gguf"), ["m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf"]);
    for pattern in ["*Q5*", "m-Q4_K_M", "Q4_K_M*", "*Q8*Q8*"] {
        let place = Place { file: Some(pattern.into()), ..Place::new() };
        place.fails(&server, &["no file of the repository is named", pattern, "m-Q4_K_M.gguf"]);
    }
    // the only model there is needs no name, nor a configuration
    files.small.remove("m-Q4_K_M.gguf");
    assert_eq!(names(&Place::new().pull(&files.serve()).unwrap()).len(), 2);
}

#[test]
fn an_index_that_leads_elsewhere() {
    for name in ["../../../x.safetensors", "/etc/passwd", "c.safetensors", ""] {
        let mut files = Files::sharded();
        let index = serde_json::json!({"weight_map": {"x": name}}).to_string();
        files.small.insert("model.safetensors.index.json".into(), index.into_bytes());
        files.large.insert("/etc/passwd".into(), Vec::new());
        Place::new().fails(&files.serve(), &["names", &format!("{name:?}"), "no file of the repository"]);
    }
}

#[test]
fn names_that_are_no_repositories() {
    let server = Server::start(|_, _| Answer::status(500));
    for name in ["", "model", "a/b/c", "../x", "a/b?c"] {
        let error = Place::new().pull_repo(&server, name).unwrap_err();
        assert!(matches!(&error, Error::Input(text) if text.contains("OWNER/NAME")), "{error}");
    }
    assert!(server.requests("").is_empty());
}

#[test]
fn one_download_of_a_file_at_a_time() {
    let (place, server) = (Place::new(), Files::one().serve());
    let path = place.incomplete(&large(1));
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let other = fs::File::create(&path).unwrap();
    other.lock().unwrap();
    let error = place.pull(&server).unwrap_err();
    assert!(matches!(&error, Error::File { what, .. } if what.contains("another process")), "{error}");
    drop(other);
    place.pull(&server).unwrap();
}
