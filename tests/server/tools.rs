//! Functions: how they come into the prompt, what an answer calls, and what is refused.

use super::{Site, answer, engine, question};
use aoji::{
    Template,
    server::{Server, ServerOptions, ToolParser},
};
use serde_json::{Value, json};
use std::path::Path;

/// A server whose template is one of `templates/`.
async fn site(template: &str) -> Site {
    Site::with(ServerOptions { template: Some(own(template)), ..ServerOptions::default() }).await
}

fn own(template: &str) -> Template {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/server/templates").join(template);
    Template::parse(path.to_str().unwrap(), None).unwrap()
}

fn weather() -> Value {
    json!({
        "type": "object", "additionalProperties": false, "required": ["city", "days"],
        "properties": {"city": {"enum": ["서울", "부산"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}}
    })
}

fn tools() -> Value {
    json!([
        {"type": "function", "function": {"name": "weather", "description": "날씨", "parameters": weather()}},
        {"type": "function", "function": {"name": "now"}}
    ])
}

/// The calls of an answer; each is checked against the functions that were offered.
fn calls(message: &Value) -> Vec<(String, Value)> {
    let call = |call: &Value| {
        assert_eq!(call["type"], "function");
        let id = call["id"].as_str().unwrap();
        assert!(id.len() == 9 && id.bytes().all(|b| b.is_ascii_alphanumeric()), "{id}");
        let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
        let name = call["function"]["name"].as_str().unwrap();
        match name {
            "weather" => {
                assert!(arguments["city"] == "서울" || arguments["city"] == "부산", "{arguments}");
                assert!((1..=9).contains(&arguments["days"].as_i64().unwrap()), "{arguments}");
                assert_eq!(arguments.as_object().unwrap().len(), 2, "{arguments}");
            }
            "now" => assert_eq!(arguments, json!({})),
            other => panic!("{other} was not offered"),
        }
        (name.to_string(), arguments)
    };
    message["tool_calls"].as_array().map_or(Vec::new(), |list| list.iter().map(call).collect())
}

/// The deltas of a stream, put together as clients do it.
fn assembled(events: &[Value]) -> (Value, Value) {
    let (mut content, mut calls, mut reason) = (String::new(), Vec::<Value>::new(), Value::Null);
    for choice in events.iter().map(|e| &e["choices"][0]) {
        content.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        for new in choice["delta"]["tool_calls"].as_array().unwrap_or(&Vec::new()) {
            match calls.get_mut(new["index"].as_u64().unwrap() as usize) {
                Some(call) => {
                    let more = new["function"]["arguments"].as_str().unwrap();
                    assert!(new.get("id").is_none() && new["function"].get("name").is_none(), "{new}");
                    let text = call["function"]["arguments"].as_str().unwrap().to_string() + more;
                    call["function"]["arguments"] = text.into();
                }
                None => {
                    assert_eq!(new["index"], calls.len(), "calls come in order");
                    calls.push(new.clone());
                }
            }
        }
        assert!(reason.is_null(), "nothing after the end");
        reason = choice["finish_reason"].clone();
    }
    let content = if content.is_empty() && !calls.is_empty() { Value::Null } else { content.into() };
    (json!({"content": content, "tool_calls": calls}), reason)
}

#[tokio::test]
async fn calls_that_must_be() {
    for template in [None, Some("hermes.jinja"), Some("llama3.jinja"), Some("mistral.jinja")] {
        let site = match template {
            None => Site::new().await,
            Some(template) => site(template).await,
        };
        let named = json!({"type": "function", "function": {"name": "weather"}});
        for (choice, parallel) in [(json!("required"), false), (named, true)] {
            let body = |stream: bool| {
                question(json!({
                    "tools": tools(), "tool_choice": choice, "parallel_tool_calls": parallel, "stream": stream,
                    "max_tokens": 200
                }))
            };
            let reply = site.chat(body(false)).await["choices"][0].take();
            let found = calls(&reply["message"]);
            assert_eq!(found.len(), 1, "{template:?} {reply}");
            assert!(choice == "required" || found[0].0 == "weather", "{reply}");
            assert_eq!((&reply["finish_reason"], &reply["message"]["content"]), (&json!("tool_calls"), &json!(null)));
            let events = site.post("/v1/chat/completions", &body(true)).await.events();
            assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
            let (message, reason) = assembled(&events);
            assert_eq!((calls(&message), &message["content"]), (found, &json!(null)), "{template:?}");
            assert_eq!(reason, "tool_calls");
        }
    }
}

/// A call that was cut off is not reported as a call, and the reason says what cut it off.
#[tokio::test]
async fn calls_that_are_cut_off() {
    cut_off(site("hermes.jinja").await).await;
    cut_off(Site::new().await).await;
}

async fn cut_off(site: Site) {
    let ask = async |more: Value| {
        let mut body = question(json!({
            "tools": tools(), "tool_choice": {"type": "function", "function": {"name": "weather"}}
        }));
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let whole = site.chat(body.clone()).await["choices"][0].take();
        body["stream"] = true.into();
        let (message, reason) = assembled(&site.post("/v1/chat/completions", &body).await.events());
        assert_eq!(reason, whole["finish_reason"]);
        assert_eq!(message["content"], whole["message"]["content"]);
        let arguments = |message: &Value| message["tool_calls"][0]["function"]["arguments"].clone();
        assert_eq!(arguments(&message), arguments(&whole["message"]));
        (whole["finish_reason"].clone(), whole["message"].clone())
    };
    let (reason, message) = ask(json!({"max_tokens": 200})).await;
    assert_eq!(reason, "tool_calls");
    let whole = message["tool_calls"][0]["function"]["arguments"].as_str().unwrap().to_string();
    // In the arguments, by a stop string of theirs.
    let (reason, message) = ask(json!({"max_tokens": 200, "stop": ["\"days\""]})).await;
    let part = message["tool_calls"][0]["function"]["arguments"].as_str().unwrap();
    assert!(reason == "stop" && part.len() < whole.len() && whole.starts_with(part), "{message}");
    // By the length, everywhere.
    for max_tokens in 1..40 {
        let (reason, message) = ask(json!({"max_tokens": max_tokens})).await;
        let part = message["tool_calls"][0]["function"]["arguments"].as_str();
        match part {
            Some(part) => assert!(whole.starts_with(part), "{message}"),
            None => assert_eq!(message["content"], "", "what must be a call is no text: {message}"),
        }
        assert_eq!(reason, if reason == "tool_calls" { "tool_calls" } else { "length" });
        assert!(reason != "tool_calls" || part == Some(&whole), "{message}");
    }
}

/// At this temperature all kinds of calls come, several in an answer.
#[tokio::test]
async fn several_calls_and_answers() {
    let site = site("hermes.jinja").await;
    let body = |stream: bool| {
        question(json!({
            "tools": tools(), "tool_choice": "required", "temperature": 2.0, "seed": 5, "n": 4, "max_tokens": 250,
            "stream": stream, "logprobs": true
        }))
    };
    let whole = site.chat(body(false)).await["choices"].take();
    let events = site.post("/v1/chat/completions", &body(true)).await.events();
    let mut several = false;
    for (i, choice) in whole.as_array().unwrap().iter().enumerate() {
        let own: Vec<Value> = events.iter().filter(|e| e["choices"][0]["index"] == i).cloned().collect();
        let (message, reason) = assembled(&own);
        assert_eq!(reason, choice["finish_reason"]);
        let texts = |message: &Value| {
            let list = message["tool_calls"].as_array().unwrap().clone();
            list.iter()
                .map(|call| (call["function"]["name"].clone(), call["function"]["arguments"].clone()))
                .collect::<Vec<_>>()
        };
        assert_eq!(texts(&message), texts(&choice["message"]));
        let tokens = own.iter().filter_map(|e| e["choices"][0]["logprobs"]["content"].as_array()).flatten();
        assert_eq!(json!(tokens.collect::<Vec<_>>()), choice["logprobs"]["content"]);
        if reason == "tool_calls" {
            several |= calls(&choice["message"]).len() > 1;
        }
    }
    assert!(several, "{whole}");
}

#[tokio::test]
async fn answers_in_words() {
    let site = Site::new().await;
    // The model knows no functions; it goes on answering.
    let auto = site.chat(question(json!({"tools": tools(), "max_tokens": 60}))).await;
    let message = &auto["choices"][0]["message"];
    assert!(message["content"].as_str().is_some_and(|text| !text.is_empty()), "{auto}");
    assert!(message.get("tool_calls").is_none() && auto["choices"][0]["finish_reason"] != "tool_calls", "{auto}");
    let (_, expected) = answer();
    for more in [
        json!({"tools": tools(), "tool_choice": "none"}),
        json!({"tools": [], "tool_choice": "auto"}),
        json!({"tool_choice": "none", "parallel_tool_calls": false}),
    ] {
        assert_eq!(site.chat(question(more)).await["choices"][0]["message"]["content"], expected);
    }
    // A schema for the answer, and functions beside it.
    let schema = json!({"type": "object", "properties": {"name": {"enum": ["가", "나"]}}, "required": ["name"], "additionalProperties": false});
    let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
    let reply = site.chat(question(json!({"tools": tools(), "response_format": format, "max_tokens": 100}))).await;
    let message = &reply["choices"][0]["message"];
    match message["content"].as_str() {
        Some(text) => {
            assert!(["가", "나"].contains(&serde_json::from_str::<Value>(text).unwrap()["name"].as_str().unwrap()))
        }
        None => assert!(!calls(message).is_empty(), "{reply}"),
    }
}

/// A conversation with a call and its result, and the next question.
fn conversation() -> Value {
    json!([
        {"role": "system", "content": "짧게."},
        {"role": "user", "content": "날씨?"},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "abcdefgh1", "type": "function", "function": {"name": "weather", "arguments": "{\"days\":2,\"city\":\"서울\"}"}}
        ]},
        {"role": "tool", "tool_call_id": "abcdefgh1", "content": "맑음"},
        {"role": "user", "content": "고마워"}
    ])
}

