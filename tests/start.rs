//! The start, on the emulated device and on the CPU: that the device gets exactly what is in the files, and the report about the start.
#![cfg(feature = "cuda")]

use aoji::{
    Config, Device, Dtype, Engine, Error, Options, Tensor, Weights,
    backend::{Backend, Shaped},
    cuda::{Cuda, kernels::MODULES},
    model,
    weights::reader,
};
use half::{bf16, f16};
use std::{fs, path::Path, sync::Mutex};

const CONFIG: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": 192, "intermediate_size": 200, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 7001, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": false
}"#;

/// One test at a time: memory is counted for the whole process.
static ALONE: Mutex<()> = Mutex::new(());

fn on_gpu() -> bool {
    std::env::var_os("AOJI_TEST_GPU").is_some_and(|v| v == "1")
}

/// The GPU when `AOJI_TEST_GPU=1`, else the emulated one.
fn device() -> Option<Cuda> {
    if MODULES.is_empty() {
        println!("skipped: built without kernels");
        return None;
    }
    if !on_gpu() {
        cuda_emulator::install();
    }
    Some(Cuda::open(0).unwrap())
}

/// The emulated device has found no fault, and all memory of the ring is freed.
fn clean() {
    if !on_gpu() {
        assert_eq!(cuda_emulator::last_fault(), None);
        let (now, _) = cuda_emulator::page_locked();
        assert!(now < reader::CHUNK, "{now} bytes are still page-locked");
    }
}

fn checkpoint(dir: &Path, dtype: Dtype, shard_bytes: u64) -> (Config, Weights) {
    aoji::synth::write(CONFIG, 3, dtype, shard_bytes, dir, |_, _| {}).unwrap();
    let config = Config::from_dir(dir).unwrap();
    let weights = Weights::open(dir, &config).unwrap();
    (config, weights)
}

fn values(t: &Tensor) -> Vec<bf16> {
    let pairs = || t.bytes().as_chunks().0.iter();
    match t.dtype() {
        Dtype::Bf16 => pairs().map(|b| bf16::from_le_bytes(*b)).collect(),
        Dtype::F16 => pairs().map(|b| bf16::from_f32(f16::from_le_bytes(*b).to_f32())).collect(),
        Dtype::F32 => t.bytes().as_chunks().0.iter().map(|b| bf16::from_f32(f32::from_le_bytes(*b))).collect(),
    }
}

#[test]
fn weights_on_the_device_are_those_of_the_files() {
    let _alone = ALONE.lock();
    let Some(cuda) = device() else { return };
    for (dtype, shard_bytes) in [(Dtype::Bf16, 1 << 30), (Dtype::F16, 2_000_000), (Dtype::F32, 6_000_000)] {
        let dir = tempfile::tempdir().unwrap();
        let (config, weights) = checkpoint(dir.path(), dtype, shard_bytes);
        let stacks = model::stacks(&config, &weights, Tensor::clone);
        let mut done = 0;
        let loaded = cuda.weights(&stacks, &mut |bytes| done += bytes).unwrap();
        assert_eq!((loaded.len(), done), (stacks.len(), weights.bytes()));
        for (w, parts) in loaded.iter().zip(&stacks) {
            let rows: usize = parts.iter().map(Tensor::rows).sum();
            assert_eq!(w.shape(), (rows, parts[0].cols()));
            let expected: Vec<bf16> = parts.iter().flat_map(values).collect();
            assert!(cuda.download(&w.data).unwrap() == expected, "{parts:?}");
        }
    }
    clean();
}

#[test]
fn tensors_of_different_width_are_no_matrix() {
    let _alone = ALONE.lock();
    let Some(cuda) = device() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (_, weights) = checkpoint(dir.path(), Dtype::Bf16, 1 << 30);
    let stack = vec![weights.layers[0].w_down.clone(), weights.embed.clone()];
    let error = cuda.weights(&[stack], &mut |_| {}).err().unwrap().to_string();
    assert!(error.contains("model.embed_tokens.weight") && error.contains("200 columns"), "{error}");
}

