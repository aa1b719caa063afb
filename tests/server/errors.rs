//! Each wrong request gets its status and an error that names the field; none of them is a fault of the server.

use super::{Site, http, question, stream::each};
use aoji::server::{Phase, ServerOptions};
use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

#[tokio::test]
async fn values_out_of_range() {
    let site = Site::new().await;
    for (param, value) in [
        ("temperature", json!(-1)),
        ("temperature", json!(1e300)),
        ("temperature", json!("hot")),
        ("top_p", json!(-0.1)),
        ("top_p", json!(1.5)),
        ("top_k", json!(-2)),
        ("top_k", json!(1u64 << 40)),
        ("top_k", json!(1.5)),
        ("min_p", json!(2)),
        ("n", json!(0)),
        ("n", json!(129)),
        ("n", json!(-1)),
        ("n", json!(100)), // more than the queue ever takes
        ("max_tokens", json!(-1)),
        ("max_tokens", json!(1.5)),
        ("max_tokens", json!([])),
        ("stop", json!([""])),
        ("stop", json!([1])),
        ("stop", json!({})),
        ("stop", json!(vec!["x"; 65])),
        ("stop", json!("x".repeat(1025))),
        ("seed", json!("x")),
        ("seed", json!(1e30)),
        ("logit_bias", json!({"a": 1})),
        ("logit_bias", json!({"99999": 1})),
        ("logit_bias.5", json!({"5": "x"})),
        ("logit_bias", json!([1])),
        ("presence_penalty", json!(1000)),
        ("frequency_penalty", json!(-1000)),
        ("repetition_penalty", json!(0)),
        ("min_tokens", json!(-1)),
        ("stop_token_ids", json!([99999])),
        ("stop_token_ids", json!(vec![1; 257])),
        ("stop_token_ids[0]", json!([-1])),
        ("ignore_eos", json!(1)),
        ("stream", json!("yes")),
        ("stream_options", json!({"include_usage": true})), // without a stream
        ("stream_options.include_usage", json!({"include_usage": 3})),
        ("prompt_logprobs", json!(21)),
        ("response_format.type", json!({"type": "yaml"})),
        ("response_format.type", json!({})),
        ("response_format.json_schema", json!({"type": "json_schema"})),
        ("response_format.json_schema.schema", json!({"type": "json_schema", "json_schema": {"name": "x"}})),
        ("response_format.json_schema.schema", json!({"type": "json_schema", "json_schema": {"schema": [1]}})),
        ("response_format", json!({"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}})),
        ("structured_outputs", json!({"regex": "("})),
        ("structured_outputs", json!({"choice": []})),
        ("structured_outputs", json!({"grammar": "start: missing"})),
        ("structured_outputs", json!({"regex": "a", "choice": ["a"]})),
        ("guided_json", json!("{")),
        ("guided_regex", json!("[")),
    ] {
        for (path, mut body) in [
            ("/v1/completions", json!({"prompt": "가"})),
            ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "가"}]})),
        ] {
            let field = param.split(['.', '[']).next().unwrap();
            body[field] = value.clone();
            assert_eq!(site.error(path, body.clone(), 400).await["param"], param, "{path} {body}");
        }
    }
    for max in [json!({"max_tokens": 2}), json!({"max_completion_tokens": 2})] {
        let mut body = question(json!({"min_tokens": 3}));
        body.as_object_mut().unwrap().extend(max.as_object().unwrap().clone());
        let error = site.error("/v1/chat/completions", body, 400).await;
        assert_eq!(error["param"], "min_tokens");
        assert!(error["message"].as_str().unwrap().contains("min_tokens is 3"), "{error}");
    }
    for body in [
        json!({"max_tokens": 1, "max_completion_tokens": 2}),
        json!({"min_tokens": 1, "stop_token_ids": (0..200).collect::<Vec<_>>()}),
    ] {
        site.error("/v1/chat/completions", question(body), 400).await;
    }
    for other in [json!({"ignore_eos": true}), json!({"min_tokens": 3})] {
        let mut body = question(json!({"response_format": {"type": "json_object"}}));
        body.as_object_mut().unwrap().extend(other.as_object().unwrap().clone());
        site.error("/v1/chat/completions", body, 400).await;
    }
}

