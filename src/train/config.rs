//! The configuration of a run: the keys of Axolotl's YAML files that aoji knows (as of 2024-05, when the card's model
//! was trained).
//!
//! An unknown key, or a value that asks for something that aoji does not do, is an error that names it: a run other
//! than the requested one would be worse than none.

use super::{
    adapter::Shape,
    keys::{FREE, KEYS, Keys, UNSET},
    prompt::Kind,
};
use crate::{error::Result, files::lora::TARGETS};
use serde_json::{Map, Value};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// How the learning rate changes after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheduler {
    /// Half a cosine, to 0 at the end.
    Cosine,
    /// In a straight line, to 0 at the end.
    Linear,
    /// The same in all steps.
    Constant,
}

/// What the losses of a step are divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LossMean {
    /// The number of labels in the step.
    Global,
    /// The number of labels in each micro-batch, then the number of micro-batches.
    Micro,
}

/// Where a run begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resume {
    /// At the beginning.
    No,
    /// At the last checkpoint of `output_dir`.
    Last,
    /// At this checkpoint.
    From(PathBuf),
}

/// A run.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "as in KEYS")]
pub struct TuneConfig {
    pub base_model: String,
    pub lora_model_dir: Option<PathBuf>,
    pub shape: Shape,
    pub datasets: Vec<(PathBuf, Kind)>,
    pub sequence_len: usize,
    pub sample_packing: bool,
    pub train_on_inputs: bool,
    pub micro_batch_size: usize,
    pub gradient_accumulation_steps: usize,
    pub loss_mean: LossMean,
    pub num_epochs: f64,
    pub max_steps: Option<usize>,
    pub learning_rate: f64,
    pub scheduler: Scheduler,
    /// A number of steps, or a share of all steps.
    pub warmup: Result<usize, f64>,
    pub weight_decay: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub max_grad_norm: f64,
    pub val_set_size: f64,
    pub eval_steps: Option<usize>,
    pub save_steps: Option<usize>,
    pub logging_steps: usize,
    pub seed: u64,
    pub shuffle: bool,
    pub bf16: bool,
    pub gradient_checkpointing: bool,
    pub output_dir: PathBuf,
    pub resume: Resume,
    pub eos_token: Option<String>,
    /// The keys that must be the same when the run goes on later: all except those of where and how often something is
    /// written.
    pub fixed: BTreeMap<String, Value>,
}

