//! The keys of a configuration: which ones there are, and how their values are read.

use super::prompt::{Kind, PromptFormat};
use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// Every key with its description.
pub const KEYS: [(&str, &str); 43] = [
    ("base_model", "the model: a directory, OWNER/NAME in the local Hugging Face cache, or demo"),
    ("adapter", "lora"),
    ("lora_model_dir", "an adapter to begin with"),
    ("lora_r", "rank of the adapter"),
    ("lora_alpha", "the adapter is scaled by lora_alpha / lora_r"),
    ("lora_dropout", "share of an adapter's input that is dropped [0]"),
    ("lora_target_linear", "true: adapt all seven matrices of a layer"),
    ("lora_target_modules", "or only these matrices"),
    (
        "datasets",
        "list of path (JSONL) and type: alpaca, a prompt of your own (field_instruction, field_input, field_output, field_system, \
      system_prompt, format, no_input_format, system_format), or none for rows of input_ids and labels",
    ),
    ("sequence_len", "longest row in tokens; longer ones are dropped"),
    ("sample_packing", "rows fill micro-batches of micro_batch_size * sequence_len tokens [false]"),
    ("pad_to_sequence_len", "changes nothing: nothing is padded"),
    ("train_on_inputs", "the prompt is learned too [false]"),
    ("micro_batch_size", "rows that go through the model together [1]"),
    ("gradient_accumulation_steps", "micro-batches in a step [1]"),
    (
        "loss_mean",
        "global: mean over the labels of a step; micro: mean of the micro-batches' means, as transformers before 4.46 [global]",
    ),
    ("num_epochs", "how often a run goes through the data [1]"),
    ("max_steps", "end after this many steps, whatever num_epochs says"),
    ("learning_rate", "its largest value, after the warm-up"),
    ("lr_scheduler", "cosine, linear or constant, after the warm-up [cosine]"),
    ("warmup_steps", "steps in which the rate rises from 0"),
    ("warmup_ratio", "or these as a share of all steps"),
    ("optimizer", "adamw_torch"),
    ("weight_decay", "[0]"),
    ("adam_beta1", "[0.9]"),
    ("adam_beta2", "[0.999]"),
    ("adam_epsilon", "[1e-8]"),
    ("max_grad_norm", "longer gradients are scaled down to this length; 0 is off [1]"),
    ("val_set_size", "rows, or a share of them, that are kept apart to measure the loss [0]"),
    ("eval_steps", "steps between measurements [only at the end]"),
    ("save_steps", "steps between checkpoints [none; one is saved on Ctrl-C]"),
    ("logging_steps", "steps between lines of train.jsonl [1]"),
    ("seed", "for the adapter's first values, the order of rows and dropout [42]"),
    ("shuffle", "another order in each epoch [true]"),
    ("curriculum_sampling", "true: keep the order of the files"),
    ("bf16", "true: activations in bf16; false or auto: in f32"),
    ("gradient_checkpointing", "keep less in memory and compute it again; the bits are the same [false]"),
    ("output_dir", "where adapter, checkpoints, train.jsonl and loss.svg go"),
    ("resume_from_checkpoint", "a checkpoint's directory, or true for the last one in output_dir"),
    ("special_tokens", "eos_token: the token that ends a row, if not the tokenizer's"),
    ("model_type", "changes nothing"),
    ("tokenizer_type", "changes nothing"),
    ("flash_attention", "changes nothing: attention never stores its scores"),
];

/// Keys of Axolotl that may be present as long as they ask for nothing.
pub(super) const UNSET: [&str; 32] = [
    "load_in_8bit",
    "load_in_4bit",
    "strict",
    "tf32",
    "fp16",
    "group_by_length",
    "early_stopping_patience",
    "local_rank",
    "xformers_attention",
    "sdp_attention",
    "debug",
    "deepspeed",
    "fsdp",
    "fsdp_config",
    "wandb_project",
    "wandb_entity",
    "wandb_watch",
    "wandb_name",
    "wandb_log_model",
    "hub_model_id",
    "dataset_prepared_path",
    "eval_table_size",
    "eval_max_new_tokens",
    "evals_per_epoch",
    "saves_per_epoch",
    "eval_sample_packing",
    "lora_fan_in_fan_out",
    "lora_modules_to_save",
    "peft_use_dora",
    "peft_use_rslora",
    "auto_resume_from_checkpoints",
    "trust_remote_code",
];

/// Keys that may change when a run goes on.
pub(super) const FREE: [&str; 9] = [
    "output_dir",
    "resume_from_checkpoint",
    "save_steps",
    "eval_steps",
    "logging_steps",
    "gradient_checkpointing",
    "model_type",
    "tokenizer_type",
    "dataset_prepared_path",
];

/// The keys that have not been read yet.
pub(super) struct Keys<'a> {
    pub path: &'a Path,
    pub map: Map<String, Value>,
    /// Where in the file they are.
    pub prefix: String,
}

