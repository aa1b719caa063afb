//! Makes the keys of a GGUF file from the files of a Hugging Face checkpoint: the opposite of reading.

use super::{config::WINDOW, tokenizer::split_name, vocabulary::kind, writer::Writer};
use crate::{
    error::{Error, Result},
    files::{
        checkpoint::ModelFiles,
        config::{Config, RopeScaling},
        json,
        model_files::CONFIG,
    },
    text::{ChatTemplate, Tokenizer, TokenizerConfig},
};
use serde_json::Value as Json;
use std::{collections::HashMap, fs, path::Path};

/// The keys of the model in `dir`, and the divisors of its rotary frequencies, which are a tensor in a GGUF file.
///
/// # Errors
/// [`Error::Unsupported`] for a rotary scaling or a tokenizer that has no keys.
pub(in crate::files) fn export(files: &ModelFiles, dir: &Path, file_type: u32) -> Result<(Writer, Option<Vec<f32>>)> {
    let c = &files.config;
    let mut w = Writer::default();
    let arch = match c.arch.name {
        "Qwen2ForCausalLM" => "qwen2",
        "Qwen3ForCausalLM" => "qwen3",
        _ => "llama",
    };
    w.text("general.architecture", arch);
    w.text("general.type", "model");
    w.number("general.file_type", file_type);
    w.number("general.quantization_version", 2);
    for (name, n) in [
        ("block_count", c.n_layers),
        ("context_length", max_position(dir)?.unwrap_or(c.max_seq)),
        ("embedding_length", c.dim),
        ("feed_forward_length", c.ffn_dim),
        ("attention.head_count", c.n_heads),
        ("attention.head_count_kv", c.n_kv_heads),
        ("attention.key_length", c.head_dim),
        ("attention.value_length", c.head_dim),
        ("rope.dimension_count", c.head_dim),
        ("vocab_size", c.vocab),
    ] {
        w.number(&format!("{arch}.{name}"), n as u32); // sizes are below 2^24
    }
    match c.arch.windows.iter().flatten().next() {
        None => {}
        Some(window) if arch == "llama" => w.number(&format!("{arch}.{WINDOW}"), *window as u32), // the same in all layers
        Some(_) => {
            return unsupported(&dir.join(CONFIG), format!("a GGUF file has no keys for the windows of {}", c.arch));
        }
    }
    w.float(&format!("{arch}.attention.layer_norm_rms_epsilon"), c.norm_eps);
    w.float(&format!("{arch}.rope.freq_base"), c.rope_theta as f32);
    let factors = rope(&mut w, arch, c, dir)?;
    vocabulary(&mut w, files, dir)?;
    Ok((w, factors))
}

fn unsupported<T>(path: &Path, what: String) -> Result<T> {
    Err(Error::Unsupported { path: path.into(), what })
}

/// `max_position_embeddings` as the configuration has it, before scaling makes it longer.
fn max_position(dir: &Path) -> Result<Option<usize>> {
    let config: Json = json::parse(&json::read(&dir.join(CONFIG))?).unwrap_or_default(); // it was read before
    Ok(config["max_position_embeddings"].as_u64().map(|n| n as usize))
}

fn rope(w: &mut Writer, arch: &str, c: &Config, dir: &Path) -> Result<Option<Vec<f32>>> {
    let key = |name: &str| format!("{arch}.rope.scaling.{name}");
    match c.rope_scaling {
        None => {}
        Some(RopeScaling::Linear { factor }) => {
            w.text(&key("type"), "linear");
            w.float(&key("factor"), factor as f32);
        }
        Some(RopeScaling::Yarn {
            factor,
            original_max_seq,
            attention_factor,
            beta_fast,
            beta_slow,
            truncate: true,
        }) => {
            w.text(&key("type"), "yarn");
            w.float(&key("factor"), factor as f32);
            w.number(&key("original_context_length"), original_max_seq as u32);
            // there it is a factor of YaRN's own
            w.float(&key("attn_factor"), (attention_factor / (1.0 + 0.1 * factor.ln())) as f32);
            w.float(&key("yarn_beta_fast"), beta_fast as f32);
            w.float(&key("yarn_beta_slow"), beta_slow as f32);
        }
        Some(RopeScaling::Llama3 { .. }) => {
            let plain = Config { rope_scaling: None, ..c.clone() }.rope_inv_freq();
            return Ok(Some(plain.iter().zip(c.rope_inv_freq()).map(|(plain, scaled)| plain / scaled).collect()));
        }
        Some(other) => {
            return unsupported(&dir.join(CONFIG), format!("a GGUF file has no keys for a rotary embedding {other}"));
        }
    }
    Ok(None)
}

