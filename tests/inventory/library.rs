//! What a program may rely on that has the library inside it.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// `(path, text without comments and unit tests)` of each file below `dir` of src, without the command's.
fn code(dir: &str) -> Vec<(PathBuf, String)> {
    let (mut files, mut dirs) = (Vec::new(), vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(dir)]);
    while let Some(dir) = dirs.pop() {
        for path in fs::read_dir(dir).unwrap().map(|f| f.unwrap().path()) {
            if path.is_dir() {
                dirs.extend((!path.ends_with("src/bin")).then_some(path));
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                let text = text.split("#[cfg(test)]\nmod ").next().unwrap();
                let lines = text.lines().filter(|l| !l.trim_start().starts_with("//"));
                files.push((path, lines.collect::<Vec<_>>().join("\n")));
            }
        }
    }
    files
}

/// As the crate's documentation says.
#[test]
fn the_library_leaves_the_process_alone() {
    let forbidden = [
        "print!(",   // and eprint!
        "println!(", // and eprintln!
        "dbg!(",
        "stdout()",
        "stderr()",
        "process::exit",
        "process::abort",
        "set_hook",
        "ctrlc",
        "sigaction",
        "set_var(",
        "static mut ",
    ];
    let files = code("src");
    assert!(files.len() > 50, "{}", files.len());
    for (path, text) in files {
        let text = text.replace("&'static mut ", "");
        for what in forbidden {
            assert!(!text.contains(what), "{}: {what}", path.display());
        }
    }
}

/// The C interface is a shell: it uses what the crate offers everybody.
#[test]
fn the_c_interface_uses_the_public_interface() {
    let names = |list: &str| -> BTreeSet<String> {
        let words = list.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty());
        words.map(String::from).collect()
    };
    let lib = include_str!("../../src/lib.rs");
    let public: BTreeSet<String> = lib.lines().filter(|l| l.starts_with("pub use ")).flat_map(names).collect();
    for (path, text) in code("src/capi") {
        let uses = text.split(';').filter_map(|statement| statement.trim().strip_prefix("use crate::"));
        let used: BTreeSet<String> = uses.flat_map(names).collect();
        assert!(text.matches("crate::").count() == text.matches("\nuse crate::").count(), "{}", path.display());
        assert!(used.is_subset(&public), "{}: {:?}", path.display(), used.difference(&public));
    }
}
