//! What a program that contains the library may rely on.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// `(path, text without comments and unit tests)` of each file below `dir` of src, without the command's.
fn code(dir: &str) -> Vec<(PathBuf, String)> {
    let (mut files, mut dirs) = (Vec::new(), vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(dir)]);
    while let Some(dir) = dirs.pop() {
        for path in fs::read_dir(dir).unwrap().map(|f| f.unwrap().path()) {
            if path.is_dir() {
                dirs.extend((!path.ends_with("src/bin") && !path.ends_with("tests")).then_some(path));
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

/// Checks what the crate's documentation promises.
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
