//! The tensors of a GGUF file, under the names that a model's tensors have here.

use super::{Entry, Gguf, config::ROPE_FREQS};
use crate::{
    error::{Error, Result},
    files::{
        config::Config,
        weights::{Shard, Stored, Tensor, Weights},
    },
};
use std::{collections::BTreeMap, sync::Arc};

/// Hugging Face's names in a layer, and GGUF's.
const LAYER: [(&str, &str); 11] = [
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
];

/// GGUF's name of a tensor of [`Weights::table`].
pub(in crate::files) fn gguf_name(name: &str) -> Option<String> {
    match name {
        "model.embed_tokens.weight" => return Some("token_embd.weight".into()),
        "model.norm.weight" => return Some("output_norm.weight".into()),
        "lm_head.weight" => return Some("output.weight".into()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (module, kind) = rest.rsplit_once('.').filter(|(_, kind)| ["weight", "bias"].contains(kind))?;
    let (_, own) = LAYER.iter().find(|(hf, _)| *hf == module)?;
    Some(format!("blk.{layer}.{own}.{kind}"))
}

/// Whether GGUF has the rows of a tensor with those that rotate together side by side: of q and k, in the files of the
/// architecture "llama".
pub(in crate::files) fn pairs(config: &Config, name: &str) -> bool {
    let of_llama = ["LlamaForCausalLM", "MistralForCausalLM"].contains(&config.arch.name);
    let module = name.rsplit_once('.').map_or(name, |(module, _)| module);
    of_llama && (module.ends_with("q_proj") || module.ends_with("k_proj"))
}

impl Gguf {
    /// The tensors, checked against `config`. Each keeps its format, and the name that Hugging Face has for it.
    ///
    /// # Errors
    /// [`Error::Tensor`] for tensors that are missing, superfluous, doubled, or of another shape.
    pub fn weights(&self, config: &Config) -> Result<Weights> {
        let mut found: BTreeMap<&str, (&Arc<Shard>, &Entry)> = BTreeMap::new();
        for (shard, header) in &self.files {
            for entry in &header.tensors {
                if let Some((other, _)) = found.insert(&entry.name, (shard, entry)) {
                    let other = format!("it in {} as well", other.path().display());
                    return Err(Error::tensor(shard.path(), &entry.name, "each tensor in one piece", other));
                }
            }
        }
        let weights = Weights::table(config, |name, shape| {
            let own = gguf_name(&name).unwrap_or_default();
            let Some((shard, entry)) = found.remove(own.as_str()) else {
                return Err(Error::tensor(&self.path, &own, format!("a tensor of shape {shape:?}"), "no such tensor"));
            };
            let (rows, cols) = match *shape {
                [rows, cols] => (rows, cols),
                _ => (1, shape.iter().product()),
            };
            if entry.shape != shape {
                let expected = format!("shape {shape:?} by the keys (rows, columns)");
                return Err(Error::tensor(shard.path(), &own, expected, format!("shape {:?}", entry.shape)));
            }
            if shape.len() == 1 && entry.format.is_quantized() {
                let expected = "a vector of type F32, F16 or BF16".to_string();
                return Err(Error::tensor(shard.path(), &own, expected, format!("type {}", entry.format)));
            }
            let paired = pairs(config, &name).then_some(config.head_dim);
            let stored = Stored { paired, ..Stored::of(entry.format) };
            Ok(Tensor::new(shard.clone(), name, [rows, cols], entry.range.clone(), stored))
        })?;
        found.remove(ROPE_FREQS);
        match found.first_key_value() {
            None => Ok(weights),
            Some((name, (shard, entry))) => {
                let expected = config.arch.no_such_tensor(config.n_layers);
                Err(Error::tensor(shard.path(), *name, expected, format!("{} {:?}", entry.format, entry.shape)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn every_tensor_has_a_name() {
        let json = r#"{"model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 12,
                       "num_attention_heads": 2, "vocab_size": 16}"#;
        let config = Config::from_json(Path::new("config.json"), json, None).unwrap();
        let mut names = Vec::new();
        Weights::table(&config, |name, _| {
            names.push(gguf_name(&name).unwrap());
            Ok(())
        })
        .unwrap();
        assert!(names.contains(&"blk.11.attn_output.weight".to_string()), "{names:?}");
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 12 * 9 + 3);
        assert_eq!(gguf_name("model.layers.1.mlp.down_proj.bias"), Some("blk.1.ffn_down.bias".into()));
        assert_eq!(gguf_name("model.layers.1.mlp.down_proj.scale"), None);
    }
}
