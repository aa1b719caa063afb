//! Functions that a request offers to the model, and the grammar that its answer follows.

use super::{
    calls::{CallFormat, HEAD, quoted},
    constrain::{Format, compact, spaced},
    error::ApiError,
};
use crate::Tokenizer;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::fmt::Write;
use utoipa::ToSchema;

/// Most functions of a request: each is a part of the grammar.
const MAX_TOOLS: usize = 128;

/// Something that the model may ask for.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub(super) struct Tool {
    /// `function`
    #[serde(rename = "type")]
    #[allow(dead_code)] // only one kind exists
    kind: ToolKind,
    pub function: Function,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum ToolKind {
    Function,
}

/// A function that the client has.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub(super) struct Function {
    /// Up to 64 letters, digits, `_`, `-` and `.`.
    #[schema(max_length = 64)]
    pub name: String,
    /// What the function does, for the model.
    pub description: Option<String>,
    /// JSON schema of the arguments, an object; without one it takes none.
    #[schema(value_type = Option<Object>)]
    pub parameters: Option<Value>,
    /// Refuse a schema with parts that cannot be enforced; otherwise these parts are left out.
    pub strict: Option<bool>,
}

/// Whether functions are called, and which.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Value")]
pub(super) enum ToolChoice {
    /// No function is called.
    None,
    /// The model decides.
    #[default]
    Auto,
    /// At least one.
    Required,
    /// This one.
    Named(String),
}

impl TryFrom<Value> for ToolChoice {
    type Error = String;
    fn try_from(value: Value) -> Result<ToolChoice, String> {
        match value.as_str() {
            Some("none") => return Ok(ToolChoice::None),
            Some("auto") => return Ok(ToolChoice::Auto),
            Some("required") => return Ok(ToolChoice::Required),
            _ => {}
        }
        match (value.get("type").and_then(Value::as_str), value.pointer("/function/name").and_then(Value::as_str)) {
            (Some("function"), Some(name)) => Ok(ToolChoice::Named(name.into())),
            _ => Err(format!(
                "{value}: expected none, auto, required, or {{\"type\": \"function\", \"function\": {{\"name\": ..}}}}"
            )),
        }
    }
}

/// Whether functions are called, and which.
#[derive(ToSchema)]
#[serde(untagged)]
#[allow(dead_code)]
pub(super) enum ToolChoiceShape {
    /// `none`, `auto` or `required`
    Mode(String),
    Named(NamedTool),
}

/// This function.
#[derive(ToSchema)]
#[allow(dead_code)]
pub(super) struct NamedTool {
    /// `function`
    #[schema(rename = "type")]
    kind: String,
    function: ToolName,
}

#[derive(ToSchema)]
#[allow(dead_code)]
struct ToolName {
    name: String,
}

/// The functions of a request, checked.
#[derive(Debug, Clone)]
pub(super) struct Tools {
    pub format: CallFormat,
    functions: Vec<Function>,
    choice: ToolChoice,
    parallel: bool,
}

