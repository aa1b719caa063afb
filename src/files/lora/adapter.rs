//! An adapter: read, checked against a model, added to a tensor.

use crate::{
    error::{Error, Result},
    files::{
        config::{Config, Dtype},
        weights::{Entry, Tensor, Weights, read_header},
    },
};
use rayon::prelude::*;
use serde::Deserialize;
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    str::FromStr,
};

/// The matrices of a layer that an adapter may change.
const TARGETS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// Which adapter, and how much of it.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraSpec {
    /// Its directory.
    pub dir: PathBuf,
    /// Multiplies the adapter's own scale; 1 is the adapter as it was trained.
    pub scale: f32,
}

/// `DIR` or `DIR:SCALE`.
impl FromStr for LoraSpec {
    type Err = String;
    fn from_str(s: &str) -> Result<LoraSpec, String> {
        let (dir, scale) = match s.rsplit_once(':') {
            Some((dir, scale)) if !scale.contains(['/', '\\']) => {
                let finite = scale.parse::<f32>().ok().filter(|x| x.is_finite());
                (
                    dir,
                    finite.ok_or_else(|| {
                        format!("{scale:?} is not a scale: expected DIR or DIR:SCALE, as in adapter:0.5")
                    })?,
                )
            }
            _ => (s, 1.0),
        };
        if dir.is_empty() { Err("expected DIR or DIR:SCALE".into()) } else { Ok(LoraSpec { dir: dir.into(), scale }) }
    }
}

/// An adapter, checked against the configuration of a model.
pub struct Lora {
    /// By the name of the tensor that each changes.
    pairs: BTreeMap<String, Pair>,
}

/// `W += scale * b a`.
struct Pair {
    scale: f32,
    rank: usize,
    /// [rank, cols of W]
    a: Vec<f32>,
    /// [rows of W, rank]
    b: Vec<f32>,
}

#[derive(Deserialize)]
struct AdapterConfig {
    peft_type: String,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    use_rslora: bool,
    target_modules: Option<Value>,
    base_model_name_or_path: Option<String>,
    layers_to_transform: Option<Value>,
    /// Everything else.
    #[serde(flatten)]
    rest: BTreeMap<String, Value>,
}

impl AdapterConfig {
    /// What would make another model of it than `W + scale * B A`, and so is refused by name.
    fn check(&self, path: &Path) -> Result<()> {
        let unsupported = |what: String| Err(Error::Unsupported { path: path.into(), what });
        if self.peft_type != "LORA" {
            return unsupported(format!("peft_type is {:?}; only LORA adapters can be merged", self.peft_type));
        }
        if self.r == 0 {
            return Err(Error::file(path, "r is 0, expected the rank of the adapter"));
        }
        let allowed = |key: &str, v: &Value| match key {
            "bias" => *v == "none",
            "init_lora_weights" => {
                // these change the base model's weights as well
                !v.as_str().is_some_and(|s| ["pissa", "olora", "loftq", "corda"].iter().any(|k| s.starts_with(k)))
            }
            "modules_to_save"
            | "rank_pattern"
            | "alpha_pattern"
            | "layer_replication"
            | "trainable_token_indices"
            | "target_parameters"
            | "use_dora"
            | "use_qalora"
            | "fan_in_fan_out"
            | "lora_bias" => match v {
                Value::Null | Value::Bool(false) => true,
                Value::Array(v) => v.is_empty(),
                Value::Object(v) => v.is_empty(),
                _ => false,
            },
            _ => true,
        };
        if let Some((key, v)) = self.rest.iter().find(|(key, v)| !allowed(key, v)) {
            return unsupported(format!(
                "{key} is {v}; aoji merges plain LoRA of {}, without biases and without modules of their own",
                TARGETS.join(", ")
            ));
        }
        let targets = self.target_modules.as_ref().and_then(Value::as_array).into_iter().flatten();
        let known = |t: &Value| t.as_str().is_some_and(|t| TARGETS.contains(&t.rsplit('.').next().unwrap_or(t)));
        match targets.into_iter().find(|t| !known(t)) {
            Some(t) => unsupported(format!("target_modules has {t}; aoji merges {}", TARGETS.join(", "))),
            None => Ok(()),
        }
    }

