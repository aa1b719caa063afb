//! The roofline plot (Williams, Waterman and Patterson 2009): rate against arithmetic per byte, under the best rates of memory
//! and matrix units.

use crate::svg::{Anchor, FAINT, INK, PALETTE, Svg};
use aoji::bench::Peak;

/// One case.
pub struct Point<'a> {
    pub label: String,
    /// Points of one group have one colour.
    pub group: &'a str,
    /// Drawn as a square.
    pub variant: bool,
    /// Flops a byte.
    pub intensity: f64,
    pub tflops: f64,
}

/// Position of the plot in the picture; the legend is to the right of it.
const LEFT: f64 = 70.0;
const TOP: f64 = 70.0;
const WIDTH: f64 = 700.0;
const LEGEND: f64 = LEFT + WIDTH + 40.0;
const LINE: f64 = 14.0;

/// A logarithmic axis of whole decades: from 10^`low` to 10^`high`.
#[derive(Clone, Copy)]
struct Axis {
    low: i32,
    high: i32,
}

impl Axis {
    /// An axis that holds all values; one decade if there are none.
    fn over(values: impl Iterator<Item = f64> + Clone) -> Axis {
        let logs = values.map(f64::log10).filter(|l| l.is_finite());
        let low = logs.clone().fold(f64::INFINITY, f64::min);
        let high = logs.fold(f64::NEG_INFINITY, f64::max);
        if low > high {
            return Axis { low: 0, high: 1 };
        }
        let low = low.floor() as i32;
        Axis { low, high: (high.ceil() as i32).max(low + 1) }
    }

    /// 0 at its low end, 1 at its high end.
    fn share(self, value: f64) -> f64 {
        (value.log10() - f64::from(self.low)) / f64::from(self.high - self.low)
    }

    fn decades(self) -> impl Iterator<Item = f64> {
        (self.low..=self.high).map(|e| 10f64.powi(e))
    }
}

/// Height of the plot, so that many points have room and the legend is not taller.
fn height(points: usize) -> f64 {
    (LINE * points as f64).max(480.0)
}

/// The picture. Cases without arithmetic cannot be shown on logarithmic axes and are only listed.
pub fn svg(header: &str, peak: Option<&Peak>, points: &[Point]) -> String {
    let shown = || points.iter().filter(|p| p.intensity > 0.0 && p.tflops > 0.0);
    let compute = peak.and_then(|p| p.matmul_tflops);
    let memory = peak.map(|p| p.read_gb_per_s / 1e3); // TFLOP/s at one flop a byte
    let ridge = compute.zip(memory).map(|(c, m)| c / m);
    let x_axis = Axis::over(shown().map(|p| p.intensity).chain(ridge));
    let (least, most) = (10f64.powi(x_axis.low), 10f64.powi(x_axis.high));
    let y_axis = Axis::over(shown().map(|p| p.tflops).chain(compute).chain(memory.map(|m| m * least)));
    let height = height(points.len());
    let x = |v: f64| LEFT + WIDTH * x_axis.share(v);
    let y = |v: f64| TOP + height * (1.0 - y_axis.share(v));

    let longest = points.iter().map(|p| p.label.chars().count()).max().unwrap_or(0);
    let mut svg = Svg::new(LEGEND + 40.0 + 6.5 * longest as f64, TOP + height + 60.0);
    for (i, line) in header.lines().filter(|l| !l.is_empty()).enumerate() {
        svg.text(LEFT, 22.0 + 18.0 * i as f64, Anchor::Start, 13.0, line);
    }
    for v in x_axis.decades() {
        svg.line(&[(x(v), TOP), (x(v), TOP + height)], FAINT, 1.0);
        svg.text(x(v), TOP + height + 18.0, Anchor::Middle, 12.0, &v.to_string());
    }
    for v in y_axis.decades() {
        svg.line(&[(LEFT, y(v)), (LEFT + WIDTH, y(v))], FAINT, 1.0);
        svg.text(LEFT - 8.0, y(v) + 4.0, Anchor::End, 12.0, &v.to_string());
    }
    svg.text(LEFT + WIDTH / 2.0, TOP + height + 40.0, Anchor::Middle, 13.0, "flop per byte");
    svg.text(LEFT - 60.0, TOP - 10.0, Anchor::Start, 13.0, "TFLOP/s");
    if let Some(m) = memory {
        // to the ridge, the right edge or the top edge, whichever comes first
        let end = ridge.unwrap_or(most).min(10f64.powi(y_axis.high) / m).min(most);
        svg.line(&[(x(least), y(m * least)), (x(end), y(m * end))], INK, 2.0);
        svg.text(x(least) + 12.0, y(m * least) + 4.0, Anchor::Start, 12.0, &format!("read {:.0} GB/s", m * 1e3));
    }
    if let Some((c, r)) = compute.zip(ridge) {
        svg.line(&[(x(r), y(c)), (x(most), y(c))], INK, 2.0);
        svg.text(x(r) + 6.0, y(c) - 8.0, Anchor::Start, 12.0, &format!("matrix product {c:.0} TFLOP/s"));
    }

    let mut groups: Vec<&str> = points.iter().map(|p| p.group).collect();
    groups.dedup();
    let color = |p: &Point| PALETTE[groups.iter().position(|g| *g == p.group).unwrap_or(0) % PALETTE.len()];
    let places: Vec<_> = shown().map(|p| (x(p.intensity), y(p.tflops))).collect();
    let mut labels = labels(&places, height).into_iter().zip(&places);
    for (i, p) in points.iter().enumerate() {
        let at = TOP + LINE * (i as f64 + 0.5);
        let on_plot = p.intensity > 0.0 && p.tflops > 0.0;
        let number = if on_plot { (i + 1).to_string() } else { "-".into() };
        mark(&mut svg, LEGEND, at, color(p), p);
        svg.text(LEGEND + 30.0, at + 4.0, Anchor::End, 11.0, &number);
        svg.text(LEGEND + 36.0, at + 4.0, Anchor::Start, 11.0, &p.label);
        if on_plot && let Some(((lx, ly), (px, py))) = labels.next() {
            svg.line(&[(*px, *py), (lx, ly - 3.0)], FAINT, 1.0);
            mark(&mut svg, *px, *py, color(p), p);
            svg.text(lx, ly, Anchor::Middle, 10.0, &number);
        }
    }
    if points.iter().any(|p| p.intensity == 0.0) {
        let at = TOP + LINE * (points.len() as f64 + 1.0);
        svg.text(LEGEND, at, Anchor::Start, 11.0, "-: no arithmetic, so no place on the plot");
    }
    svg.finish()
}

