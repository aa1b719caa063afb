//! The server on the device: emulated, with all its checks on.

use super::{Site, answer, http, question};
use aoji::{
    Device, Engine, Options,
    server::{Server, ServerOptions},
};
use serde_json::json;
use std::time::Duration;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_at_the_same_time_are_those_of_the_cpu() {
    if aoji::cuda::kernels::MODULES.is_empty() {
        return println!("skipped: built without kernels");
    }
    cuda_emulator::install();
    let options = Options { device: Device::Cuda(0), context: Some(256), sequences: 3, ..Options::default() };
    let engine = Engine::open("demo", &options).unwrap();
    let server = ServerOptions { names: vec!["demo".into()], sequences: 3, ..ServerOptions::default() };
    let site = Site::of(Server::start(engine, server).unwrap(), Duration::from_secs(30)).await;
    let (_, whole) = answer();
    let ask = |more| site.chat(question(more));
    let (target, stream) = (site.target(), question(json!({"max_tokens": 6, "stream": true})));
    let (plain, streamed, drawn, chosen) = tokio::join!(
        ask(json!({"max_tokens": 8})),
        http::post(&target, "/v1/chat/completions", &[], &stream),
        ask(json!({"max_tokens": 5, "temperature": 1, "seed": 1, "logprobs": true, "top_logprobs": 2})),
        ask(json!({"max_tokens": 4, "structured_outputs": {"choice": ["데모", "모델"]}})),
    );
    let text = plain["choices"][0]["message"]["content"].as_str().unwrap().to_string();
    assert!(!text.is_empty() && whole.starts_with(&text), "{text:?} is not how {whole:?} begins");
    let pieces = streamed.events();
    let streamed: String = pieces.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect();
    assert!(!streamed.is_empty() && text.starts_with(&streamed), "{streamed:?}, {text:?}");
    assert_eq!(drawn["choices"][0]["logprobs"]["content"].as_array().unwrap().len(), 5);
    let chosen = chosen["choices"][0]["message"]["content"].as_str().unwrap();
    assert!("데모".starts_with(chosen) || "모델".starts_with(chosen), "{chosen}");
    assert_eq!(cuda_emulator::last_fault(), None);
    assert!(site.stop().await);
}
