//! `aoji chat`: a conversation, on a terminal or from the lines of standard input.

use crate::{
    answer::{self, Answer},
    common::{self, GenerationConfig, ModelArgs, SamplingArgs},
    guesses::Guesses,
};
use aoji::{Engine, Error, FinishReason, Message, Result, SamplingDefaults, Session, Template, Turn};
use clap::{Args as _, FromArgMatches, error::ErrorKind};
use rustyline::{Cmd, DefaultEditor, KeyCode, KeyEvent, Modifiers, error::ReadlineError};
use serde::{Deserialize, Serialize};
use std::{
    env, fs,
    io::{self, IsTerminal},
    path::{Path, PathBuf},
};

const COMMANDS: &str = "\
/reset           begin a new conversation
/undo            take back the last question and its answer
/continue        continue the last answer where it was cut off
/regen           answer the last question again; with a temperature, with the next seed
/set KEY VALUE   change a setting; keys are the names of flags: /set temperature 0.7
/stats           speed of the last answer, size of the conversation
/save FILE       write the conversation to a file
/load FILE       continue a conversation from a file
/help            this list
/quit            end, as Ctrl-D does
Ctrl-C stops an answer, Alt-Enter begins a new line. A question that begins with / needs a space before it.";

/// Arguments of `aoji chat`.
#[derive(clap::Args)]
#[command(after_help = format!(
    "Commands:\n{COMMANDS}\n\nWhen standard input is not a terminal, each of its lines is a question or a command, and \
     the first error ends the conversation. Answers go to standard output, everything else to standard error."
))]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// aog, aog-instruction-first, raw or a .jinja file [default: the model's own, else aog]
    #[arg(long, value_name = "NAME")]
    template: Option<String>,
    /// Whether sampling as the model's author recommends it is the default for flags that are not given
    #[arg(long, value_name = "auto|none", default_value = "auto")]
    generation_config: GenerationConfig,
    /// Go on with the conversation in FILE, if it is there, and write it there at the end: with its keys and values, so that nothing
    /// is computed again
    #[arg(long, value_name = "FILE")]
    session: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

/// What `/set` can change.
#[derive(clap::Args, Clone)]
struct Settings {
    /// What the model is told in addition to the question [default: the template's own]
    #[arg(long, value_name = "TEXT")]
    instruction: Option<String>,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// A conversation in a file.
#[derive(Serialize, Deserialize)]
struct Saved {
    model: String,
    instruction: Option<String>,
    turns: Vec<Turn>,
}

struct Chat {
    model: String,
    engine: Engine,
    session: Session,
    template: Template,
    settings: Settings,
    /// What is used for settings that were not made.
    defaults: SamplingDefaults,
    /// What guesses from the start on: a model that guesses is opened there or never.
    guesses: Guesses,
    turns: Vec<Turn>,
    last: Option<Answer>,
}

/// Talks until the user ends it.
pub fn run(args: Args) -> Result<()> {
    let guesses = args.settings.sampling.guesses();
    let engine = args.model.open_with(&guesses)?;
    engine.tokenizer()?;
    let template = args.model.template(&engine, args.template.as_deref())?;
    let session = engine.session(engine.max_context())?;
    args.generation_config.announce(&engine, common::note);
    let defaults = args.generation_config.sampling(&engine);
    let (model, settings, turns) = (args.model.model, args.settings, Vec::new());
    let mut chat = Chat { model, engine, session, template, settings, defaults, guesses, turns, last: None };
    chat.check(&chat.settings)?;
    if let Some(path) = args.session.as_deref().filter(|path| path.exists()) {
        chat.resume(path)?;
    }
    common::catch_interrupt()?;
    let ended = if io::stdin().is_terminal() { chat.on_terminal() } else { chat.on_lines() };
    // what was said is kept, however it ended
    let kept = args.session.as_deref().map_or(Ok(()), |path| chat.keep(path));
    ended.and(kept)
}

impl Chat {
    fn on_terminal(&mut self) -> Result<()> {
        let failed = |e: ReadlineError| Error::Input(format!("the terminal cannot be read: {e}"));
        let config = rustyline::Config::builder().auto_add_history(true).max_history_size(1000).map_err(failed)?;
        let mut editor = DefaultEditor::with_config(config.build()).map_err(failed)?;
        editor.bind_sequence(KeyEvent(KeyCode::Enter, Modifiers::ALT), Cmd::Newline);
        let history = history_file();
        if let Some(path) = &history {
            // The file is absent the first time. Without it the arrow keys have no history, and nothing else is lost.
            editor.load_history(path).unwrap_or_else(|e| tracing::info!("{}: {e}", path.display()));
        }
        common::say(format_args!("/help lists the commands, Ctrl-D ends."));
        loop {
            let line = match editor.readline("> ") {
                Ok(line) => line,
                Err(ReadlineError::Interrupted) => {
                    common::say(format_args!("Ctrl-D ends."));
                    continue;
                }
                Err(ReadlineError::Eof) => return Ok(()),
                Err(e) => return Err(failed(e)),
            };
            if let Some(path) = &history {
                editor.append_history(path).unwrap_or_else(|e| tracing::info!("{}: {e}", path.display()));
            }
            match self.line(&line) {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(e) => common::print_error(&e),
            }
            common::clear_interrupt(); // it was for the answer
        }
    }

