//! Turns a conversation into a prompt: by one of the presets of the model's card, by a checkpoint's own template, or as
//! it is.

use std::fmt;
use std::path::Path;

use super::Tokenizer;
use super::jinja::Jinja;
use super::message::Message;
use super::tool::{each_text, map_texts};
use crate::{
    error::{Error, Result},
    files::gguf::Gguf,
};

/// The instruction of the card of Llama-3-Ko-8B-Instruct-AOG: "As a friendly chatbot, answer the other's request in
/// as much detail and as kindly as you can."
pub const AOG_INSTRUCTION: &str = "친절한 챗봇으로서 상대방의 요청에 최대한 자세하고 친절하게 답하자.";

/// How a conversation becomes a prompt that ends where the answer begins.
#[derive(Debug, Clone)]
pub enum Template {
    /// The card's preset, in the order that its author found best:
    ///
    /// ```text
    /// ### Question:
    /// {an earlier question}
    ///
    /// ### Response:
    /// {its answer}
    ///
    /// ### Question:
    /// {question}
    ///
    /// ### Instruction:
    /// {instruction}
    ///
    /// ### Response:
    /// ```
    Aog,
    /// The other order that the card mentions: `### Instruction:`, `### Input:` (the question), `### Response:`.
    /// Earlier turns come first, as Input and Response.
    AogInstructionFirst,
    /// A checkpoint's own chat template.
    Jinja(Jinja),
    /// No template: the contents of the messages, one directly after the other.
    Raw,
}

impl Template {
    /// The template of the checkpoint in `dir`: its own if it has one, else [`Template::Aog`], which is also the answer
    /// when there is no directory.
    ///
    /// # Errors
    /// [`Error::File`] when the checkpoint's template, or the file it should be in, cannot be read.
    pub fn for_model(dir: Option<&Path>) -> Result<Self> {
        let own = dir.map(Jinja::of_model).transpose()?.flatten();
        Ok(own.map_or(Self::Aog, Self::Jinja))
    }

    /// The template of a GGUF file, else [`Template::Aog`].
    pub(crate) fn of_gguf(gguf: &Gguf) -> Result<Self> {
        Ok(Jinja::of_gguf(gguf)?.map_or(Self::Aog, Self::Jinja))
    }

    /// The template that `name` names: `aog`, `aog-instruction-first`, `raw`, or the path of a Jinja file, which gets
    /// the special tokens of the checkpoint in `dir`.
    ///
    /// # Errors
    /// [`Error::Input`] for another name; [`Error::Io`] and [`Error::File`] for a file that is no template.
    pub fn parse(name: &str, dir: Option<&Path>) -> Result<Self> {
        let path = Path::new(name);
        match name {
            "aog" => Ok(Self::Aog),
            "aog-instruction-first" => Ok(Self::AogInstructionFirst),
            "raw" => Ok(Self::Raw),
            _ if path.extension().is_some_and(|e| e == "jinja" || e == "j2") || path.is_file() => {
                Jinja::from_file(path, dir).map(Self::Jinja)
            }
            _ => Err(Error::Input(format!(
                "template {name:?}: expected aog, aog-instruction-first, raw, or the path of a .jinja file"
            ))),
        }
    }

    /// The prompt for the answer to the last message, or for the rest of the last message when it is
    /// [begun](Message::begun).
    ///
    /// A system message at the beginning is the instruction. Without one it is `instruction`. Without that too, the
    /// presets use [`AOG_INSTRUCTION`] (if the instruction is empty, they leave the block out), and a checkpoint's
    /// template does what it does by itself.
    ///
    /// # Errors
    /// [`Error::Input`] when the conversation does not fit the template: the presets want question and answer in turn,
    /// and a question or a begun answer at the end; [`Template::Raw`] has no place for an instruction; and a
    /// checkpoint's template may refuse what it likes.
    pub fn render(&self, messages: &[Message], instruction: Option<&str>) -> Result<String> {
        if messages.is_empty() {
            return Err(no_message());
        }
        if let Some(i) = messages[..messages.len() - 1].iter().position(|m| m.begun) {
            return Err(Error::Input(format!(
                "message {} is an answer to be continued, and only the last one can be",
                i + 1
            )));
        }
        match self {
            Self::Aog => Dialogue::of(messages, instruction)?.render("Question", |question, instruction| {
                format!("### Question:\n{question}\n\n{instruction}### Response:\n")
            }),
            Self::AogInstructionFirst => Dialogue::of(messages, instruction)?
                .render("Input", |input, instruction| format!("{instruction}### Input:\n{input}\n\n### Response:\n")),
            Self::Jinja(jinja) => match instruction {
                Some(instruction) if messages.first().is_none_or(|m| !is_system(m)) => {
                    let mut with = vec![Message::new("system", instruction)];
                    with.extend_from_slice(messages);
                    jinja.render(&with)
                }
                _ => jinja.render(messages),
            },
            Self::Raw if instruction.is_some() => {
                Err(Error::Input("the raw template has no place for an instruction: put it into the text".into()))
            }
            Self::Raw => Ok(messages.iter().map(|m| m.content.as_str()).collect()),
        }
    }

