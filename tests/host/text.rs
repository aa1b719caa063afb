//! Tokenizer, streaming decoder and stop strings: small tokenizers made here, real ones where the data is present.

use std::sync::LazyLock;

use crate::{
    common::data,
    tokenizers::{self, llama2_decoder, pieces},
};
use aoji::{StopStrings, TokenStream, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};

/// Text that breaks careless decoders: composed and decomposed Hangul, emoji joined by ZWJ, flags, combining marks.
const HARD: &str = "한국어 \u{1112}\u{1161}\u{11AB} 👩‍👩‍👧‍👦🏳️‍🌈🇰🇷 e\u{301} 값은 3.14이다.\n\t뷁쀍 \u{FEFF}\u{200B}ﬁ";

/// Byte-level BPE with tokens that are half characters: the end of one syllable with the beginning of the next, the
/// first two bytes of an emoji, a space with the first byte of 한, the first two of 한.
pub fn byte_level() -> Value {
    let merges = [(0x9C, 0xEA), (0xF0, 0x9F), (0x20, 0xED), (0xED, 0x95), (0x80, 0x8D), (0x68, 0x69)];
    tokenizers::byte_level(&merges, &["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
}

fn tokenizer(file: &Value) -> Tokenizer {
    Tokenizer::from_bytes("tokenizer.json", file.to_string().as_bytes()).unwrap()
}

/// One tokenizer of each kind that a stream treats differently.
static SMALL: LazyLock<Vec<Tokenizer>> = LazyLock::new(|| {
    let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    let word_piece = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    [byte_level(), pieces(llama2_decoder()), pieces(metaspace), pieces(word_piece), pieces(Value::Null)]
        .iter()
        .map(tokenizer)
        .collect()
});

static LLAMA3: LazyLock<Option<Tokenizer>> = LazyLock::new(|| Tokenizer::from_dir(&data("llama3-tokenizer")?).unwrap());
static STORIES: LazyLock<Option<Tokenizer>> = LazyLock::new(|| Tokenizer::from_dir(&data("stories260K")?).unwrap());

/// The pieces of text of `ids`; the rest, which `finish` gives, is last.
fn stream(mut stream: TokenStream, ids: &[u32]) -> Vec<String> {
    let mut pieces: Vec<String> = ids.iter().filter_map(|&id| stream.push(id)).collect();
    pieces.extend(stream.finish());
    pieces
}

fn assert_streams_as_it_decodes(tokenizer: &Tokenizer, ids: &[u32]) {
    for skip in [true, false] {
        let new = || if skip { tokenizer.stream() } else { tokenizer.stream_with_special() };
        let pieces = stream(new(), ids);
        assert_eq!(pieces.concat(), tokenizer.decode(ids, skip).unwrap(), "ids {ids:?}, skip {skip}");
        assert!(pieces.iter().all(|p| !p.is_empty()), "an empty piece for {ids:?}");
    }
}

#[test]
fn small_tokenizers_round_trip() {
    for tokenizer in SMALL.iter().take(2) {
        for text in [HARD, "", " ", "hi", " hi  hi ", "\n\n"] {
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
            assert_eq!(stream(tokenizer.stream(), &ids).concat(), text);
        }
    }
}

#[test]
fn what_a_tokenizer_knows_about_its_tokens() {
    let bytes = &SMALL[0];
    assert_eq!(bytes.vocab(), 265);
    let bos = bytes.token_id("<|begin_of_text|>").unwrap();
    assert_eq!((bos, bytes.bos()), (262, Some(262)));
    assert_eq!(bytes.encode("a", true).unwrap(), [bos, 0x61]);
    assert!(bytes.is_special(bos) && !bytes.is_special(0x61) && !bytes.is_special(u32::MAX));
    assert_eq!(bytes.token_bytes(257), [0xF0, 0x9F]);
    assert_eq!(bytes.token_bytes(bos), b"<|begin_of_text|>");
    assert!(bytes.token_bytes(u32::MAX).is_empty());

    let pieces = &SMALL[1];
    assert_eq!((pieces.vocab(), pieces.bos()), (271, None));
    assert_eq!(pieces.token_bytes(pieces.token_id("<0xE5>").unwrap()), [0xE5]);
    assert_eq!(pieces.token_bytes(pieces.token_id("▁한").unwrap()), " 한".as_bytes());
}

#[test]
fn a_prompt_is_never_cut_or_padded() {
    let mut file = byte_level();
    file["truncation"] = json!({"max_length": 4, "direction": "Right", "strategy": "LongestFirst", "stride": 0});
    file["padding"] = json!({"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": null,
                             "pad_id": 0, "pad_type_id": 0, "pad_token": "!"});
    assert_eq!(tokenizer(&file).encode("abcdefgh", false).unwrap().len(), 8);
}

#[test]
fn plain_text_makes_no_special_tokens() {
    let bytes = &SMALL[0];
    let text = "a<|eot_id|><|end_of_text|>";
    let (end, eot) = (bytes.token_id("<|end_of_text|>").unwrap(), bytes.token_id("<|eot_id|>").unwrap());
    assert_eq!(bytes.encode(text, false).unwrap(), [0x61, eot, end]);
    let plain = bytes.encode_plain(text).unwrap();
    assert!(plain.iter().all(|&id| !bytes.is_special(id)));
    assert_eq!(bytes.decode(&plain, true).unwrap(), text);
}

/// Of no tokens, the crate's decoder for words' ends would subtract 1.
#[test]
fn no_tokens_are_no_text() {
    let ends = tokenizer(&pieces(json!({"type": "BPEDecoder", "suffix": "</w>"})));
    assert_eq!(ends.decode(&[], false).unwrap(), "");
    assert_eq!(ends.stream().finish(), None);
}

#[test]
fn half_characters_wait_and_bad_bytes_become_replacements() {
    let bytes = &SMALL[0];
    let mut s = bytes.stream();
    // 한 is ED 95 9C, 🫠 is F0 9F AB A0.
    assert_eq!(s.push(0xED), None);
    assert_eq!(s.push(bytes.bos().unwrap()), None);
    assert_eq!(s.push(0x95), None);
    assert_eq!(s.push(0x9C).as_deref(), Some("한"));
    assert_eq!(s.push(257), None);
    assert_eq!(s.push(0xAB), None);
    // Now it cannot become one: one U+FFFD for what was held, and the letter.
    assert_eq!(s.push(0x61).as_deref(), Some("\u{FFFD}a"));
    assert_eq!(s.push(0x80).as_deref(), Some("\u{FFFD}"));
    assert_eq!(s.push(0xED), None);
    assert_eq!(s.finish().as_deref(), Some("\u{FFFD}"));
    assert_eq!((s.finish(), s.push(0x62).as_deref()), (None, Some("b")));
}

#[test]
fn byte_fallback_runs_come_when_they_end() {
    let pieces = &SMALL[1];
    let id = |t: &str| pieces.token_id(t).unwrap();
    let mut s = pieces.stream();
    // The first space is the one that the encoder put there.
    assert_eq!(s.push(id("▁한")).as_deref(), Some("한"));
    assert_eq!(s.push(id("<0xEA>")), None);
    assert_eq!(s.push(id("<0xB0>")), None);
    assert_eq!(s.push(id("<0x80>")), None);
    assert_eq!(s.push(id("▁hi")).as_deref(), Some("가 hi"));
    assert_eq!(s.push(id("<0x0A>")), None);
    assert_eq!(s.push(id("<0x80>")), None);
    assert_eq!(s.finish().as_deref(), Some("\u{FFFD}\u{FFFD}"));
}

#[test]
fn only_one_leading_space_is_dropped() {
    let pieces = &SMALL[1];
    let id = |t: &str| pieces.token_id(t).unwrap();
    let texts = |ids: &[u32]| (stream(pieces.stream(), ids).concat(), pieces.decode(ids, true).unwrap());
    for (ids, text) in [
        (vec![id("▁"), id("▁hi")], " hi"),
        (vec![id("<s>"), id("▁hi"), id("▁hi")], "hi hi"),
        (vec![id("<0x20>"), id("<0x20>"), id("a")], " a"),
        (vec![id("hi"), id("▁hi")], "hi hi"),
    ] {
        assert_eq!(texts(&ids), (text.to_string(), text.to_string()), "{ids:?}");
    }
}

#[test]
fn llama3_agrees_with_llama_cpps_vectors() {
    let (Some(tokenizer), Some(dir)) = (LLAMA3.as_ref(), data("llama3-tokenizer")) else { return };
    let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
    let (inp, out) = (read("ggml-vocab-llama-bpe.gguf.inp"), read("ggml-vocab-llama-bpe.gguf.out"));
    let texts: Vec<&str> = inp.split("\n__ggml_vocab_test__\n").collect();
    let vectors: Vec<Vec<u32>> =
        out.split('\n').map(|line| line.split_whitespace().map(|id| id.parse().unwrap()).collect()).collect();
    // The last one is the empty text.
    assert_eq!((texts.len(), vectors.len()), (47, 47));
    for (text, ids) in texts.iter().zip(&vectors) {
        assert_eq!(&tokenizer.encode(text, false).unwrap(), ids, "{text:?}");
        assert_eq!(&tokenizer.encode_plain(text).unwrap(), ids, "{text:?}");
        assert_eq!(stream(tokenizer.stream(), ids).concat(), *text);
    }
}

#[test]
fn llama3_agrees_with_two_independent_encoders() {
    let (Some(tokenizer), Some(path)) = (LLAMA3.as_ref(), data("llama3-tokenizer/golden_tokens.jsonl")) else { return };
    assert_eq!((tokenizer.vocab(), tokenizer.bos()), (128_256, Some(128_000)));
    assert_eq!(tokenizer.token_id("<|end_of_text|>"), Some(128_001));
    let mut lines = 0;
    for line in std::fs::read_to_string(path).unwrap().lines() {
        let golden: Value = serde_json::from_str(line).unwrap();
        let text = golden["text"].as_str().unwrap();
        let ids: Vec<u32> = serde_json::from_value(golden["ids"].clone()).unwrap();
        assert_eq!(tokenizer.encode(text, false).unwrap(), ids, "{text:?}");
        assert_eq!(stream(tokenizer.stream_with_special(), &ids).concat(), text);
        let plain = tokenizer.encode_plain(text).unwrap();
        assert!(plain.iter().all(|&id| !tokenizer.is_special(id)), "{text:?}");
        assert_eq!(plain == ids, !ids.iter().any(|&id| tokenizer.is_special(id)), "{text:?}");
        assert_eq!(tokenizer.decode(&plain, true).unwrap(), text);
        lines += 1;
    }
    assert!(lines > 2000, "{lines} lines");
}

#[test]
fn goldens_of_real_models_encode_and_decode() {
    for name in ["stories260K", "smollm2-135m"] {
        let (Some(path), Some(dir)) = (data(&format!("{name}/golden.json")), data(name)) else { continue };
        let Some(tokenizer) = Tokenizer::from_dir(&dir).unwrap() else {
            println!("skipped {name}: no tokenizer.json beside its goldens");
            continue;
        };
        let golden: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let special = golden["add_special_tokens"].as_bool().unwrap_or(true);
        let cases = golden["cases"].as_array().unwrap();
        assert!(cases.len() >= 3);
        for case in cases {
            let ids = |key: &str| -> Vec<u32> { serde_json::from_value(case[key].clone()).unwrap() };
            assert_eq!(tokenizer.encode(case["prompt"].as_str().unwrap(), special).unwrap(), ids("prompt_ids"));
            let text = stream(tokenizer.stream_with_special(), &ids("generated_ids")).concat();
            assert_eq!(text, case["generated_text"].as_str().unwrap());
        }
    }
}

#[test]
fn megabytes_without_a_word_are_no_panic() {
    let Some(tokenizer) = LLAMA3.as_ref() else { return };
    for unit in [" ", "a", "가", "\n", "!", "\u{301}"] {
        let text = unit.repeat(300_000);
        if let Ok(ids) = tokenizer.encode(&text, false) {
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        }
    }
}

/// A text that continues a prompt, in pieces. Together with the prompt's text it is the text of all tokens, as far as
/// the tokens that follow do not change what the prompt alone decodes to.
fn assert_goes_on(tokenizer: &Tokenizer, ids: &[u32], cut: usize) {
    let (prompt, rest) = ids.split_at(cut.min(ids.len()));
    for skip in [true, false] {
        let new = if skip { tokenizer.stream() } else { tokenizer.stream_with_special() };
        let text = stream(new.after(prompt), rest).concat();
        let (before, all) = (tokenizer.decode(prompt, skip).unwrap(), tokenizer.decode(ids, skip).unwrap());
        let same: usize = before.chars().zip(all.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
        assert_eq!(text, all[same..], "{prompt:?} then {rest:?}, skip {skip}");
        assert!(!all.starts_with(&before) || before + &text == all);
    }
}

#[test]
fn the_first_space_of_a_continuation_stays() {
    let pieces = &SMALL[1];
    let id = |t: &str| pieces.token_id(t).unwrap();
    let after = |prompt: &[u32], rest: &[u32]| stream(pieces.stream().after(prompt), rest).concat();
    assert_eq!(after(&[id("▁hi")], &[id("▁hi"), id("▁한")]), " hi 한");
    assert_eq!(after(&[id("<s>"), id("▁hi")], &[id("▁hi")]), " hi");
    // nothing of the text has been said yet
    assert_eq!(after(&[id("<s>")], &[id("▁hi"), id("▁hi")]), "hi hi");
    assert_eq!(after(&[], &[id("▁hi")]), "hi");
    // the prompt's line end is the prompt's, and a character that it begins is the answer's
    assert_eq!(after(&[id("hi"), id("<0x0A>")], &[id("<0x0A>"), id("▁hi")]), "\n hi");
    assert_eq!(after(&[id("hi"), id("<0xED>"), id("<0x95>")], &[id("<0x9C>"), id("a")]), "한a");
    assert_eq!(after(&[id("hi"), id("<0xED>")], &[]), "");
    let bytes = &SMALL[0];
    assert_eq!(stream(bytes.stream().after(&[0x61, 0xED, 0x95]), &[0x9C, 0x62]).concat(), "한b");
    assert_eq!(stream(bytes.stream().after(&[0x61, 0xED, 0x95]), &[0x62]).concat(), "b");
    let Some(stories) = STORIES.as_ref() else { return };
    let (prompt, all) =
        (stories.encode("Lily said,", true).unwrap(), stories.encode("Lily said, \"Lily", true).unwrap());
    assert_eq!(stream(stories.stream().after(&prompt), &all[prompt.len()..]).concat(), " \"Lily");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_text_goes_on_where_it_is_cut(text in "(\\PC|[가-힣]|👩‍👩‍👧|hi|\\n| ){0,40}", cut in 0usize..60) {
        for tokenizer in SMALL.iter().chain(LLAMA3.as_ref()).chain(STORIES.as_ref()) {
            assert_goes_on(tokenizer, &tokenizer.encode(&text, true).unwrap(), cut);
        }
    }

    #[test]
    fn any_tokens_go_on_where_they_are_cut(ids in prop::collection::vec(0u32..300, 0..60), cut in 0usize..60) {
        for tokenizer in SMALL.iter().chain(STORIES.as_ref()) {
            assert_goes_on(tokenizer, &ids, cut);
        }
    }

    #[test]
    fn any_llama3_tokens_go_on_where_they_are_cut(ids in prop::collection::vec(0u32..128_300, 0..60), cut in 0usize..60) {
        if let Some(tokenizer) = LLAMA3.as_ref() {
            assert_goes_on(tokenizer, &ids, cut);
        }
    }

    #[test]
    fn any_text_streams_whole(text in "(\\PC|[가-힣]|👩‍👩‍👧|🇰🇷|\\n| ){0,40}") {
        for tokenizer in SMALL.iter().chain(LLAMA3.as_ref()).chain(STORIES.as_ref()) {
            for ids in [tokenizer.encode(&text, true).unwrap(), tokenizer.encode_plain(&text).unwrap()] {
                assert_streams_as_it_decodes(tokenizer, &ids);
            }
        }
    }

    /// Ids that no encoder gives: half characters, stray bytes, special tokens in the midst, ids without a token.
    #[test]
    fn any_tokens_stream_as_they_decode(ids in prop::collection::vec(0u32..300, 0..60)) {
        for tokenizer in SMALL.iter().chain(STORIES.as_ref()) {
            assert_streams_as_it_decodes(tokenizer, &ids);
        }
    }

    #[test]
    fn any_llama3_tokens_stream_as_they_decode(ids in prop::collection::vec(0u32..128_300, 0..60)) {
        if let Some(tokenizer) = LLAMA3.as_ref() {
            assert_streams_as_it_decodes(tokenizer, &ids);
        }
    }

    /// Valid text, one token for each byte: every piece is whole characters, and comes as soon as its last byte has come.
    #[test]
    fn a_character_comes_with_its_last_byte(text in "(\\PC|[가-힣]|👩‍👩‍👧){0,20}") {
        let mut stream = SMALL[0].stream();
        let mut shown = String::new();
        for (n, byte) in text.bytes().enumerate() {
            let piece = stream.push(byte.into());
            prop_assert_eq!(piece.is_some(), text.is_char_boundary(n + 1));
            shown.extend(piece);
        }
        prop_assert_eq!((shown, stream.finish()), (text, None));
    }

    /// Compared with the definition, on an alphabet where stop strings overlap each other and themselves.
    #[test]
    fn stop_strings_do_not_depend_on_the_cuts(
        text in "[ab가]{0,30}", cuts in prop::collection::vec(0usize..40, 0..12), stops in prop::collection::vec("[ab가]{1,4}", 0..4),
    ) {
        let end = text.char_indices().map(|(i, c)| i + c.len_utf8()).find(|&e| stops.iter().any(|s| text[..e].ends_with(s.as_str())));
        let expected = match end {
            None => (text.as_str(), None),
            Some(end) => {
                let longest = stops.iter().filter(|s| text[..end].ends_with(s.as_str())).map(String::len).max().unwrap();
                let which = stops.iter().position(|s| s.len() == longest && text[..end].ends_with(s.as_str()));
                (&text[..end - longest], which)
            }
        };
        let mut stop = StopStrings::new(stops.clone()).unwrap();
        let (mut shown, mut seen, mut stopped) = (String::new(), String::new(), None);
        let mut cuts: Vec<usize> = cuts.into_iter().map(|c| text.floor_char_boundary(c.min(text.len()))).collect();
        cuts.extend([0, text.len()]);
        cuts.sort_unstable();
        for piece in cuts.windows(2).map(|w| &text[w[0]..w[1]]) {
            let found = stop.push(piece);
            shown.push_str(&found.text);
            seen.push_str(piece);
            stopped = found.stopped;
            if stopped.is_none() {
                // Exactly what could still become a stop string is held back.
                let could = |s: &String| (1..s.len()).filter(|&n| s.is_char_boundary(n) && seen.ends_with(&s[..n])).max();
                let held = stops.iter().filter_map(could).max().unwrap_or(0);
                prop_assert_eq!(&shown, &seen[..seen.len() - held]);
            }
        }
        shown.push_str(&stop.finish());
        prop_assert_eq!((shown.as_str(), stopped), expected);
    }
}

#[test]
fn stop_strings_hold_back_and_let_go() {
    let mut stops = StopStrings::new(vec!["\n\n### Question:".into(), "끝".into()]).unwrap();
    let mut shown = String::new();
    for piece in ["답은 ", "42\n", "\n#", "## Ques", "tions?"] {
        shown += &stops.push(piece).text;
    }
    assert_eq!(shown, "답은 42\n\n### Questions?");
    let found = stops.push("이제 끝이다");
    assert_eq!((found.text.as_str(), found.stopped), ("이제 ", Some(1)));
    let after = stops.push("더");
    assert_eq!((after.text.as_str(), after.stopped), ("", Some(1)));
    assert_eq!(stops.finish(), "");
    assert_eq!(stops.push("a\n").text, "a");
    assert_eq!(stops.finish(), "\n");
    assert!(StopStrings::new(vec!["a".into(), String::new()]).unwrap_err().to_string().contains("stop string 2"));
}

#[test]
fn a_stop_string_does_not_end_in_text_that_passes() {
    let mut stops = StopStrings::new(vec!["요하".into(), "aa".into()]).unwrap();
    assert_eq!([stops.pass("안녕하세요"), stops.pass("하늘 a"), stops.pass("a")], ["안녕하세", "요하늘 ", "a"]);
    // it ends later, and begins in what passed
    let found = stops.push("ab");
    assert_eq!((found.text.as_str(), found.stopped), ("", Some(1)));
}

/// Stop strings in the text of a stream whose tokens cut it anywhere, as in generation.
#[test]
fn stop_strings_over_bytes_of_characters() {
    let mut stream = SMALL[0].stream();
    let mut stops = StopStrings::new(vec!["끝<".into()]).unwrap();
    let mut shown = String::new();
    for byte in "가끝끝<|나".bytes() {
        let Some(piece) = stream.push(byte.into()) else { continue };
        let found = stops.push(&piece);
        shown += &found.text;
        if found.stopped.is_some() {
            break;
        }
    }
    assert_eq!(shown, "가끝");
}
