//! `config.json`: what is read, and what is refused with which error.

use std::path::Path;

use aoji::{Arch, Config, Dtype, Error, Result, RopeScaling, SamplingDefaults};
use serde_json::{Value, json};

const PATH: &str = "model/config.json";

fn base() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": "float32"
    })
}

/// `base` with keys replaced; `Value::Null` stays in the file as `null`.
fn with(changes: Value) -> Result<Config> {
    let mut config = base();
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    Config::from_json(Path::new(PATH), &config.to_string(), None)
}

fn without(key: &str) -> Result<Config> {
    let mut config = base();
    config.as_object_mut().unwrap().remove(key);
    Config::from_json(Path::new(PATH), &config.to_string(), None)
}

/// Asserts that the result is a `File` error whose text has all of `words`.
#[track_caller]
fn refused(result: Result<Config>, words: &[&str]) {
    let error = result.expect_err("must be refused");
    assert!(matches!(error, Error::File { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.starts_with(PATH), "{text}");
    for word in words {
        assert!(text.contains(word), "{text:?} lacks {word:?}");
    }
}

#[track_caller]
fn unsupported(result: Result<Config>, words: &[&str]) {
    let error = result.expect_err("must be refused");
    assert!(matches!(error, Error::Unsupported { .. }), "{error:?}");
    let text = error.to_string();
    for word in words.iter().chain(&["supported"]) {
        assert!(text.contains(word), "{text:?} lacks {word:?}");
    }
}

#[test]
fn reads_every_field() {
    let config = with(json!({})).unwrap();
    let expected = Config {
        arch: Arch {
            name: "LlamaForCausalLM",
            qkv_bias: false,
            o_bias: false,
            ffn_bias: false,
            qk_norm: false,
            windows: vec![None; 5],
        },
        dim: 64,
        ffn_dim: 172,
        n_layers: 5,
        n_heads: 8,
        n_kv_heads: 4,
        head_dim: 8,
        vocab: 512,
        max_seq: 512,
        norm_eps: 1e-5,
        rope_theta: 10000.0,
        rope_scaling: None,
        rope_factors: Vec::new(),
        tied: true,
        bos: Some(1),
        eos: vec![2],
        dtype: Dtype::F32,
        sampling: SamplingDefaults::default(),
    };
    assert_eq!(config, expected);
    assert_eq!((config.q_dim(), config.kv_dim(), config.group()), (64, 32, 2));
    assert_eq!(config.params(), 260_032); // the published count of stories260K
    assert_eq!(config.weight_bytes(), 520_064);
}

#[test]
fn absent_and_null_keys_mean_transformers_defaults() {
    for null in [false, true] {
        let defaults = |key: &str| if null { with(json!({ key: null })) } else { without(key) }.unwrap();
        assert_eq!(defaults("num_key_value_heads").n_kv_heads, 8);
        assert_eq!(defaults("head_dim").head_dim, 8);
        assert_eq!(defaults("max_position_embeddings").max_seq, 2048);
        assert_eq!(defaults("rms_norm_eps").norm_eps, 1e-6);
        assert_eq!(defaults("rope_theta").rope_theta, 10000.0);
        assert_eq!(defaults("rope_scaling").rope_scaling, None);
        assert!(!defaults("tie_word_embeddings").tied);
        assert_eq!(defaults("bos_token_id").bos, None);
        assert_eq!(defaults("eos_token_id").eos, Vec::<u32>::new());
        assert_eq!(defaults("torch_dtype").dtype, Dtype::F32);
        assert_eq!(defaults("hidden_act").dim, 64);
        assert_eq!(defaults("architectures").dim, 64);
        assert_eq!(defaults("model_type").dim, 64);
    }
}

#[test]
fn newer_spellings() {
    let config = with(json!({
        "dtype": "bfloat16", "torch_dtype": null, "head_dim": 16, "rope_theta": null,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000}
    }))
    .unwrap();
    assert_eq!((config.dtype, config.head_dim, config.q_dim()), (Dtype::Bf16, 16, 128));
    assert_eq!((config.rope_theta, config.rope_scaling), (500000.0, None));
}

#[test]
fn missing_size() {
    for key in ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"] {
        refused(without(key), &[key, "missing"]);
        refused(with(json!({ key: null })), &[key, "missing"]);
    }
}

