//! The file of `--save-samples`. Its first line describes the run; then there is one line for each finished document. A run that was
//! interrupted goes on after the last of them.

use super::{Bos, Suite};
use aoji::{
    Error, Result,
    eval::{Document, Sample, Task},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{
    collections::HashSet,
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
};

/// Everything that decides the numbers of a run.
#[derive(Serialize)]
pub struct Header {
    pub suite: Suite,
    pub model: String,
    pub lora: Vec<String>,
    pub device: String,
    pub dtype: &'static str,
    pub shots: usize,
    pub seed: u64,
    pub bos: Bos,
    pub cut: bool,
}

/// A line of the file.
#[derive(Serialize, Deserialize)]
struct Line {
    context: String,
    continuations: Vec<String>,
    #[serde(flatten)]
    sample: Sample,
}

/// The documents that are done, and the file in which they are kept.
pub struct Samples {
    pub done: Vec<Sample>,
    file: Option<(PathBuf, File)>,
}

impl Samples {
    /// Reads what the file has of `documents`; a new file begins with `header`.
    pub fn open(path: Option<&Path>, header: &Header, documents: &[Document]) -> Result<Samples> {
        let Some(path) = path else { return Ok(Samples { done: Vec::new(), file: None }) };
        let io = |source| Error::Io { path: path.into(), source };
        let header = serde_json::to_value(header).map_err(|e| Error::Input(e.to_string()))?;
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == ErrorKind::NotFound => String::new(),
            Err(e) => return Err(io(e)),
        };
        // a line without its end was being written when the run was interrupted
        let whole = text.rfind('\n').map_or(0, |i| i + 1);
        if whole == 0 && !text.is_empty() {
            return Err(Error::File { path: path.into(), what: "is not a file of samples; choose another".into() });
        }
        let mut lines = text[..whole].lines();
        let first = lines.next();
        if let Some(first) = first {
            check_header(path, first, &header)?;
        }
        let mut done = Vec::new();
        for (i, line) in lines.enumerate() {
            let wrong = |what: String| Error::File { path: path.into(), what: format!("line {}: {what}", i + 2) };
            let line: Line = serde_json::from_str(line).map_err(|e| wrong(format!("is no sample: {e}")))?;
            let s = &line.sample;
            let Some(d) = find(documents, s.task, s.doc_id) else { continue };
            if d.context != line.context || d.continuations() != line.continuations {
                return Err(wrong(format!("document {} of {} is not the one in --data", s.doc_id, s.task)));
            }
            done.push(line.sample);
        }
        let mut file = OpenOptions::new().create(true).append(true).open(path).map_err(io)?;
        file.set_len(whole as u64).map_err(io)?;
        if first.is_none() {
            file.write_all(format!("{header}\n").as_bytes()).map_err(io)?;
        }
        Ok(Samples { done, file: Some((path.into(), file)) })
    }

    /// Documents that are not done.
    pub fn left(&self, documents: &[Document]) -> Vec<Document> {
        let done: HashSet<(Task, usize)> = self.done.iter().map(|s| (s.task, s.doc_id)).collect();
        documents.iter().filter(|d| !done.contains(&(d.task, d.doc_id))).cloned().collect()
    }

    /// One more is done.
    pub fn add(&mut self, documents: &[Document], sample: Sample) -> Result<()> {
        if let Some((path, file)) = &mut self.file {
            let d = find(documents, sample.task, sample.doc_id).expect("a sample is of a document");
            let line = Line { context: d.context.clone(), continuations: d.continuations(), sample: sample.clone() };
            let line = serde_json::to_string(&line).map_err(|e| Error::Input(e.to_string()))?;
            let written = file.write_all(format!("{line}\n").as_bytes());
            written.map_err(|source| Error::Io { path: path.clone(), source })?;
        }
        self.done.push(sample);
        Ok(())
    }
}

/// Uses that the documents of a task are in order, and complete up to a limit.
fn find(documents: &[Document], task: Task, doc_id: usize) -> Option<&Document> {
    let first = documents.iter().position(|d| d.task == task)?;
    documents.get(first + doc_id).filter(|d| d.task == task)
}

fn check_header(path: &Path, line: &str, header: &Value) -> Result<()> {
    let wrong = |what: String| Error::File { path: path.into(), what };
    let found: Value = serde_json::from_str(line).map_err(|e| wrong(format!("is not a file of samples: {e}")))?;
    let differs = header.as_object().into_iter().flatten().find(|(name, value)| found.get(name) != Some(value));
    match differs {
        None => Ok(()),
        Some((name, value)) => Err(wrong(format!(
            "belongs to another run: its {name} is {}, this run's is {value}; choose another file",
            found.get(name).unwrap_or(&Value::Null)
        ))),
    }
}