impl Tools {
    /// The functions that a request offers; `None` if it offers none or forbids calls. `format` is the model's.
    pub fn new(
        functions: Vec<Function>,
        choice: Option<ToolChoice>,
        parallel: Option<bool>,
        format: Option<CallFormat>,
    ) -> Result<Option<Tools>, ApiError> {
        let choice = choice.unwrap_or_default();
        if functions.is_empty() {
            return match choice {
                ToolChoice::None | ToolChoice::Auto => Ok(None),
                _ => Err(ApiError::invalid("tool_choice", "tool_choice asks for a call, and there are no tools")),
            };
        }
        let Some(format) = format else {
            if choice == ToolChoice::None {
                return Ok(None);
            }
            return Err(ApiError::unsupported(
                "tools",
                "this server calls none (it was started with --tool-parser none)",
            ));
        };
        if functions.len() > MAX_TOOLS {
            let message = format!("{} tools, at most {MAX_TOOLS} are allowed", functions.len());
            return Err(ApiError::invalid("tools", message));
        }
        for (i, f) in functions.iter().enumerate() {
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
            if f.name.is_empty() || f.name.len() > 64 || !f.name.chars().all(plain) {
                let message = format!("name {:?}: expected 1 to 64 letters, digits, _, - and .", f.name);
                return Err(ApiError::invalid(format!("tools[{i}].function.name"), message));
            }
            if functions[..i].iter().any(|other| other.name == f.name) {
                let message = format!("two functions have the name {:?}", f.name);
                return Err(ApiError::invalid(format!("tools[{i}].function.name"), message));
            }
            let is_object = |schema: &Value| {
                schema.as_object().is_some_and(|map| map.get("type").is_none_or(|kind| kind == "object"))
            };
            if f.parameters.as_ref().is_some_and(|schema| !is_object(schema)) {
                let message = "expected a JSON schema of an object: the arguments by their names";
                return Err(ApiError::invalid(format!("tools[{i}].function.parameters"), message));
            }
        }
        if let ToolChoice::Named(name) = &choice
            && !functions.iter().any(|f| f.name == *name)
        {
            return Err(ApiError::invalid("tool_choice", format!("tool_choice: no tool has the name {name:?}")));
        }
        let parallel = parallel.unwrap_or(true) && format.several && !matches!(choice, ToolChoice::Named(_));
        Ok((choice != ToolChoice::None).then_some(Tools { format, functions, choice, parallel }))
    }

    /// Whether an answer must have calls.
    pub fn must(&self) -> bool {
        matches!(self.choice, ToolChoice::Required | ToolChoice::Named(_))
    }

    /// The functions in the form that chat templates get.
    pub fn for_template(&self) -> Vec<Value> {
        let tool = |f: &Function| {
            let mut function = Map::new();
            function.insert("name".into(), json!(f.name));
            if let Some(text) = &f.description {
                function.insert("description".into(), json!(text));
            }
            function.insert("parameters".into(), f.schema());
            json!({"type": "function", "function": function})
        };
        self.functions.iter().map(tool).collect()
    }

    /// The functions described in words, for a model whose template does not know tools.
    pub fn in_words(&self) -> String {
        let mut text = format!(
            "You can call functions. To call one, answer with nothing but one line of JSON: {HEAD}: \"the function's name\", \
             \"arguments\": {{\"an argument's name\": its value}}}}."
        );
        text += if self.parallel { " For several calls write several such lines." } else { "" };
        text += match self.choice {
            ToolChoice::Auto | ToolChoice::None => " Where no function helps, answer in words.",
            ToolChoice::Required | ToolChoice::Named(_) => " Now a function must be called.",
        };
        text += " The results come with the next message. These are the functions:";
        for tool in self.for_template() {
            let _ = write!(text, "\n{}", crate::text::json_line(&tool["function"])); // writing to a string cannot fail
        }
        text
    }

