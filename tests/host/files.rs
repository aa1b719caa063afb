//! Checkpoints on disk: every fault is refused with an error that names the file, the tensor, what was expected and what was found.

mod shards;

use std::fs;
use std::path::{Path, PathBuf};

use aoji::weights::read_header;
use aoji::{Config, Dtype, Error, Result, Weights};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

/// A checkpoint of two layers in a temporary directory, to be spoiled in one way.
struct Checkpoint {
    dir: tempfile::TempDir,
    config: Config,
}

/// One tensor to write: name, dtype, shape, data.
#[derive(Clone)]
struct Item {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    data: Vec<u8>,
}

impl Item {
    fn f32(name: &str, shape: &[usize]) -> Item {
        let n: usize = shape.iter().product();
        let data = (0..n).flat_map(|i| (i as f32).to_le_bytes()).collect();
        Item { name: name.into(), dtype: "F32", shape: shape.into(), data }
    }
}

/// The bytes of a safetensors file with these tensors in this order; `spoil` may change the header before it is
/// written.
fn file_bytes(items: &[Item], spoil: impl FnOnce(&mut Map<String, Value>)) -> Vec<u8> {
    let mut header = Map::from_iter([("__metadata__".to_string(), json!({"format": "pt"}))]);
    let mut end = 0;
    for item in items {
        let start = end;
        end += item.data.len();
        header
            .insert(item.name.clone(), json!({"dtype": item.dtype, "shape": item.shape, "data_offsets": [start, end]}));
    }
    spoil(&mut header);
    with_header(&Value::Object(header).to_string(), &items.iter().flat_map(|i| i.data.clone()).collect::<Vec<_>>())
}

fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

impl Checkpoint {
    fn new(tied: bool) -> Checkpoint {
        let json = json!({
            "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 16, "tie_word_embeddings": tied
        });
        let config = Config::from_json(Path::new("config.json"), &json.to_string(), None).unwrap();
        Checkpoint { dir: tempfile::tempdir().unwrap(), config }
    }

    /// The right tensors, sorted by name.
    fn items(&self) -> Vec<Item> {
        let mut items = Vec::new();
        Weights::table(&self.config, |name, shape| {
            items.push(Item::f32(&name, shape));
            Ok(())
        })
        .unwrap();
        items.sort_by(|a, b| a.name.cmp(&b.name));
        items
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> &Checkpoint {
        fs::write(self.path(name), bytes).unwrap();
        self
    }

    fn open(&self) -> Result<Weights> {
        Weights::open(self.dir.path(), &self.config)
    }

    fn open_items(&self, items: &[Item]) -> Result<Weights> {
        self.write("model.safetensors", file_bytes(items, |_| {})).open()
    }

    /// Two shards and an index: `a.safetensors` has the first half of the tensors.
    fn write_shards(&self) -> Map<String, Value> {
        let items = self.items();
        let (a, b) = items.split_at(items.len() / 2);
        self.write("a.safetensors", file_bytes(a, |_| {})).write("b.safetensors", file_bytes(b, |_| {}));
        let place = |items: &[Item], file: &str| {
            items.iter().map(|i| (i.name.clone(), json!(file))).collect::<Vec<(String, Value)>>()
        };
        let map: Map<String, Value> = place(a, "a.safetensors").into_iter().chain(place(b, "b.safetensors")).collect();
        self.write_index(&map);
        map
    }

    fn write_index(&self, map: &Map<String, Value>) {
        self.write("model.safetensors.index.json", json!({"metadata": {}, "weight_map": map}).to_string());
    }
}

/// Asserts a refusal whose text has all of `words`.
#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T>, words: &[&str]) {
    let error = result.expect_err("must be refused");
    assert!(matches!(error, Error::File { .. } | Error::Tensor { .. }), "{error:?}");
    let text = error.to_string();
    for word in words {
        assert!(text.contains(word), "{text:?} lacks {word:?}");
    }
}

const WQ: &str = "model.layers.1.self_attn.q_proj.weight";