async fn prompt(site: &Site, tools: Value) -> String {
    let tokens = site.ok("/tokenize", json!({"messages": conversation(), "tools": tools})).await["tokens"].take();
    let prompt = site.ok("/detokenize", json!({"tokens": tokens})).await["prompt"].take();
    let chat =
        site.chat(json!({"messages": conversation(), "tools": tools, "max_tokens": 1, "return_token_ids": true})).await;
    assert_eq!(chat["choices"][0]["prompt_token_ids"], tokens);
    prompt.as_str().unwrap().to_string()
}

#[tokio::test]
async fn prompts() {
    let now = json!([{"type": "function", "function": {"parameters": {"type": "object", "properties": {}}, "name": "now", "strict": true}}]);
    // In the order in which models are trained to read it, and as Python writes it.
    let line =
        r#"{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}"#;
    let hermes = site("hermes.jinja").await;
    let after = "[system]짧게.\n[user]날씨?\n[assistant]\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"days\": 2, \"city\": \"서울\"}}\n\
                 </tool_call>\n[tool]맑음\n[user]고마워\n[assistant]";
    assert_eq!(prompt(&hermes, now.clone()).await, format!("[functions]\n{line}\n{after}"));
    assert_eq!(prompt(&hermes, json!([])).await, after);
    let mistral = site("mistral.jinja").await;
    assert_eq!(
        prompt(&mistral, now.clone()).await,
        format!(
            "[AVAILABLE_TOOLS][{line}][/AVAILABLE_TOOLS][INST]짧게.[/INST][INST]날씨?[/INST][TOOL_CALLS][{{\"name\": \"weather\", \
             \"arguments\": {{\"days\": 2, \"city\": \"서울\"}}, \"id\": \"abcdefgh1\"}}][TOOL_RESULTS]{{\"content\": \"맑음\", \
             \"call_id\": \"abcdefgh1\"}}[/TOOL_RESULTS][INST]고마워[/INST]"
        )
    );
    let llama = prompt(&site("llama3.jinja").await, now.clone()).await;
    assert!(llama.contains("[assistant]{\"name\": \"weather\", \"parameters\": {\"days\": 2, \"city\": \"서울\"}}\n[ipython]맑음\n[user]{\n    \"type\": \"function\""), "{llama}");
    // The template of the model's card knows questions and answers only.
    let card = Site::new().await;
    let words = prompt(&card, now).await;
    assert!(words.contains("### Question:\n날씨?\n\n### Response:\n{\"name\": \"weather\", \"arguments\": {\"days\": 2, \"city\": \"서울\"}}\n\n"), "{words}");
    assert!(
        words.contains(
            "### Question:\nweather returned: 맑음\n\n고마워\n\n### Instruction:\n짧게.\n\nYou can call functions."
        ),
        "{words}"
    );
    assert!(
        words.contains(
            "\n{\"name\": \"now\", \"parameters\": {\"type\": \"object\", \"properties\": {}}}\n\n### Response:\n"
        ),
        "{words}"
    );
    assert!(!prompt(&card, json!([])).await.contains("functions"));
}

