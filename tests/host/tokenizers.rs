//! Small tokenizer files, made here.
#![allow(dead_code)] // each test file uses a part of it

use serde_json::{Map, Value, json};

/// An entry of `added_tokens` for a special token.
pub fn special(id: usize, content: &str) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
           "normalized": false, "special": true})
}

/// Byte-level BPE in the form of Llama 3's file: token `b` is byte `b`, then come pairs of bytes, then special tokens,
/// the first of which the post-processor puts in front.
pub fn byte_level(pairs: &[(usize, usize)], specials: &[&str]) -> Value {
    let printable = |b: &u32| matches!(b, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let others: Vec<u32> = (0..256).filter(|b| !printable(b)).collect();
    let code = |b: u32| others.iter().position(|&o| o == b).map_or(b, |i| 256 + i as u32);
    let bytes: Vec<String> = (0..256).map(|b| char::from_u32(code(b)).unwrap().to_string()).collect();
    let merged = pairs.iter().map(|&(a, b)| format!("{}{}", bytes[a], bytes[b]));
    let vocab: Map<_, _> = (0..).zip(bytes.iter().cloned().chain(merged)).map(|(id, t)| (t, json!(id))).collect();
    let merges: Vec<String> = pairs.iter().map(|&(a, b)| format!("{} {}", bytes[a], bytes[b])).collect();
    let (n, bos) = (vocab.len(), specials[0]);
    let added: Vec<Value> = (n..).zip(specials).map(|(id, content)| special(id, content)).collect();
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": level, "decoder": level,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [n], "tokens": [bos]}}},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": merges}
    })
}

/// SentencePiece's BPE with byte fallback, in the form of Llama 2's file, with `decoder` for its decoder.
pub fn pieces(decoder: Value) -> Value {
    let specials = ["<unk>", "<s>", "</s>"];
    let bytes = (0..256).map(|b| format!("<0x{b:02X}>"));
    let words = ["▁", "a", "b", "h", "i", "▁h", "hi", "▁hi", "한", "국", "한국", "▁한"].map(String::from);
    let vocab: Vec<String> = specials.map(String::from).into_iter().chain(bytes).chain(words).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "post_processor": null, "pre_tokenizer": null,
        "added_tokens": specials.iter().enumerate().map(|(i, s)| special(i, s)).collect::<Vec<_>>(),
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "decoder": decoder,
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true,
            "vocab": vocab.iter().enumerate().map(|(i, t)| (t.clone(), json!(i))).collect::<serde_json::Map<_, _>>(),
            "merges": ["▁ h", "h i", "▁h i", "한 국", "▁ 한"]}
    })
}

/// The decoder of Llama 2's file.
pub fn llama2_decoder() -> Value {
    json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
        {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]})
}
