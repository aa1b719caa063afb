//! Streams: their events, and that together they give the same as a whole reply, wherever tokens cut a text.

use super::{Site, answer, engine, http, question};
use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};
use serde_json::{Value, json};

/// The texts of a stream's first choice, in one.
fn joined(events: &[Value]) -> String {
    let text = |event: &Value| {
        let choice = &event["choices"][0];
        choice["delta"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default().to_string()
    };
    events.iter().map(text).collect()
}

#[tokio::test]
async fn chat() {
    let site = Site::new().await;
    let reply = site.post("/v1/chat/completions", &question(json!({"stream": true}))).await;
    assert_eq!(reply.header("x-accel-buffering"), "no");
    let events = reply.events();
    assert_eq!(joined(&events), answer().1);
    for event in &events {
        assert_eq!((&event["object"], &event["id"]), (&json!("chat.completion.chunk"), &events[0]["id"]));
        assert_eq!(event.get("usage"), None, "it was not asked for");
    }
    let choices: Vec<&Value> = events.iter().map(|e| &e["choices"][0]).collect();
    assert_eq!(choices[0]["delta"]["role"], "assistant");
    assert!(choices[0]["delta"]["content"].as_str().is_some_and(|c| !c.is_empty()), "with the first token");
    let (last, before) = choices.split_last().unwrap();
    assert_eq!((&last["finish_reason"], &last["delta"]), (&json!("stop"), &json!({})));
    for choice in &before[1..] {
        assert_eq!((choice["delta"].get("role"), &choice["finish_reason"]), (None, &json!(null)));
    }
    assert!(events.last().unwrap()["timings"]["ttft_ms"].is_f64());
}

#[tokio::test]
async fn usage() {
    let site = Site::new().await;
    for path in ["/v1/chat/completions", "/v1/completions"] {
        let body = |options: Value| match path {
            "/v1/completions" => {
                json!({"prompt": "가", "stream": true, "max_tokens": 5, "ignore_eos": true, "stream_options": options})
            }
            _ => question(json!({"stream": true, "max_tokens": 5, "stream_options": options})),
        };
        let events = site.post(path, &body(json!({"include_usage": true}))).await.events();
        let (last, before) = events.split_last().unwrap();
        assert_eq!((&last["choices"], &last["usage"]["completion_tokens"]), (&json!([]), &json!(5)));
        assert!(
            before.iter().all(|e| e["choices"].as_array().unwrap().len() == 1 && e.get("usage") == Some(&Value::Null))
        );
        let events =
            site.post(path, &body(json!({"include_usage": true, "continuous_usage_stats": true}))).await.events();
        let counts: Vec<u64> = events.iter().map(|e| e["usage"]["completion_tokens"].as_u64().unwrap()).collect();
        assert!(counts.is_sorted() && counts.last() == Some(&5), "{counts:?}");
    }
}

#[tokio::test]
async fn several_answers() {
    let site = Site::new().await;
    let body = |stream| json!({"prompt": ["오늘", "내일"], "n": 2, "seed": 3, "max_tokens": 8, "echo": true, "stream": stream});
    let whole = site.complete(body(false)).await;
    let events = site.post("/v1/completions", &body(true)).await.events();
    for (i, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
        let own: Vec<&Value> = events.iter().map(|e| &e["choices"][0]).filter(|c| c["index"] == i).collect();
        let text: String = own.iter().map(|c| c["text"].as_str().unwrap()).collect();
        assert_eq!(json!(text), choice["text"]);
        assert_eq!(own.iter().filter(|c| !c["finish_reason"].is_null()).count(), 1);
        assert_eq!(own.last().unwrap()["finish_reason"], choice["finish_reason"]);
    }
    let timed: Vec<bool> = events.iter().map(|e| e.get("timings").is_some()).collect();
    assert_eq!(timed.iter().filter(|t| **t).count(), 1);
    assert_eq!(timed.last(), Some(&true));
    let chat =
        site.post("/v1/chat/completions", &question(json!({"n": 3, "stream": true, "max_tokens": 4}))).await.events();
    let roles = chat.iter().filter(|e| !e["choices"][0]["delta"]["role"].is_null()).count();
    assert_eq!(roles, 3, "one for each answer");
}

#[tokio::test]
async fn nothing_to_say() {
    let site = Site::new().await;
    let stop: String = answer().1.chars().take(1).collect();
    let events = site.post("/v1/chat/completions", &question(json!({"stream": true, "stop": stop}))).await.events();
    assert_eq!((joined(&events).as_str(), &events[0]["choices"][0]["delta"]["role"]), ("", &json!("assistant")));
    let none = site.post("/v1/completions", &json!({"prompt": "가", "stream": true, "max_tokens": 0})).await.events();
    assert_eq!((none.len(), &none[0]["choices"][0]["finish_reason"]), (1, &json!("length")));
    // What is wrong is said with a status, not in a stream.
    site.error("/v1/completions", json!({"prompt": "가", "stream": true, "n": 0}), 400).await;
}

#[tokio::test]
async fn logprobs() {
    let site = Site::new().await;
    let body = |stream| json!({"prompt": "오늘", "max_tokens": 6, "echo": true, "logprobs": 2, "temperature": 0, "stream": stream});
    let whole = site.complete(body(false)).await["choices"][0]["logprobs"].take();
    let events = site.post("/v1/completions", &body(true)).await.events();
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        let parts = events.iter().flat_map(|e| e["choices"][0]["logprobs"][list].as_array().unwrap().clone());
        assert_eq!(json!(parts.collect::<Vec<_>>()), whole[list], "{list}");
    }
    let body = |stream| question(json!({"max_tokens": 6, "logprobs": true, "top_logprobs": 2, "stream": stream}));
    let whole = site.chat(body(false)).await["choices"][0]["logprobs"]["content"].take();
    let events = site.post("/v1/chat/completions", &body(true)).await.events();
    let parts = events.iter().filter_map(|e| e["choices"][0]["logprobs"]["content"].as_array()).flatten();
    assert_eq!(json!(parts.collect::<Vec<_>>()), whole);
}

