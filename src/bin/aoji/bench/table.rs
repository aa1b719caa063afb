//! Tables of text: columns as wide as their widest cell.

/// Columns as wide as their widest cell; the first is left-aligned, numbers to the right of it are right-aligned.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let width = |c: usize| rows.iter().map(|r| r[c].chars().count()).chain([header[c].len()]).max().unwrap_or(0);
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let cell = |(i, text): (usize, &str)| match i {
            0 => format!("{text:<width$}", width = widths[0]),
            _ => format!("  {text:>width$}", width = widths[i]),
        };
        let line: String = cells.into_iter().enumerate().map(cell).collect();
        format!("{}\n", line.trim_end())
    };
    let body = rows.iter().map(|r| line(r.iter().map(String::as_str).collect()));
    std::iter::once(line(header.to_vec())).chain(body).collect()
}

/// A number with `digits` decimals, or `-`.
pub fn number(x: Option<f64>, digits: usize) -> String {
    x.map_or("-".into(), |x| format!("{x:.digits$}"))
}

/// `93.1%`, or `-`.
pub fn percent(x: Option<f64>) -> String {
    x.map_or("-".into(), |x| format!("{:.1}%", 100.0 * x))
}
