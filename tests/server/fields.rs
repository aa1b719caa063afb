//! Each field does what it says.

use super::{QUESTION, Site, answer, engine, http, question};
use aoji::{
    SamplingDefaults, Speculate, Template,
    server::{ServerOptions, UnknownFields},
};
use serde_json::{Value, json};

fn text(reply: &Value) -> &str {
    reply["choices"][0]["text"].as_str().unwrap()
}

fn content(reply: &Value) -> &str {
    reply["choices"][0]["message"]["content"].as_str().unwrap()
}

#[tokio::test]
async fn a_chat() {
    let site = Site::new().await;
    let (prompt, expected) = answer();
    let reply = site.chat(question(json!({}))).await;
    assert_eq!((&reply["object"], &reply["model"]), (&json!("chat.completion"), &json!("demo")));
    assert!(reply["id"].as_str().unwrap().starts_with("chatcmpl-") && reply["created"].is_u64());
    assert!(reply["system_fingerprint"].as_str().unwrap().starts_with("aoji-"));
    let message = json!({"role": "assistant", "content": expected, "refusal": null});
    let choice =
        json!({"index": 0, "message": message, "logprobs": null, "finish_reason": "stop", "stop_reason": null});
    assert_eq!(reply["choices"], json!([choice]));
    let usage = &reply["usage"];
    assert_eq!(usage["prompt_tokens"], prompt.len());
    let sum = usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap();
    assert!(usage["total_tokens"] == sum && usage["prompt_tokens_details"]["cached_tokens"].is_u64());
    for name in ["queue_ms", "prefill_ms", "prefill_tps", "decode_ms", "decode_tps", "ttft_ms"] {
        assert!(reply["timings"][name].as_f64().is_some_and(|ms| ms >= 0.0), "{name}");
    }
}

#[tokio::test]
async fn guesses_change_no_answer() {
    let site = Site::new().await;
    let ask = |more: Value| {
        let mut body =
            question(json!({"temperature": 0.7, "seed": 3, "ignore_eos": true, "max_tokens": 60, "logprobs": true}));
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        site.chat(body)
    };
    let plain = ask(json!({})).await;
    let guesses = |reply: &Value| {
        let details = &reply["usage"]["completion_tokens_details"];
        ["accepted_prediction_tokens", "rejected_prediction_tokens"].map(|name| details[name].as_u64().unwrap())
    };
    assert_eq!(guesses(&plain), [0, 0]);
    let prediction = json!({"type": "content", "content": content(&plain)});
    for (more, wanted) in [
        (json!({"speculate": true}), None),
        (json!({"prediction": prediction}), Some(true)),
        (json!({"prediction": prediction, "speculate": false}), Some(false)),
    ] {
        // Whether a guess is worth its row goes by what steps have cost: on a busy machine it may take a few answers.
        for tries in 1.. {
            let reply = ask(more.clone()).await;
            assert_eq!(reply["choices"], plain["choices"], "{more}");
            let [accepted, rejected] = guesses(&reply);
            if wanted.is_none_or(|wanted| wanted == (accepted + rejected > 0)) {
                break;
            }
            assert!(wanted == Some(true) && tries < 20, "{more}: {accepted}, {rejected}");
        }
    }
    let of_metric = |name: &str, text: &str| -> u64 {
        let line = text.lines().find(|l| l.starts_with(&format!("aoji:{name} "))).unwrap();
        line.split(' ').nth(1).unwrap().parse().unwrap()
    };
    let text = site.get("/metrics").await.body;
    let [drafted, accepted] =
        ["draft", "accepted"].map(|n| of_metric(&format!("spec_decode_num_{n}_tokens_total"), &text));
    assert!(drafted >= accepted && drafted > 0, "{text}");
}

