//! Translates Python's `'%s' % x` in chat templates to `'%s' | format(x)`, which minijinja understands.

/// How deep formats may be inside of each other. Templates of published models have one, seldom two.
const MAX_DEPTH: usize = 64;

/// The template with every `%` after a string replaced by the filter `format`. Between numbers it stays.
///
/// # Errors
/// Formats that are too deep inside of each other: each takes a part of the stack.
pub fn with_format_filter(source: &str) -> Result<String, String> {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = ["{{", "{%"].iter().filter_map(|open| rest.find(open)).min() {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        let end = end_of(tag, |rest| rest.starts_with("}}") || rest.starts_with("%}"));
        let Some(code) = expression(&tag[..end], MAX_DEPTH) else {
            return Err(format!("a `'%s' % x` is inside of {MAX_DEPTH} others, expected fewer"));
        };
        out.push_str(&code);
        rest = &tag[end..];
    }
    Ok(out + rest)
}

/// How many bytes come before the first position outside of strings at which `ends` is true; all if there is none.
fn end_of(code: &str, ends: impl Fn(&str) -> bool) -> usize {
    let mut at = 0;
    while at < code.len() && !ends(&code[at..]) {
        at += piece(&code[at..]);
    }
    at
}

/// Length of the string or character that `code` begins with, in bytes.
fn piece(code: &str) -> usize {
    let mut chars = code.char_indices();
    let Some((_, quote)) = chars.next() else { return 0 };
    if quote != '\'' && quote != '"' {
        return quote.len_utf8();
    }
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => drop(chars.next()),
            _ if c == quote => return at + c.len_utf8(),
            _ => {}
        }
    }
    code.len()
}

/// The code with the filter; `None` where formats are more than `depth` deep.
fn expression(code: &str, depth: usize) -> Option<String> {
    let mut out = String::with_capacity(code.len());
    let mut rest = code;
    while !rest.is_empty() {
        let (token, after) = rest.split_at(piece(rest));
        out.push_str(token);
        rest = after;
        let operand = after.trim_start().strip_prefix('%').map(str::trim_start);
        if let Some(operand) = operand.filter(|_| token.starts_with(['\'', '"'])) {
            let (operand, after) = operand.split_at(operand_len(operand));
            let several = operand.strip_prefix('(').and_then(|o| o.strip_suffix(')'));
            let several = several.filter(|inner| end_of(inner, |rest| rest.starts_with(')')) == inner.len());
            let operands = several.unwrap_or(operand).trim_end().trim_end_matches(',');
            out += &format!(" | format({})", expression(operands, depth.checked_sub(1)?)?);
            rest = after;
        }
    }
    Some(out)
}

/// Length of the expression that `%` takes on its right, in bytes: a value with its calls, lookups and filters.
fn operand_len(code: &str) -> usize {
    let mut at = usize::from(code.starts_with('-'));
    at += match code[at..].chars().next() {
        Some('(' | '[' | '{') => brackets(&code[at..]),
        Some('\'' | '"') => piece(&code[at..]),
        _ => word(&code[at..]),
    };
    loop {
        let rest = &code[at..];
        let next = rest.trim_start();
        let space = rest.len() - next.len();
        at += match next.chars().next() {
            Some('(' | '[') if space == 0 => brackets(rest),
            Some('.') if space == 0 => 1 + word(&rest[1..]),
            Some('|') => {
                let name = next[1..].trim_start();
                rest.len() - name.len() + word(name)
            }
            _ => return at,
        };
    }
}

fn word(code: &str) -> usize {
    code.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(code.len())
}

/// Length of what `code` begins with, from a bracket to the matching one, in bytes.
fn brackets(code: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < code.len() {
        let token = &code[at..at + piece(&code[at..])];
        at += token.len();
        match token {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Jinja 3.1 renders with x = 7 and y = {'k': ['한']}.
    #[test]
    fn percent_is_pythons() {
        let cases = [
            ("{{ '%s' % x }}", "7"),
            ("{{ '%02d|%s' % (x, y.k[0]) }}", "07|한"),
            ("{{ 'a' ~ '%s' % x ~ 'b' }}", "a7b"),
            ("{{ \"%s%%\" % x | string }}", "7%"),
            ("{% set z = '%s' % y['k'][0] %}{{ z + '!' }}", "한!"),
            ("{{ '%s' % ('%d' % x) }}", "7"),
            ("{{ '%s' % (x,) }}", "7"),
            ("{{ '%s' % 'a)b' | upper }}", "A)B"),
            ("{{ 10 % x }}{% if x % 2 == 1 %}odd{% endif %}", "3odd"),
            ("{{ ['%s' % x, 'it\\'s %'][1] }} '%s' % x", "it's % '%s' % x"),
            ("{%- set a = 'b' %}{{ a }}{{ '}}' }}", "b}}"),
        ];
        let y = minijinja::Value::from(minijinja::value::Serde(serde_json::json!({"k": ["한"]})));
        for (source, expected) in cases {
            let environment = minijinja::Environment::new();
            let source = with_format_filter(source).unwrap();
            let rendered = environment.render_str(&source, minijinja::context! { x => 7, y => y.clone() });
            assert_eq!(rendered.unwrap_or_else(|e| format!("{e:#}")), expected, "{source}");
        }
        for plain in ["a % b", "{# '%s' % x #}", "{{ '%s'", "{% raw"] {
            assert_eq!(with_format_filter(plain).unwrap(), plain);
        }
    }

    #[test]
    fn formats_inside_of_formats() {
        let nested = |n: usize| format!("{{{{ {}x{} }}}}", "'%s' % (".repeat(n), ")".repeat(n));
        let source = with_format_filter(&nested(20)).unwrap();
        let rendered = minijinja::Environment::new().render_str(&source, minijinja::context! { x => 7 });
        assert_eq!(rendered.unwrap_or_else(|e| format!("{e:#}")), "7");
        assert!(with_format_filter(&nested(64)).is_ok(), "minijinja has a limit of its own");
        for n in [65, 100_000] {
            assert!(with_format_filter(&nested(n)).unwrap_err().contains("inside of 64 others"), "{n}");
        }
        assert!(with_format_filter(&format!("{{{{ {}", "'%s' % (".repeat(100_000))).is_err(), "never closed");
    }
}
