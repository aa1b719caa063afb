//! What the command does when the system has no room for its messages, no more memory and no more threads.
#![cfg(target_os = "linux")]

use super::{aoji, command, feed};
use std::{fs, process::Stdio};

/// With a standard error that cannot be written: every write fails, as on a full disk.
#[test]
fn messages_that_cannot_be_written_change_nothing() {
    let code = |args: &[&str]| {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut command = command(args);
        command.stdin(Stdio::null()).stderr(full);
        let out = command.output().unwrap();
        (out.status.code(), String::from_utf8(out.stdout).unwrap())
    };
    assert_eq!(code(&["info", "nothing"]), (Some(1), String::new()));
    assert_eq!(code(&[]), (Some(2), String::new()));
    // with -v also the log, the phases of the start and the summary
    let args = ["generate", "--device", "cpu", "--tokens", "2046,70", "--max-tokens", "2"];
    let silent = aoji(&args).ok();
    assert_eq!(code(&[&args[..], &["-vv"]].concat()), (Some(0), silent));
}

/// With 128 TiB for the stack of a thread, none starts.
#[test]
fn without_threads_the_first_one_does_all() {
    let args = ["score", "--device", "cpu", "--tokens", "2046,70,71"];
    let mut alone = command(&args);
    alone.env("RUST_MIN_STACK", (1u64 << 47).to_string());
    assert_eq!(feed(alone, b"").ok(), aoji(&args).ok());
}

/// A cache takes memory as it is used; one that the system does not give at all is an error that says what to do.
#[test]
fn a_cache_beyond_the_memory_is_an_error_or_is_used_in_part() {
    const CONFIG: &str = r#"{
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 64,
        "intermediate_size": 64, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 32,
        "head_dim": 64, "vocab_size": 320, "max_position_embeddings": 65536, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": false
    }"#; // 8 GiB of keys and values, for answers that token 2 ends at once
    let dir = tempfile::tempdir().unwrap();
    aoji::synth::write(CONFIG, 7, aoji::Dtype::Bf16, 1 << 30, dir.path(), |_, _| {}).unwrap();
    let generate = |limit: &str| {
        let model = dir.path().to_str().unwrap();
        let args =
            ["generate", "--device", "cpu", "--threads", "2", "--tokens", "5,6", "--logit-bias", "2=100", "-m", model];
        let program = command(&[]).get_program().to_owned();
        let mut run = std::process::Command::new("sh");
        run.args(["-c", &format!("ulimit -v {limit} && exec \"$@\""), "sh"]).arg(program).args(args);
        run.args(["--context", "65536", "--json"]).env_remove("AOJI_MODEL").env("RAYON_NUM_THREADS", "2");
        run.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        feed(run, b"")
    };
    generate(&(4 << 20).to_string()).fails(1, &["MiB for a buffer", "--context"]);
    let run = generate("unlimited");
    assert_eq!(run.code, Some(0), "{}", run.stderr);
}
