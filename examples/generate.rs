//! Answers a question with the embedded model: `cargo run --release --example generate -- "질문"`.

use aoji::{Engine, Event, GenerateOptions, Message, Options};
use std::io::Write;

fn main() -> aoji::Result<()> {
    let question = std::env::args().nth(1).unwrap_or_else(|| "넌 누구니?".into());
    let engine = Engine::open("demo", &Options::default())?;
    let prompt = engine.template().encode(engine.tokenizer()?, &[Message::new("user", question)], None)?;
    let mut session = engine.session(engine.max_context())?;
    for event in session.generate(&prompt, &GenerateOptions::default())? {
        match event? {
            Event::Text(piece) => {
                print!("{piece}");
                let _ = std::io::stdout().flush();
            }
            Event::Finish(reason, t) => println!("\n[{reason:?}, {:.1} tokens/s]", t.tokens_per_second()),
            Event::Token(_) => {}
        }
    }
    Ok(())
}
