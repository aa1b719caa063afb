//! Requests to a hub, and what its responses mean.

use super::{Options, download, is_plain, listing::Listing, proxy::ProxyConnector};
use aoji::{
    Error, Result,
    hub::{self, Repo},
};
use std::time::Duration;
use ureq::{
    Agent, Body,
    config::RedirectAuthHeaders,
    http::{Response, header},
    unversioned::resolver::DefaultResolver,
};

/// How many attempts in a row may fail without a byte of progress.
const ATTEMPTS: u32 = 5;
/// If a server sends nothing for this long, the request is given up and repeated.
const SILENCE: Duration = Duration::from_secs(60);

/// A file on the server.
pub(super) struct Remote {
    pub url: String,
    /// Name of its blob in the cache.
    pub etag: String,
    pub size: Option<u64>,
    /// Hash of its content in lower-case hexadecimal: the ETag of everything that is stored as a large file.
    pub sha256: Option<String>,
}

/// The connection to a hub.
pub(super) struct Server<'a> {
    options: &'a Options,
    agent: Agent,
}

impl<'a> Server<'a> {
    pub fn new(options: &'a Options) -> Server<'a> {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // The token is for the hub, not for the storage to which the hub redirects.
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .user_agent(concat!("aoji/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity") // sizes and ranges are those of the file itself
            .build();
        Server { options, agent: Agent::with_parts(config, ProxyConnector::new(), DefaultResolver::default()) }
    }

    /// Sends one request; every response of the server counts as success here.
    pub fn request(&self, url: &str, head: bool, from: u64) -> Result<Response<Body>, Failure> {
        let mut request = if head { self.agent.head(url) } else { self.agent.get(url) };
        if let Some(token) = &self.options.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header(header::RANGE, format!("bytes={from}-"));
        }
        // The headers with the hash are on the response that redirects to the storage.
        let request = if head { request.config().max_redirects(0).build() } else { request };
        request.call().map_err(|e| {
            let advice = "check the network connection, and HF_ENDPOINT and the proxy where they are set";
            Failure { error: download(url, format!("cannot be reached: {e}; {advice}")), again: true }
        })
    }

    pub fn listing(&self, repo: &Repo) -> Result<Listing> {
        let Options { endpoint, revision, .. } = self.options;
        let url = format!("{endpoint}/api/models/{repo}/revision/{}", revision.replace('/', "%2F"));
        // Only one attempt: users who are offline want to know at once.
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
    pub fn look(&self, url: &str) -> Result<Remote> {
        let mut url = url.to_string();
        for _ in 0..5 {
            let response = self.retry(|| {
                let response = self.request(&url, true, 0)?;
                let known = response.status().is_success() || response.status().is_redirection();
                if known { Ok(response) } else { Err(self.refusal(&url, &response)) }
            })?;
            let get = |name: &str| response.headers().get(name)?.to_str().ok();
            // A renamed repository: the new one is on the same server, and only its response has the hash.
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

    /// Repeats a request as long as it fails in a way that may be temporary.
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

    /// Waits after the failed attempt number `attempt`, or returns the error if there should be no other attempt.
    pub fn pause(&self, failure: Failure, attempt: u32) -> Result<()> {
        if attempt >= ATTEMPTS || !failure.again {
            return Err(failure.error);
        }
        std::thread::sleep(self.options.backoff * 2u32.pow(attempt - 1));
        Ok(())
    }

    /// What a response other than success means, and what to do.
    pub fn refusal(&self, url: &str, response: &Response<Body>) -> Failure {
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

/// An error, and whether asking the server again may help.
pub(super) struct Failure {
    pub error: Error,
    pub again: bool,
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

pub(super) fn interrupted(url: &str, cause: &str) -> Failure {
    let what = format!("the download was interrupted: {cause}; the same command continues where it stopped");
    Failure { error: download(url, what), again: true }
}
