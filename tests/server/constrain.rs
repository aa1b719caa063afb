//! Constraints alone: what they allow with the demo model's vocabulary.

use super::{Site, common, engine, question, tokenizers};
use aoji::{
    Constraint, Tokenizer,
    server::{Format, Grammar, Grammars},
};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::OnceLock;

const EOS: u32 = 2047;

fn grammars() -> &'static Grammars {
    static GRAMMARS: OnceLock<Grammars> = OnceLock::new();
    GRAMMARS.get_or_init(|| Grammars::new(engine().tokenizer().unwrap(), 2048, &[EOS]).unwrap())
}

fn compile(format: Format) -> Grammar {
    grammars().compile(&format).unwrap()
}

fn allowed(grammar: &mut Grammar) -> Vec<u32> {
    let mut mask = vec![0; engine().config().vocab.div_ceil(32)];
    grammar.allowed(&mut mask).unwrap();
    (0..engine().config().vocab as u32).filter(|t| mask[*t as usize / 32] >> (t % 32) & 1 == 1).collect()
}

/// Whether a text may be written, and may end there.
fn takes(format: &Format, text: &str) -> bool {
    let tokenizer = engine().tokenizer().unwrap();
    let mut grammar = compile(format.clone());
    for id in tokenizer.encode_plain(text).unwrap() {
        if !allowed(&mut grammar).contains(&id) {
            return false;
        }
        grammar.accept(id).unwrap();
    }
    allowed(&mut grammar).contains(&EOS)
}

#[test]
fn choices() {
    let format = Format::Choice(vec!["서울".into(), "서산".into(), "a\"b\\\n".into()]);
    for text in ["서울", "서산", "a\"b\\\n"] {
        assert!(takes(&format, text), "{text:?}");
    }
    for text in ["", "서", "서울시", "부산", "a", " 서울"] {
        assert!(!takes(&format, text), "{text:?}");
    }
    // Exactly the tokens with which one of them goes on, and no special one.
    let tokenizer = engine().tokenizer().unwrap();
    let goes_on = |t: &u32| {
        let bytes = tokenizer.token_bytes(*t);
        !tokenizer.is_special(*t)
            && !bytes.is_empty()
            && ["서울", "서산", "a\"b\\\n"].iter().any(|c| c.as_bytes().starts_with(&bytes))
    };
    let expected: Vec<u32> = (0..engine().config().vocab as u32).filter(goes_on).collect();
    assert_eq!(allowed(&mut compile(format)), expected);
}

/// Any text can be a choice, and there may be many.
#[test]
fn choices_of_any_characters() {
    let all = [
        "",
        "a",
        "a\u{1}b",
        "a\u{7f}\u{0}b",
        "\r\n\t",
        "\u{85}\u{2028}",
        "a.b|c?(d)[e]{2}^$&~-#x",
        "a/b//c\\d\\",
        "\"'`i",
    ];
    let texts = || all.map(String::from).to_vec();
    let format = Format::Choice(texts());
    for text in all {
        assert!(takes(&format, text), "{text:?}");
        assert!(takes(&Format::Choice(vec![text.into()]), text), "{text:?}");
    }
    for text in ["b", "aXb", "a\u{1}", "c", "a.b", "a/b", "A"] {
        assert!(!takes(&format, text), "{text:?}");
    }
    let many: Vec<String> = (0..5000).map(|i| format!("{i} 번")).collect();
    assert!(takes(&Format::Choice(many.clone()), "4999 번") && !takes(&Format::Choice(many), "5000 번"));
}