    fn base(&self) -> &str {
        self.base_model_name_or_path.as_deref().unwrap_or("a model that it does not name")
    }
}

impl Lora {
    /// Reads an adapter and checks that it fits a model of `config`.
    ///
    /// # Errors
    /// `Io` for a missing file, `Unsupported` for an adapter of another kind, `Tensor` for a tensor that is unknown, alone or
    /// of another shape, `File` when it has other layers than the model. Each names what was expected, and the base model that
    /// the adapter names.
    pub fn open(spec: &LoraSpec, config: &Config) -> Result<Lora> {
        let path = spec.dir.join("adapter_config.json");
        let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
        let adapter: AdapterConfig = serde_json::from_str(&text)
            .map_err(|e| Error::file(&path, format!("is not the configuration of a LoRA adapter: {e}")))?;
        adapter.check(&path)?;
        let rank = adapter.r as f64;
        let own = adapter.lora_alpha / if adapter.use_rslora { rank.sqrt() } else { rank };
        let scale = (own * f64::from(spec.scale)) as f32;

        let file = spec.dir.join("adapter_model.safetensors");
        let bytes = fs::read(&file).map_err(Error::io(&file))?;
        let wrong = |tensor: &str, expected: String, found: String| Error::Tensor {
            file: file.clone(),
            tensor: tensor.into(),
            expected,
            found: format!("{found} (the adapter's base is {})", adapter.base()),
        };
        // shapes of the matrices that can be adapted
        let mut shapes = BTreeMap::new();
        Weights::table(config, |name, shape| {
            if let (true, &[rows, cols]) = (TARGETS.iter().any(|t| name.ends_with(&format!(".{t}.weight"))), shape) {
                shapes.insert(name, (rows, cols));
            }
            Ok(())
        })?;
        let (mut a, mut b, mut layers) = (BTreeMap::new(), BTreeMap::new(), 0);
        for entry in read_header(&file, &bytes)? {
            let Some((target, half)) = target(&entry.name) else {
                let expected = format!("lora_A and lora_B of {} in a layer", TARGETS.join(", "));
                return Err(wrong(&entry.name, expected, "another tensor".into()));
            };
            layers = layers.max(layer(&target) + 1);
            let Some(&(rows, cols)) = shapes.get(&target) else {
                return Err(wrong(
                    &entry.name,
                    format!("one of the model's {} layers", config.n_layers),
                    "another layer".into(),
                ));
            };
            let shape = if half == Half::A { [adapter.r, cols] } else { [rows, adapter.r] };
            if entry.shape != shape {
                let expected = format!("shape {shape:?} for rank {} and {target} [{rows}, {cols}]", adapter.r);
                return Err(wrong(&entry.name, expected, format!("shape {:?}", entry.shape)));
            }
            let values = values(&entry, &bytes).ok_or_else(|| {
                wrong(&entry.name, "dtype F32, F16 or BF16".into(), format!("dtype {:?}", entry.dtype))
            })?;
            if half == Half::A { &mut a } else { &mut b }.insert(target, values);
        }
        if layers == 0 {
            return Err(Error::file(&file, "has no tensors"));
        }
        if layers != config.n_layers && adapter.layers_to_transform.as_ref().is_none_or(Value::is_null) {
            return Err(Error::file(
                &file,
                format!("adapts {layers} layers, the model has {}: its base is {}", config.n_layers, adapter.base()),
            ));
        }
        if let Some(alone) = a.keys().find(|k| !b.contains_key(*k)).or(b.keys().find(|k| !a.contains_key(*k))) {
            return Err(wrong(alone, "both lora_A and lora_B".into(), "one of them".into()));
        }
        let pair = |((name, a), b): ((String, Vec<f32>), Vec<f32>)| (name, Pair { scale, rank: adapter.r, a, b });
        Ok(Lora { pairs: a.into_iter().zip(b.into_values()).map(pair).collect() })
    }
}

