//! GGUF files: what their keys mean, and every way in which one can be wrong.

use crate::{
    common::data,
    gguf_file::{File, Val},
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

struct Place(tempfile::TempDir);

impl Place {
    fn new(file: &File) -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        fs::write(place.path(), file.bytes()).unwrap();
        place
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("model.gguf")
    }

    fn open(&self) -> Result<ModelFiles> {
        ModelFiles::open(self.path().to_str().unwrap())
    }
}

/// A whole small model.
fn tiny() -> File {
    let dir = tempfile::tempdir().unwrap();
    tiny_gguf::model(dir.path(), &[2, 8], true)
}

#[track_caller]
fn refused(file: &File, words: &[&str]) {
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
    refused(&file, &["llama.attention.head_count_kv differs between layers", "[2, 4]"]);
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
    refused(&with(vec![16], 0, &factors[..16]), &["rope_freqs.weight", "f32 [32]", "[16]"]);
    refused(&with(vec![32], 0, &[0.0; 32]), &["rope_freqs.weight", "not all positive"]);
}

#[test]
fn what_is_no_llama_is_refused_by_name() {
    let with = |key: &str, value: Val, words: &[&str]| {
        let mut file = tiny();
        file.set(key, value);
        refused(&file, words);
    };
    with("general.architecture", Val::Str("qwen2"), &["\"qwen2\"", "supported: \"llama\""]);
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
    spoil(&|f| f.tensors[3].0 = "blk.0.attn_q.bias".into(), &["blk.0.attn_k.weight", "no such tensor"]);
    spoil(
        &|f| f.tensors.push(("blk.0.attn_q.bias".into(), vec![256], 0, vec![0; 1024])),
        &["attn_q.bias", "without biases"],
    );
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

/// The GGUF keys of a `tokenizer.json`, as converters write them.
fn tokenizer_keys(file: &mut File, json: &Value, model: &str, pre: &str) {
    let vocab = json["model"]["vocab"].as_object().unwrap();
    let added = json["added_tokens"].as_array().unwrap();
    let ids = vocab.iter().map(|(token, id)| (id.as_u64().unwrap() as usize, token.as_str(), 1));
    let added = added.iter().map(|t| {
        let kind = if t["content"] == "<unk>" {
            2
        } else if t["special"] == true {
            3
        } else {
            4
        };
        (t["id"].as_u64().unwrap() as usize, t["content"].as_str().unwrap(), kind)
    });
    let mut tokens = vec![(String::new(), 1); vocab.len().max(added.clone().map(|(id, ..)| id + 1).max().unwrap_or(0))];
    for (id, token, kind) in ids.chain(added) {
        let byte = model == "llama" && token.len() == 6 && token.starts_with("<0x");
        tokens[id] = (token.into(), if byte { 6 } else { kind });
    }
    let merges: Vec<String> = json["model"]["merges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| match m.as_array() {
            Some(pair) => format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
            None => m.as_str().unwrap().into(),
        })
        .collect();
    file.set("tokenizer.ggml.model", Val::Str(model)).set("tokenizer.ggml.pre", Val::Str(pre));
    if model == "llama" {
        // SentencePiece's scores of merged pieces: the earlier, the higher
        let rank = |token: &str| merges.iter().position(|m| m.replace(' ', "") == token).unwrap_or(merges.len());
        file.set("tokenizer.ggml.scores", Val::F32s(tokens.iter().map(|(token, _)| -(rank(token) as f32)).collect()));
    } else {
        file.set("tokenizer.ggml.merges", Val::Strs(merges));
    }
    file.set("tokenizer.ggml.token_type", Val::I32s(tokens.iter().map(|(_, kind)| *kind).collect()));
    file.set("tokenizer.ggml.tokens", Val::Strs(tokens.into_iter().map(|(token, _)| token).collect()));
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Text that breaks careless tokenizers.
const HARD: &str = "한국어 \u{1112}\u{1161} 👩‍👩‍👧 I'll've  3.14159 12345\n\n\t x\r\n  !!! 'S don't   e\u{301} <|eot_id|> Ｆｕｌｌ\u{3000}ﬁ ";

#[test]
fn llama3s_tokenizer_is_hugging_faces() {
    let Some(dir) = data("llama3-tokenizer") else { return };
    let mut file = File::default();
    tokenizer_keys(&mut file, &read_json(&dir.join("tokenizer.json")), "gpt2", "llama-bpe");
    file.set("tokenizer.ggml.bos_token_id", Val::U32(128_000));
    let place = Place::new(&file);
    let ours = Tokenizer::from_dir(&place.path()).unwrap().unwrap();
    let theirs = Tokenizer::from_dir(&dir).unwrap().unwrap();
    assert_eq!((ours.vocab(), ours.bos()), (theirs.vocab(), theirs.bos()));
    let mut texts = vec![HARD.to_string()];
    for line in fs::read_to_string(dir.join("golden_tokens.jsonl")).unwrap().lines() {
        let golden: Value = serde_json::from_str(line).unwrap();
        let (text, ids): (String, Vec<u32>) =
            (golden["text"].as_str().unwrap().into(), serde_json::from_value(golden["ids"].clone()).unwrap());
        assert_eq!(ours.encode(&text, false).unwrap(), ids, "{text:?}");
        texts.push(text);
    }
    assert!(texts.len() > 2000);
    for text in texts.iter().step_by(9) {
        assert_eq!(ours.encode(text, true).unwrap(), theirs.encode(text, true).unwrap(), "{text:?}");
        assert_eq!(ours.encode_plain(text).unwrap(), theirs.encode_plain(text).unwrap(), "{text:?}");
        let ids = ours.encode(text, true).unwrap();
        assert_eq!(ours.decode(&ids, true).unwrap(), theirs.decode(&ids, true).unwrap());
    }
}

#[test]
fn a_sentence_piece_tokenizer_is_hugging_faces() {
    let Some(dir) = data("stories260K") else { return };
    let mut file = File::default();
    tokenizer_keys(&mut file, &read_json(&dir.join("tokenizer.json")), "llama", "default");
    file.set("tokenizer.ggml.bos_token_id", Val::U32(1)).set("tokenizer.ggml.eos_token_id", Val::U32(2));
    let place = Place::new(&file);
    let ours = Tokenizer::from_dir(&place.path()).unwrap().unwrap();
    let theirs = Tokenizer::from_dir(&dir).unwrap().unwrap();
    assert_eq!((ours.vocab(), ours.bos()), (512, Some(1)));
    let golden = read_json(&dir.join("golden.json"));
    let cases = golden["cases"].as_array().unwrap();
    let texts = cases.iter().map(|case| case["prompt"].as_str().unwrap()).chain([HARD, "", " ", "  a\n b"]);
    let stories = cases.iter().map(|case| case["generated_text"].as_str().unwrap());
    for text in texts.chain(stories) {
        let ids = theirs.encode(text, true).unwrap();
        assert_eq!(ours.encode(text, true).unwrap(), ids, "{text:?}");
        assert_eq!(ours.decode(&ids, true).unwrap(), theirs.decode(&ids, true).unwrap());
    }
}

/// A byte-level vocabulary of bytes alone, with a template and special tokens.
fn with_tokenizer() -> File {
    let mut file = tiny();
    let json = crate::tokenizers::byte_level(&[(0x68, 0x69)], &["<|start|>", "<|im_end|>", "<|eot_id|>"]);
    tokenizer_keys(&mut file, &json, "gpt2", "gpt-2");
    file.set("tokenizer.ggml.bos_token_id", Val::U32(257)).set("tokenizer.ggml.eos_token_id", Val::U32(258));
    file.set("tokenizer.chat_template", Val::Str("{{ bos_token }}[{{ messages[0].content }}]{{ eos_token }}"));
    file
}

#[test]
fn special_tokens_and_template() {
    let mut file = with_tokenizer();
    let files = Place::new(&file).open().unwrap();
    assert_eq!((files.config.bos, &files.config.eos[..]), (Some(257), &[258, 259][..]), "<|eot_id|> by its name");
    let tokenizer = files.tokenizer.unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.encode("hi", true).unwrap()), (None, vec![256]));
    let prompt = files.template.render(&[aoji::Message::new("user", "hi")], None).unwrap();
    assert_eq!(prompt, "<|start|>[hi]<|im_end|>");
    file.set("tokenizer.ggml.add_bos_token", Val::Bool(true)).unset("tokenizer.chat_template");
    let files = Place::new(&file).open().unwrap();
    assert_eq!(files.tokenizer.unwrap().encode("hi", true).unwrap(), [257, 256]);
    assert!(matches!(files.template, Template::Aog));
    // a template of one's own gets the special tokens of the file
    let (place, own) = (Place::new(&file), tempfile::Builder::new().suffix(".jinja").tempfile().unwrap());
    fs::write(own.path(), "{{ bos_token }}!").unwrap();
    let template = Template::parse(own.path().to_str().unwrap(), Some(&place.path())).unwrap();
    assert_eq!(template.render(&[aoji::Message::new("user", "hi")], None).unwrap(), "<|start|>!");
}

