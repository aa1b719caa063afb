//! Renders a checkpoint's own chat template as Hugging Face's `apply_chat_template` does.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::ZonedDateTime;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, ErrorKind, Value, context};

use super::{
    Message,
    percent::with_format_filter,
    python::{format, indent, method, tojson},
    strftime::strftime,
    tokenizer_config::{ChatTemplate, TokenizerConfig},
};
use crate::{
    error::{Error, Result},
    files::{gguf::Gguf, json},
};

/// A chat template in Jinja's language, with the special tokens of its checkpoint. Clones share it.
///
/// It sees what a template sees in transformers: `messages`, `add_generation_prompt` (true), `tools`
/// ([`Jinja::with_tools`]), `documents` (none), `bos_token` and its siblings, `raise_exception`, `strftime_now` (in
/// local time), `tojson` as Python writes it, and Python's string and dict methods. Loops may `break` and `continue`,
/// and the line of a block tag leaves no empty line.
///
/// If a checkpoint has several templates by name, a conversation with tools uses the one called `tool_use`, as in
/// transformers, and any other uses `default`.
#[derive(Debug, Clone)]
pub struct Jinja(Arc<Compiled>, Arc<[serde_json::Value]>);

/// Names of templates in messages, and in [`Compiled::environment`].
const DEFAULT: &str = "chat template";
const TOOL_USE: &str = "chat template tool_use";

#[derive(Debug)]
struct Compiled {
    path: PathBuf,
    environment: Environment<'static>,
    tokens: BTreeMap<String, String>,
    additional: Vec<String>,
}

impl Jinja {
    /// The template of the checkpoint in `dir`: `chat_template.jinja`, else what `tokenizer_config.json` has; `None`
    /// when it has none. Beside `chat_template.jinja` a second one may be in `additional_chat_templates/tool_use.jinja`.
    ///
    /// # Errors
    /// [`Error::File`] when a file is not what it should be, a link leads nowhere, or no named template is the default.
    pub fn of_model(dir: &Path) -> Result<Option<Self>> {
        let own = dir.join("chat_template.jinja");
        if let Some(source) = json::read_optional(&own)? {
            let tool_use = json::read_optional(&dir.join("additional_chat_templates/tool_use.jinja"))?;
            let config = TokenizerConfig::read(dir)?;
            return Self::compile(&own, &source, tool_use.as_deref(), Some(&config)).map(Some);
        }
        Self::of_config(TokenizerConfig::read(dir)?)
    }

    /// The template of a GGUF file.
    pub(crate) fn of_gguf(gguf: &Gguf) -> Result<Option<Self>> {
        Self::of_config(TokenizerConfig::of_gguf(gguf)?)
    }

    fn of_config(config: TokenizerConfig) -> Result<Option<Self>> {
        let (source, tool_use) = match &config.chat_template {
            None => return Ok(None),
            Some(ChatTemplate::One(source)) => (source, None),
            Some(ChatTemplate::Named(list)) => {
                let named = |name| list.iter().find(|t| t.name == name).map(|t| &t.template);
                let Some(default) = named("default") else {
                    let names: Vec<&str> = list.iter().map(|t| t.name.as_str()).collect();
                    let what = format!("none of its chat templates is called `default`: {}", names.join(", "));
                    return Err(Error::file(&config.path, what));
                };
                (default, named("tool_use"))
            }
        };
        Self::compile(&config.path, source, tool_use.map(String::as_str), Some(&config)).map(Some)
    }

    /// The template in the file `path`, with the special tokens of the checkpoint in `dir`.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read, [`Error::File`] when it is no template.
    pub fn from_file(path: &Path, dir: Option<&Path>) -> Result<Self> {
        let config = dir.map(TokenizerConfig::read).transpose()?;
        Self::compile(path, &json::read(path)?, None, config.as_ref())
    }

