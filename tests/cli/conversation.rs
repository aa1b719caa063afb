//! Conversations: read from lines, with settings, and continued later.

use super::{aoji, chat, generate, known, short};
use serde_json::Value;
use std::fs;

#[test]
fn a_conversation_from_lines() {
    let talks = known().into_iter().filter(|turns| turns.len() == 2);
    let two = talks.min_by_key(|turns| turns[0].1.len() + turns[1].1.len()).expect("the list has a conversation");
    let [(q1, a1), (q2, a2)] = [&two[0], &two[1]];
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("talk.json");
    let (save, load) = (format!("/save {}", file.display()), format!("/load {}", file.display()));
    let run = chat(&[], &[q1, "", q2, &save, "/stats", "/quit", "never asked"]);
    assert_eq!((run.code, run.stdout), (Some(0), format!("{a1}\n{a2}\n")), "{}", run.stderr);
    assert!(run.stderr.contains("2 questions") && run.stderr.contains("tokens/s"), "{}", run.stderr);
    let saved: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!((saved["model"].as_str(), saved["turns"][1]["answer"].as_str()), (Some("demo"), Some(a2.as_str())));
    // Taken up again, the last question once more.
    let run = chat(&[], &[&load, "/undo", q2]);
    assert_eq!((run.code, run.stdout), (Some(0), format!("{a2}\n")), "{}", run.stderr);
}

#[test]
fn a_conversation_is_kept_with_its_keys_and_values() {
    let talks = known().into_iter().filter(|turns| turns.len() == 2);
    let two = talks.min_by_key(|turns| turns[0].1.len() + turns[1].1.len()).expect("the list has a conversation");
    let [(q1, a1), (q2, a2)] = [&two[0], &two[1]];
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("talk.session");
    let with = |lines: &[&str]| chat(&["--session", file.to_str().unwrap()], lines);
    assert_eq!(with(&[q1]).ok(), format!("{a1}\n"));
    let run = with(&["/stats", q2]);
    assert_eq!((run.code, run.stdout), (Some(0), format!("{a2}\n")), "{}", run.stderr);
    assert!(run.stderr.contains("1 questions,"), "{}", run.stderr);
    let run = with(&["/stats"]); // nothing is said: the file stays as it is
    assert!(run.stderr.contains("2 questions,"), "{}", run.stderr);
    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..whole.len() - 9]).unwrap();
    with(&[q2]).fails(1, &["talk.session", "truncated"]);
    assert_eq!(fs::read(&file).unwrap().len(), whole.len() - 9, "nothing is written over what cannot be read");
}

#[test]
fn settings_of_a_conversation() {
    let (question, answer) = short(20);
    let cut = generate(&[&question, "--max-tokens", "3"]).ok();
    let run =
        chat(&["--max-tokens", "2"], &["/set max_tokens 3", &question, "/reset", "/set max-tokens 100", &question]);
    assert_eq!((run.code, run.stdout), (Some(0), format!("{cut}{answer}\n")), "{}", run.stderr);
    let instruction = generate(&[&question, "--instruction", "한 단어로 답하자.", "--max-tokens", "5"]).ok();
    let told = chat(&["--max-tokens", "5"], &["/set instruction 한 단어로 답하자.", &question]).ok();
    assert_eq!(told, instruction);
    let help = chat(&[], &["/help"]).stderr;
    for name in ["/reset", "/undo", "/regen", "/set", "/stats", "/save", "/load", "/help", "/quit"] {
        assert!(help.contains(name), "no {name} in: {help}");
    }
    for (line, said) in [
        ("/set", "/set KEY VALUE"),
        ("/set temprature 1", "temprature"),
        ("/set temperature warm", "warm"),
        ("/set top_p 2", "top_p is 2"),
        ("/set speculate model=demo", "aoji chat --speculate model=demo"),
        ("/undo", "no question"),
        ("/regen", "no question"),
        ("/save", "file"),
        ("/load /nonexistent/talk", "/nonexistent/talk"),
        ("/dance", "/dance"),
    ] {
        chat(&[], &[line, &question]).fails(1, &[said]);
    }
    // What is wrong from the start on is said before the first question.
    chat(&["--stop", ""], &[]).fails(1, &["stop string 1 is empty"]);
    chat(&["--min-tokens", "3", "--max-tokens", "2"], &[]).fails(1, &["min_tokens is 3"]);
    // A model that was opened at the start can be set aside and asked again; another one cannot.
    let with_draft = ["--speculate", "model=demo", "--max-tokens", "3"];
    let lines = ["/set speculate off", "/set speculate ngram", "/set speculate model=demo", &question];
    assert_eq!(chat(&with_draft, &lines).ok(), cut);
    chat(&with_draft, &["/set speculate model=other"]).fails(1, &["aoji chat --speculate model=other"]);
}

#[test]
fn a_conversation_that_outgrows_the_context_says_so() {
    let long = "피보나치 ".repeat(60);
    let run = chat(&["--context", "64"], &[&long]);
    assert_eq!((run.code, run.stdout.as_str()), (Some(1), ""));
    assert!(run.stderr.contains("/reset") && run.stderr.contains("context of 64 tokens"), "{}", run.stderr);
    let (question, _) = short(20);
    let full = chat(&["--context", "64", "--ignore-eos"], &[&question]);
    assert!(full.code == Some(0) && full.stderr.contains("The context is full"), "{}", full.stderr);
}

#[test]
fn an_answer_can_be_begun_and_gone_on_with() {
    let (question, answer) = short(20);
    let cut = answer.find(' ').expect("several words"); // where a token ends
    let (start, rest) = answer.split_at(cut);
    assert_eq!(generate(&[&question, "--answer-start", start]).ok(), format!("{rest}\n"));
    aoji(&["generate", "--prompt", "a", "--answer-start", "b"]).fails(2, &["--answer-start"]);
    // An answer that was cut off goes on where it ended.
    let run = chat(&["--max-tokens", "4"], &[&question, "/set max-tokens 1000", "/continue", "/save /dev/stdout"]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let saved: Value =
        serde_json::from_str(&run.stdout[run.stdout.find("{\n").expect("a saved conversation")..]).unwrap();
    assert_eq!(saved["turns"], serde_json::json!([{"question": question, "answer": answer}]));
    chat(&[], &["/continue"]).fails(1, &["no question yet"]);
}