#[test]
fn page_locked_memory_stays_within_the_ring() {
    let _alone = ALONE.lock();
    if on_gpu() {
        return println!("skipped: the emulated device counts it");
    }
    let Some(cuda) = device() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (config, weights) = checkpoint(dir.path(), Dtype::F32, 1 << 30);
    let ring = reader::readers() * reader::BUFFERS * reader::CHUNK;
    assert!(weights.bytes() as usize > 2 * reader::CHUNK);
    cuda.weights(&model::stacks(&config, &weights, Tensor::clone), &mut |_| {}).unwrap();
    let (_, most) = cuda_emulator::page_locked();
    assert!((reader::CHUNK..=ring).contains(&most), "{most} bytes, the ring has {ring}");
    clean();
}

#[test]
fn a_file_that_was_cut_short_meanwhile_is_an_error() {
    let _alone = ALONE.lock();
    let Some(cuda) = device() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (config, weights) = checkpoint(dir.path(), Dtype::Bf16, 1 << 30);
    let stacks = model::stacks(&config, &weights, Tensor::clone);
    let file = dir.path().join("model.safetensors");
    let left = fs::metadata(&file).unwrap().len() / 2;
    fs::File::options().write(true).open(&file).unwrap().set_len(left).unwrap();
    let free = cuda.free_memory().unwrap();
    match cuda.weights(&stacks, &mut |_| {}) {
        Err(Error::File { path, what }) => assert!(path == file && what.contains(&format!("byte {left}")), "{what}"),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("half a file was enough"),
    }
    cuda.synchronize().unwrap();
    if !on_gpu() {
        // a GPU's pool keeps it
        assert_eq!(cuda.free_memory().unwrap(), free, "memory of the weights is given back");
    }
    clean();
}

#[test]
fn the_report_has_the_phases_and_their_bytes() {
    let _alone = ALONE.lock();
    if !on_gpu() {
        cuda_emulator::install();
    }
    let dir = tempfile::tempdir().unwrap();
    let (config, weights) = checkpoint(dir.path(), Dtype::F32, 6_000_000);
    let all = ["config", "context", "copies", "driver", "files", "kernels", "memory", "tokenizer", "weights"];
    for (device, expected) in [(Device::Cpu, &["config", "files", "tokenizer", "weights"][..]), (Device::Cuda(0), &all)]
    {
        if device != Device::Cpu && MODULES.is_empty() {
            continue;
        }
        let options = Options { device, ..Options::default() };
        let (mut last, mut calls) = ((0, 0), 0);
        let engine = Engine::open_with(dir.path().to_str().unwrap(), &options, &mut |done, total| {
            assert!(done > last.0 && done <= total);
            (last, calls) = ((done, total), calls + 1);
        });
        let engine = engine.unwrap();
        assert!(calls > 1 && last == (weights.bytes(), weights.bytes()), "{calls} calls, {last:?}");
        let report = engine.startup().report();
        let mut names: Vec<&str> = report.phases.iter().map(|p| &*p.name).collect();
        names.sort_unstable();
        assert_eq!(names, expected);
        let phase = |name: &str| report.phases.iter().find(|p| p.name == name).unwrap();
        assert_eq!(phase("weights").bytes, weights.bytes());
        assert_eq!(report.phases[0].name, "config", "the first of all");
        assert!(report.phases.windows(2).all(|p| p[0].begin <= p[1].begin));
        assert!(
            report.phases.iter().all(|p| p.begin >= 0.0 && p.seconds >= 0.0 && p.begin + p.seconds <= report.seconds)
        );
        if device != Device::Cpu {
            assert_eq!(phase("memory").bytes, config.params() * 2, "bf16");
            assert_eq!(phase("copies").bytes, weights.bytes());
            assert!(phase("memory").seconds + phase("copies").seconds <= phase("weights").seconds);
            let images: usize = MODULES.iter().map(|m| m.image.len()).sum();
            assert_eq!(phase("kernels").bytes, images as u64);
            assert!(phase("weights").begin >= phase("context").begin + phase("context").seconds);
        }
        assert!(engine.tokenizer().is_err(), "there is none");
    }
}

#[test]
fn the_tokenizer_is_there_and_its_errors_are_heard() {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().unwrap();
    checkpoint(dir.path(), Dtype::Bf16, 1 << 30);
    let open = |name: &str| Engine::open(name, &Options { device: Device::Cpu, ..Options::default() });
    assert!(open("demo").unwrap().tokenizer().is_ok());
    fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    let error = open(dir.path().to_str().unwrap()).err().unwrap().to_string();
    assert!(error.contains("tokenizer.json"), "{error}");
}
