//! Training a tiny random model on the device: the losses, gradients and adapters of the CPU, the same bits on every run, and what
//! is refused before it begins.

use crate::{ptx, tiny};
use aoji::{
    Result,
    cpu::Cpu,
    cuda::{Cuda, GemmBy, cublas_version},
    ops::{Op, train::LinearDx},
    train::{Line, TuneConfig, Tuner},
};
use half::bf16;
use serde_json::{Value, json};
use std::{fs, path::Path};

fn device() -> Cuda {
    if !ptx::is_gpu() {
        cuda_emulator::install();
    }
    let mut cuda = Cuda::open(0).expect("a device");
    cuda.set_gemm(GemmBy::Own);
    cuda
}

/// A run of `steps` steps on documents of several lengths, some of a few tokens, packed, of which the last half is learned.
/// An epsilon far above the gradients makes each update the gradient times 5, so that adapters can be compared as gradients can.
fn config(dir: &Path, name: &str, change: &Value) -> TuneConfig {
    let model = dir.join("model");
    if !model.exists() {
        tiny::write_model(&model);
        let row = |(salt, len): (u32, usize)| {
            let ids = tiny::prompt(len, salt);
            let labels = ids.iter().enumerate().map(|(i, id)| if i < len / 2 { -100 } else { i64::from(*id) });
            json!({ "input_ids": ids, "labels": labels.collect::<Vec<_>>() }).to_string()
        };
        let rows = (0..).zip([40, 3, 17, 61, 2, 30, 9, 52]).map(row);
        fs::write(dir.join("rows.jsonl"), rows.collect::<Vec<_>>().join("\n")).unwrap();
    }
    let mut config = json!({
        "base_model": model, "adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": true, "lora_dropout": 0.1,
        "datasets": [{ "path": dir.join("rows.jsonl") }], "sequence_len": 64, "sample_packing": true, "micro_batch_size": 1,
        "gradient_accumulation_steps": 2, "max_steps": 2, "learning_rate": 5, "adam_epsilon": 1, "bf16": true,
        "output_dir": dir.join(name),
    });
    change.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
    let Value::Object(map) = config else { unreachable!() };
    TuneConfig::new(Path::new("run.yml"), map).unwrap()
}

/// The lines of the log without times, and the factors of the adapter by name.
type Trained = (Vec<Line>, Vec<(String, Vec<f32>)>);

