//! An adapter: read, checked against a model, added to a tensor.

use super::config::{AdapterConfig, Module, TARGETS};
use crate::{
    error::{Error, Result},
    files::{
        config::{Config, Dtype},
        json,
        weights::{Tensor, read_header},
    },
};
use rayon::prelude::*;
use std::{collections::BTreeMap, fs, path::PathBuf, str::FromStr};

/// The file of an adapter's tensors.
const TENSORS: &str = "adapter_model.safetensors";

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

impl Lora {
    /// Some numbers by which adapters are told apart: of what is added to the tensor `name`.
    pub(in crate::files) fn sample(&self, name: &str) -> Vec<f32> {
        let of =
            |pair: &Pair| [&[pair.scale], &pair.a[..64.min(pair.a.len())], &pair.b[..64.min(pair.b.len())]].concat();
        self.pairs.get(name).map(of).unwrap_or_default()
    }

    /// Reads an adapter and checks that it fits a model of `config`.
    ///
    /// # Errors
    /// `Io` for a missing file, `Unsupported` for an adapter of another kind, `Tensor` for a tensor that is unknown, alone, of
    /// another shape, or of a module that the configuration does not name, `File` when a module that it names has none. Each
    /// names what was expected, and the base model that the adapter names.
    pub fn open(spec: &LoraSpec, config: &Config) -> Result<Lora> {
        let path = spec.dir.join("adapter_config.json");
        let adapter = AdapterConfig::read(&path)?;
        let modules = adapter.modules(&path, config)?;

        let file = spec.dir.join(TENSORS);
        if !json::exists(&file)? && spec.dir.join("adapter_model.bin").exists() {
            let what = "is missing; adapter_model.bin beside it is a Python pickle, which aoji does not read: load it with PEFT \
                        and save it with `save_pretrained(DIR, safe_serialization=True)`";
            return Err(Error::file(file, what));
        }
        let bytes = fs::read(&file).map_err(Error::io(&file))?;
        let wrong = |tensor: &str, expected: String, found: String| {
            Error::tensor(&file, tensor, expected, format!("{found} (the adapter's base is {})", adapter.base()))
        };
        let (mut a, mut b) = (BTreeMap::new(), BTreeMap::new());
        for entry in read_header(&file, &bytes)? {
            let Some((name, layer, half)) = target(&entry.name) else {
                let expected = format!("lora_A and lora_B of {} in a layer", TARGETS.join(", "));
                return Err(wrong(&entry.name, expected, "another tensor".into()));
            };
            if layer >= config.n_layers {
                let expected = format!("one of the model's {} layers", config.n_layers);
                return Err(wrong(&entry.name, expected, "another layer".into()));
            }
            let Some(module) = modules.get(name) else {
                let expected =
                    "a module that adapter_config.json names (target_modules, exclude_modules, layers_to_transform)";
                return Err(wrong(&entry.name, expected.into(), "another module".into()));
            };
            let &Module { rows, cols, rank, .. } = module;
            let shape = if half == Half::A { [rank, cols] } else { [rows, rank] };
            if entry.shape != shape {
                let expected = format!("shape {shape:?} for rank {rank} and {name} [{rows}, {cols}]");
                return Err(wrong(&entry.name, expected, format!("shape {:?}", entry.shape)));
            }
            let dtype = Dtype::of(entry.dtype).map_err(|[expected, found]| wrong(&entry.name, expected, found))?;
            let values = dtype.to_f32(&bytes[entry.range.clone()]);
            if half == Half::A { &mut a } else { &mut b }.insert(name.to_string(), values);
        }
        if a.is_empty() && b.is_empty() {
            return Err(Error::file(&file, "has no tensors"));
        }
        if let Some(alone) = a.keys().find(|k| !b.contains_key(*k)).or(b.keys().find(|k| !a.contains_key(*k))) {
            return Err(wrong(alone, "both lora_A and lora_B".into(), "one of them".into()));
        }
        if let Some(without) = modules.keys().find(|name| !a.contains_key(*name)) {
            let (n, all, base) = (a.len(), modules.len(), adapter.base());
            let what = format!(
                "adapts {n} of the {all} modules that adapter_config.json names, and not {without}: its base is {base}"
            );
            return Err(Error::file(&file, what));
        }
        let pair = |((name, a), b): ((String, Vec<f32>), Vec<f32>)| {
            let Module { rank, scale, .. } = modules[&name];
            let scale = (scale * f64::from(spec.scale)) as f32;
            (format!("{name}.weight"), Pair { scale, rank, a, b })
        };
        Ok(Lora { pairs: a.into_iter().zip(b.into_values()).map(pair).collect() })
    }

    /// The factors of the tensor of that name: scale, rank, `A` [rank, cols] and `B` [rows, rank].
    pub(crate) fn factors(&self, tensor: &str) -> Option<(f32, usize, &[f32], &[f32])> {
        self.pairs.get(tensor).map(|p| (p.scale, p.rank, &p.a[..], &p.b[..]))
    }

    /// Names of the tensors that it changes.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = &str> {
        self.pairs.keys().map(String::as_str)
    }
}

/// Elements of `tensor` with `adapters` added in f32 and rounded once to `dtype`, in little-endian order; `None` when they leave
/// it alone. Rows are in the model's order, also where the file has another: adapters are trained on it.
pub fn merged(adapters: &[Lora], tensor: &Tensor, dtype: Dtype) -> Option<Vec<u8>> {
    let pairs: Vec<&Pair> = adapters.iter().filter_map(|l| l.pairs.get(tensor.name())).collect();
    if pairs.is_empty() {
        return None;
    }
    let cols = tensor.cols();
    let mut bytes = vec![0; tensor.rows() * cols * dtype.bytes()];
    bytes.par_chunks_exact_mut(cols * dtype.bytes()).enumerate().for_each(|(i, out)| {
        let mut w = vec![0f32; cols];
        tensor.values(i, &mut w);
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

/// `base_model.model.model.layers.3.mlp.up_proj.lora_A.weight`: the module that it changes, its layer, and which factor it is.
fn target(name: &str) -> Option<(&str, usize, Half)> {
    let inner = name.strip_prefix("base_model.model.")?;
    let (module, half) = match (inner.strip_suffix(".lora_A.weight"), inner.strip_suffix(".lora_B.weight")) {
        (Some(module), _) => (module, Half::A),
        (_, Some(module)) => (module, Half::B),
        _ => return None,
    };
    let mut parts = module.strip_prefix("model.layers.")?.split('.');
    let (l, block, m) = (parts.next()?.parse().ok()?, parts.next()?, parts.next()?);
    let known = ["self_attn", "mlp"].contains(&block) && TARGETS.contains(&m);
    (known && parts.next().is_none()).then_some((module, l, half))
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
        let name = |s: &'static str| target(s).map(|(t, layer, half)| (t, layer, half == Half::A));
        let up = "base_model.model.model.layers.12.mlp.up_proj.lora_A.weight";
        assert_eq!(name(up), Some(("model.layers.12.mlp.up_proj", 12, true)));
        assert_eq!(name("base_model.model.lm_head.lora_A.weight"), None);
        assert_eq!(name("base_model.model.model.layers.1.mlp.up_proj.lora_magnitude_vector"), None);
        assert_eq!(name("base_model.model.model.layers.1.mlp.q.up_proj.lora_B.weight"), None);
    }
}