    /// The tokens of [`Template::render`]'s prompt.
    ///
    /// The presets and [`Template::Raw`] begin with BOS exactly once if the tokenizer has one; a checkpoint's
    /// template writes its own or none, as with Hugging Face's `apply_chat_template`.
    ///
    /// Special tokens come from templates, and from the text of [`Template::Raw`], which is the user's own prompt.
    /// In the messages of all others their text stays text: nobody ends a prompt by writing `<|end_of_text|>`.
    /// Hugging Face's libraries differ here: they take it for the token.
    ///
    /// # Errors
    /// As [`Template::render`] and [`Tokenizer::encode`].
    pub fn encode(&self, tokenizer: &Tokenizer, messages: &[Message], instruction: Option<&str>) -> Result<Vec<u32>> {
        let ids = match self {
            // Encoded as one text: a token may span the end of the template's text and the beginning of a message
            // (`.\n\n` is one).
            Self::Aog | Self::AogInstructionFirst => tokenizer.encode_plain(&self.render(messages, instruction)?)?,
            Self::Jinja(jinja) => return self.encode_jinja(jinja, tokenizer, messages, instruction),
            Self::Raw => tokenizer.encode(&self.render(messages, instruction)?, false)?,
        };
        let bos = tokenizer.bos().filter(|bos| ids.first() != Some(bos));
        Ok(bos.into_iter().chain(ids).collect())
    }

    fn encode_jinja(
        &self,
        jinja: &Jinja,
        tok: &Tokenizer,
        messages: &[Message],
        instruction: Option<&str>,
    ) -> Result<Vec<u32>> {
        let mut texts: Vec<&str> = instruction.into_iter().collect();
        messages.iter().for_each(|message| message.each_text(&mut |text| texts.push(text)));
        jinja.tools().iter().for_each(|tool| each_text(tool, &mut |text| texts.push(text)));
        let typed: Vec<&str> = tok.specials().filter(|special| texts.iter().any(|c| c.contains(special))).collect();
        if typed.is_empty() {
            return tok.encode(&self.render(messages, instruction)?, false);
        }
        // A message contains the text of special tokens. They go through the template in disguise, so that the special
        // tokens that the prompt has afterwards are the template's own.
        let disguise = Disguise::new(typed, texts.iter().copied());
        let hide = |text: &str| disguise.hide(text);
        let hidden: Vec<_> = messages.iter().map(|m| m.map_texts(&hide)).collect();
        let tools = jinja.tools().iter().map(|tool| map_texts(tool, &hide)).collect();
        let prompt = Self::Jinja(jinja.with_tools(tools)).render(&hidden, instruction.map(hide).as_deref())?;
        tok.encode_marked(&prompt, &disguise.marks)
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Aog => f.write_str("aog"),
            Self::AogInstructionFirst => f.write_str("aog-instruction-first"),
            Self::Jinja(jinja) => write!(f, "{}", jinja.path().display()),
            Self::Raw => f.write_str("raw"),
        }
    }
}

/// A conversation in the form that the presets need.
struct Dialogue<'a> {
    turns: Vec<(&'a str, &'a str)>,
    question: &'a str,
    instruction: &'a str,
    /// The beginning of the answer.
    begun: &'a str,
}

impl<'a> Dialogue<'a> {
    fn of(messages: &'a [Message], instruction: Option<&'a str>) -> Result<Self> {
        let (instruction, talk) = match messages {
            [system, talk @ ..] if is_system(system) => (system.content.as_str(), talk),
            talk => (instruction.unwrap_or(AOG_INSTRUCTION), talk),
        };
        let offset = messages.len() - talk.len();
        let (begun, talk) = match talk {
            [talk @ .., answer] if answer.begun && answer.role == "assistant" => (answer.content.as_str(), talk),
            talk => ("", talk),
        };
        if talk.is_empty() {
            return Err(no_message());
        }
        for (i, message) in talk.iter().enumerate() {
            let expected = ["user", "assistant"][i % 2];
            if message.role != expected {
                let (n, role) = (offset + i + 1, &message.role);
                return Err(Error::Input(format!("message {n} has role {role:?}, expected {expected:?}")));
            }
        }
        let Some((question, [])) = talk.chunks(2).next_back().and_then(|last| last.split_first()) else {
            return Err(Error::Input("the last message is an answer, expected a question to answer".into()));
        };
        let turns = talk.chunks_exact(2).map(|t| (t[0].content.as_str(), t[1].content.as_str())).collect();
        Ok(Self { turns, question: &question.content, instruction, begun })
    }

    /// The blocks of earlier turns, whose questions have the title `title`, and then what `last` makes of the question
    /// and the instruction's block.
    fn render(&self, title: &str, last: impl Fn(&str, &str) -> String) -> Result<String> {
        let turn = |&(q, a): &(&str, &str)| format!("### {title}:\n{q}\n\n### Response:\n{a}\n\n");
        let mut prompt: String = self.turns.iter().map(turn).collect();
        let instruction = match self.instruction {
            "" => String::new(),
            text => format!("### Instruction:\n{text}\n\n"),
        };
        prompt.push_str(&last(self.question, &instruction));
        prompt.push_str(self.begun);
        Ok(prompt)
    }
}

fn is_system(message: &Message) -> bool {
    matches!(message.role.as_str(), "system" | "developer")
}

fn no_message() -> Error {
    Error::Input("there is no message to answer".into())
}

/// Writes the texts of special tokens in such a way that they are not special.
struct Disguise<'a> {
    /// Special tokens, each with a character that no message contains.
    marks: Vec<(&'a str, char)>,
}

impl<'a> Disguise<'a> {
    fn new<'c>(mut specials: Vec<&'a str>, contents: impl Iterator<Item = &'c str> + Clone) -> Self {
        // The longest come first, since one may contain another.
        specials.sort_by_key(|s| (std::cmp::Reverse(s.len()), *s));
        // Private characters of plane 15, which have no meaning of their own.
        let unused = ('\u{F0000}'..='\u{FFFFD}').filter(|mark| !contents.clone().any(|c| c.contains(*mark)));
        Self { marks: specials.into_iter().zip(unused).collect() }
    }

    fn hide(&self, text: &str) -> String {
        self.marks
            .iter()
            .fold(text.to_string(), |text, (special, mark)| text.replace(special, mark.encode_utf8(&mut [0; 4])))
    }
}
