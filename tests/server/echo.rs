//! Completions whose text begins with the prompt, and what they say of the prompt's tokens.

use super::{Site, engine};
use serde_json::{Value, json};

fn text(reply: &Value) -> &str {
    reply["choices"][0]["text"].as_str().unwrap()
}

#[tokio::test]
async fn echo() {
    let site = Site::new().await;
    let prompt = "오늘은\n\ndata: 🫠";
    let plain = site.complete(json!({"prompt": prompt, "temperature": 0})).await;
    let echo = site.complete(json!({"prompt": prompt, "temperature": 0, "echo": true})).await;
    assert_eq!(text(&echo), format!("{prompt}{}", text(&plain)));
    let ids = engine().tokenizer().unwrap().encode(prompt, true).unwrap();
    let of_ids = site.complete(json!({"prompt": ids, "temperature": 0, "echo": true})).await;
    assert_eq!(text(&of_ids), text(&echo));
}

/// Requests as lm-evaluation-harness makes them, for the log-likelihood of a continuation.
#[tokio::test]
async fn log_likelihoods() {
    let site = Site::new().await;
    let (prefix, continuation) = ("한국의 수도는", " 서울입니다.");
    let tokenizer = engine().tokenizer().unwrap();
    let prefix = tokenizer.encode(prefix, true).unwrap();
    let continuation = tokenizer.encode(continuation, false).unwrap();
    let all = [&prefix[..], &continuation].concat();
    let body = json!({"prompt": all, "echo": true, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1234, "model": "demo"});
    let logprobs = site.complete(body).await["choices"][0]["logprobs"].take();
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[list].as_array().unwrap().len(), all.len() + 1, "{list}");
    }
    assert_eq!((&logprobs["token_logprobs"][0], &logprobs["top_logprobs"][0]), (&json!(null), &json!(null)));
    let scores = engine().score(&prefix, &[&continuation]).unwrap();
    let expected: f64 = scores.continuations[0].0.iter().map(|t| f64::from(t.logprob)).sum();
    let range = prefix.len()..all.len();
    let found: f64 = range.clone().map(|i| logprobs["token_logprobs"][i].as_f64().unwrap()).sum();
    assert!((found - expected).abs() < 1e-2, "{found} {expected}");
    for i in range {
        let top = logprobs["top_logprobs"][i].as_object().unwrap();
        let most = top.values().map(|v| v.as_f64().unwrap()).fold(f64::MIN, f64::max);
        assert!(logprobs["token_logprobs"][i].as_f64().unwrap() <= most);
    }
    let none = json!({"prompt": all, "echo": true, "logprobs": 1, "max_tokens": 0});
    assert_eq!(site.complete(none).await["choices"][0]["logprobs"]["tokens"].as_array().unwrap().len(), all.len());
}

/// Offsets count the characters of the text that comes back: the client's own has no BOS, and has the special tokens that it names.
#[tokio::test]
async fn offsets_count_the_text_that_comes_back() {
    let site = Site::new().await;
    let bos = 2046;
    let hello = engine().tokenizer().unwrap().encode("안녕", false).unwrap();
    assert_eq!(hello.len(), 1);
    let ids = [bos, hello[0]];
    for (prompt, skip, begin, expected) in [
        (json!("안녕"), true, "안녕", &[0, 0, 2][..]),
        (json!("안녕"), false, "안녕", &[0, 0, 2]),
        (json!("안녕<|end_of_text|>a"), true, "안녕<|end_of_text|>a", &[0, 0, 2, 17, 18]),
        (json!("안녕<|end_of_text|>a"), false, "안녕<|end_of_text|>a", &[0, 0, 2, 17, 18]),
        (json!("<|begin_of_text|>안녕"), true, "<|begin_of_text|>안녕", &[0, 17, 19]),
        (json!(ids), true, "안녕", &[0, 0, 2]),
        (json!(ids), false, "<|begin_of_text|>안녕", &[0, 17, 19]),
    ] {
        let body = json!({"prompt": prompt, "max_tokens": 2, "echo": true, "logprobs": 0, "temperature": 0, "skip_special_tokens": skip});
        let mut forced = body.clone();
        forced["logit_bias"] = json!({hello[0].to_string(): 1000});
        let choice = site.complete(forced.clone()).await["choices"][0].take();
        assert_eq!(choice["text"].as_str().unwrap(), format!("{begin}안녕안녕"));
        let last = expected[expected.len() - 1] + 2;
        assert_eq!(choice["logprobs"]["text_offset"], json!([expected, &[last]].concat()), "{body}");
        forced["stream"] = true.into();
        let events = site.post("/v1/completions", &forced).await.events();
        let offsets =
            events.iter().flat_map(|e| e["choices"][0]["logprobs"]["text_offset"].as_array().unwrap().clone());
        assert_eq!(Value::from_iter(offsets), choice["logprobs"]["text_offset"], "{body}");
    }
}