    /// The form of an answer: text, or calls of these functions with arguments that follow their schemas. `answer`
    /// constrains the text.
    pub fn grammar(&self, tokenizer: &Tokenizer, answer: Option<&Format>) -> Result<Format, ApiError> {
        let format = &self.format;
        if !matches!(answer, None | Some(Format::JsonObject | Format::JsonSchema(_))) {
            let message =
                "with tools, the only format for answers is a JSON schema: leave tools out, or use response_format";
            return Err(ApiError::invalid("tools", message));
        }
        let literal = |text: &str| format.literal(tokenizer, text);
        let chosen: Vec<(usize, &Function)> = match &self.choice {
            ToolChoice::Named(name) => self.functions.iter().enumerate().filter(|(_, f)| f.name == *name).collect(),
            _ => self.functions.iter().enumerate().collect(),
        };
        let open: Vec<String> = format.open.iter().map(|text| quoted(&[text, HEAD].concat())).collect();
        let next = literal(&[format.between, HEAD].concat());
        let more = if self.parallel { format!(" ({next} call)*") } else { String::new() };
        let close = if format.close.is_empty() { String::new() } else { format!(" {}", literal(format.close)) };
        let list = format!("call{more}{close}");
        let marked = format!("{} ({}) {list}", literal(format.marker), open.join(" | "));
        let must = self.must();
        let mut text = match (format.marker, answer) {
            ("", _) if must => format!("start: {} {list}\n", quoted(HEAD)),
            (_, _) if must => format!("start: {marked}\n"),
            // A lazy rule ends as soon as it can, so the text ends where the marker is.
            ("", None) => format!("start: TEXT | head {list}\nhead[lazy]: {}\n", quoted(HEAD)),
            // The beginning of a call is written with JSON's lexemes, so that a lexer which takes the longest lexeme
            // finds either.
            ("", Some(_)) => format!("start: answer | {} {} {list}\n", quoted(&HEAD[..1]), quoted(&HEAD[1..])),
            (_, Some(_)) => format!("start: answer | {marked}\n"),
            (marker, None) => {
                // A marker spelled in letters ends the text as the marker's token does: text after it would be lost to
                // clients that read calls.
                let open = open.join(" | ");
                let token = tokenizer.token_id(marker).filter(|_| format.needs_special(tokenizer));
                let special = token.map_or(String::new(), |id| format!(" | TEXT <[{id}]> ({open}) {list}"));
                format!("start: TEXT{special} | said ({open}) {list}\nsaid[lazy]: TEXT {}\n", quoted(marker))
            }
        };
        match answer {
            _ if must => {}
            None => text += "TEXT: /(.|\\n)*/\n",
            Some(Format::JsonObject) => text += &format!("answer: %json {}\n", compact(&json!({"type": "object"}))),
            Some(Format::JsonSchema(schema)) => text += &format!("answer: %json {}\n", compact(schema)),
            Some(_) => {} // refused above
        }
        let names: Vec<String> = chosen.iter().map(|(i, _)| format!("call_{i}")).collect();
        let _ = writeln!(text, "call: {}", names.join(" | ")); // writing to a string cannot fail
        for (i, f) in chosen {
            let before = quoted(&format.before_arguments(&f.name));
            let _ = writeln!(text, "call_{i}: {before} arguments_{i} \"}}\"\narguments_{i}: %json {}", f.arguments());
        }
        Ok(Format::Lark(text))
    }

    /// The schemas of the arguments, each with the field that it came from, so that an error can name the wrong one.
    pub fn schemas(&self) -> Vec<(String, Format)> {
        let each = self.functions.iter().enumerate();
        each.map(|(i, f)| {
            (format!("tools[{i}].function.parameters"), Format::Lark(format!("start: %json {}", f.arguments())))
        })
        .collect()
    }
}

impl Function {
    fn schema(&self) -> Value {
        self.parameters.clone().unwrap_or_else(|| json!({"type": "object", "properties": {}}))
    }

    /// The schema of its arguments for llguidance.
    fn arguments(&self) -> Value {
        let mut schema = self.schema();
        if let Some(map) = schema.as_object_mut() {
            map.entry("type").or_insert_with(|| json!("object"));
            if self.parameters.is_none() {
                map.insert("additionalProperties".into(), json!(false));
            }
        }
        spaced(&schema, !self.strict.unwrap_or(false))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Constraint, Device, Engine, Options, server::Grammars};

    /// Whether an answer may be `text`, with special tokens in it read as such.
    fn takes(grammars: &Grammars, tokenizer: &Tokenizer, format: &Format, text: &str) -> bool {
        takes_ids(grammars, format, &tokenizer.encode(text, false).unwrap())
    }

    fn takes_ids(grammars: &Grammars, format: &Format, ids: &[u32]) -> bool {
        let mut grammar = grammars.compile(format).unwrap();
        let mut allows = |id: u32| {
            let mut mask = vec![0; 64];
            grammar.allowed(&mut mask).unwrap();
            let allowed = mask[id as usize / 32] >> (id % 32) & 1 == 1;
            allowed && grammar.accept(id).is_ok()
        };
        ids.iter().copied().all(&mut allows) && allows(2047)
    }

