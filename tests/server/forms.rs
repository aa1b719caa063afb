//! Requests in the forms in which clients send them.

use super::{QUESTION, Site, answer, engine, http, question};
use aoji::Message;
use serde_json::{Value, json};

#[tokio::test]
async fn a_byte_order_mark_and_slashes_too_many() {
    let site = Site::new().await;
    let expected = site.complete(json!({"prompt": "가", "temperature": 0})).await["choices"].take();
    let body = format!("\u{FEFF}{}", json!({"prompt": "가", "temperature": 0}));
    let headers = [("Content-Type", "application/json")];
    let paths = ["/v1/completions", "//v1/completions", "/v1//completions", "/v1/completions/", "///v1//completions//"];
    for path in paths {
        let reply = http::request(&site.target(), "POST", path, &headers, &body).await;
        assert_eq!((reply.status, &reply.json()["choices"]), (200, &expected), "{path}");
    }
    assert_eq!(site.get("/v1/completions/").await.status, 405);
    for path in ["//", "/v1//models/other/name", "/health/?probe=1", "//tokenizer_info?x=//"] {
        assert_eq!(site.get(path).await.status, 200, "{path}");
    }
    let twice = format!("\u{FEFF}{body}");
    http::request(&site.target(), "POST", "/v1/completions", &headers, &twice).await.error(400);
}

/// Every field that is a whole number in the description of the routes may be written as a float, as some clients do.
#[tokio::test]
async fn whole_numbers_may_be_written_as_floats() {
    let site = Site::new().await;
    let openapi = site.get("/openapi.json").await.json();
    let whole = |property: &Value| match &property["type"] {
        Value::Array(types) => types.contains(&json!("integer")),
        one => *one == "integer",
    };
    let mut seen = Vec::new();
    for (name, path) in [("CompletionRequest", "/v1/completions"), ("ChatRequest", "/v1/chat/completions")] {
        let schema = openapi["components"]["schemas"][name].to_string();
        let parts = ["Common", "CompletionFields", "ChatFields"].map(|part| &openapi["components"]["schemas"][part]);
        let parts = parts.into_iter().chain([&openapi["components"]["schemas"][name]]);
        let mut properties = Vec::new();
        for part in parts {
            let lists = part["allOf"].as_array().into_iter().flatten().chain([part]);
            properties.extend(lists.filter_map(|p| p["properties"].as_object()).flatten());
        }
        for (field, _) in properties.into_iter().filter(|(_, p)| whole(p)) {
            let mut body = match path {
                "/v1/completions" if field.starts_with("top_logprobs") => continue,
                "/v1/completions" => json!({"prompt": "가", "max_tokens": 2}),
                _ if ["best_of", "logprobs"].contains(&field.as_str()) => continue,
                _ => question(json!({"max_tokens": 2, "logprobs": true})),
            };
            body[field] = json!(if field == "max_completion_tokens" { 2.0 } else { 1.0 });
            let reply = site.post(path, &body).await;
            assert_eq!(reply.status, 200, "{field} of {schema}: {}", reply.body);
            seen.push(field.clone());
        }
    }
    for field in
        ["max_tokens", "n", "top_k", "seed", "min_tokens", "prompt_logprobs", "logprobs", "best_of", "top_logprobs"]
    {
        assert!(seen.iter().any(|s| s == field), "{field} in {seen:?}");
    }
    let reply = site
        .complete(json!({"prompt": [5.0, 6.0], "max_tokens": 4.0, "stop_token_ids": [7.0], "ignore_eos": true}))
        .await;
    assert_eq!((&reply["usage"]["completion_tokens"], &reply["usage"]["prompt_tokens"]), (&json!(4), &json!(2)));
}

#[tokio::test]
async fn an_answer_that_was_begun() {
    let site = Site::new().await;
    let whole = answer().1;
    let cut = whole.find(' ').unwrap(); // where a token ends
    let body = |more: Value| {
        let mut body = question(more);
        body["messages"].as_array_mut().unwrap().push(json!({"role": "assistant", "content": &whole[..cut]}));
        body
    };
    for more in [
        json!({"continue_final_message": true}),
        json!({"continue_final_message": true, "add_generation_prompt": false, "return_token_ids": true}),
    ] {
        let reply = site.chat(body(more)).await;
        assert_eq!(reply["choices"][0]["message"]["content"], whole[cut..]);
    }
    let messages = [Message::new("user", QUESTION), Message::begun(&whole[..cut])];
    let ids = engine().template().encode(engine().tokenizer().unwrap(), &messages, None).unwrap();
    let tokens = json!({"messages": body(json!({}))["messages"], "continue_final_message": true});
    assert_eq!(site.ok("/tokenize", tokens).await["tokens"], json!(ids));

    for (path, body, param) in [
        (
            "/v1/chat/completions",
            body(json!({"continue_final_message": true, "add_generation_prompt": true})),
            "add_generation_prompt",
        ),
        ("/v1/chat/completions", question(json!({"continue_final_message": true})), "continue_final_message"),
        ("/v1/chat/completions", question(json!({"add_generation_prompt": false})), "add_generation_prompt"),
        ("/tokenize", json!({"messages": [], "continue_final_message": true}), "messages"),
    ] {
        assert_eq!(site.error(path, body, 400).await["param"], param);
    }
}
