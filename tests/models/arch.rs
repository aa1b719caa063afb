//! Every architecture against Hugging Face transformers in float32: tiny random models, made by `scripts/arch-goldens.py`.

use super::gguf_file::{File, Val};
use aoji::{Activations, Config, Device, Engine, Options, Tensor, Weights};
use std::{
    fs,
    path::{Path, PathBuf},
};

const MODELS: [&str; 6] = ["llama-biases", "mistral", "mistral-full", "qwen2", "qwen3", "qwen3-all"];

fn dir(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/arch").join(model)
}

fn open(path: &Path, activations: Activations) -> Engine {
    let options = Options { device: Device::Cpu, activations, ..Options::default() };
    Engine::open(path.to_str().unwrap(), &options).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

struct Golden {
    ids: Vec<u32>,
    logits: Vec<Vec<f32>>,
}

fn golden(model: &str) -> Golden {
    let text = fs::read_to_string(dir(model).join("golden.json")).unwrap();
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    let [ids, logits] = ["ids", "logits"].map(|key| value[key].clone());
    Golden { ids: serde_json::from_value(ids).unwrap(), logits: serde_json::from_value(logits).unwrap() }
}

/// The logits after each token, the tokens given in pieces of `piece`.
fn logits(engine: &Engine, ids: &[u32], piece: usize) -> Vec<Vec<f32>> {
    let mut session = engine.session(ids.len()).unwrap();
    let mut all = vec![Vec::new(); ids.len()];
    for end in (piece..=ids.len()).step_by(piece) {
        session.logits_of(&ids[..end], end - piece, &mut |i, logits| all[i] = logits.to_vec()).unwrap();
    }
    all
}

#[track_caller]
fn close(model: &str, got: &[Vec<f32>], want: &[Vec<f32>], limit: f32) {
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(got.len(), want.len());
        for (t, (got, want)) in got.iter().zip(want).enumerate() {
            assert!((got - want).abs() <= limit, "{model}: logit {t} after token {i} is {got}, expected {want}");
        }
    }
}

/// Floor: sums in another order, and six decimals of the goldens: 6e-6 on these logits of up to 7.
#[test]
fn logits_are_those_of_transformers() {
    for model in MODELS {
        let (engine, golden) = (open(&dir(model), Activations::F32), golden(model));
        let whole = logits(&engine, &golden.ids, golden.ids.len());
        close(model, &whole, &golden.logits, 1e-4);
        for piece in [1, 8] {
            assert_eq!(logits(&engine, &golden.ids, piece), whole, "{model} in pieces of {piece}");
        }
        // rounded to bf16 on the way: far from exact, near enough that nothing is left out
        close(model, &logits(&open(&dir(model), Activations::Bf16), &golden.ids, 1), &golden.logits, 0.5);
    }
}

/// The rows of q and k as llama.cpp's converter orders them in files of the architecture "llama".
fn neighbours(values: &[f32], head: usize) -> Vec<f32> {
    let cols = values.len() / head;
    let row = |i: usize| &values[(i / 2 + i % 2 * (head / 2)) * cols..][..cols];
    (0..head).flat_map(|i| row(i).to_vec()).collect()
}

/// The model as a GGUF file, named as llama.cpp's converter names things.
fn as_gguf(model: &str, path: &Path) {
    let config = Config::from_dir(&dir(model)).unwrap();
    let weights = Weights::open(&dir(model), &config).unwrap();
    let arch = model.split('-').next().unwrap().replace("mistral", "llama");
    let mut file = File::default();
    file.set("general.architecture", Val::Str(&arch));
    let sizes = [
        ("block_count", config.n_layers),
        ("context_length", config.max_seq),
        ("embedding_length", config.dim),
        ("feed_forward_length", config.ffn_dim),
        ("attention.head_count", config.n_heads),
        ("attention.head_count_kv", config.n_kv_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
        ("attention.sliding_window", config.arch.windows[0].unwrap_or(0)),
    ];
    for (key, n) in sizes {
        file.set(&format!("{arch}.{key}"), Val::U32(n as u32));
    }
    file.set(&format!("{arch}.attention.layer_norm_rms_epsilon"), Val::F32(config.norm_eps));
    file.set(&format!("{arch}.rope.freq_base"), Val::F32(config.rope_theta as f32));
    let renamed = |name: &str| {
        let names = [
            ("model.layers.", "blk."),
            ("self_attn.q_norm", "attn_q_norm"),
            ("self_attn.k_norm", "attn_k_norm"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("model.embed_tokens", "token_embd"),
            ("model.norm", "output_norm"),
            ("lm_head", "output"),
        ];
        names.iter().fold(name.to_string(), |name, (hf, own)| name.replace(hf, own))
    };
    for t in weights.tensors() {
        let mut values = Tensor::to_f32(t);
        if arch == "llama" && (t.name().contains("q_proj") || t.name().contains("k_proj")) {
            let head = values.len() / if t.name().contains("q_proj") { config.n_heads } else { config.n_kv_heads };
            values = values.chunks(head).flat_map(|values| neighbours(values, config.head_dim)).collect();
        }
        let shape = if t.rows() == 1 { vec![t.cols()] } else { vec![t.rows(), t.cols()] };
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        file.tensors.push((renamed(t.name()), shape, 0, bytes));
    }
    fs::write(path, file.bytes()).unwrap();
}

/// All but Qwen with windows, which GGUF has no keys for.
#[test]
fn gguf_files_give_the_same_bits() {
    let temp = tempfile::tempdir().unwrap();
    for model in ["llama-biases", "mistral", "mistral-full", "qwen3"] {
        let path = temp.path().join(format!("{model}.gguf"));
        as_gguf(model, &path);
        let golden = golden(model);
        let [own, gguf] = [&dir(model), &path].map(|path| logits(&open(path, Activations::F32), &golden.ids, 24));
        assert_eq!(gguf, own, "{model}");
    }
    let path = temp.path().join("qwen2.gguf");
    as_gguf("qwen2", &path); // without its window: other numbers, and none of the first seven tokens, which see all
    let golden = golden("qwen2");
    let got = logits(&open(&path, Activations::F32), &golden.ids, 24);
    close("qwen2", &got[..7], &golden.logits[..7], 1e-4);
    assert_ne!(got[20], logits(&open(&dir("qwen2"), Activations::F32), &golden.ids, 24)[20]);
}

/// No bit of a model that has everything depends on what it must not.
#[test]
fn nothing_depends_on_how_it_is_computed() {
    for activations in [Activations::Bf16, Activations::F32] {
        let engine = open(&dir("qwen3-all"), activations);
        let report = aoji::invariance::invariance(&engine, 40).unwrap();
        report.verdict().unwrap_or_else(|e| panic!("{e}\n{report}"));
    }
}