/// Elements of `tensor` with `adapters` added in f32 and rounded once to `dtype`, in little-endian order; `None` when they leave
/// it alone.
pub fn merged(adapters: &[Lora], tensor: &Tensor, dtype: Dtype) -> Option<Vec<u8>> {
    let pairs: Vec<&Pair> = adapters.iter().filter_map(|l| l.pairs.get(tensor.name())).collect();
    if pairs.is_empty() {
        return None;
    }
    let (cols, from) = (tensor.cols(), tensor.dtype());
    let mut bytes = vec![0; tensor.rows() * cols * dtype.bytes()];
    let rows = bytes.par_chunks_exact_mut(cols * dtype.bytes());
    rows.zip(tensor.bytes().par_chunks_exact(cols * from.bytes())).enumerate().for_each(|(i, (out, row))| {
        let mut w = from.to_f32(row);
        for p in &pairs {
            let mut delta = vec![0f32; cols];
            for (b, a) in p.b[i * p.rank..].iter().zip(p.a.chunks_exact(cols)) {
                delta.iter_mut().zip(a).for_each(|(d, a)| *d += b * a);
            }
            w.iter_mut().zip(delta).for_each(|(w, d)| *w += p.scale * d);
        }
        dtype.round(&w, out);
    });
    Some(bytes)
}

#[derive(PartialEq)]
enum Half {
    A,
    B,
}

/// `base_model.model.model.layers.3.mlp.up_proj.lora_A.weight`: the tensor that it changes, and which factor it is.
fn target(name: &str) -> Option<(String, Half)> {
    let inner = name.strip_prefix("base_model.model.")?;
    let (module, half) = match (inner.strip_suffix(".lora_A.weight"), inner.strip_suffix(".lora_B.weight")) {
        (Some(module), _) => (module, Half::A),
        (_, Some(module)) => (module, Half::B),
        _ => return None,
    };
    let mut parts = module.strip_prefix("model.layers.")?.split('.');
    let (l, block, m) = (parts.next()?, parts.next()?, parts.next()?);
    let known = l.parse::<usize>().is_ok() && ["self_attn", "mlp"].contains(&block) && TARGETS.contains(&m);
    (known && parts.next().is_none()).then(|| (format!("{module}.weight"), half))
}

/// The layer of a name that [`target`] gave.
fn layer(name: &str) -> usize {
    name.split('.').nth(2).and_then(|l| l.parse().ok()).unwrap_or(0)
}

fn values(entry: &Entry, bytes: &[u8]) -> Option<Vec<f32>> {
    let dtype = match entry.dtype {
        safetensors::Dtype::F32 => Dtype::F32,
        safetensors::Dtype::F16 => Dtype::F16,
        safetensors::Dtype::BF16 => Dtype::Bf16,
        _ => return None,
    };
    Some(dtype.to_f32(&bytes[entry.range.clone()]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs() {
        let spec = |s: &str| s.parse::<LoraSpec>().map(|s| (s.dir.to_str().unwrap().to_string(), s.scale));
        assert_eq!(spec("a/b").unwrap(), ("a/b".into(), 1.0));
        assert_eq!(spec("a/b:0.5").unwrap(), ("a/b".into(), 0.5));
        assert_eq!(spec("C:/a").unwrap(), ("C:/a".into(), 1.0));
        assert!(spec("a:b").unwrap_err().contains("\"b\" is not a scale"));
        assert!(spec(":2").is_err() && spec("a:inf").is_err());
    }

    #[test]
    fn names_of_tensors() {
        let name = |s: &str| target(s).map(|(t, half)| (t, half == Half::A));
        let up = "base_model.model.model.layers.12.mlp.up_proj.lora_A.weight";
        assert_eq!(name(up), Some(("model.layers.12.mlp.up_proj.weight".into(), true)));
        assert_eq!(layer("model.layers.12.mlp.up_proj.weight"), 12);
        assert_eq!(name("base_model.model.lm_head.lora_A.weight"), None);
        assert_eq!(name("base_model.model.model.layers.1.mlp.up_proj.lora_magnitude_vector"), None);
        assert_eq!(name("base_model.model.model.layers.1.mlp.q.up_proj.lora_B.weight"), None);
    }
}
