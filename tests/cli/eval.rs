//! Commands that measure a model, and adapters.

use super::{Run, aoji, command, generate, ids, join, short};
use serde_json::{Value, json};
use std::{fs, path::Path, process::Command, time::Duration};

/// A benchmark of two tasks with `n` rows in each split, in our own words.
fn write_data(dir: &Path, n: usize) {
    let lines = |row: &dyn Fn(usize) -> Value| (0..n).map(|i| row(i).to_string() + "\n").collect::<String>();
    for (split, salt) in [("test", 0), ("train", 100)] {
        let sentineg = lines(&|i| json!({"sentence": format!("{}번째 물건이 좋다", i + salt), "label": i % 2}));
        fs::write(dir.join(format!("sentineg.{split}.jsonl")), sentineg).unwrap();
        let copa = lines(&|i| {
            let question = if i % 3 == 0 { "원인" } else { "결과" };
            json!({"premise": format!("물 {}잔을 마셨다.", i + salt), "question": question, "label": i / 2 % 2,
                "alternative_1": "목이 말랐다.", "alternative_2": "하늘이 파란색이다."})
        });
        fs::write(dir.join(format!("copa.{split}.jsonl")), copa).unwrap();
    }
}

fn eval(data: &Path, more: &[&str]) -> Run {
    let args = ["eval", "kobest", "--device", "cpu", "--tasks", "sentineg,copa", "--data", data.to_str().unwrap()];
    aoji(&[&args[..], more].concat())
}

#[test]
fn a_benchmark_as_table_json_and_picture() {
    let dir = tempfile::tempdir().unwrap();
    write_data(dir.path(), 6);
    let report = eval(dir.path(), &["--shots", "2", "--json"]).json();
    let names: Vec<&str> = report["tasks"].as_array().unwrap().iter().map(|t| t["task"].as_str().unwrap()).collect();
    assert_eq!(names, ["kobest_copa", "kobest_sentineg"]);
    for t in report["tasks"].as_array().unwrap() {
        assert_eq!(t["n"], 6);
        for name in ["acc", "acc_stderr", "f1"] {
            assert!((0.0..=1.0).contains(&t[name].as_f64().unwrap()), "{name} of {t}");
        }
    }
    assert_eq!((&report["requests"], &report["shots"], &report["bos"]), (&json!(24), &json!(2), &json!("off")));
    let (asked, computed) = (report["tokens_asked"].as_u64().unwrap(), report["tokens_computed"].as_u64().unwrap());
    assert!(computed * 10 < asked * 6, "{computed} of {asked}: a context is computed for each choice");

    // A byte order mark, with which some editors begin a file, belongs to no row.
    for entry in fs::read_dir(dir.path()).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        fs::write(path, format!("\u{feff}{text}")).unwrap();
    }
    assert_eq!(eval(dir.path(), &["--shots", "2", "--json"]).json()["tasks"], report["tasks"]);

    let (earlier, svg) = (dir.path().join("earlier.json"), dir.path().join("bars.svg"));
    fs::write(&earlier, r#"{"model": "card", "tasks": [{"task": "kobest_copa", "acc": 0.762, "acc_stderr": 0.0135}]}"#)
        .unwrap();
    let beside = ["--shots", "2", "--beside", earlier.to_str().unwrap(), "--svg", svg.to_str().unwrap()];
    let table = eval(dir.path(), &beside).ok();
    let lines: Vec<&str> = table.lines().collect();
    let acc = report["tasks"][0]["acc"].as_f64().unwrap();
    assert!(lines[0].starts_with("|     Tasks      |n-shot| Metric |Value |   |Stderr| card |"), "{table}");
    assert!(lines[2].starts_with(&format!("|kobest_copa     |     2|acc     |{acc:.4}|±  |0.")), "{table}");
    assert!(lines[2].ends_with("| 0.7620 ± 0.0135 |") && lines[3].ends_with("| - |"), "{table}");
    let svg = fs::read_to_string(&svg).unwrap();
    assert!(svg.contains(">0.7620</text>") && svg.contains(&format!(">{acc:.4}</text>")), "{svg}");

    let picture = dir.path().join("card.svg");
    let card = ["--beside", "card", "--beside", earlier.to_str().unwrap(), "--svg", picture.to_str().unwrap()];
    let table = eval(dir.path(), &card).ok();
    let svg = fs::read_to_string(picture).unwrap();
    assert!(svg.contains(">werty1248/Llama-3-Ko-8B-OpenOrca (card)</text>") && svg.contains(">0.9471</text>"), "{svg}");
    let lines: Vec<&str> = table.lines().collect();
    let names = ["Instruct-AOG (card) | beomi/Llama-3-Open-Ko-8B (card) |", "OpenOrca (card) | card |"];
    assert!(names.iter().all(|n| lines[0].contains(n)), "{table}");
    let copa = "| 0.8120 ± 0.0124 | 0.8110 ± 0.0124 | 0.7620 ± 0.0135 | 0.7620 ± 0.0135 |";
    assert!(lines[2].ends_with(copa) && lines[3].ends_with("| 0.9471 ± 0.0112 | - |"), "{table}");
    assert_eq!(lines[1].matches('|').count(), lines[3].matches('|').count(), "{table}");
    eval(dir.path(), &["--shots", "2", "--beside", "card"]).fails(1, &["--beside card", "of 5 shots", "of 2"]);

    let one = eval(dir.path(), &["--shots", "0", "--limit", "1"]).ok();
    assert!(one.contains("|N/A   |"), "{one}");
}

