//! Accuracy, its standard error, and F1, as the harness computes them.

use super::{Sample, Task};
use serde::Serialize;

/// The results of a task.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TaskResult {
    /// The harness's name of the task.
    pub task: String,
    /// Documents.
    pub n: usize,
    /// Share of documents whose right choice has the highest log-probability.
    pub acc: f64,
    /// Its standard error; absent for fewer than two documents.
    pub acc_stderr: Option<f64>,
    /// The same by log-probability per character, for tasks where the harness reports it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub acc_norm: Option<f64>,
    /// Its standard error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub acc_norm_stderr: Option<f64>,
    /// F1 of each label, averaged.
    pub f1: f64,
}

impl TaskResult {
    /// Adds up the samples of `task`.
    pub fn of(task: Task, samples: &[Sample]) -> TaskResult {
        let samples: Vec<&Sample> = samples.iter().filter(|s| s.task == task).collect();
        let hits = |pred: fn(&Sample) -> usize| -> Vec<f64> {
            samples.iter().map(|s| if pred(s) == s.gold { 1.0 } else { 0.0 }).collect()
        };
        let (acc, norm) = (hits(|s| s.pred), hits(|s| s.pred_norm));
        let norm = task.has_acc_norm().then_some(norm);
        let pairs: Vec<(usize, usize)> = samples.iter().map(|s| (s.gold, s.pred)).collect();
        TaskResult {
            task: task.to_string(),
            n: samples.len(),
            acc: mean(&acc),
            acc_stderr: stderr(&acc),
            acc_norm: norm.as_deref().map(mean),
            acc_norm_stderr: norm.as_deref().and_then(stderr),
            f1: macro_f1(&pairs),
        }
    }
}

fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len().max(1) as f64
}

/// Standard error of the mean of `x`, with `n - 1` degrees of freedom.
pub fn stderr(x: &[f64]) -> Option<f64> {
    let (m, n) = (mean(x), x.len() as f64);
    (x.len() > 1).then(|| (x.iter().map(|x| (x - m).powi(2)).sum::<f64>() / (n - 1.0)).sqrt() / n.sqrt())
}

/// scikit-learn's `f1_score(average="macro")` of `(right, chosen)` pairs: over the labels that occur on either side.
pub fn macro_f1(pairs: &[(usize, usize)]) -> f64 {
    let mut labels: Vec<usize> = pairs.iter().flat_map(|&(gold, pred)| [gold, pred]).collect();
    labels.sort_unstable();
    labels.dedup();
    let count = |is: &dyn Fn(usize, usize) -> bool| pairs.iter().filter(|&&(g, p)| is(g, p)).count() as f64;
    let f1 = |&l: &usize| {
        let (hit, wrong) = (count(&|g, p| g == l && p == l), count(&|g, p| (g == l) != (p == l)));
        2.0 * hit / (2.0 * hit + wrong) // a label that occurs makes this positive
    };
    mean(&labels.iter().map(f1).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected: scikit-learn.
    #[test]
    fn f1_is_that_of_scikit_learn() {
        let zip = |g: &[usize], p: &[usize]| g.iter().copied().zip(p.iter().copied()).collect::<Vec<_>>();
        assert!((macro_f1(&zip(&[0, 1, 1, 0, 1], &[0, 1, 0, 0, 1])) - 0.8).abs() < 1e-15);
        assert!((macro_f1(&zip(&[0, 1, 1], &[0, 0, 0])) - 0.25).abs() < 1e-15); // a label that is never chosen counts 0
        assert!((macro_f1(&zip(&[0, 2, 3], &[0, 2, 1])) - 0.5).abs() < 1e-15); // 1 is only chosen, 3 only right
    }

    #[test]
    fn standard_error_of_a_share() {
        let x = [1.0, 0.0, 1.0, 1.0];
        assert!((stderr(&x).unwrap() - 0.25).abs() < 1e-15);
        assert_eq!(stderr(&x[..1]), None);
    }
}