impl TuneConfig {
    /// Reads the content of a YAML file; `path` is named in errors.
    ///
    /// # Errors
    /// `Unsupported` for a key or value that asks for what aoji does not do, `File` for one that is missing or malformed. Each
    /// names the key.
    pub fn new(path: &Path, map: Map<String, Value>) -> Result<TuneConfig> {
        let mut k = Keys { path, map, prefix: String::new() };
        k.map.retain(|_, v| !v.is_null());
        for (name, value) in &k.map {
            if KEYS.iter().any(|(key, _)| key == name) {
                continue;
            }
            let nothing = ["", "false", "0", "{}", "[]"].contains(&value.to_string().trim_matches('"'));
            if !UNSET.contains(&name.as_str()) {
                return Err(k.unsupported(name, "aoji has no such key; `aoji tune --keys` lists those that it has"));
            }
            if !nothing && name != "dataset_prepared_path" && !name.starts_with("wandb") {
                return Err(k.unsupported(name, &format!("is {value}; aoji trains plain LoRA on weights as they are")));
            }
        }
        let fixed = k.map.clone().into_iter().filter(|(name, _)| !FREE.contains(&name.as_str())).collect();

        k.one_of("adapter", &["lora"], None)?;
        k.one_of("optimizer", &["adamw_torch"], Some("adamw_torch"))?;
        for name in ["model_type", "tokenizer_type", "flash_attention", "pad_to_sequence_len", "dataset_prepared_path"]
        {
            k.map.remove(name);
        }
        let mut targets = k.strings("lora_target_modules")?;
        if k.flag("lora_target_linear")?.unwrap_or(false) {
            targets.extend(TARGETS.iter().map(|t| t.to_string()).filter(|t| !targets.contains(t)).collect::<Vec<_>>());
        }
        let shape = Shape {
            rank: k.count("lora_r")?.ok_or_else(|| k.missing("lora_r"))?,
            alpha: k.number("lora_alpha", 1e-9..=1e9)?.ok_or_else(|| k.missing("lora_alpha"))?,
            dropout: k.number("lora_dropout", 0.0..=0.99)?.unwrap_or(0.0) as f32,
            targets,
        };
        let scheduler = match k.one_of("lr_scheduler", &["cosine", "linear", "constant"], Some("cosine"))?.as_str() {
            "linear" => Scheduler::Linear,
            "constant" => Scheduler::Constant,
            _ => Scheduler::Cosine,
        };
        let loss_mean = match k.one_of("loss_mean", &["global", "micro"], Some("global"))?.as_str() {
            "micro" => LossMean::Micro,
            _ => LossMean::Global,
        };
        let warmup = match (k.whole("warmup_steps")?, k.number("warmup_ratio", 0.0..=1.0)?) {
            (Some(_), Some(_)) => return Err(k.wrong("warmup_steps", "and warmup_ratio are both there: give one")),
            (steps, None) => Ok(steps.unwrap_or(0)),
            (None, Some(ratio)) => Err(ratio),
        };
        let resume = match k.map.remove("resume_from_checkpoint") {
            None | Some(Value::Bool(false)) => Resume::No,
            Some(Value::Bool(true)) => Resume::Last,
            Some(Value::String(dir)) => Resume::From(dir.into()),
            Some(_) => return Err(k.wrong("resume_from_checkpoint", "is neither true nor a directory")),
        };
        let bf16 = match k.map.remove("bf16") {
            None => false,
            Some(Value::Bool(on)) => on,
            Some(Value::String(auto)) if auto == "auto" => false,
            Some(_) => return Err(k.wrong("bf16", "is neither true, false nor auto")),
        };
        let curriculum = k.flag("curriculum_sampling")?.unwrap_or(false);
        let config = TuneConfig {
            base_model: k.string("base_model")?.ok_or_else(|| k.missing("base_model"))?,
            lora_model_dir: k.string("lora_model_dir")?.map(PathBuf::from),
            datasets: k.datasets()?,
            sequence_len: k.count("sequence_len")?.ok_or_else(|| k.missing("sequence_len"))?,
            sample_packing: k.flag("sample_packing")?.unwrap_or(false),
            train_on_inputs: k.flag("train_on_inputs")?.unwrap_or(false),
            micro_batch_size: k.count("micro_batch_size")?.unwrap_or(1),
            gradient_accumulation_steps: k.count("gradient_accumulation_steps")?.unwrap_or(1),
            num_epochs: k.number("num_epochs", 1e-6..=1e6)?.unwrap_or(1.0),
            max_steps: k.count("max_steps")?,
            learning_rate: k.number("learning_rate", 0.0..=10.0)?.ok_or_else(|| k.missing("learning_rate"))?,
            weight_decay: k.number("weight_decay", 0.0..=10.0)?.unwrap_or(0.0),
            beta1: k.number("adam_beta1", 0.0..=0.999_999)?.unwrap_or(0.9),
            beta2: k.number("adam_beta2", 0.0..=0.999_999_9)?.unwrap_or(0.999),
            epsilon: k.number("adam_epsilon", 0.0..=1.0)?.unwrap_or(1e-8),
            max_grad_norm: k.number("max_grad_norm", 0.0..=1e9)?.unwrap_or(1.0),
            val_set_size: k.number("val_set_size", 0.0..=1e9)?.unwrap_or(0.0),
            eval_steps: k.count("eval_steps")?,
            save_steps: k.count("save_steps")?,
            logging_steps: k.count("logging_steps")?.unwrap_or(1),
            seed: k.whole("seed")?.unwrap_or(42) as u64,
            shuffle: k.flag("shuffle")?.unwrap_or(true) && !curriculum,
            gradient_checkpointing: k.flag("gradient_checkpointing")?.unwrap_or(false),
            output_dir: k.string("output_dir")?.ok_or_else(|| k.missing("output_dir"))?.into(),
            eos_token: k.special_tokens()?,
            shape,
            scheduler,
            loss_mean,
            warmup,
            resume,
            bf16,
            fixed,
        };
        Ok(config)
    }

