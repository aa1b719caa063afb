//! What chat templates use of Python: methods of texts that minijinja does not have, and `tojson` as transformers defines it.

use minijinja::value::{Kwargs, Rest, StringInput, Tuple, ValueOrKwargs, from_args};
use minijinja::{Error, ErrorKind, State, Value, filters};
use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};
use std::io::{self, Write};

fn wrong(what: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what)
}

/// Most characters that a text is filled up to: no prompt needs more, and where memory for more cannot be had, the process ends.
const MAX_WIDTH: usize = 1 << 20;

fn bounded(width: usize) -> Result<usize, Error> {
    match width <= MAX_WIDTH {
        true => Ok(width),
        false => Err(wrong(format!("a text is to be {width} characters wide, expected up to {MAX_WIDTH}"))),
    }
}

/// minijinja's filter, which takes any width.
pub fn indent(
    text: StringInput<'_>,
    width: Option<usize>,
    first: Option<bool>,
    blank: Option<bool>,
    options: Kwargs,
) -> Result<Value, Error> {
    let width = match width {
        None => options.get("width")?,
        width => width,
    };
    bounded(width.unwrap_or(0))?;
    filters::indent(text, width, first, blank, options)
}

/// minijinja's filter, which takes any width.
pub fn format(state: &mut State, text: &Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    bounded(text.as_str().map_or(0, widest_of_percent))?;
    filters::format(state, text, args)
}

/// The largest width or precision in a text for Python's `%`.
fn widest_of_percent(text: &str) -> usize {
    let text = text.replace("%%", "");
    let places = text.split('%').skip(1).map(|place| match place.strip_prefix('(').and_then(|p| p.split_once(')')) {
        Some((_key, place)) => place,
        None => place,
    });
    let flags_and_widths = |c: char| "#0- +.".contains(c) || c.is_ascii_digit();
    places
        .map(|place| largest(&place[..place.find(|c| !flags_and_widths(c)).unwrap_or(place.len())]))
        .max()
        .unwrap_or(0)
}

/// The largest width or precision in a text for Python's `str.format`.
fn widest_of_format(text: &str) -> usize {
    let text = text.replace("{{", "");
    let places = text.split('{').skip(1).filter_map(|place| place.split('}').next()?.split_once(':'));
    places.map(|(_, place)| largest(place)).max().unwrap_or(0)
}

fn largest(text: &str) -> usize {
    let numbers = text.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    numbers.map(|digits| digits.parse().unwrap_or(usize::MAX)).max().unwrap_or(0)
}

/// A method of Python's `str`, `list` or `dict`, for [`minijinja::Environment::set_unknown_method_callback`].
pub fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let own = match value.as_str() {
        Some(text) => text_method(text, name, args)?,
        None if name == "copy" => Some(value.clone()),
        None if name == "index" => Some(index(value, args)?),
        None => None,
    };
    own.map_or_else(|| minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args), Ok)
}

fn index(list: &Value, args: &[Value]) -> Result<Value, Error> {
    let (wanted,): (&Value,) = from_args(args)?;
    let found = list.try_iter()?.position(|item| item == *wanted);
    found.map(Value::from).ok_or_else(|| wrong(format!("{wanted} is not in the list")))
}

fn text_method(text: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let chars = |part: &str| Value::from(part.chars().count());
    let value = match name {
        "split" | "rsplit" => {
            let (rest, options): (&[Value], Kwargs) = from_args(args)?;
            let (separator, most): (Option<Value>, Option<i64>) = from_args(rest)?;
            let separator = separator.or(options.get("sep")?).filter(|s| !s.is_none());
            let most = most.or(options.get("maxsplit")?).and_then(|n| usize::try_from(n).ok());
            options.assert_all_used()?;
            let separator = separator.as_ref().map(|s| s.as_str().ok_or_else(|| wrong("a separator is a text")));
            split(text, separator.transpose()?, most, name == "rsplit")?.into_iter().map(Value::from).collect()
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            if separator.is_empty() {
                return Err(wrong("the separator is empty"));
            }
            let parts = match name {
                "partition" => text.split_once(separator).map_or([text, "", ""], |(a, b)| [a, separator, b]),
                _ => text.rsplit_once(separator).map_or(["", "", text], |(a, b)| [a, separator, b]),
            };
            Value::from(Tuple::from(parts.map(Value::from)))
        }
        "removeprefix" | "removesuffix" => {
            let (part,): (&str,) = from_args(args)?;
            let without = if name == "removeprefix" { text.strip_prefix(part) } else { text.strip_suffix(part) };
            Value::from(without.unwrap_or(text))
        }
        "index" | "rindex" => {
            let (part,): (&str,) = from_args(args)?;
            let found = if name == "index" { text.find(part) } else { text.rfind(part) };
            chars(&text[..found.ok_or_else(|| wrong(format!("{part:?} is not in the text")))?])
        }
        "ljust" | "rjust" | "center" => {
            let (width, fill): (usize, Option<char>) = from_args(args)?;
            let missing = bounded(width)?.saturating_sub(text.chars().count());
            let left = match name {
                "ljust" => 0,
                "rjust" => missing,
                _ => missing / 2 + (missing & width & 1), // as CPython rounds
            };
            let fill = |n: usize| fill.unwrap_or(' ').to_string().repeat(n);
            Value::from(fill(left) + text + &fill(missing - left))
        }
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
            let zeros = "0".repeat(bounded(width)?.saturating_sub(text.chars().count()));
            Value::from(text[..text.len() - digits.len()].to_string() + &zeros + digits)
        }
        "format" => {
            bounded(widest_of_format(text))?;
            return Ok(None);
        }
        "casefold" => Value::from(text.to_lowercase()),
        "swapcase" => {
            let swap =
                |c: char| if c.is_lowercase() { c.to_uppercase().to_string() } else { c.to_lowercase().to_string() };
            Value::from(text.chars().map(swap).collect::<String>())
        }
        "isdecimal" => Value::from(!text.is_empty() && text.chars().all(char::is_numeric)),
        _ => return Ok(None),
    };
    Ok(Some(value))
}