#[test]
fn vocabularies_that_are_wrong() {
    let with = |key: &str, value: Val, words: &[&str]| {
        let mut file = with_tokenizer();
        file.set(key, value);
        refused(&file, words);
    };
    with("tokenizer.ggml.pre", Val::Str("chatglm-bpe"), &["\"chatglm-bpe\"", "llama-bpe", "smollm", "qwen2"]);
    with("tokenizer.ggml.tokens", Val::Strs(vec!["a".into(), "a".into()]), &["260 numbers"]);
    with("tokenizer.ggml.token_type", Val::I32s(vec![1; 5]), &["token_type has 5 numbers"]);
    with("tokenizer.ggml.tokens", Val::Strs(vec!["a".into(); 260]), &["\"a\" twice"]);
    with("tokenizer.ggml.bos_token_id", Val::U32(260), &["bos_token_id is 260"]);
    with("tokenizer.ggml.eos_token_id", Val::Str("x"), &["eos_token_id is \"x\""]);
    with("tokenizer.ggml.merges", Val::Strs(vec!["h q".into()]), &[]);
    with("tokenizer.ggml.merges", Val::U32(1), &["merges is 1", "a list of strings"]);
    with("tokenizer.chat_template", Val::Str("{% if %}"), &["chat template"]);
    with("tokenizer.ggml.model", Val::Str("llama"), &["tokenizer.ggml.scores"]);
}

/// Other types for other scalings; which of them the rotary embedding computes is the configuration's to say.
#[test]
fn scaling_keys_reach_the_configuration() {
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

    /// Bytes changed anywhere in the header, and the file cut anywhere: an error, or a model whose every value can be read.
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
