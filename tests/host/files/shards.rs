//! Checkpoints of several files: what the index says and what the files have.

use super::*;

#[test]
fn missing_shard() {
    let checkpoint = Checkpoint::new(false);
    checkpoint.write_shards();
    fs::remove_file(checkpoint.path("b.safetensors")).unwrap();
    refused(checkpoint.open(), &["b.safetensors", "missing", "index.json places"]);
}

#[test]
fn index_names_a_file_outside_the_directory() {
    let names =
        ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "..", ".", "", "a.safetensors/", "C:\\a", "\\\\s\\a"];
    for name in names {
        let checkpoint = Checkpoint::new(false);
        let mut map = checkpoint.write_shards();
        map.insert(WQ.into(), json!(name));
        checkpoint.write_index(&map);
        refused(checkpoint.open(), &["index.json", &format!("{name:?}"), "plain name"]);
    }
}

#[test]
fn index_that_is_malformed() {
    for text in ["", "[]", "{}", r#"{"weight_map": 1}"#, r#"{"weight_map": {"a": 1}}"#, r#"{"weight_map": {}}"#] {
        let checkpoint = Checkpoint::new(false);
        checkpoint.write_shards();
        refused(checkpoint.write("model.safetensors.index.json", text).open(), &["index.json"]);
    }
}

#[test]
fn index_contradicts_shards() {
    let checkpoint = Checkpoint::new(false);
    let map = checkpoint.write_shards();

    let mut moved = map.clone();
    moved.insert("lm_head.weight".into(), json!("b.safetensors"));
    checkpoint.write_index(&moved);
    refused(checkpoint.open(), &["b.safetensors", "lm_head.weight", "a.safetensors"]);
    let mut absent = map.clone();
    absent.insert(WQ.into(), json!("c.safetensors"));
    checkpoint.write_index(&absent);
    refused(checkpoint.open(), &["c.safetensors", "missing; model.safetensors.index.json places 1 tensors in it"]);
}

/// An index may be older than the rest: old ones name tensors that are now computed instead of stored.
#[test]
fn index_entries_of_what_is_not_needed_are_not_looked_for() {
    for tied in [false, true] {
        let checkpoint = Checkpoint::new(tied);
        let mut map = checkpoint.write_shards();
        let more = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.more", "model.layers.7.mlp.up_proj.weight"];
        for name in more.into_iter().chain(tied.then_some("lm_head.weight")) {
            map.insert(name.into(), json!("b.safetensors"));
            checkpoint.write_index(&map);
            checkpoint.open().unwrap_or_else(|e| panic!("{name}: {e}"));
            map.insert(name.into(), json!("absent.safetensors"));
            checkpoint.write_index(&map);
            checkpoint.open().unwrap_or_else(|e| panic!("{name} in a file that is not there: {e}"));
        }
    }
}

#[cfg(unix)]
#[test]
fn a_link_that_leads_nowhere_says_so() {
    let checkpoint = Checkpoint::new(false);
    checkpoint.write_shards();
    for file in ["b.safetensors", "model.safetensors.index.json", "model.safetensors"] {
        let _ = fs::remove_file(checkpoint.path(file));
        std::os::unix::fs::symlink("../../blobs/0123", checkpoint.path(file)).unwrap();
        refused(checkpoint.open(), &[file, "is a link to ../../blobs/0123, which is not there"]);
    }
}

#[test]
fn tensor_in_two_shards() {
    let checkpoint = Checkpoint::new(false);
    checkpoint.write_shards();
    let items = checkpoint.items();
    checkpoint.write("b.safetensors", file_bytes(&items, |_| {}));
    refused(checkpoint.open(), &["b.safetensors", "each tensor in one file", "a.safetensors as well"]);
}