    fn on_lines(&mut self) -> Result<()> {
        for line in io::stdin().lines() {
            let line = line.map_err(|source| Error::Io { path: common::STDIN.into(), source })?;
            if !self.line(&line)? || common::interrupted() {
                break;
            }
        }
        Ok(())
    }

    /// Does what a line asks for; `false` ends the conversation.
    fn line(&mut self, line: &str) -> Result<bool> {
        let Some(command) = line.strip_prefix('/') else {
            if !line.trim().is_empty() {
                self.ask(line.trim())?;
            }
            return Ok(true);
        };
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let rest = rest.trim();
        match name {
            "reset" => self.turns.clear(),
            "undo" => self.last_turn().map(drop)?,
            "regen" => {
                let turn = self.last_turn()?;
                self.settings.sampling.next_seed();
                if let Err(e) = self.ask(&turn.question) {
                    self.turns.push(turn);
                    return Err(e);
                }
            }
            "continue" => {
                let turn = self.last_turn()?;
                if let Err(e) = self.answer(turn.clone()) {
                    self.turns.push(turn);
                    return Err(e);
                }
            }
            "set" => self.set(rest)?,
            "stats" => self.stats(),
            "save" => self.save(file(rest)?)?,
            "load" => self.load(file(rest)?)?,
            "help" => common::say(format_args!("{COMMANDS}")),
            "quit" => return Ok(false),
            _ => return Err(Error::Input(format!("there is no command /{name}; /help lists them"))),
        }
        Ok(true)
    }

    fn ask(&mut self, question: &str) -> Result<()> {
        self.answer(Turn { question: question.into(), answer: String::new() })
    }

    /// Writes the answer of a turn, or continues it.
    fn answer(&mut self, mut turn: Turn) -> Result<()> {
        let mut messages = Message::conversation(&self.turns, &turn.question);
        // If an answer was cut in the middle of a character, the model writes the whole character.
        turn.answer.truncate(turn.answer.trim_end_matches(char::REPLACEMENT_CHARACTER).len());
        messages.extend(Some(&turn.answer).filter(|begun| !begun.is_empty()).map(Message::begun));
        let prompt = self.template.encode(self.engine.tokenizer()?, &messages, self.settings.instruction.as_deref())?;
        let options = self.settings.sampling.options(&self.defaults);
        let answer = answer::answer(&mut self.session, &prompt, &options, &mut common::print).inspect_err(|e| {
            if matches!(e, Error::Context { .. }) {
                let what = "The conversation does not fit the context: /undo takes back its end, /reset begins anew.";
                common::say(format_args!("{what}"));
            }
        })?;
        if !answer.text.ends_with('\n') {
            common::print("\n")?;
        }
        let full = prompt.len() + answer.token_ids.len() >= self.session.max_tokens();
        if full && answer.finish_reason == Some(FinishReason::Length) {
            common::say(format_args!("The context is full: /undo takes back this question, /reset begins anew."));
        }
        tracing::info!("{}", answer.summary());
        turn.answer.push_str(&answer.text);
        self.turns.push(turn);
        self.last = Some(answer);
        Ok(())
    }

    fn last_turn(&mut self) -> Result<Turn> {
        self.turns.pop().ok_or_else(|| Error::Input("there is no question yet".into()))
    }

