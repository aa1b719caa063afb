//! Pictures for people: a small writer of SVG. Coordinates are pixels from the top left.

use std::fmt::Write as _;

/// Colours for things of different kinds that most eyes can tell apart (Okabe and Ito 2008).
pub const PALETTE: [&str; 7] = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442"];
/// Colour of text and axes.
pub const INK: &str = "#222";
/// Colour of grid lines.
pub const FAINT: &str = "#ddd";

/// Where a text is relative to its point.
#[derive(Clone, Copy)]
pub enum Anchor {
    /// It begins there.
    Start,
    /// It is centred there.
    Middle,
    /// It ends there.
    End,
}

/// A picture, on white.
pub struct Svg {
    width: f64,
    height: f64,
    body: String,
}

impl Svg {
    /// An empty one.
    pub fn new(width: f64, height: f64) -> Svg {
        Svg { width, height, body: String::new() }
    }

    /// A filled rectangle; `title` shows when pointed at.
    pub fn rect(&mut self, x: f64, y: f64, width: f64, height: f64, fill: &str, title: &str) {
        let _ = write!(
            self.body,
            r#"<rect x="{x:.2}" y="{y:.2}" width="{width:.2}" height="{height:.2}" fill="{}""#,
            escape(fill)
        );
        self.end("rect", title);
    }

    /// A filled circle; `title` shows when pointed at.
    pub fn circle(&mut self, x: f64, y: f64, radius: f64, fill: &str, title: &str) {
        let _ = write!(self.body, r#"<circle cx="{x:.2}" cy="{y:.2}" r="{radius:.2}" fill="{}""#, escape(fill));
        self.end("circle", title);
    }

    fn end(&mut self, tag: &str, title: &str) {
        let _ = match title {
            "" => writeln!(self.body, "/>"),
            title => writeln!(self.body, "><title>{}</title></{tag}>", escape(title)),
        };
    }

    /// A line through the points.
    pub fn line(&mut self, points: &[(f64, f64)], stroke: &str, width: f64) {
        let points: Vec<String> = points.iter().map(|(x, y)| format!("{x:.2},{y:.2}")).collect();
        let _ = writeln!(
            self.body,
            r#"<polyline points="{}" fill="none" stroke="{}" stroke-width="{width}"/>"#,
            points.join(" "),
            escape(stroke)
        );
    }

    /// Text with its baseline at `y`.
    pub fn text(&mut self, x: f64, y: f64, anchor: Anchor, size: f64, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let _ = writeln!(
            self.body,
            r#"<text x="{x:.2}" y="{y:.2}" text-anchor="{anchor}" font-size="{size}" fill="{INK}">{}</text>"#,
            escape(text)
        );
    }

    /// The file.
    pub fn finish(self) -> String {
        let Svg { width, height, body } = self;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\">\n\
             <rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n{body}</svg>\n"
        )
    }
}

/// Escapes a text for use in text and attributes; characters that XML does not allow are left out.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            c if c.is_control() => {}
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes() {
        let mut svg = Svg::new(10.0, 20.0);
        svg.rect(0.0, 1.0, 2.0, 3.0, "\"#123\"", "a < b & c\u{1}");
        svg.text(1.0, 2.0, Anchor::End, 9.0, "아오지 > \"x\"");
        let text = svg.finish();
        assert!(text.contains("<title>a &lt; b &amp; c</title></rect>"), "{text}");
        assert!(
            text.contains("fill=\"&quot;#123&quot;\"") && text.contains(">아오지 &gt; &quot;x&quot;</text>"),
            "{text}"
        );
    }
}
