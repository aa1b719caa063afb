//! LoRA adapters: a real one against PEFT, and small ones against the definition.

use aoji::{
    Activations, Device, Engine, Error, ModelFiles, Options, Result,
    lora::{self, LoraSpec},
    output::Output,
    quantize::{self, TARGETS},
    verify,
};
use half::bf16;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use std::{collections::BTreeMap, fs, path::Path};

fn open(dir: &Path, adapters: &[&Path], activations: Activations) -> Result<Engine> {
    open_on(dir, adapters, Options { device: Device::Cpu, activations, ..Options::default() })
}

fn open_on(dir: &Path, adapters: &[&Path], options: Options) -> Result<Engine> {
    let mut files = ModelFiles::open(dir.to_str().unwrap())?;
    adapters.iter().try_for_each(|a| files.add_lora(&a.to_str().unwrap().parse().unwrap()))?;
    Engine::load(files, &options, &mut |_, _| {})
}

fn ids(v: &Value) -> Vec<u32> {
    v.as_array().unwrap().iter().map(|t| t.as_u64().unwrap() as u32).collect()
}

/// The adapter of the test data on SmolLM2, in f32: log-probabilities, largest logits and greedy tokens of PEFT, which keeps
/// the adapter apart (`sum_adapter`) or merges it (`sum_merged_f32`).
#[test]
fn smollm2_with_an_adapter_is_pefts() {
    let (Some(dir), Some(adapter)) = (crate::common::model("smollm2-135m"), crate::common::data("lora-smollm2")) else {
        return;
    };
    let golden: Value = serde_json::from_str(&fs::read_to_string(adapter.join("golden.json")).unwrap()).unwrap();
    let engine = open(&dir, &[&adapter], Activations::F32).unwrap();
    let text = &golden["scores"][0];
    let tokens = ids(&text["ids"]);
    let scores = engine.score(&tokens[..1], &[&tokens[1..]]).unwrap();
    for (ours, theirs) in scores.continuations[0].0.iter().zip(text["token_logprobs_adapter"].as_array().unwrap()) {
        let theirs = theirs.as_f64().unwrap();
        assert!((f64::from(ours.logprob) - theirs).abs() < 1e-3, "{ours:?}, PEFT {theirs}");
    }
    let sum = scores.continuations[0].sum();
    let [merged, base] = ["sum_merged_f32", "sum_base"].map(|name| text[name].as_f64().unwrap());
    assert!((sum / merged - 1.0).abs() < 1e-5, "{sum}, PEFT merged {merged}");
    let none = adapter.join("../lora-smollm2:0");
    let unchanged = open(&dir, &[&none], Activations::F32).unwrap().score(&tokens[..1], &[&tokens[1..]]).unwrap();
    let sum = unchanged.continuations[0].sum();
    assert!((sum / base - 1.0).abs() < 1e-5, "nothing of the adapter: {sum}, the base {base}");

    let mut steps = 0;
    for case in golden["cases"].as_array().unwrap() {
        let (prompt, answer) = (ids(&case["prompt_ids"]), ids(&case["generated_ids"]));
        let mut session = engine.session(prompt.len() + answer.len()).unwrap();
        let all = [prompt.as_slice(), &answer[..answer.len() - 1]].concat();
        let each = &mut |i: usize, logits: &[f32]| {
            let step = &case["steps"][i + 1 - prompt.len()];
            for top in step["top5"].as_array().unwrap() {
                let (id, theirs) = (top[0].as_u64().unwrap(), top[1].as_f64().unwrap());
                let ours = f64::from(logits[id as usize]);
                assert!((ours - theirs).abs() < 1e-3, "{}: step {i}: {ours}, PEFT {theirs}", case["prompt"]);
            }
            assert_eq!(verify::argmax(logits), answer[i + 1 - prompt.len()], "{}", case["prompt"]);
            steps += 1;
        };
        session.logits_of(&all, prompt.len() - 1, each).unwrap();
    }
    assert!(steps > 50, "{steps} steps");
}

const CONFIG: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 320, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": false
}"#;
const RANK: usize = 4;

fn write_base(dir: &Path, dtype: aoji::Dtype) {
    aoji::synth::write(CONFIG, 7, dtype, 200_000, dir, |_, _| {}).unwrap(); // several files
}