/// Each of the two fields has its own number of alternatives.
#[tokio::test]
async fn two_numbers_of_alternatives() {
    let site = Site::new().await;
    let ask = async |more: Value| {
        let mut body = json!({"prompt": "안녕하세요 여러분", "max_tokens": 1, "echo": true, "temperature": 0});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        site.complete(body).await["choices"][0].take()
    };
    for (logprobs, of_prompt) in [(1, 4), (4, 1), (0, 2), (3, 3)] {
        let both = ask(json!({"logprobs": logprobs, "prompt_logprobs": of_prompt})).await;
        assert_eq!(both["logprobs"], ask(json!({"logprobs": logprobs})).await["logprobs"]);
        assert_eq!(both["prompt_logprobs"], ask(json!({"prompt_logprobs": of_prompt})).await["prompt_logprobs"]);
        for top in &both["logprobs"]["top_logprobs"].as_array().unwrap()[1..] {
            let found = top.as_object().unwrap().len();
            assert!((logprobs.max(1)..=logprobs + 1).contains(&found), "{top}"); // the token itself may be one of them
        }
        for token in &both["prompt_logprobs"].as_array().unwrap()[1..] {
            assert!((of_prompt..=of_prompt + 1).contains(&token.as_object().unwrap().len()), "{token}");
        }
    }
}

/// A character whose beginning is the prompt's and whose end the answer's comes once, whole.
#[tokio::test]
async fn half_a_character_at_the_end() {
    let site = Site::new().await;
    let tokenizer = engine().tokenizer().unwrap();
    let half = [2046, 584];
    let decode = |ids: &[u32]| tokenizer.decode(ids, true).unwrap();
    let letter = tokenizer.token_id("a").unwrap();
    for (next, expected) in [(237, "햏"), (letter, "\u{FFFD}a")] {
        assert_eq!(decode(&[half[0], half[1], next]), expected);
        let mut body = json!({"prompt": half, "max_tokens": 1, "echo": true, "logprobs": 0, "logit_bias": {next.to_string(): 1000}});
        let reply = site.complete(body.clone()).await;
        assert_eq!(text(&reply), expected);
        let offset = expected.chars().count() - 1; // the last token ends the last character
        assert_eq!(reply["choices"][0]["logprobs"]["text_offset"], json!([0, 0, offset]));
        body["stream"] = true.into();
        let events = site.post("/v1/completions", &body).await.events();
        assert_eq!(events.iter().map(text).collect::<String>(), expected);
    }
    // Without an answer it stays half.
    let none = site.complete(json!({"prompt": half, "max_tokens": 0, "echo": true})).await;
    assert_eq!(text(&none), "\u{FFFD}");
}

/// A prompt of exactly the context has room, if no answer is asked for.
#[tokio::test]
async fn a_prompt_as_long_as_the_context() {
    let site = Site::new().await;
    let prompt: Vec<u32> = (0..1024).map(|i| 70 + i * 7 % 50).collect();
    let body = json!({"prompt": prompt, "max_tokens": 0, "echo": true, "logprobs": 1});
    let reply = site.complete(body).await;
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
    assert_eq!(text(&reply), engine().tokenizer().unwrap().decode(&prompt, true).unwrap());
    let found = reply["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap();
    assert_eq!((found.len(), &found[0]), (1024, &json!(null)));
    let scores = engine().score(&prompt[..1], &[&prompt[1..]]).unwrap();
    for (found, expected) in found[1..].iter().zip(&scores.continuations[0].0) {
        assert!((found.as_f64().unwrap() - f64::from(expected.logprob)).abs() < 1e-2, "{found} {}", expected.logprob);
    }
    let one_more = [&prompt[..], &[70]].concat();
    let error = site.error("/v1/completions", json!({"prompt": one_more, "max_tokens": 0}), 400).await;
    assert!(error["message"].as_str().unwrap().contains("needs 1025: 1025 of the prompt and 0"), "{error}");
}
