//! Checkpoints: the adapter, the optimizer's means and how far the run was, so that it goes on with the same bits.
//!
//! `output_dir/checkpoint-STEP/` has the adapter as PEFT stores it, `optimizer.safetensors` and `trainer_state.json`.
//! The last is written last, so a checkpoint that has it is complete. If the disk fills up or the process is killed,
//! the last complete checkpoint stays as it is.

use super::{
    adapter::{Adapter, safetensors_of},
    config::TuneConfig,
};
use crate::{
    error::{Error, Result},
    files::{config::Config, json, output::Output, weights::read_header},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

const STATE: &str = "trainer_state.json";
const OPTIMIZER: &str = "optimizer.safetensors";

/// The numbers of a run after a step.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    /// Parameters of the adapter.
    pub params: Vec<f32>,
    /// Means of the gradients.
    pub m: Vec<f32>,
    /// Means of their squares.
    pub v: Vec<f32>,
    /// Steps that are done.
    pub step: usize,
    /// Micro-batches that are done.
    pub micro: u32,
    /// Tokens that went through the model.
    pub tokens: u64,
    /// Steps since the last line of the log, and the sum of their losses.
    pub window: (usize, f64),
}

/// `trainer_state.json`.
#[derive(Serialize, Deserialize)]
struct Place {
    step: usize,
    micro: u32,
    tokens: u64,
    window: (usize, f64),
    /// [`super::Data::fingerprint`] of the data.
    data: String,
    /// Keys of the configuration that must not change.
    config: BTreeMap<String, Value>,
}

/// Writes a checkpoint. A complete one of the same step is kept, since it has the same bits; an incomplete one is replaced.
///
/// # Errors
/// Those of writing; then nothing is left of the checkpoint.
pub fn save(adapter: &Adapter, state: &State, config: &TuneConfig, data: u64) -> Result<PathBuf> {
    let dir = config.output_dir.join(format!("checkpoint-{}", state.step));
    if dir.join(STATE).exists() {
        return Ok(dir); // the same step of the same run has the same bits
    }
    match fs::remove_dir_all(&dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(&dir)(e)),
        _ => {}
    }
    let mut out = Output::begin(&dir)?;
    adapter.save(&state.params, &config.base_model, &mut out)?;
    let moment = |name: &str, values: &[f32]| (name.to_string(), [1, values.len()], values.to_vec());
    out.write(OPTIMIZER, &safetensors_of(&[moment("m", &state.m), moment("v", &state.v)])?)?;
    let place = Place {
        step: state.step,
        micro: state.micro,
        tokens: state.tokens,
        window: state.window,
        data: format!("{data:016x}"),
        config: config.fixed.clone(),
    };
    let text = serde_json::to_string_pretty(&place).map_err(|e| Error::Input(format!("the state: {e}")))?;
    out.write(STATE, text.as_bytes())?;
    out.finish()?;
    Ok(dir)
}

/// The complete checkpoint with the most steps in a directory.
///
/// # Errors
/// `Io` when the directory cannot be read.
pub fn last(dir: &Path) -> Result<Option<PathBuf>> {
    if !dir.exists() {
        return Ok(None);
    }
    let mut best = None;
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let step = name.strip_prefix("checkpoint-").and_then(|n| n.parse::<usize>().ok());
        if let Some(step) = step.filter(|_| path.join(STATE).exists()) {
            best = best.max(Some((step, path)));
        }
    }
    Ok(best.map(|(_, path)| path))
}

/// Reads a checkpoint of this run.
///
/// # Errors
/// `Io` and `File` for what is missing or malformed; `File` when it belongs to another configuration or other data: it
/// names the key that differs.
pub fn load(dir: &Path, adapter: &Adapter, config: &TuneConfig, model: &Config, data: u64) -> Result<State> {
    let path = dir.join(STATE);
    let place: Place = serde_json::from_str(&json::read(&path)?)
        .map_err(|e| Error::file(&path, format!("is not the state of a run: {e}")))?;
    let keys = place.config.keys().chain(config.fixed.keys());
    for key in keys {
        let (was, now) = (place.config.get(key), config.fixed.get(key));
        if was != now {
            let show = |v: Option<&Value>| v.map_or("absent".into(), Value::to_string);
            let what = format!(
                "{key} was {} and is now {}; a run must continue as it began: restore the value, or begin a new run with lora_model_dir: {}",
                show(was),
                show(now),
                dir.display()
            );
            return Err(Error::file(&path, what));
        }
    }
    if place.data != format!("{data:016x}") {
        let what = "belongs to other data: the rows of the datasets, or the tokenizer, have changed since";
        return Err(Error::file(&path, what));
    }
    let params = adapter.load(dir, model)?;
    let file = dir.join(OPTIMIZER);
    let bytes = fs::read(&file).map_err(Error::io(&file))?;
    let (mut m, mut v) = (None, None);
    for entry in read_header(&file, &bytes)? {
        let values = crate::files::config::Dtype::F32.to_f32(&bytes[entry.range.clone()]);
        match entry.name.as_str() {
            "m" if values.len() == adapter.len => m = Some(values),
            "v" if values.len() == adapter.len => v = Some(values),
            other => return Err(Error::file(&file, format!("has {other} of {} elements", values.len()))),
        }
    }
    let (Some(m), Some(v)) = (m, v) else { return Err(Error::file(&file, "has not both m and v")) };
    let Place { step, micro, tokens, window, .. } = place;
    Ok(State { params, m, v, step, micro, tokens, window })
}
