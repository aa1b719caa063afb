//! Of several files: what the index says and what the files have.

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

    let mut more = map.clone();
    more.insert("model.more".into(), json!("b.safetensors"));
    checkpoint.write_index(&more);
    refused(checkpoint.open(), &["b.safetensors", "model.more", "no such tensor"]);
}

#[test]
fn tensor_in_two_shards() {
    let checkpoint = Checkpoint::new(false);
    checkpoint.write_shards();
    let items = checkpoint.items();
    checkpoint.write("b.safetensors", file_bytes(&items, |_| {}));
    refused(checkpoint.open(), &["b.safetensors", "each tensor in one file", "a.safetensors as well"]);
}
