//! `aoji pull`: downloads a model into the Hugging Face cache, where every program of that world finds it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use aoji::hub::{self, Cache, Repo};
use aoji::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use ureq::config::RedirectAuthHeaders;
use ureq::http::{Response, header};
use ureq::{Agent, Body};

/// What a model directory needs besides its weights; all but the first may be absent.
const SMALL_FILES: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
];
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Attempts in a row that may fail without a byte of progress.
const ATTEMPTS: u32 = 5;
/// A server that sends nothing for this long is given up and asked again.
const SILENCE: Duration = Duration::from_secs(60);

/// Arguments of `aoji pull`.
#[derive(clap::Args)]
#[command(
    after_help = "Environment: HF_TOKEN (private and gated models), HF_HOME, HF_HUB_CACHE (where the cache is), \
HF_ENDPOINT (another server)."
)]
pub struct Args {
    /// The model's name, as in werty1248/Llama-3-Ko-8B-Instruct-AOG
    #[arg(value_name = "OWNER/NAME", required_unless_present = "model", conflicts_with = "model")]
    repo: Option<String>,
    /// The same, as for other commands
    #[arg(short, long, value_name = "OWNER/NAME")]
    model: Option<String>,
    /// Branch, tag, commit, or a pull request as refs/pr/1; others than main are then named OWNER/NAME@REVISION
    #[arg(long, default_value = "main")]
    revision: String,
    /// Which files have the weights: a name in which * stands for any characters, as in '*Q4_K_M*'
    #[arg(long, value_name = "NAME")]
    file: Option<String>,
}

/// Downloads the model and prints its directory.
pub fn run(args: Args) -> Result<()> {
    let options = Options { revision: args.revision, file: args.file, ..Options::from_env()? };
    let repo = args.repo.or(args.model).expect("clap asks for one of them");
    let dir = fetch(&repo, &options)?;
    writeln!(io::stdout(), "{}", dir.display()).map_err(io_error(Path::new("standard output")))
}

/// Where from and where to.
#[derive(Clone, Debug)]
pub struct Options {
    /// The server, without a slash at its end.
    pub endpoint: String,
    /// Access token for private and gated repositories.
    pub token: Option<String>,
    /// The cache to fill.
    pub cache: Cache,
    /// Branch, tag or commit.
    pub revision: String,
    /// Pattern of the names of the files with the weights; without it the safetensors, or the only GGUF model.
    pub file: Option<String>,
    /// Whether to draw a progress bar on stderr.
    pub progress: bool,
    /// Pause before the second attempt; doubled before each further one.
    pub backoff: Duration,
}

impl Options {
    /// What the environment says (`HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_CACHE`, `HF_HOME`), for branch `main`, with
    /// progress when stderr is a terminal.
    pub fn from_env() -> Result<Options> {
        let set = |name| std::env::var(name).ok().filter(|v| !v.is_empty());
        if let Some(value) = set("HF_HUB_OFFLINE").filter(|v| is_true(v)) {
            return Err(Error::Input(format!("HF_HUB_OFFLINE is {value}; unset it to download")));
        }
        let no_home = || Error::Input("no place for the cache: neither HOME, HF_HOME nor HF_HUB_CACHE is set".into());
        Ok(Options {
            endpoint: set("HF_ENDPOINT").as_deref().unwrap_or("https://huggingface.co").trim_end_matches('/').into(),
            token: hub::token(),
            cache: Cache::from_env().ok_or_else(no_home)?,
            revision: "main".into(),
            file: None,
            progress: io::stderr().is_terminal(),
            backoff: Duration::from_secs(1),
        })
    }
}