    /// Most tokens of a micro-batch.
    pub fn capacity(&self) -> usize {
        self.micro_batch_size * self.sequence_len
    }

    /// The learning rate of step `step` (from 0) of `total`, as in transformers' `get_*_schedule_with_warmup`: so the
    /// first step of a warm-up has rate 0.
    pub fn rate(&self, step: usize, total: usize) -> f64 {
        let warmup = match self.warmup {
            Ok(steps) => steps,
            Err(share) => (share * total as f64).ceil() as usize,
        };
        if step < warmup {
            return self.learning_rate * step as f64 / warmup.max(1) as f64;
        }
        let done = (step - warmup) as f64 / total.saturating_sub(warmup).max(1) as f64;
        let factor = match self.scheduler {
            Scheduler::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
            Scheduler::Linear => 1.0 - done,
            Scheduler::Constant => 1.0,
        };
        self.learning_rate * factor.max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(change: Value) -> Result<TuneConfig> {
        let mut all = json!({
            "base_model": "demo", "adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": true,
            "datasets": [{ "path": "a.jsonl", "type": "alpaca" }], "sequence_len": 64, "learning_rate": "2e-4", "output_dir": "out",
        });
        for (key, value) in change.as_object().unwrap() {
            all[key] = value.clone();
        }
        let Value::Object(map) = all else { unreachable!() };
        TuneConfig::new(Path::new("run.yml"), map)
    }

    #[test]
    fn what_is_not_known_is_named() {
        for (change, want) in [
            (json!({ "lora_rank": 8 }), "lora_rank: aoji has no such key"),
            (json!({ "load_in_4bit": true }), "load_in_4bit: is true"),
            (json!({ "peft_use_dora": true }), "peft_use_dora: is true"),
            (json!({ "adapter": "qlora" }), "adapter: is qlora; aoji has lora"),
            (json!({ "lora_r": 0 }), "lora_r is 0, expected at least 1"),
            (json!({ "lora_r": null }), "lora_r is missing"),
            (json!({ "learning_rate": "fast" }), "learning_rate is \"fast\", expected a number"),
            (json!({ "warmup_steps": 5, "warmup_ratio": 0.1 }), "give one"),
            (json!({ "datasets": [] }), "datasets is missing"),
            (json!({ "datasets": [{ "path": "a", "type": "sharegpt" }] }), "datasets[0].type: is \"sharegpt\""),
            (json!({ "datasets": [{ "path": "a", "shards": 2 }] }), "datasets[0].shards: aoji has no such key"),
            (
                json!({ "datasets": [{ "path": "a", "type": { "format": "x", "formt": "" } }] }),
                "datasets[0].type.formt",
            ),
            (json!({ "special_tokens": { "eos_tokn": "x" } }), "special_tokens.eos_tokn"),
        ] {
            let error = config(change.clone()).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(error.starts_with("run.yml: ") && error.contains(want), "{change}: {error:?}");
        }
        let unset = json!({ "load_in_8bit": false, "wandb_project": "", "deepspeed": null, "fsdp": [], "tf32": false });
        let c = config(unset).unwrap();
        assert_eq!((c.shape.targets.len(), c.learning_rate, c.max_grad_norm, c.seed), (7, 2e-4, 1.0, 42));
    }

    #[test]
    fn rates_are_those_of_transformers() {
        let rates = |change: Value| {
            let c = config(change).unwrap();
            (0..4).map(|step| c.rate(step, 4)).collect::<Vec<_>>()
        };
        // get_cosine_schedule_with_warmup(warmup 2, total 4), times 2e-4
        let close = |a: Vec<f64>, b: [f64; 4]| a.iter().zip(b).all(|(a, b)| (a - b * 2e-4).abs() < 1e-18);
        assert!(close(rates(json!({ "warmup_steps": 2 })), [0.0, 0.5, 1.0, 0.5]));
        assert!(close(rates(json!({ "warmup_ratio": 0.26 })), [0.0, 0.5, 1.0, 0.5]));
        assert!(close(rates(json!({ "lr_scheduler": "linear" })), [1.0, 0.75, 0.5, 0.25]));
        assert!(close(rates(json!({ "lr_scheduler": "constant", "warmup_steps": 1 })), [0.0, 1.0, 1.0, 1.0]));
    }
}