/// An earlier answer is used for guesses, but only for requests with the same key.
#[tokio::test]
async fn earlier_answers_are_guessed() {
    let options = ServerOptions {
        speculate: Speculate::Ngram,
        speculate_memory: 200,
        keys: vec!["a".into(), "b".into()],
        ..ServerOptions::default()
    };
    let site = Site::with(options).await;
    let ask = async |key: &str| {
        let key = format!("Bearer {key}");
        let headers = [("Content-Type", "application/json"), ("Authorization", key.as_str())];
        let body = question(json!({"temperature": 0, "max_tokens": 40}));
        let reply = http::post(&site.target(), "/v1/chat/completions", &headers, &body).await.json();
        let accepted = reply["usage"]["completion_tokens_details"]["accepted_prediction_tokens"].as_u64().unwrap();
        (content(&reply).to_string(), accepted)
    };
    let (first, _) = ask("a").await;
    let mut most = 0;
    for _ in 0..20 {
        let (text, accepted) = ask("a").await;
        assert_eq!(text, first);
        most = most.max(accepted);
    }
    let (text, of_other) = ask("b").await;
    assert_eq!(text, first);
    assert!(most > 5 && of_other < most, "{most} of the same key, {of_other} of another");
}

#[tokio::test]
async fn messages_and_templates() {
    let site = Site::new().await;
    let expected = answer().1;
    let parts = json!([{"type": "text", "text": QUESTION, "cache_control": {"type": "ephemeral"}}]);
    assert_eq!(
        content(&site.chat(json!({"messages": [{"role": "user", "content": parts}], "temperature": 0})).await),
        expected
    );
    let talk = json!([
        {"role": "developer", "content": aoji::AOG_INSTRUCTION},
        {"role": "user", "content": QUESTION}, {"role": "assistant", "content": expected},
        {"role": "user", "content": QUESTION}
    ]);
    let reply = site.chat(json!({"messages": talk, "temperature": 0})).await;
    assert_eq!(content(&reply), expected);
    let template = Some(Template::Raw);
    let raw = Site::with(ServerOptions { template, ..ServerOptions::default() }).await;
    let reply = raw.chat(question(json!({"max_tokens": 1, "return_token_ids": true}))).await;
    let ids = engine().tokenizer().unwrap().encode(QUESTION, true).unwrap();
    assert_eq!(reply["choices"][0]["prompt_token_ids"], json!(ids));
    // What a user writes is no special token.
    let typed = site.chat(json!({"messages": [{"role": "user", "content": "<|end_of_text|>"}], "max_tokens": 1, "return_token_ids": true}));
    assert!(!typed.await["choices"][0]["prompt_token_ids"].as_array().unwrap().contains(&json!(2047)));
}

#[tokio::test]
async fn prompts_in_four_shapes() {
    let site = Site::new().await;
    site.complete(json!({"prompt": "가", "suffix": "", "max_tokens": 1})).await; // it asks for nothing
    let tokenizer = engine().tokenizer().unwrap();
    let ids = |text| tokenizer.encode(text, true).unwrap();
    let (a, b) = ("한국의 수도는", "1 + 1 =");
    let of = async |prompt: Value| {
        let reply = site.complete(json!({"prompt": prompt, "temperature": 0, "return_token_ids": true})).await;
        let choices = reply["choices"].as_array().unwrap().clone();
        for (i, choice) in choices.iter().enumerate() {
            assert_eq!((&choice["index"], choice["token_ids"].as_array().unwrap().len() <= 16), (&json!(i), true));
        }
        let prompts = choices.iter().map(|c| c["prompt_token_ids"].as_array().unwrap().len()).sum::<usize>();
        assert_eq!(reply["usage"]["prompt_tokens"], prompts);
        choices.iter().map(|c| (c["text"].clone(), c["prompt_token_ids"].clone())).collect::<Vec<_>>()
    };
    let one = of(json!(a)).await;
    assert_eq!(one[0].1, json!(ids(a)));
    assert_eq!(of(json!(ids(a))).await, one);
    let both = of(json!([a, b])).await;
    assert_eq!(both[0], one[0]);
    assert_eq!(of(json!([ids(a), ids(b)])).await, both);
    let bare = site
        .complete(json!({"prompt": a, "add_special_tokens": false, "return_token_ids": true, "max_tokens": 1}))
        .await;
    assert_eq!(bare["choices"][0]["prompt_token_ids"], json!(tokenizer.encode(a, false).unwrap()));
}