/// `str.split`, or `rsplit` from the `right`.
fn split<'a>(text: &'a str, separator: Option<&str>, most: Option<usize>, right: bool) -> Result<Vec<&'a str>, Error> {
    let mut parts: Vec<&str> = match (separator, most) {
        (Some(""), _) => return Err(wrong("the separator is empty")),
        (Some(separator), Some(n)) if right => text.rsplitn(n.saturating_add(1), separator).collect(),
        (Some(separator), Some(n)) => return Ok(text.splitn(n.saturating_add(1), separator).collect()),
        (Some(separator), None) => return Ok(text.split(separator).collect()),
        (None, None) => return Ok(text.split_whitespace().collect()),
        (None, Some(n)) => {
            let (mut parts, mut rest) = (Vec::new(), text);
            loop {
                rest = if right { rest.trim_end() } else { rest.trim_start() };
                let cut = if right { rest.rfind(char::is_whitespace) } else { rest.find(char::is_whitespace) };
                let Some(cut) = cut.filter(|_| parts.len() < n) else { break };
                let space = rest[cut..].chars().next().map_or(0, char::len_utf8);
                match right {
                    true => (parts.push(&rest[cut + space..]), rest = &rest[..cut]),
                    false => (parts.push(&rest[..cut]), rest = &rest[cut + space..]),
                };
            }
            parts.extend(Some(rest).filter(|rest| !rest.is_empty()));
            parts
        }
    };
    if right {
        parts.reverse();
    }
    Ok(parts)
}

/// `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`: the filter that transformers
/// uses instead of Jinja's own, which would escape for HTML.
pub fn tojson(value: &Value, args: Rest<ValueOrKwargs>) -> Result<String, Error> {
    let args = args.into_values();
    let (rest, options): (&[Value], Kwargs) = from_args(&args)?;
    let option = |place: usize, name: &str| -> Result<Option<Value>, Error> {
        Ok(rest.get(place).cloned().or(options.get(name)?).filter(|v| !v.is_none()))
    };
    let (ascii, indent) = (option(0, "ensure_ascii")?, option(1, "indent")?);
    let (separators, sorted) = (option(2, "separators")?, option(3, "sort_keys")?);
    options.assert_all_used()?;
    let indent = match indent {
        None => None,
        Some(text) if text.as_str().is_some() => text.as_str().map(String::from),
        Some(spaces) => {
            let spaces = usize::try_from(spaces).map_err(|_| wrong("indent is a number or a text"))?;
            Some(" ".repeat(bounded(spaces)?))
        }
    };
    let separators = match separators {
        None => [if indent.is_some() { "," } else { ", " }.to_string(), ": ".to_string()],
        Some(pair) => {
            let pair: Vec<String> = pair.try_iter()?.map(|v| v.to_string()).collect();
            pair.try_into().map_err(|_| wrong("separators are two texts"))?
        }
    };
    let is = |option: Option<Value>| option.is_some_and(|v| v.is_true());
    let format = Dumps { indent, separators, ascii: is(ascii), depth: 0, empty: true };
    let failed = |e| wrong("cannot write this as JSON").with_source(e);
    let mut out = Vec::new();
    let mut serializer = Serializer::with_formatter(&mut out, format);
    if is(sorted) {
        let mut value = serde_json::to_value(value).map_err(failed)?;
        value.sort_all_objects();
        value.serialize(&mut serializer).map_err(failed)?;
    } else {
        value.serialize(&mut serializer).map_err(failed)?;
    }
    Ok(String::from_utf8_lossy(&out).into_owned())
}

