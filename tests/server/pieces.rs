//! A model whose tokenizer writes spaces as SentencePiece does: a continuation keeps its first space, in every shape of a reply.

use super::{Site, tokenizers};
use aoji::{
    Device, Dtype, Engine, Event, GenerateOptions, Options, Sampling,
    server::{Server, ServerOptions},
    synth,
};
use serde_json::{Value, json};
use std::{fs, sync::OnceLock, time::Duration};

/// A small random model that likes words better than bytes, in front of Llama 2's kind of tokenizer.
fn engine() -> &'static Engine {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    ENGINE.get_or_init(|| {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 64,
            "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 271, "max_position_embeddings": 256,
            "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"
        });
        let dir = tempfile::tempdir().unwrap();
        synth::write(&config.to_string(), 7, Dtype::Bf16, synth::SHARD_BYTES, dir.path(), |_, _| {}).unwrap();
        let tokenizer = tokenizers::pieces(tokenizers::llama2_decoder());
        fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %} [a]";
        let config = json!({"bos_token": "<s>", "eos_token": "</s>", "chat_template": template});
        fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        let options = Options { device: Device::Cpu, ..Options::default() };
        Engine::open(dir.path().to_str().unwrap(), &options).unwrap()
    })
}

async fn site() -> Site {
    Site::of(Server::start(engine().clone(), ServerOptions::default()).unwrap(), Duration::from_secs(30)).await
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// The bytes that a name of `logprobs.tokens` stands for.
fn bytes(name: &str) -> Vec<u8> {
    match name.strip_prefix("bytes:\\x") {
        Some(hex) => hex.split("\\x").map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect(),
        None => name.as_bytes().to_vec(),
    }
}

/// Tokens, their names and their offsets fit the text that contains them.
fn check(before: &[u32], choice: &Value, skip: bool) {
    let tokenizer = engine().tokenizer().unwrap();
    let decode = |ids: &[u32]| tokenizer.decode(ids, skip).unwrap();
    let (text, answer) = (choice["text"].as_str().unwrap(), ids(&choice["token_ids"]));
    let lists = &choice["logprobs"];
    let names: Vec<&str> = lists["tokens"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    let offsets: Vec<usize> = serde_json::from_value(lists["text_offset"].clone()).unwrap();
    // Where the prompt is echoed, its tokens are in the lists too, and the text begins with it.
    let echoed = names.len() - answer.len();
    assert!(echoed == 0 || echoed == before.len());
    let all = [before, &answer].concat();
    if !decode(&all).starts_with(&decode(before)) {
        return; // bytes of the answer have made the prompt's last ones a bad run
    }
    let (first, whole) =
        if echoed > 0 { (0, decode(&all)) } else { (before.len(), format!("{}{text}", decode(before))) };
    assert_eq!(whole, decode(&all));
    assert_eq!(if echoed > 0 { text } else { &whole }, whole);
    let shown = |id: u32| !(skip && tokenizer.is_special(id));
    let told: Vec<u8> =
        names.iter().zip(&all[first..]).filter(|(_, id)| shown(**id)).flat_map(|(n, _)| bytes(n)).collect();
    if let Ok(told) = String::from_utf8(told) {
        assert_eq!(told, text, "{names:?}");
    }
    for (i, offset) in offsets.iter().enumerate() {
        let so_far = decode(&all[..first + i]);
        // Within a character there is no right number.
        if whole.starts_with(&so_far) && !so_far.ends_with(char::REPLACEMENT_CHARACTER) {
            let skipped = if echoed > 0 { 0 } else { decode(before).chars().count() };
            assert_eq!(*offset, so_far.chars().count() - skipped, "token {i} of {names:?} in {text:?}");
        }
    }
}

#[tokio::test]
async fn texts_offsets_and_names_fit_together() {
    let site = site().await;
    let tokenizer = engine().tokenizer().unwrap();
    let words: serde_json::Map<String, Value> = (259..271).map(|id: u32| (id.to_string(), json!(9))).collect();
    let prompts = ["hi", "hi 한국", "a\n", " hi", "b a "].map(|text| tokenizer.encode(text, true).unwrap());
    let more = [vec![1], vec![1, 2, 264], vec![264, 0xED + 3, 0x95 + 3], vec![0x20 + 3, 0x20 + 3]];
    let prompts: Vec<Vec<u32>> = prompts.into_iter().map(|ids| [vec![1], ids].concat()).chain(more).collect();
    for (i, prompt) in prompts.iter().enumerate() {
        for echo in [false, true] {
            let cut = prompt.contains(&(0xED + 3));
            let body = json!({"prompt": prompt, "n": 3, "max_tokens": 12, "temperature": 1.5, "seed": i, "echo": echo, "logprobs": 2,
                              "logit_bias": words, "return_token_ids": true, "ignore_eos": true, "skip_special_tokens": i % 2 == 0});
            let reply = site.complete(body).await;
            for choice in reply["choices"].as_array().unwrap() {
                if echo {
                    let all = [&prompt[..], &ids(&choice["token_ids"])].concat();
                    assert_eq!(choice["text"], tokenizer.decode(&all, i % 2 == 0).unwrap());
                }
                if !cut {
                    check(prompt, choice, i % 2 == 0);
                }
            }
        }
    }
}

/// What the last bytes of a prompt of ids are is known only with the answer: one more byte may complete a character, or spoil the run.
#[tokio::test]
async fn undecided_bytes_at_the_end_of_a_prompt() {
    let site = site().await;
    let byte = |b: u32| b + 3;
    let (h, hi) = (264, 266);
    let part = vec![1, h, byte(0xED), byte(0x95)];
    let whole = [&part[..], &[byte(0x9C)]].concat();
    for (prompt, next, expected) in [
        (&part, byte(0x9C), "h한"),
        (&part, hi, "h\u{FFFD}\u{FFFD} hi"),
        (&whole, hi, "h한 hi"),
        (&whole, byte(0x80), "h\u{FFFD}\u{FFFD}\u{FFFD}\u{FFFD}"),
    ] {
        let mut body = json!({"prompt": prompt, "max_tokens": 1, "echo": true, "logit_bias": {next.to_string(): 1000}});
        assert_eq!(site.complete(body.clone()).await["choices"][0]["text"], expected);
        body["stream"] = true.into();
        let events = site.post("/v1/completions", &body).await.events();
        assert_eq!(events.iter().map(|e| e["choices"][0]["text"].as_str().unwrap()).collect::<String>(), expected);
    }
}

#[test]
fn a_session_keeps_the_first_space() {
    let tokenizer = engine().tokenizer().unwrap();
    let sampling = Sampling { logit_bias: vec![(tokenizer.token_id("▁hi").unwrap(), 1000.0)], ..Sampling::default() };
    let options = GenerateOptions { sampling, max_tokens: Some(2), ..GenerateOptions::default() };
    let mut session = engine().session(16).unwrap();
    let events = session.generate(&tokenizer.encode("hi", true).unwrap(), &options).unwrap();
    let text = events.filter_map(|event| match event.unwrap() {
        Event::Text(text) => Some(text),
        _ => None,
    });
    assert_eq!(text.collect::<String>(), " hi hi");
}

#[tokio::test]
async fn the_first_space_is_in_every_reply() {
    let site = site().await;
    let tokenizer = engine().tokenizer().unwrap();
    let word = tokenizer.token_id("▁hi").unwrap();
    let forced = json!({"prompt": "hi", "max_tokens": 2, "temperature": 0, "logit_bias": {word.to_string(): 1000}});
    let with = |more: Value| {
        let mut body = forced.clone();
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let text = |reply: &Value| reply["choices"][0]["text"].as_str().unwrap().to_string();
    assert_eq!(text(&site.complete(forced.clone()).await), " hi hi");
    let echo = site.complete(with(json!({"echo": true, "logprobs": 0}))).await;
    assert_eq!(text(&echo), "hi hi hi");
    let lists = &echo["choices"][0]["logprobs"];
    assert_eq!((&lists["tokens"], &lists["text_offset"]), (&json!(["hi", " hi", " hi"]), &json!([0, 2, 5])));
    assert_eq!(text(&site.complete(with(json!({"stop": " hi"}))).await), "");
    let stream = site.post("/v1/completions", &with(json!({"stream": true}))).await.events();
    assert_eq!(stream.iter().map(text).collect::<String>(), " hi hi");
    // BOS alone is no text yet.
    assert_eq!(text(&site.complete(with(json!({"prompt": [1]}))).await), "hi hi");

    let chat = json!({"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "temperature": 0, "logprobs": true,
                      "logit_bias": {word.to_string(): 1000}});
    let reply = site.chat(chat.clone()).await;
    let choice = &reply["choices"][0];
    assert_eq!(choice["message"]["content"], " hi hi");
    let tokens: Vec<&Value> = choice["logprobs"]["content"].as_array().unwrap().iter().map(|t| &t["token"]).collect();
    assert_eq!(tokens, [" hi", " hi"]);
    let mut begun = chat;
    begun["messages"].as_array_mut().unwrap().push(json!({"role": "assistant", "content": "b"}));
    begun["continue_final_message"] = json!(true);
    assert_eq!(site.chat(begun).await["choices"][0]["message"]["content"], " hi hi");
}
