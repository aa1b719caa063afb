//! Models by name: a directory, or a repository in the local Hugging Face cache.
//!
//! The cache's layout is huggingface_hub's: `models--OWNER--NAME/` has `refs/main` (the commit last fetched),
//! `snapshots/<commit>/` (one symbolic link per file) and `blobs/` (the files, named by their ETag). Both programs
//! read what the other one fetched. A pull request's reference is `refs/refs/pr/1`.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use crate::{
    error::{Error, Result},
    files::{
        gguf, json,
        model_files::{CONFIG, INDEX, SINGLE},
    },
};

/// Finds the directory of a model: `name` itself when it is a directory, else `OWNER/NAME` or `OWNER/NAME@REVISION` in the
/// local Hugging Face cache. The revision is a branch, a tag, a pull request (`refs/pr/1`) or a commit; without one it is
/// `main`, or the only one that was fetched. A GGUF file stands for itself, and for a directory that has one and no
/// safetensors.
///
/// Nothing is downloaded.
///
/// # Errors
/// [`Error::NoModel`] when there is neither, with the places that were looked at; [`Error::File`] when `name` is another
/// file, when there are several GGUF files to choose from, or when the cached repository is not completely there.
pub fn resolve(name: &str) -> Result<PathBuf> {
    resolve_in(name, Cache::from_env().as_ref())
}

fn resolve_in(name: &str, cache: Option<&Cache>) -> Result<PathBuf> {
    let path = Path::new(name);
    json::exists(path)?; // a link that leads nowhere is no name of a repository
    if path.is_dir() {
        return gguf::choose(path);
    }
    if path.is_file() && path.extension().is_some_and(|end| end == "gguf") {
        return Ok(path.to_path_buf());
    }
    if path.exists() {
        return Err(Error::file(path, "is a file, expected the model's directory, or a GGUF file (.gguf)"));
    }
    let missing = |tried: String| Error::NoModel { name: name.to_string(), tried };
    let (id, revision) = name.split_once('@').map_or((name, None), |(id, revision)| (id, Some(revision)));
    let Some(repo) = Repo::parse(id).filter(|_| revision.is_none_or(is_revision)) else {
        let form = "OWNER/NAME or OWNER/NAME@REVISION";
        return Err(missing(format!("there is no such directory, and it is not a name of the form {form}")));
    };
    let Some(cache) = cache else {
        return Err(missing("there is no such directory, and neither HOME nor HF_HOME says where a cache is".into()));
    };
    let snapshot = match cache.snapshot(&repo, revision.unwrap_or("main"))? {
        Some(snapshot) => snapshot,
        None => match (&cache.revisions(&repo)[..], revision) {
            ([], _) => return Err(missing(format!("no such directory, and no {}", cache.repo_dir(&repo).display()))),
            ([only], None) => {
                tracing::info!("{repo}: revision {only}, the only one in the cache");
                let gone = || missing(format!("revision {only} is no longer in the cache"));
                cache.snapshot(&repo, only)?.ok_or_else(gone)?
            }
            (there, _) => {
                let (asked, first) = (revision.unwrap_or("main"), &there[0]);
                let there = there.join(", ");
                let what = format!("the cache has no {asked} of it, but {there}: name one as in {repo}@{first}");
                return Err(missing(what));
            }
        },
    };
    let found = gguf::choose(&snapshot)?;
    if found.is_dir() {
        let has = |name: &str| json::exists(&snapshot.join(name));
        if !has(CONFIG)? {
            return Err(Error::file(snapshot, format!("has no {CONFIG}; fetch the model with `aoji pull {repo}`")));
        }
        if !has(SINGLE)? && !has(INDEX)? && is_unfinished(&cache.repo_dir(&repo)) {
            let what = format!("has no weights, their download was interrupted; `aoji pull {repo}` continues it");
            return Err(Error::file(snapshot, what));
        }
    }
    Ok(found)
}

/// Whether a download into the directory of a repository has not ended.
fn is_unfinished(repo: &Path) -> bool {
    let blobs = fs::read_dir(repo.join("blobs")).into_iter().flatten().flatten();
    blobs.map(|entry| entry.file_name()).any(|name| name.as_encoded_bytes().ends_with(b".incomplete"))
}

