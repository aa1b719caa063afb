//! Writing quantized checkpoints: read again, they have the values from which they were made, as far as their bits allow.

use aoji::{
    Error, Message, ModelFiles, Result,
    format::Format,
    output::Output,
    quantize::{self, Inputs, Options, Report, TARGETS},
};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// The demo model in a directory of its own, with another `config.json` where `change` makes one.
fn demo(change: impl Fn(&mut Value)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo");
    for file in fs::read_dir(assets).unwrap().map(|file| file.unwrap().path()) {
        fs::copy(&file, dir.path().join(file.file_name().unwrap())).unwrap();
    }
    let path = dir.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    fs::write(path, config.to_string()).unwrap();
    dir
}

fn open(path: &Path) -> Result<ModelFiles> {
    ModelFiles::open(path.to_str().unwrap())
}

fn options(format: &str) -> Options {
    format.parse().unwrap()
}

/// Writes `out` in a new directory.
fn write(files: &ModelFiles, options: &Options, out: &Path) -> Result<(PathBuf, Report)> {
    let (path, output) = match options.target.is_file() {
        true => (out.join("m.gguf"), Output::file(&out.join("m.gguf"), false)?),
        false => (out.join("m"), Output::begin(&out.join("m"))?),
    };
    let (mut last, mut all) = (0, 1);
    let report = quantize::quantize(files, options, output, &mut |done, total| {
        assert!(done > last && done <= total, "{done} of {total}");
        (last, all) = (done, total);
    })?;
    assert_eq!(last, all, "progress ends at the end");
    Ok((path, report))
}

/// Largest error of a matrix as a share of the matrix, both measured as the square root of the sum of squares.
fn limit(format: Format) -> f64 {
    match format {
        Format::Plain(_) => 0.0,
        Format::Block(block) => match block.bits {
            8 => 0.01,
            6 => 0.03,
            5 => 0.06,
            _ => 0.12,
        },
        Format::Grouped(grouped) => match grouped.to_string().split(' ').next().unwrap() {
            "int8" => 0.02,
            "e4m3" => 0.03,
            _ => 0.16,
        },
    }
}

#[test]
fn what_is_written_is_the_model() {
    let dir = demo(|_| {});
    let original = open(dir.path()).unwrap();
    for format in TARGETS {
        let place = tempfile::tempdir().unwrap();
        let mut options = options(format);
        options.group = (format == "int4").then_some(64);
        let (path, report) = write(&original, &options, place.path()).unwrap_or_else(|e| panic!("{format}: {e}"));
        let files = open(&path).unwrap_or_else(|e| panic!("{format}: {e}"));
        let (ours, theirs) = (&files.config, &original.config);
        assert_eq!(
            (ours.bos, &ours.eos, ours.max_seq, ours.tied),
            (theirs.bos, &theirs.eos, theirs.max_seq, theirs.tied)
        );
        assert_eq!((ours.dim, ours.vocab, ours.rope_inv_freq()), (theirs.dim, theirs.vocab, theirs.rope_inv_freq()));
        let (a, b) = (files.tokenizer.as_ref().unwrap(), original.tokenizer.as_ref().unwrap());
        for text in ["하늘은 왜 파란가?", "2 + 2 = 4, isn't it?\r\n\n  12345", "<|end_of_text|>"] {
            assert_eq!(a.encode(text, true).unwrap(), b.encode(text, true).unwrap(), "{format}: {text:?}");
        }
        assert_eq!(a.token(2046), b.token(2046));
        let messages = [Message::new("user", "누구?")];
        assert_eq!(files.template.render(&messages, None).unwrap(), original.template.render(&messages, None).unwrap());

        let mut bytes = 0;
        for (a, b) in files.weights.tensors().zip(original.weights.tensors()) {
            assert_eq!((a.name(), a.rows(), a.cols()), (b.name(), b.rows(), b.cols()), "{format}");
            let (x, y) = (b.to_f32(), a.to_f32());
            let sum = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>();
            let error = (sum(&mut x.iter().zip(&y).map(|(x, y)| x - y)) / sum(&mut x.iter().copied())).sqrt();
            assert!(error <= limit(a.format()), "{format}: {a:?} is off by {error}");
            bytes += a.file_bytes();
        }
        assert!(report.bytes >= bytes && report.bytes < bytes + 5000, "{format}: {} {bytes}", report.bytes);
        let n: usize = report.matrices.values().sum();
        assert_eq!(n, 22, "{format}: 7 in each of 3 layers and the embedding: {report}");
    }
}

