//! Figures of other models, to be shown beside those of a run.

use crate::common;
use aoji::{Error, Result};
use serde::{Deserialize, de::DeserializeOwned};
use std::path::{Path, PathBuf};

/// What the model card of Llama-3-Ko-8B-Instruct-AOG prints about it and two other models.
const CARD: &str = include_str!("../../../../assets/kobest/card.json");

/// A report of another run, or figures in the form of one.
#[derive(Deserialize)]
struct Report {
    model: Option<String>,
    tasks: Vec<Figure>,
}

#[derive(Deserialize)]
struct Card {
    shots: usize,
    models: Vec<Report>,
}

/// A task's figures.
#[derive(Deserialize)]
pub struct Figure {
    task: String,
    pub acc: f64,
    pub acc_stderr: Option<f64>,
}

/// Figures with a name.
pub struct Beside {
    pub name: String,
    tasks: Vec<Figure>,
}

impl Beside {
    pub fn figure(&self, task: &str) -> Option<&Figure> {
        self.tasks.iter().find(|f| f.task == task)
    }
}

/// The figures in each of `files`; `card` is the model card, for runs with as many shots as its figures have.
pub fn read(files: &[PathBuf], shots: usize) -> Result<Vec<Beside>> {
    let mut all = Vec::new();
    for path in files {
        if path.as_os_str() == "card" {
            let card: Card = parse(path, CARD)?;
            if shots != card.shots {
                let what = format!("its figures are of {} shots, this run is of {shots}", card.shots);
                return Err(Error::Input(format!("--beside card: {what}; leave out --shots")));
            }
            let name = |model: Option<String>| format!("{} (card)", model.unwrap_or_default());
            all.extend(card.models.into_iter().map(|r| Beside { name: name(r.model), tasks: r.tasks }));
        } else {
            let report: Report = parse(path, &common::read_file(path)?)?;
            let stem = || path.file_stem().map_or("beside".into(), |s| s.to_string_lossy().into_owned());
            all.push(Beside { name: report.model.unwrap_or_else(stem), tasks: report.tasks });
        }
    }
    Ok(all)
}

fn parse<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T> {
    let wrong =
        |e| Error::File { path: path.into(), what: format!("has no tasks with their acc, as --json prints: {e}") };
    serde_json::from_str(text).map_err(wrong)
}