/// The name of a repository, `OWNER/NAME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repo {
    owner: String,
    name: String,
}

impl Repo {
    /// Reads `OWNER/NAME`; `None` when it is not of that form (letters, digits, `-`, `_` and `.`, as the hub has it),
    /// so that the parts are safe in a path and in a URL.
    pub fn parse(text: &str) -> Option<Repo> {
        let (owner, name) = text.split_once('/')?;
        let valid = |part: &str| {
            !part.is_empty()
                && part.len() <= 96
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
                && !part.starts_with(['-', '.'])
                && !part.ends_with(['-', '.'])
                && !part.contains("..")
                && !part.contains("--") // separates the parts in the cache
        };
        (valid(owner) && valid(name)).then(|| Repo { owner: owner.into(), name: name.into() })
    }
}

impl std::fmt::Display for Repo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)
    }
}

/// A Hugging Face cache directory.
#[derive(Clone, Debug)]
pub struct Cache {
    dir: PathBuf,
}

impl Cache {
    /// The cache in `dir`, which need not exist yet.
    pub fn at(dir: impl Into<PathBuf>) -> Cache {
        Cache { dir: dir.into() }
    }

    /// The user's cache: `HF_HUB_CACHE`, else `HUGGINGFACE_HUB_CACHE`, else `hub` in [`home`]. `None` when there is
    /// not even a home directory.
    pub fn from_env() -> Option<Cache> {
        Cache::from_vars(&|name| std::env::var_os(name))
    }

    fn from_vars(var: Vars) -> Option<Cache> {
        path_var(var, "HF_HUB_CACHE")
            .or_else(|| path_var(var, "HUGGINGFACE_HUB_CACHE"))
            .or_else(|| Some(home_from(var)?.join("hub")))
            .map(Cache::at)
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The directory that holds everything of a repository: `blobs`, `refs` and `snapshots`.
    pub fn repo_dir(&self, repo: &Repo) -> PathBuf {
        self.dir.join(format!("models--{}--{}", repo.owner, repo.name))
    }

    /// The directory of a commit, or of the one that a branch or tag was last fetched at; `None` when it never was.
    ///
    /// # Errors
    /// [`Error::Io`] when the reference cannot be read; [`Error::File`] when it names no commit, or one whose files
    /// are not there.
    pub fn snapshot(&self, repo: &Repo, revision: &str) -> Result<Option<PathBuf>> {
        let reference = self.repo_dir(repo).join("refs").join(revision);
        let commit = match fs::read_to_string(&reference) {
            Ok(text) => text.trim().to_string(),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let snapshot = self.repo_dir(repo).join("snapshots").join(revision);
                return Ok(Some(snapshot).filter(|s| is_commit(revision) && s.is_dir()));
            }
            Err(e) => return Err(Error::io(&reference)(e)),
        };
        if !is_commit(&commit) {
            return Err(Error::file(reference, "does not name a commit"));
        }
        let snapshot = self.repo_dir(repo).join("snapshots").join(&commit);
        if !snapshot.is_dir() {
            let what = format!("names commit {commit}, which is not in the cache; run `aoji pull {repo}`");
            return Err(Error::file(reference, what));
        }
        Ok(Some(snapshot))
    }

    /// The revisions of a repository that are in the cache: branches and tags, and commits that none of them names.
    pub fn revisions(&self, repo: &Repo) -> Vec<String> {
        let dir = self.repo_dir(repo);
        let mut names = names_below(&dir.join("refs"));
        let named: Vec<String> =
            names.iter().filter_map(|name| fs::read_to_string(dir.join("refs").join(name)).ok()).collect();
        let commits = fs::read_dir(dir.join("snapshots")).into_iter().flatten().flatten();
        let commits = commits.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.extend(commits.filter(|c| is_commit(c) && !named.iter().any(|n| n.trim() == c)));
        names
    }
}

/// Names of all files below a directory, as a path from there, in order.
fn names_below(dir: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        match entry.path().is_dir() {
            true => names.extend(names_below(&entry.path()).into_iter().map(|inner| format!("{name}/{inner}"))),
            false => names.push(name),
        }
    }
    names.sort();
    names
}