fn result(dir: &Path) -> Trained {
    let text = fs::read_to_string(dir.join("train.jsonl")).unwrap();
    let line = |l| Line { seconds: 0.0, ..serde_json::from_str(l).unwrap() };
    let bytes = fs::read(dir.join("adapter_model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let values = |data: &[u8]| data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let mut factors: Vec<_> = file.tensors().into_iter().map(|(name, tensor)| (name, values(tensor.data()))).collect();
    factors.sort_by(|a, b| a.0.cmp(&b.0));
    (text.lines().map(line).collect(), factors)
}

fn on_device(dir: &Path, name: &str, change: &Value) -> Result<Trained> {
    let tuner = Tuner::open(config(dir, name, change))?;
    let outcome = tuner.run_on(device(), &mut |_| true);
    outcome.map(|o| result(&o.dir)).map_err(|e| {
        if let (false, Some(fault)) = (ptx::is_gpu(), cuda_emulator::last_fault()) {
            panic!("{e}: {fault}");
        }
        e
    })
}

fn on_cpu(dir: &Path, name: &str, change: &Value) -> Trained {
    let outcome = Tuner::open(config(dir, name, change)).unwrap().run(None, &mut |_| true).unwrap();
    result(&outcome.dir)
}

/// Both compute in bf16 with sums in f32, in another order; the device also rounds attention's weights and the gradients of scores and
/// of logits to bf16.
fn steps_are_those_of_the_cpu() {
    let dir = tempfile::tempdir().unwrap();
    let (cpu, got) = (on_cpu(dir.path(), "cpu", &json!({})), on_device(dir.path(), "device", &json!({})).unwrap());
    assert_eq!(got.0.len(), 2);
    for (got, want) in got.0.iter().zip(&cpu.0) {
        let off = |got: Option<f64>, want: Option<f64>| (got.unwrap() / want.unwrap() - 1.0).abs();
        assert!(off(got.loss, want.loss) < LOSS, "loss {:?}, the CPU has {:?}", got.loss, want.loss);
        assert!(off(got.grad_norm, want.grad_norm) < NORM, "{:?}, the CPU has {:?}", got.grad_norm, want.grad_norm);
    }
    let zeros = |factors: &[(String, Vec<f32>)]| factors.iter().filter(|(_, v)| v.iter().all(|x| *x == 0.0)).count();
    assert_eq!((got.1.len(), zeros(&got.1)), (2 * 7 * 2, 0), "every factor of both layers is trained");
    for ((name, got), (other, want)) in got.1.iter().zip(&cpu.1) {
        assert_eq!(name, other);
        let norm = |v: &mut dyn Iterator<Item = f32>| v.map(|x| f64::from(x * x)).sum::<f64>().sqrt();
        let (off, size) = (norm(&mut got.iter().zip(want).map(|(g, w)| g - w)), norm(&mut want.iter().copied()));
        assert!(off < FACTOR * size, "{name} is {off} from the CPU's of length {size}");
    }
}

/// Allowed distances from the CPU, relative.
const LOSS: f64 = 2e-3;
const NORM: f64 = 2e-2;
const FACTOR: f64 = 3e-2;

both_codes!(steps_are_those_of_the_cpu);

#[test]
fn the_same_bits_on_every_run_and_whether_kept_or_computed_again() {
    let dir = tempfile::tempdir().unwrap();
    let one = on_device(dir.path(), "one", &json!({ "max_steps": 1 })).unwrap();
    assert_eq!(one, on_device(dir.path(), "two", &json!({ "max_steps": 1 })).unwrap());
    let again = json!({ "max_steps": 1, "gradient_checkpointing": true });
    assert_eq!(one, on_device(dir.path(), "again", &again).unwrap());
    let other = on_device(dir.path(), "other", &json!({ "max_steps": 1, "seed": 43, "lora_dropout": 0.2 })).unwrap();
    assert_ne!(one.1, other.1, "dropout and the first factors are drawn with the seed");
}

#[test]
fn what_a_device_does_not_take_is_refused_before_it_begins() {
    let dir = tempfile::tempdir().unwrap();
    let fails = |change: Value, want: &str| {
        let error = on_device(dir.path(), "refused", &change).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
        assert!(!dir.path().join("refused").exists(), "nothing is written");
    };
    fails(json!({ "bf16": false }), "set bf16: true, or --device cpu");
    fails(json!({ "lora_r": 12 }), "lora_r is 12, the kernels take multiples of 8");
    if !ptx::is_gpu() {
        // 300,000 tokens do not fit the 1 GiB of the emulated device
        let ids = serde_json::to_string(&tiny::prompt(200, 1)).unwrap();
        let row = format!("{{\"input_ids\": {ids}, \"labels\": {ids}}}\n");
        let path = dir.path().join("many.jsonl");
        fs::write(&path, row.repeat(1500)).unwrap();
        let many = json!({ "datasets": [{ "path": path }], "sequence_len": 200, "micro_batch_size": 1500 });
        fails(many, "a micro-batch of 300000 tokens needs");
    }
}

#[test]
fn cublas_turns_the_matrix() {
    let mut cuda = device();
    match cublas_version() {
        Ok(version) => println!("cuBLAS {version}"),
        Err(e) if ptx::is_gpu() => return println!("skipped: {e}"),
        Err(e) => panic!("the emulated cuBLAS: {e}"),
    }
    cuda.set_gemm(GemmBy::Cublas);
    let op = LinearDx { rows: 33, n: 50, k: 72 };
    let cpu = Cpu::<bf16>::new().unwrap();
    let (mut on_device, mut on_cpu) = (op.setup(&cuda, 1).unwrap(), op.setup(&cpu, 1).unwrap());
    let launched = cuda.launches(|| op.run(&cuda, &mut on_device)).unwrap();
    op.run(&cpu, &mut on_cpu).unwrap();
    assert!(launched.is_empty(), "{launched:?}");
    let (got, want) = (op.outputs(&cuda, &on_device).unwrap(), op.outputs(&cpu, &on_cpu).unwrap());
    op.tolerance().compare(&got, &want).unwrap();
}
