//! Values of quantized weights: compared with those that `scripts/quantized-goldens.py` made, and as matrices of a checkpoint.

use aoji::{
    Config, Dtype, Error, Result, Weights,
    format::{BLOCKS, Format, Grouped, Layout, Parts},
};
use serde_json::{Map, Value, json};
use std::{fs, path::Path, sync::LazyLock};

static GOLDENS: LazyLock<Value> = LazyLock::new(|| serde_json::from_str(include_str!("goldens.json")).unwrap());

fn bytes(hex: &Value) -> Vec<u8> {
    let hex = hex.as_str().unwrap();
    (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
}

fn floats(hex: &Value) -> Vec<u32> {
    bytes(hex).as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn blocks_have_the_values_of_the_gguf_package() {
    for block in BLOCKS {
        let golden = &GOLDENS["blocks"][block.name];
        let (bytes, want) = (bytes(&golden["bytes"]), floats(&golden["values"]));
        let mut values = vec![0f32; bytes.len() / block.bytes * block.weights];
        block.values(&bytes, &mut values);
        assert_eq!(bits(&values), want, "{}", block.name);
        assert!(want.len() > 200);
    }
}

/// The format of a golden, as its name says.
fn grouped(name: &str, golden: &Value) -> Grouped {
    let bits = golden["bits"].as_u64().unwrap() as u32;
    let layout = match name.split(' ').next().unwrap() {
        "e4m3" => Layout::E4m3,
        "int8" => Layout::Int8,
        "packed" => Layout::Packed { bits },
        "gptq" => Layout::Gptq { bits, zero: 1 },
        "gptq_v2" => Layout::Gptq { bits, zero: 0 },
        "awq" => Layout::Awq,
        other => panic!("{other}"),
    };
    let scale = match golden["scale"].as_str().unwrap() {
        "BF16" => Dtype::Bf16,
        "F16" => Dtype::F16,
        _ => Dtype::F32,
    };
    Grouped { layout, scale, group: serde_json::from_value(golden["group"].clone()).unwrap() }
}

fn size(golden: &Value) -> [usize; 2] {
    ["rows", "cols"].map(|key| golden[key].as_u64().unwrap() as usize)
}

#[test]
fn matrices_have_their_values_from_any_row_on() {
    let goldens = GOLDENS["grouped"].as_object().unwrap();
    assert!(goldens.len() >= 13);
    for (name, golden) in goldens {
        let part = |key: &str| golden.get(key).map(bytes);
        let (codes, scales, zeros, groups) =
            (part("codes").unwrap(), part("scales").unwrap(), part("zeros"), part("groups"));
        let parts = Parts { codes: &codes, scales: &scales, zeros: zeros.as_deref(), groups: groups.as_deref() };
        let ([rows, cols], want) = (size(golden), floats(&golden["values"]));
        for (first, n) in [(0, rows), (0, 1), (rows - 1, 1), (3, rows / 2)] {
            let mut values = vec![0f32; n * cols];
            grouped(name, golden).values([rows, cols], parts, first, &mut values);
            assert_eq!(bits(&values), want[first * cols..(first + n) * cols], "{name}, row {first}");
        }
    }
}

const Q: &str = "model.layers.0.self_attn.q_proj.";

/// A tensor to write: name, dtype, shape, data.
type Item = (String, &'static str, Vec<usize>, Vec<u8>);

/// A checkpoint whose query projection is quantized, all else zeros.
struct Checkpoint {
    dir: tempfile::TempDir,
    items: Vec<Item>,
    quantization: Value,
}

impl Checkpoint {
    /// For a golden of 16 rows and 32 columns.
    fn new(name: &str) -> Checkpoint {
        let golden = &GOLDENS["grouped"][name];
        let ([rows, cols], Grouped { layout, group: [high, wide], .. }) = (size(golden), grouped(name, golden));
        let (groups, per_word) = (cols.div_ceil(wide), 32 / layout.bits() as usize);
        let scale = if golden["scale"] == "F16" {
            "F16"
        } else if golden["scale"] == "BF16" {
            "BF16"
        } else {
            "F32"
        };
        let mut items: Vec<Item> = Vec::new();
        let mut add = |part: &str, dtype, shape: &[usize], key: &str| {
            if let Some(data) = golden.get(key) {
                items.push((format!("{Q}{part}"), dtype, shape.to_vec(), bytes(data)));
            }
        };
        let compressed = |format: &str, weights: Value| {
            json!({"quant_method": "compressed-tensors", "format": format, "ignore": ["lm_head"],
                   "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}})
        };
        let quantization = match layout {
            Layout::E4m3 => {
                add("weight", "F8_E4M3", &[rows, cols], "codes");
                match name {
                    "e4m3 block" => {
                        add("weight_scale_inv", scale, &[rows.div_ceil(high), groups], "scales");
                        json!({"quant_method": "fp8", "weight_block_size": [high, wide], "activation_scheme": "dynamic"})
                    }
                    "e4m3 tensor" => {
                        add("weight_scale", scale, &[1], "scales");
                        items.push((format!("{Q}input_scale"), "F32", vec![1], vec![0; 4]));
                        compressed("float-quantized", json!({"num_bits": 8, "type": "float", "strategy": "tensor"}))
                    }
                    _ => {
                        add("weight_scale", scale, &[rows, 1], "scales");
                        json!({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0})
                    }
                }
            }
            Layout::Int8 => {
                add("weight", "I8", &[rows, cols], "codes");
                add("weight_scale", scale, &[rows, 1], "scales");
                compressed("int-quantized", json!({"num_bits": 8, "type": "int", "strategy": "channel"}))
            }
            Layout::Packed { bits } => {
                add("weight_packed", "I32", &[rows, cols / per_word], "codes");
                add("weight_scale", scale, &[rows, groups], "scales");
                add("weight_zero_point", "I32", &[rows.div_ceil(per_word), groups], "zeros");
                add("weight_g_idx", "I32", &[cols], "groups");
                let shape = [rows as u64, cols as u64].map(u64::to_le_bytes).concat();
                items.push((format!("{Q}weight_shape"), "I64", vec![2], shape));
                compressed("pack-quantized", json!({"num_bits": bits, "type": "int", "group_size": wide}))
            }
            Layout::Gptq { bits, zero } => {
                add("qweight", "I32", &[cols / per_word, rows], "codes");
                add("scales", scale, &[groups, rows], "scales");
                add("qzeros", "I32", &[groups, rows / per_word], "zeros");
                add("g_idx", "I32", &[cols], "groups");
                items.push((format!("{Q}bias"), "F16", vec![rows], vec![0; 2 * rows]));
                let version = if zero == 1 { "gptq" } else { "gptq_v2" };
                json!({"quant_method": "gptq", "bits": bits, "group_size": wide, "checkpoint_format": version})
            }
            Layout::Awq => {
                add("qweight", "I32", &[cols, rows / 8], "codes");
                add("scales", scale, &[groups, rows], "scales");
                add("qzeros", "I32", &[groups, rows / 8], "zeros");
                json!({"quant_method": "awq", "bits": 4, "group_size": wide, "version": "gemm", "zero_point": true})
            }
        };
        Weights::table(&config(), |name, shape| {
            if !name.starts_with(Q) {
                items.push((name, "BF16", shape.to_vec(), vec![0; 2 * shape.iter().product::<usize>()]));
            }
            Ok(())
        })
        .unwrap();
        Checkpoint { dir: tempfile::tempdir().unwrap(), items, quantization }
    }

    fn item(&mut self, part: &str) -> &mut Item {
        self.items.iter_mut().find(|item| item.0 == format!("{Q}{part}")).unwrap()
    }

    fn open(&self) -> Result<Weights> {
        let (mut header, mut data) = (Map::new(), Vec::new());
        for (name, dtype, shape, bytes) in &self.items {
            let offsets = [data.len(), data.len() + bytes.len()];
            header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
            data.extend(bytes);
        }
        let header = Value::Object(header).to_string();
        let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
        fs::write(self.dir.path().join("model.safetensors"), file).unwrap();
        let mut json = config_json();
        json["quantization_config"] = self.quantization.clone();
        fs::write(self.dir.path().join("config.json"), json.to_string()).unwrap();
        Weights::open(self.dir.path(), &Config::from_dir(self.dir.path()).unwrap())
    }

    #[track_caller]
    fn refused(&self, words: &[&str]) {
        let error = self.open().unwrap_err();
        assert!(matches!(error, Error::Tensor { .. } | Error::Unsupported { .. } | Error::File { .. }), "{error:?}");
        let text = error.to_string();
        words.iter().for_each(|word| assert!(text.contains(word), "{text:?} lacks {word:?}"));
    }
}

fn config_json() -> Value {
    json!({"model_type": "llama", "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 8,
           "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 16})
}

fn config() -> Config {
    Config::from_json(Path::new("config.json"), &config_json().to_string(), None).unwrap()
}

#[test]
fn every_method_binds_its_matrices() {
    let mut bound = 0;
    for (name, golden) in GOLDENS["grouped"].as_object().unwrap() {
        if size(golden) != [16, 32] {
            continue;
        }
        let weights = Checkpoint::new(name).open().unwrap_or_else(|e| panic!("{name}: {e}"));
        let wq = &weights.layers[0].wq;
        assert_eq!(bits(&wq.to_f32()), floats(&golden["values"]), "{name}");
        assert_eq!(
            (wq.format(), wq.is_plain(), wq.dtype()),
            (Format::Grouped(grouped(name, golden)), false, Dtype::F32)
        );
        let beside = ["codes", "scales", "zeros", "groups"].iter().filter_map(|key| golden.get(*key));
        assert_eq!(wq.file_bytes() as usize, beside.map(|part| bytes(part).len()).sum::<usize>(), "{name}");
        assert!(weights.layers[0].wk.is_plain(), "what the method leaves alone");
        bound += 1;
    }
    assert!(bound >= 12);
}

#[test]
fn groups_that_lie_side_by_side_need_no_list() {
    let mut checkpoint = Checkpoint::new("gptq");
    let list = (0..32).flat_map(|column: i32| (column / 16).to_le_bytes()).collect();
    checkpoint.items.push((format!("{Q}g_idx"), "I32", vec![32], list));
    let bytes = checkpoint.open().unwrap().layers[0].wq.file_bytes();
    assert_eq!(bytes, Checkpoint::new("gptq").open().unwrap().layers[0].wq.file_bytes());
}

#[test]
fn tensors_that_contradict_each_other() {
    let spoiled = |name: &str, spoil: &dyn Fn(&mut Checkpoint), words: &[&str]| {
        let mut checkpoint = Checkpoint::new(name);
        spoil(&mut checkpoint);
        checkpoint.refused(words);
    };
    let drop = |part: &'static str| move |c: &mut Checkpoint| c.items.retain(|item| item.0 != format!("{Q}{part}"));
    spoiled("packed", &drop("weight_scale"), &["q_proj.weight_scale", "is quantized", "no such tensor"]);
    spoiled("gptq", &drop("qzeros"), &["q_proj.qzeros", "no such tensor"]);
    spoiled("gptq", &drop("qweight"), &["q_proj.weight", "no such tensor"]);
    spoiled("awq", &drop("scales"), &["q_proj.scales", "no such tensor"]);
    spoiled("e4m3 row", &drop("weight_scale"), &["q_proj.weight_scale", "no such tensor"]);
    let shape = |part: &'static str, shape: Vec<usize>| move |c: &mut Checkpoint| c.item(part).2 = shape.clone();
    spoiled("e4m3 row", &shape("weight", vec![32, 16]), &["q_proj.weight", "[16, 32]", "[32, 16]"]);
    spoiled("e4m3 row", &shape("weight_scale", vec![2, 8]), &["weight_scale", "[16, 1]", "[2, 8]"]);
    spoiled("packed", &shape("weight_packed", vec![4, 16]), &["weight_packed", "[16, 4]", "[4, 16]"]);
    spoiled("packed", &shape("weight_scale", vec![2, 16]), &["weight_scale", "[16, n]"]);
    spoiled("gptq", &shape("scales", vec![16, 2]), &["scales", "[2, 16]", "groups of 16"]);
    let group = |g: i32| move |c: &mut Checkpoint| c.item("g_idx").3[..4].copy_from_slice(&g.to_le_bytes());
    spoiled("gptq order", &group(2), &["g_idx", "below 2", "2 for column 0"]);
    spoiled("gptq order", &group(-1), &["g_idx", "-1 for column 0"]);
    let values = |c: &mut Checkpoint| c.item("weight_shape").3[0] = 17;
    spoiled("packed", &values, &["weight_shape", "[16, 32]", "[17, 32]"]);
    let bias = |c: &mut Checkpoint| c.item("bias").3[0] = 1;
    spoiled("gptq", &bias, &["q_proj.bias", "without biases"]);
    let dtype = |c: &mut Checkpoint| c.item("weight").1 = "F8_E5M2";
    spoiled("e4m3 row", &dtype, &["q_proj.weight", "F8_E5M2"]);
}

#[test]
fn methods_that_are_not_read() {
    for (quantization, word) in [
        (json!({"quant_method": "bitsandbytes", "load_in_4bit": true}), "bitsandbytes"),
        (json!({"quant_method": "hqq"}), "hqq"),
        (json!({"quant_method": "mxfp4"}), "mxfp4"),
        (json!({"bits": 4}), "quant_method null"),
        (json!([]), "quant_method null"),
        (json!({"quant_method": "gptq", "bits": 3, "group_size": 128}), "bits 3"),
        (json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"}), "marlin"),
        (json!({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}), "gemv"),
        (json!({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}), "nvfp4-pack-quantized"),
        (
            json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "sparsity_config": {"format": "sparse-24"}}),
            "sparse-24",
        ),
        (
            json!({"quant_method": "compressed-tensors", "format": "pack-quantized",
                   "config_groups": {"g": {"weights": {"num_bits": 2, "type": "int"}}}}),
            "num_bits 2",
        ),
    ] {
        let checkpoint = Checkpoint { quantization, ..Checkpoint::new("packed") };
        checkpoint.refused(&["config.json", word, "supported", "pack-quantized", "GGUF"]);
    }
    // rotations, and an order of the words that is not the format's
    let rotated = json!({"quant_method": "compressed-tensors", "format": "pack-quantized",
        "transform_config": {"config_groups": {"u": {"type": "hadamard", "apply": [{"location": "weight_input"}]}}}});
    let marlin = json!({"quant_method": "gptq", "bits": 4, "group_size": 16, "is_marlin_format": true});
    for (quantization, word) in [(rotated, "transform_config"), (marlin, "is_marlin_format")] {
        Checkpoint { quantization, ..Checkpoint::new("packed") }.refused(&["config.json", word, "supported"]);
    }
    for group in [json!(0), json!(-2), json!("128"), json!(1u64 << 40), Value::Null] {
        let quantization = json!({"quant_method": "gptq", "bits": 4, "group_size": group});
        Checkpoint { quantization, ..Checkpoint::new("gptq") }.refused(&["group_size", &group.to_string()]);
    }
    for block in [json!([128]), json!([0, 128]), json!(128), json!([1, 2, 3])] {
        let quantization = json!({"quant_method": "fp8", "weight_block_size": block});
        Checkpoint { quantization, ..Checkpoint::new("e4m3 block") }.refused(&["block of scales", "[rows, columns]"]);
    }
}

/// compressed-tensors writes these keys in each of its files, and once wrote its settings under another name.
#[test]
fn settings_that_say_nothing_and_their_older_name() {
    for nothing in [Value::Null, json!({}), json!({"config_groups": {}})] {
        let mut checkpoint = Checkpoint::new("packed");
        checkpoint.quantization["transform_config"] = nothing;
        assert!(checkpoint.open().is_ok());
    }
    let checkpoint = Checkpoint::new("packed");
    let want = checkpoint.open().unwrap().layers[0].wq.to_f32();
    let place = checkpoint.dir.path();
    let text = fs::read_to_string(place.join("config.json")).unwrap();
    fs::write(place.join("config.json"), text.replace("quantization_config", "compression_config")).unwrap();
    let config = Config::from_dir(place).unwrap();
    assert_eq!(bits(&Weights::open(place, &config).unwrap().layers[0].wq.to_f32()), bits(&want));
    let text = fs::read_to_string(place.join("config.json")).unwrap().replace("pack-quantized", "nvfp4");
    fs::write(place.join("config.json"), text).unwrap();
    let error = Weights::open(place, &config).unwrap_err().to_string();
    assert!(error.contains("compression_config has format \"nvfp4\""), "{error}");
}

#[test]
fn a_missing_file_of_a_quantized_checkpoint_is_named() {
    for name in ["packed", "gptq", "awq", "e4m3 row"] {
        let checkpoint = Checkpoint::new(name);
        checkpoint.open().unwrap();
        let place = checkpoint.dir.path();
        fs::rename(place.join("model.safetensors"), place.join("a.safetensors")).unwrap();
        let of = |item: &Item| match item.0.ends_with("scale") || item.0.ends_with("scales") {
            true => "b.safetensors",
            false => "a.safetensors",
        };
        let mut files: Map<String, Value> = checkpoint.items.iter().map(|i| (i.0.clone(), json!(of(i)))).collect();
        // what is not needed may be missing
        files.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), json!("c.safetensors"));
        fs::write(place.join("model.safetensors.index.json"), json!({"weight_map": files}).to_string()).unwrap();
        let error = Weights::open(place, &config()).unwrap_err().to_string();
        assert!(
            error.contains("b.safetensors: is missing") && error.contains("places 1 tensors in it"),
            "{name}: {error}"
        );
    }
}