#[tokio::test]
async fn prompts_and_messages() {
    let site = Site::new().await;
    for (param, body) in [
        ("prompt", json!({})),
        ("prompt", json!({"prompt": null})),
        ("prompt", json!({"prompt": []})),
        ("prompt", json!({"prompt": [[]]})),
        ("prompt", json!({"prompt": [["a"]]})),
        ("prompt", json!({"prompt": ["a", 1]})),
        ("prompt", json!({"prompt": [1, "a"]})),
        ("prompt", json!({"prompt": [1, -1]})),
        ("prompt", json!({"prompt": [1, 1.5]})),
        ("prompt", json!({"prompt": [1, 5_000_000_000u64]})),
        ("prompt", json!({"prompt": [1, 99999]})),
        ("prompt", json!({"prompt": {"a": 1}})),
        ("prompt", json!({"prompt": "", "add_special_tokens": false})),
        ("logprobs", json!({"prompt": "a", "logprobs": 21})),
        ("logprobs", json!({"prompt": "a", "logprobs": true})),
        ("best_of", json!({"prompt": "a", "best_of": 2})),
        ("suffix", json!({"prompt": "a", "suffix": "b"})),
        ("echo", json!({"prompt": "a", "echo": "yes"})),
    ] {
        assert_eq!(site.error("/v1/completions", body.clone(), 400).await["param"], param, "{body}");
    }
    let user = |content: Value| json!([{"role": "user", "content": content}]);
    for (param, messages) in [
        ("messages", json!([])),
        ("messages", json!("a")),
        ("messages[0]", json!(["a"])),
        ("messages[0].role", json!([{"role": "function", "content": "a"}])),
        ("messages[0].role", json!([{"content": "a"}])),
        ("messages[0].content", json!([{"role": "user"}])),
        ("messages[0].content", user(json!(null))),
        ("messages[0].content", user(json!(1))),
        ("messages[0].content", user(json!([{"type": "image_url", "image_url": {"url": "x"}}]))),
        ("messages[0].content", user(json!([{"type": "text"}]))),
        ("messages[0].content", user(json!([{"text": "a"}]))),
        ("messages[0].content", user(json!([{"type": "text", "text": "a", "odd": 1}]))),
        ("messages", json!([])),
        ("messages", json!([{"role": "assistant", "content": "a"}])),
        ("messages", json!([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])),
    ] {
        let body = json!({"messages": messages});
        assert_eq!(site.error("/v1/chat/completions", body.clone(), 400).await["param"], param, "{body}");
    }
    for (param, value) in [
        ("tool_choice", json!("required")),
        ("functions", json!([{}])),
        ("function_call", json!("auto")),
        ("audio", json!({"voice": "a"})),
        ("modalities", json!(["audio"])),
        ("best_of", json!(2)),
        ("echo", json!(true)),
        ("prompt", json!("a")),
        ("chat_template", json!("{{ 1 }}")),
        ("add_generation_prompt", json!(false)),
        ("continue_final_message", json!(true)),
        ("top_logprobs", json!(3)),
        ("top_logprobs", json!(-3)),
        ("n_predict", json!(5)),
        ("truncate_prompt_tokens", json!(5)),
        ("typical_p", json!(0.5)),
    ] {
        let body = question(json!({(param): value}));
        assert_eq!(site.error("/v1/chat/completions", body.clone(), 400).await["param"], param, "{body}");
    }
    for (param, prediction) in [
        ("prediction", json!("a")),
        ("prediction.type", json!({"type": "image", "content": "a"})),
        ("prediction.content", json!({"type": "content"})),
        ("prediction.content", json!({"type": "content", "content": 1})),
        ("prediction", json!({"type": "content", "content": "가나다 ".repeat(2000)})),
    ] {
        let body = question(json!({"prediction": prediction}));
        assert_eq!(site.error("/v1/chat/completions", body.clone(), 400).await["param"], param, "{body}");
    }
}

