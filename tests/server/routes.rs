//! Every route, with requests that succeed.

use super::{QUESTION, Site, answer, engine, http};
use aoji::server::ServerOptions;
use serde_json::json;

#[tokio::test]
async fn models() {
    let site = Site::new().await;
    let list = site.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    let ids: Vec<&str> = list["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["demo", "other/name"]);
    for id in ["demo", "other/name", "other%2Fname"] {
        let model = site.get(&format!("/v1/models/{id}")).await.json();
        assert_eq!(
            (&model["object"], &model["max_model_len"], &model["root"]),
            (&json!("model"), &json!(1024), &json!("demo"))
        );
    }
    assert_eq!(site.get("/v1/models/nobody").await.error(404)["code"], "model_not_found");
}

#[tokio::test]
async fn state() {
    let site = Site::new().await;
    for path in ["/health", "/ready"] {
        assert_eq!(site.get(path).await.json(), json!({"status": "ok"}));
    }
    assert_eq!(site.get("/version").await.json(), json!({"version": env!("CARGO_PKG_VERSION")}));
    let page = site.get("/").await;
    assert_eq!((page.status, page.header("content-type")), (200, "text/html; charset=utf-8"));
    assert!(page.body.contains("보내기") && !page.body.contains("//cdn") && !page.body.contains("https://"));
    assert!(page.header("content-security-policy").starts_with("default-src 'none'"));
    // It loads files of its own only, each of which is there.
    let loaded: Vec<&str> = page.body.split("=\"page/").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
    assert_eq!(loaded, ["page.css", "marked.umd.js", "purify.min.js", "page.js"]);
    for file in loaded.into_iter().chain(["markdown.js", "store.js"]) {
        let reply = site.get(&format!("/page/{file}")).await;
        let kind = if file.ends_with(".css") { "text/css; charset=utf-8" } else { "text/javascript; charset=utf-8" };
        assert_eq!((reply.status, reply.header("content-type")), (200, kind), "{file}");
    }
    for none in ["/page/none.js", "/page/..%2Findex.html", "/page/%ff"] {
        assert_eq!(site.get(none).await.error(404)["code"], "unknown_url");
    }
    site.server.drain();
    assert_eq!(site.get("/health").await.status, 200);
    let reply = site.get("/ready").await;
    reply.error(503);
    assert_eq!(reply.header("retry-after"), "1");
    site.error("/v1/completions", json!({"prompt": "가"}), 503).await;
}

#[tokio::test]
async fn tokenizer() {
    let site = Site::new().await;
    let info = site.get("/tokenizer_info").await.json();
    assert_eq!((&info["bos_token"], &info["eos_token"]), (&json!("<|begin_of_text|>"), &json!("<|end_of_text|>")));
    let text = "안녕하세요 <|end_of_text|> 🫠";
    let ids = engine().tokenizer().unwrap().encode(text, false).unwrap();
    let reply = site.ok("/tokenize", json!({"prompt": text, "add_special_tokens": false})).await;
    assert_eq!(
        (&reply["tokens"], &reply["count"], &reply["token_strs"]),
        (&json!(ids), &json!(ids.len()), &json!(null))
    );
    let back = site.ok("/detokenize", json!({"tokens": reply["tokens"]})).await;
    assert_eq!(back, json!({"prompt": text}));
    let with_bos = site.ok("/tokenize", json!({"model": "demo", "prompt": text, "return_token_strs": true})).await;
    assert_eq!((&with_bos["tokens"][0], &with_bos["token_strs"][0]), (&json!(2046), &json!("<|begin_of_text|>")));
    let twice = site.ok("/tokenize", json!({"prompt": format!("<|begin_of_text|>{text}")})).await;
    assert_eq!(twice["tokens"], with_bos["tokens"], "BOS is not doubled");
    let chat = site.ok("/tokenize", json!({"messages": [{"role": "user", "content": QUESTION}]})).await;
    assert_eq!(chat["tokens"], json!(answer().0));
    for (path, body) in [
        ("/tokenize", json!({})),
        ("/tokenize", json!({"prompt": "a", "messages": []})),
        ("/tokenize", json!({"prompt": ["a"]})),
        ("/tokenize", json!({"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": false})),
        ("/detokenize", json!({"tokens": [999_999]})),
        ("/detokenize", json!({"tokens": "a"})),
    ] {
        site.error(path, body, 400).await;
    }
    site.error("/tokenize", json!({"prompt": "a", "model": "x"}), 404).await;
}

#[tokio::test]
async fn description() {
    let site = Site::new().await;
    let openapi = site.get("/openapi.json").await.json();
    assert_eq!(openapi["openapi"], "3.1.0");
    let paths = openapi["paths"].as_object().unwrap();
    for path in [
        "/",
        "/page/{file}",
        "/health",
        "/ready",
        "/metrics",
        "/version",
        "/openapi.json",
        "/v1/models",
        "/v1/models/{id}",
        "/v1/completions",
        "/v1/chat/completions",
        "/tokenize",
        "/detokenize",
        "/tokenizer_info",
    ] {
        assert!(paths.contains_key(path), "{path} is not in {:?}", paths.keys());
    }
    // Every schema that is referred to is there.
    let text = openapi.to_string();
    let schemas = openapi["components"]["schemas"].as_object().unwrap();
    for reference in text.split("\"#/components/schemas/").skip(1) {
        let name = reference.split('"').next().unwrap();
        assert!(schemas.contains_key(name), "no schema {name}");
    }
    for field in ["prompt", "echo", "max_tokens", "min_p", "structured_outputs", "messages", "top_logprobs", "stop"] {
        assert!(text.contains(&format!("\"{field}\":")), "{field} is not described");
    }
}

#[tokio::test]
async fn metrics() {
    let site = Site::new().await;
    let reply = site.complete(json!({"prompt": "가나다", "max_tokens": 5, "ignore_eos": true, "n": 2})).await;
    site.error("/v1/completions", json!({"prompt": "가", "n": 200}), 400).await;
    let prompt = reply["usage"]["prompt_tokens"].as_f64().unwrap();
    for (name, value) in [
        ("aoji:generation_tokens_total", 10.0),
        ("aoji:prompt_tokens_total", 2.0 * prompt),
        ("aoji:request_success_total{finished_reason=\"length\"}", 2.0),
        ("aoji:num_requests_running", 0.0),
        ("aoji:num_requests_waiting", 0.0),
        ("aoji:time_to_first_token_seconds_count", 2.0),
        ("aoji:inter_token_latency_seconds_count", 8.0),
        ("aoji:e2e_request_latency_seconds_count", 2.0),
        ("aoji:request_queue_time_seconds_count", 2.0),
        ("aoji:request_prefill_time_seconds_count", 2.0),
        ("aoji:request_decode_time_seconds_count", 2.0),
        ("aoji:request_params_max_tokens_sum", 5.0),
    ] {
        site.until(name, value).await;
    }
    let reply = site.get("/metrics").await;
    assert_eq!(reply.header("content-type"), "text/plain; version=0.0.4; charset=utf-8");
    for name in [
        "prompt_tokens_cached_total",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
        "kv_cache_usage_perc",
        "num_preemptions_total",
    ] {
        assert!(reply.body.contains(&format!("\naoji:{name} ")), "no {name} in {}", reply.body);
    }
    assert!(
        reply.body.contains("aoji:model_info{model_name=\"demo\"") && reply.body.contains("aoji:build_info{version=")
    );
    // eight whole contexts
    let pages = 8 * engine().max_context().div_ceil(64);
    let cache = format!("aoji:cache_config_info{{block_size=\"64\",num_gpu_blocks=\"{pages}\"}} 1");
    assert!(reply.body.contains(&cache), "no {cache} in {}", reply.body);
}

#[tokio::test]
async fn keys() {
    let keys = vec!["first-key".to_string(), "두번째".into()];
    let site = Site::with(ServerOptions { keys, ..ServerOptions::default() }).await;
    for path in ["/health", "/ready", "/version", "/metrics", "/openapi.json", "/"] {
        assert_eq!(site.get(path).await.status, 200, "{path} needs no key");
    }
    let target = site.target();
    for right in ["Bearer first-key", "bearer 두번째"] {
        assert_eq!(http::request(&target, "GET", "/v1/models", &[("Authorization", right)], "").await.status, 200);
    }
    for wrong in ["Bearer first-ke", "Bearer first-keyy", "Bearer ", "first-key", "Basic first-key", ""] {
        let reply = http::request(&target, "GET", "/v1/models", &[("Authorization", wrong)], "").await;
        assert_eq!(reply.error(401)["code"], "invalid_api_key");
        assert_eq!(reply.header("www-authenticate"), "Bearer");
    }
    for path in ["/v1/models", "/v1/models/aoji", "/tokenizer_info"] {
        site.get(path).await.error(401);
    }
    for path in ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"] {
        site.error(path, json!({}), 401).await;
    }
}

