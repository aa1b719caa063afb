//! The picture of a step: kernels over time, about one layer in detail down to the multiprocessors, and how busy each
//! multiprocessor was.

use super::{Report, groups, label, summary};
use crate::svg::{Anchor, FAINT, INK, PALETTE, Svg};
use aoji::bench::Timed;

/// Width of the part in which time runs.
const WIDTH: f64 = 1150.0;
/// Width of the part to the right of it, for rates.
const RIGHT: f64 = 190.0;
/// Height of a row of kernels.
const ROW: f64 = 18.0;
const IDLE: &str = "#f4cccc";

/// Time from left to right.
struct Axis {
    left: f64,
    from: f64,
    to: f64,
}

impl Axis {
    fn x(&self, us: f64) -> f64 {
        let share = (us - self.from) / (self.to - self.from).max(1e-9);
        self.left + share.clamp(0.0, 1.0) * WIDTH
    }

    /// Grid lines at round times, labelled above.
    fn draw(&self, svg: &mut Svg, top: f64, bottom: f64) {
        let step = round_step((self.to - self.from) / 10.0);
        let mut us = (self.from / step).ceil() * step;
        while us <= self.to {
            svg.line(&[(self.x(us), top), (self.x(us), bottom)], FAINT, 1.0);
            svg.text(self.x(us), top - 3.0, Anchor::Middle, 10.0, &format!("{} us", (us * 1e3).round() / 1e3));
            us += step;
        }
    }
}

/// 1, 2 or 5 times a power of ten, at least `least`.
fn round_step(least: f64) -> f64 {
    let power = 10f64.powf(least.max(1e-3).log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= least).unwrap_or(10.0 * power)
}

