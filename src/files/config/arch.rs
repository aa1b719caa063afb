//! Which architectures there are, and what each has beside the parts that all have.

use super::{
    MAX_SIZE,
    keys::{Keys, brief},
};
use crate::error::Result;
use serde_json::Value;
use std::fmt;

/// What a Llama-like architecture has beside embedding, norms, attention with rotated heads, SwiGLU and head. All of it is read
/// from the configuration; the tensors must agree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arch {
    /// Its name in `architectures`.
    pub name: &'static str,
    /// q, k and v have biases.
    pub qkv_bias: bool,
    /// The output of attention has a bias.
    pub o_bias: bool,
    /// Gate, up and down have biases.
    pub ffn_bias: bool,
    /// Each q and k head is normed before its rotation.
    pub qk_norm: bool,
    /// For each layer how many of the last keys a token sees, its own included; `None`: all of them.
    pub windows: Vec<Option<usize>>,
}

impl Arch {
    /// The window of a layer, as the ops take it: in a context of `max_seq` tokens.
    pub fn window(&self, layer: usize, max_seq: usize) -> usize {
        self.windows[layer].map_or(max_seq, |window| window.min(max_seq))
    }

    /// What is expected in place of a tensor that the architecture has not.
    pub(in crate::files) fn no_such_tensor(&self, n_layers: usize) -> String {
        let biased = self.qkv_bias || self.o_bias || self.ffn_bias;
        format!("no such tensor in {} layers of {self}{}", n_layers, if biased { "" } else { ", without biases" })
    }
}

/// "Qwen2ForCausalLM: biases on q, k and v; 4 of 28 layers see the last 4096 tokens".
impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let biased = [(self.qkv_bias, "q, k and v"), (self.o_bias, "o"), (self.ffn_bias, "gate, up and down")];
        let biased: Vec<&str> = biased.into_iter().filter(|(has, _)| *has).map(|(_, name)| name).collect();
        let mut parts = Vec::new();
        if !biased.is_empty() {
            parts.push(format!("biases on {}", biased.join(", ")));
        }
        if self.qk_norm {
            parts.push("q and k heads normed".into());
        }
        let windowed: Vec<usize> = self.windows.iter().flatten().copied().collect();
        if let Some(window) = windowed.first() {
            let layers = match windowed.len() == self.windows.len() {
                true => "all layers".into(),
                false => format!("{} of {} layers", windowed.len(), self.windows.len()),
            };
            parts.push(format!("{layers} see the last {window} tokens"));
        }
        write!(f, "{}{}{}", self.name, if parts.is_empty() { "" } else { ": " }, parts.join("; "))
    }
}

/// An architecture, and what its keys mean to transformers where they are absent.
pub(super) struct Known {
    name: &'static str,
    model_type: &'static str,
    /// Absent `num_key_value_heads`; `None`: as many as there are query heads.
    pub kv_heads: Option<usize>,
    /// Absent `head_dim`; `None`: the width by the heads.
    pub head_dim: Option<usize>,
    /// Absent `max_position_embeddings`.
    pub max_position: usize,
}

const KNOWN: [Known; 4] = [
    Known { name: "LlamaForCausalLM", model_type: "llama", kv_heads: None, head_dim: None, max_position: 2048 },
    Known {
        name: "MistralForCausalLM",
        model_type: "mistral",
        kv_heads: Some(8),
        head_dim: None,
        max_position: 1 << 17,
    },
    Known { name: "Qwen2ForCausalLM", model_type: "qwen2", kv_heads: Some(32), head_dim: None, max_position: 1 << 15 },
    Known {
        name: "Qwen3ForCausalLM",
        model_type: "qwen3",
        kv_heads: Some(32),
        head_dim: Some(128),
        max_position: 1 << 15,
    },
];

/// Absent `sliding_window`, and absent `max_window_layers`.
const WINDOW: usize = 4096;
const FULL_LAYERS: usize = 28;