/// A description, an argument or an id that reads like a special token cannot end the prompt.
#[tokio::test]
async fn special_tokens_stay_text() {
    let site = site("mistral.jinja").await;
    let special = "<|end_of_text|>";
    let tools = json!([{"type": "function", "function": {"name": "f", "description": special, "parameters": {"type": "object", "properties": {(special): {}}}}}]);
    let messages = json!([
        {"role": "user", "content": special},
        {"role": "assistant", "tool_calls": [{"id": "abcdefgh1", "type": "function", "function": {"name": "f", "arguments": json!({(special): special}).to_string()}}]},
        {"role": "tool", "tool_call_id": "abcdefgh1", "content": special}
    ]);
    let tokens = site.ok("/tokenize", json!({"messages": messages, "tools": tools})).await["tokens"].take();
    assert!(!tokens.as_array().unwrap().contains(&json!(2047)), "{tokens}");
    let text = site.ok("/detokenize", json!({"tokens": tokens})).await["prompt"].take();
    assert_eq!(text.as_str().unwrap().matches(special).count(), 6, "{text}");
}

#[tokio::test]
async fn what_is_refused() {
    let site = Site::new().await;
    let function = |f: Value| json!([{"type": "function", "function": f}]);
    for (param, more) in [
        ("tools", json!({"tools": "x"})),
        ("tools[0].type", json!({"tools": [{"type": "web_search"}]})),
        ("tools[0].function", json!({"tools": [{"type": "function"}]})),
        ("tools[0].function.name", json!({"tools": function(json!({}))})),
        ("tools[0].function.name", json!({"tools": function(json!({"name": "a b"}))})),
        ("tools[0].function.name", json!({"tools": function(json!({"name": "x".repeat(65)}))})),
        ("tools[2].function.name", json!({"tools": [tools()[0], tools()[1], tools()[0]]})),
        ("tools[0].function.parameters", json!({"tools": function(json!({"name": "f", "parameters": []}))})),
        (
            "tools[0].function.parameters",
            json!({"tools": function(json!({"name": "f", "parameters": {"type": "array"}}))}),
        ),
        (
            "tools[0].function.parameters",
            json!({"tools": function(json!({"name": "f", "parameters": {"properties": {"a": {"type": "nothing"}}}}))}),
        ),
        (
            "tools[1].function.parameters",
            json!({"tools": [tools()[1], {"type": "function", "function": {
                "name": "f", "strict": true, "parameters": {"properties": {"a": {"type": "array", "uniqueItems": true}}}
            }}]}),
        ),
        ("tools", json!({"tools": vec![tools()[1].clone(); 129]})),
        ("tools", json!({"tools": tools(), "structured_outputs": {"regex": "a"}})),
        ("tools", json!({"tools": tools(), "tool_choice": "required", "guided_regex": "a"})),
        (
            "tools",
            json!({"tools": tools(), "guided_choice": ["a"], "tool_choice": {"type": "function", "function": {"name": "now"}}}),
        ),
        ("tool_choice", json!({"tool_choice": "required"})),
        ("tool_choice", json!({"tools": tools(), "tool_choice": "sometimes"})),
        ("tool_choice", json!({"tools": tools(), "tool_choice": {"type": "function", "function": {"name": "nobody"}}})),
        ("parallel_tool_calls", json!({"tools": tools(), "parallel_tool_calls": 1})),
        ("ignore_eos", json!({"tools": tools(), "ignore_eos": true})),
        ("min_tokens", json!({"tools": tools(), "min_tokens": 3})),
    ] {
        let body = question(more);
        assert_eq!(site.error("/v1/chat/completions", body.clone(), 400).await["param"], param, "{body}");
    }
    let call = |id: &str, arguments: &str| json!({"id": id, "type": "function", "function": {"name": "f", "arguments": arguments}});
    let user = || json!({"role": "user", "content": "a"});
    let assistant = |calls: Value| json!({"role": "assistant", "tool_calls": calls});
    let result = |id: Value| json!({"role": "tool", "tool_call_id": id, "content": "b"});
    for (param, messages) in [
        ("messages[1].content", json!([user(), assistant(json!([]))])),
        ("messages[0].tool_calls", json!([{"role": "user", "content": "a", "tool_calls": [call("x", "{}")]}])),
        (
            "messages[1].tool_calls[0].id",
            json!([user(), assistant(json!([{"type": "function", "function": {"name": "f", "arguments": "{}"}}]))]),
        ),
        ("messages[1].tool_calls[0].id", json!([user(), assistant(json!([call("", "{}")]))])),
        ("messages[1].tool_calls[1].id", json!([user(), assistant(json!([call("x", "{}"), call("x", "{}")]))])),
        ("messages[1].tool_calls[0].function.arguments", json!([user(), assistant(json!([call("x", "{")]))])),
        ("messages[1].tool_calls[0].function.arguments", json!([user(), assistant(json!([call("x", "[]")]))])),
        ("messages[2].tool_call_id", json!([user(), assistant(json!([call("x", "")])), result(json!("y"))])),
        ("messages[2].tool_call_id", json!([user(), assistant(json!([call("x", "")])), result(json!(null))])),
        ("messages[0].tool_call_id", json!([{"role": "user", "content": "a", "tool_call_id": "x"}])),
        ("messages", json!([user(), assistant(json!([call("x", "{}")]))])), // the card's template wants a question at the end
    ] {
        let body = json!({"messages": messages});
        assert_eq!(site.error("/v1/chat/completions", body.clone(), 400).await["param"], param, "{body}");
    }
    assert_eq!(site.error("/v1/completions", json!({"prompt": "a", "tools": tools()}), 400).await["param"], "tools");
    // What a schema says beyond what an answer can be held to is left out where it is not strict.
    let lenient =
        function(json!({"name": "f", "parameters": {"properties": {"a": {"type": "array", "uniqueItems": true}}}}));
    site.chat(question(json!({"tools": lenient, "max_tokens": 1}))).await;

    let none = Site::with(ServerOptions { tool_parser: ToolParser::None, ..ServerOptions::default() }).await;
    let error = none.error("/v1/chat/completions", question(json!({"tools": tools()})), 400).await;
    assert_eq!((&error["param"], &error["code"]), (&json!("tools"), &json!("unsupported_parameter")));
    none.chat(question(json!({"tools": tools(), "tool_choice": "none", "max_tokens": 1}))).await;
    let start =
        |tool_parser| Server::start(engine().clone(), ServerOptions { tool_parser, ..ServerOptions::default() }).err();
    assert!(
        start(ToolParser::Hermes).unwrap().to_string().contains("--tool-parser json"),
        "the card's template has no tools"
    );
    assert!("hermes".parse() == Ok(ToolParser::Hermes) && "x".parse::<ToolParser>().unwrap_err().contains("llama3"));
}