/// The file.
pub fn draw(r: &Report) -> String {
    let t = &r.timeline;
    let groups = groups(t);
    let row_of = |l: &Timed| {
        let same = groups.iter().position(|g| (&g.first.kernel, &g.first.case) == (&l.kernel, &l.case));
        same.unwrap_or_default()
    };
    let rows = groups.len() as f64 * ROW;
    let left = 30.0 + 6.0 * groups.iter().map(|g| label(g.first).len()).max().unwrap_or(0) as f64;
    let right = left + WIDTH;
    let sm_height = (400.0 / t.sms.len().max(1) as f64).clamp(2.0, 12.0);
    let lines = summary(r);
    let top = 40.0 + 16.0 * lines.len() as f64;
    let (whole, part) = (top + 40.0, top + rows + 100.0);
    let sms = part + rows + 10.0;
    let bars = sms + sm_height * t.sms.len() as f64 + 50.0;
    let mut svg = Svg::new(right + RIGHT, bars + 100.0);

    let mut y = 22.0;
    let title = format!("One decode step at depth {}, {} on {}, {}", t.depth, r.model, r.header.device, r.header.date);
    svg.text(12.0, y, Anchor::Start, 15.0, &title);
    if r.header.emulated {
        svg.text(right + RIGHT - 12.0, y, Anchor::End, 15.0, "THE EMULATED DEVICE: these times mean nothing");
    }
    for line in &lines {
        y += 16.0;
        svg.text(12.0, y, Anchor::Start, 12.0, line);
    }

    let band = |svg: &mut Svg, heading: &str, top: f64, axis: &Axis, launches: &[Timed]| {
        svg.text(12.0, top - 18.0, Anchor::Start, 13.0, heading);
        for l in launches.iter().filter(|l| l.gap_us > 0.0) {
            let (from, to) = (axis.x(l.ready_us - l.gap_us), axis.x(l.ready_us));
            svg.rect(from, top, to - from, rows, IDLE, &format!("idle for {:.2} us before {}", l.gap_us, l.kernel));
            if to - from > 30.0 {
                let gap = format!("{:.2}", l.gap_us);
                svg.text((from + to) / 2.0, top + rows - 3.0, Anchor::Middle, 9.0, &gap);
            }
        }
        axis.draw(svg, top, top + rows);
        for (row, g) in groups.iter().enumerate() {
            let y = top + row as f64 * ROW + 13.0;
            svg.text(left - 8.0, y, Anchor::End, 10.0, &label(g.first));
            let rate = format!("{} x {:.3} MB, {:.1} GB/s", g.n, g.first.bytes as f64 / 1e6, g.gb_per_s());
            svg.text(right + 8.0, y, Anchor::Start, 10.0, &rate);
        }
        for l in launches {
            let (row, y) = (row_of(l), top + row_of(l) as f64 * ROW + 3.0);
            let (begin, ready, end) = (axis.x(l.begin_us), axis.x(l.ready_us), axis.x(l.end_us));
            let about = format!(
                "{}: {:.2} to {:.2} us, gap {:.2} us, run {:.2} us, {:.3} MB, {:.1} GB/s, {} blocks",
                l.case,
                l.begin_us,
                l.end_us,
                l.gap_us,
                l.run_us,
                l.bytes as f64 / 1e6,
                l.gb_per_s,
                l.blocks
            );
            if ready > begin {
                svg.rect(begin, y + 4.0, ready - begin, ROW - 14.0, color(row), &about); // started early, waiting
            }
            svg.rect(ready, y, (end - ready).max(0.5), ROW - 6.0, color(row), &about);
        }
    };
    let axis = Axis { left, from: 0.0, to: t.step_us };
    band(
        &mut svg,
        "The step: kernels (thin: started, but waiting for the one before), and in red where none was past its wait",
        whole,
        &axis,
        &t.launches,
    );

    // about a layer from the middle, with the launch before it for the first gap
    let per_layer = (t.launches.len() / t.n_layers.max(1)).clamp(1, t.launches.len());
    let first = (t.launches.len() - per_layer) / 2;
    let shown = &t.launches[first..first + per_layer];
    let to = shown.iter().map(|l| l.end_us).fold(0.0, f64::max);
    let axis = Axis { left, from: shown[0].ready_us - shown[0].gap_us, to };
    let heading =
        format!("Launches {first} to {}, about one layer; below, on which multiprocessors", first + per_layer - 1);
    band(&mut svg, &heading, part, &axis, shown);
    for sm in (0..t.sms.len()).step_by(t.sms.len().div_ceil(16)) {
        let y = sms + sm as f64 * sm_height + sm_height.max(9.0);
        svg.text(left - 8.0, y, Anchor::End, 9.0, &format!("SM {sm}"));
    }
    let start = t.launches.iter().flat_map(|l| &l.spans).map(|s| s.begin).min().unwrap_or_default();
    for l in shown {
        for (sm, (ready, end)) in by_sm(l, t.sms.len()) {
            let (from, to) = (axis.x((ready - start) as f64 / 1e3), axis.x((end - start) as f64 / 1e3));
            let y = sms + sm as f64 * sm_height;
            svg.rect(
                from,
                y,
                (to - from).max(0.5),
                sm_height * 0.8,
                color(row_of(l)),
                &format!("SM {sm}: {}", l.kernel),
            );
        }
    }

    svg.text(12.0, bars - 12.0, Anchor::Start, 13.0, "Busy share of the step, by multiprocessor");
    let width = WIDTH / t.sms.len().max(1) as f64;
    for (i, sm) in t.sms.iter().enumerate() {
        let height = 80.0 * sm.busy.clamp(0.0, 1.0);
        let about = format!("SM {i}: busy {:.1}%", 100.0 * sm.busy);
        svg.rect(left + i as f64 * width, bars + 80.0 - height, width * 0.9, height, PALETTE[4], &about);
    }
    for (share, y) in [("0%", bars + 80.0), ("100%", bars)] {
        svg.text(left - 8.0, y + 4.0, Anchor::End, 10.0, share);
        svg.line(&[(left, y), (right, y)], INK, 0.5);
    }
    svg.finish()
}

fn color(row: usize) -> &'static str {
    PALETTE[row % PALETTE.len()]
}

/// From the first block that is ready to the last that ends, on each multiprocessor with blocks of the launch.
fn by_sm(l: &Timed, n: usize) -> Vec<(usize, (u64, u64))> {
    let mut times = vec![None; n];
    for s in &l.spans {
        let (ready, end) = times[s.sm as usize].get_or_insert((s.ready, s.end));
        (*ready, *end) = (s.ready.min(*ready), s.end.max(*end));
    }
    times.into_iter().enumerate().filter_map(|(sm, t)| Some((sm, t?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_round() {
        assert_eq!([0.9, 1.1, 3.0, 70.0].map(round_step), [1.0, 2.0, 5.0, 100.0]);
    }
}
