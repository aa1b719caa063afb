//! Random checkpoints: the layout of published ones, the same bytes every time, and sane statistics.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use aoji::output::Output;
use aoji::synth::{self, Layout};
use aoji::{Config, Dtype, Error, RopeScaling, SamplingDefaults, Tensor, Weights};
use half::{bf16, f16};
use serde_json::{Value, json};

fn config_json(tied: bool) -> String {
    json!({
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000, "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16"
    })
    .to_string()
}

fn make(json: &str, seed: u64, dtype: Dtype, shard_bytes: u64) -> (tempfile::TempDir, Weights) {
    let dir = tempfile::tempdir().unwrap();
    synth::write(json, seed, dtype, shard_bytes, dir.path(), |_, _| {}).unwrap();
    let config = Config::from_dir(dir.path()).unwrap();
    assert_eq!(config.dtype, dtype);
    let weights = Weights::open(dir.path(), &config).unwrap();
    (dir, weights)
}

fn values(tensor: &Tensor) -> Vec<f64> {
    let bytes = tensor.bytes();
    let pairs = || bytes.as_chunks().0.iter();
    match tensor.dtype() {
        Dtype::Bf16 => pairs().map(|&b| bf16::from_le_bytes(b).to_f64()).collect(),
        Dtype::F16 => pairs().map(|&b| f16::from_le_bytes(b).to_f64()).collect(),
        Dtype::F32 => bytes.as_chunks().0.iter().map(|&b| f64::from(f32::from_le_bytes(b))).collect(),
    }
}

fn mean_and_std(x: &[f64]) -> (f64, f64) {
    let mean = x.iter().sum::<f64>() / x.len() as f64;
    (mean, (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64).sqrt())
}

#[test]
fn layout_of_the_published_8b() {
    let Some(dir) = crate::common::data("llama3-8b-published") else { return };
    let config = Config::from_dir(&dir).unwrap();
    let layout = Layout::new(&config, Dtype::Bf16, synth::SHARD_BYTES);
    let published = fs::read_to_string(dir.join("model.safetensors.index.json")).unwrap();
    assert!(layout.index_json() == published, "the index differs from the published one");
    let sizes: Vec<u64> = layout.shards.iter().map(|s| s.bytes()).collect();
    assert_eq!(sizes, [4_976_698_672, 4_999_802_720, 4_915_916_176, 1_168_138_808]); // the published files
}

#[test]
fn presets_are_the_published_models() {
    let parse = |json: &str| Config::from_json(Path::new("config.json"), json, None).unwrap();
    let one = parse(&synth::preset("llama3.2-1b").unwrap());
    assert_eq!((one.params(), one.head_dim), (1_235_814_400, 64)); // the count on its card
    assert!(matches!(one.rope_scaling, Some(RopeScaling::Llama3 { factor: 32.0, .. })));
    assert_eq!(synth::preset("llama4"), None);
    // the counts on their cards
    for (name, params) in [("mistral-7b", 7_241_732_096), ("qwen2.5-7b", 7_615_616_512), ("qwen3-8b", 8_190_735_360u64)]
    {
        assert_eq!(parse(&synth::preset(name).unwrap()).params(), params, "{name}");
    }
    assert!(synth::PRESETS.iter().all(|name| synth::preset(name).is_some()));
    let eight = parse(&synth::preset("llama3-8b").unwrap());
    assert_eq!(eight.params(), 8_030_261_248);
    let Some(dir) = crate::common::data("llama3-8b-published") else { return };
    let published = Config::from_dir(&dir).unwrap();
    assert_eq!(eight, Config { sampling: SamplingDefaults::default(), ..published });
}

