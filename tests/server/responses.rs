//! `/v1/responses`: the shape of OpenAI's newer API over the answers of a chat.

use super::{QUESTION, Site, answer};
use serde_json::{Value, json};

fn ask(more: Value) -> Value {
    let mut body = json!({"model": "demo", "input": QUESTION, "temperature": 0});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

fn tools() -> Value {
    json!([{"type": "function", "name": "weather", "description": "날씨", "strict": true, "parameters": {
        "type": "object", "additionalProperties": false, "required": ["city"], "properties": {"city": {"enum": ["서울", "부산"]}}
    }}])
}

/// The response at the end of a stream; the events before must add up to it.
async fn assembled(site: &Site, mut body: Value) -> Value {
    body["stream"] = true.into();
    let reply = site.post("/v1/responses", &body).await;
    assert_eq!(reply.status, 200, "{}", reply.body);
    let blocks = reply.body.split("\n\n").filter(|block| !block.trim().is_empty() && !block.starts_with(':'));
    let mut items: Vec<Value> = Vec::new();
    let mut texts: Vec<String> = Vec::new();
    let mut last = Value::Null;
    for (i, block) in blocks.enumerate() {
        let (name, data) = block.split_once('\n').unwrap();
        let event: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(name.strip_prefix("event: ").unwrap(), event["type"]);
        assert_eq!(event["sequence_number"], i);
        assert!(last.is_null(), "nothing after the end");
        let at = event["output_index"].as_u64().unwrap_or_default() as usize;
        let kind = event["type"].as_str().unwrap();
        match kind {
            "response.created" | "response.in_progress" => {
                assert_eq!((i < 2, &event["response"]["status"]), (true, &json!("in_progress")));
            }
            "response.output_item.added" => {
                assert_eq!((at, &event["item"]["status"]), (items.len(), &json!("in_progress")));
                items.push(event["item"].clone());
                texts.push(String::new());
            }
            "response.content_part.added" => assert_eq!(event["part"]["text"], ""),
            "response.output_text.delta" | "response.function_call_arguments.delta" => {
                assert_eq!(event["item_id"], items[at]["id"]);
                texts[at].push_str(event["delta"].as_str().unwrap());
            }
            "response.output_text.done" => assert_eq!(event["text"], texts[at]),
            "response.content_part.done" => assert_eq!(event["part"]["text"], texts[at]),
            "response.function_call_arguments.done" => assert_eq!(event["arguments"], texts[at]),
            "response.output_item.done" => items[at] = event["item"].clone(),
            "response.completed" | "response.incomplete" => {
                last = event["response"].clone();
                assert_eq!(last["status"], kind.strip_prefix("response.").unwrap());
            }
            other => panic!("{other}"),
        }
    }
    assert_eq!(last["output"], json!(items));
    last
}

/// The part of a response that is the same whole and as a stream.
fn comparable(mut response: Value) -> Value {
    for field in ["id", "created_at"] {
        response[field].take();
    }
    response["usage"]["input_tokens_details"].take();
    for item in response["output"].as_array_mut().unwrap() {
        item["id"].take();
        item.as_object_mut().unwrap().remove("call_id");
    }
    response
}

#[tokio::test]
async fn texts() {
    let site = Site::new().await;
    let (prompt, expected) = answer();
    let whole = site.ok("/v1/responses", ask(json!({"metadata": {"a": "b"}}))).await;
    assert!(whole["id"].as_str().unwrap().starts_with("resp_") && whole["created_at"].is_u64());
    let output = whole["usage"]["output_tokens"].as_u64().unwrap();
    assert_eq!(
        comparable(whole.clone()),
        json!({
            "id": null, "object": "response", "created_at": null, "status": "completed", "error": null,
            "incomplete_details": null, "instructions": null, "max_output_tokens": null, "model": "demo",
            "output": [{"type": "message", "id": null, "status": "completed", "role": "assistant", "content": [
                {"type": "output_text", "text": expected, "annotations": [], "logprobs": []}]}],
            "parallel_tool_calls": true, "previous_response_id": null, "store": false, "temperature": 0.0,
            "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "top_p": 1.0, "truncation": "disabled",
            "usage": {"input_tokens": prompt.len(), "input_tokens_details": null, "output_tokens": output,
                "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": prompt.len() as u64 + output},
            "metadata": {"a": "b"}
        })
    );
    let streamed = assembled(&site, ask(json!({"metadata": {"a": "b"}}))).await;
    assert_eq!(comparable(streamed), comparable(whole.clone()));
    // The ways to say the same.
    let parts = json!([{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}]);
    for more in [
        json!({"input": parts}),
        json!({"input": [{"type": "message", "role": "user", "content": QUESTION}]}),
        json!({"instructions": aoji::AOG_INSTRUCTION}),
        json!({"input": [{"role": "developer", "content": aoji::AOG_INSTRUCTION}, {"role": "user", "content": QUESTION}]}),
        json!({"store": true, "include": [], "truncation": "disabled", "reasoning": null, "previous_response_id": null}),
    ] {
        assert_eq!(site.ok("/v1/responses", ask(more)).await["output"][0]["content"], whole["output"][0]["content"]);
    }
    // An answer that was given goes back as it came.
    let talk = json!({"input": [
        {"role": "user", "content": QUESTION}, whole["output"][0], {"role": "user", "content": QUESTION}]});
    assert_eq!(site.ok("/v1/responses", ask(talk)).await["output"][0]["content"], whole["output"][0]["content"]);
    let cut = ask(json!({"max_output_tokens": 2}));
    for reply in [site.ok("/v1/responses", cut.clone()).await, assembled(&site, cut).await] {
        assert_eq!((&reply["status"], &reply["output"][0]["status"]), (&json!("incomplete"), &json!("incomplete")));
        assert_eq!(reply["incomplete_details"], json!({"reason": "max_output_tokens"}));
    }
    let schema = json!({"type": "object", "properties": {"a": {"enum": ["가", "나"]}}, "required": ["a"], "additionalProperties": false});
    let format = json!({"type": "json_schema", "name": "x", "strict": true, "schema": schema});
    let reply = site.ok("/v1/responses", ask(json!({"text": {"format": format}}))).await;
    let value: Value = serde_json::from_str(reply["output"][0]["content"][0]["text"].as_str().unwrap()).unwrap();
    assert!(value["a"] == "가" || value["a"] == "나");
    assert_eq!(reply["text"]["format"], format);
}

#[tokio::test]
async fn functions() {
    let site = Site::new().await;
    let must = ask(json!({"tools": tools(), "tool_choice": {"type": "function", "name": "weather"}}));
    let whole = site.ok("/v1/responses", must.clone()).await;
    let call = &whole["output"][0];
    assert_eq!(
        (&call["type"], &call["name"], &call["status"]),
        (&json!("function_call"), &json!("weather"), &json!("completed"))
    );
    let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
    assert!(arguments["city"] == "서울" || arguments["city"] == "부산");
    assert_eq!((&whole["tools"], &whole["tool_choice"]), (&tools(), &must["tool_choice"]));
    assert_eq!(comparable(assembled(&site, must).await), comparable(whole.clone()));
    let required = ask(json!({"tools": tools(), "tool_choice": "required", "parallel_tool_calls": false}));
    assert_eq!(site.ok("/v1/responses", required).await["output"].as_array().unwrap().len(), 1);
    let talk = json!({"tools": tools(), "input": [
        {"role": "user", "content": QUESTION}, call,
        {"type": "function_call_output", "call_id": call["call_id"], "output": "맑음"}]});
    let reply = site.ok("/v1/responses", ask(talk)).await;
    assert!(!reply["output"].as_array().unwrap().is_empty(), "{reply}");
}

#[tokio::test]
async fn what_is_refused() {
    let site = Site::new().await;
    for (param, more) in [
        ("input", json!({"input": null})),
        ("input", json!({"input": []})),
        ("input", json!({"input": [{"type": "item_reference", "id": "x"}]})),
        ("input", json!({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]})),
        ("input", json!({"input": [{"type": "function_call", "call_id": "a", "name": "b", "arguments": "{"}]})),
        ("input", json!({"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]})),
        ("max_output_tokens", json!({"max_output_tokens": 1_000_000})),
        ("temperature", json!({"temperature": 1000})),
        ("previous_response_id", json!({"previous_response_id": "resp_1"})),
        ("conversation", json!({"conversation": "c"})),
        ("background", json!({"background": true})),
        ("truncation", json!({"truncation": "auto"})),
        ("include[0]", json!({"include": ["message.output_text.logprobs"]})),
        ("text.format", json!({"text": {"format": {"type": "json_schema", "name": "x"}}})),
        (
            "text.format",
            json!({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"properties": {"a": {"type": "nothing"}}}}}}),
        ),
        (
            "tools[0].parameters",
            json!({"tools": [{"type": "function", "name": "a", "parameters": {"properties": {"a": {"type": "nothing"}}}}]}),
        ),
        ("tools[0].type", json!({"tools": [{"type": "web_search"}]})),
        ("tools[0].name", json!({"tools": [{"type": "function", "name": "a b"}]})),
        ("tools[0].parameters", json!({"tools": [{"type": "function", "name": "a", "parameters": []}]})),
        ("tool_choice", json!({"tool_choice": "required"})),
        ("tool_choice", json!({"tools": tools(), "tool_choice": {"type": "web_search"}})),
    ] {
        let body = ask(more);
        assert_eq!(site.error("/v1/responses", body.clone(), 400).await["param"], param, "{body}");
    }
    site.error("/v1/responses", ask(json!({"model": "gpt-9"})), 404).await;
}