#[tokio::test]
async fn lengths() {
    let site = Site::new().await;
    let reply = site.complete(json!({"prompt": "가", "ignore_eos": true})).await;
    assert_eq!(reply["usage"]["completion_tokens"], 16, "OpenAI's default");
    assert_eq!(reply["choices"][0]["finish_reason"], "length");
    for name in ["max_tokens", "max_completion_tokens"] {
        let reply = site.chat(question(json!({(name): 3}))).await;
        assert_eq!(
            (&reply["usage"]["completion_tokens"], &reply["choices"][0]["finish_reason"]),
            (&json!(3), &json!("length"))
        );
    }
    let none = site.complete(json!({"prompt": "가", "max_tokens": 0, "echo": true})).await;
    assert_eq!((text(&none), &none["usage"]["completion_tokens"]), ("가", &json!(0)));
    let long = vec![5; 1020];
    let reply = site.complete(json!({"prompt": long, "ignore_eos": true})).await;
    assert_eq!(reply["usage"]["completion_tokens"], 4, "as much as there is room for");
}

/// Where a request says nothing, the recommendation of the model's author counts, else the request.
#[tokio::test]
async fn what_the_author_recommends() {
    let sampling = SamplingDefaults { temperature: Some(0.0), max_new_tokens: Some(3), ..SamplingDefaults::default() };
    let site = Site::with(ServerOptions { sampling, ..ServerOptions::default() }).await;
    let of = async |more: Value| {
        let mut body = json!({"prompt": "오늘", "ignore_eos": true, "return_token_ids": true});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        site.complete(body).await["choices"][0]["token_ids"].clone()
    };
    let greedy = of(json!({"temperature": 0, "max_tokens": 6})).await;
    assert_eq!(of(json!({})).await.as_array().unwrap()[..], greedy.as_array().unwrap()[..3]);
    assert_eq!(of(json!({"max_tokens": 6})).await, greedy);
    let hot = json!({"temperature": 20, "seed": 1, "max_tokens": 6});
    assert_ne!(of(hot).await, greedy);
    let chat = site.chat(json!({"messages": [{"role": "user", "content": "오늘"}], "ignore_eos": true})).await;
    assert_eq!(chat["usage"]["completion_tokens"], 3);
}

