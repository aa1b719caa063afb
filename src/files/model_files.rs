//! Names of the files in a model directory, as Hugging Face has them.

/// What the model is; without it a directory is none.
pub const CONFIG: &str = "config.json";
/// Weights in one file.
pub const SINGLE: &str = "model.safetensors";
/// Which of several files has which tensor.
pub const INDEX: &str = "model.safetensors.index.json";
/// All but the weights and their index.
pub const SMALL: [&str; 7] = [
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
];

/// Whether a file of this name is one of a model.
pub fn belongs(name: &str) -> bool {
    let shard = name.starts_with("model") && name.ends_with(".safetensors");
    shard || name == INDEX || SMALL.contains(&name)
}
