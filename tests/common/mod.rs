//! Code that several test files share.
#![allow(dead_code)] // each test file uses a part of it

use std::path::{Path, PathBuf};

/// A file or directory of the test data: `$AOJI_TEST_DATA/name`, else `../shared/data/name` beside the repository.
/// `None`, with the reason printed, when it is not there.
pub fn data(name: &str) -> Option<PathBuf> {
    let root = match std::env::var_os("AOJI_TEST_DATA") {
        Some(root) => PathBuf::from(root),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data"),
    };
    let path = root.join(name);
    if path.exists() {
        return Some(path);
    }
    println!("skipped: no {} (set AOJI_TEST_DATA to the directory of test data)", path.display());
    None
}

/// A model directory of the test data with its weights: in the data itself, or made from it by `scripts/test-data` into
/// `target/test-data`. `None`, with the reason printed, when it is not there.
pub fn model(name: &str) -> Option<PathBuf> {
    let made = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/test-data").join(name);
    if made.join("config.json").exists() {
        return Some(made);
    }
    data(&format!("{name}/model.safetensors")).map(|p| p.parent().expect("a directory").to_path_buf())
}
