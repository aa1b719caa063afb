//! `/v1/messages`: the shape of Anthropic's API over the answers of a chat.

use super::{QUESTION, Site, answer, http};
use aoji::{
    Template,
    server::{ServerOptions, UnknownFields},
};
use serde_json::{Value, json};

fn ask(more: Value) -> Value {
    let mut body = json!({
        "model": "demo", "max_tokens": 200, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0
    });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn tools() -> Value {
    json!([{"name": "weather", "description": "날씨", "input_schema": {
        "type": "object", "additionalProperties": false, "required": ["city"], "properties": {"city": {"enum": ["서울", "부산"]}}
    }}, {"name": "now", "input_schema": {"type": "object", "properties": {}, "additionalProperties": false}, "cache_control": {"type": "ephemeral"}}])
}

/// The events of a stream put together as the official client does it; their names are their types.
async fn assembled(site: &Site, body: Value) -> Value {
    let body = ask({
        let mut body = body;
        body["stream"] = true.into();
        body
    });
    let reply = site.post("/v1/messages", &body).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    let mut message = Value::Null;
    let mut open = None;
    let mut ended = false;
    for block in reply.body.split("\n\n").filter(|block| !block.trim().is_empty() && !block.starts_with(':')) {
        let (name, data) = block.split_once('\n').unwrap();
        let event: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(name.strip_prefix("event: ").unwrap(), event["type"]);
        assert!(!ended, "nothing after the end");
        let index = event["index"].as_u64().map(|i| i as usize);
        match event["type"].as_str().unwrap() {
            "message_start" => {
                assert!(message.is_null());
                message = event["message"].clone();
            }
            "content_block_start" => {
                assert_eq!((open, index), (None, Some(message["content"].as_array().unwrap().len())));
                open = index;
                let mut block = event["content_block"].clone();
                if block["type"] == "tool_use" {
                    block["input"] = "".into();
                }
                message["content"].as_array_mut().unwrap().push(block);
            }
            "content_block_delta" => {
                assert_eq!(open, index);
                let block = &mut message["content"][index.unwrap()];
                let (field, more) = match event["delta"]["type"].as_str().unwrap() {
                    "text_delta" => ("text", &event["delta"]["text"]),
                    "input_json_delta" => ("input", &event["delta"]["partial_json"]),
                    other => panic!("{other}"),
                };
                block[field] = (block[field].as_str().unwrap().to_string() + more.as_str().unwrap()).into();
            }
            "content_block_stop" => {
                assert_eq!(open.take(), index);
                let block = &mut message["content"][index.unwrap()];
                if block["type"] == "tool_use" {
                    block["input"] = serde_json::from_str(block["input"].as_str().unwrap()).unwrap();
                }
            }
            "message_delta" => {
                assert_eq!(open, None);
                for field in ["stop_reason", "stop_sequence"] {
                    message[field] = event["delta"][field].clone();
                }
                message["usage"] = event["usage"].clone();
            }
            "message_stop" => ended = true,
            other => panic!("{other}"),
        }
    }
    assert!(ended, "{}", reply.body);
    message
}

/// The part of a response that is the same whole and as a stream: all except ids, and how much was in the cache.
fn comparable(mut message: Value) -> Value {
    message["id"].take();
    let usage = &message["usage"];
    let count = |name: &str| usage[name].as_u64().unwrap();
    let input = count("input_tokens") + count("cache_read_input_tokens") + count("cache_creation_input_tokens");
    message["usage"] = json!([input, count("output_tokens")]);
    for block in message["content"].as_array_mut().unwrap() {
        block.as_object_mut().unwrap().remove("id");
    }
    message
}

#[tokio::test]
async fn texts() {
    let site = Site::new().await;
    let (prompt, expected) = answer();
    let whole = site.ok("/v1/messages", ask(json!({}))).await;
    assert!(whole["id"].as_str().unwrap().starts_with("msg_"));
    let output = whole["usage"]["output_tokens"].clone();
    let message = json!({
        "id": null, "type": "message", "role": "assistant", "model": "demo", "content": [{"type": "text", "text": expected}],
        "stop_reason": "end_turn", "stop_sequence": null, "usage": [prompt.len(), output]
    });
    assert_eq!(comparable(whole.clone()), message);
    assert_eq!(comparable(assembled(&site, json!({})).await), message);
    let count =
        site.ok("/v1/messages/count_tokens", json!({"messages": [{"role": "user", "content": QUESTION}]})).await;
    assert_eq!(count, json!({"input_tokens": prompt.len()}));
    // The same from blocks, and with the instruction that the template takes by itself.
    let blocks = json!([{"role": "user", "content": [{"type": "text", "text": QUESTION, "cache_control": {"type": "ephemeral"}}]}]);
    let system = json!([{"type": "text", "text": aoji::AOG_INSTRUCTION}]);
    for more in [json!({"messages": blocks}), json!({"system": aoji::AOG_INSTRUCTION}), json!({"system": system})] {
        assert_eq!(site.ok("/v1/messages", ask(more)).await["content"], whole["content"]);
    }
    // Where the last message is the assistant's, the answer goes on where it ends.
    let cut = expected.find(' ').unwrap();
    let talk = json!([{"role": "user", "content": QUESTION}, {"role": "assistant", "content": expected[..cut]}]);
    let reply = site.ok("/v1/messages", ask(json!({"messages": talk}))).await;
    assert_eq!(reply["content"][0]["text"], expected[cut..]);
    for (more, reason, sequence) in [
        (json!({"max_tokens": 2}), "max_tokens", json!(null)),
        (
            json!({"stop_sequences": ["없는", &expected[cut + 1..cut + 4]]}),
            "stop_sequence",
            json!(expected[cut + 1..cut + 4]),
        ),
    ] {
        for reply in [site.ok("/v1/messages", ask(more.clone())).await, assembled(&site, more.clone()).await] {
            assert_eq!((&reply["stop_reason"], &reply["stop_sequence"]), (&json!(reason), &sequence), "{reply}");
        }
    }
    let schema = json!({"type": "object", "properties": {"a": {"enum": ["가", "나"]}}, "required": ["a"], "additionalProperties": false});
    let format = json!({"output_config": {"format": {"type": "json_schema", "schema": schema}}});
    let reply = site.ok("/v1/messages", ask(format)).await;
    let value: Value = serde_json::from_str(reply["content"][0]["text"].as_str().unwrap()).unwrap();
    assert!(value["a"] == "가" || value["a"] == "나");
}

#[tokio::test]
async fn functions() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/server/templates/hermes.jinja");
    let template = Some(Template::parse(path.to_str().unwrap(), None).unwrap());
    for options in [ServerOptions { template, ..ServerOptions::default() }, ServerOptions::default()] {
        let site = Site::with(ServerOptions { names: vec!["demo".into()], ..options }).await;
        let must = json!({"tools": tools(), "tool_choice": {"type": "tool", "name": "weather"}});
        let whole = site.ok("/v1/messages", ask(must.clone())).await;
        assert_eq!(whole["stop_reason"], "tool_use");
        let call = &whole["content"][0];
        assert_eq!((&call["type"], &call["name"]), (&json!("tool_use"), &json!("weather")));
        assert!(call["input"]["city"] == "서울" || call["input"]["city"] == "부산", "{call}");
        assert_eq!(comparable(assembled(&site, must.clone()).await), comparable(whole.clone()));
        let any = json!({"tools": tools(), "tool_choice": {"type": "any", "disable_parallel_tool_use": true}});
        assert_eq!(site.ok("/v1/messages", ask(any)).await["content"].as_array().unwrap().len(), 1);
        // The result, and what the model says to it.
        let talk = json!([
            {"role": "user", "content": QUESTION}, {"role": "assistant", "content": whole["content"]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "맑음"}], "is_error": false},
                {"type": "text", "text": "그래서?"}
            ]}
        ]);
        let body = json!({"messages": talk, "tools": tools()});
        let reply = site.ok("/v1/messages", ask(body.clone())).await;
        assert!(!reply["content"].as_array().unwrap().is_empty(), "{reply}");
        // The prompt is that of a chat.
        let count = site.ok("/v1/messages/count_tokens", body).await["input_tokens"].take();
        let function = |tool: &Value| {
            json!({"type": "function", "function": {
            "name": tool["name"], "description": tool["description"], "parameters": tool["input_schema"]}})
        };
        let arguments = call["input"].to_string();
        let chat = json!({"tools": tools().as_array().unwrap().iter().map(function).collect::<Vec<_>>(), "messages": [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "tool_calls": [
                {"id": call["id"], "type": "function", "function": {"name": "weather", "arguments": arguments}}]},
            {"role": "tool", "tool_call_id": call["id"], "content": "맑음"}, {"role": "user", "content": "그래서?"}
        ]});
        assert_eq!(site.ok("/tokenize", chat).await["count"], count);
        // A call that the length cut off is no block, and no reason to call.
        for (choice, max_tokens) in
            (1..=12).flat_map(|n| [(json!({"type": "any"}), n), (must["tool_choice"].clone(), n)])
        {
            let body = json!({"tools": tools(), "tool_choice": choice, "max_tokens": max_tokens});
            let cut = site.ok("/v1/messages", ask(body)).await;
            assert_eq!((&cut["stop_reason"], &cut["content"]), (&json!("max_tokens"), &json!([])), "{cut}");
        }
    }
}

