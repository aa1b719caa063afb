//! Ranks answers to a question by how likely the model finds them: `cargo run --release --example batch_score`.
//!
//! What the answers share is computed once: the question, and tokens with which several answers begin.

use aoji::{Engine, Message, Options};

fn main() -> aoji::Result<()> {
    let engine = Engine::open("demo", &Options::default())?;
    let tokenizer = engine.tokenizer()?;
    let question = [Message::new("user", "프랑스의 수도는 어디야?")];
    let prompt = engine.template().encode(tokenizer, &question, None)?;
    let answers = ["프랑스의 수도는 런던입니다.", "프랑스의 수도는 파리입니다.", "저는 잘 모르겠습니다."];
    let tokens = answers.iter().map(|answer| tokenizer.encode_plain(answer)).collect::<aoji::Result<Vec<_>>>()?;
    let scores = engine.score(&prompt, &tokens)?;

    // Longer texts are less likely; the mean over their tokens makes them comparable.
    let mean = |i: &usize| scores.continuations[*i].sum() / tokens[*i].len() as f64;
    let mut order: Vec<usize> = (0..answers.len()).collect();
    order.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
    for i in order {
        println!("{:8.3} a token  {}", mean(&i), answers[i]);
    }
    let asked: usize = tokens.iter().map(|t| prompt.len() + t.len()).sum();
    println!("{} tokens computed of {asked}", scores.computed);
    Ok(())
}