/// `(name, rows, cols)` of the matrices that the adapters here change.
fn modules() -> Vec<(String, usize, usize)> {
    let of = |l: usize| {
        [
            ("self_attn.q_proj", 128, 128),
            ("self_attn.k_proj", 64, 128),
            ("self_attn.v_proj", 64, 128),
            ("self_attn.o_proj", 128, 128),
            ("mlp.gate_proj", 192, 128),
            ("mlp.up_proj", 192, 128),
            ("mlp.down_proj", 128, 192),
        ]
        .map(|(m, rows, cols)| (format!("model.layers.{l}.{m}"), rows, cols))
    };
    (0..2).flat_map(of).collect()
}

/// Tensors of an adapter by name: shape and values.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn tensors(seed: u64) -> Tensors {
    let mut all = BTreeMap::new();
    for (i, (name, rows, cols)) in modules().into_iter().enumerate() {
        let noise = |n, salt| aoji::ops::noise(n, seed + 2 * i as u64 + salt).into_iter().map(|x| 0.2 * x).collect();
        let name = format!("base_model.model.{name}");
        all.insert(format!("{name}.lora_A.weight"), (vec![RANK, cols], noise(RANK * cols, 0)));
        all.insert(format!("{name}.lora_B.weight"), (vec![rows, RANK], noise(rows * RANK, 1)));
    }
    all
}