    #[test]
    fn answers() {
        let engine = Engine::open("demo", &Options { device: Device::Cpu, ..Options::default() }).unwrap();
        let tokenizer = engine.tokenizer().unwrap();
        let grammars = Grammars::new(tokenizer, 2048, &[2047]).unwrap();
        let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]});
        let function =
            |name: &str, parameters| Function { name: name.into(), description: None, parameters, strict: None };
        let functions = || vec![function("f", Some(schema.clone())), function("g", None)];
        let special = CallFormat { marker: "<|begin_of_text|>", ..CallFormat::MISTRAL };
        let formats = [CallFormat::JSON, CallFormat::LLAMA3, CallFormat::HERMES, CallFormat::MISTRAL, special];
        for format in formats {
            let write = |calls: &[(&str, &str)]| {
                let call =
                    |(name, arguments): &(&str, &str)| format!("{HEAD}{}{arguments}}}", format.before_arguments(name));
                let calls: Vec<String> = calls.iter().map(call).collect();
                format!("{}{}{}{}", format.marker, format.open[0], calls.join(format.between), format.close)
            };
            let grammar = |choice: ToolChoice, parallel: bool, answer: Option<&Format>| {
                let tools = Tools::new(functions(), Some(choice), Some(parallel), Some(format)).unwrap().unwrap();
                tools.grammar(tokenizer, answer).unwrap()
            };
            let check = |format: &Format, text: &str, expected: bool| {
                assert_eq!(takes(&grammars, tokenizer, format, text), expected, "{text:?} of {format:?}");
            };
            let (one, two) = (write(&[("f", "{\"a\": 1}")]), write(&[("f", "{\"a\": 1}"), ("g", "{}")]));
            let wrong = [
                write(&[("f", "{\"a\": \"x\"}")]),
                write(&[("f", "{}")]),
                write(&[("f", "{\"a\":1}")]), // written as models are not trained to
                write(&[("g", "{\"b\": 1}")]),
                write(&[("h", "{}")]),
                format!("{one} 네"),
                one[..one.len() - 1].to_string(),
            ];
            let auto = grammar(ToolChoice::Auto, true, None);
            for text in ["네, <b>그래요</b>.\n[1]", "", "{\"a\": 1}", &one] {
                check(&auto, text, true);
            }
            check(&auto, &two, format.several);
            check(&auto, &write(&[("g", "{}"); 40]), format.several); // as many as the model likes
            check(&auto, &format!("네 {one}"), true); // where calls come first, this is words
            wrong.iter().for_each(|text| check(&auto, text, false));
            check(&grammar(ToolChoice::Auto, false, None), &two, false);
            // A marker in letters means the same as its token: only a call may follow it.
            let letters = |text: &str| takes_ids(&grammars, &auto, &tokenizer.encode_plain(text).unwrap());
            assert!(letters(&one) && letters(&format!("네 {one}")) && (letters(&two) || !format.several), "{format:?}");
            if !format.marker.is_empty() {
                assert!(wrong.iter().all(|text| !letters(text)), "{format:?}");
                assert!(!letters(&format!("{} 네", format.marker)), "{format:?}");
            }
            let required = grammar(ToolChoice::Required, true, None);
            check(&required, &one, true);
            check(&required, &two, format.several);
            wrong.iter().map(String::as_str).chain(["네", ""]).for_each(|text| check(&required, text, false));
            let named = grammar(ToolChoice::Named("g".into()), true, None);
            check(&named, &write(&[("g", "{}")]), true);
            [&one, &two, &write(&[("g", "{}"), ("g", "{}")])].iter().for_each(|text| check(&named, text, false));
            let answer = Format::JsonSchema(
                json!({"type": "object", "properties": {"name": {"const": "f"}}, "required": ["name"]}),
            );
            let either = grammar(ToolChoice::Auto, true, Some(&answer));
            for (text, expected) in
                [("{\"name\":\"f\"}", true), (&one, true), ("네", false), ("{\"name\":\"g\"}", false)]
            {
                check(&either, text, expected);
            }
        }
    }
}
