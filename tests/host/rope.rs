//! Rotary frequencies of every kind of scaling, compared with those of transformers.

use aoji::{Config, RopeScaling, ops::Rope};
use serde_json::{Value, json};
use std::path::Path;

fn config(keys: &Value) -> Config {
    let mut all = json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2,
        "vocab_size": 100
    });
    all.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    Config::from_json(Path::new("config.json"), &all.to_string(), None).unwrap_or_else(|e| panic!("{keys}: {e}"))
}

/// `rope.json` has the results of transformers 5.2's `modeling_rope_utils.py` for the keys of a config.json: the bits
/// of the frequencies at some positions, and the attention factor. Ours may be four units in the last place apart:
/// their `powf` is off by one or two, and YaRN blends two of its results.
#[test]
fn frequencies_are_those_of_transformers() {
    let cases: Value = serde_json::from_str(include_str!("rope.json")).unwrap();
    for case in cases.as_array().unwrap() {
        let config = config(&case["keys"]);
        for (position, bits) in case["at"].as_object().unwrap() {
            let ours = config.rope_inv_freq_at(position.parse().unwrap());
            assert_eq!(ours.len(), bits.as_array().unwrap().len());
            for (i, (ours, bits)) in ours.iter().zip(bits.as_array().unwrap()).enumerate() {
                let theirs = bits.as_u64().unwrap() as u32;
                let apart = ours.to_bits().abs_diff(theirs);
                let theirs = f32::from_bits(theirs);
                assert!(apart <= 4, "{}: position {position}, frequency {i}: {ours} for {theirs}", case["keys"]);
            }
        }
        let factor = case["attention_factor"].as_f64().unwrap();
        assert_eq!(config.rope_attention_factor(), factor as f32, "{}", case["keys"]);
    }
}

#[test]
fn the_table_has_the_frequencies_of_each_position_times_the_attention_factor() {
    for scaling in [
        json!(null),
        json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
        json!({"rope_type": "dynamic", "factor": 3.0}),
    ] {
        let config = config(&json!({"max_position_embeddings": 64, "rope_scaling": scaling}));
        let (half, factor) = (config.head_dim / 2, config.rope_attention_factor());
        let table = Rope::table_of(&config, 150);
        assert_eq!(table.len(), 150 * config.head_dim);
        for (t, row) in table.chunks(config.head_dim).enumerate() {
            for (i, freq) in config.rope_inv_freq_at(t).into_iter().enumerate() {
                let angle = f64::from(t as f32 * freq);
                assert_eq!(row[i], angle.cos() as f32 * factor, "{scaling} position {t}");
                assert_eq!(row[half + i], angle.sin() as f32 * factor, "{scaling} position {t}");
            }
        }
        // A table is the beginning of a longer one: what is computed of a text does not depend on how long it may become.
        assert!(table.starts_with(&Rope::table_of(&config, 70)));
    }
}

#[test]
fn the_longest_context_is_the_stretched_one() {
    let max_seq = |keys: Value| config(&keys).max_seq;
    assert_eq!(max_seq(json!({"max_position_embeddings": 4096})), 4096);
    for kind in ["linear", "dynamic"] {
        let scaling = json!({"type": kind, "factor": 4.0});
        assert_eq!(max_seq(json!({"max_position_embeddings": 4096, "rope_scaling": scaling})), 16384);
    }
    let yarn = json!({"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096});
    assert_eq!(max_seq(json!({"max_position_embeddings": 65536, "rope_scaling": yarn})), 65536);
    assert_eq!(max_seq(json!({"max_position_embeddings": 4096, "rope_scaling": yarn})), 65536);
    let huge = json!({"type": "linear", "factor": 1e6});
    assert_eq!(max_seq(json!({"max_position_embeddings": 1 << 20, "rope_scaling": huge})), 1 << 24);
    let yarn = config(&json!({"rope_scaling": {"type": "yarn", "factor": 2.0}})).rope_scaling.unwrap();
    assert!(matches!(yarn, RopeScaling::Yarn { original_max_seq: 2048, truncate: true, .. }), "{yarn:?}");
    assert_eq!(yarn.to_string(), "scaled by 2 beyond 2048 tokens (yarn, fast 32, slow 1, attention factor 1.0693)");
}