#[test]
fn opens_one_file() {
    for tied in [false, true] {
        let checkpoint = Checkpoint::new(tied);
        let weights = checkpoint.open_items(&checkpoint.items()).unwrap();
        assert_eq!(weights.layers.len(), 2);
        let wq = &weights.layers[1].wq;
        assert_eq!((wq.name(), wq.rows(), wq.cols(), wq.dtype()), (WQ, 8, 8, Dtype::F32));
        assert_eq!(wq.bytes()[4..8], 1f32.to_le_bytes());
        let file = fs::read(wq.file()).unwrap();
        assert_eq!(&file[wq.offset()..][..wq.bytes().len()], wq.bytes());
        assert_eq!((weights.final_norm.rows(), weights.final_norm.cols()), (1, 8));
        assert_eq!(weights.lm_head.name() == weights.embed.name(), tied);
        assert_eq!(weights.bytes(), checkpoint.config.params() * 4);
        assert_eq!(weights.tensors().count(), checkpoint.items().len());
    }
}

#[test]
fn opens_shards() {
    let checkpoint = Checkpoint::new(false);
    checkpoint.write_shards();
    let weights = checkpoint.open().unwrap();
    assert_eq!(weights.bytes(), checkpoint.config.params() * 4);
    for tensor in weights.tensors() {
        assert!(tensor.file().ends_with(["a.safetensors", "b.safetensors"][tensor.shard()]));
    }
}

#[test]
fn opens_embedded_bytes() {
    let checkpoint = Checkpoint::new(true);
    let bytes: &'static [u8] = file_bytes(&checkpoint.items(), |_| {}).leak();
    let weights = Weights::embedded(bytes, &checkpoint.config).unwrap();
    assert_eq!(weights.bytes(), checkpoint.config.params() * 4);
    refused(Weights::embedded(&bytes[..bytes.len() - 1], &checkpoint.config), &["<embedded>", "truncated"]);
}

#[test]
fn dtypes_may_be_mixed() {
    let checkpoint = Checkpoint::new(true);
    let mut items = checkpoint.items();
    for (item, dtype) in items.iter_mut().zip(["BF16", "F16", "F32", "BF16"]) {
        item.dtype = dtype;
        item.data.truncate(item.data.len() / if dtype == "F32" { 1 } else { 2 });
    }
    let weights = checkpoint.open_items(&items).unwrap();
    assert_eq!(weights.embed.dtype(), Dtype::Bf16);
    assert_eq!(weights.layers[0].attn_norm.dtype(), Dtype::F16);
}

#[test]
fn unaligned_data_is_readable() {
    let checkpoint = Checkpoint::new(true);
    let items = checkpoint.items();
    let data: Vec<u8> = items.iter().flat_map(|i| i.data.clone()).collect();
    let bytes = file_bytes(&items, |_| {});
    let mut header = String::from_utf8(bytes[8..bytes.len() - data.len()].to_vec()).unwrap();
    header.push_str(if header.len().is_multiple_of(2) { " " } else { "" });
    let weights = checkpoint.write("model.safetensors", with_header(&header, &data)).open().unwrap();
    assert_eq!(weights.embed.offset() % 2, 1);
    assert_eq!(weights.embed.bytes()[4..8], 1f32.to_le_bytes());
}

#[test]
fn files_may_be_symbolic_links() {
    let checkpoint = Checkpoint::new(true);
    let blobs = tempfile::tempdir().unwrap();
    fs::write(blobs.path().join("blob"), file_bytes(&checkpoint.items(), |_| {})).unwrap();
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(blobs.path().join("blob"), checkpoint.path("model.safetensors")).unwrap();
        assert!(checkpoint.open().is_ok());
    }
}

