//! A checkpoint's own chat template, rendered as Hugging Face's `apply_chat_template` does.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{AutoEscape, Environment, ErrorKind, Value, context};
use serde::{Deserialize, Serialize};

use super::Message;
use crate::error::{Error, Result};

/// Names of the special tokens that a template may use.
const TOKENS: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A chat template in Jinja's language, with the special tokens of its checkpoint. Clones share it.
///
/// It sees what a template sees in transformers: `messages`, `add_generation_prompt` (true), `tools` and `documents`
/// (none), `bos_token` and its siblings, `raise_exception`, `strftime_now` (in UTC), `tojson` as Python writes it,
/// Python's string and dict methods, loop controls, and blocks that take their line with them.
#[derive(Debug, Clone)]
pub struct Jinja(Arc<Compiled>);

#[derive(Debug)]
struct Compiled {
    path: PathBuf,
    environment: Environment<'static>,
    tokens: BTreeMap<String, String>,
}

/// `tokenizer_config.json`, as far as it concerns templates.
#[derive(Deserialize, Default)]
struct TokenizerConfig {
    chat_template: Option<ChatTemplate>,
    #[serde(flatten)]
    rest: serde_json::Map<String, serde_json::Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ChatTemplate {
    One(String),
    Named(Vec<Named>),
}

#[derive(Deserialize)]
struct Named {
    name: String,
    template: String,
}

impl Jinja {
    /// The template of the checkpoint in `dir`: `chat_template.jinja`, else what `tokenizer_config.json` has; `None`
    /// when it has none. Of several named templates the one called `default` is taken.
    ///
    /// # Errors
    /// [`Error::File`] when a file is not what it should be, or no named template is the default.
    pub fn of_model(dir: &Path) -> Result<Option<Self>> {
        let own = dir.join("chat_template.jinja");
        if own.is_file() {
            return Self::from_file(&own, Some(dir)).map(Some);
        }
        let (path, config) = TokenizerConfig::read(dir)?;
        let source = match &config.chat_template {
            None => return Ok(None),
            Some(ChatTemplate::One(source)) => source,
            Some(ChatTemplate::Named(list)) => match list.iter().find(|t| t.name == "default") {
                Some(default) => &default.template,
                None => {
                    let names: Vec<&str> = list.iter().map(|t| t.name.as_str()).collect();
                    let what = format!("none of its chat templates is called `default`: {}", names.join(", "));
                    return Err(Error::file(path, what));
                }
            },
        };
        Self::compile(&path, source, config.tokens(dir)?).map(Some)
    }

    /// The template in the file `path`, with the special tokens of the checkpoint in `dir`.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read, [`Error::File`] when it is no template.
    pub fn from_file(path: &Path, dir: Option<&Path>) -> Result<Self> {
        let source = std::fs::read_to_string(path).map_err(Error::io(path))?;
        let tokens = match dir {
            Some(dir) => special_tokens(dir)?,
            None => BTreeMap::new(),
        };
        Self::compile(path, &source, tokens)
    }

    fn compile(path: &Path, source: &str, tokens: BTreeMap<String, String>) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| Error::file(path, e.to_string()))?);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            strftime(&format, now.as_secs())
        });
        let source = without_generation_tags(source);
        environment
            .add_template_owned("chat_template", source)
            .map_err(|e| Error::file(path, format!("chat template, {}", explain(&e))))?;
        Ok(Self(Arc::new(Compiled { path: path.to_path_buf(), environment, tokens })))
    }

    /// The file that the template is from.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The prompt for the answer to the last of `messages`.
    ///
    /// # Errors
    /// [`Error::Input`] with the template's line when it refuses the conversation or fails on it.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        let context = context! {
            messages => Value::from(Serde(messages)),
            add_generation_prompt => true,
            tools => (),
            documents => (),
            ..Value::from(Serde(&self.0.tokens))
        };
        let template = self.0.environment.get_template("chat_template");
        template.and_then(|t| t.render(context)).map_err(|e| {
            Error::Input(format!(
                "{}: the chat template does not take this conversation, {}",
                self.0.path.display(),
                explain(&e)
            ))
        })
    }
}

/// The texts of the special tokens of the checkpoint in `dir` by name: `bos_token`, `eos_token` and so on.
///
/// # Errors
/// [`Error::File`] when a file is not what it should be.
pub(crate) fn special_tokens(dir: &Path) -> Result<BTreeMap<String, String>> {
    TokenizerConfig::read(dir)?.1.tokens(dir)
}

impl TokenizerConfig {
    /// The file in `dir`, empty where there is none, and its path.
    fn read(dir: &Path) -> Result<(PathBuf, Self)> {
        let path = dir.join("tokenizer_config.json");
        let config = read_json(&path)?.unwrap_or_default();
        Ok((path, config))
    }

