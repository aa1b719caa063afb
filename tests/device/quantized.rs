//! Models in quantized files, widened, compute what a Hugging Face directory of their dequantized weights computes, bit for bit: on the CPU,
//! and on the device, emulated or with `AOJI_TEST_GPU=1` a GPU. As they are, they compute nearly that on the CPU, and for every prompt,
//! however it is cut, the same bits.

use crate::{gguf_file, tiny_gguf};
use aoji::{
    Activations, Device, Engine, Error, ModelFiles, Options,
    format::BLOCKS,
    lora::LoraSpec,
    output::Output,
    quantize::{self, TARGETS},
};
use std::{fs, num::NonZeroUsize, path::Path};

/// The plain types, and all block formats.
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

/// Weights that stay as they are, in f32 against their values, and in bf16 against themselves: on more threads, and token by token.
#[test]
fn a_cpu_computes_with_the_codes() {
    for (first, tied) in [(0, false), (5, true)] {
        let dir = tempfile::tempdir().unwrap();
        let mut types: Vec<u32> = BLOCKS.iter().map(|block| block.id).collect();
        types.rotate_left(first);
        let file = tiny_gguf::model(dir.path(), &types, tied);
        let path = dir.path().join("model.gguf");
        fs::write(&path, file.bytes()).unwrap();
        let tokens: Vec<u32> = (0..29).map(|i| (i * 37 + i * i) % tiny_gguf::VOCAB as u32).collect();
        let run = |path: &Path, activations, threads, parts: &[usize]| {
            let threads = NonZeroUsize::new(threads);
            let options =
                Options { device: Device::Cpu, activations, context: Some(64), threads, ..Options::default() };
            let engine = Engine::open(path.to_str().unwrap(), &options).unwrap();
            let mut session = engine.session(64).unwrap();
            for n in parts.iter().chain([&tokens.len()]) {
                session.sync(&tokens[..*n]).unwrap();
            }
            (session.logits().unwrap().to_vec(), engine.plan().weights)
        };
        let (ours, small) = run(&path, Activations::F32, 2, &[]);
        let (theirs, large) = run(&dir.path().join("hf"), Activations::F32, 2, &[]);
        let worst = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(worst > 0.0 && worst < 1e-4, "logits differ by {worst}, tied {tied}");
        assert!(small < large / 2, "{small} bytes of {large}, tied {tied}");
        let whole = run(&path, Activations::Bf16, 1, &[]).0;
        for parts in [&[1, 2, 3, 4, 8, 9][..], &[20, 21, 28], &[27]] {
            assert_eq!(run(&path, Activations::Bf16, 3, parts).0, whole, "{parts:?}, tied {tied}");
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

/// Weights that are quantized while they are loaded are those that `quantize` writes, and need what was planned.
#[test]
fn loading_quantizes_as_writing_does() {
    let demo = format!("{}/assets/demo", env!("CARGO_MANIFEST_DIR"));
    let place = tempfile::tempdir().unwrap();
    let run = |model: &str, quantize: Option<quantize::Options>| {
        let options = Options { device: Device::Cpu, context: Some(64), quantize, ..Options::default() };
        let engine = Engine::open(model, &options).unwrap();
        let mut session = engine.session(64).unwrap();
        session.sync(&(0..21).map(|i| i * 37 % 300).collect::<Vec<_>>()).unwrap();
        (session.logits().unwrap().to_vec(), engine.plan().weights)
    };
    let mut sizes = vec![run(&demo, None).1];
    for target in TARGETS {
        let options: quantize::Options = if target == "int4" { "int4:64" } else { target }.parse().unwrap();
        let (name, file) = (place.path().join(target), place.path().join(format!("{target}.gguf")));
        let is_file = options.target.is_file();
        let output = if is_file { Output::file(&file, false) } else { Output::begin(&name) }.unwrap();
        let files = ModelFiles::open(&demo).unwrap();
        quantize::quantize(&files, &options, output, &mut |_, _| {}).unwrap();
        let written = run(if is_file { &file } else { &name }.to_str().unwrap(), None);
        let loaded = run(&demo, Some(options));
        assert!(loaded == written, "{target}: {} and {} bytes", loaded.1, written.1);
        sizes.push(loaded.1);
    }
    assert!(sizes[1..].iter().all(|size| *size < sizes[0] * 3 / 4), "{sizes:?}");

    let dir = place.path().join("tiny");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("model.gguf"), tiny_gguf::model(&dir, &[8], true).bytes()).unwrap();
    let options = Options { device: Device::Cpu, quantize: Some("q4_k".parse().unwrap()), ..Options::default() };
    let error = Engine::open(dir.join("model.gguf").to_str().unwrap(), &options).err().unwrap();
    assert!(matches!(&error, Error::Unsupported { what, .. } if what.contains("Q8_0 already")), "{error}");
    let options = Options { widen: true, ..options };
    assert!(matches!(Engine::open("demo", &options), Err(Error::Input(_))));
}