#[test]
fn rotary_tables_and_a_copied_head_are_tolerated() {
    let checkpoint = Checkpoint::new(true);
    let mut items = checkpoint.items();
    items.push(Item::f32("model.layers.0.self_attn.rotary_emb.inv_freq", &[2]));
    items.push(Item { name: "lm_head.weight".into(), ..items[0].clone() });
    assert_eq!(items[0].name, "model.embed_tokens.weight");
    let weights = checkpoint.open_items(&items).unwrap();
    assert_eq!(weights.lm_head.name(), "model.embed_tokens.weight");
}

#[test]
fn tied_but_the_head_differs() {
    let checkpoint = Checkpoint::new(true);
    let mut items = checkpoint.items();
    let mut head = Item { name: "lm_head.weight".into(), ..items[0].clone() };
    *head.data.last_mut().unwrap() ^= 1;
    items.push(head);
    refused(checkpoint.open_items(&items), &["lm_head.weight", "copy of model.embed_tokens", "tie_word_embeddings"]);
    items.last_mut().unwrap().shape = vec![8, 8];
    items.last_mut().unwrap().data.truncate(256);
    refused(checkpoint.open_items(&items), &["lm_head.weight", "[8, 8]"]);
}

#[test]
fn missing_tensor() {
    for name in [WQ, "lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"] {
        let checkpoint = Checkpoint::new(false);
        let items: Vec<Item> = checkpoint.items().into_iter().filter(|i| i.name != name).collect();
        refused(checkpoint.open_items(&items), &["model.safetensors", name, "expected", "no such tensor"]);
    }
}

#[test]
fn extra_tensor() {
    let extras = ["model.layers.2.input_layernorm.weight", "model.layers.0.self_attn.q_proj.bias", "other"];
    for name in extras {
        let checkpoint = Checkpoint::new(true);
        let mut items = checkpoint.items();
        items.push(Item::f32(name, &[8]));
        refused(
            checkpoint.open_items(&items),
            &["model.safetensors", name, "2 layers of LlamaForCausalLM, without biases", "F32 [8]"],
        );
    }
}

#[test]
fn wrong_shape() {
    for shape in [vec![8, 4], vec![64], vec![8, 8, 1], vec![]] {
        let checkpoint = Checkpoint::new(true);
        let mut items = checkpoint.items();
        let item = items.iter_mut().find(|i| i.name == WQ).unwrap();
        *item = Item::f32(WQ, &shape);
        let found = format!("found shape {shape:?}");
        refused(checkpoint.open_items(&items), &["model.safetensors", WQ, "[8, 8]", "config.json", &found]);
    }
}

#[test]
fn config_contradicts_weights() {
    let mut checkpoint = Checkpoint::new(true);
    let items = checkpoint.items();
    checkpoint.config.vocab = 17;
    refused(checkpoint.open_items(&items), &["embed_tokens", "expected shape [17, 8]", "found shape [16, 8]"]);
    checkpoint.config.vocab = 16;
    checkpoint.config.n_layers = 3;
    refused(checkpoint.open_items(&items), &["model.layers.2.", "no such tensor"]);
    checkpoint.config.n_layers = 1;
    refused(checkpoint.open_items(&items), &["model.layers.1.", "1 layers of LlamaForCausalLM"]);
    checkpoint.config.n_layers = 2;
    checkpoint.config.tied = false;
    refused(checkpoint.open_items(&items), &["lm_head.weight", "[16, 8]", "no such tensor"]);
}

#[test]
fn wrong_dtype() {
    let checkpoint = Checkpoint::new(true);
    let mut items = checkpoint.items();
    items.iter_mut().find(|i| i.name == WQ).unwrap().dtype = "I32";
    refused(checkpoint.open_items(&items), &["model.safetensors", WQ, "BF16, F16 or F32", "dtype I32"]);
    items.iter_mut().find(|i| i.name == WQ).unwrap().dtype = "F31";
    refused(checkpoint.open_items(&items), &["model.safetensors", WQ, "F31"]);
}

#[test]
fn no_weights() {
    let checkpoint = Checkpoint::new(true);
    refused(checkpoint.open(), &["model.safetensors", "model.safetensors.index.json"]);
    checkpoint.write("pytorch_model.bin", "PK");
    refused(checkpoint.open(), &["pytorch_model.bin"]);
}