    /// The special tokens by name, from here or from `special_tokens_map.json` in `dir`.
    fn tokens(&self, dir: &Path) -> Result<BTreeMap<String, String>> {
        let map: serde_json::Map<_, _> = read_json(&dir.join("special_tokens_map.json"))?.unwrap_or_default();
        let text = |value: &serde_json::Value| {
            // A token is written as its text, or as an object with its text and flags.
            value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_string)
        };
        let token = |name: &&str| self.rest.get(*name).and_then(text).or_else(|| map.get(*name).and_then(text));
        Ok(TOKENS.iter().filter_map(|name| Some((name.to_string(), token(name)?))).collect())
    }
}

fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Option<T>> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|e| Error::file(path, e.to_string())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(path)(e)),
    }
}

/// Where in the template, and what.
fn explain(e: &minijinja::Error) -> String {
    let line = e.line().map_or(String::new(), |line| format!("line {line}: "));
    match e.detail() {
        Some(detail) if e.kind() == ErrorKind::InvalidOperation => format!("{line}{detail}"),
        Some(detail) => format!("{line}{}: {detail}", e.kind()),
        None => format!("{line}{}", e.kind()),
    }
}

/// The source with `{% generation %}` blocks, by which transformers finds what an assistant said, made blocks that
/// do nothing; lines and whitespace control stay as they are.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        let name = tag.trim_start_matches(['-', '+']).trim_start();
        let word: &str = &name[..name.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(name.len())];
        let replaced = match word {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        if let Some(replaced) = replaced {
            out.push_str(&tag[..tag.len() - name.len()]);
            out.push_str(replaced);
            rest = &name[word.len()..];
        } else {
            rest = tag;
        }
    }
    out + rest
}

/// JSON as Python's `json.dumps(value, ensure_ascii=False, indent=indent)` writes it; Jinja's own filter would
/// escape it for HTML.
fn tojson(value: &Value, indent: Option<usize>, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent = match indent {
        Some(indent) => Some(indent),
        None => options.get("indent")?,
    };
    options.assert_all_used()?;
    let failed = |e| minijinja::Error::new(ErrorKind::InvalidOperation, "cannot write this as JSON").with_source(e);
    let mut out = Vec::new();
    match indent {
        Some(n) => {
            let spaces = vec![b' '; n];
            let pretty = serde_json::ser::PrettyFormatter::with_indent(&spaces);
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, pretty)).map_err(failed)?;
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced)).map_err(failed)?,
    }
    Ok(String::from_utf8_lossy(&out).into_owned())
}

/// One line, a space after `,` and `:`.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

/// C's `strftime` for a time in UTC, in English; a directive that is not known stays as it is written.
fn strftime(format: &str, unix: u64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
    let (days, second) = (unix / 86_400, unix % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[((days + 4) % 7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out += &year.to_string(),
            Some('y') => out += &format!("{:02}", year % 100),
            Some('m') => out += &format!("{month:02}"),
            Some('d') => out += &format!("{day:02}"),
            Some('B') => out += month_name,
            Some('b') => out += &month_name[..3],
            Some('A') => out += day_name,
            Some('a') => out += &day_name[..3],
            Some('H') => out += &format!("{hour:02}"),
            Some('I') => out += &format!("{:02}", (hour + 11) % 12 + 1),
            Some('M') => out += &format!("{minute:02}"),
            Some('S') => out += &format!("{:02}", second % 60),
            Some('p') => out += if hour < 12 { "AM" } else { "PM" },
            Some('F') => out += &format!("{year}-{month:02}-{day:02}"),
            Some('T') => out += &format!("{hour:02}:{minute:02}:{:02}", second % 60),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

/// Year, month and day of a count of days since 1970-01-01. A year that begins in March has its leap day at its end,
/// which makes the months regular (H. Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`).
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        let now = 1_732_320_245; // Sat Nov 23 00:04:05 2024 UTC
        assert_eq!(strftime("%d %b %Y", now), "23 Nov 2024");
        assert_eq!(
            strftime("%A %a %B %m/%d/%y %H:%M:%S %I %p %F %T 100%% %Q %", now),
            "Saturday Sat November 11/23/24 00:04:05 12 AM 2024-11-23 00:04:05 100% %Q %"
        );
        for (days, date) in [(0, (1970, 1, 1)), (59, (1970, 3, 1)), (11_016, (2000, 2, 29)), (20_148, (2025, 3, 1))] {
            assert_eq!(civil(days), date);
        }
    }

    #[test]
    fn generation_tags() {
        let source = "a{%- generation -%}b{%endgeneration%}\n{% generation_prompt %}{% set generation = 1 %}{%";
        let expected = "a{%- if true -%}b{%endif%}\n{% generation_prompt %}{% set generation = 1 %}{%";
        assert_eq!(without_generation_tags(source), expected);
    }
}