#[test]
fn zero_negative_fractional_and_huge_sizes() {
    let sizes = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "max_position_embeddings",
    ];
    for key in sizes {
        for value in [json!(0), json!(-1), json!(1.5), json!("64"), json!(u64::MAX), json!(1e300), json!([64])] {
            refused(with(json!({ key: value.clone() })), &[key, &value.to_string(), "whole number from 1"]);
        }
    }
}

#[test]
fn the_largest_accepted_sizes_do_not_overflow() {
    let max = 1 << 24;
    let config = with(json!({
        "hidden_size": max, "intermediate_size": max, "num_hidden_layers": 1024, "num_attention_heads": max / 2,
        "num_key_value_heads": max / 2, "head_dim": 2, "vocab_size": max
    }))
    .unwrap();
    assert_eq!(config.q_dim(), max);
    assert!(config.weight_bytes() > 1 << 60);
}

#[test]
fn heads_that_do_not_divide() {
    refused(with(json!({"num_key_value_heads": 3})), &["num_attention_heads (8)", "num_key_value_heads (3)"]);
    refused(with(json!({"num_key_value_heads": 16})), &["num_attention_heads (8)", "num_key_value_heads (16)"]);
    refused(with(json!({"hidden_size": 60})), &["hidden_size (60)", "num_attention_heads (8)", "head_dim"]);
    assert_eq!(with(json!({"hidden_size": 60, "head_dim": 8})).unwrap().head_dim, 8);
}

#[test]
fn head_dim_odd() {
    refused(with(json!({"head_dim": 7})), &["head_dim is 7", "even"]);
    refused(with(json!({"hidden_size": 72})), &["head_dim is 9", "even"]);
}

#[test]
fn heads_together_too_wide() {
    refused(with(json!({"num_attention_heads": 1 << 20, "head_dim": 1 << 20})), &["exceeds"]);
}

#[test]
fn other_architectures() {
    unsupported(
        with(json!({"architectures": ["Gemma3ForCausalLM"]})),
        &["Gemma3", "LlamaForCausalLM", "Qwen3ForCausalLM"],
    );
    unsupported(with(json!({"architectures": []})), &["LlamaForCausalLM"]);
    unsupported(with(json!({"architectures": "LlamaForCausalLM"})), &["LlamaForCausalLM"]);
    unsupported(with(json!({"model_type": "qwen2_moe"})), &["qwen2_moe", "\"llama\""]);
    refused(with(json!({"model_type": "qwen2"})), &["LlamaForCausalLM", "\"qwen2\"", "the same"]);
    unsupported(with(json!({"model_type": null, "architectures": null})), &["LlamaForCausalLM"]);
}

#[test]
fn biases() {
    let has = |changes| {
        let arch = with(changes).unwrap().arch;
        [arch.qkv_bias, arch.o_bias, arch.ffn_bias]
    };
    assert_eq!(has(json!({"attention_bias": true})), [true, true, false]);
    assert_eq!(has(json!({"mlp_bias": true})), [false, false, true]);
    let params = |changes| with(changes).unwrap().params();
    assert_eq!(params(json!({"attention_bias": true, "mlp_bias": true})), 260_032 + 5 * (64 + 64 + 64 + 2 * 172 + 64));
    refused(with(json!({"mlp_bias": 1})), &["mlp_bias is 1", "true or false"]);
    assert!(with(json!({"attention_bias": false, "mlp_bias": null})).is_ok());
}

/// A config of another architecture, with `base`'s sizes.
fn of(arch: &str, model_type: &str, changes: Value) -> Result<Config> {
    let mut all = json!({"architectures": [arch], "model_type": model_type});
    all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    with(all)
}

