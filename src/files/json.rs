//! Texts in a model's directory, and JSON as Python writes it.

use crate::error::{Error, Result};
use serde::de::DeserializeOwned;
use std::{borrow::Cow, fs, io::ErrorKind, path::Path};

/// Whether there is such a file. A link that leads nowhere is an error, not an absent file: the Hugging Face cache
/// consists of links, and a model that lost one of its files would silently become another model.
pub(crate) fn exists(path: &Path) -> Result<bool> {
    let Ok(place) = fs::read_link(path) else { return Ok(path.exists()) };
    if path.exists() {
        return Ok(true);
    }
    let what = format!("is a link to {}, which is not there; `aoji pull` fetches what is missing", place.display());
    Err(Error::file(path, what))
}

/// The text of a file.
///
/// # Errors
/// [`Error::Io`] when it cannot be read, [`Error::File`] for a link that leads nowhere.
pub(crate) fn read(path: &Path) -> Result<String> {
    exists(path)?;
    fs::read_to_string(path).map_err(Error::io(path))
}

/// The text of a file, `None` when there is none.
pub(crate) fn read_optional(path: &Path) -> Result<Option<String>> {
    exists(path)?;
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(path)(e)),
    }
}

/// The mark with which some editors begin a text.
pub(crate) const BYTE_ORDER_MARK: char = '\u{feff}';

/// Reads JSON, also after a byte order mark. `NaN`, `Infinity` and `-Infinity`, which Python's `json` writes, become
/// strings of that spelling, so that they are refused only where a number is needed.
pub(crate) fn parse<T: DeserializeOwned>(text: &str) -> serde_json::Result<T> {
    let text = text.trim_start_matches(BYTE_ORDER_MARK);
    serde_json::from_str(text).or_else(|e| match quoted(text) {
        Cow::Borrowed(_) => Err(e),
        Cow::Owned(text) => serde_json::from_str(&text),
    })
}

/// Puts quotes around the numbers of Python that JSON does not have.
fn quoted(text: &str) -> Cow<'_, str> {
    const WORDS: [&str; 3] = ["NaN", "-Infinity", "Infinity"];
    let (mut out, mut from, mut in_string, mut at) = (String::new(), 0, false, 0);
    let bytes = text.as_bytes();
    while at < bytes.len() {
        let word = WORDS.iter().find(|w| !in_string && bytes[at..].starts_with(w.as_bytes()));
        match (bytes[at], word) {
            (_, Some(word)) => {
                out += &format!("{}\"{word}\"", &text[from..at]);
                at += word.len();
                from = at;
                continue;
            }
            (b'"', _) => in_string = !in_string,
            (b'\\', _) if in_string => at += 1, // what is escaped ends no string
            _ => {}
        }
        at += 1;
    }
    if from == 0 { Cow::Borrowed(text) } else { Cow::Owned(out + &text[from..]) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn pythons_numbers() {
        let read = |text: &str| parse::<Value>(text).ok();
        let all = r#"{"a": NaN, "b": [Infinity,-Infinity], "c\"": "NaN \\", "d": -1, "e": "\\\"Infinity"}"#;
        let want = json!({"a": "NaN", "b": ["Infinity", "-Infinity"], "c\"": "NaN \\", "d": -1, "e": "\\\"Infinity"});
        assert_eq!(read(all), Some(want));
        assert_eq!(read("\u{feff}{\"a\": NaN}"), Some(json!({"a": "NaN"})));
        for wrong in ["", "{", "{\"a\": nan}", "{\"a\": NaNo}", "{\"a\": NaN", "{NaN: 1, }"] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_link_that_leads_nowhere_is_no_absent_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        assert_eq!((exists(&file).unwrap(), read_optional(&file).unwrap()), (false, None));
        std::os::unix::fs::symlink("../../blobs/abc", &file).unwrap();
        for error in [exists(&file).unwrap_err(), read(&file).unwrap_err(), read_optional(&file).unwrap_err()] {
            assert!(
                error.to_string().contains("config.json: is a link to ../../blobs/abc, which is not there"),
                "{error}"
            );
        }
    }
}
