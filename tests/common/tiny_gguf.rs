//! A random GGUF model with a matrix of every type, and the same weights as Hugging Face has them.
#![allow(dead_code)] // each test file uses a part of it

use super::gguf_file::{File, Val};
use aoji::format::BLOCKS;
use half::{bf16, f16};
use serde_json::{Map, Value, json};
use std::{fs, path::Path};

pub const DIM: usize = 256;
pub const VOCAB: usize = 320;
const FFN: usize = 512;
const HEADS: [usize; 2] = [4, 2];
const HEAD: usize = 64;
const LAYERS: usize = 2;

/// A generator of pseudo-random numbers (Knuth's MMIX).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    /// A number from -1 to 1.
    fn unit(&mut self) -> f32 {
        self.next() as f32 / (1u64 << 30) as f32 - 1.0
    }
}

/// The bytes of `n` weights of the type with this number, and their values, which are near 0 like those of a trained model.
fn weights(random: &mut Random, kind: u32, n: usize) -> (Vec<u8>, Vec<f32>) {
    let plain: Vec<f32> = (0..n).map(|_| 0.1 * random.unit()).collect();
    match kind {
        0 => return (plain.iter().flat_map(|x| x.to_le_bytes()).collect(), plain),
        1 => {
            let halves: Vec<f16> = plain.iter().map(|x| f16::from_f32(*x)).collect();
            return (
                halves.iter().flat_map(|x| x.to_le_bytes()).collect(),
                halves.iter().map(|x| x.to_f32()).collect(),
            );
        }
        30 => {
            let halves: Vec<bf16> = plain.iter().map(|x| bf16::from_f32(*x)).collect();
            return (
                halves.iter().flat_map(|x| x.to_le_bytes()).collect(),
                halves.iter().map(|x| x.to_f32()).collect(),
            );
        }
        _ => {}
    }
    let block = BLOCKS.into_iter().find(|block| block.id == kind).unwrap();
    let mut bytes: Vec<u8> = (0..n / block.weights * block.bytes).map(|_| random.next() as u8).collect();
    // the largest code, times the largest scale of the K types
    let inner = if block.name == "Q6_K" {
        127.0
    } else if block.weights == 256 {
        63.0
    } else {
        1.0
    };
    let d = 0.2 / (1u32 << block.bits) as f32 / inner;
    for block_bytes in bytes.chunks_exact_mut(block.bytes) {
        let at = if block.name == "Q6_K" { 208 } else { 0 };
        block_bytes[at..at + 2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
        if block.offset {
            let offset = if block.weights == 256 { 0.1 / 63.0 } else { -0.1 };
            block_bytes[2..4].copy_from_slice(&f16::from_f32(offset).to_le_bytes());
        }
    }
    let mut values = vec![0f32; n];
    block.values(&bytes, &mut values);
    (bytes, values)
}

/// Reorders the rows of heads: pairs that are neighbours come apart into two halves.
fn halves_apart(values: &[f32], cols: usize) -> Vec<f32> {
    let mut out = vec![0f32; values.len()];
    for (i, row) in values.chunks_exact(cols).enumerate() {
        let (head, i) = (i / HEAD, i % HEAD);
        let to = head * HEAD + i / 2 + i % 2 * (HEAD / 2);
        out[to * cols..(to + 1) * cols].copy_from_slice(row);
    }
    out
}

/// The keys of the model.
pub fn keys(file: &mut File) {
    file.set("general.architecture", Val::Str("llama"));
    file.set("llama.block_count", Val::U32(LAYERS as u32));
    file.set("llama.context_length", Val::U32(128));
    file.set("llama.embedding_length", Val::U32(DIM as u32));
    file.set("llama.feed_forward_length", Val::U32(FFN as u32));
    file.set("llama.attention.head_count", Val::U32(HEADS[0] as u32));
    file.set("llama.attention.head_count_kv", Val::U32(HEADS[1] as u32));
    file.set("llama.attention.layer_norm_rms_epsilon", Val::F32(1e-5));
    file.set("llama.rope.freq_base", Val::F32(10000.0));
    file.set("llama.rope.dimension_count", Val::U32(HEAD as u32));
}

/// Writes the model to `hf/`, and returns the GGUF file. The matrices take the types of the list in turn.
pub fn model(dir: &Path, types: &[u32], tied: bool) -> File {
    let mut file = File::default();
    keys(&mut file);
    let (mut random, mut types) = (Random(15), types.iter().cycle());
    let (mut header, mut data) = (Map::new(), Vec::new());
    let mut add = |name: &str, hf: String, shape: &[usize], rotates: bool| {
        let n: usize = shape.iter().product();
        let kind = if shape.len() == 1 { 0 } else { *types.next().unwrap() };
        let (mut bytes, mut values) = weights(&mut random, kind, n);
        if shape.len() == 1 {
            values.iter_mut().for_each(|x| *x += 1.0);
            bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        }
        if rotates {
            values = halves_apart(&values, shape[1]);
        }
        header.insert(hf, json!({"dtype": "F32", "shape": shape, "data_offsets": [data.len(), data.len() + 4 * n]}));
        data.extend(values.iter().flat_map(|x| x.to_le_bytes()));
        file.tensors.push((format!("{name}.weight"), shape.to_vec(), kind, bytes));
    };
    let [q, kv] = HEADS.map(|n| n * HEAD);
    add("token_embd", "model.embed_tokens.weight".into(), &[VOCAB, DIM], false);
    for l in 0..LAYERS {
        let mut add = |name: &str, hf: &str, shape: &[usize], rotates| {
            add(&format!("blk.{l}.{name}"), format!("model.layers.{l}.{hf}.weight"), shape, rotates);
        };
        add("attn_norm", "input_layernorm", &[DIM], false);
        add("attn_q", "self_attn.q_proj", &[q, DIM], true);
        add("attn_k", "self_attn.k_proj", &[kv, DIM], true);
        add("attn_v", "self_attn.v_proj", &[kv, DIM], false);
        add("attn_output", "self_attn.o_proj", &[DIM, q], false);
        add("ffn_norm", "post_attention_layernorm", &[DIM], false);
        add("ffn_gate", "mlp.gate_proj", &[FFN, DIM], false);
        add("ffn_up", "mlp.up_proj", &[FFN, DIM], false);
        add("ffn_down", "mlp.down_proj", &[DIM, FFN], false);
    }
    add("output_norm", "model.norm.weight".into(), &[DIM], false);
    if !tied {
        add("output", "lm_head.weight".into(), &[VOCAB, DIM], false);
    }
    let header = Value::Object(header).to_string();
    let hf = dir.join("hf");
    fs::create_dir_all(&hf).unwrap();
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
    fs::write(hf.join("model.safetensors"), bytes).unwrap();
    let config = json!({"model_type": "llama", "hidden_size": DIM, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS[0], "num_key_value_heads": HEADS[1], "head_dim": HEAD, "vocab_size": VOCAB,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": tied});
    fs::write(hf.join("config.json"), config.to_string()).unwrap();
    file
}
