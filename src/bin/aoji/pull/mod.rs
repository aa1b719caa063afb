//! `aoji pull`: downloads a model into the Hugging Face cache, where other programs find it too.

mod blob;
mod listing;
mod proxy;
mod server;

use aoji::{
    Error, Result,
    hub::{self, Cache, Repo},
    model_files::{CONFIG, INDEX},
};
use indicatif::{ProgressBar, ProgressStyle};
use server::{Remote, Server};
use std::{
    fs,
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
    time::Duration,
};

const AFTER_HELP: &str = "\
Environment: HF_TOKEN (private and gated models), HF_HOME, HF_HUB_CACHE (where the cache is), HF_ENDPOINT (another server), \
HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY.";

/// Arguments of `aoji pull`.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Args {
    /// The model's name, as in werty1248/Llama-3-Ko-8B-Instruct-AOG
    #[arg(value_name = "OWNER/NAME", required_unless_present = "model", conflicts_with = "model")]
    repo: Option<String>,
    /// The same, as for other commands
    #[arg(short, long, value_name = "OWNER/NAME")]
    model: Option<String>,
    /// Branch, tag, commit, or a pull request as refs/pr/1; for all but main, the model's name is then
    /// OWNER/NAME@REVISION
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

/// Where to download from and to.
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
    /// The environment's settings (`HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_CACHE`, `HF_HOME`), for the branch `main`, with
    /// progress if stderr is a terminal.
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
/// What is in the cache already is not fetched again, and an interrupted download continues where it stopped. Files get
/// their names in the snapshot when all are complete, `config.json` last, and only then the reference that
/// [`hub::resolve`] follows is written: so half a model is never found.
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
    let blobs = root.join("blobs");
    fs::create_dir_all(&blobs).map_err(io_error(&blobs))?;

    let bar = bar(options.progress);
    let url = |file: &str| format!("{}/{repo}/resolve/{}/{file}", options.endpoint, listing.sha);
    let fetch = |files: &[String]| -> Result<Vec<(String, PathBuf)>> {
        // All sizes come first, so that the bar knows the total.
        let remotes = files.iter().map(|file| server.look(&url(file))).collect::<Result<Vec<Remote>>>()?;
        bar.inc_length(remotes.iter().filter_map(|r| r.size).sum());
        let one = |(file, remote): (&String, &Remote)| {
            bar.set_message(file.clone());
            let blob = blobs.join(&remote.etag);
            server.fetch(remote, &blob, &bar)?;
            Ok((file.clone(), blob))
        };
        files.iter().zip(&remotes).map(one).collect()
    };
    let weights = listing.weights(options.file.as_deref(), &url(""))?;
    let mut fetched = fetch(&listing.small_files(&weights, &url(""))?)?;
    let index = fetched.iter().find(|(file, _)| file == INDEX).map(|(_, blob)| blob.clone());
    fetched.extend(fetch(&listing.weight_files(weights, index.as_deref(), &url(""))?)?);
    bar.finish_and_clear();

    fs::create_dir_all(&snapshot).map_err(io_error(&snapshot))?;
    fetched.sort_by_key(|(file, _)| file == CONFIG);
    fetched.iter().try_for_each(|(file, blob)| link(blob, &snapshot.join(file)))?;
    let reference = root.join("refs").join(&options.revision);
    let refs = reference.parent().unwrap_or(&root); // a pull request's is deeper
    fs::create_dir_all(refs).map_err(io_error(refs))?;
    fs::write(&reference, &listing.sha).map_err(io_error(&reference))?;
    Ok(snapshot)
}

/// Whether a variable has a value that huggingface_hub takes for true.
pub fn is_true(value: &str) -> bool {
    ["1", "on", "yes", "true"].contains(&value.to_ascii_lowercase().as_str())
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

fn download(url: &str, what: impl Into<String>) -> Error {
    Error::Download { url: url.to_string(), what: what.into() }
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_path_buf();
    move |source| Error::Io { path, source }
}