#[test]
fn mistral() {
    let mistral = |changes| of("MistralForCausalLM", "mistral", changes);
    assert_eq!(mistral(json!({})).unwrap().arch.windows, [Some(4096); 5]); // transformers' own where it is absent
    assert_eq!(mistral(json!({"sliding_window": null})).unwrap().arch.windows, [None; 5]);
    let config = mistral(json!({"sliding_window": 100, "attention_bias": true})).unwrap(); // a key that is none of Mistral's
    assert_eq!((config.arch.windows.clone(), config.arch.qkv_bias), (vec![Some(100); 5], false));
    assert_eq!((config.arch.window(0, 64), config.arch.window(0, 512)), (64, 100));
    assert_eq!(config.arch.to_string(), "MistralForCausalLM: all layers see the last 100 tokens");
    for value in [json!(0), json!(-1), json!("x")] {
        refused(mistral(json!({"sliding_window": value.clone()})), &["sliding_window", &value.to_string()]);
    }
}

#[test]
fn qwen2() {
    let qwen = |changes| of("Qwen2ForCausalLM", "qwen2", changes);
    let windows = |changes| qwen(changes).unwrap().arch.windows;
    let plain = qwen(json!({"sliding_window": 7, "max_window_layers": 0})).unwrap(); // use_sliding_window is absent
    assert_eq!((&plain.arch.windows[..], plain.arch.qkv_bias, plain.arch.o_bias), (&[None; 5][..], true, false));
    assert_eq!(plain.arch.to_string(), "Qwen2ForCausalLM: biases on q, k and v");
    let used = json!({"use_sliding_window": true, "sliding_window": 7, "max_window_layers": 3});
    assert_eq!(windows(used), [None, None, None, Some(7), Some(7)]);
    assert_eq!(windows(json!({"use_sliding_window": true, "sliding_window": 7})), [None; 5]); // from layer 28 on
    assert_eq!(windows(json!({"use_sliding_window": true, "max_window_layers": 0})), [Some(4096); 5]);
    refused(qwen(json!({"max_window_layers": -1})), &["max_window_layers is -1"]);
}

