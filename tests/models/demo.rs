//! The embedded demo model answers its list of questions, token for token.
//!
//! The test is teacher-forced: if each token of the listed answer is the most likely one after the tokens before it, greedy decoding
//! gives that answer. So the whole answer can be computed in one pass.

use aoji::{Activations, Device, Engine, Event, GenerateOptions, Message, Options, Turn};
use rayon::prelude::*;
use serde::Deserialize;

#[derive(Deserialize)]
struct Entry {
    topic: String,
    turns: Vec<Turn>,
}

fn entries() -> Vec<Entry> {
    let text = include_str!("../../assets/demo/questions.jsonl");
    text.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{l}: {e}"))).collect()
}

/// Prompt and answer of the last turn.
fn prompt(engine: &Engine, e: &Entry) -> (Vec<u32>, String) {
    let (last, before) = e.turns.split_last().expect("a turn");
    let messages = Message::conversation(before, &last.question);
    (engine.template().encode(engine.tokenizer().unwrap(), &messages, None).unwrap(), last.answer.clone())
}

fn check(activations: Activations, every: usize) {
    let options = Options { device: Device::Cpu, activations, ..Options::default() };
    let engine = Engine::open("demo", &options).unwrap();
    let entries = entries();
    assert!(entries.len() > 300, "{} questions", entries.len());
    let wrong = |e: &Entry| -> Option<String> {
        let (prompt, answer) = prompt(&engine, e);
        let mut ids = prompt.clone();
        ids.extend(engine.tokenizer().unwrap().encode(&answer, false).unwrap());
        ids.push(engine.config().eos[0]);
        let mut session = engine.session(ids.len()).unwrap();
        let mut wrong = None;
        let at = |i: usize| ids[i + 1];
        session
            .logits_of(&ids[..ids.len() - 1], prompt.len() - 1, &mut |i, logits| {
                if aoji::verify::argmax(logits) != at(i) && wrong.is_none() {
                    wrong = Some(format!("{}: {:?}: answer token {}", e.topic, e.turns.last().unwrap().question, i));
                }
            })
            .unwrap();
        wrong
    };
    let wrong: Vec<String> = entries.par_iter().step_by(every).filter_map(wrong).collect();
    assert!(wrong.is_empty(), "{} of {} answers differ: {:#?}", wrong.len(), entries.len() / every, wrong);
}

#[test]
fn answers_the_list_in_bf16() {
    check(Activations::Bf16, 1);
}

#[test]
fn answers_the_list_in_f32() {
    check(Activations::F32, 4);
}

/// One whole answer by free-running generation, on the device: the emulated one where there is no GPU.
#[cfg(feature = "cuda")]
#[test]
fn answers_on_the_device() {
    cuda_emulator::install();
    let engine = Engine::open("demo", &Options { device: Device::Cuda(0), ..Options::default() }).unwrap();
    let entries = entries();
    let shortest = entries.iter().filter(|e| e.turns.len() == 1).min_by_key(|e| e.turns[0].answer.len()).unwrap();
    let (prompt, answer) = prompt(&engine, shortest);
    let mut session = engine.session(prompt.len() + 64).unwrap();
    let mut text = String::new();
    for event in session.generate(&prompt, &GenerateOptions::default()).unwrap() {
        if let Event::Text(piece) = event.unwrap() {
            text.push_str(&piece);
        }
    }
    assert_eq!(text, answer);
}