/// Downloads the configuration, the tokenizer and the weights of `OWNER/NAME` and returns their directory.
///
/// What is in the cache already is not fetched again, and an interrupted download goes on where it stopped. The
/// reference that [`hub::resolve`] follows is written last, so that it never leads to half a model.
pub fn fetch(repo: &str, options: &Options) -> Result<PathBuf> {
    let Some(repo) = Repo::parse(repo) else {
        return Err(Error::Input(format!("{repo:?} is not the name of a repository, expected OWNER/NAME")));
    };
    if !hub::is_revision(&options.revision) {
        let what = "expected a branch, a tag, a commit, or a pull request as in refs/pr/1";
        return Err(Error::Input(format!("revision {:?}: {what}", options.revision)));
    }
    let server = Server::new(options);
    let listing = server.listing(&repo)?;
    let root = options.cache.repo_dir(&repo);
    let snapshot = root.join("snapshots").join(&listing.sha);
    for dir in [&root.join("blobs"), &root.join("refs"), &snapshot] {
        fs::create_dir_all(dir).map_err(io_error(dir))?;
    }

    let bar = bar(options.progress);
    let url = |file: &str| format!("{}/{repo}/resolve/{}/{file}", options.endpoint, listing.sha);
    let fetch = |files: &[String]| -> Result<()> {
        // All sizes first, so that the bar knows the whole.
        let remotes = files.iter().map(|file| server.look(&url(file))).collect::<Result<Vec<Remote>>>()?;
        bar.inc_length(remotes.iter().filter_map(|r| r.size).sum());
        for (file, remote) in files.iter().zip(&remotes) {
            bar.set_message(file.clone());
            let blob = root.join("blobs").join(&remote.etag);
            server.fetch(remote, &blob, &bar)?;
            link(&blob, &snapshot.join(file))?;
        }
        Ok(())
    };
    let weights = listing.weights(options.file.as_deref(), &url(""))?;
    fetch(&listing.small_files(&weights, &url(""))?)?;
    fetch(&listing.weight_files(weights, &snapshot, &url(""))?)?;
    bar.finish_and_clear();

    let reference = root.join("refs").join(&options.revision);
    let refs = reference.parent().unwrap_or(&root); // a pull request's is deeper
    fs::create_dir_all(refs).map_err(io_error(refs))?;
    fs::write(&reference, &listing.sha).map_err(io_error(&reference))?;
    Ok(snapshot)
}

/// Whether a variable is set to what huggingface_hub takes for true.
pub fn is_true(value: &str) -> bool {
    ["1", "on", "yes", "true"].contains(&value.to_ascii_lowercase().as_str())
}

/// What the server says of a repository.
#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

impl Listing {
    fn has(&self, file: &str) -> bool {
        self.siblings.iter().any(|s| s.rfilename == file)
    }

    /// Where the weights are.
    fn weights(&self, pattern: Option<&str>, url: &str) -> Result<Weights> {
        let names = || self.siblings.iter().map(|s| s.rfilename.as_str());
        let list = |names: &[&str]| names.join(", ");
        if let Some(pattern) = pattern {
            let files: Vec<&str> = names().filter(|name| matches(pattern, name)).collect();
            return match files.iter().find(|file| !is_plain(file)) {
                _ if files.is_empty() => {
                    let all: Vec<&str> = names().filter(|name| is_weights(name)).collect();
                    Err(download(
                        url,
                        format!("no file of the repository is named {pattern}; its weights: {}", list(&all)),
                    ))
                }
                Some(file) => Err(download(url, format!("{file} is in a folder, from which aoji does not fetch"))),
                None => Ok(Weights::Files(files.into_iter().map(str::to_string).collect())),
            };
        }
        if self.has(SINGLE) {
            return Ok(Weights::Files(vec![SINGLE.into()]));
        }
        if self.has(INDEX) {
            return Ok(Weights::Index);
        }
        let gguf: Vec<&str> = names().filter(|name| name.ends_with(".gguf") && is_plain(name)).collect();
        let models: BTreeSet<&str> = gguf.iter().map(|name| without_piece(name)).collect();
        match models.len() {
            0 => {
                let other = names().find(|name| is_weights(name));
                let other = other.map(|f| format!(" (but {f}, which aoji does not read)")).unwrap_or_default();
                Err(download(url, format!("the repository has neither {SINGLE} nor {INDEX}{other}, nor a GGUF file")))
            }
            1 => Ok(Weights::Files(gguf.into_iter().map(str::to_string).collect())),
            n => {
                let what = format!("the repository has {n} GGUF models; name one with --file, as in --file '*Q4_K_M*'");
                Err(download(url, format!("{what}: {}", list(&gguf))))
            }
        }
    }

    /// The files to fetch before the weights, the weights' index among them. A GGUF file needs none of them.
    fn small_files(&self, weights: &Weights, url: &str) -> Result<Vec<String>> {
        let alone = |files: &Vec<String>| files.iter().all(|file| file.ends_with(".gguf"));
        if !matches!(weights, Weights::Files(files) if alone(files)) && !self.has("config.json") {
            return Err(download(url, "the repository has no config.json: it is not a model for transformers"));
        }
        let index = matches!(weights, Weights::Index).then_some(INDEX);
        Ok(SMALL_FILES.into_iter().chain(index).filter(|file| self.has(file)).map(str::to_string).collect())
    }

