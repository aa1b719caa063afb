//! Runs the requests of a benchmark on a model.

use super::{Document, Task};
use crate::{
    engine::{
        Engine,
        score::{Request, first_token},
    },
    error::{Error, Result},
};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// What the model said about a document.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The task it belongs to.
    pub task: Task,
    /// Number of its row in the test set.
    pub doc_id: usize,
    /// The right choice.
    pub gold: usize,
    /// Log-probability of each choice.
    pub logprobs: Vec<f64>,
    /// Whether greedy decoding would have given it.
    pub greedy: Vec<bool>,
    /// The choice with the highest log-probability, the first of several equals.
    pub pred: usize,
    /// The choice with the highest log-probability per character.
    pub pred_norm: usize,
    /// Tokens of all choices, each counted with the whole context.
    pub asked: usize,
    /// Tokens that went through the model.
    pub computed: usize,
}

/// How far a run is, in tokens of the requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// So far.
    pub done: usize,
    /// In all.
    pub total: usize,
}

/// Asks the model about each document and gives the answer to `each`. The order is that of the computation: tasks in
/// the order of `documents`, and within a task the contexts in the order of their tokens, so that neighbours share as
/// much as possible. Ends when `each` returns `false`.
///
/// With `special`, BOS is put before a context if the tokenizer's own rule says so; with `cut`, a context that is too
/// long loses its beginning.
///
/// # Errors
/// `Input` when a document is too long and may not be cut; whatever `each` returns.
pub fn run(
    engine: &Engine,
    documents: &[Document],
    special: bool,
    cut: bool,
    each: &mut dyn FnMut(Progress, Sample) -> Result<bool>,
) -> Result<()> {
    let (tokenizer, first, max) = (engine.tokenizer()?, first_token(engine)?, engine.max_context());
    let encode = |d: &Document| -> Result<Vec<Request>> {
        let request = Request::encode(tokenizer, &d.context, &d.continuations(), special, first)?;
        match request.positions() {
            needed if needed > max && !cut => Err(Error::Input(format!(
                "document {} of {} has {needed} tokens, the context has {max}: cut contexts on the left (--cut), or ask \
                 for fewer shots or a larger context",
                d.doc_id, d.task
            ))),
            _ => request.cut_left(max),
        }
    };
    let encoded: Vec<Result<Vec<Request>>> = documents.par_iter().map(encode).collect();
    let requests: Vec<Vec<Request>> = encoded.into_iter().collect::<Result<_>>()?; // the first document's error
    let positions = requests.iter().flatten().map(Request::positions).max().unwrap_or(1);
    let mut session = engine.session_with_branches(positions, branches(engine, &requests, positions))?;
    let mut tasks: Vec<Task> = documents.iter().map(|d| d.task).collect();
    tasks.dedup();
    let key = |&i: &usize| (tasks.iter().position(|t| *t == documents[i].task), &requests[i][0].context);
    let mut order: Vec<usize> = (0..documents.len()).collect();
    order.sort_by(|a, b| key(a).cmp(&key(b)));
    let asked = |i: usize| requests[i].iter().map(Request::tokens).sum::<usize>();
    let mut progress = Progress { done: 0, total: (0..documents.len()).map(asked).sum() };
    for i in order {
        let d = &documents[i];
        let (mut choices, mut computed) = (Vec::new(), 0);
        for r in &requests[i] {
            let scores = session.score(&r.context, &r.continuations)?;
            choices.extend(scores.continuations);
            computed += scores.computed;
        }
        progress.done += asked(i);
        let logprobs: Vec<f64> = choices.iter().map(|c| c.sum()).collect();
        let norm: Vec<f64> = logprobs.iter().zip(&d.choices).map(|(x, c)| x / c.chars().count() as f64).collect();
        let sample = Sample {
            task: d.task,
            doc_id: d.doc_id,
            gold: d.gold,
            pred: argmax(&logprobs),
            pred_norm: argmax(&norm),
            greedy: choices.iter().map(|c| c.greedy()).collect(),
            logprobs,
            asked: asked(i),
            computed,
        };
        if !each(progress, sample)? {
            break;
        }
    }
    Ok(())
}

/// How many continuations are computed in one pass: as many as a document has, unless their sequences of `positions`
/// positions would take more memory than the one sequence of full context for which the engine has room.
fn branches(engine: &Engine, requests: &[Vec<Request>], positions: usize) -> usize {
    const MOST: usize = 4; // KoBEST's largest choice
    let most = requests.iter().flatten().map(|r| r.continuations.len()).max().unwrap_or(1).min(MOST);
    (engine.max_context() / positions).clamp(1, most.max(1))
}

/// The first of the largest, as numpy's `argmax`.
fn argmax(x: &[f64]) -> usize {
    (0..x.len()).fold(0, |best, i| if x[i] > x[best] { i } else { best })
}