fn mark(svg: &mut Svg, x: f64, y: f64, color: &str, p: &Point) {
    match p.variant {
        true => svg.rect(x - 4.0, y - 4.0, 8.0, 8.0, color, &p.label),
        false => svg.circle(x, y, 4.0, color, &p.label),
    }
}

/// Where the number of each point is written (the middle of its baseline): the nearest position that no other number
/// and no point takes.
fn labels(points: &[(f64, f64)], height: f64) -> Vec<(f64, f64)> {
    let mut placed: Vec<(f64, f64)> = Vec::new();
    for &(px, py) in points {
        let free = |&(x, y): &(f64, f64)| {
            let apart = |(ox, oy): &(f64, f64), w: f64, h: f64| (x - ox).abs() >= w || (y - oy).abs() >= h;
            placed.iter().all(|o| apart(o, 16.0, 11.0))
                && points.iter().all(|(ox, oy)| apart(&(*ox, oy + 3.0), 12.0, 10.0))
        };
        let around = (1..20).flat_map(|ring| {
            (0..12).map(move |step| {
                let (sin, cos) = (std::f64::consts::TAU * f64::from(step) / 12.0).sin_cos();
                (px + 13.0 * f64::from(ring) * cos, py + 3.0 + 13.0 * f64::from(ring) * sin)
            })
        });
        let inside = |(x, y): &(f64, f64)| (LEFT..LEFT + WIDTH).contains(x) && (TOP..TOP + height).contains(y);
        placed.push(around.filter(inside).find(free).unwrap_or((px + 13.0, py + 3.0)));
    }
    placed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(intensity: f64, tflops: f64, variant: bool) -> Point<'static> {
        Point { label: format!("case <{intensity}>"), group: "gemv", variant, intensity, tflops }
    }

    /// The coordinates of the first element that begins so.
    fn numbers(text: &str, begin: &str) -> Vec<f64> {
        let line = text.lines().find(|l| l.starts_with(begin)).unwrap_or_else(|| panic!("no {begin} in {text}"));
        let quoted = line.split('"').filter(|s| s.starts_with(|c: char| c.is_ascii_digit()));
        quoted.flat_map(|s| s.split([' ', ',']).filter_map(|n| n.parse().ok())).collect()
    }

    #[test]
    fn a_point_at_a_peak_is_on_its_roof() {
        let peak = Peak { read_gb_per_s: 4000.0, copy_gb_per_s: 3800.0, matmul_tflops: Some(800.0), running: None };
        // the ridge is at 200 flop a byte; the first point is on the slope, the second on the ceiling
        let text =
            svg("aoji", Some(&peak), &[point(1.0, 4.0, false), point(1000.0, 800.0, false), point(0.0, 0.0, true)]);
        let slope = text.lines().find(|l| l.starts_with("<polyline") && l.contains("stroke-width=\"2\"")).unwrap();
        let ends = numbers(slope, "<polyline");
        // axes: 1 to 1000 flop a byte, 1 to 1000 TFLOP/s
        let at = |v: f64, low: f64, decades: f64| (v / low).log10() / decades;
        let height = height(3);
        let (ridge_x, ridge_y) = (LEFT + WIDTH * at(200.0, 1.0, 3.0), TOP + height * (1.0 - at(800.0, 1.0, 3.0)));
        let start_y = TOP + height * (1.0 - at(4.0, 1.0, 3.0));
        for (got, expected) in ends.iter().zip([LEFT, start_y, ridge_x, ridge_y]) {
            assert!((got - expected).abs() < 0.01, "{ends:?}");
        }
        assert!(text.contains(&format!("cx=\"{LEFT:.2}\" cy=\"{start_y:.2}\"")), "{text}");
        assert!(text.contains(&format!("cx=\"{:.2}\" cy=\"{ridge_y:.2}\"", LEFT + WIDTH)), "{text}");
        assert!(text.contains("no arithmetic") && text.contains("case &lt;1&gt;"), "{text}");
        assert!(text.contains("read 4000 GB/s") && text.contains("matrix product 800 TFLOP/s"));
    }

    #[test]
    fn numbers_keep_apart() {
        let points: Vec<_> = (0..30).map(|i| (400.0, 300.0 + f64::from(i))).collect();
        let placed = labels(&points, 480.0);
        for (i, (x, y)) in placed.iter().enumerate() {
            for (ox, oy) in &placed[..i] {
                assert!((x - ox).abs() >= 16.0 || (y - oy).abs() >= 11.0, "{placed:?}");
            }
        }
    }

    #[test]
    fn nothing_to_show_is_no_failure() {
        assert!(svg("aoji", None, &[]).contains("flop per byte"));
        assert!(svg("aoji", None, &[point(2.0, 1e-6, false)]).contains("0.000001"));
    }
}