    /// A setting is written like the flag of this name, so the flag's own parser reads it.
    fn set(&mut self, rest: &str) -> Result<()> {
        let command = clap::Command::new("set").no_binary_name(true).disable_help_flag(true);
        let command = Settings::augment_args_for_update(command);
        let keys: Vec<String> = command.get_arguments().filter_map(|a| Some(a.get_long()?.to_string())).collect();
        let Some((key, value)) = rest.split_once(char::is_whitespace) else {
            return Err(Error::Input(format!("usage: /set KEY VALUE; keys are {}", keys.join(", "))));
        };
        let mut settings = self.settings.clone();
        let changed = command
            .try_get_matches_from([format!("--{}={}", key.replace('_', "-"), value.trim())])
            .and_then(|mut matches| settings.update_from_arg_matches_mut(&mut matches));
        changed.map_err(|e| {
            if e.kind() == ErrorKind::UnknownArgument {
                return Error::Input(format!("there is no setting {key:?}; there are {}", keys.join(", ")));
            }
            let text = e.to_string();
            Error::Input(text.lines().next().unwrap_or_default().trim_start_matches("error: ").into())
        })?;
        self.check(&settings)?;
        self.settings = settings;
        Ok(())
    }

    fn check(&self, settings: &Settings) -> Result<()> {
        let guesses = settings.sampling.guesses();
        if let Guesses::Model(name) = &guesses
            && guesses != self.guesses
        {
            return Err(Error::Input(format!(
                "speculate model={name}: the model was not opened, which happens only at the start: `aoji chat --speculate model={name}`"
            )));
        }
        settings.sampling.options(&self.defaults).check(&self.engine)
    }

    fn stats(&self) {
        if let Some(answer) = &self.last {
            common::say(format_args!("{}", answer.summary()));
        }
        let (used, room) = (self.session.tokens().len(), self.session.max_tokens());
        common::say(format_args!("{} questions, {used} of {room} tokens of context", self.turns.len()));
    }

    /// The conversation as JSON.
    fn saved(&self) -> String {
        let (model, instruction) = (self.model.clone(), self.settings.instruction.clone());
        let saved = Saved { model, instruction, turns: self.turns.clone() };
        serde_json::to_string_pretty(&saved).expect("strings can be written as JSON") + "\n"
    }

    fn save(&self, path: &Path) -> Result<()> {
        fs::write(path, self.saved()).map_err(|source| Error::Io { path: path.into(), source })
    }

    fn load(&mut self, path: &Path) -> Result<()> {
        self.go_on(path, &common::read_file(path)?)
    }

    /// Writes conversation, keys and values, when something was said.
    fn keep(&mut self, path: &Path) -> Result<()> {
        if self.last.is_none() {
            return Ok(());
        }
        let saved = self.saved();
        self.session.save(path, &saved)
    }

    /// The way back.
    fn resume(&mut self, path: &Path) -> Result<()> {
        let saved = self.session.load(path)?;
        self.go_on(path, &saved)?;
        let (questions, tokens) = (self.turns.len(), self.session.tokens().len());
        common::note(format_args!("{}: {questions} questions, {tokens} tokens are computed", path.display()));
        Ok(())
    }

    /// The conversation that `text`, of a file, is.
    fn go_on(&mut self, path: &Path, text: &str) -> Result<()> {
        let wrong = |e| Error::File { path: path.into(), what: format!("not a saved conversation: {e}") };
        let saved: Saved = serde_json::from_str(text).map_err(wrong)?;
        if saved.model != self.model {
            common::say(format_args!("This conversation was with {}.", saved.model));
        }
        (self.turns, self.settings.instruction) = (saved.turns, saved.instruction);
        Ok(())
    }
}

fn file(name: &str) -> Result<&Path> {
    match name {
        "" => Err(Error::Input("the name of a file is missing".into())),
        name => Ok(Path::new(name)),
    }
}

/// `$XDG_STATE_HOME/aoji/history`; makes its directory. `None` if there is no such directory.
fn history_file() -> Option<PathBuf> {
    let state = env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|p| p.is_absolute());
    let dir = state.or_else(|| Some(Path::new(&env::var_os("HOME")?).join(".local/state")))?.join("aoji");
    fs::create_dir_all(&dir).ok()?;
    Some(dir.join("history"))
}