    /// The names of the weights: as they were found, or those that the index in `snapshot` lists.
    fn weight_files(&self, weights: Weights, snapshot: &Path, url: &str) -> Result<Vec<String>> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        if let Weights::Files(files) = weights {
            return Ok(files);
        }
        let path = snapshot.join(INDEX);
        let text = fs::read_to_string(&path).map_err(io_error(&path))?;
        let index: Index = serde_json::from_str(&text)
            .map_err(|e| Error::File { path: path.clone(), what: format!("is not a valid index: {e}") })?;
        let files: BTreeSet<String> = index.weight_map.into_values().collect();
        match files.iter().find(|file| !is_plain(file) || !self.has(file)) {
            Some(file) => Err(download(url, format!("{INDEX} names {file:?}, which is no file of the repository"))),
            None => Ok(files.into_iter().collect()),
        }
    }
}

/// Where a repository has its weights.
enum Weights {
    /// In these files.
    Files(Vec<String>),
    /// In those that the index lists.
    Index,
}

/// Whether a file's name says that it has weights.
fn is_weights(name: &str) -> bool {
    [".bin", ".gguf", ".pth", ".safetensors"].iter().any(|end| name.ends_with(end))
}

/// The name of a GGUF model without the number of its piece.
fn without_piece(name: &str) -> &str {
    let stem = name.trim_end_matches(".gguf");
    let number = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    match stem.rsplit_once("-of-").and_then(|(rest, n)| Some((rest.rsplit_once('-')?, n))) {
        Some(((model, i), n)) if number(i) && number(n) => model,
        _ => stem,
    }
}

/// Whether a name fits a pattern in which `*` stands for any characters, none included.
fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = name.strip_prefix(parts.next().unwrap_or_default()) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

/// A file on the server.
struct Remote {
    url: String,
    /// Name of its blob in the cache.
    etag: String,
    size: Option<u64>,
    /// Hash of its content in lower-case hexadecimal: the ETag of everything that is stored as a large file.
    sha256: Option<String>,
}

/// The connection to a hub.
struct Server<'a> {
    options: &'a Options,
    agent: Agent,
}

