//! GGUF files: what their keys mean, and every fault that they can have.

use crate::{
    gguf_file::{File, Val},
    gguf_vocabulary::with_tokenizer,
    tiny_gguf,
};
use aoji::{
    Config, Error, ModelFiles, Result, RopeScaling, Template, Tokenizer, Weights,
    gguf::{Gguf, Kind, Value as Key, read_header},
};
use proptest::prelude::*;
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
};

pub struct Place(tempfile::TempDir);

impl Place {
    pub fn new(file: &File) -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        fs::write(place.path(), file.bytes()).unwrap();
        place
    }

    pub fn path(&self) -> PathBuf {
        self.0.path().join("model.gguf")
    }

    pub fn open(&self) -> Result<ModelFiles> {
        ModelFiles::open(self.path().to_str().unwrap())
    }
}

/// A whole small model.
pub fn tiny() -> File {
    let dir = tempfile::tempdir().unwrap();
    tiny_gguf::model(dir.path(), &[2, 8], true)
}

#[track_caller]
pub fn refused(file: &File, words: &[&str]) {
    let error = Place::new(file).open().err().expect("must be refused");
    assert!(matches!(error, Error::File { .. } | Error::Tensor { .. } | Error::Unsupported { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("model.gguf"), "{text}");
    words.iter().for_each(|word| assert!(text.contains(word), "{text:?} lacks {word:?}"));
}

fn config(file: &File) -> Config {
    Gguf::open(&Place::new(file).path()).unwrap().config().unwrap()
}

#[test]
fn keys_are_the_configuration() {
    let c = config(&tiny());
    assert_eq!((c.dim, c.ffn_dim, c.n_layers, c.n_heads, c.n_kv_heads), (256, 512, 2, 4, 2));
    assert_eq!((c.head_dim, c.vocab, c.max_seq, c.norm_eps, c.rope_theta, c.tied), (64, 320, 128, 1e-5, 10000.0, true));
    assert_eq!((c.bos, c.eos.clone(), c.rope_scaling, c.rope_factors.len()), (None, vec![], None, 0));
    let mut file = tiny();
    file.set("llama.attention.head_count_kv", Val::I32s(vec![2, 2]));
    file.set("llama.rope.scaling.type", Val::Str("none")).set("llama.rope.scaling.factor", Val::F32(4.0));
    assert_eq!(config(&file), c);
    file.set("llama.attention.head_count_kv", Val::I32s(vec![2, 4]));
    refused(&file, &["llama.attention.head_count_kv differs between layers: 2, 4"]);
    file.set("llama.attention.head_count_kv", Val::I32s(vec![2; 3]));
    refused(&file, &["head_count_kv has 3 numbers, expected one for each of 2 layers"]);
    file.set("llama.attention.head_count_kv", Val::I32s((0..100_000).collect()));
    assert!(Place::new(&file).open().err().unwrap().to_string().len() < 300, "not the whole array");
}

#[test]
fn rope_factors_divide_the_frequencies() {
    let plain = config(&tiny()).rope_inv_freq();
    let factors: Vec<f32> = (0..32).map(|i| 1.0 + i as f32).collect();
    let with = |shape: Vec<usize>, kind, factors: &[f32]| {
        let mut file = tiny();
        let bytes = factors.iter().flat_map(|x| x.to_le_bytes()).collect();
        file.tensors.push(("rope_freqs.weight".into(), shape, kind, bytes));
        file
    };
    let file = with(vec![32], 0, &factors);
    let got = config(&file).rope_inv_freq();
    assert!(Place::new(&file).open().is_ok());
    assert!(got.iter().zip(&plain).zip(&factors).all(|((got, plain), factor)| *got == plain / factor));
    for (shape, kind) in [(vec![16], 0), (vec![64], 1), (vec![32, 1], 0), (vec![32], 8), (vec![], 0)] {
        let bytes: usize = if kind == 8 { 34 } else { shape.iter().product::<usize>() * if kind == 0 { 4 } else { 2 } };
        let mut file = tiny();
        file.tensors.push(("rope_freqs.weight".into(), shape, kind, vec![1; bytes]));
        refused(&file, &["rope_freqs.weight", "expected f32 [32]"]);
    }
    for wrong in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let factors = [&factors[..31], &[wrong]].concat();
        refused(&with(vec![32], 0, &factors), &["rope_freqs.weight", &wrong.to_string(), "positive"]);
    }
}

#[test]
fn what_is_no_llama_is_refused_by_name() {
    let with = |key: &str, value: Val, words: &[&str]| {
        let mut file = tiny();
        file.set(key, value);
        refused(&file, words);
    };
    with("general.architecture", Val::Str("gemma3"), &["\"gemma3\"", "supported: \"llama\", \"qwen2\", \"qwen3\""]);
    with("llama.expert_count", Val::U32(8), &["llama.expert_count is 8"]);
    with("llama.rope.dimension_count", Val::U32(32), &["llama.rope.dimension_count is 32", "64"]);
    with("llama.attention.value_length", Val::U32(32), &["value_length is 32"]);
    with("llama.rope.scaling.type", Val::Str("longrope"), &["longrope"]);
    with("llama.embedding_length", Val::U32(0), &["llama.embedding_length is 0"]);
    with("llama.embedding_length", Val::Str("x"), &["llama.embedding_length is \"x\"", "a number"]);
    with("llama.attention.head_count_kv", Val::U32(3), &["llama.attention.head_count_kv (3)"]);
    with("llama.block_count", Val::U32(3), &["blk.2.attn_q.weight", "no such tensor"]);
    with("llama.feed_forward_length", Val::U32(256), &["ffn_gate.weight", "[256, 256]", "[512, 256]"]);
    with("llama.attention.layer_norm_rms_epsilon", Val::F32(f32::NAN), &["layer_norm_rms_epsilon is NaN"]);
    with("tokenizer.ggml.model", Val::Str("t5"), &["\"t5\"", "\"gpt2\""]);
    for key in ["general.architecture", "llama.block_count", "llama.embedding_length", "llama.attention.head_count"] {
        let mut file = tiny();
        file.unset(key);
        refused(&file, &[key, "missing"]);
    }
}

#[test]
fn tensors_that_are_wrong() {
    let spoil = |spoil: &dyn Fn(&mut File), words: &[&str]| {
        let mut file = tiny();
        spoil(&mut file);
        refused(&file, words);
    };
    let types = ["Q4_0", "Q8_0", "Q6_K", "BF16"];
    for (id, name) in
        [(10, "type Q2_K"), (11, "type Q3_K"), (16, "IQ2_XXS"), (39, "MXFP4"), (34, "TQ1_0"), (999, "number 999")]
    {
        spoil(&|f| f.tensors[3].2 = id, &[&["blk.0.attn_k.weight", name], &types[..]].concat());
    }
    spoil(&|f| f.tensors[3].1 = vec![128, 128, 3], &["blk.0.attn_k.weight"]);
    spoil(&|f| f.tensors[3].1 = vec![1; 5], &["blk.0.attn_k.weight", "up to 4 dimensions"]);
    spoil(&|f| f.tensors[3].1 = vec![usize::MAX, usize::MAX], &["blk.0.attn_k.weight", "whole blocks"]);
    spoil(&|f| f.tensors[3].1 = vec![128, 250], &["blk.0.attn_k.weight", "whole blocks of Q4_0"]);
    spoil(&|f| f.tensors[1].2 = 8, &["blk.0.attn_norm.weight", "a vector of type F32", "Q8_0"]);
    spoil(&|f| f.tensors[3].0 = "blk.0.attn_q.weight".into(), &["blk.0.attn_q.weight", "each tensor once"]);
    spoil(&|f| f.tensors[3].0 = "blk.0.attn_x.weight".into(), &["blk.0.attn_k.weight", "no such tensor"]);
    let bias = |name: &str| (name.to_string(), vec![256], 0, vec![0; 1024]);
    spoil(&|f| f.tensors.push(bias("blk.0.attn_q.bias")), &["blk.0.attn_k.bias", "no such tensor"]);
    spoil(&|f| f.tensors.push(bias("blk.1.ffn_down.bias")), &["ffn_down.bias", "without biases"]);
    spoil(&|f| f.tensors.last_mut().unwrap().3.truncate(100), &["output_norm.weight", "truncated"]);
}

#[test]
fn headers_that_lie() {
    let no_file = |bytes: &[u8], word: &str| {
        let error = read_header(Path::new("x.gguf"), bytes).expect_err(word).to_string();
        assert!(error.contains("x.gguf") && error.contains(word), "{error:?} lacks {word:?}");
    };
    let whole = tiny().bytes();
    no_file(b"", "not a GGUF file");
    no_file(b"GGML\x03\0\0\0", "not a GGUF file");
    let with = |at: usize, value: &[u8], word: &str| {
        let mut bytes = whole.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        no_file(&bytes, word);
    };
    with(4, &1u32.to_le_bytes(), "version 1");
    with(4, &3u32.to_be_bytes(), "big-endian");
    with(8, &u64::MAX.to_le_bytes(), "tensors; aoji reads up to");
    with(8, &60_000u64.to_le_bytes(), "truncated");
    with(16, &1_000_000u64.to_le_bytes(), "1000000 keys");
    with(16, &4000u64.to_le_bytes(), "");
    with(24, &u64::MAX.to_le_bytes(), "needs 18446744073709551615 bytes");
    let key = |bytes: Vec<u8>, word: &str| {
        let mut file = File::default();
        file.set_raw("some.key", bytes);
        no_file(&file.bytes(), word);
    };
    let words = |words: &[u32]| words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
    key(words(&[99]), "type 99");
    key(words(&[9, 99, 0, 0]), "type 99");
    key(words(&[9, 9, 1, 0, 4, 0, 0]), "array of arrays");
    key(words(&[9, 4, u32::MAX, u32::MAX]), "claims 18446744073709551615 elements");
    key([words(&[7]), vec![2]].concat(), "expected 0 or 1");
    key([words(&[8, 2, 0]), vec![0xFF, 0xFE]].concat(), "\"some.key\" at byte");
    key([words(&[9, 8, 1, 0, 1, 0]), vec![0xFF]].concat(), "not UTF-8");
    let mut file = File::default();
    for alignment in [0u32, 3, 1 << 20] {
        file.set("general.alignment", Val::U32(alignment));
        no_file(&file.bytes(), "a power of 2");
    }
    let mut overlap = tiny();
    overlap.tensors.truncate(2);
    let mut bytes = overlap.bytes();
    let name = bytes.windows(22).position(|w| w == b"blk.0.attn_norm.weight").unwrap();
    bytes[name + 22 + 4 + 8 + 4..][..8].fill(0); // its offset: that of the embedding
    no_file(&bytes, "overlaps");
    bytes[name + 22 + 4 + 8 + 4] = 7;
    no_file(&bytes, "multiple of 32");
}

#[test]
fn keys_of_every_type() {
    let mut file = File::default();
    let scalar = |kind: u32, bytes: &[u8]| [&kind.to_le_bytes()[..], bytes].concat();
    file.set_raw("i8", scalar(1, &[0xFF])).set_raw("i16", scalar(3, &[1, 0])).set_raw("u16", scalar(2, &[1, 1]));
    file.set_raw("u64", scalar(10, &[1; 8])).set_raw("i64", scalar(11, &[0xFE; 8])).set_raw("u8", scalar(0, &[7]));
    file.set_raw("f64", scalar(12, &2.5f64.to_le_bytes())).set("list", Val::Strs(vec!["a".into(), "한".into()]));
    let bytes = file.bytes();
    let keys = read_header(Path::new("x"), &bytes).unwrap().keys;
    assert_eq!((&keys["i8"], &keys["i16"], &keys["u16"]), (&Key::Int(-1), &Key::Uint(1), &Key::Uint(257)));
    assert_eq!((&keys["f64"], &keys["u8"]), (&Key::Float(2.5), &Key::Uint(7)));
    assert!(matches!(&keys["list"], Key::Array(Kind::Str, 2, _)));
    // the same key twice
    let at = bytes.windows(2).position(|w| w == b"i8").unwrap();
    let mut twice = bytes.clone();
    twice[at..at + 2].copy_from_slice(b"u8");
    assert!(read_header(Path::new("x"), &twice).unwrap_err().to_string().contains("\"u8\" twice"));
}

/// Each type of scaling means the same as that scaling in a `config.json`.
#[test]
fn scaling_keys_reach_the_configuration() {
    let hugging_face = |scaling: Value| {
        let json = serde_json::json!({"model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
            "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": scaling});
        Config::from_json(Path::new("config.json"), &json.to_string(), None).unwrap()
    };
    let same = |keys: &[(&str, Val)], scaling: Value| {
        let mut file = tiny();
        for (key, value) in keys {
            let value = match value {
                Val::Str(text) => Val::Str(text),
                Val::U32(n) => Val::U32(*n),
                Val::F32(x) => Val::F32(*x),
                _ => unreachable!("no such value below"),
            };
            file.set(&format!("llama.rope.{key}"), value);
        }
        let (ours, theirs) = (config(&file), hugging_face(scaling.clone()));
        assert_eq!((ours.max_seq, ours.rope_scaling.is_some()), (theirs.max_seq, theirs.rope_scaling.is_some()));
        let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-6 * b.abs();
        assert!(ours.rope_inv_freq().iter().zip(&theirs.rope_inv_freq()).all(close), "{scaling}");
        assert!((ours.rope_attention_factor() - theirs.rope_attention_factor()).abs() < 1e-6, "{scaling}");
    };
    let json = |text: &str| serde_json::from_str::<Value>(text).unwrap();
    let linear = json(r#"{"rope_type": "linear", "factor": 4.0}"#);
    same(&[("scaling.type", Val::Str("linear")), ("scaling.factor", Val::F32(4.0))], linear.clone());
    same(&[("scaling.factor", Val::F32(4.0))], linear.clone());
    same(&[("scale_linear", Val::F32(4.0))], linear);
    same(&[("scaling.type", Val::Str("none")), ("scaling.factor", Val::F32(4.0))], Value::Null);
    same(&[("scaling.factor", Val::F32(0.0))], Value::Null);
    let yarn = [
        ("scaling.type", Val::Str("yarn")),
        ("scaling.factor", Val::F32(4.0)),
        ("scaling.original_context_length", Val::U32(64)),
    ];
    same(&yarn, json(r#"{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}"#));
    let [a, b, c] = yarn;
    let (fast, slow) = (("scaling.yarn_beta_fast", Val::F32(16.0)), ("scaling.yarn_beta_slow", Val::F32(2.0)));
    let factor = ("scaling.attn_factor", Val::F32(0.5));
    same(
        &[a, b, c, fast, slow, factor],
        json(
            r#"{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0,
                "beta_slow": 2.0, "attention_factor": 0.5693147180559945}"#,
        ),
    );
    let mut file = tiny();
    file.set("llama.rope.scaling.type", Val::Str("linear")).set("llama.rope.scaling.factor", Val::F32(1.0));
    assert_eq!(config(&file).rope_scaling, None::<RopeScaling>);
    file.set("llama.rope.scaling.type", Val::Str("dynamite"));
    refused(&file, &["dynamite"]);
}

#[test]
fn one_of_several_must_be_named() {
    let (dir, file) = (tempfile::tempdir().unwrap(), tiny().bytes());
    let open = || ModelFiles::open(dir.path().to_str().unwrap());
    fs::write(dir.path().join("a.gguf"), &file).unwrap();
    assert_eq!(open().unwrap().dir.unwrap(), dir.path().join("a.gguf"));
    fs::write(dir.path().join("b.gguf"), &file).unwrap();
    let error = open().err().unwrap().to_string();
    assert!(error.contains("several GGUF files") && error.contains("a.gguf") && error.contains("b.gguf"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..Default::default() })]

    /// With bytes changed anywhere in the header, or the file cut anywhere, there is an error, or a model of which
    /// every value can be read.
    #[test]
    fn no_file_panics(changes in prop::collection::vec((0usize..4000, any::<u8>()), 0..6), cut in prop::option::of(0usize..5000)) {
        static FILE: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(|| with_tokenizer().bytes());
        let mut bytes = FILE.clone();
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut);
        }
        let place = Place(tempfile::tempdir().unwrap());
        fs::write(place.path(), &bytes).unwrap();
        if let Ok(config) = Gguf::open(&place.path()).and_then(|gguf| gguf.config())
            && let Ok(weights) = Weights::open(&place.path(), &config)
        {
            for tensor in weights.tensors() {
                let mut row = vec![0f32; tensor.cols()];
                tensor.values(tensor.rows() - 1, &mut row);
            }
        }
        let _ = Tokenizer::from_dir(&place.path());
        let _ = Template::for_model(Some(&place.path()));
    }
}
