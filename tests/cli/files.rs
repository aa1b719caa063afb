//! What the command says of a model's files.

use super::{aoji, generate, short};
use std::{fs, path::Path};

#[test]
fn ids_of_another_vocabulary_are_named_and_ignored() {
    let dir = tempfile::tempdir().unwrap();
    for file in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo")).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), dir.path().join(file.file_name())).unwrap();
    }
    fs::write(dir.path().join("generation_config.json"), r#"{"bos_token_id": 1, "eos_token_id": 2}"#).unwrap();
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