#[tokio::test]
async fn contexts_models_and_routes() {
    let site = Site::new().await;
    let error = site.error("/v1/completions", json!({"prompt": vec![5; 1000], "max_tokens": 100}), 400).await;
    assert_eq!((&error["code"], &error["param"]), (&json!("context_length_exceeded"), &json!("max_tokens")));
    let message = error["message"].as_str().unwrap();
    assert!(["1024", "1100", "1000", "100"].iter().all(|n| message.contains(n)), "{message}");
    for body in [
        json!({"prompt": vec![5; 1024]}),
        json!({"prompt": vec![5; 1024], "max_tokens": 1}),
        json!({"prompt": "가", "max_tokens": u64::MAX}),
    ] {
        assert_eq!(site.error("/v1/completions", body, 400).await["code"], "context_length_exceeded");
    }
    let long = json!({"messages": [{"role": "user", "content": "가나다 ".repeat(2000)}]});
    let error = site.error("/v1/chat/completions", long, 400).await;
    let words = "this model's maximum context length is "; // clients look for them
    assert!(error["param"] == "messages" && error["message"].as_str().unwrap().starts_with(words), "{error}");
    let error = site.error("/v1/chat/completions", question(json!({"model": "gpt-x"})), 404).await;
    assert_eq!((&error["code"], &error["param"]), (&json!("model_not_found"), &json!("model")));
    assert_eq!(site.chat(question(json!({"model": "other/name", "max_tokens": 1}))).await["model"], "other/name");
    for path in ["/nope", "/v1", "/v1/audio/speech", "//v1//nope/"] {
        site.get(path).await.error(404);
    }
    for (method, path) in
        [("GET", "/v1/completions"), ("DELETE", "/v1/models"), ("POST", "/health"), ("PUT", "/tokenize")]
    {
        http::request(&site.target(), method, path, &[], "").await.error(405);
    }
}

#[tokio::test]
async fn bodies() {
    let site = Site::with(ServerOptions { body_limit: 100_000, ..ServerOptions::default() }).await;
    let json = [("Content-Type", "application/json")];
    let deep = format!("{{\"prompt\": {}1{}}}", "[".repeat(10_000), "]".repeat(10_000));
    let deep_schema =
        format!("{{\"prompt\": \"a\", \"guided_json\": {}{{}}{}}}", "{\"not\":".repeat(120), "}".repeat(120));
    for body in [
        b"".as_slice(),
        b"{",
        b"null",
        b"[]",
        b"\"text\"",
        b"{\"prompt\": \"a\"} x",
        b"{\"prompt\": 1e999}",
        b"{\"prompt\": \"\xed\xa0\x80\"}",
        b"{\"prompt\": \"\\ud800\"}",
        b"\xff\xfe",
        b"{\"prompt\": \"a\", \"temperature\": NaN}",
        deep.as_bytes(),
    ] {
        for path in ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"] {
            http::bytes(&site.target(), "POST", path, &json, body).await.error(400);
        }
    }
    for body in ["{\"prompt\": \"a\", \"max_tokens\": 123456789012345678901234567890}", &deep_schema] {
        http::request(&site.target(), "POST", "/v1/completions", &json, body).await.error(400);
    }
    let large = json!({"prompt": "가".repeat(100_000)});
    assert_eq!(site.error("/v1/completions", large, 413).await["code"], "request_too_large");
    let body = "{\"prompt\": \"a\", \"max_tokens\": 1}";
    let form = [("Content-Type", "application/x-www-form-urlencoded")];
    http::request(&site.target(), "POST", "/v1/completions", &form, body).await.error(415);
    for kind in [&json[..], &[("Content-Type", "application/json; charset=utf-8")], &[]] {
        assert_eq!(http::request(&site.target(), "POST", "/v1/completions", kind, body).await.status, 200, "{kind:?}");
    }
    // NUL, what looks like SSE, and characters of four bytes are text like any other.
    let odd =
        site.complete(json!({"prompt": "\u{0}\r\n\r\ndata: [DONE]\u{2028}🫠", "echo": true, "max_tokens": 0})).await;
    assert_eq!(odd["choices"][0]["text"], "\u{0}\r\n\r\ndata: [DONE]\u{2028}🫠");
    assert_eq!(site.server.phase(), Phase::Ready);
}

