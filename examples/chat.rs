//! A conversation with the embedded model, one question per line, until a line is empty: `cargo run --release --example chat`.
//!
//! Each prompt is the whole conversation so far. The session keeps what it has computed, so only the part that differs is computed.
//! In the embedded model's template the instruction follows the last question, so that part begins after the question before.

use aoji::{Engine, Event, GenerateOptions, Message, Options, Turn};
use std::io::{Write, stdin, stdout};

fn main() -> aoji::Result<()> {
    let engine = Engine::open("demo", &Options::default())?;
    let mut session = engine.session(engine.max_context())?;
    let mut turns: Vec<Turn> = Vec::new();
    for question in stdin().lines().map_while(Result::ok).take_while(|line| !line.is_empty()) {
        let messages = Message::conversation(&turns, &question);
        let prompt = engine.template().encode(engine.tokenizer()?, &messages, None)?;
        let mut answer = String::new();
        for event in session.generate(&prompt, &GenerateOptions::default())? {
            match event? {
                Event::Text(piece) => {
                    print!("{piece}");
                    let _ = stdout().flush();
                    answer.push_str(&piece);
                }
                Event::Finish(_, t) => println!("\n[{} of {} tokens reused]", t.reused_tokens, t.prompt_tokens),
                Event::Token(_) => {}
            }
        }
        turns.push(Turn { question, answer });
    }
    Ok(())
}
