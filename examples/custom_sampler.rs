//! Chooses tokens itself, by the logits: the most likely one if the model is sure, either of the first two if it is not.
//! `cargo run --release --example custom_sampler -- "질문"`
//!
//! The logits come to the host for each token, which costs some speed; what `Sampling` can express is done on the device.

use aoji::{Engine, Message, Options};

/// How much less likely than the first the second token may be, and still be chosen.
const WAVER: f32 = 0.2;

fn main() -> aoji::Result<()> {
    let question = std::env::args().nth(1).unwrap_or_else(|| "달이 뭐야?".into());
    let engine = Engine::open("demo", &Options::default())?;
    let (tokenizer, eos) = (engine.tokenizer()?, &engine.config().eos);
    let prompt = engine.template().encode(tokenizer, &[Message::new("user", question)], None)?;
    let mut session = engine.session(engine.max_context())?;
    session.sync(&prompt)?;

    let (mut text, mut wavered) = (tokenizer.stream(), 0); // a token may end within a character
    while session.tokens().len() < session.max_tokens() {
        let logits = session.logits()?;
        let [first, second] = two_largest(&logits);
        let waver = (logits[second] - logits[first]).exp() > WAVER; // the ratio of their probabilities
        wavered += usize::from(waver);
        let token = if waver && wavered % 2 == 0 { second } else { first } as u32;
        if eos.contains(&token) {
            break;
        }
        print!("{}", text.push(token).unwrap_or_default());
        session.step(token)?;
    }
    println!("{}\n[wavered {wavered} times]", text.finish().unwrap_or_default());
    Ok(())
}

fn two_largest(logits: &[f32]) -> [usize; 2] {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.select_nth_unstable_by(1, |a, b| logits[*b].total_cmp(&logits[*a]));
    [order[0], order[1]]
}