/// The access token of the user: `HF_TOKEN`, else what `hf auth login` has stored in [`home`].
pub fn token() -> Option<String> {
    let stored = || fs::read_to_string(home()?.join("token")).ok();
    let token = std::env::var("HF_TOKEN").ok().or_else(stored)?.trim().to_string();
    (!token.is_empty()).then_some(token)
}

/// Where Hugging Face programs keep their files: `HF_HOME`, else `XDG_CACHE_HOME/huggingface`, else
/// `~/.cache/huggingface`.
pub fn home() -> Option<PathBuf> {
    home_from(&|name| std::env::var_os(name))
}

/// Reads an environment variable.
type Vars<'a> = &'a dyn Fn(&str) -> Option<OsString>;

fn home_from(var: Vars) -> Option<PathBuf> {
    path_var(var, "HF_HOME")
        .or_else(|| Some(path_var(var, "XDG_CACHE_HOME")?.join("huggingface")))
        .or_else(|| Some(user_home(var)?.join(".cache/huggingface")))
}

fn user_home(var: Vars) -> Option<PathBuf> {
    var("HOME").or_else(|| var("USERPROFILE")).filter(|v| !v.is_empty()).map(PathBuf::from)
}

/// A variable that holds a path. One that was set in a file still has the `~` that no shell has expanded.
fn path_var(var: Vars, name: &str) -> Option<PathBuf> {
    let path = PathBuf::from(var(name).filter(|v| !v.is_empty())?);
    match (path.strip_prefix("~"), user_home(var)) {
        (Ok(rest), Some(home)) => Some(home.join(rest)),
        _ => Some(path),
    }
}

/// Whether a text can be a branch, a tag, a pull request or a commit, and so is safe in a path.
pub fn is_revision(text: &str) -> bool {
    let part = |part: &str| {
        part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.+".contains(&b))
            && !part.is_empty()
            && !part.starts_with(['-', '.'])
    };
    text.len() <= 200 && text.split('/').all(part)
}