#[test]
fn a_benchmark_goes_on_where_it_was_ended() {
    let dir = tempfile::tempdir().unwrap();
    write_data(dir.path(), 5);
    let file = dir.path().join("samples.jsonl");
    let save = ["--shots", "1", "--json", "--save-samples", file.to_str().unwrap()];
    let tasks = |more: &[&str]| eval(dir.path(), &[&save[..], more].concat()).json();
    let whole = eval(dir.path(), &["--shots", "1", "--json"]).json();
    tasks(&["--limit", "2"]);
    let text = fs::read_to_string(&file).unwrap();
    assert_eq!(text.lines().count(), 1 + 4);
    fs::write(&file, &text[..text.len() - 20]).unwrap(); // ended while it wrote the last line
    let resumed = tasks(&[]);
    assert_eq!((&resumed["tasks"], &resumed["tokens_asked"]), (&whole["tasks"], &whole["tokens_asked"]));
    assert_eq!(fs::read_to_string(&file).unwrap().lines().count(), 1 + 10);
    let again = tasks(&[]);
    assert_eq!((&again["tasks"], &again["requests_per_second"]), (&whole["tasks"], &Value::Null));
    let sample: Value = serde_json::from_str(fs::read_to_string(&file).unwrap().lines().last().unwrap()).unwrap();
    assert!(sample["context"].as_str().unwrap().contains("\n\n"), "{sample}");
    assert_eq!(sample["continuations"].as_array().unwrap().len(), sample["logprobs"].as_array().unwrap().len());

    let other = ["--shots", "0", "--save-samples", file.to_str().unwrap()];
    eval(dir.path(), &other).fails(1, &["samples.jsonl", "shots is 1, this run's is 0", "choose another file"]);
    let note = dir.path().join("note.txt");
    fs::write(&note, "a line without an end").unwrap();
    eval(dir.path(), &["--shots", "0", "--save-samples", note.to_str().unwrap()])
        .fails(1, &["note.txt: is not a file of"]);
    assert_eq!(fs::read_to_string(&note).unwrap(), "a line without an end");
    write_data(dir.path(), 4);
    let test = dir.path().join("copa.test.jsonl");
    fs::write(&test, fs::read_to_string(&test).unwrap().replace("잔을", "컵을")).unwrap();
    eval(dir.path(), &save).fails(1, &["samples.jsonl: line", "of kobest_copa is not the one in --data"]);
}

