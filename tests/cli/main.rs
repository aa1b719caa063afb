//! The command as a user runs it: what it prints where, its exit codes, its errors.
//!
//! Every test runs the real binary on the embedded model. `--device cpu` keeps a GPU of this machine out of it; the last test
//! runs on the emulated device.
#![cfg(feature = "cli")]

mod conversation;
mod eval;
mod examples;
mod files;
mod help;
mod limits;
mod quantize;
mod tune;

use serde_json::Value;
use std::{
    fs,
    io::{Read, Write},
    path::Path,
    process::{Command, Stdio},
};

/// The result of one run.
struct Run {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Run {
    /// Standard output of a run that must succeed in silence.
    fn ok(self) -> String {
        assert_eq!((self.code, self.stderr.as_str()), (Some(0), ""), "stdout: {}", self.stdout);
        self.stdout
    }

    fn json(self) -> Value {
        let text = self.ok();
        assert_eq!(text.lines().count(), 1, "one object on one line: {text}");
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
    }

    /// Checks that the run failed with `code`, that its message contains `all` of these, and that it printed no result.
    fn fails(self, code: i32, all: &[&str]) {
        assert_eq!(self.code, Some(code), "{}", self.stderr);
        assert_eq!(self.stdout, "", "{}", self.stderr);
        assert!(self.stderr.starts_with("error: "), "{}", self.stderr);
        for text in all {
            assert!(self.stderr.contains(text), "no {text:?} in: {}", self.stderr);
        }
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
    }
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_aoji"));
    command.args(args).env_remove("AOJI_MODEL").env("HF_HUB_CACHE", "/nonexistent/cache");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn feed(mut command: Command, stdin: &[u8]) -> Run {
    let mut child = command.spawn().expect("the binary runs");
    // A command that does not read its input closes the pipe: that is its right.
    let _ = child.stdin.take().expect("piped").write_all(stdin);
    let out = child.wait_with_output().expect("it ends");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8 output");
    Run { code: out.status.code(), stdout: text(out.stdout), stderr: text(out.stderr) }
}

fn aoji(args: &[&str]) -> Run {
    feed(command(args), b"")
}

/// `aoji generate` on the CPU.
fn generate(args: &[&str]) -> Run {
    aoji(&[&["generate", "--device", "cpu"], args].concat())
}

/// `aoji chat` on the CPU, with these lines as input.
fn chat(args: &[&str], lines: &[&str]) -> Run {
    feed(command(&[&["chat", "--device", "cpu"], args].concat()), lines.join("\n").as_bytes())
}

fn ids(value: &Value) -> Vec<u64> {
    value.as_array().expect("a list").iter().map(|v| v.as_u64().expect("an id")).collect()
}

fn join(ids: &[u64]) -> String {
    ids.iter().map(u64::to_string).collect::<Vec<_>>().join(",")
}

/// Conversations that the demo model knows, as lists of question and answer.
fn known() -> Vec<Vec<(String, String)>> {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo/questions.jsonl")).unwrap();
    let text_of = |turn: &Value, key: &str| turn[key].as_str().unwrap().to_string();
    let turns = |line: &str| {
        let line: Value = serde_json::from_str(line).unwrap();
        line["turns"].as_array().unwrap().iter().map(|t| (text_of(t, "question"), text_of(t, "answer"))).collect()
    };
    text.lines().map(turns).collect()
}

/// The question with the shortest answer of at least `chars` characters.
fn short(chars: usize) -> (String, String) {
    let single = known().into_iter().filter(|turns| turns.len() == 1).map(|mut turns| turns.remove(0));
    single.filter(|t| t.1.chars().count() >= chars).min_by_key(|t| t.1.len()).expect("the list has it")
}

#[test]
fn the_answer_and_nothing_else_goes_to_stdout() {
    let (question, answer) = short(20);
    assert_eq!(generate(&[&question]).ok(), format!("{answer}\n"));
    // With -v the same, and beside it what was done.
    let run = generate(&[&question, "-v"]);
    assert_eq!((run.code, run.stdout), (Some(0), format!("{answer}\n")));
    for text in ["rope_theta 10000", "BOS 2046", "eos 2047", "tokens/s", "phase", "tokenizer", "first token"] {
        assert!(run.stderr.contains(text), "no {text:?} in: {}", run.stderr);
    }
}

#[test]
fn json_has_ids_reason_and_timings() {
    let (question, answer) = short(20);
    let whole = generate(&[&question, "--json"]).json();
    assert_eq!((whole["text"].as_str(), whole["finish_reason"].as_str()), (Some(answer.as_str()), Some("stop")));
    let tokens = ids(&whole["token_ids"]);
    assert_eq!(tokens.last(), Some(&2047), "the token that ended the text");
    let timings = &whole["timings"];
    assert_eq!(timings["prompt_tokens"].as_u64(), Some(ids(&whole["prompt_tokens"]).len() as u64));
    assert_eq!(timings["tokens"].as_u64(), Some(tokens.len() as u64));
    for key in ["prompt_seconds", "decode_seconds", "first_token_seconds"] {
        assert!(timings[key].as_f64().is_some_and(|s| s > 0.0), "{key} in {timings}");
    }
    let phases = whole["startup"]["phases"].as_array().unwrap();
    let of = |name: &str| phases.iter().find(|p| p["name"] == name).unwrap_or_else(|| panic!("no {name}: {phases:?}"));
    for name in ["config", "files", "tokenizer", "weights", "session"] {
        assert!(of(name)["seconds"].as_f64() >= Some(0.0), "{name}");
    }
    let (first, total) = (of("first token"), whole["startup"]["seconds"].as_f64().unwrap());
    let end = first["begin"].as_f64().unwrap() + first["seconds"].as_f64().unwrap();
    assert!((total - end).abs() < 1e-9, "the first token ends the start");
    let cut = generate(&[&question, "--json", "--max-tokens", "4"]).json();
    assert_eq!((ids(&cut["token_ids"]), cut["finish_reason"].as_str()), (tokens[..4].to_vec(), Some("length")));
    assert!(answer.starts_with(cut["text"].as_str().unwrap()));
}

#[test]
fn all_ways_to_give_a_prompt_agree() {
    let (question, _) = short(20);
    let few = ["--json", "--max-tokens", "2"];
    let run = |args: &[&str]| generate(&[args, &few].concat()).json();
    let expected = run(&[&question]);
    let same = |way: &str, found: Value| {
        for key in ["prompt_tokens", "token_ids", "text"] {
            assert_eq!(found[key], expected[key], "{way}: {key}");
        }
    };
    same("--question", run(&["-q", &question]));
    let stdin = |args: &[&str], text: &str| {
        feed(command(&[&["generate", "--device", "cpu"], args, &few].concat()), text.as_bytes()).json()
    };
    same("- for the question", stdin(&["-"], &format!("{question}\n")));
    let prompt = format!("### Question:\n{question}\n\n### Instruction:\n{}\n\n### Response:\n", aoji::AOG_INSTRUCTION);
    same("--prompt", run(&["--prompt", &prompt]));
    same("--instruction", run(&[&question, "--instruction", aoji::AOG_INSTRUCTION, "--template", "aog"]));
    same("- for --prompt-file", stdin(&["--prompt-file", "-"], &prompt));
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_string()
    };
    same("--prompt-file", run(&["--prompt-file", &file("prompt.txt", &prompt)]));
    same("--tokens", run(&["--tokens", &join(&ids(&expected["prompt_tokens"]))]));
    let template = "{{ bos_token }}### Question:\n{{ messages[1].content }}\n\n### Instruction:\n\
                    {{ messages[0].content }}\n\n### Response:\n\n";
    let template = file("chat.jinja", template);
    // The demo's special tokens are not in a directory: the template's BOS is empty, all else is there.
    let jinja = run(&[&question, "--template", &template, "--instruction", aoji::AOG_INSTRUCTION]);
    assert_eq!(ids(&jinja["prompt_tokens"]), ids(&expected["prompt_tokens"])[1..]);
}

#[test]
fn a_stop_string_ends_the_text_before_it() {
    let (question, answer) = short(20);
    let chars: Vec<char> = answer.chars().collect();
    let stop: String = chars[8..12].iter().collect();
    let before = answer.split(&stop).next().unwrap();
    let found = generate(&[&question, "--json", "--stop", "없는 말", "--stop", &stop]).json();
    assert_eq!((found["text"].as_str(), found["finish_reason"].as_str()), (Some(before), Some("stop")));
    assert_eq!(generate(&[&question, "--stop", &stop]).ok().trim_end_matches('\n'), before);
    let late = generate(&[&question, "--json", "--stop", &stop, "--min-tokens", "20", "--max-tokens", "20"]).json();
    assert_eq!((ids(&late["token_ids"]).len(), late["finish_reason"].as_str()), (20, Some("length")));
    assert!(late["text"].as_str().unwrap().starts_with(&format!("{before}{stop}")), "{late}");
}

#[test]
fn sampling_flags_do_what_they_say() {
    let (question, _) = short(20);
    let run = |args: &[&str]| {
        let answer = generate(&[&[question.as_str(), "--json", "--max-tokens", "8"], args].concat()).json();
        ids(&answer["token_ids"])
    };
    let greedy = run(&[]);
    let sampled = |seed: &str| run(&["--temperature", "3", "--seed", seed]);
    let texts: Vec<_> = ["1", "2", "3", "1"].into_iter().map(sampled).collect();
    assert_eq!(texts[0], texts[3], "the same seed");
    assert!(texts[..3].iter().any(|t| *t != texts[0]), "seeds make no difference: {texts:?}");
    for one in ["--top-k=1", "--top-p=0.000001", "--min-p=1"] {
        assert_eq!(run(&["--temperature", "3", "--seed", "2", one]), greedy, "{one} leaves the most likely token");
    }
    let forbidden = run(&["--logit-bias", &format!("{}=-inf", greedy[0])]);
    assert!(!forbidden.contains(&greedy[0]), "{forbidden:?} has {}", greedy[0]);
    assert_eq!(run(&["--logit-bias", "77=100"]), [77; 8]);
    for penalty in ["--frequency-penalty=100", "--presence-penalty=100", "--repeat-penalty=100"] {
        let mut found = run(&["--logit-bias", "77=60", penalty]);
        assert_eq!(found[0], 77, "{penalty}");
        found.sort_unstable();
        found.dedup();
        assert!(found.len() > 1, "{penalty} did not keep 77 from coming again");
    }
    // 2047 ends the text.
    assert_eq!(run(&["--logit-bias", "2047=100"]), [2047]);
    assert_eq!(run(&["--logit-bias", "2047=100", "--ignore-eos"]), [2047; 8]);
    let late = run(&["--logit-bias", "2047=100", "--min-tokens", "3"]);
    assert_eq!((late.len(), late[3]), (4, 2047), "{late:?}");
}

#[test]
fn text_becomes_ids_and_text_again() {
    let text = "안녕하세요, aoji!\n둘째 줄 🫠";
    let run = |args: &[&str]| aoji(&[&["tokenize", "demo"], args].concat());
    let with = run(&[text]).ok();
    let bare = run(&[text, "--no-special"]).ok();
    assert_eq!(with, format!("2046,{bare}"));
    assert_eq!(feed(command(&["tokenize", "demo", "-"]), text.as_bytes()).ok(), with);
    let (with, bare) = (with.trim_end(), bare.trim_end());
    assert_eq!(run(&["--decode", bare]).ok(), format!("{text}\n"));
    assert_eq!(run(&["--decode", with]).ok(), format!("<|begin_of_text|>{text}\n"));
    assert_eq!(run(&["--decode", with, "--no-special", "--json"]).json()["text"].as_str(), Some(text));
    let json = run(&["안녕", "--json"]).json();
    assert_eq!(ids(&json["ids"]).len(), json["tokens"].as_array().unwrap().len());

    let lines = "{\"text\": \"안녕\"}\n\n \t\n{\"text\": \"\", \"other\": 1}\n";
    let found = feed(command(&["tokenize", "demo", "--jsonl", "--no-special"]), lines.as_bytes()).ok();
    let expected = format!("{{\"ids\":[{}]}}\n{{\"ids\":[]}}\n", run(&["안녕", "--no-special"]).ok().trim_end());
    assert_eq!(found, expected);
    let bad = feed(command(&["tokenize", "demo", "--jsonl"]), b"{\"text\": \"a\"}\n{\"txt\": 1}\n");
    assert_eq!((bad.code, bad.stdout.lines().count()), (Some(1), 1));
    assert!(bad.stderr.contains("line 2") && bad.stderr.contains("\"text\""), "{}", bad.stderr);
    run(&["--decode", "1,999999"]).fails(1, &["999999"]);
}

#[test]
fn info_says_what_the_files_say() {
    let info = aoji(&["info", "demo", "--json"]).json();
    let config = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo/config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    for (ours, theirs) in [
        ("dim", "hidden_size"),
        ("ffn_dim", "intermediate_size"),
        ("n_layers", "num_hidden_layers"),
        ("n_heads", "num_attention_heads"),
        ("n_kv_heads", "num_key_value_heads"),
        ("vocab", "vocab_size"),
        ("max_seq", "max_position_embeddings"),
        ("rope_theta", "rope_theta"),
        ("tied", "tie_word_embeddings"),
        ("bos", "bos_token_id"),
    ] {
        assert_eq!(info[ours], config[theirs], "{ours}");
    }
    assert_eq!(info["bytes"].as_u64(), info["parameters"].as_u64().map(|n| 2 * n), "bf16");
    assert_eq!((info["dtypes"][0].as_str(), info["template"].as_str()), (Some("bfloat16"), Some("aog")));
    for plan in info["memory"].as_array().unwrap() {
        let [weights, kv, scratch, total] = ["weights", "kv", "scratch", "total"].map(|k| plan[k].as_u64().unwrap());
        assert_eq!(weights + kv + scratch, total, "{plan}");
    }
    // a cache for 16 whole ones of 64, and what fits a little memory
    let many = aoji(&["info", "demo", "--json", "--sequences", "64", "--memory", "0.5"]).json();
    let (one, all) = (&info["memory"][0], &many["memory"][0]);
    assert_eq!(all["kv"].as_u64(), one["kv"].as_u64().map(|n| 16 * n), "{all}");
    assert_eq!(all["cache_tokens"].as_u64(), all["context"].as_u64().map(|n| 16 * n), "{all}");
    let page = many["kv_bytes_per_token"].as_u64().unwrap() * many["page_tokens"].as_u64().unwrap();
    let fits = many["fitting_tokens"][0].as_u64().unwrap() / 64 * page;
    let rest = all["total"].as_u64().unwrap() - all["kv"].as_u64().unwrap();
    assert!(fits + rest <= 1 << 29 && fits + rest + page > 1 << 29, "{fits} and {rest}");
    // a byte an element and one a row, which has 64 elements
    let fp8 = aoji(&["info", "demo", "--json", "--kv", "fp8"]).json();
    let of_token = |info: &Value| info["kv_bytes_per_token"].as_u64().unwrap();
    assert_eq!(of_token(&fp8) * 128, of_token(&info) * 65);
    assert_eq!((fp8["memory"][0]["kv_dtype"].as_str(), one["kv_dtype"].as_str()), (Some("fp8"), Some("auto")));
    aoji(&["info", "demo", "--kv", "int8"]).fails(2, &["--kv", "int8", "expected auto or fp8"]);
    let text = aoji(&["info", "demo", "--sequences", "64", "--memory", "0.000001"]).ok();
    assert!(text.contains("64 sequences, with a cache for 16 whole ones") && text.contains("none"), "{text}");
    aoji(&["info", "demo", "--memory", "-1"]).fails(1, &["--memory -1", "GiB"]);
    let text = aoji(&["info", "demo"]).ok();
    for part in ["2.7 million", "2046 \"<|begin_of_text|>\"", "2047 \"<|end_of_text|>\"", "rope_theta"] {
        assert!(text.contains(part), "no {part:?} in: {text}");
    }
}

#[test]
fn wrong_usage_is_code_2() {
    for (args, said) in [
        (&["generate", "--temprature", "1", "x"][..], "--temprature"),
        (&["generate"], "aoji generate \"피보나치"),
        (&["score"], "aoji score \""),
        (&["tokenize", "demo"], "--decode"),
        (&["generate", "x", "--prompt", "y"], "cannot be used with"),
        (&["generate", "--prompt", "y", "--instruction", "z"], "cannot be used with"),
        (&["generate", "x", "--device", "tpu"], "expected auto, cpu, cuda or cuda:N"),
        (&["generate", "x", "--device", "cuda:x"], "number of a GPU"),
        (&["generate", "x", "--dtype", "int4"], "expected bf16 or f32"),
        (&["generate", "x", "--logit-bias", "5:1"], "ID=BIAS"),
        (&["generate", "x", "--max-tokens", "0"], "--max-tokens"),
        (&["generate", "--tokens", "1,x"], "--tokens"),
        (&["dance"], "dance"),
        (&["info", "demo", "-m", "demo"], "cannot be used with"),
        (&["info", "demo", "--sequences", "65"], "1..=64"),
        (&["verify", "demo", "--model", "demo"], "cannot be used with"),
        (&["tokenize", "-m", "demo", "x", "y"], "one word too many"),
        (&["tokenize", "demo", "x", "--decode", "1"], "one word too many"),
        (&["merge-lora", "-m", "demo", "a", "b", "c"], "BASE ADAPTER OUT"),
        (&["pull"], "OWNER/NAME"),
        (&["bench", "--decode"], "--depth"),
        (&["bench", "--depth", "nowhere"], "or none"),
    ] {
        aoji(args).fails(2, &[said, "try '--help'"]);
    }
}

#[test]
fn a_model_is_named_by_a_flag_or_by_itself() {
    let same = |by_itself: &[&str], by_flag: &[&str]| {
        let said = aoji(by_itself).ok();
        assert_eq!(said, aoji(by_flag).ok(), "{by_itself:?}");
        said
    };
    same(&["info", "demo"], &["info", "-m", "demo"]);
    same(&["info", "demo"], &["info"]);
    same(&["tokenize", "demo", "하늘"], &["tokenize", "--model", "demo", "하늘"]);
    same(&["tokenize", "demo", "--decode", "70,71"], &["tokenize", "-m", "demo", "--decode", "70,71"]);
    let no = ["--device", "cpu", "--invariance"];
    same(&[&["verify", "demo"], &no[..]].concat(), &[&["verify", "-m", "demo"], &no[..]].concat());
    for args in [&["merge-lora", "demo", "/no", "/no/out"][..], &["merge-lora", "-m", "demo", "/no", "/no/out"]] {
        aoji(args).fails(1, &["/no/adapter_config.json"]);
    }
    // What AOJI_MODEL names is a default: it is in nobody's way.
    let mut named = command(&["info", "demo"]);
    named.env("AOJI_MODEL", "/no/such/model");
    feed(named, b"").ok();
    let mut unnamed = command(&["info"]);
    unnamed.env("AOJI_MODEL", "/no/such/model");
    feed(unnamed, b"").fails(1, &["/no/such/model"]);
}

#[test]
fn who_types_only_the_name_hears_what_to_type_first() {
    let run = aoji(&[]);
    assert_eq!((run.code, run.stdout.as_str()), (Some(2), ""));
    let first: Vec<&str> = run.stderr.lines().take(3).map(|l| l.split_whitespace().nth(1).unwrap_or("")).collect();
    assert_eq!(first, ["generate", "pull", "chat"], "{}", run.stderr);
    assert!(run.stderr.starts_with("  aoji "), "the three begin in one column: {}", run.stderr);
    assert!(run.stderr.contains("Usage: aoji") && run.stderr.contains("tokenize"), "{}", run.stderr);
}

#[test]
fn errors_name_what_is_wrong_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let bad = dir.path().join("bad.txt");
    fs::write(&bad, b"abc\xff").unwrap();
    let bad = bad.to_str().unwrap();
    for (args, all) in [
        (&["x", "--model", "owner/none"][..], &["owner/none", "hint: ", "aoji pull"][..]),
        (&["x", "--model", "/nonexistent"], &["/nonexistent", "hint: "]),
        (&["x", "--model", bad], &[bad, "expected the model's directory"]),
        (&["--prompt-file", "/nonexistent/prompt"], &["/nonexistent/prompt"]),
        (&["--prompt-file", bad], &[bad, "byte 3 is not UTF-8"]),
        (&["x", "--context", "8"], &["context of 8 tokens", "hint: shorten"]),
        (&["x", "--context", "2000"], &["1 to 1024"]),
        (&["--tokens", "5,2048"], &["token 2048", "2048"]),
        (&["x", "--logit-bias", "2048=1"], &["logit_bias", "2048"]),
        (&["x", "--top-p", "2"], &["top_p is 2", "0 to 1"]),
        (&["x", "--stop", ""], &["stop string 1 is empty"]),
        (&["x", "--max-tokens", "5", "--min-tokens", "6"], &["min_tokens is 6", "max_tokens, which is 5"]),
        (&["x", "--template", "chatml"], &["chatml", "expected aog"]),
        (&["x", "--template", "raw", "--instruction", "y"], &["raw", "instruction"]),
    ] {
        generate(args).fails(1, all);
    }
    feed(command(&["generate", "--device", "cpu", "-"]), b"\xff").fails(1, &["standard input", "byte 0"]);
    aoji(&["score", "--device", "cpu", "--tokens", "3,2048"]).fails(1, &["token 2048"]);
    aoji(&["score", "--device", "cpu", "--no-special", ""]).fails(1, &["no tokens"]);
}

