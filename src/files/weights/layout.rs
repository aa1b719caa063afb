//! Which files of a model directory hold its weights.

use crate::{
    error::{Error, Result},
    files::{
        json,
        model_files::{INDEX, SINGLE},
    },
};
use serde::Deserialize;
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Component, Path, PathBuf},
};

/// The safetensors of a model directory.
pub(crate) struct Layout {
    /// The index through which they are found; `None` for `model.safetensors` alone.
    pub index: Option<PathBuf>,
    /// Those that are there, each once, in the order of their names.
    pub files: Vec<PathBuf>,
    /// The file of each tensor, as the index says.
    pub placed: BTreeMap<String, String>,
}

impl Layout {
    /// `model.safetensors`, or else the files that `model.safetensors.index.json` lists.
    pub fn of(dir: &Path) -> Result<Layout> {
        let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
        if json::exists(&single)? {
            return Ok(Layout { index: None, files: vec![single], placed: BTreeMap::new() });
        }
        let Some(text) = json::read_optional(&index)? else { return Err(no_weights(dir)) };
        let placed = Index::parse(&index, &text)?.weight_map;
        let names: BTreeSet<&String> = placed.values().collect();
        let mut files = Vec::with_capacity(names.len());
        for path in names.into_iter().map(|name| dir.join(name)) {
            if json::exists(&path)? {
                files.push(path);
            }
        }
        Ok(Layout { index: Some(index), files, placed })
    }
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    /// File of each tensor.
    weight_map: BTreeMap<String, String>,
}

impl Index {
    fn parse(path: &Path, text: &str) -> Result<Index> {
        let index: Index = json::parse(text).map_err(|e| Error::file(path, format!("is not a valid index: {e}")))?;
        if index.weight_map.is_empty() {
            return Err(Error::file(path, "lists no tensors"));
        }
        for file in index.weight_map.values() {
            // A plain name: nothing a downloaded index says may lead out of its directory. The file itself may be a
            // symbolic link; the Hugging Face cache consists of them.
            let mut parts = Path::new(file).components();
            let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
            if !plain || file.contains(['/', '\\', ':']) {
                let what = format!("names the file {file:?}, expected the plain name of a file beside the index");
                return Err(Error::file(path, what));
            }
        }
        Ok(index)
    }
}

/// The error for a directory without safetensors.
fn no_weights(dir: &Path) -> Error {
    let other = std::fs::read_dir(dir).into_iter().flatten().flatten().find_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        [".bin", ".pth", ".pt", ".safetensors"].iter().any(|end| name.ends_with(end)).then_some(name)
    });
    let what = match other {
        Some(name) => format!("has neither {SINGLE} nor {INDEX} (but {name}, which aoji does not read)"),
        None => format!("has neither {SINGLE} nor {INDEX}"),
    };
    Error::file(dir, what)
}