#[cfg(unix)]
#[test]
fn ctrl_c_keeps_the_samples() {
    let dir = tempfile::tempdir().unwrap();
    write_data(dir.path(), 3000);
    let file = dir.path().join("samples.jsonl");
    let args = ["eval", "kobest", "--device", "cpu", "--tasks", "copa", "--data", dir.path().to_str().unwrap()];
    let child = command(&[&args[..], &["--save-samples", file.to_str().unwrap()]].concat()).spawn().unwrap();
    while fs::read_to_string(&file).unwrap_or_default().lines().count() < 3 {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let out = child.wait_with_output().unwrap();
    let (stdout, stderr) = (String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap());
    assert_eq!((out.status.code(), stdout.as_str()), (Some(130), ""), "{stderr}");
    assert!(stderr.contains("of 3000 documents are left") && stderr.contains("the same command continues"), "{stderr}");
    let text = fs::read_to_string(&file).unwrap();
    let whole = text.lines().filter(|l| serde_json::from_str::<Value>(l).is_ok()).count();
    assert!(text.ends_with('\n') && whole == text.lines().count() && whole < 3001, "{whole}");
}

#[test]
fn what_is_wrong_with_a_benchmark_is_named() {
    let dir = tempfile::tempdir().unwrap();
    write_data(dir.path(), 2);
    eval(dir.path(), &["--shots", "3"]).fails(1, &["3 shots", "kobest_copa has 2 rows"]);
    eval(dir.path(), &["--context", "8", "--shots", "1"])
        .fails(1, &["document 0 of kobest_copa", "the context has 8", "--cut"]);
    eval(dir.path(), &["--context", "8", "--shots", "0", "--cut"]).fails(1, &["do not fit"]); // an ending alone is longer
    eval(Path::new("/nonexistent"), &[]).fails(1, &["/nonexistent/copa.test.jsonl"]);
    fs::write(dir.path().join("copa.test.jsonl"), "{\"premise\": 1}\n").unwrap();
    eval(dir.path(), &[]).fails(1, &["copa.test.jsonl: line 1: has no text \"question\""]);
    eval(dir.path(), &["--shots", "0", "--beside", dir.path().join("copa.train.jsonl").to_str().unwrap()])
        .fails(1, &["has no tasks"]);
    aoji(&["eval", "kobest", "--data", "x", "--tasks", "mmlu"]).fails(2, &["expected one of boolq, copa"]);
}

#[test]
fn scores_agree_with_what_is_generated() {
    let (question, _) = short(20);
    let answer = generate(&[&question, "--json", "--max-tokens", "6"]).json();
    let (prompt, made) = (ids(&answer["prompt_tokens"]), ids(&answer["token_ids"]));
    let all = [prompt.clone(), made.clone()].concat();
    let score = aoji(&["score", "--device", "cpu", "--tokens", &join(&all), "--top", "3", "--json"]).json();
    assert_eq!(ids(&score["tokens"]), all);
    let logprobs: Vec<Option<f64>> = score["logprobs"].as_array().unwrap().iter().map(Value::as_f64).collect();
    assert!(logprobs[0].is_none() && logprobs[1..].iter().all(|x| x.is_some_and(|x| x <= 0.0)), "{logprobs:?}");
    let sum: f64 = logprobs.iter().flatten().sum();
    assert!((score["sum_logprob"].as_f64().unwrap() - sum).abs() < 1e-9);
    let top = score["top"].as_array().unwrap();
    assert_eq!((top.len(), top[0].as_array().unwrap().len()), (all.len(), 0));
    for (i, id) in made.iter().enumerate() {
        let place = prompt.len() + i;
        let best = top[place].as_array().unwrap();
        assert_eq!(best.len(), 3);
        // Greedy took the most likely token, and both entries speak of it.
        assert_eq!((best[0][0].as_u64(), best[0][1].as_f64()), (Some(*id), logprobs[place]), "place {place}");
        assert!(best[0][1].as_f64() >= best[1][1].as_f64() && best[1][1].as_f64() >= best[2][1].as_f64());
    }
}

#[test]
fn a_text_is_scored_with_and_without_bos() {
    let score = |args: &[&str]| aoji(&[&["score", "--device", "cpu", "하늘은 파란색"], args].concat());
    let (with, without) = (score(&["--json"]).json(), score(&["--json", "--no-special"]).json());
    assert_eq!(ids(&with["tokens"])[0], 2046);
    assert_eq!(ids(&with["tokens"])[1..], ids(&without["tokens"]));
    assert!(with.get("top").is_none());
    let table = score(&["--top", "1"]).ok();
    let sum =
        format!("{:.4}  sum over {} tokens", with["sum_logprob"].as_f64().unwrap(), ids(&without["tokens"]).len());
    assert!(table.contains(&sum), "no {sum:?} in: {table}");
    // one token: nothing is scored, and the sum of nothing is 0, not -0
    let one = |more: &[&str]| aoji(&[&["score", "--device", "cpu", "--tokens", "2046"], more].concat()).ok();
    assert!(one(&[]).contains("\n    0.0000  sum over 0 tokens\n"), "{}", one(&[]));
    assert!(one(&["--json"]).contains("\"sum_logprob\":0.0}"), "{}", one(&["--json"]));
}

#[test]
fn perplexity_is_that_of_the_scores() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("text.txt");
    fs::write(&file, "하늘은 파란색입니다.\n피보나치 수열은 앞의 두 수를 더한 것입니다.").unwrap();
    let file = file.to_str().unwrap();
    let scores = aoji(&["score", "--device", "cpu", "--prompt-file", file, "--json"]).json();
    let ppl = |more: &[&str]| aoji(&[&["ppl", "--device", "cpu", file, "--json"], more].concat()).json();
    let whole = ppl(&[]);
    let close = |a: &Value, b: f64| {
        let a = a.as_f64().unwrap();
        assert!((a - b).abs() < 1e-3 * b.abs(), "{a}, expected {b}");
    };
    let (sum, n) = (scores["sum_logprob"].as_f64().unwrap(), scores["tokens"].as_array().unwrap().len() - 1);
    assert_eq!((&whole["tokens"], &whole["words"], &whole["bytes"]), (&json!(n), &json!(9), &json!(91)));
    close(&whole["sum_logprob"], sum);
    close(&whole["token_perplexity"], (-sum / n as f64).exp());
    close(&whole["word_perplexity"], (-sum / 9.0).exp());
    close(&whole["bits_per_byte"], -sum / 91.0 / 2f64.ln());
    close(&ppl(&["--stride", "512"])["sum_logprob"], sum); // the text begins with the same BOS
    let [short, strided] = [&["--window", "8"][..], &["--window", "8", "--stride", "4"]].map(ppl);
    assert_eq!((&short["tokens"], &strided["tokens"]), (&json!(n), &json!(n)));
    assert!(short["sum_logprob"].as_f64().unwrap() < sum, "less context, less likely: {short}");

    let text = aoji(&["ppl", "--device", "cpu", file]).ok();
    assert!(text.contains("per word, 9 of them") && text.contains("bits per byte"), "{text}");
    aoji(&["ppl", "--device", "cpu", file, "--window", "2000"]).fails(1, &["2000 tokens do not fit", "1024"]);
    aoji(&["ppl", "--device", "cpu", file, "--window", "8", "--stride", "9"]).fails(1, &["--stride 9", "window of 8"]);
    super::feed(command(&["ppl", "--device", "cpu", "-"]), b"").fails(1, &["no token to score"]);

    // several texts, each with windows of its own
    let lines = dir.path().join("texts.jsonl");
    let texts = ["하늘은 파란색입니다.", "피보나치 수열은 앞의 두 수를 더한 것입니다."];
    let alone = texts.map(|text| {
        fs::write(file, text).unwrap();
        ppl(&[])
    });
    fs::write(&lines, texts.map(|text| format!("{}\n\n", json!({"text": text}))).concat()).unwrap();
    let lines = lines.to_str().unwrap();
    let all = aoji(&["ppl", "--device", "cpu", lines, "--jsonl", "--json"]).json();
    let sum = |key: &str| alone.iter().map(|one| one[key].as_f64().unwrap()).sum::<f64>();
    assert_eq!((&all["texts"], &all["windows"], &all["tokens"]), (&json!(2), &json!(2), &json!(sum("tokens") as u64)));
    close(&all["sum_logprob"], sum("sum_logprob"));
    close(&all["nll"], -sum("sum_logprob") / sum("tokens"));
    aoji(&["ppl", "--device", "cpu", file, "--jsonl"]).fails(1, &["line 1", "{\"text\": \"...\"}"]);
}

