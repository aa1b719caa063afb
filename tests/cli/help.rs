//! The help of the command.

use super::aoji;

#[test]
fn help_and_completions_know_every_command_and_flag() {
    let model = ["--model", "--device", "--dtype", "--kv", "--lora", "--context", "AOJI_MODEL"];
    let sampling = [
        "--max-tokens",
        "--temperature",
        "--top-k",
        "--top-p",
        "--min-p",
        "--repeat-penalty",
        "--frequency-penalty",
        "--presence-penalty",
        "--logit-bias",
        "--seed",
        "--min-tokens",
        "--stop",
        "--ignore-eos",
        "--speculate",
    ];
    let prompt = ["--question", "--instruction", "--prompt", "--prompt-file", "--tokens", "--template", "--json"];
    let commands = [
        ("generate", [&model[..], &sampling, &prompt].concat()),
        ("chat", [&model[..], &sampling, &["--instruction", "--session", "--template", "/regen"]].concat()),
        #[cfg(feature = "server")]
        (
            "serve",
            [
                &model[..],
                &["--host", "--port", "--unix-socket", "--served-model-name", "--sequences", "--prefill-chunk"],
                &["--cache-tokens"],
                &["--speculate"],
                &["--queue", "--api-key", "--api-key-file", "--cors", "--body-limit", "--drain-seconds"],
                &["--chat-template", "--unknown-fields", "--log-format", "AOJI_API_KEY", "/v1/chat/completions"],
            ]
            .concat(),
        ),
        ("score", [&model[..], &["--prompt-file", "--tokens", "--top", "--no-special", "--json"]].concat()),
        ("tokenize", vec!["--decode", "--no-special", "--jsonl", "--json"]),
        ("info", vec!["--kv", "--sequences", "--memory", "--json"]),
        ("pull", vec!["--revision", "--file", "HF_TOKEN", "NO_PROXY"]),
        ("doctor", vec!["--json"]),
        ("synth", vec!["--like", "--seed", "--dtype", "--shard-size"]),
        ("bench", vec!["--kernels", "--speculate", "--prompts", "--json"]),
        ("verify", vec!["--golden", "--invariance", "--against", "--text", "--json"]),
        ("quantize", vec!["--format", "--group", "--ignore", "--calibration", "--lora", "--force", "--json"]),
        ("eval", [&model[..], &["--data", "--shots", "--save-samples", "--beside", "--svg", "--json"]].concat()),
        ("ppl", [&model[..], &["--window", "--stride", "--jsonl", "--json"]].concat()),
        ("merge-lora", vec!["--lora"]),
        ("data", vec!["alpaca", "chat", "card", "preview"]),
        ("tune", vec!["--set", "--threads", "--dry-run", "--keys", "--device", "--bench"]),
        ("completions", vec!["bash"]),
    ];
    let top = aoji(&["--help"]).ok();
    let script = aoji(&["completions", "bash"]).ok();
    assert!(top.contains("Exit codes") && top.contains("--verbose"), "{top}");
    for (name, flags) in commands {
        assert!(top.contains(name) && script.contains(name), "{name}");
        let help = aoji(&[name, "--help"]).ok();
        for flag in flags {
            assert!(help.contains(flag), "no {flag} in: {help}");
        }
    }
    for shell in ["zsh", "fish"] {
        assert!(aoji(&["completions", shell]).ok().contains("max-tokens"), "{shell}");
    }
    assert!(aoji(&["--version"]).ok().starts_with("aoji "));
}