impl<'a> Server<'a> {
    fn new(options: &'a Options) -> Server<'a> {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // The token is for the hub, not for the storage it redirects to.
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .user_agent(concat!("aoji/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity") // sizes and ranges are those of the file itself
            .build();
        Server { options, agent: config.into() }
    }

    /// One request; any answer of the server is a success here.
    fn request(&self, url: &str, head: bool, from: u64) -> Result<Response<Body>, Failure> {
        let mut request = if head { self.agent.head(url) } else { self.agent.get(url) };
        if let Some(token) = &self.options.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header(header::RANGE, format!("bytes={from}-"));
        }
        // The headers that tell the hash are on the answer that redirects to the storage.
        let request = if head { request.config().max_redirects(0).build() } else { request };
        request.call().map_err(|e| {
            let advice = "check the network connection, and HF_ENDPOINT where it is set";
            Failure { error: download(url, format!("cannot be reached: {e}; {advice}")), again: true }
        })
    }

    fn listing(&self, repo: &Repo) -> Result<Listing> {
        let Options { endpoint, revision, .. } = self.options;
        let url = format!("{endpoint}/api/models/{repo}/revision/{}", revision.replace('/', "%2F"));
        // Once only: who is offline wants to hear it at once.
        let mut response = self.request(&url, false, 0)?;
        if !response.status().is_success() {
            return Err(self.refusal(&url, &response).error);
        }
        let wrong = |what: String| download(&url, format!("the server's answer is not a hub's: {what}"));
        let listing: Listing = response.body_mut().read_json().map_err(|e| wrong(e.to_string()))?;
        if !hub::is_commit(&listing.sha) {
            return Err(wrong(format!("commit {:?}", listing.sha)));
        }
        Ok(listing)
    }

    /// Size and hash of a file, without its content.
    fn look(&self, url: &str) -> Result<Remote> {
        let mut url = url.to_string();
        for _ in 0..5 {
            let response = self.retry(|| {
                let response = self.request(&url, true, 0)?;
                let known = response.status().is_success() || response.status().is_redirection();
                if known { Ok(response) } else { Err(self.refusal(&url, &response)) }
            })?;
            let get = |name: &str| response.headers().get(name)?.to_str().ok();
            // A renamed repository: the new place is on the same server, and only its answer has the hash.
            if let Some(place) = get("location").filter(|place| place.starts_with('/')) {
                url = format!("{}{place}", self.options.endpoint);
                continue;
            }
            let etag = get("x-linked-etag").or_else(|| get("etag")).unwrap_or_default();
            let etag = etag.trim_start_matches("W/").trim_matches('"').to_string();
            if !is_plain(&etag) {
                return Err(download(&url, format!("the server gives {etag:?} for an ETag: it is not a hub")));
            }
            let length = || get("content-length").filter(|_| response.status().is_success());
            let size = get("x-linked-size").or_else(length).and_then(|n| n.parse().ok());
            let is_sha256 = etag.len() == 64 && etag.bytes().all(|b| b.is_ascii_hexdigit());
            let sha256 = is_sha256.then(|| etag.to_ascii_lowercase());
            return Ok(Remote { url, etag, size, sha256 });
        }
        Err(download(&url, "the server redirects without end"))
    }

    /// Downloads a file to `blob`, unless it is there already.
    fn fetch(&self, remote: &Remote, blob: &Path, bar: &ProgressBar) -> Result<()> {
        if blob.exists() {
            bar.inc(remote.size.unwrap_or(0));
            return Ok(());
        }
        let path = blob.with_file_name(format!("{}.incomplete", remote.etag));
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(io_error(&path))?;
        if file.try_lock().is_err() {
            let what = "another process is downloading this file; wait for it to end".into();
            return Err(Error::File { path, what });
        }
        let mut partial = Partial { file, hash: Sha256::new(), len: 0 };
        partial.take_over(remote.size, bar).map_err(io_error(&path))?;

        let (mut attempt, mut last_len) = (0, partial.len);
        while let Err(failure) = self.continue_download(remote, &mut partial, &path, bar) {
            attempt = if partial.len > last_len { 1 } else { attempt + 1 };
            last_len = partial.len;
            self.pause(failure, attempt)?;
        }

        let found: String = partial.hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        if let Some(expected) = remote.sha256.as_ref().filter(|expected| **expected != found) {
            fs::remove_file(&path).map_err(io_error(&path))?;
            let what = format!("sha256 is {found}, expected {expected}: damaged on the way; download it again");
            return Err(download(&remote.url, what));
        }
        fs::rename(&path, blob).map_err(io_error(blob))
    }

    /// One attempt to get the rest of a file.
    fn continue_download(
        &self,
        remote: &Remote,
        partial: &mut Partial,
        path: &Path,
        bar: &ProgressBar,
    ) -> Result<(), Failure> {
        if Some(partial.len) == remote.size {
            return Ok(());
        }
        let mut response = self.request(&remote.url, false, partial.len)?;
        let resumed = format!("bytes {}-", partial.len);
        match response.status().as_u16() {
            206 if response
                .headers()
                .get(header::CONTENT_RANGE)
                .is_some_and(|r| r.to_str().is_ok_and(|r| r.starts_with(&resumed))) => {}
            // The whole file, from a server that knows no ranges, or one that has another file than we began with.
            200 | 206 | 416 if partial.len > 0 => {
                bar.set_position(bar.position().saturating_sub(partial.len));
                partial.restart().map_err(io_error(path))?;
                if response.status() != 200 {
                    return Err(interrupted(&remote.url, "the server would not go on where the download stopped"));
                }
            }
            200 => {}
            _ => return Err(self.refusal(&remote.url, &response)),
        }

        let mut reader = response.body_mut().as_reader();
        let mut buffer = vec![0; 1 << 20];
        loop {
            let n = match reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) => return Err(interrupted(&remote.url, &e.to_string())),
            };
            partial.append(&buffer[..n]).map_err(io_error(path))?;
            bar.inc(n as u64);
        }
        match remote.size {
            Some(size) if size != partial.len => {
                let what = format!("it ended after {} of {size} bytes", partial.len);
                Err(interrupted(&remote.url, &what))
            }
            _ => Ok(()),
        }
    }

    /// Repeats a request that fails in a way that may pass.
    fn retry<T>(&self, request: impl Fn() -> Result<T, Failure>) -> Result<T> {
        let mut attempt = 0;
        loop {
            match request() {
                Ok(answer) => return Ok(answer),
                Err(failure) => {
                    attempt += 1;
                    self.pause(failure, attempt)?;
                }
            }
        }
    }

    /// Waits after failed attempt number `attempt`, or gives the error when there is to be no other one.
    fn pause(&self, failure: Failure, attempt: u32) -> Result<()> {
        if attempt >= ATTEMPTS || !failure.again {
            return Err(failure.error);
        }
        std::thread::sleep(self.options.backoff * 2u32.pow(attempt - 1));
        Ok(())
    }

    /// What an answer other than success means, and what to do.
    fn refusal(&self, url: &str, response: &Response<Body>) -> Failure {
        let get = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok());
        let page = url.split("/resolve/").next().unwrap_or(url).split("/revision/").next().unwrap_or(url);
        let page = page.replace("/api/models/", "/");
        let status = response.status();
        let advice = match (status.as_u16(), get("x-error-code"), &self.options.token) {
            (401 | 403, Some("GatedRepo"), Some(_)) => {
                format!("the model is gated; accept its conditions at {page} with the account of this token")
            }
            (401 | 403, Some("GatedRepo"), None) => {
                format!(
                    "the model is gated; accept its conditions at {page} and set HF_TOKEN to a token of that account"
                )
            }
            (401, _, None) => {
                "there is no such public repository; check the name, or set HF_TOKEN if it is private".into()
            }
            (401, _, Some(_)) => {
                "the token is not valid, or there is no such repository; check HF_TOKEN and the name".into()
            }
            (403, _, _) => "the token has no access to this repository; use one that may read it".into(),
            (404, Some("RevisionNotFound"), _) => format!("the repository has no revision {:?}", self.options.revision),
            (404, _, _) => "there is no such repository or file; check the name".into(),
            (429, _, _) => "too many requests; wait a few minutes, or set HF_TOKEN for a higher limit".into(),
            (500.., _, _) => "the server is overloaded or broken; try again later".into(),
            _ => get("x-error-message").unwrap_or("unexpected answer; is HF_ENDPOINT a hub?").into(),
        };
        Failure { error: download(url, format!("{status}: {advice}")), again: status.is_server_error() }
    }
}