#[test]
fn bits_depend_on_what_the_report_says() {
    let run = |more: &[&str]| aoji(&[&["verify", "--invariance", "--device", "cpu"], more].concat());
    let report = run(&["--prompt", "40", "--json"]).json();
    assert_eq!((&report["passed"], &report["prompt"]), (&json!(true), &json!(40)));
    let findings = report["findings"].as_array().unwrap();
    assert_eq!(findings.len(), 8);
    for f in findings {
        assert_eq!(
            [&f["by_construction"], &f["equal"], &f["differing"]],
            [&json!(true), &json!(true), &json!(0)],
            "{f}"
        );
        assert!(f["values"].as_u64().unwrap() >= 24, "{f}");
    }
    let text = run(&[]).ok();
    let says = |part| text.contains(part);
    assert!(says("a prompt of 100 tokens") && says("must be equal") && !says("may differ"), "{text}");
    run(&["--prompt", "9"]).fails(1, &["9 tokens is too short"]);
}

#[test]
fn the_cpus_instructions_and_threads_are_checked() {
    let score = ["score", "x", "--device", "cpu"];
    let with = |name: &str| {
        let mut command = command(&score);
        command.env("AOJI_CPU", name);
        super::feed(command, b"")
    };
    assert_eq!(with("portable").ok(), aoji(&score).ok());
    with("sse9").fails(1, &["AOJI_CPU is \"sse9\"", "allowed on this CPU is portable"]);
    aoji(&["score", "x", "--device", "cpu", "--threads", "5000"]).fails(1, &["5000 threads", "1 to 1024"]);
}

#[test]
fn adapters_that_are_not_there_are_named() {
    aoji(&["score", "x", "--lora", "/nonexistent"]).fails(1, &["/nonexistent/adapter_config.json"]);
    aoji(&["score", "x", "--lora", "a:b"]).fails(2, &["DIR:SCALE"]);
    aoji(&["merge-lora", "demo", "/nonexistent", "/nonexistent/out"]).fails(1, &["/nonexistent/adapter_config.json"]);
}
