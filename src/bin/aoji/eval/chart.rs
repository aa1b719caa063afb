//! Accuracies as bars, with their standard errors.

use super::{Beside, Report};
use crate::svg::{Anchor, FAINT, INK, PALETTE, Svg};

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 360.0;
/// The plot, inside the picture.
const LEFT: f64 = 48.0;
const TOP: f64 = 56.0;
const BOTTOM: f64 = HEIGHT - 40.0;

fn y(acc: f64) -> f64 {
    BOTTOM - acc * (BOTTOM - TOP)
}

/// The picture.
pub fn draw(report: &Report, beside: Option<&Beside>) -> String {
    let mut svg = Svg::new(WIDTH, HEIGHT);
    for tenth in (0..=10).step_by(2) {
        let at = f64::from(tenth) / 10.0;
        svg.line(&[(LEFT, y(at)), (WIDTH - 16.0, y(at))], FAINT, 1.0);
        svg.text(LEFT - 6.0, y(at) + 4.0, Anchor::End, 11.0, &format!("{at:.1}"));
    }
    let title = format!("KoBEST, {} shots: accuracy, and its standard error", report.header.shots);
    svg.text(LEFT, 20.0, Anchor::Start, 14.0, &title);
    let names = [Some(report.header.model.as_str()), beside.map(Beside::name)];
    let mut legend = LEFT;
    for (name, fill) in names.into_iter().flatten().zip(PALETTE) {
        svg.rect(legend, 30.0, 10.0, 10.0, fill, "");
        svg.text(legend + 14.0, 39.0, Anchor::Start, 11.0, name);
        legend += 30.0 + 7.0 * name.chars().count() as f64;
    }
    let group = (WIDTH - 16.0 - LEFT) / report.tasks.len().max(1) as f64;
    for (i, t) in report.tasks.iter().enumerate() {
        let middle = LEFT + group * (i as f64 + 0.5);
        svg.text(middle, BOTTOM + 18.0, Anchor::Middle, 12.0, &t.task);
        let other = beside.and_then(|b| b.figure(&t.task)).map(|f| (f.acc, f.acc_stderr));
        let bars = [Some((t.acc, t.acc_stderr)), other];
        let width = (group * 0.7 / if beside.is_some() { 2.0 } else { 1.0 }).min(72.0);
        let first = middle - if beside.is_some() { width } else { width / 2.0 };
        for (k, (bar, fill)) in bars.into_iter().zip(PALETTE).enumerate() {
            let Some((acc, error)) = bar else { continue };
            let x = first + k as f64 * width;
            let label = format!("{acc:.4}");
            svg.rect(x + 2.0, y(acc), width - 4.0, BOTTOM - y(acc), fill, &format!("{}: {label}", t.task));
            let (centre, e) = (x + width / 2.0, error.unwrap_or(0.0));
            svg.line(&[(centre, y(acc - e)), (centre, y(acc + e))], INK, 1.5);
            svg.text(centre, y(acc + e) - 4.0, Anchor::Middle, 10.0, &label);
        }
    }
    svg.line(&[(LEFT, BOTTOM), (WIDTH - 16.0, BOTTOM)], INK, 1.0);
    svg.finish()
}
