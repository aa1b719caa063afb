//! What the command reports about a model's files.

use super::{aoji, chat, command, feed, generate, short};
use serde_json::{Value, json};
use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

/// The demo model in a new directory, with some of its files replaced by these.
fn demo(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo")).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), dir.path().join(file.file_name())).unwrap();
    }
    files.iter().for_each(|(name, text)| fs::write(dir.path().join(name), text).unwrap());
    dir
}

#[test]
fn ids_of_another_vocabulary_are_named_and_ignored() {
    let dir = demo(&[("generation_config.json", r#"{"bos_token_id": 1, "eos_token_id": 2}"#)]);
    let model = dir.path().to_str().unwrap();

    let info = aoji(&["info", model]);
    let eos = info.stdout.lines().find(|line| line.starts_with("eos "));
    assert_eq!(eos, Some("eos           2047 \"<|end_of_text|>\""), "{}", info.stdout);
    for (key, id) in [("bos_token_id", 1), ("eos_token_id", 2)] {
        let warning = format!("generation_config.json: {key} {id} is \"");
        assert!(info.stderr.contains("WARN") && info.stderr.contains(&warning), "no {warning} in: {}", info.stderr);
    }
    assert_eq!(info.stderr.lines().count(), 2, "{}", info.stderr);

    let (question, answer) = short(20);
    let run = generate(&["-m", model, &question, "-v"]);
    assert_eq!((run.code, run.stdout), (Some(0), format!("{answer}\n")), "{}", run.stderr);
    assert!(run.stderr.contains(", eos 2047 \"<|end_of_text|>\"\n"), "{}", run.stderr);
    assert!(run.stderr.contains("eos_token_id 2 is"), "{}", run.stderr);
}

/// The published Llama 2 is such a model: its tokenizer has a token for padding, for which the model has no row.
#[test]
fn ids_beyond_the_vocabulary_are_named_and_only_their_use_is_refused() {
    let mut tokenizer: Value =
        serde_json::from_str(&fs::read_to_string("assets/demo/tokenizer.json").unwrap()).unwrap();
    let mut pad = tokenizer["added_tokens"][0].clone();
    (pad["id"], pad["content"]) = (json!(2048), json!("[PAD]"));
    tokenizer["added_tokens"].as_array_mut().unwrap().push(pad);
    let generation = r#"{"eos_token_id": [2047, 2048, 32000, -1], "pad_token_id": 2048}"#;
    let dir = demo(&[("tokenizer.json", &tokenizer.to_string()), ("generation_config.json", generation)]);
    let model = dir.path().to_str().unwrap();
    let (question, answer) = short(20);
    let run = generate(&["-m", model, &question]);
    assert_eq!((run.code, run.stdout), (Some(0), format!("{answer}\n")), "{}", run.stderr);
    for id in ["2048", "32000", "-1"] {
        let warning = format!("eos_token_id {id} is no token, vocab_size is 2048");
        assert!(run.stderr.contains(&warning), "no {warning} in {}", run.stderr);
    }
    let warning = "tokenizer.json: 1 tokens have ids from vocab_size 2048 on ([PAD])";
    assert!(run.stderr.contains(warning), "{}", run.stderr);
    let info = aoji(&["info", model, "--json"]).stdout;
    let info: Value = serde_json::from_str(&info).unwrap();
    assert_eq!((&info["eos"], &info["tokenizer_vocab"]), (&json!([2047]), &json!(2049)));
    let refused = generate(&["-m", model, "--prompt", "하늘[PAD]"]);
    assert!(refused.code == Some(1) && refused.stderr.contains("token 2048 is not below the vocabulary's 2048"));
}

#[test]
fn the_authors_sampling_counts_where_it_is_asked_for() {
    let generation =
        r#"{"eos_token_id": 2047, "do_sample": true, "temperature": 1.5, "top_k": 50, "max_new_tokens": 9}"#;
    let dir = demo(&[("generation_config.json", generation)]);
    let model = dir.path().to_str().unwrap();
    let said = "temperature 1.5, top_k 50, max_new_tokens 9";
    let info = aoji(&["info", model]).ok();
    assert!(info.contains(&format!("sampling      {said}\n")), "{info}");

    let (question, _) = short(20);
    let flags = ["--temperature", "1.5", "--top-k", "50", "--max-tokens", "9", "--seed", "3"];
    let plain = generate(&["-m", model, &question]).ok();
    let by_flags = generate(&[&["-m", model, &question][..], &flags].concat()).ok();
    assert_ne!(plain, by_flags);
    let auto = ["-m", model, &question, "--generation-config", "auto", "--seed", "3"];
    let run = generate(&[&auto[..], &["-v"]].concat());
    assert_eq!(run.stdout, by_flags);
    assert!(run.stderr.contains(&format!("sampling of generation_config.json: {said}\n")), "{}", run.stderr);
    let greedy = generate(&[&auto[..], &["--temperature", "0", "--max-tokens", "1000"]].concat()).ok();
    assert_eq!(greedy, plain, "a flag counts more");

    // A conversation follows the author unless it is told not to.
    assert_eq!(chat(&["-m", model, "--seed", "3"], &[&question]).ok(), by_flags);
    assert_eq!(chat(&["-m", model, "--generation-config", "none"], &[&question]).ok(), plain);
}

/// Such files are written by Python and on Windows.
#[test]
fn numbers_of_python_and_byte_order_marks() {
    let dir = demo(&[("generation_config.json", r#"{"eos_token_id": 2047, "temperature": Infinity}"#)]);
    let (question, answer) = short(20);
    let run = generate(&["-m", dir.path().to_str().unwrap(), &question]);
    assert_eq!((run.code, run.stdout), (Some(0), format!("{answer}\n")), "{}", run.stderr);
    assert!(run.stderr.contains("temperature is \"Infinity\""), "{}", run.stderr);
    // That warning is coloured on a terminal, which `script` of util-linux is, and not for who wants none (no-color.org).
    let colored = |no_color: Option<&str>| {
        let line = format!("{} generate --device cpu -m {} 하늘", env!("CARGO_BIN_EXE_aoji"), dir.path().display());
        let mut command = Command::new("script");
        command.args(["-qec", &line, "/dev/null"]).env_remove("NO_COLOR").envs(no_color.map(|v| ("NO_COLOR", v)));
        let shown = String::from_utf8(command.output().expect("script runs").stdout).unwrap();
        assert!(shown.contains("WARN") && shown.contains("Infinity"), "{shown}");
        shown.contains("\u{1b}[33m")
    };
    assert_eq!([None, Some(""), Some("1")].map(colored), [true, true, false]);
    let lines = "{\"text\": \"하늘\"}\n{\"text\": \"하늘\"}\n";
    let plain = feed(command(&["tokenize", "demo", "--jsonl"]), lines.as_bytes()).ok();
    assert_eq!(feed(command(&["tokenize", "demo", "--jsonl"]), format!("\u{feff}{lines}").as_bytes()).ok(), plain);
}

#[cfg(unix)]
#[test]
fn ctrl_c_leaves_nothing_of_what_was_being_written() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let mut command = command(&["synth", "--like", "llama3-8b", "--layers", "1", out.to_str().unwrap()]);
    let mut child = command.spawn().unwrap();
    let begin = Instant::now();
    let size = || fs::metadata(out.join("model.safetensors.incomplete")).map_or(0, |m| m.len());
    while size() == 0 {
        assert!(begin.elapsed() < Duration::from_secs(60), "nothing is written");
        assert!(!out.join("model.safetensors").exists(), "it has its name before it is whole");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(!out.exists(), "{:?}", fs::read_dir(&out).unwrap().collect::<Vec<_>>());
}

#[test]
fn a_forced_synth_replaces_a_model_and_nothing_else() {
    let (dir, like) = (tempfile::tempdir().unwrap(), demo(&[]));
    let out = dir.path().join("out");
    let (like, to) = (like.path().to_str().unwrap(), out.to_str().unwrap());
    let names = || {
        let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<String> = fs::read_dir(&out).unwrap().map(name).collect();
        names.sort();
        names
    };
    let synth = |args: &[&str]| aoji(&[&["synth", "--like", like], args, &[to]].concat());
    synth(&["--shard-size", "1M"]).ok();
    let before = names();
    assert!(before.iter().filter(|name| name.ends_with(".safetensors")).count() > 1, "{before:?}");
    synth(&[]).fails(1, &["is not empty"]);
    assert_eq!(names(), before);
    synth(&["--force"]).ok();
    let files =
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    assert_eq!(names(), files);
    assert_eq!(aoji(&["info", to, "--json"]).json()["shards"], 1);
    fs::write(out.join("notes.txt"), "mine").unwrap();
    let before = names();
    synth(&["--force"]).fails(1, &["notes.txt is not a file of a model"]);
    assert_eq!(names(), before);
}
