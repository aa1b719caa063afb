//! Weights that stay quantized on the device: each kind in each product is compared with its definition, and the bits of a row must
//! not depend on the others. Whole models are compared with the same models with widened weights (converted to bf16).

use crate::{ptx, tiny_gguf};
use aoji::{
    Device, Engine, KvDtype, ModelFiles, Options, Session, Tensor,
    backend::{Backend, DECODE_ROWS, Out, SamplerState},
    cuda::{Cuda, GemmBy, Kind, kernels::MODULES},
    ops::{Gemm, Gemv, NormGateUp, NormHead, NormHeadArgmax, NormQkvRopeAppend, PAGE, Tolerance, noise},
};
use half::bf16;
use serde_json::{Map, Value, json};
use std::{collections::BTreeSet, fs, path::Path};

/// The GPU when `AOJI_TEST_GPU=1`, else the emulated one; our own kernels.
fn device() -> Cuda {
    if std::env::var_os("AOJI_TEST_GPU").is_none_or(|v| v != "1") {
        cuda_emulator::install();
    }
    let mut cuda = Cuda::open(0).expect("a device");
    cuda.set_gemm(GemmBy::Own);
    cuda
}

const DIM: usize = 256;
/// Sizes of the feed-forward part of the checkpoints: with one, the last stage of a row of `w_down` is not full; with
/// the other, it is a whole number of groups.
const FFN: [usize; 2] = [200, 384];
const VOCAB: usize = 64;

