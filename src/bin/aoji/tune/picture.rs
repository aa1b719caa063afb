//! Draws the loss of a run.

use crate::svg::{Anchor, FAINT, INK, PALETTE, Svg};
use aoji::{Result, output::Output, train::Line};
use std::path::Path;

/// The edges of the plot.
const LEFT: f64 = 56.0;
const RIGHT: f64 = 700.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 320.0;

/// Writes `loss.svg` beside the log from which it is drawn.
pub fn write(dir: &Path) -> Result<()> {
    let mut out = Output::beside(dir);
    out.write("loss.svg", draw(&super::log(dir)?).as_bytes())?;
    out.finish()
}

fn draw(lines: &[Line]) -> String {
    let of = |f: fn(&Line) -> Option<f64>| -> Vec<(f64, f64)> {
        lines.iter().filter_map(|l| Some((l.step as f64, f(l)?))).collect()
    };
    let (train, eval) = (of(|l| l.loss), of(|l| l.eval_loss));
    let all = || train.iter().chain(&eval);
    let highest = all().map(|p| p.1).fold(1e-9, f64::max);
    let steps = all().map(|p| p.0).fold(1.0, f64::max);
    let place =
        |&(step, loss): &(f64, f64)| (LEFT + (RIGHT - LEFT) * step / steps, BOTTOM - (BOTTOM - TOP) * loss / highest);
    let mut svg = Svg::new(RIGHT + 20.0, BOTTOM + 40.0);
    svg.text(LEFT, 20.0, Anchor::Start, 14.0, "Loss by step, in nats a label");
    for i in 0..=4 {
        let part = f64::from(i) / 4.0;
        let (x, y) = place(&(steps * part, highest * part));
        svg.line(&[(LEFT, y), (RIGHT, y)], FAINT, 1.0);
        svg.text(LEFT - 6.0, y + 4.0, Anchor::End, 11.0, &format!("{:.3}", highest * part));
        svg.text(x, BOTTOM + 18.0, Anchor::Middle, 11.0, &format!("{:.0}", steps * part));
    }
    svg.line(&[(LEFT, BOTTOM), (RIGHT, BOTTOM)], INK, 1.0);
    svg.line(&train.iter().map(place).collect::<Vec<_>>(), PALETTE[0], 1.5);
    for point in &eval {
        let (x, y) = place(point);
        svg.circle(x, y, 4.0, PALETTE[1], &format!("step {}: rows kept apart {:.4}", point.0, point.1));
    }
    for (i, name) in ["learned rows", "rows kept apart"].iter().enumerate().take(1 + usize::from(!eval.is_empty())) {
        let x = RIGHT - 260.0 + 130.0 * i as f64;
        svg.rect(x, 11.0, 10.0, 10.0, PALETTE[i], "");
        svg.text(x + 14.0, 20.0, Anchor::Start, 11.0, name);
    }
    svg.finish()
}