/// A file of which the first `len` bytes have arrived.
struct Partial {
    file: File,
    hash: Sha256,
    len: u64,
}

impl Partial {
    /// Takes over what an earlier run has left, unless it is longer than the file can be.
    fn take_over(&mut self, size: Option<u64>, bar: &ProgressBar) -> io::Result<()> {
        if self.file.metadata()?.len() > size.unwrap_or(0) {
            return self.restart();
        }
        let mut buffer = vec![0; 1 << 20];
        loop {
            match self.file.read(&mut buffer)? {
                0 => break,
                n => {
                    self.hash.update(&buffer[..n]);
                    self.len += n as u64;
                }
            }
        }
        bar.inc(self.len);
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.hash.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.hash.reset();
        self.len = 0;
        Ok(())
    }
}

/// Makes `link` in a snapshot refer to a blob, relatively as huggingface_hub does, so that the cache can be moved.
fn link(blob: &Path, link: &Path) -> Result<()> {
    let name = blob.file_name().expect("a blob has a name");
    let target = Path::new("../../blobs").join(name);
    match fs::read_link(link) {
        Ok(old) if old == target => return Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        _ => fs::remove_file(link).map_err(io_error(link))?,
    }
    #[cfg(unix)]
    let made = std::os::unix::fs::symlink(&target, link);
    #[cfg(not(unix))]
    let made = fs::hard_link(blob, link);
    made.map_err(io_error(link))
}

/// Whether a name that a server gave is safe as the name of a file.
fn is_plain(name: &str) -> bool {
    (1..=200).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        && !name.starts_with('.')
}

fn bar(visible: bool) -> ProgressBar {
    if !visible {
        return ProgressBar::hidden();
    }
    let style = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    ProgressBar::new(0).with_style(ProgressStyle::with_template(style).expect("a valid template"))
}

/// An error, and whether asking the server again may help.
struct Failure {
    error: Error,
    again: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure { error, again: false }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Error {
        failure.error
    }
}

fn interrupted(url: &str, cause: &str) -> Failure {
    let what = format!("the download was interrupted: {cause}; the same command goes on where it stopped");
    Failure { error: download(url, what), again: true }
}

fn download(url: &str, what: impl Into<String>) -> Error {
    Error::Download { url: url.to_string(), what: what.into() }
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_path_buf();
    move |source| Error::Io { path, source }
}
