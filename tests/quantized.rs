//! Models in quantized files, widened, compute what a Hugging Face directory of their dequantized weights computes, bit for bit: on the CPU,
//! and on the device, emulated or with `AOJI_TEST_GPU=1` a GPU.

#[path = "common/gguf.rs"]
mod gguf_file;
#[path = "common/tiny_gguf.rs"]
mod tiny_gguf;

use aoji::{Activations, Device, Engine, Error, ModelFiles, Options, format::BLOCKS, lora::LoraSpec};
use std::{fs, path::Path};

/// Plain types and all others.
fn types() -> Vec<u32> {
    [1, 30, 0].into_iter().chain(BLOCKS.iter().map(|block| block.id)).collect()
}

fn logits(path: &Path, device: Device, activations: Activations) -> Vec<u32> {
    let options = Options { device, activations, context: Some(64), widen: true, ..Options::default() };
    let engine = Engine::open(path.to_str().unwrap(), &options).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut session = engine.session(64).unwrap();
    let tokens: Vec<u32> = (0..21).map(|i| (i * 37 + i * i) % tiny_gguf::VOCAB as u32).collect();
    session.sync(&tokens).unwrap();
    let logits = session.logits().unwrap().to_vec();
    let spread = logits.iter().fold(0f32, |max, x| max.max(x.abs()));
    assert!((0.1..1e3).contains(&spread), "a model that computes nothing: {spread}");
    logits.iter().map(|x| x.to_bits()).collect()
}

fn devices() -> Vec<(Device, Activations)> {
    let mut devices = vec![(Device::Cpu, Activations::F32), (Device::Cpu, Activations::Bf16)];
    #[cfg(feature = "cuda")]
    {
        if std::env::var_os("AOJI_TEST_GPU").is_none_or(|v| v != "1") {
            cuda_emulator::install();
        }
        devices.push((Device::Cuda(0), Activations::Bf16));
    }
    devices
}

#[test]
fn a_gguf_file_is_its_dequantized_weights() {
    for (first, tied) in [(0, false), (5, true)] {
        let dir = tempfile::tempdir().unwrap();
        let mut types = types();
        types.rotate_left(first); // every type in other places, q and k among them
        let file = tiny_gguf::model(dir.path(), &types, tied);
        let path = dir.path().join("model.gguf");
        fs::write(&path, file.bytes()).unwrap();
        for (device, activations) in devices() {
            let (ours, theirs) =
                (logits(&path, device, activations), logits(&dir.path().join("hf"), device, activations));
            assert_eq!(ours, theirs, "{device:?}, {activations:?}, tied {tied}");
        }
    }
}

#[test]
fn a_directory_with_pieces_is_the_whole_model() {
    let dir = tempfile::tempdir().unwrap();
    let whole = tiny_gguf::model(dir.path(), &[2, 14], true);
    let mut pieces = [whole.clone(), gguf_file::File::default()];
    pieces[1].tensors = pieces[0].tensors.split_off(7);
    let place = dir.path().join("pieces");
    fs::create_dir(&place).unwrap();
    for (i, piece) in pieces.iter_mut().enumerate() {
        piece.set("split.no", gguf_file::Val::U32(i as u32)).set("split.count", gguf_file::Val::U32(2));
        fs::write(place.join(format!("m-{:05}-of-00002.gguf", i + 1)), piece.bytes()).unwrap();
    }
    let of = |path: &Path| logits(path, Device::Cpu, Activations::F32);
    assert_eq!(of(&place), of(&dir.path().join("hf")));
    assert_eq!(of(&place.join("m-00002-of-00002.gguf")), of(&place));
    let files = ModelFiles::open(place.to_str().unwrap()).unwrap();
    assert_eq!(files.weights.bytes(), whole.tensors.iter().map(|t| t.3.len() as u64).sum::<u64>());
    // a piece of another model, under a name of this one
    fs::write(place.join("m-00002-of-00002.gguf"), whole.bytes()).unwrap();
    let error = ModelFiles::open(place.to_str().unwrap()).err().unwrap().to_string();
    assert!(error.contains("m-00002-of-00002.gguf") && error.contains("piece 1 of 1 by its keys"), "{error}");
}

#[test]
fn an_adapter_is_for_weights_that_are_not_quantized() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    fs::write(&path, tiny_gguf::model(dir.path(), &[8], true).bytes()).unwrap();
    let mut files = ModelFiles::open(path.to_str().unwrap()).unwrap();
    let error = files.add_lora(&LoraSpec { dir: dir.path().into(), scale: 1.0 }).unwrap_err();
    assert!(matches!(&error, Error::Unsupported { what, .. } if what.contains("Q8_0")), "{error}");
}
