//! What the CPU's buffers and weights take of the system's memory.

use crate::{
    Device, Engine, Options,
    backend::{Backend, cpu::Cpu},
    files::{
        config::{Config, Dtype},
        quantize, synth,
        weights::Weights,
    },
    model::{Changes, Kept},
};
use half::bf16;
use std::path::Path;

const CONFIG: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 128,
    "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
    "vocab_size": 320, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": false
}"#;

#[test]
fn a_buffer_that_the_system_does_not_give_is_an_error() {
    let cpu = Cpu::<bf16>::new().unwrap();
    let e = cpu.alloc::<bf16>(1 << 48).unwrap_err().to_string(); // more than there are addresses
    assert!(e.starts_with("536870912 MiB for a buffer") && e.contains("--context"), "{e}");
    let e = cpu.alloc::<f32>(usize::MAX).unwrap_err().to_string();
    assert!(e.starts_with("17592186044416 MiB"), "{e}");
    assert_eq!(cpu.alloc::<bf16>(5).unwrap(), [bf16::ZERO; 5]);
    assert!(cpu.alloc::<u32>(0).unwrap().is_empty());
}

#[test]
fn weights_that_are_not_converted_stay_in_their_file() {
    let config = Config::from_json(Path::new("config.json"), CONFIG, None).unwrap();
    let weights = |dtype| {
        let dir = tempfile::tempdir().unwrap();
        synth::write(CONFIG, 7, dtype, 1 << 30, dir.path(), |_, _| {}).unwrap();
        Weights::open(dir.path(), &config).unwrap()
    };
    let [in_bf16, in_f16, in_f32] = [Dtype::Bf16, Dtype::F16, Dtype::F32].map(weights);
    let of_bf16 = |w: &Weights, changes| Kept::of::<Cpu<bf16>>(&config, w, changes).in_file;
    let of_f32 = |w: &Weights| Kept::of::<Cpu<f32>>(&config, w, Changes::default()).in_file;
    let (all, same) = (config.weight_bytes(), Changes::default());
    assert_eq!([of_bf16(&in_bf16, same), of_bf16(&in_f16, same), of_bf16(&in_f32, same)], [all, 0, 0]);
    assert_eq!([of_f32(&in_bf16), of_f32(&in_f16), of_f32(&in_f32)], [all, 0, all]);
    // what is quantized is in memory, and embedding, head and norms are in the file
    let options: quantize::Options = "int8".parse().unwrap();
    let planned = options.planned(&in_bf16).unwrap();
    let plain: u64 = planned.tensors().filter(|t| t.is_plain()).map(|t| (2 * t.rows() * t.cols()) as u64).sum();
    assert_eq!(of_bf16(&planned, Changes { quantize: Some(&options), ..same }), plain);
    assert!(plain > 0 && plain < all);
    // when it is read again, its codes, of a byte each, are in the file and its scales in memory
    let codes: u64 = planned.tensors().filter(|t| !t.is_plain()).map(|t| (t.rows() * t.cols()) as u64).sum();
    assert_eq!(of_bf16(&planned, same), plain + codes);
    assert_eq!(of_bf16(&planned, Changes { widen: true, ..same }), plain);
}

#[cfg(target_os = "linux")]
#[test]
fn an_engine_knows_how_much_memory_is_free() {
    let engine = Engine::open("demo", &Options { device: Device::Cpu, ..Options::default() }).unwrap();
    let plan = engine.plan();
    assert!(plan.free > Some(0) && plan.fits(), "{plan}");
    assert_eq!(plan.context, 1024, "there is plenty");
}