#[test]
fn formats_of_the_matrices() {
    let dir = demo(|_| {});
    let original = open(dir.path()).unwrap();
    let of = |options: &Options| {
        let place = tempfile::tempdir().unwrap();
        let (path, report) = write(&original, options, place.path()).unwrap();
        let files = open(&path).unwrap();
        let of = |name: &str| {
            let tensor = files.weights.tensors().find(|t| t.name().ends_with(name));
            tensor.unwrap_or_else(|| panic!("no {name}")).format().to_string()
        };
        (
            [of("embed_tokens.weight"), of("0.mlp.down_proj.weight"), of("2.mlp.up_proj.weight")],
            report.to_string(),
            place,
        )
    };
    // 704 columns are no whole blocks of 256, and the embedding makes the logits
    assert_eq!(of(&options("q4_k")).0, ["Q6_K", "Q5_0", "Q4_K"]);
    assert_eq!(of(&options("q6_k")).0, ["Q6_K", "Q8_0", "Q6_K"]);
    assert_eq!(of(&options("q4_0")).0, ["Q6_K", "Q4_0", "Q4_0"]);
    assert_eq!(of(&options("q8_0")).0, ["Q8_0"; 3]);
    assert_eq!(of(&options("int8")).0, ["bf16", "int8 of groups of 704", "int8 of groups of 256"]);
    assert_eq!(of(&options("fp8")).0, ["bf16", "e4m3 of groups of 704", "e4m3 of groups of 256"]);
    let ignore = |names: &[&str], format: &str| Options {
        ignore: names.iter().map(|name| name.to_string()).collect(),
        group: (format == "int4").then_some(32),
        ..options(format)
    };
    let (formats, report, _) = of(&ignore(&["down_proj", "model.layers.2.mlp.up_proj"], "q4_k"));
    assert_eq!(formats, ["Q6_K", "bf16", "bf16"]);
    assert!(report.starts_with("17 matrices as Q4_K, 1 as Q6_K, 4 as bf16; "), "{report}");
    let (formats, _, place) = of(&ignore(&["model.layers.0.mlp.down_proj"], "int4"));
    assert_eq!(formats, ["bf16", "bf16", "int4 of groups of 32"]);
    let config: Value = serde_json::from_slice(&fs::read(place.path().join("m/config.json")).unwrap()).unwrap();
    let quantization = &config["quantization_config"];
    assert_eq!(quantization["ignore"], json!(["lm_head", "model.layers.0.mlp.down_proj"]));
    let weights = &quantization["config_groups"]["group_0"]["weights"];
    assert_eq!(
        (&weights["num_bits"], &weights["group_size"], &weights["strategy"]),
        (&json!(4), &json!(32), &json!("group"))
    );
    // each tensor at a multiple of its elements' size, on which readers of the format insist
    let bytes = fs::read(place.path().join("m/model.safetensors")).unwrap();
    let (n, _) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    for (name, view) in safetensors::SafeTensors::deserialize(&bytes).unwrap().iter() {
        let at = view.data().as_ptr() as usize - bytes.as_ptr() as usize - n - 8;
        assert!(at.is_multiple_of(view.dtype().bitsize() / 8), "{name} at {at}");
    }
}

/// The keys of rotary scaling are written to the file and read back.
#[test]
fn rotary_scalings_are_kept() {
    for scaling in [
        json!({"rope_type": "linear", "factor": 4.0}),
        json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "beta_fast": 24.0}),
        json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 512}),
    ] {
        let dir = demo(|config| config["rope_scaling"] = scaling.clone());
        let (original, place) = (open(dir.path()).unwrap(), tempfile::tempdir().unwrap());
        let (path, _) = write(&original, &options("q8_0"), place.path()).unwrap();
        let (ours, theirs) = (open(&path).unwrap().config, original.config);
        assert_eq!(ours.max_seq, theirs.max_seq, "{scaling}");
        let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 2e-7 * b.abs();
        assert!(ours.rope_inv_freq().iter().zip(&theirs.rope_inv_freq()).all(close), "{scaling}");
        assert!((ours.rope_attention_factor() - theirs.rope_attention_factor()).abs() < 1e-6, "{scaling}");
    }
    let dir = demo(|config| config["rope_scaling"] = json!({"rope_type": "dynamic", "factor": 2.0}));
    let place = tempfile::tempdir().unwrap();
    let error = write(&open(dir.path()).unwrap(), &options("q8_0"), place.path()).unwrap_err();
    assert!(matches!(&error, Error::Unsupported { what, .. } if what.contains("dynamic")), "{error}");
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0, "what fails leaves nothing");
}