/// Names of fields and constants are expected tokens; asking for these does not change what is allowed.
#[test]
fn what_must_follow_is_expected() {
    let schema = json!({
        "type": "object", "required": ["temperature", "description"], "additionalProperties": false,
        "properties": {"temperature": {"type": "integer"}, "description": {"const": "오늘은 맑음"}}
    });
    let tokens =
        engine().tokenizer().unwrap().encode_plain(r#"{"temperature":21,"description":"오늘은 맑음"}"#).unwrap();
    let (mut asked, mut plain) = (compile(Format::JsonSchema(schema.clone())), compile(Format::JsonSchema(schema)));
    let mut expected_right = 0;
    for (i, &id) in tokens.iter().enumerate() {
        let expected = asked.expected();
        assert_eq!(asked.allows(&expected), expected.len());
        expected_right += expected.iter().zip(&tokens[i..]).take(1).filter(|(a, b)| a == b).count();
        assert_eq!(allowed(&mut asked), allowed(&mut plain), "before token {i}");
        asked.accept(id).unwrap();
        plain.accept(id).unwrap();
    }
    assert!(expected_right * 2 > tokens.len(), "{expected_right} of {}", tokens.len());
    assert!(allowed(&mut asked).contains(&EOS) && asked.expected().is_empty());
    assert_eq!(compile(Format::Regex("[a-z]+".into())).allows(&[tokens[0]]), 0);
}

#[test]
fn regular_expressions() {
    let format = Format::Regex(r"\d{3}-\d{4}".into());
    assert!(takes(&format, "010-1234"));
    for text in ["010-123", "010-12345", "abc-1234", ""] {
        assert!(!takes(&format, text), "{text:?}");
    }
    assert!(takes(&Format::Regex("[가-힣]+".into()), "한글만"));
    assert!(!takes(&Format::Regex("[가-힣]+".into()), "한글 a"));
    assert!(takes(&Format::Lark("start: \"<\" NAME \">\"\nNAME: /[a-z]+/".into()), "<name>"));
}

#[test]
fn json_is_compact() {
    let schema = json!({
        "type": "object", "additionalProperties": false, "required": ["name", "age"],
        "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0}}
    });
    let format = Format::JsonSchema(schema);
    assert!(takes(&format, r#"{"name":"철수","age":7}"#));
    for text in [
        r#"{"name": "철수","age":7}"#, // a blank
        "{\n",
        r#"{"name":"철수"}"#,
        r#"{"name":"여섯글자이름","age":7}"#,
        r#"{"name":"철수","age":-7}"#,
        r#"{"name":"철수","age":7,"x":1}"#,
        "[]",
        "",
    ] {
        assert!(!takes(&format, text), "{text:?}");
    }
    assert!(takes(&Format::JsonObject, r#"{"a":[1,2,{"b":null}],"한":"글"}"#));
    for text in ["[]", "1", "{}x", " {}", "{\"a\":1,}"] {
        assert!(!takes(&Format::JsonObject, text), "{text:?}");
    }
}

#[test]
fn after_the_end_only_the_end() {
    let mut grammar = compile(Format::Choice(vec!["a".into()]));
    let a = engine().tokenizer().unwrap().encode_plain("a").unwrap()[0];
    let mut other = grammar.clone();
    grammar.accept(a).unwrap();
    assert_eq!(allowed(&mut grammar), [EOS]);
    grammar.accept(EOS).unwrap();
    assert_eq!(allowed(&mut grammar), [EOS]);
    for token in [0, a] {
        assert!(grammar.accept(token).unwrap_err().contains("logit_bias"));
    }
    assert_eq!(allowed(&mut other), [a], "a clone is on its own");
    assert!(other.accept(EOS).is_err(), "what is not allowed is not accepted");
}

#[test]
fn wrong_formats() {
    for format in [
        Format::Regex("(".into()),
        Format::Choice(vec![]),
        Format::Lark("start: missing".into()),
        Format::Lark(String::new()),
        Format::JsonSchema(json!({"type": "nothing"})),
        Format::JsonSchema(json!({"$ref": "https://example.com/schema"})),
    ] {
        assert!(grammars().compile(&format).err().is_some_and(|why| !why.is_empty()), "{format:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whichever of the allowed tokens are chosen, the result is a JSON object, or the beginning of one.
    #[test]
    fn any_walk_is_json(picks in proptest::collection::vec(any::<u32>(), 1..40)) {
        let schema = json!({
            "type": "object", "additionalProperties": false, "required": ["ok", "n"],
            "properties": {"ok": {"type": "boolean"}, "n": {"enum": ["하나", "둘"]}}
        });
        let mut grammar = compile(Format::JsonSchema(schema));
        let mut bytes = Vec::new();
        for pick in picks {
            let ids = allowed(&mut grammar);
            prop_assert!(!ids.is_empty());
            let id = ids[pick as usize % ids.len()];
            grammar.accept(id).unwrap();
            if id == EOS {
                let value: Value = serde_json::from_slice(&bytes).unwrap();
                prop_assert!(value["ok"].is_boolean() && value["n"].is_string());
                return Ok(());
            }
            bytes.extend(engine().tokenizer().unwrap().token_bytes(id));
        }
        prop_assert_eq!(bytes[0], b'{');
    }
}

/// Some tokenizers list the token that ends a text as an added one that is not special (Qwen's `<|im_end|>` in some conversions): it ends
/// an answer, and is no text within one.
#[test]
fn an_end_that_is_an_added_token() {
    let mut file = tokenizers::byte_level(&[], &["<|begin_of_text|>", "<|im_end|>"]);
    file["added_tokens"][1]["special"] = json!(false);
    let tokenizer = Tokenizer::from_bytes("tokenizer.json", file.to_string().as_bytes()).unwrap();
    let end = tokenizer.token_id("<|im_end|>").unwrap();
    assert!(!tokenizer.is_special(end));
    let grammars = Grammars::new(&tokenizer, 258, &[end]).unwrap();
    for format in [
        Format::JsonSchema(json!({"type": "string"})),
        Format::Regex("\"(.|\n)*\"".into()),
        Format::Lark("start: TEXT\nTEXT: /\"(.|\\n)*\"/".into()),
    ] {
        let mut grammar = grammars.compile(&format).unwrap();
        let mut ends = |byte: u8| {
            grammar.accept(byte.into()).unwrap();
            let mut mask = vec![0; 258usize.div_ceil(32)];
            grammar.allowed(&mut mask).unwrap();
            mask[end as usize / 32] >> (end % 32) & 1 == 1
        };
        assert_eq!([ends(b'"'), ends(b'a'), ends(b'"')], [false, false, true], "{format:?}");
        grammar.accept(end).unwrap();
    }
}

/// A vocabulary of 128256 tokens with two that end a text.
#[test]
fn llama_3() {
    let Some(dir) = common::data("llama3-tokenizer/tokenizer.json") else { return };
    let tokenizer = Tokenizer::from_dir(dir.parent().unwrap()).unwrap().unwrap();
    let (vocab, eos) = (128_256, [128_001, 128_009]);
    let begin = std::time::Instant::now();
    let grammars = Grammars::new(&tokenizer, vocab, &eos).unwrap();
    println!("the vocabulary: {:?}", begin.elapsed());
    let schema = json!({"type": "object", "properties": {"이름": {"type": "string"}}, "required": ["이름"]});
    let begin = std::time::Instant::now();
    let mut grammar = grammars.compile(&Format::JsonSchema(schema)).unwrap();
    println!("the schema: {:?}", begin.elapsed());
    let mut mask = vec![0; vocab.div_ceil(32)];
    let mut longest = std::time::Duration::ZERO;
    for id in tokenizer.encode_plain("{\"이름\":\"홍길동\\n\"}").unwrap() {
        let begin = std::time::Instant::now();
        mask.fill(0);
        grammar.allowed(&mut mask).unwrap();
        longest = longest.max(begin.elapsed());
        assert_eq!(mask[id as usize / 32] >> (id % 32) & 1, 1, "{id}");
        grammar.accept(id).unwrap();
    }
    println!("the longest mask: {longest:?}");
    mask.fill(0);
    grammar.allowed(&mut mask).unwrap();
    for id in eos {
        assert_eq!(mask[id as usize / 32] >> (id % 32) & 1, 1, "{id} may end it");
    }
    assert!(Grammars::new(&tokenizer, vocab, &[]).is_err() && Grammars::new(&tokenizer, vocab, &[200_000]).is_err());
}

#[tokio::test]
async fn answers_follow_their_format() {
    let site = Site::new().await;
    let content = async |more: Value| {
        let reply = site.chat(question(more)).await;
        assert_eq!(reply["choices"][0]["finish_reason"], "stop");
        reply["choices"][0]["message"]["content"].as_str().unwrap().to_string()
    };
    let schema = json!({
        "type": "object", "additionalProperties": false, "required": ["a"], "properties": {"a": {"enum": ["가", "나"]}}
    });
    let named = json!({"type": "json_schema", "json_schema": {"name": "x", "strict": true, "schema": schema}});
    for more in [
        json!({"response_format": named}),
        json!({"guided_json": schema}),
        json!({"structured_outputs": {"json": schema}}),
    ] {
        let value: Value = serde_json::from_str(&content(more).await).unwrap();
        assert!(value["a"] == "가" || value["a"] == "나");
    }
    assert!(
        ["예", "아니오"].contains(&content(json!({"structured_outputs": {"choice": ["예", "아니오"]}})).await.as_str())
    );
    let number = content(json!({"guided_regex": "[0-9]{4}", "temperature": 5.0, "seed": 1})).await;
    assert!(number.len() == 4 && number.parse::<u32>().is_ok());
    let several = site.chat(question(json!({"guided_regex": "[ab]{3}", "n": 4, "temperature": 1.0}))).await;
    assert!(
        several["choices"].as_array().unwrap().iter().all(|c| c["message"]["content"].as_str().unwrap().len() == 3)
    );
}

/// Where a bias forbids all that the format allows, the request fails: no answer is of another form.
#[tokio::test]
async fn a_bias_against_the_format() {
    let site = Site::new().await;
    let bias = json!({EOS.to_string(): -1e39});
    let body = json!({"prompt": "안녕", "max_tokens": 12, "temperature": 0, "guided_choice": ["가", "나"], "logit_bias": bias});
    let error = site.error("/v1/completions", body, 400).await;
    assert_eq!(error["code"], "constraint_failed", "{error}");
}