impl Keys<'_> {
    /// The architecture that `architectures` or `model_type` names; where both do, they agree.
    pub fn known(&self) -> Result<&'static Known> {
        let names: Vec<String> = KNOWN.iter().map(|k| format!("{} (model_type {:?})", k.name, k.model_type)).collect();
        let supported = format!("supported: {}", names.join(", "));
        let named = match self.get("architectures") {
            None => None,
            Some(value) => {
                let has = |name: &str| value.as_array().is_some_and(|list| list.iter().any(|a| a == name));
                match KNOWN.iter().find(|k| has(k.name)) {
                    None => return self.unsupported(format!("architecture {}; {supported}", brief(value))),
                    some => some,
                }
            }
        };
        let typed = match self.text("model_type")? {
            None => None,
            Some(text) => match KNOWN.iter().find(|k| k.model_type == text) {
                None => return self.unsupported(format!("model_type {text:?}; {supported}")),
                some => some,
            },
        };
        match (named, typed) {
            (Some(a), Some(b)) if a.name != b.name => self
                .wrong(format!("architectures says {}, and model_type {:?}: expected the same", a.name, b.model_type)),
            (Some(known), _) | (None, Some(known)) => Ok(known),
            (None, None) => self.unsupported(format!("neither architectures nor model_type is given; {supported}")),
        }
    }

    /// What the architecture has.
    pub fn arch(&self, known: &Known, n_layers: usize) -> Result<Arch> {
        let mut arch = Arch {
            name: known.name,
            qkv_bias: false,
            o_bias: false,
            ffn_bias: false,
            qk_norm: false,
            windows: vec![None; n_layers],
        };
        match known.model_type {
            "llama" => {
                arch.qkv_bias = self.flag("attention_bias")?;
                arch.o_bias = arch.qkv_bias;
                arch.ffn_bias = self.flag("mlp_bias")?;
            }
            "mistral" => {
                if let Some(window) = self.window()? {
                    arch.windows.fill(Some(window));
                }
            }
            "qwen2" => {
                arch.qkv_bias = true;
                arch.windows = self.windows_by_layer(n_layers)?;
            }
            _ => {
                arch.qkv_bias = self.flag("attention_bias")?;
                arch.o_bias = arch.qkv_bias;
                arch.qk_norm = true;
                arch.windows = self.windows_by_layer(n_layers)?;
            }
        }
        Ok(arch)
    }

    /// `sliding_window`; `null` is none.
    fn window(&self) -> Result<Option<usize>> {
        match self.map.get("sliding_window") {
            None => Ok(Some(WINDOW)),
            Some(_) => self.optional_size("sliding_window", MAX_SIZE),
        }
    }

    /// Those of Qwen: with `use_sliding_window` all layers from `max_window_layers` on have one, or those that `layer_types` says.
    fn windows_by_layer(&self, n_layers: usize) -> Result<Vec<Option<usize>>> {
        let window = if self.flag("use_sliding_window")? { self.window()? } else { None };
        let Some(types) = self.get("layer_types") else {
            let full = match self.get("max_window_layers") {
                None => FULL_LAYERS,
                Some(value) => match value.as_u64() {
                    Some(n) => n as usize,
                    None => {
                        return self.wrong(format!(
                            "max_window_layers is {}, expected a whole number of layers without a window",
                            brief(value)
                        ));
                    }
                },
            };
            return Ok((0..n_layers).map(|l| window.filter(|_| l >= full)).collect());
        };
        let wrong = || {
            self.wrong(format!(
                "layer_types is {}, expected \"full_attention\" or \"sliding_attention\" for each of {n_layers} layers",
                brief(types)
            ))
        };
        let Some(list) = types.as_array().filter(|list| list.len() == n_layers) else { return wrong() };
        let mut windows = Vec::with_capacity(n_layers);
        for kind in list {
            windows.push(match (kind, window) {
                (Value::String(kind), _) if kind == "full_attention" => None,
                (Value::String(kind), Some(window)) if kind == "sliding_attention" => Some(window),
                (Value::String(kind), None) if kind == "sliding_attention" => {
                    return self.wrong(
                        "layer_types has sliding_attention, and there is no window: use_sliding_window is not true, or \
                         sliding_window is null"
                            .into(),
                    );
                }
                _ => return wrong(),
            });
        }
        Ok(windows)
    }
}