/// A connection that stays open can be used again; one that will be closed says so.
#[tokio::test]
async fn kept_connections() {
    let site = Site::with(ServerOptions { body_limit: 1000, keys: vec!["k".into()], ..ServerOptions::default() }).await;
    let body = "{\"prompt\": \"a\", \"max_tokens\": 1}";
    let right = [("Content-Type", "application/json"), ("Authorization", "Bearer k")];
    for (status, path, headers, body) in [
        (200, "/v1/completions", &right[..], body),
        (400, "/v1/completions", &right, "{"),
        (413, "/v1/completions", &right, &"x".repeat(100_000)),
        (401, "/v1/completions", &right[..1], body),
        (404, "/nowhere", &right, body),
        (415, "/v1/completions", &[("Content-Type", "text/plain"), right[1]], body),
    ] {
        let mut stream = http::connect(&site.target()).await;
        let head = http::head("POST", path, headers, body.len()).replace("Connection: close\r\n", "");
        stream.write_all(head.as_bytes()).await.unwrap();
        // As many clients do: the body is a packet of its own, which comes after a reply to the head alone.
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        let _ = stream.write_all(body.as_bytes()).await;
        let again = http::head("GET", "/health", &[], 0);
        let _ = stream.write_all(again.as_bytes()).await;
        let replies = String::from_utf8(http::rest(stream).await).unwrap().to_ascii_lowercase();
        let says = replies.split("\r\n\r\n").next().unwrap().contains("connection: close");
        assert!(replies.starts_with(&format!("http/1.1 {status}")), "{replies}");
        let went_on = replies.contains("{\"status\":\"ok\"}");
        assert_eq!(says, !went_on, "{replies}");
        assert_eq!(went_on, status == 200 || status == 400, "{replies}");
    }
}

/// Bytes that are no HTTP get an answer or are cut off, and the server goes on.
#[tokio::test]
async fn no_http() {
    let site = Site::new().await;
    for bytes in [
        &b"\x16\x03\x01\x00"[..],
        b"GET / HTTP/9\r\n\r\n",
        b"GET /\0 HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    ] {
        let mut stream = http::connect(&site.target()).await;
        let _ = stream.write_all(bytes).await;
        let _ = stream.shutdown().await;
    }
    assert_eq!(site.get("/health").await.status, 200);
}

#[test]
fn options() {
    let wrong = |options: ServerOptions| {
        aoji::server::Server::start(super::engine().clone(), options).err().unwrap().to_string()
    };
    let with = ServerOptions::default;
    assert!(wrong(ServerOptions { names: vec![], ..with() }).contains("name"));
    assert!(wrong(ServerOptions { keys: vec![String::new()], ..with() }).contains("key"));
    assert!(wrong(ServerOptions { sequences: 0, ..with() }).contains("sequences"));
    for origin in ["example.com", "https://example.com/", "a\nb://"] {
        assert!(wrong(ServerOptions { cors: vec![origin.into()], ..with() }).contains("origin"), "{origin}");
    }
}

/// Any JSON.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3i64..300).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "\\PC{0,6}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::btree_map("[a-z]{1,5}|type|text|role|content|schema", inner, 0..4)
                .prop_map(|map| json!(map)),
        ]
    })
}

/// Whatever is in the fields, the reply is an answer or an error that blames the client, and the engine goes on.
#[test]
fn any_values() {
    const FIELDS: &[&str] = &[
        "prompt",
        "messages",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "n",
        "stream",
        "stream_options",
        "stop",
        "seed",
        "logprobs",
        "top_logprobs",
        "echo",
        "logit_bias",
        "presence_penalty",
        "repetition_penalty",
        "min_tokens",
        "stop_token_ids",
        "response_format",
        "structured_outputs",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "tools",
        "model",
        "skip_special_tokens",
        "return_token_ids",
        "prompt_logprobs",
        "x",
    ];
    let fields = proptest::collection::vec((proptest::sample::select(FIELDS), any_json()), 1..4);
    let path =
        prop_oneof![Just("/v1/completions"), Just("/v1/chat/completions"), Just("/tokenize"), Just("/detokenize")];
    each(200, (path, fields), async |site, (path, fields)| {
        let mut body = match path {
            "/v1/chat/completions" => question(json!({"max_tokens": 1})),
            "/detokenize" => json!({"tokens": [5]}),
            _ => json!({"prompt": "가", "max_tokens": 1}),
        };
        fields.into_iter().for_each(|(field, value)| body[field] = value);
        let reply = site.post(path, &body).await;
        match reply.status {
            200 => {}
            status @ (400 | 404) => drop(reply.error(status)),
            status => panic!("{status} for {body}: {}", reply.body),
        }
        assert_eq!(site.server.phase(), Phase::Ready);
    });
}