/// The sum of squared errors, each as often as its column's input counts, is never larger with inputs than without; and nothing
/// else changes.
#[test]
fn inputs_weigh_the_errors() {
    let dir = demo(|_| {});
    let original = open(dir.path()).unwrap();
    let mut inputs = Inputs::default();
    for t in original.weights.tensors().filter(|t| t.rows() > 1) {
        inputs.insert(t.name(), (0..t.cols()).map(|i| if i % 11 == 4 { 30.0 } else { 0.5 }).collect());
    }
    for format in TARGETS {
        let place = tempfile::tempdir().unwrap();
        let plain = Options { group: (format == "int4").then_some(64), ..options(format) };
        let weighed = Options { inputs: inputs.clone(), ..plain.clone() };
        let (first, second) = (place.path().join("1"), place.path().join("2"));
        [&first, &second].into_iter().for_each(|dir| fs::create_dir(dir).unwrap());
        let ((plain, a), (weighed, b)) =
            (write(&original, &plain, &first).unwrap(), write(&original, &weighed, &second).unwrap());
        assert_eq!(a, b, "{format}: the same formats and bytes");
        let (plain, weighed) = (open(&plain).unwrap().weights, open(&weighed).unwrap().weights);
        let (mut with, mut without) = (0.0, 0.0);
        for ((t, plain), weighed) in original.weights.tensors().zip(plain.tensors()).zip(weighed.tensors()) {
            let Some(w) = inputs.get(t.name()) else {
                assert_eq!(plain.to_f32(), weighed.to_f32(), "{format}: {t:?}");
                continue;
            };
            let x = t.to_f32();
            let error = |back: Vec<f32>| -> f64 {
                let errors = x.iter().zip(back).zip(w.iter().cycle());
                errors.map(|((x, back), w)| f64::from(*w) * f64::from(x - back).powi(2)).sum()
            };
            let (plain, weighed) = (error(plain.to_f32()), error(weighed.to_f32()));
            assert!(weighed <= plain, "{format}: {t:?}: {weighed}, and {plain} without inputs");
            (with, without) = (with + weighed, without + plain);
        }
        assert!(with < 0.99 * without, "{format}: {with} of {without}");
    }
    let mut other = Inputs::default();
    other.insert("model.layers.1.mlp.up_proj.weight", vec![1.0; 255]);
    let place = tempfile::tempdir().unwrap();
    let error = write(&original, &Options { inputs: other, ..options("q8_0") }, place.path()).unwrap_err().to_string();
    for word in ["1.mlp.up_proj", "255 columns", "another model"] {
        assert!(error.contains(word), "{error:?} lacks {word:?}");
    }
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0, "what fails leaves nothing");
}

#[test]
fn what_cannot_be_quantized_is_named() {
    let dir = demo(|_| {});
    let (original, place) = (open(dir.path()).unwrap(), tempfile::tempdir().unwrap());
    let fails = |files: &ModelFiles, options: &Options, words: &[&str]| {
        let error = write(files, options, place.path()).unwrap_err().to_string();
        words.iter().for_each(|word| assert!(error.contains(word), "{error:?} lacks {word:?}"));
    };
    fails(&original, &options("int4"), &["down_proj.weight", "multiples of 128", "704 columns", "--ignore"]);
    let ignore = Options { ignore: vec!["proj".into()], ..options("q8_0") };
    fails(&original, &ignore, &["--ignore proj", "down_proj"]);
    fails(&ModelFiles::open("demo").unwrap(), &options("q8_0"), &["demo model"]);
    for format in ["int8", "q8_0"] {
        let place = tempfile::tempdir().unwrap();
        let (path, _) = write(&original, &options(format), place.path()).unwrap();
        let words = if format == "int8" { ["int8", "already"] } else { ["GGUF", "model directory"] };
        fails(&open(&path).unwrap(), &options("int4"), &words);
    }
    // a weight that is no number
    let mut bytes = fs::read(dir.path().join("model.safetensors")).unwrap();
    let tensor = original.weights.tensors().find(|t| t.name().ends_with("1.mlp.gate_proj.weight")).unwrap();
    let at = tensor.offset() + 2 * (5 * tensor.cols() + 7);
    bytes[at..at + 2].copy_from_slice(&half::bf16::INFINITY.to_le_bytes());
    drop(original);
    fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    let broken = open(dir.path()).unwrap();
    for format in ["q8_0", "fp8"] {
        fails(&broken, &options(format), &["gate_proj.weight", "finite", "inf in row 5"]);
    }
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0, "what fails leaves nothing");
}
