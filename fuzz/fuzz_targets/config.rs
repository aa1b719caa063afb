//! Arbitrary text as `config.json` and `generation_config.json`: never a panic, and no accepted size overflows.
#![no_main]

#[path = "../../src/files/config/mod.rs"]
#[allow(dead_code)]
mod config;
#[path = "../../src/error.rs"]
#[allow(dead_code)]
mod error;
#[path = "../../src/files/json.rs"]
#[allow(dead_code)]
mod json;

mod files {
    pub(crate) use crate::json;
}

use std::path::Path;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|texts: (&str, Option<&str>)| {
    let Ok(config) = config::Config::from_json(Path::new("config.json"), texts.0, texts.1) else { return };
    assert!(config.weight_bytes() > 0 && config.group() * config.n_kv_heads == config.n_heads);
    if config.head_dim <= 4096 {
        assert!(config.rope_inv_freq().iter().all(|f| f.is_finite() && *f >= 0.0));
    }
});
