//! The adapter that is trained: where its factors lie among the parameters, their first values, and how they are
//! written to PEFT's files.

use crate::{
    error::{Error, Result},
    files::{
        config::Config,
        lora::{Lora, LoraSpec, TARGETS},
        output::Output,
        weights::Weights,
    },
    ops::{sample::philox, train::Dropout},
};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::json;
use std::path::Path;

/// A word in the counter of the draws for the first values; [`Dropout`] has another word there, so the draws differ.
const INIT: u32 = 1;

/// What kind of adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    /// Rank of the factors.
    pub rank: usize,
    /// The product of the factors is multiplied by `alpha / rank`.
    pub alpha: f64,
    /// Share of the input that is dropped in training.
    pub dropout: f32,
    /// The adapted matrices of a layer, by their Hugging Face names.
    pub targets: Vec<String>,
}

/// An adapted matrix of a layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Site {
    /// Its Hugging Face name, without `.weight`.
    pub module: String,
    /// Number of the matrix in the model, for masks and draws.
    pub id: u32,
    /// Columns.
    pub k: usize,
    /// Rows.
    pub n: usize,
    /// Where `A` [rank, k] begins among the parameters.
    pub a: usize,
    /// Where `Bt` [rank, n] begins.
    pub b: usize,
    /// Columns of the stack of matrices that it is part of (q, k and v; gate and up).
    pub stride: usize,
    /// Column at which it begins there.
    pub at: usize,
}

/// The layout of an adapter.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// Its rank, scale and targets.
    pub shape: Shape,
    /// For each layer its adapted matrices, in the order of [`TARGETS`].
    pub layers: Vec<[Option<Site>; 7]>,
    /// Parameters in all.
    pub len: usize,
}

impl Adapter {
    /// The adapter for a model.
    ///
    /// # Errors
    /// `Input` for a rank of 0, an unknown target, or none.
    pub fn new(shape: Shape, config: &Config) -> Result<Adapter> {
        if shape.rank == 0 || shape.rank > 1024 {
            return Err(Error::Input(format!("lora_r is {}, expected 1 to 1024", shape.rank)));
        }
        if let Some(name) = shape.targets.iter().find(|t| !TARGETS.contains(&t.as_str())) {
            return Err(Error::Input(format!(
                "lora_target_modules names {name:?}; aoji trains adapters of {}",
                TARGETS.join(", ")
            )));
        }
        if shape.targets.is_empty() {
            return Err(Error::Input("no target: set lora_target_linear: true, or lora_target_modules".into()));
        }
        let (mut layers, mut len) = (vec![[const { None }; 7]; config.n_layers], 0);
        let (q_dim, kv_dim) = (config.q_dim(), config.kv_dim());
        Weights::table(config, |name, size| {
            let Some(module) = name.strip_suffix(".weight") else { return Ok(()) };
            let Some(target) = TARGETS.iter().position(|t| module.ends_with(&format!(".{t}"))) else { return Ok(()) };
            let &[n, k] = size else { return Ok(()) };
            let layer: usize = module.split('.').nth(2).and_then(|l| l.parse().ok()).unwrap_or(0);
            if shape.targets.iter().any(|t| t == TARGETS[target]) {
                let (stride, at) = match target {
                    0 => (q_dim + 2 * kv_dim, 0),
                    1 => (q_dim + 2 * kv_dim, q_dim),
                    2 => (q_dim + 2 * kv_dim, q_dim + kv_dim),
                    4 => (2 * config.ffn_dim, 0),
                    5 => (2 * config.ffn_dim, config.ffn_dim),
                    _ => (n, 0),
                };
                let (a, b) = (len, len + shape.rank * k);
                len = b + shape.rank * n;
                let id = (layer * TARGETS.len() + target) as u32;
                layers[layer][target] = Some(Site { module: module.into(), id, k, n, a, b, stride, at });
            }
            Ok(())
        })?;
        Ok(Adapter { shape, layers, len })
    }

    /// `alpha / rank`
    pub fn scale(&self) -> f32 {
        (self.shape.alpha / self.shape.rank as f64) as f32
    }

    /// All adapted matrices, in order.
    pub fn sites(&self) -> impl Iterator<Item = &Site> {
        self.layers.iter().flatten().flatten()
    }

    /// The dropout mask of a matrix's input in a micro-batch.
    pub fn dropout(&self, site: &Site, seed: u64, step: u32) -> Dropout {
        Dropout { p: self.shape.dropout, seed, step, site: site.id }
    }