#[test]
fn same_seed_same_bytes() {
    let json = config_json(false);
    let (first, _) = make(&json, 7, Dtype::Bf16, 300_000);
    let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let (second, _) = one_thread.install(|| make(&json, 7, Dtype::Bf16, 300_000));
    let (other, _) = make(&json, 8, Dtype::Bf16, 300_000);
    let mut names: Vec<_> = fs::read_dir(first.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert!(names.len() > 5, "{names:?}");
    for name in names {
        let bytes = fs::read(first.path().join(&name)).unwrap();
        assert!(bytes == fs::read(second.path().join(&name)).unwrap(), "{name:?}");
        let is_tensors = name.to_str().unwrap().ends_with(".safetensors");
        assert_eq!(bytes != fs::read(other.path().join(&name)).unwrap(), is_tensors, "{name:?}");
    }
}

#[test]
fn sharding_and_dtype_do_not_change_the_values() {
    let json = config_json(true);
    let (_whole, whole) = make(&json, 7, Dtype::F32, u64::MAX);
    let (_split, split) = make(&json, 7, Dtype::Bf16, 0);
    assert_eq!(split.tensors().map(Tensor::shard).max().unwrap() + 1, whole.tensors().count());
    for (a, b) in whole.tensors().zip(split.tensors()) {
        assert_eq!(a.name(), b.name());
        let close = |(a, b): (&f64, &f64)| (a - b).abs() <= a.abs() / 256.0;
        assert!(values(a).iter().zip(&values(b)).all(close), "{}", a.name());
    }
}

#[test]
fn statistics() {
    for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
        let (_dir, weights) = make(&config_json(false), 1, dtype, synth::SHARD_BYTES);
        let layer = &weights.layers[2];
        let depth = 6f64.sqrt();
        let expected = [
            (&weights.embed, 0.0, 0.5 / 16.0),
            (&layer.wq, 0.0, 1.0 / 16.0),
            (&layer.wk, 0.0, 1.0 / 16.0),
            (&layer.wv, 0.0, 1.0 / 16.0),
            (&layer.wo, 0.0, 1.0 / 16.0 / depth),
            (&layer.w_gate, 0.0, 1.0 / 16.0),
            (&layer.w_up, 0.0, 1.0 / 16.0),
            (&layer.w_down, 0.0, 1.0 / 512f64.sqrt() / depth),
            (&layer.attn_norm, 1.0, 0.05),
            (&weights.final_norm, 3.0, 0.15),
            (&weights.lm_head, 0.0, 1.0 / 16.0),
        ];
        for (tensor, mean, std) in expected {
            let values = values(tensor);
            let error = 5.0 / (values.len() as f64).sqrt(); // five standard errors
            let (m, s) = mean_and_std(&values);
            assert!((m - mean).abs() < std * error, "{} mean {m}, expected {mean}", tensor.name());
            assert!((s / std - 1.0).abs() < error, "{} std {s}, expected {std}", tensor.name());
        }
        // Normal: the shares within one and two standard deviations, and no correlation of neighbours.
        let wq = values(&layer.wq);
        let share = |k: f64| wq.iter().filter(|x| x.abs() < k / 16.0).count() as f64 / wq.len() as f64;
        assert!((share(1.0) - 0.683).abs() < 0.02 && (share(2.0) - 0.954).abs() < 0.02);
        for lag in [1, 2, 256] {
            let r = wq.iter().zip(&wq[lag..]).map(|(a, b)| a * b * 256.0).sum::<f64>() / wq.len() as f64;
            assert!(r.abs() < 5.0 / 256.0, "correlation {r} at {lag}");
        }
        assert_ne!(weights.layers[0].wq.bytes(), weights.layers[1].wq.bytes());
    }
}

#[test]
fn config_is_kept_and_the_dtype_put_right() {
    let json = config_json(true);
    let (dir, _) = make(&json, 0, Dtype::Bf16, synth::SHARD_BYTES);
    assert_eq!(fs::read_to_string(dir.path().join("config.json")).unwrap(), json);
    assert!(!dir.path().join("model.safetensors.index.json").exists());
    let (dir, _) = make(&json, 0, Dtype::F16, synth::SHARD_BYTES);
    let changed: Value = serde_json::from_slice(&fs::read(dir.path().join("config.json")).unwrap()).unwrap();
    let mut expected: Value = serde_json::from_str(&json).unwrap();
    expected["torch_dtype"] = json!("float16");
    assert_eq!(changed, expected);
}

#[test]
fn progress_ends_at_the_total() {
    let dir = tempfile::tempdir().unwrap();
    let last = AtomicU64::new(0);
    let report = |done, total| {
        assert!(done <= total && done >= last.swap(done, Ordering::Relaxed));
        assert_eq!(total, 2 * 2_283_264);
    };
    synth::write(&config_json(false), 0, Dtype::Bf16, 300_000, &dir.path().join("new/dir"), report).unwrap();
    assert_eq!(last.into_inner(), 2 * 2_283_264);
}

#[test]
fn refuses_a_directory_in_use_and_a_bad_config() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("notes.txt"), "mine").unwrap();
    let run = |json: &str, out: &Path| synth::write(json, 0, Dtype::Bf16, 1, out, |_, _| {});
    assert!(matches!(run(&config_json(true), dir.path()), Err(Error::Input(text)) if text.contains("not empty")));
    let out = dir.path().join("out");
    assert!(matches!(run("{}", &out), Err(Error::Unsupported { .. })));
    assert!(!out.exists());
    let under_a_file = dir.path().join("notes.txt/out");
    assert!(matches!(run(&config_json(true), &under_a_file), Err(Error::Io { path, .. }) if path == under_a_file));
}

#[test]
fn copies_the_tokenizer() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for file in ["tokenizer.json", "generation_config.json", "model.safetensors"] {
        fs::write(from.path().join(file), file).unwrap();
    }
    let mut output = Output::begin(to.path()).unwrap();
    let copied = synth::copy_small(from.path(), &mut output).unwrap();
    assert_eq!(copied, ["generation_config.json", "tokenizer.json"]);
    output.finish().unwrap();
    assert_eq!(fs::read_dir(to.path()).unwrap().count(), 2);
}
