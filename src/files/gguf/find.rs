//! Which GGUF file is meant.

use crate::{
    error::{Error, Result},
    files::{
        json,
        model_files::{INDEX, SINGLE},
    },
};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// For `NAME-00001-of-00003.gguf`: the name, the number of this piece, and how many pieces there are.
fn piece(name: &str) -> Option<(&str, u32, u32)> {
    let stem = name.strip_suffix(".gguf")?;
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (name, own) = rest.rsplit_once('-')?;
    let number = |text: &str| (text.len() == 5).then(|| text.parse().ok()).flatten();
    Some((name, number(own)?, number(count)?)).filter(|(_, i, n)| (1..=*n).contains(i))
}

/// The files of the model that `path` is a file of, first to last.
pub(super) fn pieces(path: &Path) -> Result<Vec<PathBuf>> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Some((name, _, count)) = piece(name) else { return Ok(vec![path.to_path_buf()]) };
    let mut files = Vec::new();
    for i in 1..=count {
        let file = path.with_file_name(format!("{name}-{i:05}-of-{count:05}.gguf"));
        if !json::exists(&file)? {
            return Err(Error::file(file, format!("is missing: it is piece {i} of {count}")));
        }
        files.push(file);
    }
    Ok(files)
}

/// What to open in a model directory: itself, or the GGUF file in it when it has no safetensors.
///
/// # Errors
/// [`Error::File`] when there are several GGUF files, with their paths, and for links that lead nowhere.
pub(crate) fn choose(dir: &Path) -> Result<PathBuf> {
    if json::exists(&dir.join(SINGLE))? || json::exists(&dir.join(INDEX))? {
        return Ok(dir.to_path_buf());
    }
    let names = fs::read_dir(dir).map_err(Error::io(dir))?.flatten().filter_map(|e| e.file_name().into_string().ok());
    let first = |name: &String| piece(name).is_none_or(|(_, i, _)| i == 1);
    let mut files: Vec<String> = names.filter(|name| name.ends_with(".gguf")).filter(first).collect();
    files.sort();
    match &files[..] {
        [] => Ok(dir.to_path_buf()),
        [one] => json::exists(&dir.join(one)).map(|_| dir.join(one)),
        several => {
            let list: String = several.iter().map(|name| format!("\n  {}", dir.join(name).display())).collect();
            Err(Error::file(dir, format!("has several GGUF files; name the one to open:{list}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_pieces() {
        assert_eq!(piece("a-b-00002-of-00003.gguf"), Some(("a-b", 2, 3)));
        for other in
            ["a.gguf", "a-00004-of-00003.gguf", "a-00000-of-00003.gguf", "a-1-of-3.gguf", "00001-of-00003.gguf"]
        {
            assert_eq!(piece(other), None, "{other}");
        }
    }

    #[test]
    fn one_of_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str| fs::write(dir.path().join(name), "").unwrap();
        assert_eq!(choose(dir.path()).unwrap(), dir.path());
        write("m-00001-of-00002.gguf");
        write("m-00002-of-00002.gguf");
        let first = dir.path().join("m-00001-of-00002.gguf");
        assert_eq!(choose(dir.path()).unwrap(), first);
        assert_eq!(pieces(&dir.path().join("m-00002-of-00002.gguf")).unwrap()[0], first);
        write("m-Q8_0.gguf");
        let error = choose(dir.path()).unwrap_err().to_string();
        assert!(error.contains("several") && error.contains("m-00001-of-00002.gguf") && error.contains("m-Q8_0.gguf"));
        write("model.safetensors");
        assert_eq!(choose(dir.path()).unwrap(), dir.path());
        fs::remove_file(&first).unwrap();
        let error = pieces(&dir.path().join("m-00002-of-00002.gguf")).unwrap_err().to_string();
        assert!(error.contains("m-00001-of-00002.gguf") && error.contains("missing"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn links_that_lead_nowhere_are_named() {
        for name in ["model.safetensors", "model.safetensors.index.json", "m.gguf", "m-00001-of-00002.gguf"] {
            let dir = tempfile::tempdir().unwrap();
            let link = dir.path().join(name);
            std::os::unix::fs::symlink("../../blobs/abc", &link).unwrap();
            fs::write(dir.path().join("m-00002-of-00002.gguf"), "").unwrap();
            let found = choose(dir.path()).and_then(|path| pieces(&path));
            let error = found.unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("is a link to ../../blobs/abc"), "{error}");
        }
    }
}