    /// The parameters as PEFT begins with them: `A` uniform in +-1 / sqrt(k) (`kaiming_uniform_` with a = sqrt 5),
    /// `B` 0. They are drawn with Philox4x32-10 from the counter `[i, 1, 0, site]` and the key `seed`, 24 bits each.
    pub fn init(&self, seed: u64) -> Vec<f32> {
        let mut params = vec![0f32; self.len];
        for site in self.sites() {
            let bound = 1.0 / (site.k as f32).sqrt();
            for (i, a) in params[site.a..][..self.shape.rank * site.k].iter_mut().enumerate() {
                let draw = philox([i as u32 / 4, INIT, 0, site.id], [seed as u32, (seed >> 32) as u32])[i % 4];
                *a = ((draw >> 8) as f32 / 8_388_608.0 - 1.0) * bound;
            }
        }
        params
    }

    /// Reads the parameters of the adapter in `dir`, which must have the same shape.
    ///
    /// # Errors
    /// Those of [`Lora::open`]; `File` when rank, scale or targets differ from those of the run.
    pub fn load(&self, dir: &Path, config: &Config) -> Result<Vec<f32>> {
        let lora = Lora::open(&LoraSpec { dir: dir.into(), scale: 1.0 }, config)?;
        let mut params = vec![0f32; self.len];
        let rank = self.shape.rank;
        for site in self.sites() {
            let Some((scale, its_rank, a, b)) = lora.factors(&format!("{}.weight", site.module)) else {
                return Err(Error::file(dir, format!("has no {}, which this run trains", site.module)));
            };
            if its_rank != rank || (scale / self.scale() - 1.0).abs() > 1e-6 {
                return Err(Error::file(
                    dir,
                    format!(
                        "{} has rank {its_rank} and scale {scale}; this run has lora_r {rank} and lora_alpha {}: a run must keep \
                         the rank and alpha that the adapter has",
                        site.module, self.shape.alpha
                    ),
                ));
            }
            params[site.a..][..a.len()].copy_from_slice(a);
            for (i, b) in b.iter().enumerate() {
                params[site.b + i % rank * site.n + i / rank] = *b;
            }
        }
        let known = |tensor: &str| self.sites().any(|s| tensor == format!("{}.weight", s.module));
        match lora.tensors().find(|t| !known(t)) {
            Some(other) => Err(Error::file(dir, format!("changes {other}, which this run does not train"))),
            None => Ok(params),
        }
    }

    /// Writes `adapter_config.json` and `adapter_model.safetensors` (f32) as PEFT does.
    ///
    /// # Errors
    /// `Io` when a file cannot be written.
    pub fn save(&self, params: &[f32], base: &str, out: &mut Output) -> Result<()> {
        let rank = self.shape.rank;
        let mut targets = self.shape.targets.clone();
        targets.sort();
        let config = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": rank,
            "lora_alpha": self.shape.alpha,
            "lora_dropout": self.shape.dropout,
            "target_modules": targets,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "use_rslora": false,
            "use_dora": false,
            "rank_pattern": {},
            "alpha_pattern": {},
            "modules_to_save": null,
            "layers_to_transform": null,
            "layers_pattern": null,
            "revision": null,
        });
        let tensors: Vec<(String, [usize; 2], Vec<f32>)> = self
            .sites()
            .flat_map(|site| {
                let name = |half| format!("base_model.model.{}.lora_{half}.weight", site.module);
                let (a, bt) = (&params[site.a..][..rank * site.k], &params[site.b..][..rank * site.n]);
                let b = (0..rank * site.n).map(|i| bt[i % rank * site.n + i / rank]).collect();
                [(name('A'), [rank, site.k], a.to_vec()), (name('B'), [site.n, rank], b)]
            })
            .collect();
        out.write("adapter_model.safetensors", &safetensors_of(&tensors)?)?;
        out.write("adapter_config.json", format!("{config:#}\n").as_bytes())
    }
}

/// A safetensors file of f32 matrices.
pub(super) fn safetensors_of(tensors: &[(String, [usize; 2], Vec<f32>)]) -> Result<Vec<u8>> {
    let failed = |e: safetensors::SafeTensorError| Error::Input(format!("the adapter cannot be written: {e}"));
    let view = |(name, shape, values): &'_ (String, [usize; 2], Vec<f32>)| {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        (name.clone(), shape.to_vec(), bytes)
    };
    let bytes: Vec<_> = tensors.iter().map(view).collect();
    let views: Vec<(&str, TensorView<'_>)> = bytes
        .iter()
        .map(|(name, shape, bytes)| TensorView::new(Dtype::F32, shape.clone(), bytes).map(|view| (name.as_str(), view)))
        .collect::<Result<_, _>>()
        .map_err(failed)?;
    let about = [("format".to_string(), "pt".to_string())].into();
    safetensors::serialize(views, Some(about)).map_err(failed)
}