/// Runs `test` on `cases` random values; it also gets a server.
pub fn each<S: Strategy>(cases: u32, strategy: S, test: impl AsyncFn(&Site, S::Value)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let site = runtime.block_on(Site::new());
    let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
    let tested = runner.run(&strategy, |value| {
        runtime.block_on(test(&site, value));
        Ok(())
    });
    tested.unwrap();
}

/// At this temperature all tokens are about as likely: halves of syllables, bytes that are no text, special tokens.
#[test]
fn streams_say_what_replies_say() {
    each(20, (any::<i64>(), any::<bool>(), any::<bool>()), async |site, (seed, special, chat)| {
        let more = json!({
            "temperature": 90.0, "seed": seed, "max_tokens": 24, "ignore_eos": true, "skip_special_tokens": special,
            "return_token_ids": true, "messages": [{"role": "user", "content": "한글"}]
        });
        let (path, mut body) = if chat { ("/v1/chat/completions", more) } else { ("/v1/completions", more) };
        if !chat {
            body.as_object_mut().unwrap().remove("messages");
            body["prompt"] = json!("한글");
        }
        let whole = site.ok(path, body.clone()).await["choices"][0].take();
        body["stream"] = json!(true);
        let events = site.post(path, &body).await.events();
        let text = whole["message"]["content"].as_str().or(whole["text"].as_str()).unwrap();
        assert_eq!(joined(&events), text);
        let ids: Vec<u32> = serde_json::from_value(whole["token_ids"].clone()).unwrap();
        assert_eq!(engine().tokenizer().unwrap().decode(&ids, special).unwrap(), text);
        let parts = events.iter().filter_map(|e| e["choices"][0]["token_ids"].as_array()).flatten();
        assert_eq!(json!(parts.collect::<Vec<_>>()), whole["token_ids"]);
    });
}

/// Any text survives the way there and back, also if it contains what SSE itself is made of.
#[test]
fn texts_survive() {
    let text = proptest::collection::vec(
        prop_oneof![
            "[가-힣]{1,4}",
            "\\PC{0,4}",
            Just("\n\ndata: [DONE]\r\n".to_string()),
            Just("\r\r".into()),
            Just(":".into())
        ],
        1..8,
    );
    each(20, text, async |site, parts| {
        let text = parts.concat();
        let body = json!({"prompt": text, "echo": true, "max_tokens": 0, "stream": true});
        let reply = http::post(&site.target(), "/v1/completions", &[], &body).await;
        assert_eq!(joined(&reply.events()), text);
    });
}

/// A stop string is never seen, wherever in the answer it is.
#[test]
fn stop_strings_are_never_seen() {
    let expected = answer().1;
    let chars: Vec<char> = expected.chars().collect();
    let range = (0..chars.len(), 1usize..12, any::<bool>());
    each(20, range, async |site, (start, length, special)| {
        let stop: String = chars[start..(start + length).min(chars.len())].iter().collect();
        let before = expected.split(&stop).next().unwrap();
        let body = question(json!({"stop": [stop], "stream": true, "skip_special_tokens": special}));
        assert_eq!(joined(&site.post("/v1/chat/completions", &body).await.events()), before, "{stop:?}");
    });
}
