//! Accuracies as bars, with their standard errors.

use super::{Beside, Report};
use crate::svg::{Anchor, FAINT, INK, PALETTE, Svg};

/// Height of the plot.
const HEIGHT: f64 = 264.0;
const LEFT: f64 = 48.0;
const RIGHT: f64 = 16.0;
const BOTTOM: f64 = 40.0;
/// The least width of a bar that has room for its label.
const BAR: f64 = 36.0;

/// The picture: a group of bars for each task, first this run's, then those of each of `beside`.
pub fn draw(report: &Report, beside: &[Beside]) -> String {
    let names: Vec<&str> = [report.header.model.as_str()].into_iter().chain(beside.iter().map(|b| &*b.name)).collect();
    let (tasks, bars) = (report.tasks.len().max(1) as f64, names.len() as f64);
    let group = (656.0 / tasks).max(BAR * bars / 0.85);
    let width = (group * 0.85 / bars).min(72.0);
    let right = LEFT + group * tasks;
    let top = 48.0 + 16.0 * bars;
    let y = |acc: f64| top + HEIGHT * (1.0 - acc);

    let mut svg = Svg::new(right + RIGHT, y(0.0) + BOTTOM);
    for tenth in (0..=10).step_by(2) {
        let at = f64::from(tenth) / 10.0;
        svg.line(&[(LEFT, y(at)), (right, y(at))], FAINT, 1.0);
        svg.text(LEFT - 6.0, y(at) + 4.0, Anchor::End, 11.0, &format!("{at:.1}"));
    }
    let title = format!("KoBEST, {} shots: accuracy, and its standard error", report.header.shots);
    svg.text(LEFT, 20.0, Anchor::Start, 14.0, &title);
    for (i, (name, fill)) in names.iter().zip(PALETTE.iter().cycle()).enumerate() {
        let line = 30.0 + 16.0 * i as f64;
        svg.rect(LEFT, line, 10.0, 10.0, fill, "");
        svg.text(LEFT + 14.0, line + 9.0, Anchor::Start, 11.0, name);
    }
    for (i, t) in report.tasks.iter().enumerate() {
        let middle = LEFT + group * (i as f64 + 0.5);
        svg.text(middle, y(0.0) + 18.0, Anchor::Middle, 12.0, &t.task);
        let others = beside.iter().map(|b| b.figure(&t.task).map(|f| (f.acc, f.acc_stderr)));
        let all = [Some((t.acc, t.acc_stderr))].into_iter().chain(others);
        for (k, (bar, fill)) in all.zip(PALETTE.iter().cycle()).enumerate() {
            let Some((acc, error)) = bar else { continue };
            let x = middle + (k as f64 - bars / 2.0) * width;
            let label = format!("{acc:.4}");
            svg.rect(x + 2.0, y(acc), width - 4.0, y(0.0) - y(acc), fill, &format!("{}: {label}", t.task));
            let (centre, e) = (x + width / 2.0, error.unwrap_or(0.0));
            svg.line(&[(centre, y(acc - e)), (centre, y(acc + e))], INK, 1.5);
            svg.text(centre, y(acc + e) - 4.0, Anchor::Middle, 10.0, &label);
        }
    }
    svg.line(&[(LEFT, y(0.0)), (right, y(0.0))], INK, 1.0);
    svg.finish()
}
