//! Vectors of texts.

use super::{Site, engine};
use aoji::{GenerateOptions, Job, JobEvent, Pooling};
use serde_json::{Value, json};

fn vector(value: &Value) -> Vec<f32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The vector that the library computes for a prompt, scaled to length 1.
fn expected(prompt: Vec<u32>, pooling: Pooling) -> Vec<f32> {
    let found = pooled(prompt, pooling);
    let length = dot(&found, &found).sqrt();
    found.iter().map(|x| x / length).collect()
}

/// The same as it is.
fn pooled(prompt: Vec<u32>, pooling: Pooling) -> Vec<f32> {
    let mut batch =
        engine().batch(&aoji::BatchOptions { sequences: 1, max_tokens: 1024, cache_tokens: None, chunk: 64 }).unwrap();
    let options = GenerateOptions { max_tokens: Some(0), ..GenerateOptions::default() };
    batch.submit(Job { prompt, options, embed: Some(pooling), ..Job::default() }).unwrap();
    let mut found = Vec::new();
    let mut each = |_: aoji::JobId, event: JobEvent| {
        if let JobEvent::Embedding(vector) = event {
            found = vector;
        }
    };
    while batch.step(&mut each).unwrap() {}
    found
}

fn close(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6)
}

#[tokio::test]
async fn texts_and_ids() {
    let site = Site::new().await;
    let texts = ["하늘은 왜 파란가?", "하늘은 왜 파란색인가?", "라면 끓이는 법"];
    let reply = site.ok("/v1/embeddings", json!({"model": "demo", "input": texts})).await;
    assert_eq!((&reply["object"], &reply["model"]), (&json!("list"), &json!("demo")));
    let tokenizer = engine().tokenizer().unwrap();
    let ids: Vec<Vec<u32>> = texts.iter().map(|text| tokenizer.encode(text, true).unwrap()).collect();
    let count: usize = ids.iter().map(Vec::len).sum();
    assert_eq!(reply["usage"], json!({"prompt_tokens": count, "total_tokens": count}));
    let all: Vec<Vec<f32>> = (0..3).map(|i| vector(&reply["data"][i]["embedding"])).collect();
    for (i, found) in all.iter().enumerate() {
        assert_eq!((&reply["data"][i]["object"], &reply["data"][i]["index"]), (&json!("embedding"), &json!(i)));
        assert!(found.len() == engine().config().dim && (dot(found, found) - 1.0).abs() < 1e-5);
        assert!(close(found, &expected(ids[i].clone(), Pooling::Mean)), "{i}");
    }
    assert!(dot(&all[0], &all[1]) > dot(&all[0], &all[2]), "texts of one meaning are closer");
    // By ids, alone or in a list, and a text by itself: the same bits.
    for input in [json!(ids[1]), json!([ids[1]]), json!(texts[1])] {
        let reply = site.ok("/v1/embeddings", json!({"input": input})).await;
        assert_eq!(vector(&reply["data"][0]["embedding"]), all[1]);
    }
    let last = site.ok("/v1/embeddings", json!({"input": texts[0], "pooling": "last"})).await;
    assert!(close(&vector(&last["data"][0]["embedding"]), &expected(ids[0].clone(), Pooling::Last)));
    // Fewer numbers, of length 1 again; and base64 of the same.
    let short = site.ok("/v1/embeddings", json!({"input": texts[0], "dimensions": 8})).await;
    let short = vector(&short["data"][0]["embedding"]);
    let length = dot(&all[0][..8], &all[0][..8]).sqrt();
    assert!(close(&short, &all[0][..8].iter().map(|x| x / length).collect::<Vec<_>>()));
    let coded = site
        .ok("/v1/embeddings", json!({"input": texts[0], "dimensions": 8, "encoding_format": "base64", "user": "x"}))
        .await;
    use base64::{Engine, engine::general_purpose::STANDARD};
    let bytes = STANDARD.decode(coded["data"][0]["embedding"].as_str().unwrap()).unwrap();
    let floats: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!(floats, short);
}

/// A vector does not depend on other work, on what the cache holds, or on how a long text is cut.
#[tokio::test]
async fn bits_depend_on_the_text_alone() {
    let site = Site::new().await;
    let long = "강은 바다로 흐르고 바다는 비가 된다. ".repeat(12);
    let alone = site.ok("/v1/embeddings", json!({"input": long})).await["data"][0]["embedding"].take();
    let answer = json!({"prompt": long, "max_tokens": 60, "ignore_eos": true, "n": 3});
    let many: Vec<&str> = std::iter::repeat_n(long.as_str(), 100).collect(); // more than run and wait at once
    let body = json!({"input": many});
    let (_, reply) = tokio::join!(site.complete(answer), site.ok("/v1/embeddings", body));
    let data = reply["data"].as_array().unwrap();
    assert!(data.len() == 100 && data.iter().all(|one| one["embedding"] == alone));
    let last = async || site.ok("/v1/embeddings", json!({"input": long, "pooling": "last"})).await["data"].take();
    assert_eq!(last().await, last().await);
}

/// The context is full with an input of just its length.
#[tokio::test]
async fn an_input_as_long_as_the_context() {
    let site = Site::new().await;
    let ids: Vec<u32> = (0..1024).map(|i| 70 + i * 7 % 50).collect();
    for (name, pooling) in [("mean", Pooling::Mean), ("last", Pooling::Last)] {
        let reply = site.ok("/v1/embeddings", json!({"input": ids, "pooling": name})).await;
        assert!(close(&vector(&reply["data"][0]["embedding"]), &expected(ids.clone(), pooling)));
    }
    // The mean of all has the last one in it.
    let [all, last] = [Pooling::Mean, Pooling::Last].map(|pooling| pooled(ids.clone(), pooling));
    let before = pooled(ids[..1023].to_vec(), Pooling::Mean);
    for ((all, before), last) in all.iter().zip(before).zip(last) {
        assert!((all * 1024.0 - before * 1023.0 - last).abs() < 0.02, "{all} {before} {last}");
    }
    let longer = [&ids[..], &[70]].concat();
    let error = site.error("/v1/embeddings", json!({"input": longer}), 400).await;
    assert!(error["message"].as_str().unwrap().contains("needs 1025: 1025 of the prompt and 0"), "{error}");
}

#[tokio::test]
async fn what_is_refused() {
    let site = Site::new().await;
    let dim = engine().config().dim;
    for (param, body) in [
        ("input", json!({})),
        ("input", json!({"input": []})),
        ("input", json!({"input": ""})),
        ("input", json!({"input": "", "add_special_tokens": false})),
        ("input", json!({"input": [1, "a"]})),
        ("input", json!({"input": [999_999]})),
        ("input", json!({"input": "가".repeat(5000)})),
        ("input", json!({"input": vec!["a"; 2049]})),
        ("dimensions", json!({"input": "a", "dimensions": 0})),
        ("dimensions", json!({"input": "a", "dimensions": dim + 1})),
        ("encoding_format", json!({"input": "a", "encoding_format": "hex"})),
        ("pooling", json!({"input": "a", "pooling": "max"})),
        ("stream", json!({"input": "a", "stream": true})),
    ] {
        if body["input"] == "" && body.get("add_special_tokens").is_none() {
            site.ok("/v1/embeddings", body).await; // BOS alone is a text
            continue;
        }
        assert_eq!(site.error("/v1/embeddings", body.clone(), 400).await["param"], param, "{body}");
    }
    site.error("/v1/embeddings", json!({"input": "a", "model": "other"}), 404).await;
}