#[test]
fn without_a_driver_cuda_is_an_error() {
    let mut run = command(&["generate", "x", "--device", "cuda"]);
    run.env("CUDA_VISIBLE_DEVICES", "").env_remove("LD_LIBRARY_PATH");
    feed(run, b"").fails(1, &["hint: `aoji doctor`", "--device cpu"]);
}

#[test]
fn a_model_without_tokenizer_speaks_in_ids() {
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo").join(file);
        fs::copy(source, dir.path().join(file)).unwrap();
    }
    let model = dir.path().to_str().unwrap();
    generate(&["x", "--model", model]).fails(1, &["tokenizer.json", "--tokens"]);
    generate(&["--tokens", "2046,5", "--model", model]).fails(1, &["tokenizer.json"]);
    aoji(&["tokenize", model, "x"]).fails(1, &["tokenizer.json"]);
    let tokens = ["--tokens", "2046,5", "--json", "--max-tokens", "2"];
    let found = generate(&[&tokens[..], &["--model", model]].concat()).json();
    assert_eq!((found["text"].as_str(), &found["token_ids"]), (Some(""), &generate(&tokens).json()["token_ids"]));
    assert_eq!(aoji(&["score", "--device", "cpu", "--model", model, "--tokens", "2046,5"]).code, Some(0));
}