/// Whether a text is a commit's hash, and so safe in a path.
pub fn is_commit(text: &str) -> bool {
    (7..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn cache_with(reference: &str, files: &[&str]) -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().unwrap();
        let repo = dir.path().join("models--some--model-1.5_b");
        let snapshot = repo.join("snapshots").join(COMMIT);
        fs::create_dir_all(repo.join("refs")).unwrap();
        fs::create_dir_all(&snapshot).unwrap();
        fs::write(repo.join("refs/main"), reference).unwrap();
        for file in files {
            fs::write(snapshot.join(file), "{}").unwrap();
        }
        let cache = Cache::at(dir.path());
        (dir, cache)
    }

    #[test]
    fn directory_then_cache() {
        let (dir, cache) = cache_with(COMMIT, &["config.json"]);
        assert_eq!(resolve_in(dir.path().to_str().unwrap(), None).unwrap(), dir.path());
        let found = resolve_in("some/model-1.5_b", Some(&cache)).unwrap();
        assert!(found.ends_with(format!("models--some--model-1.5_b/snapshots/{COMMIT}")), "{found:?}");
    }

    #[test]
    fn a_reference_may_end_in_a_newline() {
        let (_dir, cache) = cache_with(&format!("{COMMIT}\n"), &["config.json"]);
        assert!(resolve_in("some/model-1.5_b", Some(&cache)).is_ok());
    }

    #[test]
    fn revisions_by_name() {
        let (_dir, cache) = cache_with(COMMIT, &["config.json"]);
        let repo = cache.repo_dir(&Repo::parse("some/model-1.5_b").unwrap());
        let other = COMMIT.replace('0', "f");
        let add = |revision: &str, commit: &str| {
            let reference = repo.join("refs").join(revision);
            fs::create_dir_all(reference.parent().unwrap()).unwrap();
            fs::write(reference, commit).unwrap();
            fs::create_dir_all(repo.join("snapshots").join(commit)).unwrap();
            fs::write(repo.join("snapshots").join(commit).join("config.json"), "{}").unwrap();
        };
        let find = |name: &str| resolve_in(&format!("some/model-1.5_b{name}"), Some(&cache));
        let at = |name: &str| find(name).unwrap_or_else(|e| panic!("{name}: {e}")).file_name().unwrap().to_owned();
        add("refs/pr/1", &other);
        add("v1.0", &other);
        let refs = [("", COMMIT), ("@main", COMMIT), ("@refs/pr/1", &other), ("@v1.0", &other)];
        for (name, commit) in refs.into_iter().chain([(&*format!("@{other}"), &*other)]) {
            assert_eq!(at(name), *commit, "{name}");
        }
        let error = find("@v2").unwrap_err().to_string();
        assert!(error.contains("no v2 of it, but main, refs/pr/1, v1.0: name one as in"), "{error}");
        for bad in ["@", "@../main", "@a//b", "@/a", "@-a", "@a b", "@a/.."] {
            assert!(find(bad).unwrap_err().to_string().contains("OWNER/NAME@REVISION"), "{bad}");
        }

        fs::remove_file(repo.join("refs/main")).unwrap();
        fs::remove_dir_all(repo.join("snapshots").join(COMMIT)).unwrap();
        let error = find("").unwrap_err().to_string();
        assert!(error.contains("no main of it, but refs/pr/1, v1.0"), "{error}");
        fs::remove_file(repo.join("refs/v1.0")).unwrap();
        assert_eq!(at(""), *other, "the only one");
        fs::remove_dir_all(repo.join("refs")).unwrap();
        assert_eq!(at(""), *other, "a commit without a name");
    }

    #[test]
    fn not_found_says_where_it_looked() {
        let (_dir, cache) = cache_with(COMMIT, &["config.json"]);
        for (name, word) in [("other/model", "models--other--model"), ("nothing", "OWNER/NAME"), ("", "OWNER/NAME")] {
            let error = resolve_in(name, Some(&cache)).unwrap_err();
            assert!(matches!(&error, Error::NoModel { tried, .. } if tried.contains(word)), "{error}");
            assert!(error.hint().is_some());
        }
        assert!(resolve_in("other/model", None).unwrap_err().to_string().contains("HF_HOME"));
    }

    #[test]
    fn a_file_is_not_a_model() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = resolve_in(file.path().to_str().unwrap(), None).unwrap_err().to_string();
        assert!(error.contains("directory"), "{error}");
    }

    #[test]
    fn incomplete_cache() {
        let cases =
            [(COMMIT, "config.json"), ("../../..", "commit"), ("", "commit"), ("abcdef0123", "not in the cache")];
        for (reference, word) in cases {
            let (_dir, cache) = cache_with(reference, &[]);
            let error = resolve_in("some/model-1.5_b", Some(&cache)).unwrap_err();
            assert!(matches!(error, Error::File { .. }) && error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn names_of_repositories() {
        for good in ["werty1248/Llama-3-Ko-8B-Instruct-AOG", "a/b", "a_b/c.d-e"] {
            assert_eq!(Repo::parse(good).unwrap().to_string(), good);
        }
        let bad = ["", "a", "/a", "a/", "a/b/c", "../b", "a/..", "a/b--c", "a/-b", "a/b.", "a b/c", "a/b?c", "a\\b/c"];
        for bad in bad {
            assert_eq!(Repo::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn cache_directory_from_the_environment() {
        let dir = |vars: &[(&str, &str)]| {
            let get = |name: &str| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| OsString::from(v));
            Cache::from_vars(&get).map(|c| c.dir)
        };
        let home = ("HOME", "/h");
        assert_eq!(dir(&[]), None);
        assert_eq!(dir(&[home]).unwrap(), Path::new("/h/.cache/huggingface/hub"));
        assert_eq!(dir(&[home, ("XDG_CACHE_HOME", "/x")]).unwrap(), Path::new("/x/huggingface/hub"));
        assert_eq!(dir(&[home, ("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/f")]).unwrap(), Path::new("/f/hub"));
        assert_eq!(dir(&[home, ("HF_HOME", "~/f")]).unwrap(), Path::new("/h/f/hub"));
        assert_eq!(dir(&[home, ("HF_HOME", "")]).unwrap(), Path::new("/h/.cache/huggingface/hub"));
        assert_eq!(dir(&[home, ("HF_HOME", "/f"), ("HUGGINGFACE_HUB_CACHE", "/o")]).unwrap(), Path::new("/o"));
        assert_eq!(dir(&[("HUGGINGFACE_HUB_CACHE", "/o"), ("HF_HUB_CACHE", "/c")]).unwrap(), Path::new("/c"));
    }
}
