//! Which tokens begin and end a text when the files of a checkpoint disagree.

use std::{fs, path::Path};

use aoji::{Device, Dtype, Engine, Event, FinishReason, GenerateOptions, ModelFiles, Options, Sampling, synth};
use serde_json::{Value, json};

use crate::tokenizers::byte_level;

/// The file that is published with Llama-3-Ko-8B-Instruct-AOG, left over from Llama 2.
const LLAMA2_GENERATION: &str =
    r#"{"_from_model_config": true, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}"#;

/// A small random model in a directory of its own, with these files.
fn model(vocab: usize, bos: u32, eos: u32, files: &[(&str, &str)]) -> tempfile::TempDir {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": vocab, "max_position_embeddings": 64,
        "tie_word_embeddings": true, "bos_token_id": bos, "eos_token_id": eos, "torch_dtype": "bfloat16"
    });
    let dir = tempfile::tempdir().unwrap();
    synth::write(&config.to_string(), 7, Dtype::Bf16, synth::SHARD_BYTES, dir.path(), |_, _| {}).unwrap();
    let _ = fs::remove_file(dir.path().join("generation_config.json"));
    files.iter().for_each(|(name, text)| fs::write(dir.path().join(name), text).unwrap());
    dir
}

/// Tokens 0 to 255 are bytes, 256 is BOS, 257 ends a text and 258 a turn.
fn tokenizer() -> String {
    byte_level(&[], &["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]).to_string()
}

/// The result from the files alone and from a whole engine, which must agree.
fn ids(dir: &Path) -> (Option<u32>, Vec<u32>) {
    let name = dir.to_str().unwrap();
    let files = ModelFiles::open(name).unwrap().config;
    let engine = Engine::open(name, &cpu()).unwrap();
    assert_eq!((files.bos, &files.eos), (engine.config().bos, &engine.config().eos));
    (files.bos, files.eos)
}

fn cpu() -> Options {
    Options { device: Device::Cpu, ..Options::default() }
}

/// How a text ends when `token` is the most likely one at every position.
fn end(engine: &Engine, token: u32) -> (FinishReason, usize) {
    let sampling = Sampling { logit_bias: vec![(token, 1000.0)], ..Sampling::default() };
    let options = GenerateOptions { sampling, max_tokens: Some(3), ..GenerateOptions::default() };
    let mut session = engine.session(8).unwrap();
    let last = session.generate(&[5], &options).unwrap().last().unwrap().unwrap();
    let Event::Finish(reason, timings) = last else { panic!("{last:?}") };
    (reason, timings.tokens)
}

#[test]
fn ids_of_another_vocabulary_do_not_count() {
    let tokenizer = tokenizer();
    let with = |generation: &str, config: &str| {
        let files = [
            ("tokenizer.json", &*tokenizer),
            ("generation_config.json", generation),
            ("tokenizer_config.json", config),
        ];
        model(259, 256, 257, &files)
    };
    let dir = with(LLAMA2_GENERATION, r#"{"eos_token": "<|end_of_text|>"}"#);
    assert_eq!(ids(dir.path()), (Some(256), vec![257]));
    let engine = Engine::open(dir.path().to_str().unwrap(), &cpu()).unwrap();
    assert_eq!(end(&engine, 2), (FinishReason::Length, 3)); // an ordinary token ends nothing
    assert_eq!(end(&engine, 257), (FinishReason::Stop, 1));

    // the union, generation_config.json first; tokenizer_config.json may write an object
    let dir = with(r#"{"eos_token_id": [258, 2]}"#, r#"{"eos_token": {"content": "<|eot_id|>"}}"#);
    assert_eq!(ids(dir.path()), (Some(256), vec![258, 257]));
    let dir = with("{}", r#"{"bos_token": "<|eot_id|>", "eos_token": "<|eot_id|>"}"#);
    assert_eq!(ids(dir.path()), (Some(256), vec![257, 258]));
    let dir = with("{}", r#"{"eos_token": "</s>"}"#); // in no vocabulary
    assert_eq!(ids(dir.path()), (Some(256), vec![257]));
}

/// An added token ends a text even if its flag says that it is not special; a word of the vocabulary does not.
#[test]
fn an_added_token_ends_a_text_though_it_is_not_special() {
    let mut file: Value = serde_json::from_str(&tokenizer()).unwrap();
    file["added_tokens"][2]["special"] = json!(false);
    let tokenizer = file.to_string();
    let eot = r#"{"eos_token_id": [258, 2]}"#;
    for (generation, config, expected, special) in [
        (eot, "{}", vec![258, 257], false),
        ("{}", r#"{"eos_token": "<|eot_id|>"}"#, vec![257, 258], true),
        (eot, r#"{"eos_token": {"content": "<|eot_id|>"}}"#, vec![258, 257], true),
        (eot, r#"{"additional_special_tokens": ["<|eot_id|>"]}"#, vec![258, 257], true),
        (eot, r#"{"added_tokens_decoder": {"258": {"content": "<|eot_id|>", "special": true}}}"#, vec![258, 257], true),
        (
            eot,
            r#"{"added_tokens_decoder": {"258": {"content": "<|eot_id|>", "special": false}}}"#,
            vec![258, 257],
            false,
        ),
    ] {
        let files = [
            ("tokenizer.json", &*tokenizer),
            ("generation_config.json", generation),
            ("tokenizer_config.json", config),
        ];
        let dir = model(259, 256, 257, &files);
        assert_eq!(ids(dir.path()), (Some(256), expected), "{generation} {config}");
        let engine = Engine::open(dir.path().to_str().unwrap(), &cpu()).unwrap();
        assert_eq!(engine.tokenizer().unwrap().is_special(258), special, "{config}");
        assert_eq!((end(&engine, 258), end(&engine, 2)), ((FinishReason::Stop, 1), (FinishReason::Length, 3)));
    }
}

#[test]
fn tokens_that_only_tokenizer_config_lists_are_tokens() {
    let tokenizer = tokenizer();
    let token = |content: &str, special: bool| {
        json!({"content": content, "lstrip": false, "rstrip": false, "normalized": false, "single_word": false,
               "special": special})
    };
    let config = json!({
        "added_tokens_decoder": {"259": token("<|im_start|>", true), "260": token("<|im_end|>", true),
                                 "261": token("<tool>", false), "256": token("<|begin_of_text|>", true)},
        "eos_token": "<|im_end|>", "pad_token": "<|nowhere|>"
    })
    .to_string();
    let files = [("tokenizer.json", &*tokenizer), ("tokenizer_config.json", &*config)];
    let dir = model(262, 256, 257, &files);
    assert_eq!(ids(dir.path()), (Some(256), vec![257, 260]));
    let engine = Engine::open(dir.path().to_str().unwrap(), &cpu()).unwrap();
    let tokenizer = engine.tokenizer().unwrap();
    assert_eq!(tokenizer.vocab(), 262, "a name without a place is no token");
    assert_eq!(tokenizer.encode("a<|im_end|><tool><|im_start|>", true).unwrap(), [256, 0x61, 260, 261, 259]);
    assert!(tokenizer.encode_plain("<|im_end|>").unwrap().iter().all(|id| *id < 256));
    assert_eq!(tokenizer.decode(&[0x61, 260, 261], true).unwrap(), "a<tool>");
    assert_eq!((end(&engine, 260), end(&engine, 261)), ((FinishReason::Stop, 1), (FinishReason::Length, 3)));
}

#[test]
fn ids_are_taken_as_given_where_nothing_better_is_known() {
    let generation = ("generation_config.json", LLAMA2_GENERATION);
    let without = model(259, 256, 257, &[generation]);
    assert_eq!(ids(without.path()), (Some(1), vec![2]));
    // a tokenizer that knows no special token which a file names
    let tokenizer = tokenizer();
    let none = model(259, 1, 2, &[generation, ("tokenizer.json", &tokenizer)]);
    assert_eq!(ids(none.path()), (Some(1), vec![2]));
}

#[test]
fn the_published_files_of_aog_end_at_end_of_text() {
    let (Some(tokenizer), Some(published)) =
        (crate::common::data("llama3-tokenizer/tokenizer.json"), crate::common::data("llama3-8b-published"))
    else {
        return;
    };
    let tokenizer = fs::read_to_string(tokenizer).unwrap();
    let config = fs::read_to_string(published.join("tokenizer_config.json")).unwrap();
    let files = [
        ("tokenizer.json", &*tokenizer),
        ("tokenizer_config.json", &config),
        ("generation_config.json", LLAMA2_GENERATION),
    ];
    let published: Value = serde_json::from_str(&fs::read_to_string(published.join("config.json")).unwrap()).unwrap();
    let id = |key: &str| published[key].as_u64().unwrap() as u32;
    let dir = model(128_256, id("bos_token_id"), id("eos_token_id"), &files);
    assert_eq!(ids(dir.path()), (Some(128_000), vec![128_001]));
    let engine = Engine::open(dir.path().to_str().unwrap(), &cpu()).unwrap();
    assert_eq!(engine.tokenizer().unwrap().token(2).as_deref(), Some("#"));
    assert_eq!(end(&engine, 2), (FinishReason::Length, 3));
    assert_eq!(end(&engine, 128_001), (FinishReason::Stop, 1));
}