/// Writes a checkpoint of one layer with compressed-tensors of a format.
fn checkpoint(dir: &Path, format: &str, weights: Value, ffn: usize) {
    let config = json!({"model_type": "llama", "hidden_size": DIM, "intermediate_size": ffn, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128, "tie_word_embeddings": true,
        "quantization_config": {"quant_method": "compressed-tensors", "format": format, "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}});
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let (mut header, mut data) = (Map::new(), Vec::<u8>::new());
    let mut state = 1u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    };
    let mut add = |name: String, dtype: &str, shape: &[usize], bytes: Vec<u8>| {
        header.insert(
            name,
            json!({"dtype": dtype, "shape": shape, "data_offsets": [data.len(), data.len() + bytes.len()]}),
        );
        data.extend(bytes);
    };
    let plain = |n: usize, seed, add: f32| -> Vec<u8> {
        noise(n, seed).into_iter().flat_map(|x| bf16::from_f32(add + 0.2 * x).to_le_bytes()).collect()
    };
    add("model.embed_tokens.weight".into(), "BF16", &[VOCAB, DIM], plain(VOCAB * DIM, 1, 0.0));
    add("model.norm.weight".into(), "BF16", &[DIM], plain(DIM, 2, 1.0));
    for name in ["input_layernorm", "post_attention_layernorm"] {
        add(format!("model.layers.0.{name}.weight"), "BF16", &[DIM], plain(DIM, 3, 1.0));
    }
    let matrices = [
        ("self_attn.q_proj", 256, DIM),
        ("self_attn.k_proj", 128, DIM),
        ("self_attn.v_proj", 128, DIM),
        ("self_attn.o_proj", DIM, 256),
        ("mlp.gate_proj", ffn, DIM),
        ("mlp.up_proj", ffn, DIM),
        ("mlp.down_proj", DIM, ffn),
    ];
    for (name, rows, cols) in matrices {
        let part = |part: &str| format!("model.layers.0.{name}.{part}");
        let groups = if format == "pack-quantized" { cols / 128 } else { 1 };
        let largest = if format == "float-quantized" {
            2.0
        } else if groups > 1 {
            8.0
        } else {
            127.0
        };
        let scales: Vec<u8> = noise(rows * groups, 4)
            .into_iter()
            .flat_map(|x| bf16::from_f32((0.2 + 0.1 * x) / largest).to_le_bytes())
            .collect();
        add(part("weight_scale"), "BF16", &[rows, groups], scales);
        match format {
            "float-quantized" => {
                let codes = (0..rows * cols).map(|_| random() as u8 & 0xBF).collect(); // no NaN
                add(part("weight"), "F8_E4M3", &[rows, cols], codes);
            }
            "int-quantized" => {
                add(part("weight"), "I8", &[rows, cols], (0..rows * cols).map(|_| random() as u8).collect());
            }
            _ => {
                let words = |n: usize, random: &mut dyn FnMut() -> u32| -> Vec<u8> {
                    (0..n).flat_map(|_| (random() << 1 ^ random()).to_le_bytes()).collect()
                };
                add(part("weight_packed"), "I32", &[rows, cols / 8], words(rows * cols / 8, &mut random));
                add(part("weight_zero_point"), "I32", &[rows / 8, groups], words(rows / 8 * groups, &mut random));
            }
        }
    }
    let header = Value::Object(header).to_string();
    let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
    fs::write(dir.join("model.safetensors"), file).unwrap();
}

/// A model of each kind of quantized weights, and where it is.
fn models(dir: &Path) -> Vec<(Kind, String)> {
    let at = |name: &str| {
        let place = dir.join(name);
        fs::create_dir_all(&place).unwrap();
        place
    };
    let mut models = Vec::new();
    for (kind, id) in [(Kind::Q8, 8), (Kind::Q4, 2)] {
        let place = at(kind.name());
        fs::write(place.join("model.gguf"), tiny_gguf::model(&place, &[id], false).bytes()).unwrap();
        models.push((kind, place.join("model.gguf").to_str().unwrap().to_string()));
    }
    let int4 = json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": false});
    for (kind, format, weights, ffn) in [
        (Kind::F8, "float-quantized", json!({"num_bits": 8, "type": "float", "strategy": "channel"}), FFN[0]),
        (Kind::I8, "int-quantized", json!({"num_bits": 8, "type": "int", "strategy": "channel"}), FFN[0]),
        (Kind::I4, "pack-quantized", int4, FFN[1]),
    ] {
        let place = at(kind.name());
        checkpoint(&place, format, weights, ffn);
        models.push((kind, place.to_str().unwrap().to_string()));
    }
    models
}

fn values(len: usize, seed: u64) -> Vec<bf16> {
    noise(len, seed).into_iter().map(bf16::from_f32).collect()
}

/// A stack of tensors on the device, and its values `[rows, cols]`.
fn weight(cuda: &Cuda, kind: Kind, stack: &[Tensor]) -> (aoji::cuda::Weight, Vec<f32>) {
    assert!(Cuda::keeps(stack).is_some(), "{stack:?}");
    let w = cuda.weights(&[stack.to_vec()], &mut |_| {}).unwrap().remove(0);
    assert_eq!(w.kind, kind);
    (w, stack.iter().flat_map(Tensor::to_f32).collect())
}

/// `x w^T` in f64.
fn product(x: &[f32], w: &[f32], k: usize) -> Vec<f32> {
    let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() as f32;
    x.chunks_exact(k).flat_map(|x| w.chunks_exact(k).map(move |w| dot(x, w))).collect()
}

/// The inputs of a product with a norm: `x * gain`, rounded to bf16, and the factor by which each row is multiplied afterwards.
fn normed(x: &[bf16], gain: &[bf16], k: usize, eps: f32) -> (Vec<f32>, Vec<f32>) {
    let rows = x.chunks_exact(k);
    let rms = |x: &[bf16]| x.iter().map(|x| f64::from(x.to_f32()).powi(2)).sum::<f64>() / k as f64 + f64::from(eps);
    let scaled = rows.clone().flat_map(|x| {
        x.iter().zip(gain).map(|(x, g)| bf16::from_f32(x.to_f32() * g.to_f32()).to_f32()).collect::<Vec<_>>()
    });
    (scaled.collect(), rows.map(|x| (1.0 / rms(x).sqrt()) as f32).collect())
}

fn f32s(v: &[bf16]) -> Vec<f32> {
    v.iter().map(|x| x.to_f32()).collect()
}

/// Tolerance for sums of a few hundred products in f32, in another order.
const SUMS: Tolerance = Tolerance { l2: 2e-6, worst: 4e-6 };

fn each_kind_in_each_product() {
    let cuda = device();
    let dir = tempfile::tempdir().unwrap();
    for (kind, path) in models(dir.path()) {
        let files = ModelFiles::open(&path).unwrap();
        let (layer, c) = (&files.weights.layers[0], &files.config);
        let what = |op: &str, rows: usize| format!("{kind:?}: {op} of {rows} rows");
        let eps = 1e-5;
        let gains = values(c.dim, 9);
        let gain = cuda.weight_from(1, c.dim, &gains).unwrap();

        for stack in [vec![layer.w_down.clone()], vec![layer.wo.clone()]] {
            let (w, v) = weight(&cuda, kind, &stack);
            let (n, k) = (w.rows, w.cols);
            let (all, old) = (values(40 * k, 1), values(40 * n, 2));
            let add = |first: usize, rows: usize, many: bool| -> Vec<bf16> {
                let x = cuda.upload(&all[first * k..][..rows * k]).unwrap();
                let mut out = cuda.upload(&old[first * n..][..rows * n]).unwrap();
                match many {
                    false => cuda.gemv(&Gemv { rows, n, k }, Out::Add(&mut out), &x, &w).unwrap(),
                    true => cuda.gemm(&Gemm { rows, n, k }, Out::Add(&mut out), &x, &w).unwrap(),
                }
                cuda.download(&out).unwrap()
            };
            let sums = product(&f32s(&all), &v, k);
            let want: Vec<f32> =
                sums.iter().zip(&old).map(|(y, old)| bf16::from_f32(y + old.to_f32()).to_f32()).collect();
            let few = add(0, DECODE_ROWS, false);
            Tolerance::BF16
                .compare(&f32s(&few), &want[..DECODE_ROWS * n])
                .unwrap_or_else(|e| panic!("{}: {e}", what("gemv", 16)));
            for (first, rows) in [(0, 1), (5, 1), (15, 1), (0, 2), (3, 9)] {
                assert_eq!(add(first, rows, false), few[first * n..][..rows * n], "{}", what("gemv", rows));
            }
            // prompts: exactly the product with the values rounded to bf16
            let many = add(0, 40, true);
            let rounded: Vec<bf16> = v.iter().map(|x| bf16::from_f32(*x)).collect();
            let (plain, x) = (cuda.weight_from(n, k, &rounded).unwrap(), cuda.upload(&all).unwrap());
            let mut out = cuda.upload(&old).unwrap();
            cuda.gemm(&Gemm { rows: 40, n, k }, Out::Add(&mut out), &x, &plain).unwrap();
            assert_eq!(many, cuda.download(&out).unwrap(), "{}", what("gemm", 40));
        }

        let (w, v) = weight(&cuda, kind, &[layer.w_gate.clone(), layer.w_up.clone()]);
        let (n, k) = (w.rows, w.cols);
        let all = values(40 * k, 3);
        let (scaled, factors) = normed(&all, &gains, k, eps);
        let mut want = product(&scaled, &v, k);
        want.chunks_exact_mut(n).zip(&factors).for_each(|(row, f)| row.iter_mut().for_each(|y| *y *= f));
        let head = |first: usize, rows: usize| -> Vec<f32> {
            let (mut logits, mut xb) = (cuda.alloc(rows * n).unwrap(), cuda.alloc(rows * k).unwrap());
            let op = NormHead { rows, first, dim: k, vocab: n, eps };
            cuda.norm_head(&op, &mut logits, &mut xb, &cuda.upload(&all).unwrap(), &gain, &w).unwrap();
            cuda.download(&logits).unwrap()
        };
        let logits = head(0, 40); // more rows than a step has, in parts
        SUMS.compare(&logits, &want).unwrap_or_else(|e| panic!("{}: {e}", what("norm_head", 40)));
        for (first, rows) in [(0, 1), (7, 1), (2, 3), (0, 16), (16, 17)] {
            assert_eq!(head(first, rows), logits[first * n..][..rows * n], "{}", what("norm_head", rows));
        }

        let gate_up = |first: usize, rows: usize| -> Vec<bf16> {
            let x = cuda.upload(&all[first * k..][..rows * k]).unwrap();
            let (mut hb, mut xb) = (cuda.alloc(rows * n / 2).unwrap(), cuda.alloc(rows * k).unwrap());
            let mut both = cuda.alloc(rows * n).unwrap();
            let op = NormGateUp { rows, dim: k, ffn_dim: n / 2, eps };
            cuda.norm_gate_up(&op, &mut hb, &mut xb, &mut both, &x, &gain, &w).unwrap();
            cuda.download(&hb).unwrap()
        };
        let silu = |g: f32, u: f32| bf16::from_f32(g / (1.0 + (-g).exp()) * u).to_f32();
        let pairs =
            want.chunks_exact(n).take(DECODE_ROWS).flat_map(|row| (0..n / 2).map(|i| silu(row[i], row[n / 2 + i])));
        let (hb, pairs) = (gate_up(0, DECODE_ROWS), pairs.collect::<Vec<_>>());
        Tolerance::BF16.compare(&f32s(&hb), &pairs).unwrap_or_else(|e| panic!("{}: {e}", what("norm_gate_up", 16)));
        for (first, rows) in [(0, 1), (4, 2)] {
            assert_eq!(gate_up(first, rows), hb[first * n / 2..][..rows * n / 2], "{}", what("norm_gate_up", rows));
        }

        for rows in [1, 5] {
            let mut state = SamplerState::new(&cuda, n, rows).unwrap();
            let mut token = cuda.alloc(rows).unwrap();
            let mut pos = cuda.upload(&(0..rows as u32).map(|r| r * 10).collect::<Vec<_>>()).unwrap();
            let (mut scratch, mut xb) = (cuda.alloc(rows * n).unwrap(), cuda.alloc(rows * k).unwrap());
            let (op, x) = (NormHeadArgmax { rows, dim: k, vocab: n, max_seq: 10, eps }, cuda.upload(&all).unwrap());
            let SamplerState { scratch: best, outbox, .. } = &mut state;
            cuda.norm_head_argmax(&op, &mut token, &mut pos, best, outbox, &mut scratch, &mut xb, &x, &gain, &w)
                .unwrap();
            let largest = |row: &[f32]| (0..n).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap() as u32;
            let want: Vec<u32> = logits.chunks_exact(n).take(rows).map(largest).collect();
            assert_eq!(cuda.download(&token).unwrap(), want, "{}", what("norm_head_argmax", rows));
        }

        let (w, v) = weight(&cuda, kind, &[layer.wq.clone(), layer.wk.clone(), layer.wv.clone()]);
        let (n, max_seq) = (w.rows, PAGE);
        let table = cuda.upload(&[vec![1f32; 32], vec![0f32; 32]].concat().repeat(2)).unwrap(); // no rotation
        let mut want = product(&scaled, &v, k);
        want.chunks_exact_mut(n).zip(&factors).for_each(|(row, f)| row.iter_mut().for_each(|y| *y *= f));
        for rows in [1, 16] {
            let (n_heads, n_kv_heads, head_dim) = (c.n_heads, c.n_kv_heads, c.head_dim);
            let op = NormQkvRopeAppend {
                rows,
                dim: k,
                n_heads,
                n_kv_heads,
                head_dim,
                max_seq,
                positions: 2,
                eps,
                head_norm: false,
                kv: KvDtype::Auto,
            };
            let (mut qkv, mut xb) = (cuda.alloc(rows * n).unwrap(), cuda.alloc(rows * k).unwrap());
            let len = rows * n_kv_heads * max_seq * head_dim;
            let (mut keys, mut vals) = (cuda.alloc(len).unwrap(), cuda.alloc(len).unwrap());
            let pages: Vec<u32> = (0..rows as u32).collect();
            let pos: Vec<u32> = pages.iter().map(|r| r * max_seq as u32).collect();
            let (pages, pos) = (cuda.upload(&pages).unwrap(), cuda.upload(&pos).unwrap());
            let x = cuda.upload(&all).unwrap();
            let (k, v, mut arrived) = (&mut keys, &mut vals, cuda.alloc(n_heads + n_kv_heads).unwrap());
            let (xb, arrived) = (&mut xb, &mut arrived);
            cuda.norm_qkv_rope_append(&op, &mut qkv, k, v, xb, arrived, &x, &pos, &pages, &gain, &w, None, &table)
                .unwrap();
            let got = f32s(&cuda.download(&qkv).unwrap());
            let want: Vec<f32> = want[..rows * n].iter().map(|y| bf16::from_f32(*y).to_f32()).collect();
            Tolerance::BF16.compare(&got, &want).unwrap_or_else(|e| panic!("{}: {e}", what("qkv", rows)));
        }
    }
}

/// Logits after a prompt and after some tokens (one step for each), and the tokens that follow.
fn run(path: &str, widen: bool) -> (Vec<Vec<f32>>, Engine) {
    let options = Options { device: Device::Cuda(0), context: Some(64), widen, ..Options::default() };
    let engine = Engine::open(path, &options).unwrap_or_else(|e| panic!("{path}: {e}"));
    let mut session: Session = engine.session(64).unwrap();
    let mut tokens: Vec<u32> = (0..21).map(|i| (i * 37 + i * i) % VOCAB as u32).collect();
    let mut all = Vec::new();
    for next in [3, 17, 40] {
        session.sync(&tokens).unwrap();
        all.push(session.logits().unwrap().to_vec());
        tokens.push(next);
    }
    (all, engine)
}

/// Prompts use weights widened to bf16; steps use exact weights, from which each widened one differs by up to 2^-9 of its value.
#[test]
fn a_model_is_what_its_widened_weights_are() {
    if std::env::var_os("AOJI_TEST_GPU").is_none_or(|v| v != "1") {
        cuda_emulator::install();
    }
    let dir = tempfile::tempdir().unwrap();
    for (kind, path) in models(dir.path()) {
        let ((kept, small), (widened, large)) = (run(&path, false), run(&path, true));
        for (i, (kept, widened)) in kept.iter().zip(&widened).enumerate() {
            let near = Tolerance { l2: 2e-2, worst: 8e-2 };
            near.compare(kept, widened).unwrap_or_else(|e| panic!("{kind:?}, logits {i}: {e}"));
            assert!(kept.iter().any(|x| x.abs() > 0.1), "{kind:?}: a model that computes nothing");
        }
        assert!(kept[2] != widened[2], "{kind:?}: the weights were widened all the same");
        assert_eq!(run(&path, false).0, kept, "{kind:?}: the same input, the same bits");
        let (small, large) = (small.plan().weights, large.plan().weights);
        assert!(small < large, "{kind:?}: {small} bytes of {large}");
    }
}

#[test]
fn the_source_of_each_kind() {
    each_kind_in_each_product();
}

#[test]
fn the_ptx_80_of_each_kind() {
    ptx::with_ptx(80, each_kind_in_each_product);
}

/// Also checks that each kernel of quantized weights has run, and the instruction `lop3`, which only these use
/// (tests/ops/compiled.rs checks the rest).
#[test]
fn the_ptx_90_of_each_kind() {
    ptx::with_ptx(90, || {
        each_kind_in_each_product();
        let executed: Vec<_> = cuda_emulator::executed().into_iter().filter(|i| i.file.starts_with("90/")).collect();
        let ran: BTreeSet<&str> = executed.iter().map(|i| i.kernel.as_str()).collect();
        let shipped = MODULES.iter().flat_map(|m| m.usage()).filter(|u| ptx::is_packed(&u.kernel)).map(|u| u.kernel);
        let not: BTreeSet<String> = shipped.filter(|kernel| !ran.contains(kernel.as_str())).collect();
        assert!(not.is_empty() && ran.len() >= 30, "did not run: {not:?}");
        assert!(executed.iter().any(|i| i.inlined && i.text.contains("lop3.b32")));
    });
}