#[test]
fn qwen3() {
    let qwen = |changes| of("Qwen3ForCausalLM", "qwen3", changes);
    let config = qwen(json!({})).unwrap();
    assert_eq!((config.head_dim, config.arch.qk_norm, config.arch.qkv_bias), (128, true, false));
    assert_eq!(config.params(), of("LlamaForCausalLM", "llama", json!({"head_dim": 128})).unwrap().params() + 5 * 256);
    let types = json!(["full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]);
    let all = json!({"attention_bias": true, "use_sliding_window": true, "sliding_window": 9, "layer_types": types});
    let config = qwen(all).unwrap();
    assert_eq!(config.arch.windows, [None, Some(9), None, Some(9), None]);
    let text = "Qwen3ForCausalLM: biases on q, k and v, o; q and k heads normed; 2 of 5 layers see the last 9 tokens";
    assert_eq!(config.arch.to_string(), text);
    refused(qwen(json!({"layer_types": types})), &["sliding_attention", "use_sliding_window"]);
    for wrong in
        [json!(["full_attention"]), json!("full_attention"), json!(["a", "b", "c", "d", "e"]), json!([1, 2, 3, 4, 5])]
    {
        refused(qwen(json!({"layer_types": wrong})), &["layer_types", "each of 5 layers"]);
    }
}

#[test]
fn absent_heads_of_keys_are_those_of_the_architecture() {
    let heads = |arch: &str, model_type: &str, null: bool| {
        let mut config = base();
        let map = config.as_object_mut().unwrap();
        map.extend([("architectures".into(), json!([arch])), ("model_type".into(), json!(model_type))]);
        map.extend([("num_attention_heads".into(), json!(64)), ("head_dim".into(), json!(2))]);
        map.remove("num_key_value_heads");
        if null {
            map.insert("num_key_value_heads".into(), Value::Null);
        }
        Config::from_json(Path::new(PATH), &config.to_string(), None).unwrap().n_kv_heads
    };
    assert_eq!([false, true].map(|null| heads("MistralForCausalLM", "mistral", null)), [8, 64]);
    assert_eq!([false, true].map(|null| heads("Qwen3ForCausalLM", "qwen3", null)), [32, 64]);
}

#[test]
fn other_variants() {
    unsupported(with(json!({"hidden_act": "gelu"})), &["gelu", "silu"]);
    unsupported(with(json!({"partial_rotary_factor": 0.5})), &["partial_rotary_factor 0.5"]);
    unsupported(
        with(json!({"rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}})),
        &["rope_scaling.partial"],
    );
}

/// Every tensor carries its own type.
#[test]
fn a_declared_type_that_no_tensor_has_refuses_nothing() {
    for name in ["auto", "float64", "float8_e4m3fn", "torch.bfloat16", "int8"] {
        assert_eq!(with(json!({"torch_dtype": name})).unwrap().dtype, Dtype::F32);
        assert_eq!(with(json!({"dtype": name, "torch_dtype": "bfloat16"})).unwrap().dtype, Dtype::F32);
    }
    refused(with(json!({"torch_dtype": 16})), &["torch_dtype is 16", "string"]);
}

#[test]
fn numbers_of_python() {
    let read = |config: &str, generation: &str| {
        let config = base().to_string().replacen('{', &format!("{{{config}"), 1);
        Config::from_json(Path::new(PATH), &config, Some(generation))
    };
    let config =
        read(r#""initializer_range": NaN, "x": [-Infinity], "#, r#"{"temperature": Infinity, "eos_token_id": 5}"#);
    let config = config.unwrap();
    assert_eq!((config.eos, config.sampling), (vec![5], SamplingDefaults::default()));
    let mut config = base();
    config["rms_norm_eps"] = json!("it");
    let config = config.to_string().replace("\"it\"", "NaN");
    refused(Config::from_json(Path::new(PATH), &config, None), &["rms_norm_eps is \"NaN\"", "number"]);
}

#[test]
fn norm_eps_and_theta_out_of_range() {
    refused(with(json!({"rms_norm_eps": -1.0})), &["rms_norm_eps is -1"]);
    refused(with(json!({"rms_norm_eps": "small"})), &["rms_norm_eps is \"small\"", "number"]);
    refused(with(json!({"rope_theta": 0})), &["rope_theta is 0"]);
    refused(with(json!({"rope_theta": 1e300})), &["rope_theta is 1"]);
}

#[test]
fn eos_number_list_and_repeats() {
    assert_eq!(with(json!({"eos_token_id": [2, 3, 2]})).unwrap().eos, [2, 3]);
    // ids that no token has are left out
    assert_eq!(with(json!({"eos_token_id": [2, 512, -1, 1e3 as u64]})).unwrap().eos, [2]);
    assert_eq!(with(json!({"eos_token_id": -1, "bos_token_id": 4_000_000_000u64})).unwrap().bos, None);
    refused(with(json!({"eos_token_id": [2, 2.5]})), &["eos_token_id is 2.5"]);
    refused(with(json!({"bos_token_id": "<s>"})), &["bos_token_id is \"<s>\""]);
}

#[test]
fn generation_config_wins_where_it_speaks() {
    let read = |generation: &str| Config::from_json(Path::new(PATH), &base().to_string(), Some(generation));
    assert_eq!(read(r#"{"eos_token_id": [5, 6, 5]}"#).unwrap().eos, [5, 6]);
    assert_eq!(read(r#"{"eos_token_id": null, "bos_token_id": 7}"#).unwrap().eos, [2]);
    assert_eq!(read(r#"{"bos_token_id": 7}"#).unwrap().bos, Some(7));
    assert_eq!(read(r#"{"eos_token_id": [512, -1]}"#).unwrap().eos, [2]);
    for (text, word) in [(r#"{"eos_token_id": "a"}"#, "eos_token_id is \"a\""), ("[]", "object"), ("", "JSON")] {
        let error = read(text).unwrap_err().to_string();
        assert!(error.starts_with("model/generation_config.json") && error.contains(word), "{error}");
    }
}

#[test]
fn not_json() {
    for text in ["", "{", "\u{feff}", "{\"rms_norm_eps\": nan}", "null", "[1]"] {
        refused(Config::from_json(Path::new(PATH), text, None), &["JSON"]);
    }
    let deep = "[".repeat(100_000);
    refused(Config::from_json(Path::new(PATH), &deep, None), &["JSON"]);
}

#[test]
fn long_values_are_cut_in_errors() {
    let error = with(json!({"hidden_size": "한".repeat(10_000)})).unwrap_err().to_string();
    assert!(error.len() < 400, "{} bytes", error.len());
}

#[test]
fn no_config_in_directory() {
    let dir = tempfile::tempdir().unwrap();
    let error = Config::from_dir(dir.path()).unwrap_err();
    assert!(matches!(&error, Error::Io { path, .. } if path.ends_with("config.json")), "{error:?}");
}

const LLAMA3_SCALING: RopeScaling =
    RopeScaling::Llama3 { factor: 32.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max_seq: 8192 };

#[test]
fn rope_scaling_spellings() {
    let keys = json!({
        "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192
    });
    for spelling in ["rope_type", "type"] {
        let mut scaling = keys.clone();
        scaling[spelling] = json!("llama3");
        assert_eq!(with(json!({"rope_scaling": scaling})).unwrap().rope_scaling, Some(LLAMA3_SCALING));
        assert_eq!(with(json!({"rope_scaling": {spelling: "default"}})).unwrap().rope_scaling, None);
        let linear = with(json!({"rope_scaling": {spelling: "linear", "factor": 2}})).unwrap();
        assert_eq!(linear.rope_scaling, Some(RopeScaling::Linear { factor: 2.0 }));
        for other in ["longrope", "su", "mrope"] {
            unsupported(with(json!({"rope_scaling": {spelling: other, "factor": 2}})), &[other, "llama3"]);
        }
    }
}

#[test]
fn rope_scaling_wrong() {
    let llama3 = |changes: Value| {
        let mut scaling = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192
        });
        scaling.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        with(json!({"rope_scaling": scaling}))
    };
    assert!(llama3(json!({})).is_ok());
    for key in ["factor", "low_freq_factor", "high_freq_factor"] {
        refused(llama3(json!({ key: null })), &[key, "missing"]);
    }
    refused(llama3(json!({"factor": 0.5})), &["factor 0.5"]);
    refused(llama3(json!({"low_freq_factor": 0.0})), &["low_freq_factor 0"]);
    refused(llama3(json!({"high_freq_factor": 1.0})), &["low_freq_factor < high_freq_factor"]);
    for kind in ["linear", "dynamic"] {
        refused(with(json!({"rope_scaling": {"type": kind}})), &["rope_scaling.factor is missing", kind]);
    }
    for kind in ["linear", "dynamic", "yarn"] {
        for factor in [0.0, -1.0, 1e300] {
            refused(
                with(json!({"rope_parameters": {"type": kind, "factor": factor}})),
                &["rope_parameters.factor is "],
            );
        }
    }
    for key in ["attention_factor", "beta_fast", "beta_slow"] {
        refused(with(json!({"rope_scaling": {"type": "yarn", "factor": 2.0, key: -1.0}})), &[key, "is -1"]);
    }
    refused(with(json!({"rope_theta": 1.0, "rope_scaling": {"type": "yarn", "factor": 2.0}})), &["rope_theta above 1"]);
    refused(with(json!({"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}})), &["head_dim above 2"]);
    refused(with(json!({"rope_scaling": "llama3"})), &["rope_scaling is \"llama3\"", "object"]);
}

/// Bit patterns of transformers' `inv_freq`, computed with PyTorch by the formulas of its `modeling_rope_utils.py`.
/// Ours may be two units in the last place apart (the two `powf` differ by one).
#[test]
fn rotary_frequencies_equal_pytorch() {
    let check = |changes: Value, every: usize, expected: &[u32]| {
        let freq = with(changes).unwrap().rope_inv_freq();
        for (i, &bits) in expected.iter().enumerate() {
            let (ours, theirs) = (freq[i * every], f32::from_bits(bits));
            assert!(ours.to_bits().abs_diff(bits) <= 2, "frequency {}: {ours} for {theirs}", i * every);
        }
        assert_eq!(freq.len(), expected.len() * every);
    };
    check(json!({}), 1, &[1065353216, 1036831949, 1008981770, 981668463]);
    let llama3_8b = [
        1065353216, 1054963644, 1044812720, 1034871981, 1025116360, 1015523779, 1005516623, 995260192, 985226529,
        975389069, 965724408, 956122563, 945754308, 935622160, 925697959, 915956903,
    ];
    check(json!({"head_dim": 128, "rope_theta": 500000.0}), 4, &llama3_8b);
    let llama32_1b = [
        1065353216, 1059709382, 1054963644, 1049992931, 1044812720, 1040434848, 1034871981, 1030233703, 1025116360,
        1020030793, 1015523779, 1010044269, 1005516623, 1000248322, 995260192, 984164251, 971060768, 952867063,
        933446029, 928558209, 923781368, 918476020, 914179523, 908595819, 903811268, 898893515, 893679120, 889347892,
        883754919, 879076685, 874013863, 868893104,
    ];
    let scaling = json!({
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192
    });
    check(json!({"head_dim": 64, "rope_theta": 500000.0, "rope_scaling": scaling}), 1, &llama32_1b);
}

#[test]
fn what_the_author_recommends_for_sampling() {
    let read = |generation: &str| {
        Config::from_json(Path::new(PATH), &base().to_string(), Some(generation))
            .unwrap_or_else(|e| panic!("{e}"))
            .sampling
    };
    let none = SamplingDefaults::default();
    let llama3 = read(r#"{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "max_length": 4096}"#);
    assert_eq!(llama3, SamplingDefaults { temperature: Some(0.6), top_p: Some(0.9), ..none.clone() });
    assert_eq!(llama3.to_string(), "temperature 0.6, top_p 0.9");
    let all = r#"{"temperature": 1, "top_k": 40, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.1, "max_new_tokens": 7,
        "num_beams": 4, "typical_p": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": [], "guidance_scale": null}"#;
    let text = "temperature 1, top_k 40, top_p 0.5, min_p 0.1, repetition_penalty 1.1, max_new_tokens 7 (num_beams not supported)";
    assert_eq!(read(all).to_string(), text);
    // greedy is a recommendation too, and what would shape a choice is none then
    let greedy =
        read(r#"{"do_sample": false, "temperature": 0.6, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.2}"#);
    assert_eq!(greedy.to_string(), "temperature 0, repetition_penalty 1.2");
    assert_eq!(read(r#"{"do_sample": true}"#).temperature, Some(1.0));
    for (text, is_none) in
        [("{}", true), (r#"{"eos_token_id": 2, "do_sample": null}"#, true), (r#"{"top_k": 0}"#, false)]
    {
        assert_eq!(read(text) == none, is_none, "{text}");
    }
    // what is out of range is left out, and the model runs
    for wrong in ["-0.5", "NaN", "\"hot\"", "1e9", "[]", "true"] {
        let keys = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens"];
        let keys =
            keys.map(|k| format!("\"{k}\": {}", if k == "top_k" || k == "max_new_tokens" { "-0.5" } else { wrong }));
        assert_eq!(read(&format!("{{{}}}", keys.join(", "))), none, "{wrong}");
    }
}

#[test]
fn published_llama3_8b() {
    let Some(dir) = crate::common::data("llama3-8b-published") else { return };
    let config = Config::from_dir(&dir).unwrap();
    assert_eq!((config.dim, config.ffn_dim, config.n_layers, config.vocab), (4096, 14336, 32, 128256));
    assert_eq!((config.n_heads, config.n_kv_heads, config.head_dim, config.max_seq), (32, 8, 128, 8192));
    assert_eq!((config.rope_theta, config.norm_eps, config.dtype), (500000.0, 1e-5, Dtype::Bf16));
    assert_eq!((config.bos, config.eos.as_slice(), config.tied), (Some(128000), &[128001][..], false));
    assert_eq!(config.weight_bytes(), 16_060_522_496); // total_size of the published index
    assert_eq!((config.sampling.temperature, config.sampling.top_p), (Some(0.6), Some(0.9)));
}