fn vocabulary(w: &mut Writer, files: &ModelFiles, dir: &Path) -> Result<()> {
    let path = dir.join("tokenizer.json");
    let Some(tokenizer) = &files.tokenizer else {
        w.text("tokenizer.ggml.model", "none");
        return Ok(());
    };
    let file: Json = json::parse(&json::read(&path)?).map_err(|e| Error::file(&path, e.to_string()))?;
    let model = &file["model"];
    let Some(merges) = model["merges"].as_array() else {
        return unsupported(
            &path,
            format!("a GGUF file has no keys for a tokenizer of type {}; supported: BPE", model["type"]),
        );
    };
    let pieces = model["byte_fallback"] == true; // SentencePiece's
    // a merge is read in both spellings, as by the tokenizer: [left, right], or "left right"
    let halves = |merge: &Json| match (merge.as_str(), merge.as_array().map(Vec::as_slice)) {
        (Some(text), _) => text.split_once(' ').map(|(a, b)| (a.to_string(), b.to_string())),
        (_, Some([a, b])) => Some((a.as_str()?.to_string(), b.as_str()?.to_string())),
        _ => None,
    };
    let merges: Option<Vec<(String, String)>> = merges.iter().map(halves).collect();
    let merges = merges.ok_or_else(|| Error::file(&path, "has a merge that is no pair of tokens"))?;

    let (mut tokens, mut kinds) = (Vec::new(), Vec::new());
    for id in 0..files.config.vocab as u32 {
        let token = tokenizer.token(id);
        kinds.push(match &token {
            None => kind::UNUSED,
            Some(token) if pieces && model["unk_token"] == **token => kind::UNKNOWN,
            _ if tokenizer.is_special(id) => kind::CONTROL,
            _ if tokenizer.is_added(id) => kind::USER_DEFINED,
            Some(token) if pieces && token.len() == 6 && token.starts_with("<0x") => kind::BYTE,
            _ => kind::NORMAL,
        } as i32);
        tokens.push(token.unwrap_or_else(|| format!("[PAD{id}]"))); // as llama.cpp's converter calls them
    }
    if pieces {
        w.text("tokenizer.ggml.model", "llama");
        w.text("tokenizer.ggml.pre", "default");
        w.floats("tokenizer.ggml.scores", &scores(&tokens, &merges));
        w.flag("tokenizer.ggml.add_space_prefix", prefixes(&file));
    } else {
        let Some(name) = split_name(&file["pre_tokenizer"]) else {
            let what = "cuts a text in a way that GGUF has no name for that aoji knows; supported: that of Llama 3, SmolLM, \
                        Qwen 2 and GPT-2";
            return unsupported(&path, what.into());
        };
        w.text("tokenizer.ggml.model", "gpt2");
        w.text("tokenizer.ggml.pre", name);
        w.flag("tokenizer.ggml.add_space_prefix", false);
        let merges: Vec<String> = merges.iter().map(|(a, b)| format!("{a} {b}")).collect();
        w.texts("tokenizer.ggml.merges", &merges);
    }
    w.texts("tokenizer.ggml.tokens", &tokens);
    w.numbers("tokenizer.ggml.token_type", &kinds);
    special(w, files, tokenizer, dir)
}

/// What begins and ends a text, and the chat template.
fn special(w: &mut Writer, files: &ModelFiles, tokenizer: &Tokenizer, dir: &Path) -> Result<()> {
    let config = TokenizerConfig::read(dir)?;
    let named = config.named();
    let of = |name: &str| named.get(name).and_then(|text| tokenizer.token_id(text));
    let eos = &files.config.eos;
    let ids = [
        ("bos", files.config.bos),
        ("eos", eos.first().copied()),
        ("eot", eos.get(1).copied()),
        ("eom", eos.get(2).copied()),
        ("unknown", of("unk_token")),
        ("padding", of("pad_token")),
    ];
    for (name, id) in ids {
        if let Some(id) = id.filter(|id| (*id as usize) < files.config.vocab) {
            w.number(&format!("tokenizer.ggml.{name}_token_id"), id);
        }
    }
    w.flag("tokenizer.ggml.add_bos_token", tokenizer.bos().is_some());
    let own = dir.join("chat_template.jinja");
    let template = match (json::exists(&own)?, config.chat_template) {
        (true, _) => Some(fs::read_to_string(&own).map_err(Error::io(&own))?),
        (_, Some(ChatTemplate::One(text))) => Some(text),
        (_, Some(ChatTemplate::Named(list))) => list.into_iter().find(|t| t.name == "default").map(|t| t.template),
        _ => None,
    };
    if let Some(template) = template {
        w.text("tokenizer.chat_template", &template);
    }
    Ok(())
}

/// SentencePiece merges the pair whose token has the highest score first, so an earlier merge gets a higher score. A
/// token that no merge makes gets the lowest.
fn scores(tokens: &[String], merges: &[(String, String)]) -> Vec<f32> {
    let mut ranks: HashMap<String, usize> = HashMap::new();
    for (rank, (left, right)) in merges.iter().enumerate() {
        ranks.entry(format!("{left}{right}")).or_insert(rank);
    }
    tokens.iter().map(|token| -(ranks.get(token).copied().unwrap_or(merges.len()) as f32)).collect()
}

/// A space is put in front of a text.
fn prefixes(file: &Json) -> bool {
    let normalizers = file["normalizer"]["normalizers"].as_array().cloned().unwrap_or_default();
    let steps = || normalizers.iter().chain([&file["normalizer"], &file["pre_tokenizer"]]);
    steps().any(|step| step["type"] == "Prepend")
        || steps().any(|step| {
            step["type"] == "Metaspace" && step["prepend_scheme"] != "never" && step["add_prefix_space"] != false
        })
}
