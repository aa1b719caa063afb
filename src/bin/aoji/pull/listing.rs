//! What a repository contains, and which of its files make a model.

use super::{download, io_error, is_plain};
use aoji::{
    Error, Result,
    model_files::{CONFIG, INDEX, SINGLE, SMALL},
};
use serde::Deserialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

/// What the server says of a repository.
#[derive(Deserialize)]
pub(super) struct Listing {
    pub sha: String,
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
    pub fn weights(&self, pattern: Option<&str>, url: &str) -> Result<Weights> {
        let names = || self.siblings.iter().map(|s| s.rfilename.as_str());
        let list = |names: &[&str]| names.join(", ");
        if let Some(pattern) = pattern {
            let files: Vec<&str> = names().filter(|name| matches(pattern, name)).collect();
            if files.is_empty() {
                let all: Vec<&str> = names().filter(|name| is_weights(name)).collect();
                let what = format!("no file of the repository is named {pattern}; its weights: {}", list(&all));
                return Err(download(url, what));
            }
            if let Some(file) = files.iter().find(|file| !is_plain(file)) {
                return Err(download(url, format!("{file} is in a folder, from which aoji does not fetch")));
            }
            let several = files.iter().any(|file| file.ends_with(".safetensors")) && !files.contains(&SINGLE);
            let files = files.into_iter().map(str::to_string).collect();
            return Ok(if several && self.has(INDEX) { Weights::Index(Some(files)) } else { Weights::Files(files) });
        }
        if self.has(SINGLE) {
            return Ok(Weights::Files(vec![SINGLE.into()]));
        }
        if self.has(INDEX) {
            return Ok(Weights::Index(None));
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
                let what =
                    format!("the repository has {n} GGUF models; choose one with --file, as in --file '*Q4_K_M*'");
                Err(download(url, format!("{what}: {}", list(&gguf))))
            }
        }
    }

    /// The files to fetch before the weights, including the weights' index. A GGUF file needs none of them.
    pub fn small_files(&self, weights: &Weights, url: &str) -> Result<Vec<String>> {
        let alone = |files: &Vec<String>| files.iter().all(|file| file.ends_with(".gguf"));
        if !matches!(weights, Weights::Files(files) if alone(files)) && !self.has(CONFIG) {
            return Err(download(url, "the repository has no config.json: it is not a model for transformers"));
        }
        let index = matches!(weights, Weights::Index(_)).then_some(INDEX);
        Ok(SMALL.into_iter().chain(index).filter(|file| self.has(file)).map(str::to_string).collect())
    }

    /// The names of the weights: as they were found, or those that the index lists.
    pub fn weight_files(&self, weights: Weights, index: Option<&Path>, url: &str) -> Result<Vec<String>> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let (path, chosen) = match (weights, index) {
            (Weights::Files(files), _) => return Ok(files),
            (Weights::Index(chosen), Some(path)) => (path, chosen),
            (Weights::Index(_), None) => return Err(download(url, format!("{INDEX} was not fetched"))),
        };
        let text = fs::read_to_string(path).map_err(io_error(path))?;
        let index: Index = serde_json::from_str(&text)
            .map_err(|e| Error::File { path: path.into(), what: format!("is not a valid {INDEX}: {e}") })?;
        let files: BTreeSet<String> = index.weight_map.into_values().collect();
        if let Some(file) = files.iter().find(|file| !is_plain(file) || !self.has(file)) {
            return Err(download(url, format!("{INDEX} names {file:?}, which is no file of the repository")));
        }
        if let Some(file) = files.iter().find(|file| chosen.as_ref().is_some_and(|chosen| !chosen.contains(file))) {
            return Err(download(url, format!("--file leaves out {file}, which {INDEX} names: the model needs it")));
        }
        Ok(files.into_iter().collect())
    }
}

/// Which files of a repository have its weights.
pub(super) enum Weights {
    /// In these files.
    Files(Vec<String>),
    /// Those that the index lists; if names are given here, all of them must be among these.
    Index(Option<Vec<String>>),
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