#[tokio::test]
async fn cors() {
    let cors = vec!["https://example.com".to_string()];
    let site = Site::with(ServerOptions { cors, keys: vec!["k".into()], ..ServerOptions::default() }).await;
    let ask = async |origin| {
        let headers = [
            ("Origin", origin),
            ("Access-Control-Request-Method", "POST"),
            // What the official clients send: more than their APIs ask for.
            ("Access-Control-Request-Headers", "authorization,content-type,x-stainless-lang"),
        ];
        http::request(&site.target(), "OPTIONS", "/v1/chat/completions", &headers, "").await
    };
    let allowed = ask("https://example.com").await;
    assert_eq!((allowed.status, allowed.header("access-control-allow-origin")), (200, "https://example.com"));
    assert_eq!(allowed.header("access-control-allow-headers"), "authorization,content-type,x-stainless-lang");
    assert!(allowed.header("vary").contains("access-control-request-headers"), "caches must not mix replies up");
    assert_eq!(ask("https://evil.example").await.header("access-control-allow-origin"), "");
    let without = Site::new().await;
    let reply = http::request(&without.target(), "GET", "/health", &[("Origin", "https://example.com")], "").await;
    assert_eq!(reply.header("access-control-allow-origin"), "");
    let any = Site::with(ServerOptions { cors: vec!["*".into()], ..ServerOptions::default() }).await;
    let reply = http::request(&any.target(), "GET", "/health", &[("Origin", "https://example.com")], "").await;
    assert_eq!(reply.header("access-control-allow-origin"), "*");
}

