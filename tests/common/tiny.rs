//! A tiny random model, on the CPU and on the device: emulated, or with `AOJI_TEST_GPU=1` the GPU.

use aoji::{Device, Engine, Options};
use std::path::Path;

pub const CONFIG: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 320, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": false
}"#;

/// A model that has everything: biases, normed heads of an odd width, and a window in one layer of two.
#[allow(dead_code)] // each test file uses a part of this one
pub const EVERYTHING: &str = r#"{
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "attention_bias": true,
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 80, "vocab_size": 320, "max_position_embeddings": 256,
    "use_sliding_window": true, "sliding_window": 10, "layer_types": ["sliding_attention", "full_attention"],
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": false
}"#;

#[allow(dead_code)]
pub fn write_model(dir: &Path) {
    write_of(CONFIG, dir);
}

pub fn write_of(config: &str, dir: &Path) {
    aoji::synth::write(config, 7, aoji::Dtype::Bf16, 1 << 30, dir, |_, _| {}).unwrap();
}

pub fn engines() -> Vec<Engine> {
    engines_of(CONFIG)
}

pub fn engines_of(config: &str) -> Vec<Engine> {
    engines_with(config, &Options::default())
}

pub fn engines_with(config: &str, options: &Options) -> Vec<Engine> {
    let dir = tempfile::tempdir().unwrap();
    write_of(config, dir.path());
    let mut devices = vec![Device::Cpu];
    #[cfg(feature = "cuda")]
    {
        if std::env::var_os("AOJI_TEST_GPU").is_none_or(|v| v != "1") {
            cuda_emulator::install();
        }
        devices.push(Device::Cuda(0));
    }
    let open = |device| {
        let options = Options { device, ..options.clone() };
        Engine::open(dir.path().to_str().unwrap(), &options).unwrap_or_else(|e| panic!("{device:?}: {e}"))
    };
    devices.into_iter().map(open).collect()
}

/// Token ids of a prompt that differs with `salt`.
pub fn prompt(len: usize, salt: u32) -> Vec<u32> {
    (0..len as u32).map(|i| (i * 37 + salt * 11 + i * i) % 320).collect()
}