#[tokio::test]
async fn seeds() {
    let site = Site::new().await;
    let of = async |more: Value| {
        let mut body = json!({"prompt": "오늘", "temperature": 1.5, "max_tokens": 12, "ignore_eos": true});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let reply = site.complete(body).await;
        reply["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap().to_string()).collect::<Vec<_>>()
    };
    let first = of(json!({"seed": 7})).await;
    assert_eq!(of(json!({"seed": 7})).await, first);
    assert_ne!(of(json!({"seed": -7})).await, first);
    let three = of(json!({"seed": 7, "n": 3, "best_of": 3})).await;
    assert_eq!(
        three,
        [first[0].clone(), of(json!({"seed": 8})).await[0].clone(), of(json!({"seed": 9})).await[0].clone()]
    );
    assert_ne!(of(json!({})).await, of(json!({})).await, "without a seed each is another");
}

#[tokio::test]
async fn sampling() {
    let site = Site::new().await;
    let greedy = text(&site.complete(json!({"prompt": "오늘", "temperature": 0})).await).to_string();
    for more in [
        json!({"top_k": 1}),
        json!({"top_p": 1e-6}),
        json!({"top_p": 0}),
        json!({"min_p": 1.0}),
        json!({"temperature": 1e-8}),
        json!({"temperature": 1e-40}),
    ] {
        let mut body = json!({"prompt": "오늘"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        assert_eq!(text(&site.complete(body).await), greedy, "{more}");
    }
    let forced = json!({"prompt": "오늘", "temperature": 0, "logit_bias": {"300": 1000}, "max_tokens": 4, "return_token_ids": true});
    assert_eq!(site.complete(forced).await["choices"][0]["token_ids"], json!([300, 300, 300, 300]));
    for name in ["presence_penalty", "frequency_penalty", "repetition_penalty"] {
        let body = json!({"prompt": "오늘", "temperature": 0, "logit_bias": {"300": 40, "301": 39}, "max_tokens": 4, (name): 50, "return_token_ids": true});
        let ids = site.complete(body).await["choices"][0]["token_ids"].clone();
        assert_ne!(ids, json!([300, 300, 300, 300]), "{name}");
    }
    let nulls = [
        "top_k",
        "top_p",
        "min_p",
        "n",
        "stop",
        "seed",
        "logprobs",
        "logit_bias",
        "stream",
        "stream_options",
        "max_tokens",
        "echo",
    ];
    let mut body = json!({"prompt": "오늘", "temperature": 0});
    nulls.iter().for_each(|name| body[name] = Value::Null);
    assert_eq!(text(&site.complete(body).await), greedy, "null is absent");
}

#[tokio::test]
async fn ends() {
    let site = Site::new().await;
    let expected = answer().1;
    let stop = expected.chars().skip(3).take(2).collect::<String>();
    let before = expected.split(&stop).next().unwrap();
    for shape in [json!(stop), json!(["that never comes", stop])] {
        let reply = site.chat(question(json!({"stop": shape}))).await;
        assert_eq!((content(&reply), &reply["choices"][0]["finish_reason"]), (before, &json!("stop")));
    }
    // With special tokens in the text, the server itself looks for stop strings.
    let reply = site.chat(question(json!({"stop": stop, "skip_special_tokens": false}))).await;
    assert_eq!((content(&reply), &reply["choices"][0]["stop_reason"]), (before, &json!(stop)));
    let kept = site
        .chat(question(json!({"stop": stop, "skip_special_tokens": false, "include_stop_str_in_output": true})))
        .await;
    assert_eq!(content(&kept), format!("{before}{stop}"));
    let whole = site.chat(question(json!({"skip_special_tokens": false}))).await;
    assert_eq!(content(&whole), expected, "the token that ends a text is no part of it");
    let shown =
        json!({"skip_special_tokens": false, "ignore_eos": true, "max_tokens": whole["usage"]["completion_tokens"]});
    assert_eq!(content(&site.chat(question(shown)).await), format!("{expected}<|end_of_text|>"));
    let ids = site.chat(question(json!({"return_token_ids": true}))).await["choices"][0]["token_ids"].clone();
    let reply = site.chat(question(json!({"stop_token_ids": [ids[2]], "return_token_ids": true}))).await;
    assert_eq!(reply["choices"][0]["token_ids"], json!(ids.as_array().unwrap()[..3]));
    assert_eq!(reply["choices"][0]["finish_reason"], "stop");
    let longer = site.chat(question(json!({"min_tokens": 60, "max_tokens": 60}))).await;
    assert_eq!(longer["usage"]["completion_tokens"], 60);
    // Nor does a stop string end it before; all tokens but the last one, which is no text.
    let all = whole["usage"]["completion_tokens"].as_u64().unwrap() - 1;
    let reply = site.chat(question(json!({"stop": stop, "min_tokens": all, "max_tokens": all}))).await;
    assert_eq!((content(&reply), &reply["choices"][0]["finish_reason"]), (expected.as_str(), &json!("length")));
}

#[tokio::test]
async fn what_ended_a_text() {
    let site = Site::new().await;
    let expected = answer().1;
    let stop = expected.chars().skip(3).take(2).collect::<String>();
    let before = expected.split(&stop).next().unwrap();
    let reply = site.chat(question(json!({"stop": stop}))).await;
    assert_eq!((content(&reply), &reply["choices"][0]["stop_reason"]), (before, &json!(stop)));
    let kept = site.chat(question(json!({"stop": stop, "include_stop_str_in_output": true}))).await;
    assert_eq!(content(&kept), format!("{before}{stop}"));
    let ids = site.chat(question(json!({"return_token_ids": true}))).await["choices"][0]["token_ids"].clone();
    let reply = site.chat(question(json!({"stop_token_ids": [ids[2]]}))).await;
    assert_eq!(reply["choices"][0]["stop_reason"], ids[2]);
    assert_eq!(
        site.chat(question(json!({}))).await["choices"][0]["stop_reason"],
        json!(null),
        "not the model's own end"
    );
}

#[tokio::test]
async fn logprobs_of_an_answer() {
    let site = Site::new().await;
    let reply = site.chat(question(json!({"logprobs": true, "top_logprobs": 3, "max_tokens": 8}))).await;
    let choice = &reply["choices"][0];
    let tokens = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(tokens.len(), 8);
    let bytes: Vec<u8> =
        tokens.iter().flat_map(|t| serde_json::from_value::<Vec<u8>>(t["bytes"].clone()).unwrap()).collect();
    assert!(String::from_utf8_lossy(&bytes).starts_with(choice["message"]["content"].as_str().unwrap()));
    for token in tokens {
        assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 3);
        assert_eq!(token["top_logprobs"][0]["logprob"], token["logprob"], "greedy takes the most likely one");
    }
    let prompt = answer().0;
    let reply = site.chat(question(json!({"prompt_logprobs": 2, "max_tokens": 1}))).await;
    let list = reply["choices"][0]["prompt_logprobs"].as_array().unwrap();
    assert_eq!((list.len(), &list[0]), (prompt.len(), &json!(null)));
    for (id, entry) in prompt.iter().zip(list).skip(1) {
        assert!(entry[id.to_string()]["logprob"].as_f64().unwrap() <= 0.0 && entry.as_object().unwrap().len() <= 3);
    }
    let legacy = site
        .complete(json!({"prompt": "오늘", "temperature": 0, "logprobs": 2, "max_tokens": 6, "ignore_eos": true}))
        .await;
    let lists = &legacy["choices"][0]["logprobs"];
    assert_eq!((lists["tokens"].as_array().unwrap().len(), &lists["text_offset"][0]), (6, &json!(0)));
}

#[tokio::test]
async fn ignored_and_unknown() {
    let site = Site::new().await;
    let body = question(json!({
        "user": "u", "metadata": {"a": 1}, "parallel_tool_calls": true, "tools": [], "tool_choice": "none", "suffix": null,
        "typo_k": 3, "stream_options": null, "modalities": ["text"], "use_beam_search": false, "length_penalty": 1.0,
        "response_format": {"type": "text"}, "max_tokens": 1, "top_kk": null
    }));
    let reply = site.post("/v1/chat/completions", &body).await;
    assert_eq!((reply.status, reply.header("x-aoji-ignored-params")), (200, "metadata,typo_k,user"));
    let named = json!({"messages": [{"role": "user", "name": "철수", "content": "a", "refusal": null, "odd": 1}], "max_tokens": 1});
    let reply = site.post("/v1/chat/completions", &named).await;
    assert_eq!(reply.header("x-aoji-ignored-params"), "messages[].name,messages[].odd");
    let evil = json!({"prompt": "a", "max_tokens": 1, "x\r\nset-cookie: a=b": 1, "한": 1});
    let reply = site.post("/v1/completions", &evil).await;
    assert_eq!((reply.status, reply.header("set-cookie")), (200, ""));
    assert_eq!(site.post("/tokenize", &json!({"prompt": "a", "huh": 1})).await.header("x-aoji-ignored-params"), "huh");

    let policy = async |unknown_fields| Site::with(ServerOptions { unknown_fields, ..ServerOptions::default() }).await;
    let reject = policy(UnknownFields::Reject).await;
    let error = reject.error("/v1/chat/completions", question(json!({"typo_k": 3})), 400).await;
    assert_eq!((&error["param"], &error["code"]), (&json!("typo_k"), &json!("unsupported_parameter")));
    let nested = question(json!({"stream": true, "stream_options": {"include_usag": true}}));
    assert_eq!(reject.error("/v1/chat/completions", nested, 400).await["param"], "stream_options.include_usag");
    assert_eq!(reject.post("/v1/chat/completions", &question(json!({"user": "u", "max_tokens": 1}))).await.status, 200);
    let ignore = policy(UnknownFields::Ignore).await;
    let reply = ignore.post("/v1/chat/completions", &question(json!({"typo_k": 3, "max_tokens": 1}))).await;
    assert_eq!((reply.status, reply.header("x-aoji-ignored-params")), (200, ""));
    // Any client's headers are fine.
    let headers = [("X-Stainless-Lang", "python"), ("OpenAI-Organization", "o")];
    let reply = http::post(&site.target(), "/v1/completions", &headers, &json!({"prompt": "a", "max_tokens": 1})).await;
    assert_eq!(reply.status, 200);
}

/// Every field of OpenAI's two requests, and of other servers if clients are known to send it, is dealt with: each is
/// honoured, refused with its own reason, or listed as ignored.
#[tokio::test]
async fn no_field_of_the_specification_is_unknown() {
    let options = ServerOptions { unknown_fields: UnknownFields::Reject, ..ServerOptions::default() };
    let site = Site::with(options).await;
    let both = "model max_tokens temperature top_p n stream stream_options stop seed logprobs logit_bias presence_penalty \
                frequency_penalty user top_k min_p repetition_penalty stop_token_ids include_stop_str_in_output min_tokens \
                ignore_eos skip_special_tokens spaces_between_special_tokens add_special_tokens prompt_logprobs \
                logprob_token_ids allowed_token_ids bad_words truncate_prompt_tokens return_token_ids structured_outputs \
                guided_json guided_regex guided_choice guided_grammar guided_decoding_backend guided_whitespace_pattern \
                response_format cache_salt request_id priority use_beam_search length_penalty n_predict n_probs cache_prompt \
                typical_p dry_multiplier xtc_probability mirostat timings_per_token repeat_penalty grammar json_schema";
    let completions = "prompt best_of echo suffix";
    let chat = "messages modalities verbosity reasoning_effort max_completion_tokens web_search_options top_logprobs audio store \
                prediction tools tool_choice parallel_tool_calls function_call functions metadata safety_identifier \
                prompt_cache_key prompt_cache_retention prompt_cache_options service_tier moderation chat_template \
                chat_template_kwargs documents add_generation_prompt continue_final_message mm_processor_kwargs";
    for (path, own, whole) in [
        ("/v1/completions", completions, json!({"prompt": "가", "max_tokens": 1})),
        ("/v1/chat/completions", chat, json!({"messages": [{"role": "user", "content": "가"}], "max_tokens": 1})),
    ] {
        for field in both.split_whitespace().chain(own.split_whitespace()) {
            let mut body = whole.clone();
            body[field] = json!("x");
            let reply = site.post(path, &body).await;
            assert!(!reply.body.contains("knows no such field"), "{path} {field}: {}", reply.body);
            body[field] = json!(null);
            let expected = if matches!(field, "prompt" | "messages") { 400 } else { 200 };
            assert_eq!(site.post(path, &body).await.status, expected, "{path} {field}: null is absent");
        }
    }
}