impl Keys<'_> {
    pub fn wrong(&self, key: &str, what: &str) -> Error {
        Error::file(self.path, format!("{}{key} {what}", self.prefix))
    }

    pub fn missing(&self, key: &str) -> Error {
        self.wrong(key, "is missing")
    }

    pub fn unsupported(&self, key: &str, what: &str) -> Error {
        Error::Unsupported { path: self.path.into(), what: format!("{}{key}: {what}", self.prefix) }
    }

    pub fn string(&mut self, key: &str) -> Result<Option<String>> {
        match self.map.remove(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(self.wrong(key, &format!("is {other}, expected text"))),
        }
    }

    pub fn flag(&mut self, key: &str) -> Result<Option<bool>> {
        match self.map.remove(key) {
            None => Ok(None),
            Some(Value::Bool(on)) => Ok(Some(on)),
            Some(other) => Err(self.wrong(key, &format!("is {other}, expected true or false"))),
        }
    }

    pub fn number(&mut self, key: &str, range: std::ops::RangeInclusive<f64>) -> Result<Option<f64>> {
        let Some(value) = self.map.remove(key) else { return Ok(None) };
        // YAML 1.1, and so Axolotl, reads 2e-4 as text
        let number = value.as_f64().or_else(|| value.as_str().and_then(|s| s.parse().ok()));
        match number.filter(|x| range.contains(x)) {
            Some(x) => Ok(Some(x)),
            None => {
                let what = format!("is {value}, expected a number from {} to {}", range.start(), range.end());
                Err(self.wrong(key, &what))
            }
        }
    }

    pub fn whole(&mut self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.map.remove(key) else { return Ok(None) };
        match value.as_u64().filter(|n| *n <= 1 << 40) {
            Some(n) => Ok(Some(n as usize)),
            None => Err(self.wrong(key, &format!("is {value}, expected a whole number"))),
        }
    }

    pub fn count(&mut self, key: &str) -> Result<Option<usize>> {
        match self.whole(key)? {
            Some(0) => Err(self.wrong(key, "is 0, expected at least 1")),
            n => Ok(n),
        }
    }

    pub fn strings(&mut self, key: &str) -> Result<Vec<String>> {
        match self.map.remove(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) if list.iter().all(Value::is_string) => {
                Ok(list.into_iter().filter_map(|v| v.as_str().map(str::to_string)).collect())
            }
            Some(other) => Err(self.wrong(key, &format!("is {other}, expected a list of names"))),
        }
    }

    pub fn one_of(&mut self, key: &str, known: &[&str], default: Option<&str>) -> Result<String> {
        match self.string(key)?.or_else(|| default.map(str::to_string)) {
            Some(s) if known.contains(&s.as_str()) => Ok(s),
            Some(s) => Err(self.unsupported(key, &format!("is {s}; aoji has {}", known.join(", ")))),
            None => Err(self.wrong(key, &format!("is missing; aoji has {}", known.join(", ")))),
        }
    }

    pub fn special_tokens(&mut self) -> Result<Option<String>> {
        match self.map.remove("special_tokens") {
            None => Ok(None),
            Some(Value::Object(mut map)) => {
                let eos = map.remove("eos_token");
                // Padding is never learned here, and the model never sees any.
                ["pad_token", "bos_token", "unk_token"].iter().for_each(|name| drop(map.remove(*name)));
                match (map.keys().next(), eos) {
                    (Some(other), _) => Err(self.unsupported(&format!("special_tokens.{other}"), "aoji has eos_token")),
                    (None, None) => Ok(None),
                    (None, Some(Value::String(s))) => Ok(Some(s)),
                    (None, Some(other)) => {
                        Err(self.wrong("special_tokens.eos_token", &format!("is {other}, expected text")))
                    }
                }
            }
            Some(other) => Err(self.wrong("special_tokens", &format!("is {other}, expected eos_token: TEXT"))),
        }
    }

    pub fn datasets(&mut self) -> Result<Vec<(PathBuf, Kind)>> {
        let list = match self.map.remove("datasets") {
            Some(Value::Array(list)) if !list.is_empty() => list,
            _ => return Err(self.wrong("datasets", "is missing: a list of path and type")),
        };
        let dataset = |(i, value): (usize, Value)| {
            let prefix = format!("datasets[{i}].");
            let Value::Object(map) = value else {
                return Err(self.wrong(&format!("datasets[{i}]"), "is no mapping of path and type"));
            };
            let mut k = Keys { path: self.path, map, prefix };
            k.map.retain(|_, v| !v.is_null());
            let path = k.string("path")?.ok_or_else(|| k.missing("path"))?;
            k.one_of("ds_type", &["json"], Some("json"))?;
            let kind = match k.map.remove("type") {
                None => Kind::Tokens,
                Some(Value::String(s)) if s == "alpaca" => Kind::Alpaca,
                Some(Value::Object(map)) => {
                    let mut k = Keys { path: self.path, map, prefix: format!("{}type.", k.prefix) };
                    k.map.retain(|_, v| !v.is_null());
                    let format = k.string("format")?.ok_or_else(|| k.missing("format"))?;
                    let mut text = |key: &str, default: &str| -> Result<String> {
                        Ok(k.string(key)?.unwrap_or_else(|| default.into()))
                    };
                    let format = PromptFormat {
                        field_system: text("field_system", "")?,
                        field_instruction: text("field_instruction", "instruction")?,
                        field_input: text("field_input", "input")?,
                        field_output: text("field_output", "output")?,
                        system_prompt: text("system_prompt", "")?,
                        system_format: text("system_format", "{system}")?,
                        no_input_format: text("no_input_format", &format)?,
                        format,
                    };
                    k.done()?;
                    Kind::Custom(format)
                }
                Some(other) => {
                    let what =
                        format!("is {other}; aoji has alpaca, a prompt of your own, or none for input_ids and labels");
                    return Err(k.unsupported("type", &what));
                }
            };
            k.done()?;
            Ok((PathBuf::from(path), kind))
        };
        list.into_iter().enumerate().map(dataset).collect()
    }

    /// Checks that no key is left.
    pub fn done(&self) -> Result<()> {
        match self.map.keys().next() {
            Some(other) => Err(self.unsupported(other, "aoji has no such key")),
            None => Ok(()),
        }
    }
}