#[test]
fn not_a_regular_file() {
    let checkpoint = Checkpoint::new(true);
    fs::create_dir(checkpoint.path("model.safetensors")).unwrap();
    refused(checkpoint.open(), &["model.safetensors", "not a regular file"]);
}

#[test]
fn empty_file() {
    refused(Checkpoint::new(true).write("model.safetensors", "").open(), &["model.safetensors", "empty"]);
}

#[test]
fn not_safetensors() {
    let cases: [(&[u8], &str); 9] = [
        (b"abc", "3 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"GGUF\x03\x00\x00\x00\x00\x00", "GGUF"),
        (b"PK\x03\x04\x00\x00\x08\x08\x00\x00", "PyTorch"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 ", "pickle"),
        (b"<!DOCTYPE html>", "HTML"),
        (b"hello, world", "not a safetensors file: it claims a header of"),
        (b"\x02\0\0\0\0\0\0\0[]", "does not begin with `{`"),
        (b"\x03\0\0\0\0\0\0\0{\xff}", "not JSON"),
    ];
    for (bytes, word) in cases {
        let checkpoint = Checkpoint::new(true);
        refused(checkpoint.write("model.safetensors", bytes).open(), &["model.safetensors", word]);
    }
}

#[test]
fn truncated_at_every_length() {
    let checkpoint = Checkpoint::new(true);
    let bytes = file_bytes(&checkpoint.items(), |_| {});
    for end in (0..bytes.len()).step_by(7) {
        refused(read_header(Path::new("f"), &bytes[..end]), &["f"]);
    }
    let short = &bytes[..bytes.len() - 1];
    refused(
        checkpoint.write("model.safetensors", short).open(),
        &["model.safetensors", "model.norm.weight", "truncated"],
    );
}

#[test]
fn bytes_after_the_last_tensor() {
    let checkpoint = Checkpoint::new(true);
    let mut bytes = file_bytes(&checkpoint.items(), |_| {});
    bytes.push(0);
    refused(checkpoint.write("model.safetensors", bytes).open(), &["bytes of data, but its tensors end at byte"]);
}

#[test]
fn header_length_past_the_end_or_absurd() {
    let mut bytes = file_bytes(&[], |_| {});
    for (length, word) in [(1000, "truncated"), (1 << 30, "claims"), (u64::MAX, "claims"), (u64::MAX - 7, "claims")] {
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        refused(read_header(Path::new("f"), &bytes), &[word]);
    }
}

/// A header with two tensors of 8 bytes, the second one's entry replaced.
#[track_caller]
fn lying_header(second: Value, words: &[&str]) {
    let items = [Item::f32("a", &[2]), Item::f32("b", &[2])];
    let bytes = file_bytes(&items, |header| {
        header.insert("b".into(), second);
    });
    refused(read_header(Path::new("f"), &bytes), &[words, &["f: tensor"]].concat());
}

#[test]
fn offset_past_the_end() {
    lying_header(json!({"dtype": "F32", "shape": [3], "data_offsets": [8, 20]}), &["b", "8..20", "16 bytes"]);
}

#[test]
fn overlapping_tensors() {
    lying_header(json!({"dtype": "F32", "shape": [3], "data_offsets": [4, 16]}), &["b", "offset 8", "overlaps a"]);
}

#[test]
fn hole_between_tensors() {
    lying_header(json!({"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}), &["b", "offset 8", "hole after a"]);
}

#[test]
fn offsets_that_contradict_the_shape() {
    lying_header(json!({"dtype": "F32", "shape": [1], "data_offsets": [8, 16]}), &["b", "4 bytes", "8..16"]);
    lying_header(json!({"dtype": "F32", "shape": [2], "data_offsets": [16, 8]}), &["b", "8 bytes", "16..8"]);
}

#[test]
fn overflowing_shape_and_offsets() {
    let max = usize::MAX;
    lying_header(json!({"dtype": "F32", "shape": [max, max], "data_offsets": [8, 16]}), &["b", "F32"]);
    lying_header(json!({"dtype": "F32", "shape": [max], "data_offsets": [8, max]}), &["b", "F32"]);
    lying_header(json!({"dtype": "F4", "shape": [1], "data_offsets": [8, 8]}), &["b", "F4"]);
    // Eight tensors whose sizes sum to 2^64 - 8: adding the header to that overflows.
    let size = (1u64 << 61) - 1;
    let header: Map<String, Value> = (0..8u64)
        .map(|i| (i.to_string(), json!({"dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size]})))
        .collect();
    refused(read_header(Path::new("f"), &with_header(&Value::Object(header).to_string(), &[])), &["0 bytes of data"]);
}

#[test]
fn malformed_entries() {
    lying_header(json!(null), &["b"]);
    lying_header(json!({"dtype": "F32", "shape": [2]}), &["b", "data_offsets"]);
    lying_header(json!({"dtype": "F32", "shape": [-2], "data_offsets": [8, 16]}), &["b", "-2"]);
    lying_header(json!({"dtype": "F32", "shape": [2], "data_offsets": [8, 16, 24]}), &["b", "3"]);
    let bytes = with_header(r#"{"__metadata__": {"format": 1}}"#, &[]);
    refused(read_header(Path::new("f"), &bytes), &["__metadata__"]);
}

#[test]
fn stories260k() {
    let Some(dir) = crate::common::data("stories260K") else { return };
    let config = Config::from_dir(&dir).unwrap();
    let weights = Weights::open(&dir, &config).unwrap();
    assert_eq!((weights.layers.len(), weights.embed.rows(), weights.embed.cols()), (5, 512, 64));
    assert_eq!(weights.bytes(), config.params() * 4);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Arbitrary bytes never panic, and never pass where the `safetensors` crate refuses.
    #[test]
    fn arbitrary_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(read_header(Path::new("f"), &bytes).is_err() || safetensors::SafeTensors::deserialize(&bytes).is_ok());
    }

    /// The same for arbitrary tables, of which many are nearly right; and the two readers agree on them.
    #[test]
    fn arbitrary_tables(
        tensors in prop::collection::vec((0..4usize, prop::collection::vec(0..5usize, 0..3), -2..3i64, -2..3i64), 0..4),
        spoil in any::<bool>(),
        more in 0..2usize,
    ) {
        let mut header = Map::new();
        let mut end = 0;
        for (i, (dtype, shape, nudge_start, nudge_end)) in tensors.iter().enumerate() {
            let (name, size) = [("BF16", 2), ("F32", 4), ("U8", 1), ("F64", 8)][*dtype];
            let start = end;
            end += shape.iter().product::<usize>() * size;
            let nudge = |offset: usize, by: i64| offset as i64 + if spoil { by } else { 0 };
            let offsets = json!([nudge(start, *nudge_start), nudge(end, *nudge_end)]);
            header.insert(format!("t{i}"), json!({"dtype": name, "shape": shape, "data_offsets": offsets}));
        }
        let bytes = with_header(&Value::Object(header).to_string(), &vec![0; end + more]);
        let ours = read_header(Path::new("f"), &bytes);
        let theirs = safetensors::SafeTensors::deserialize(&bytes);
        prop_assert_eq!(ours.is_ok(), theirs.is_ok(), "ours {:?}, theirs {:?}", ours, theirs);
        prop_assert!(spoil || more > 0 || ours.is_ok());
        if let (Ok(entries), Ok(theirs)) = (ours, theirs) {
            prop_assert_eq!(entries.len(), tensors.len());
            for entry in entries {
                let view = theirs.tensor(&entry.name).unwrap();
                prop_assert_eq!(view.shape(), &entry.shape);
                prop_assert_eq!(view.dtype(), entry.dtype);
                prop_assert_eq!(view.data().as_ptr_range(), bytes[entry.range].as_ptr_range());
            }
        }
    }
}