#[tokio::test]
async fn request_ids() {
    let site = Site::new().await;
    let id = async |sent: &str| {
        http::request(&site.target(), "GET", "/health", &[("X-Request-Id", sent)], "")
            .await
            .header("x-request-id")
            .to_string()
    };
    assert_eq!(id("abc-123").await, "abc-123");
    let made = id("").await;
    assert!(made.len() == 16 && made != id("").await);
    assert_ne!(id(&"x".repeat(1000)).await.len(), 1000);
}

/// docs/server.md lists what is ignored, and each field that a request can have.
#[tokio::test]
async fn the_document_lists_all_fields() {
    let document = include_str!("../../docs/server.md");
    let site = Site::new().await;
    let schemas = site.get("/openapi.json").await.json()["components"]["schemas"].take();
    let mut fields = Vec::new();
    for schema in ["Common", "CompletionFields", "ChatFields", "StreamOptions", "StructuredOutputs", "Times"] {
        fields.extend(schemas[schema]["properties"].as_object().unwrap_or_else(|| panic!("no {schema}")).keys());
    }
    for field in fields {
        let ways = [format!("`{field}`"), format!(".{field}`"), format!("`{field}.")];
        let listed = ways.iter().any(|way| document.contains(way));
        assert!(listed, "docs/server.md does not list {field}");
    }
    let metrics = site.get("/metrics").await.body;
    for line in metrics.lines().filter_map(|line| line.strip_prefix("# TYPE aoji:")) {
        let name = line.split(' ').next().unwrap();
        assert!(document.contains(&format!("`{name}")), "docs/server.md does not list {name}");
    }
    let ignored = document.split_once("**Ignored**").unwrap().1.split("\n\n").next().unwrap();
    let names: Vec<&str> = ignored.split('`').skip(1).step_by(2).filter(|name| *name != "cache_control").collect();
    let mut body =
        json!({"messages": [{"role": "user", "content": "a"}], "stream": true, "stream_options": {}, "max_tokens": 1});
    for name in &names {
        match name.split_once("[].").or(name.split_once('.')) {
            Some(("messages", field)) => body["messages"][0][field] = json!("x"),
            Some((outer, field)) => body[outer][field] = json!("x"),
            None => body[*name] = json!("x"),
        }
    }
    let reply = site.post("/v1/chat/completions", &body).await;
    assert_eq!((reply.status, reply.header("x-aoji-ignored-params")), (200, names.join(",").as_str()));
}
