//! Vocabularies of GGUF files: their tokens, how they cut a text, and which tokens begin and end one.

use crate::{
    common::data,
    gguf::{Place, refused, tiny},
    gguf_file::{File, Val},
};
use aoji::{Template, Tokenizer};
use serde_json::{Value, json};
use std::{collections::BTreeSet, fs, path::Path};

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
pub fn with_tokenizer() -> File {
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
    let long = |len: usize| {
        let file = with_tokenizer();
        let mut tokens: Vec<String> = (0..260).map(|i| format!("token {i}")).collect();
        tokens[7] = "한".repeat(len / 3);
        (file, Val::Strs(tokens))
    };
    let (mut file, tokens) = long(1026);
    refused(file.set("tokenizer.ggml.tokens", tokens), &["token 7 of tokenizer.ggml.tokens has 1026 bytes", "1024"]);
    let (mut file, tokens) = long(999);
    assert!(!Place::new(file.set("tokenizer.ggml.tokens", tokens)).open().err().unwrap().to_string().contains("bytes"));
    with("tokenizer.ggml.eos_token_id", Val::Str("x"), &["eos_token_id is \"x\""]);
    with("tokenizer.ggml.merges", Val::Strs(vec!["h q".into()]), &[]);
    let longer = "<|start|> <|im_end|>"; // than every token: the crate `tokenizers` panics
    with("tokenizer.ggml.merges", Val::Strs(vec![longer.into()]), &[longer, "no token of its vocabulary"]);
    with("tokenizer.ggml.merges", Val::U32(1), &["merges is 1", "a list of strings"]);
    with("tokenizer.chat_template", Val::Str("{% if %}"), &["chat template"]);
    with("tokenizer.ggml.model", Val::Str("llama"), &["tokenizer.ggml.scores"]);
}

/// Tokens of other vocabularies, and -1 for none.
#[test]
fn ids_that_no_token_has_are_ignored() {
    let mut file = with_tokenizer();
    file.set("tokenizer.ggml.add_bos_token", Val::Bool(true));
    for (bos, eos) in [(260, 260), (u32::MAX, 1_000_000)] {
        file.set("tokenizer.ggml.bos_token_id", Val::U32(bos)).set("tokenizer.ggml.eos_token_id", Val::U32(eos));
        file.set("tokenizer.ggml.padding_token_id", Val::U32(bos));
        file.set_raw("tokenizer.ggml.unknown_token_id", [5u32.to_le_bytes(), (-1i32).to_le_bytes()].concat());
        let files = Place::new(&file).open().unwrap();
        assert_eq!((files.config.bos, &files.config.eos[..]), (None, &[258, 259][..]), "{bos}, {eos}: by their names");
        assert_eq!(files.tokenizer.unwrap().encode("hi", true).unwrap(), [256], "without a BOS");
    }
}

/// Converters disagree on the type of the token that ends a turn: control, a user's token, or a word.
#[test]
fn what_ends_an_answer_ends_it_whatever_its_type() {
    for kind in [1, 3, 4] {
        let mut file = with_tokenizer();
        let kinds = (0..260).map(|id| if id < 257 { 1 } else { kind }).collect();
        file.set("tokenizer.ggml.token_type", Val::I32s(kinds)).unset("tokenizer.ggml.eos_token_id");
        let files = Place::new(&file).open().unwrap();
        assert_eq!(files.config.eos, [258, 259], "type {kind}");
        let tokenizer = files.tokenizer.unwrap();
        assert_eq!(tokenizer.encode("hi<|im_end|>", true).unwrap(), [256, 258], "type {kind}");
        assert_eq!(tokenizer.decode(&[256, 258], true).unwrap(), "hi", "type {kind}");
        // by its key alone
        file.set("tokenizer.ggml.eos_token_id", Val::U32(257));
        assert_eq!(Place::new(&file).open().unwrap().config.eos, [257, 258, 259], "type {kind}");
    }
}

/// Splits as in the `tokenizer.json` of a published model, with a vocabulary whose merges go across every place at
/// which a split may cut.
#[test]
fn splits_are_those_of_the_published_tokenizers() {
    let level =
        |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    let split = |regex: &str| {
        let split = json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        json!({"type": "Sequence", "pretokenizers": [split, level(false)]})
    };
    let llama3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let qwen2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let digits = json!({"type": "Digits", "individual_digits": true});
    let smollm = json!({"type": "Sequence", "pretokenizers": [digits, level(true)]});
    let splits = [
        ("llama-bpe", split(llama3), Value::Null),
        ("qwen2", split(qwen2), json!({"type": "NFC"})),
        ("smollm", smollm, Value::Null),
        ("gpt-2", level(true), Value::Null),
    ];
    // pairs of what occurs in the texts: where both fall into one piece, they become one token
    let text = format!("{HARD} 12345678 a1b2 _x's 'LL  \r\n\r\n 7\u{301} \t!?\n");
    let bytes = || text.bytes().map(usize::from);
    let pairs: BTreeSet<(usize, usize)> = bytes().zip(bytes().skip(1)).filter(|(a, b)| *a < 128 && *b < 128).collect();
    let pairs: Vec<(usize, usize)> = pairs.into_iter().collect();
    let mut seen = Vec::new();
    for (name, pre_tokenizer, normalizer) in splits {
        let mut theirs = crate::tokenizers::byte_level(&pairs, &["<|eot_id|>"]);
        (theirs["pre_tokenizer"], theirs["normalizer"]) = (pre_tokenizer, normalizer);
        let mut file = File::default();
        tokenizer_keys(&mut file, &theirs, "gpt2", name);
        let ours = Tokenizer::from_dir(&Place::new(&file).path()).unwrap().unwrap();
        let theirs = Tokenizer::from_bytes("tokenizer.json", theirs.to_string().as_bytes()).unwrap();
        let ids = ours.encode(&text, false).unwrap();
        assert_eq!(ids, theirs.encode(&text, false).unwrap(), "{name}");
        assert!(!seen.contains(&ids), "{name} cuts as another one does");
        seen.push(ids);
    }
}