/// Writes an adapter; `changes` override a plain configuration.
fn write_adapter(dir: &Path, tensors: &Tensors, changes: Value) {
    let mut config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2, "bias": "none", "use_rslora": false,
        "base_model_name_or_path": "someone/base-2-layers", "modules_to_save": null, "lora_dropout": 0.05,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    });
    let changes = changes.as_object().unwrap().clone();
    config.as_object_mut().unwrap().extend(changes);
    fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    let bytes: BTreeMap<&str, (Vec<usize>, Vec<u8>)> =
        tensors.iter().map(|(n, (s, v))| (n.as_str(), (s.clone(), bytemuck::cast_slice(v).to_vec()))).collect();
    let views = bytes.iter().map(|(n, (s, b))| (*n, TensorView::new(Dtype::F32, s.clone(), b).unwrap()));
    fs::write(dir.join("adapter_model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
}

fn adapter(seed: u64, changes: Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_adapter(dir.path(), &tensors(seed), changes);
    dir
}

fn logits(engine: &Engine) -> Vec<f32> {
    let mut session = engine.session(20).unwrap();
    session.sync(&(1..20).map(|i| i * 13 % 320).collect::<Vec<u32>>()).unwrap();
    session.logits().unwrap()
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Values of a checkpoint by tensor.
fn values(dir: &Path) -> BTreeMap<String, Vec<f32>> {
    let files = ModelFiles::open(dir.to_str().unwrap()).unwrap();
    files.weights.tensors().map(|t| (t.name().to_string(), t.to_f32())).collect()
}

fn merge(base: &Path, adapters: &[(&Path, f32)]) -> tempfile::TempDir {
    let mut files = ModelFiles::open(base.to_str().unwrap()).unwrap();
    for &(dir, scale) in adapters {
        files.add_lora(&LoraSpec { dir: dir.into(), scale }).unwrap();
    }
    let out = tempfile::tempdir().unwrap();
    lora::merge_checkpoint(&files, Output::begin(out.path()).unwrap(), &mut |_, _| {}).unwrap();
    out
}

#[test]
fn merged_weights_are_w_plus_scale_b_a() {
    for (dtype, changes, scale) in [
        (aoji::Dtype::F32, json!({}), 2.0 / 4.0),
        (aoji::Dtype::Bf16, json!({"use_rslora": true}), 2.0 / 2.0),
        (aoji::Dtype::Bf16, json!({"lora_alpha": 16.0}), 4.0),
    ] {
        let (base, lora) = (tempfile::tempdir().unwrap(), adapter(5, changes));
        write_base(base.path(), dtype);
        let out = merge(base.path(), &[(lora.path(), 0.5)]);
        let (before, after, parts) = (values(base.path()), values(out.path()), tensors(5));
        assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
        let mut changed = 0;
        for (name, rows, cols) in modules() {
            let part = |which| &parts[&format!("base_model.model.{name}.{which}.weight")].1;
            let (a, b, name) = (part("lora_A"), part("lora_B"), format!("{name}.weight"));
            for i in 0..rows {
                for j in 0..cols {
                    let delta: f64 = (0..RANK).map(|k| f64::from(b[i * RANK + k]) * f64::from(a[k * cols + j])).sum();
                    let want = f64::from(before[&name][i * cols + j]) + 0.5 * scale * delta;
                    let got = f64::from(after[&name][i * cols + j]);
                    let allowed = if dtype == aoji::Dtype::F32 { 1e-6 } else { want.abs() / 256.0 + 1e-6 };
                    assert!((got - want).abs() <= allowed, "{name} [{i}, {j}]: {got}, expected {want}");
                    changed += usize::from(got != f64::from(before[&name][i * cols + j]));
                }
            }
        }
        assert!(changed > 100_000, "{changed} elements changed");
        let untouched = |name: &str| !modules().iter().any(|(m, ..)| name == format!("{m}.weight"));
        let same = before.keys().filter(|n| untouched(n)).all(|n| before[n] == after[n]);
        assert!(same, "a tensor that the adapter does not name has changed");
    }
}

#[test]
fn loading_with_an_adapter_is_loading_the_merged_checkpoint() {
    let (base, one, two) = (tempfile::tempdir().unwrap(), adapter(5, json!({})), adapter(50, json!({"lora_alpha": 8})));
    write_base(base.path(), aoji::Dtype::F32);
    let plain = logits(&open(base.path(), &[], Activations::F32).unwrap());
    let both = logits(&open(base.path(), &[one.path(), two.path()], Activations::F32).unwrap());
    assert!(distance(&plain, &both) > 0.1, "the adapters change nothing");
    let out = merge(base.path(), &[(one.path(), 1.0), (two.path(), 1.0)]);
    assert_eq!(both, logits(&open(out.path(), &[], Activations::F32).unwrap()));

    // bf16 weights: the device's copy is the sum rounded once
    let base = tempfile::tempdir().unwrap();
    write_base(base.path(), aoji::Dtype::Bf16);
    let out = merge(base.path(), &[(one.path(), 1.0)]);
    let merged = logits(&open(out.path(), &[], Activations::Bf16).unwrap());
    assert_eq!(logits(&open(base.path(), &[one.path()], Activations::Bf16).unwrap()), merged);
    for x in values(out.path()).values().flatten() {
        assert_eq!(bf16::from_f32(*x).to_f32(), *x);
    }
    #[cfg(feature = "cuda")]
    {
        cuda_emulator::install();
        let options = || Options { device: Device::Cuda(0), ..Options::default() };
        let adapted = logits(&open_on(base.path(), &[one.path()], options()).unwrap());
        assert_eq!(adapted, logits(&open_on(out.path(), &[], options()).unwrap()));
        assert!(distance(&adapted, &merged) < 0.1 * distance(&plain, &both), "{}", distance(&adapted, &merged));
    }
}

/// An adapter is added in f32 before the weights are quantized: while they are loaded, and when they are written. In f32, where
/// merging rounds nothing, that is also the merged checkpoint quantized. What was written takes no adapter any more.
#[test]
fn an_adapter_is_added_before_quantizing() {
    let lora = adapter(5, json!({}));
    for dtype in [aoji::Dtype::F32, aoji::Dtype::Bf16] {
        let base = tempfile::tempdir().unwrap();
        write_base(base.path(), dtype);
        let merged = merge(base.path(), &[(lora.path(), 1.0)]);
        for target in TARGETS {
            let format: quantize::Options = if target == "int4" { "int4:64" } else { target }.parse().unwrap();
            let on = |dir: &Path, adapters: &[&Path], device, quantize| {
                logits(&open_on(dir, adapters, Options { device, quantize, ..Options::default() }).unwrap())
            };
            let run = |dir: &Path, adapters: &[&Path], quantize| on(dir, adapters, Device::Cpu, quantize);
            let (loaded, plain) =
                (run(base.path(), &[lora.path()], Some(format.clone())), run(base.path(), &[], Some(format.clone())));
            assert!(distance(&loaded, &plain) > 0.1, "{target}: the adapter changes nothing");
            let first = run(merged.path(), &[], Some(format.clone()));
            match dtype {
                aoji::Dtype::F32 => assert_eq!(loaded, first, "{target}: merged first"),
                _ => {
                    assert!(distance(&loaded, &first) < distance(&loaded, &plain), "{target}: merged and rounded first")
                }
            }
            let mut files = ModelFiles::open(base.path().to_str().unwrap()).unwrap();
            files.add_lora(&LoraSpec { dir: lora.path().into(), scale: 1.0 }).unwrap();
            let place = tempfile::tempdir().unwrap();
            let (out, output) = match format.target.is_file() {
                true => (place.path().join("m.gguf"), Output::file(&place.path().join("m.gguf"), false)),
                false => (place.path().join("m"), Output::begin(&place.path().join("m"))),
            };
            quantize::quantize(&files, &format, output.unwrap(), &mut |_, _| {}).unwrap();
            assert_eq!(loaded, run(&out, &[], None), "{target}: written");
            let refused =
                open_on(&out, &[lora.path()], Options { device: Device::Cpu, ..Options::default() }).unwrap_err();
            let said = refused.to_string();
            assert!(matches!(refused, Error::Unsupported { .. }), "{target}: {said}");
            let reason = "an adapter can only be added to weights of bf16, f16 or f32";
            assert!(
                said.contains(reason) && said.contains("the model that this one was made from"),
                "{target}: {said}"
            );
            #[cfg(feature = "cuda")]
            if target == "q8_0" {
                cuda_emulator::install();
                let device = Device::Cuda(0);
                let loaded = on(base.path(), &[lora.path()], device, Some(format));
                assert_eq!(loaded, on(&out, &[], device, None), "{target}: on a GPU");
            }
        }
    }
}

/// A GGUF file has the rows of q and k in another order, in which no adapter is trained.
#[test]
fn an_adapter_is_added_to_the_rows_of_a_gguf_file_in_the_models_order() {
    let (lora, mut parts) = (tempfile::tempdir().unwrap(), Tensors::new());
    for (l, (module, rows)) in (0..2).flat_map(|l| [("q_proj", 256), ("k_proj", 128)].map(|m| (l, m))) {
        let noise = |n, salt| aoji::ops::noise(n, 10 * l + rows as u64 + salt).into_iter().map(|x| 0.2 * x).collect();
        let name = format!("base_model.model.model.layers.{l}.self_attn.{module}");
        parts.insert(format!("{name}.lora_A.weight"), (vec![RANK, 256], noise(RANK * 256, 0)));
        parts.insert(format!("{name}.lora_B.weight"), (vec![rows, RANK], noise(rows * RANK, 1)));
    }
    write_adapter(lora.path(), &parts, json!({"target_modules": ["q_proj", "k_proj"]}));
    for dtype in [aoji::Dtype::F32, aoji::Dtype::F16, aoji::Dtype::Bf16] {
        let kind = match dtype {
            aoji::Dtype::F32 => 0,
            aoji::Dtype::F16 => 1,
            aoji::Dtype::Bf16 => 30,
        };
        let place = tempfile::tempdir().unwrap();
        let gguf = place.path().join("model.gguf");
        fs::write(&gguf, crate::tiny_gguf::model(place.path(), &[kind], false).bytes()).unwrap();
        let run = |path: &Path, adapters: &[&Path], quantize: Option<quantize::Options>| {
            logits(&open_on(path, adapters, Options { device: Device::Cpu, quantize, ..Options::default() }).unwrap())
        };
        for quantize in [None, Some("q8_0"), Some("int8")].map(|target| target.map(|t| t.parse().unwrap())) {
            let ours = run(&gguf, &[lora.path()], quantize.clone());
            assert_eq!(
                ours,
                run(&place.path().join("hf"), &[lora.path()], quantize.clone()),
                "{dtype:?}, {quantize:?}"
            );
            assert!(distance(&ours, &run(&gguf, &[], quantize)) > 0.01, "{dtype:?}: the adapter changes nothing");
        }
    }
}

/// Adapters of trainers may have several ranks and only some of the layers; each matrix has its own rank and scale.
#[test]
fn ranks_and_layers_of_their_own() {
    let changes = json!({
        "target_modules": "model\\.layers\\.(0\\..*_proj|1\\.mlp\\.up_proj)", "exclude_modules": ["k_proj"],
        "rank_pattern": {"layers\\.1\\.mlp\\.up_proj": 2, "q_proj": 8}, "alpha_pattern": {"q_proj": 6.0}, "use_rslora": true,
    });
    let rank = |name: &str| match name {
        "model.layers.1.mlp.up_proj" => Some((2, 2.0)),
        "model.layers.0.self_attn.q_proj" => Some((8, 6.0)),
        name if name.starts_with("model.layers.1") || name.ends_with("k_proj") => None,
        _ => Some((RANK, 2.0)),
    };
    let mut parts = BTreeMap::new();
    for (i, (name, rows, cols)) in modules().into_iter().enumerate() {
        let Some((rank, _)) = rank(&name) else { continue };
        let noise = |n, salt| aoji::ops::noise(n, 2 * i as u64 + salt);
        parts.insert(format!("base_model.model.{name}.lora_A.weight"), (vec![rank, cols], noise(rank * cols, 0)));
        parts.insert(format!("base_model.model.{name}.lora_B.weight"), (vec![rows, rank], noise(rows * rank, 1)));
    }
    let (base, lora) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_base(base.path(), aoji::Dtype::F32);
    write_adapter(lora.path(), &parts, changes);
    let out = merge(base.path(), &[(lora.path(), 1.0)]);
    let (before, after) = (values(base.path()), values(out.path()));
    for (name, rows, cols) in modules() {
        let (before, after) = (&before[&format!("{name}.weight")], &after[&format!("{name}.weight")]);
        let Some((rank, alpha)) = rank(&name) else {
            assert_eq!(before, after, "{name}");
            continue;
        };
        let part = |which| &parts[&format!("base_model.model.{name}.{which}.weight")].1;
        let (a, b, scale) = (part("lora_A"), part("lora_B"), alpha / f64::from(rank as u32).sqrt());
        for (i, j) in (0..rows).flat_map(|i| [(i, i % cols), (i, (7 * i + 3) % cols)]) {
            let delta: f64 = (0..rank).map(|k| f64::from(b[i * rank + k]) * f64::from(a[k * cols + j])).sum();
            let (want, got) = (f64::from(before[i * cols + j]) + scale * delta, f64::from(after[i * cols + j]));
            assert!((got - want).abs() < 1e-5, "{name} [{i}, {j}]: {got}, expected {want}");
        }
    }
}

fn files(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The output has the layout of the base as it was opened, also if its index lists only one file, or files that do not exist.
#[test]
fn a_merged_checkpoint_has_the_layout_of_its_base() {
    let (single, lora) = (tempfile::tempdir().unwrap(), adapter(5, json!({})));
    aoji::synth::write(CONFIG, 7, aoji::Dtype::F32, 1 << 30, single.path(), |_, _| {}).unwrap();
    let merged = values(merge(single.path(), &[(lora.path(), 1.0)]).path());
    let one = tempfile::tempdir().unwrap();
    let (file, index) = ("model-00001-of-00001.safetensors", "model.safetensors.index.json");
    fs::copy(single.path().join("model.safetensors"), one.path().join(file)).unwrap();
    fs::copy(single.path().join("config.json"), one.path().join("config.json")).unwrap();
    let mut map: BTreeMap<&str, &str> = merged.keys().map(|name| (name.as_str(), file)).collect();
    map.insert("model.layers.0.self_attn.rotary_emb.inv_freq", file);
    map.insert("model.layers.1.self_attn.rotary_emb.inv_freq", "model-00002-of-00002.safetensors");
    fs::write(one.path().join(index), json!({"weight_map": map}).to_string()).unwrap();
    #[cfg(unix)]
    for name in files(one.path()) {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(one.path().join(name), fs::Permissions::from_mode(0o444)).unwrap();
    }
    let out = merge(one.path(), &[(lora.path(), 1.0)]);
    assert_eq!(files(out.path()), ["config.json", file, index]);
    assert!(values(out.path()) == merged, "other weights through an index than without one");
    for name in files(out.path()) {
        assert!(!fs::metadata(out.path().join(&name)).unwrap().permissions().readonly(), "{name} has the base's mode");
    }

    let several = tempfile::tempdir().unwrap();
    write_base(several.path(), aoji::Dtype::F32);
    let out = merge(several.path(), &[(lora.path(), 1.0)]);
    assert_eq!(files(out.path()), files(several.path()));
    assert!(values(out.path()) == merged, "other weights in several files than in one");
}

#[test]
fn a_merge_that_fails_leaves_nothing() {
    let (base, lora) = (tempfile::tempdir().unwrap(), adapter(5, json!({})));
    write_base(base.path(), aoji::Dtype::F32);
    let mut files = ModelFiles::open(base.path().to_str().unwrap()).unwrap();
    files.add_lora(&LoraSpec { dir: lora.path().into(), scale: 1.0 }).unwrap();
    fs::remove_file(base.path().join("config.json")).unwrap(); // is copied last
    let out = base.path().join("out");
    let error = lora::merge_checkpoint(&files, Output::begin(&out).unwrap(), &mut |_, _| {}).unwrap_err().to_string();
    assert!(error.contains("config.json") && !out.exists(), "{error}");
    fs::write(base.path().join("config.json"), CONFIG).unwrap();
    lora::merge_checkpoint(&files, Output::begin(&out).unwrap(), &mut |_, _| {}).unwrap();
    assert!(out.join("config.json").exists());
}

#[test]
fn what_does_not_fit_is_named() {
    let base = tempfile::tempdir().unwrap();
    write_base(base.path(), aoji::Dtype::Bf16);
    let error = |tensors: &Tensors, changes: Value| -> String {
        let dir = tempfile::tempdir().unwrap();
        write_adapter(dir.path(), tensors, changes);
        let error = open(base.path(), &[dir.path()], Activations::Bf16).expect_err("an adapter that is refused");
        assert!(!matches!(error, Error::Input(_)), "{error}");
        error.to_string()
    };
    let good = tensors(5);
    for (key, value) in [
        ("modules_to_save", json!(["lm_head"])),
        ("bias", json!("lora_only")),
        ("use_dora", json!(true)),
        ("fan_in_fan_out", json!(true)),
        ("init_lora_weights", json!("pissa_niter_4")),
        ("peft_type", json!("IA3")),
        ("alora_invocation_tokens", json!([403, 407])),
    ] {
        let named = value.to_string();
        let message = error(&good, json!({key: value}));
        assert!(message.contains(key), "{message}");
        let inner = named.trim_matches(['[', ']']).rsplit(',').next().unwrap().to_string();
        assert!(message.contains(inner.trim()), "{inner} in {message}");
    }

    let tensor = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight";
    let with = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = good.clone();
        change(&mut tensors);
        error(&tensors, json!({}))
    };
    let message = with(&|t| drop(t.insert(tensor.into(), (vec![RANK, 64], vec![0.0; RANK * 64]))));
    for part in [tensor, "shape [4, 128]", "shape [4, 64]", "someone/base-2-layers"] {
        assert!(message.contains(part), "{part} in {message}");
    }
    let message = with(&|t| drop(t.remove(tensor)));
    assert!(message.contains("layers.1.mlp.up_proj") && message.contains("both lora_A and lora_B"), "{message}");
    let message = with(&|t| {
        let deeper = t[tensor].clone();
        t.insert(tensor.replace("layers.1", "layers.2"), deeper);
    });
    assert!(message.contains("layers.2.mlp") && message.contains("one of the model's 2 layers"), "{message}");
    let message = with(&|t| t.retain(|name, _| name.contains("layers.0")));
    let words = "adapts 7 of the 14 modules that adapter_config.json names, and not model.layers.1.mlp.down_proj";
    assert!(message.contains(words) && message.contains("someone/base-2-layers"), "{message}");
    let message = error(&good, json!({"layers_to_transform": [0]}));
    assert!(message.contains("layers.1.") && message.contains("a module that adapter_config.json names"), "{message}");
    let message = error(&good, json!({"rank_pattern": {"q_proj": 8}}));
    assert!(message.contains("shape [8, 128] for rank 8 and model.layers.0.self_attn.q_proj [128, 128]"), "{message}");
    let message = error(&good, json!({"target_modules": ["q_proj", "embed_tokens"]}));
    assert!(message.contains("target_modules names model.embed_tokens"), "{message}");
    let message = with(&|t| drop(t.insert("base_model.model.lm_head.lora_A.weight".into(), (vec![1], vec![0.0]))));
    assert!(message.contains("lm_head.lora_A") && message.contains("down_proj"), "{message}");

    let pickle = adapter(5, json!({}));
    fs::rename(pickle.path().join("adapter_model.safetensors"), pickle.path().join("adapter_model.bin")).unwrap();
    let message = open(base.path(), &[pickle.path()], Activations::Bf16).err().unwrap().to_string();
    assert!(message.contains("adapter_model.safetensors: is missing; adapter_model.bin beside it"), "{message}");
    let missing = open(base.path(), &[Path::new("/nonexistent")], Activations::Bf16).err().unwrap();
    assert!(missing.to_string().contains("adapter_config.json"), "{missing}");
}
