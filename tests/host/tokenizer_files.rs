//! Every fault that a `tokenizer.json` can have.

use crate::{text::byte_level, tokenizers};
use aoji::{Error, Tokenizer};
use serde_json::{Value, json};

#[test]
fn files_that_are_no_tokenizer_say_so() {
    let dir = tempfile::tempdir().unwrap();
    assert!(Tokenizer::from_dir(dir.path()).unwrap().is_none());
    let mut shifted = byte_level();
    shifted["added_tokens"][1]["id"] = json!(999);
    let mut no_regex = byte_level();
    no_regex["pre_tokenizer"] =
        json!({"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false});
    let cases = [
        ("".to_string(), "EOF"),
        ("{}".to_string(), "Model missing"),
        ("[1, 2".to_string(), "aoji can read"),
        (no_regex.to_string(), "aoji can read"),
        (shifted.to_string(), "added token \"<|end_of_text|>\" is listed with id 999, its place gives 263"),
    ];
    for (content, expected) in cases {
        std::fs::write(dir.path().join("tokenizer.json"), content).unwrap();
        let error = Tokenizer::from_dir(dir.path()).unwrap_err();
        assert!(matches!(error, Error::File { .. }), "{error:?}");
        assert!(error.to_string().contains("tokenizer.json"), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    }
}

/// Each of these makes the crate `tokenizers` panic when it reads the file, or with the first text.
#[test]
fn files_that_the_crate_fails_on_are_errors() {
    let with = |part: &str, value: Value| {
        let mut file = byte_level();
        file[part] = value;
        file.to_string()
    };
    let template = |single: Value| {
        let pair = json!([{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]);
        with(
            "post_processor",
            json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {}}),
        )
    };
    let bpe = |vocab: Value, merges: Value, prefix: Value| {
        with("model", json!({"type": "BPE", "vocab": vocab, "merges": merges, "continuing_subword_prefix": prefix}))
            .replace(&byte_level()["added_tokens"].to_string(), "[]")
    };
    let charsmap = |map: Value| with("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": map}));
    let strip = json!({"type": "Strip", "content": " ", "start": 0, "stop": 1});
    let fixed = json!({"type": "FixedLength", "length": 0});
    let whole = byte_level().to_string();
    let cut = whole.find("decoder").unwrap() + 20;
    let cases = [
        (whole[..cut].to_string(), "EOF while parsing"),
        (whole.replacen("\"decoder\":{", "\"decoder\":{,", 1), "key must be a string at line 1 column"),
        (charsmap(json!("")), "its normalizer cannot be applied, expected for Precompiled"),
        (charsmap(Value::Null), "its normalizer"),
        (charsmap(json!("not base64!")), "its normalizer"),
        (charsmap(json!("AAAAAA==")), "its normalizer"),
        (bpe(json!({"aa": 0, "bb": 1}), json!(["aa bb"]), Value::Null), "its model has the merge \"aa bb\""),
        (bpe(json!({"aa": 0, "bb": 1}), json!([["aa", "bb"]]), Value::Null), "its model has the merge \"aa bb\""),
        (bpe(json!({"a": 0, "b": 1}), json!(["a b"]), json!("###")), "its model has the merge \"a b\""),
        (
            template(json!([{"SpecialToken": {"id": "<s>", "type_id": 0}}])),
            "its post_processor cannot be applied, expected",
        ),
        (template(json!([{"Sequence": {"id": "B", "type_id": 0}}])), "its post_processor"),
        (with("pre_tokenizer", fixed.clone()), "its pre_tokenizer cannot be applied, expected for FixedLength"),
        (with("pre_tokenizer", json!({"type": "Sequence", "pretokenizers": [fixed]})), "its pre_tokenizer"),
        (with("decoder", strip.clone()), "its decoder has Strip with a `stop` above 0"),
        (with("decoder", json!({"type": "Sequence", "decoders": [strip]})), "its decoder has Strip"),
        (with("decoder", (0..200).fold(json!({}), |inner, _| json!({"a": inner}))), "recursion limit"),
    ];
    for (content, expected) in cases {
        let error = Tokenizer::from_bytes("tokenizer.json", content.as_bytes()).unwrap_err();
        assert!(matches!(error, Error::File { .. }), "{error:?}");
        let said = error.to_string();
        assert!(said.starts_with("tokenizer.json: not a tokenizer that aoji can read: "), "{said}");
        assert!(said.contains(expected), "{said:?} lacks {expected:?}");
    }
}

/// A list with a place for each id would take 34 GB.
#[test]
fn ids_beyond_every_vocabulary_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, content: Value| std::fs::write(dir.path().join(name), content.to_string()).unwrap();
    let refused = |words: &[&str]| {
        let error = Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
        words.iter().for_each(|word| assert!(error.contains(word), "{error:?} lacks {word:?}"));
    };
    let far = |id: u32| {
        let mut file = byte_level();
        file["model"]["vocab"]["far"] = json!(id);
        // added tokens come after one more
        let next = |id: &mut Value| *id = json!(id.as_u64().unwrap() + 1);
        file["added_tokens"].as_array_mut().unwrap().iter_mut().for_each(|token| next(&mut token["id"]));
        next(&mut file["post_processor"]["special_tokens"]["<|begin_of_text|>"]["ids"][0]);
        file
    };
    for id in [1u32 << 24, u32::MAX - 5, u32::MAX] {
        let mut file = far(id);
        write("tokenizer.json", file.clone());
        write("tokenizer_config.json", json!({}));
        Tokenizer::from_dir(dir.path()).unwrap(); // no text makes it
        write("tokenizer_config.json", json!({"eos_token": "far"}));
        refused(&["tokenizer.json", "\"far\"", &id.to_string(), "below 16777216"]);
        file["added_tokens"].as_array_mut().unwrap().push(tokenizers::special(id as usize, "far"));
        write("tokenizer.json", file);
        write("tokenizer_config.json", json!({}));
        refused(&["tokenizer.json", "\"far\"", &id.to_string(), "below 16777216"]);
    }
    let mut file = far((1 << 24) - 1);
    file["added_tokens"].as_array_mut().unwrap().push(tokenizers::special((1 << 24) - 1, "far"));
    assert_eq!(Tokenizer::from_bytes("tokenizer.json", file.to_string().as_bytes()).unwrap().vocab(), 1 << 24);
}