/// JSON in Python's form.
struct Dumps {
    /// What one level is indented by, with lines of their own for items; `None` writes one line.
    indent: Option<String>,
    /// Between items, and between a key and its value.
    separators: [String; 2],
    ascii: bool,
    depth: usize,
    /// The innermost list or object has no item yet.
    empty: bool,
}

impl Dumps {
    fn begin<W: ?Sized + Write>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.empty = true;
        out.write_all(bracket)
    }

    fn item<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if !first {
            out.write_all(self.separators[0].as_bytes())?;
        }
        self.line(out)
    }

    fn line<W: ?Sized + Write>(&self, out: &mut W) -> io::Result<()> {
        match &self.indent {
            Some(indent) => out.write_all(format!("\n{}", indent.repeat(self.depth)).as_bytes()),
            None => Ok(()),
        }
    }

    fn end<W: ?Sized + Write>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if !std::mem::replace(&mut self.empty, false) {
            self.line(out)?;
        }
        out.write_all(bracket)
    }
}

impl Formatter for Dumps {
    fn begin_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.begin(out, b"[")
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.item(out, first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.empty = false;
        Ok(())
    }

    fn end_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.end(out, b"]")
    }

    fn begin_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.begin(out, b"{")
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.item(out, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(self.separators[1].as_bytes())
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.empty = false;
        Ok(())
    }

    fn end_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.end(out, b"}")
    }

    fn write_string_fragment<W: ?Sized + Write>(&mut self, out: &mut W, fragment: &str) -> io::Result<()> {
        if !self.ascii {
            return out.write_all(fragment.as_bytes());
        }
        for c in fragment.chars() {
            match c {
                ' '..='~' => out.write_all(&[c as u8])?,
                _ => c.encode_utf16(&mut [0; 2]).iter().try_for_each(|unit| write!(out, "\\u{unit:04x}"))?,
            }
        }
        Ok(())
    }

    /// As Python's `repr`: the shortest digits, with an exponent below 1e-4 and from 1e16 on.
    fn write_f64<W: ?Sized + Write>(&mut self, out: &mut W, value: f64) -> io::Result<()> {
        let text = format!("{value:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        match exponent.parse::<i32>() {
            Ok(n) if value != 0.0 && !(-4..16).contains(&n) => {
                write!(out, "{digits}e{}{:02}", if n < 0 { '-' } else { '+' }, n.abs())
            }
            _ => write!(out, "{value:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str) -> String {
        let mut environment = minijinja::Environment::new();
        environment.set_unknown_method_callback(method);
        environment.add_filter("tojson", tojson);
        environment.add_filter("indent", indent);
        environment.add_filter("format", format);
        let x = json!({"z": 1, "a": [true, null, "<한🫠\u{7f}\u{1f}\">"], "e": [], "o": {}});
        let x = Value::from(minijinja::value::Serde(x));
        environment.render_str(source, minijinja::context! { x }).unwrap_or_else(|e| format!("{e:#}"))
    }

    /// What Python 3.11 writes.
    #[test]
    fn json_is_pythons() {
        let cases = [
            (
                "x|tojson(ensure_ascii=true, indent=2, separators=(' ,', ' : '), sort_keys=true)",
                "{\n  \"a\" : [\n    true ,\n    null ,\n    \"<\\ud55c\\ud83e\\udee0\\u007f\\u001f\\\">\"\n  ] ,\n  \"e\" : [] ,\n  \"o\" : {} ,\n  \"z\" : 1\n}",
            ),
            ("x.a[2]|tojson", "\"<한🫠\u{7f}\\u001f\\\">\""),
            ("x.a[2]|tojson(true)", "\"<\\ud55c\\ud83e\\udee0\\u007f\\u001f\\\">\""),
            (
                "{'z': 1, 'a': [1.0, 1e16]}|tojson(indent='\\t')",
                "{\n\t\"z\": 1,\n\t\"a\": [\n\t\t1.0,\n\t\t1e+16\n\t]\n}",
            ),
            ("[1, {'a': 2}]|tojson(indent=0)", "[\n1,\n{\n\"a\": 2\n}\n]"),
            ("[1, 2]|tojson(separators=[',', ':'])", "[1,2]"),
            ("[[], {}, [[]], '']|tojson(indent=1)", "[\n [],\n {},\n [\n  []\n ],\n \"\"\n]"),
            ("x.e|tojson(indent=none)", "[]"),
            (
                "[1e15, 1e-4, 1e-5, 1.5e-7, 1e22, 1.25e300, 0.1, 123456.789, 123456789012345680.0]|tojson",
                "[1000000000000000.0, 0.0001, 1e-05, 1.5e-07, 1e+22, 1.25e+300, 0.1, 123456.789, 1.2345678901234568e+17]",
            ),
        ];
        for (filter, expected) in cases {
            assert_eq!(render(&format!("{{{{ {filter} }}}}")), expected, "{filter}");
        }
        assert!(render("{{ 1|tojson(cls=2) }}").contains("cls"));
    }

    /// What Python 3.11 gives for the same expressions.
    #[test]
    fn methods_are_pythons() {
        let cases = [
            ("'a,b,,c'.rsplit(',', 1)", "['a,b,', 'c']"),
            ("'a,b,,c'.rsplit(',')", "['a', 'b', '', 'c']"),
            ("' a b  c '.rsplit(none, 1)", "[' a b', 'c']"),
            ("' a b  c '.split(none, 1)", "['a', 'b  c ']"),
            ("' a b  c '.split()", "['a', 'b', 'c']"),
            ("' a b  c '.rsplit(maxsplit=5)", "['a', 'b', 'c']"),
            ("'  '.split(none, 3)", "[]"),
            ("'a,b,c'.split(',', maxsplit=1)", "['a', 'b,c']"),
            ("'a,b,c'.split(sep=',')", "['a', 'b', 'c']"),
            ("'a,b,c'.split(',', -1)", "['a', 'b', 'c']"),
            ("'k=v=w'.partition('=')", "('k', '=', 'v=w')"),
            ("'k'.partition('=')", "('k', '', '')"),
            ("'k=v=w'.rpartition('=')", "('k=v', '=', 'w')"),
            ("'k'.rpartition('=')", "('', '', 'k')"),
            ("'<a>'.removeprefix('<').removesuffix('>')", "a"),
            ("'한국어'.index('어')", "2"),
            ("'abab'.rindex('ab')", "2"),
            ("'ab'.center(5, '*')", "**ab*"),
            ("'abc'.center(6, '*')", "*abc**"),
            ("'ab'.ljust(4) ~ '|'", "ab  |"),
            ("'ab'.rjust(4, '.')", "..ab"),
            ("'-7'.zfill(4)", "-007"),
            ("'aB'.swapcase()", "Ab"),
            ("'12'.isdecimal()", "True"),
            ("[1, 2, 3].index(3)", "2"),
            ("{'a': 1}.copy().a", "1"),
        ];
        for (expression, expected) in cases {
            assert_eq!(render(&format!("{{{{ {expression} }}}}")), expected, "{expression}");
        }
        for failing in ["'a'.split('')", "'a'.partition('')", "'a'.index('b')", "[1].index(2)"] {
            assert!(render(&format!("{{{{ {failing} }}}}")).contains("invalid operation"), "{failing}");
        }
    }

    #[test]
    fn a_width_is_bounded() {
        let with = |width: u64| {
            [
                format!("'a'.ljust({width})"),
                format!("'a'.rjust({width}, '.')"),
                format!("'a'.center({width})"),
                format!("'7'.zfill({width})"),
                format!("[]|tojson(indent={width})"),
                format!("'a'|indent({width})"),
                format!("'a'|indent(width={width})"),
                format!("'%% %-{width}s'|format('a')"),
                format!("'%(k)0{width}d'|format({{'k': 1}})"),
                format!("'%.{width}f'|format(0.5)"),
                format!("'{{}} {{{{{{:>{width}}}'.format(1, 2)"),
            ]
        };
        for most in with(1 << 20) {
            assert!(!render(&format!("{{{{ {most} }}}}")).contains("invalid"), "{most}");
        }
        for width in [(1 << 20) + 1, 1 << 62, u64::MAX] {
            let expected = format!("a text is to be {width} characters wide, expected up to 1048576");
            for more in with(width) {
                let said = render(&format!("{{{{ {more} }}}}"));
                assert!(said.contains(&expected), "{more}: {}", said.chars().take(200).collect::<String>());
            }
        }
        // numbers that are no widths
        for (plain, expected) in [
            ("'99999999 %d'|format(99999999)", "99999999 99999999"),
            ("'%d99999999'|format(1)", "199999999"),
            ("'99999999 {}: 99999999'.format(1)", "99999999 1: 99999999"),
            ("'{{:99999999}} {}'.format(1)", "{:99999999} 1"),
            ("'a\nb'|indent(2, true)", "  a\n  b"),
            ("'a\nb'|indent", "a\n    b"),
        ] {
            assert_eq!(render(&format!("{{{{ {plain} }}}}")), expected, "{plain}");
        }
    }
}