    fn compile(path: &Path, source: &str, tool_use: Option<&str>, config: Option<&TokenizerConfig>) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| Error::file(path, e.to_string()))?);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(method);
        // Python cannot iterate over None, but minijinja can.
        let iterable = |v: &Value| !v.is_none() && v.try_iter().is_ok();
        environment.add_test("iterable", iterable);
        environment.add_filter("tojson", tojson);
        environment.add_filter("indent", indent);
        environment.add_filter("format", format);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| {
            strftime(&format, &ZonedDateTime::now()).map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, e))
        });
        for (name, source) in [(DEFAULT, Some(source)), (TOOL_USE, tool_use)] {
            let Some(source) = source else { continue };
            // Jinja knows only one kind of line end.
            let source = source.replace("\r\n", "\n").replace('\r', "\n");
            let source = with_format_filter(&without_generation_tags(&source))
                .map_err(|what| Error::file(path, format!("{name}: {what}")))?;
            environment
                .add_template_owned(name, source)
                .map_err(|e| Error::file(path, format!("{name}, {}", explain(&e))))?;
        }
        let (tokens, additional) = config.map(|c| (c.named(), c.additional())).unwrap_or_default();
        Ok(Self(Arc::new(Compiled { path: path.to_path_buf(), environment, tokens, additional }), Arc::new([])))
    }

    /// The file that the template is from.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The template with functions to show, each of them `{"type": "function", "function": {"name", "description",
    /// "parameters"}}`; without any, `tools` is none.
    pub fn with_tools(&self, tools: Vec<serde_json::Value>) -> Self {
        Self(self.0.clone(), tools.into())
    }

    /// The functions that it shows.
    pub fn tools(&self) -> &[serde_json::Value] {
        &self.1
    }

    /// The text of the template that conversations with tools go through.
    pub fn tool_source(&self) -> String {
        let template = self.template(true);
        template.map(|template| template.source().to_string()).unwrap_or_default() // it was compiled under this name
    }

    fn template(&self, tools: bool) -> std::result::Result<minijinja::Template<'_, '_>, minijinja::Error> {
        let named = self.0.environment.get_template(TOOL_USE).ok().filter(|_| tools);
        named.map_or_else(|| self.0.environment.get_template(DEFAULT), Ok)
    }

    /// The prompt for the answer to the last of `messages`, or for the rest of it when it is [begun](Message::begun).
    ///
    /// # Errors
    /// [`Error::Input`] with the template's line when it refuses the conversation or fails on it, or leaves out the message
    /// that is begun.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        let Some((last, earlier)) = messages.split_last().filter(|(last, _)| last.begun) else {
            return self.fill(messages, true);
        };
        // A character that occurs nowhere else marks the end of the last message, so that it can be found in the
        // prompt. The space after the mark shows whether the template drops spaces at the end of a message, and with
        // them the message's own: transformers finds that out in the same way.
        let unused = ('\u{100000}'..='\u{10FFFD}').find(|mark| messages.iter().all(|m| !m.content.contains(*mark)));
        let mark = unused.unwrap_or('\u{100000}');
        let mut marked = earlier.to_vec();
        marked.push(Message { content: format!("{}{mark} ", last.content), ..last.clone() });
        let prompt = self.fill(&marked, false)?;
        match prompt.rsplit_once(mark) {
            Some((before, after)) if after.starts_with(' ') => Ok(before.into()),
            Some((before, _)) => Ok(before.trim_end().into()),
            None => Err(Error::Input(format!(
                "{}: the chat template does not show the last message, so it cannot be continued",
                self.0.path.display()
            ))),
        }
    }

    fn fill(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let context = context! {
            messages => Value::from(Serde(messages)),
            add_generation_prompt,
            tools => Some(Value::from(Serde(&*self.1))).filter(|_| !self.1.is_empty()),
            documents => (),
            additional_special_tokens => &self.0.additional,
            ..Value::from(Serde(&self.0.tokens))
        };
        let template = self.template(!self.1.is_empty());
        template.and_then(|t| t.render(context)).map_err(|e| {
            Error::Input(format!(
                "{}: the chat template does not take this conversation, {}",
                self.0.path.display(),
                explain(&e)
            ))
        })
    }
}

/// Where in the template the error is, and what it is.
fn explain(e: &minijinja::Error) -> String {
    let line = e.line().map_or(String::new(), |line| format!("line {line}: "));
    match e.detail() {
        Some(detail) if e.kind() == ErrorKind::InvalidOperation => format!("{line}{detail}"),
        Some(detail) => format!("{line}{}: {detail}", e.kind()),
        None => format!("{line}{}", e.kind()),
    }
}

/// The source with `{% generation %}` blocks, by which transformers finds what an assistant said, turned into blocks
/// that do nothing. Lines and whitespace control stay as they are.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_tags() {
        let source = "a{%- generation -%}b{%endgeneration%}\n{% generation_prompt %}{% set generation = 1 %}{%";
        let expected = "a{%- if true -%}b{%endif%}\n{% generation_prompt %}{% set generation = 1 %}{%";
        assert_eq!(without_generation_tags(source), expected);
    }
}