/// A reader that stops reading has enough: this is no failure, and gives no message.
#[test]
fn a_closed_pipe_is_silent() {
    let mut child = command(&["completions", "bash"]).spawn().unwrap();
    drop(child.stdout.take());
    drop(child.stdin.take());
    let out = child.wait_with_output().unwrap();
    assert_eq!((out.status.code(), out.stderr), (Some(0), Vec::new()));
}

#[cfg(unix)]
#[test]
fn ctrl_c_keeps_what_was_generated() {
    let (question, answer) = short(20);
    let mut child = command(&["generate", "--device", "cpu", &question, "--ignore-eos"]).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut first = [0; 3];
    stdout.read_exact(&mut first).unwrap();
    let kill = Command::new("sh").args(["-c", &format!("kill -INT {}", child.id())]).status().unwrap();
    assert!(kill.success());
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest).unwrap();
    let out = child.wait_with_output().unwrap();
    let text = String::from_utf8([&first[..], &rest].concat()).expect("whole characters");
    assert_eq!(out.status.code(), Some(130), "{text}");
    assert!(text.ends_with('\n') && text.starts_with(answer.chars().next().unwrap()), "{text}");
}

/// From the command through driver calls and kernels, on the emulated device.
#[cfg(feature = "cuda")]
#[test]
fn the_emulated_device_answers_as_the_cpu_does() {
    if aoji::cuda::kernels::MODULES.is_empty() {
        println!("skipped: built without kernels (AOJI_SKIP_KERNELS)");
        return;
    }
    let (question, _) = short(20);
    let args = ["generate", &question, "--json", "--max-tokens", "2", "--context", "128"];
    let on = |device: &str| {
        let mut run = command(&[&args[..], &["--device", device]].concat());
        run.env("LD_LIBRARY_PATH", cuda_emulator::library_dir());
        feed(run, b"").json()
    };
    assert_eq!(on("cuda")["token_ids"], on("cpu")["token_ids"]);
}

#[test]
fn templates_have_local_time() {
    let dir = tempfile::tempdir().unwrap();
    let template = dir.path().join("time.jinja");
    fs::write(&template, "{{ strftime_now('%H:%M') }}").unwrap();
    let of = |zone: &str| {
        let args = [
            "generate",
            "--device",
            "cpu",
            "--json",
            "--max-tokens",
            "1",
            "--template",
            template.to_str().unwrap(),
            "a",
        ];
        let mut command = command(&args);
        command.env("TZ", zone);
        let prompt = join(&ids(&feed(command, b"").json()["prompt_tokens"]));
        let text = aoji(&["tokenize", "demo", "--decode", &prompt]).ok();
        let (hour, minute) = text.trim().split_once(':').unwrap();
        hour.parse::<i32>().unwrap() * 60 + minute.parse::<i32>().unwrap()
    };
    let (london, seoul) = (of("UTC0"), of("KST-9"));
    let apart = (seoul - london).rem_euclid(24 * 60);
    assert!((540..545).contains(&apart), "{london} {seoul}");
}