#[tokio::test]
async fn errors_keys_and_what_is_ignored() {
    let options = ServerOptions { keys: vec!["k".into()], names: vec!["demo".into()], ..ServerOptions::default() };
    let site = Site::with(options).await;
    let post =
        async |headers: &[(&str, &str)], body: Value| http::post(&site.target(), "/v1/messages", headers, &body).await;
    let key = [("x-api-key", "k"), ("anthropic-version", "2023-06-01")];
    for headers in [&key[..], &[("Authorization", "Bearer k")]] {
        assert_eq!(post(headers, ask(json!({"max_tokens": 1}))).await.status, 200);
    }
    let error = async |headers: &[(&str, &str)], body: Value, status: u16| {
        let reply = post(headers, body).await;
        let json = reply.json();
        assert_eq!((reply.status, &json["type"]), (status, &json!("error")), "{json}");
        (json["error"]["type"].as_str().unwrap().to_string(), json["error"]["message"].as_str().unwrap().to_string())
    };
    assert_eq!(error(&[("x-api-key", "wrong")], ask(json!({})), 401).await.0, "authentication_error");
    assert_eq!(error(&key, ask(json!({"model": "claude"})), 404).await.0, "not_found_error");
    let talk = |content: Value| json!({"messages": [{"role": "user", "content": content}]});
    for (more, said) in [
        (json!({"max_tokens": null}), "max_tokens"),
        (json!({"max_tokens": 1_000_000}), "maximum context length"),
        (json!({"messages": []}), "no message"),
        (json!({"messages": [{"role": "system", "content": "a"}]}), "messages[0].role"),
        (json!({"temperature": -1}), "temperature"),
        (json!({"thinking": {"type": "enabled", "budget_tokens": 1024}}), "thinking"),
        (json!({"mcp_servers": [{}]}), "mcp_servers"),
        (json!({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}), "tools[0].type"),
        (json!({"tools": tools(), "tool_choice": {"type": "tool"}}), "tool_choice.name"),
        (json!({"tools": tools(), "tool_choice": {"type": "tool", "name": "nobody"}}), "nobody"),
        (talk(json!([{"type": "image", "source": {}}])), "image"),
        (talk(json!([{"type": "tool_use", "id": "a", "name": "b", "input": {}}])), "only the assistant calls"),
        (talk(json!([{"type": "tool_result", "tool_use_id": "a"}])), "no call before this message"),
        (talk(json!(3)), "messages[0].content"),
    ] {
        let (kind, message) = error(&key, ask(more.clone()), 400).await;
        assert!(kind == "invalid_request_error" && message.contains(said), "{more}: {message}");
    }
    // A field has the name that it has in this API.
    let tool = |name: &str, schema: Value| json!([{"name": name, "input_schema": schema}]);
    let format = |schema: Value| json!({"format": {"type": "json_schema", "schema": schema}});
    let nothing = json!({"type": "object", "properties": {"a": {"type": "nothing"}}});
    for (more, begin) in [
        (json!({"tools": tool("a b", json!({}))}), "tools[0].name: name \"a b\""),
        (json!({"tools": tool("f", json!([]))}), "tools[0].input_schema: expected"),
        (json!({"tools": tool("f", nothing.clone())}), "tools[0].input_schema: "),
        (json!({"output_config": format(json!([1]))}), "output_config.format.schema: expected"),
        (json!({"output_config": format(nothing.clone())}), "output_config.format: "),
        (json!({"output_config": format(nothing), "tools": tools()}), "output_config.format: "),
        (json!({"stop_sequences": [""]}), "stop_sequences: "),
    ] {
        let (_, message) = error(&key, ask(more.clone()), 400).await;
        let other = ["response_format", "parameters", "function"].into_iter().find(|name| message.contains(name));
        assert!(message.starts_with(begin) && other.is_none(), "{more}: {message}");
    }
    let count = json!({"messages": [{"role": "user", "content": "a"}], "tools": tool("f", json!([]))});
    let reply = http::post(&site.target(), "/v1/messages/count_tokens", &key, &count).await;
    assert!(reply.status == 400 && reply.body.contains("tools[0].input_schema"), "{}", reply.body);
    // Other routes keep their shape.
    site.error("/v1/completions", json!({}), 401).await;
    let ignored = post(&key, ask(json!({"max_tokens": 1, "metadata": {"user_id": "x"}, "what": 1}))).await;
    assert_eq!((ignored.status, ignored.header("x-aoji-ignored-params")), (200, "metadata,what"));
    let strict = ServerOptions { unknown_fields: UnknownFields::Reject, ..ServerOptions::default() };
    let reply = Site::with(strict).await.post("/v1/messages", &ask(json!({"model": null, "what": 1}))).await;
    assert!(reply.status == 400 && reply.json()["error"]["message"].as_str().unwrap().contains("what"));
}
