//! The tables of the README are those that the stored results make.

use super::{aoji, emulated, failure, output, parse, tiny};
use ::aoji::cuda::kernels::MODULES;
use serde_json::json;
use std::{fs, path::Path};

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for path in fs::read_dir(from).unwrap().map(|e| e.unwrap().path()) {
        let to = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &to);
        } else {
            fs::copy(&path, to).unwrap();
        }
    }
}

/// The README and the results, in a directory of their own, after `aoji bench --readme`.
fn made(dir: &Path) -> String {
    let (readme, results) = (dir.join("README.md"), dir.join("benches/results"));
    output(aoji(&["bench", "--readme", readme.to_str().unwrap(), "--results", results.to_str().unwrap()]));
    fs::read_to_string(readme).unwrap()
}

#[test]
fn the_readme_is_current() {
    if MODULES.is_empty() {
        return println!("skipped: built without kernels");
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = tempfile::tempdir().unwrap();
    fs::copy(root.join("README.md"), dir.path().join("README.md")).unwrap();
    copy(&root.join("benches/results"), &dir.path().join("benches/results"));
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    assert!(made(dir.path()) == readme, "README.md is not what the results say: run scripts/readme-tables");
    let plot = |root: &Path| fs::read(root.join("benches/results/decode.svg")).ok();
    assert!(plot(dir.path()) == plot(root), "decode.svg is not what the results say: run scripts/readme-tables");
}

/// The results here are output of `aoji bench` that was changed to claim that it comes from a GPU.
#[test]
fn tables_are_of_gpus_only() {
    if MODULES.is_empty() {
        return println!("skipped: built without kernels");
    }
    let (_dir, model) = tiny();
    let args =
        ["bench", "--model", &model, "--prefill", "9", "--depth", "1", "--tokens", "1", "--repeat", "1", "--json"];
    let mut bench = parse(&output(emulated(&args)));
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("benches/results/x");
    fs::create_dir_all(&place).unwrap();
    let readme = "# x\n<!-- speed -->\nold\n<!-- /speed -->\n<!-- cpu -->\n<!-- /cpu -->\n| `embed` | rows | x | 1999 |\n| `other` | rows | y | kept |\n";
    fs::write(dir.path().join("README.md"), readme).unwrap();

    fs::write(place.join("bench.json"), bench.to_string()).unwrap();
    let text = made(dir.path());
    let none = "**No results yet: no model has run on a GPU.**";
    let expected = readme.replace("old", none).replace("| x | 1999 |", "| not yet | not yet |");
    assert_eq!(text, expected, "what is emulated does not count");
    let capability = std::mem::take(&mut bench["capability"]);
    bench["emulated"] = json!(false);
    fs::write(place.join("bench.json"), bench.to_string()).unwrap();
    assert!(made(dir.path()).contains(none), "nor what a CPU did");
    bench["capability"] = capability;

    for (key, value) in [("device", json!("NVIDIA X")), ("commit", json!("abc1234"))] {
        bench[key] = value;
    }
    bench["decode"][0]["p50_ms"] = json!(4.0);
    bench["decode"][0]["floor_ms"] = json!(3.0);
    bench["decode"][0]["share"] = json!(0.75);
    fs::write(place.join("bench.json"), bench.to_string()).unwrap();
    let peers = json!({"fast": {"decode": [{"depth": 1, "ms_p50": 5.5}]}, "hf_eager": {"error": "none"}});
    fs::write(place.join("peers.json"), peers.to_string()).unwrap();
    let text = made(dir.path());
    for line in [
        "**NVIDIA X**, 0.0 G parameters, bf16, ",
        "| decode at depth | 1 |\n|---|---:|\n| **aoji**, ms a token | 4.000 |\n",
        "| of the read bandwidth | 75.0% |",
        "| torch.compile, ms a token | 5.500 |",
        "| prefill of tokens | 9 |",
        "](benches/results/decode.svg)\n<!-- /speed -->\n<!-- cpu -->\n<!-- /cpu -->\n",
        "| `embed` | rows | not yet | not yet |\n| `other` | rows | y | kept |\n",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
    assert_eq!(made(dir.path()), text, "a second time changes nothing");
    let embed = MODULES.iter().find(|m| m.stem == "embed").unwrap();
    for (source, said) in
        [(embed.hash, format!("`{}`", &embed.hash[..8])), ("0123456789", "changed since `01234567`".into())]
    {
        fs::write(dir.path().join("benches/results/ptx.json"), json!({"embed": source}).to_string()).unwrap();
        assert!(made(dir.path()).contains(&format!("| `embed` | rows | {said} | not yet |")), "{said}");
    }
    let svg = fs::read_to_string(dir.path().join("benches/results/decode.svg")).unwrap();
    let svg = roxmltree::Document::parse(&svg).unwrap();
    let text: Vec<&str> = svg.descendants().filter_map(|n| n.text()).collect();
    for title in ["NVIDIA X, depth 1: 4.000 ms, floor 3.000 ms", "torch.compile: 5.500 ms"] {
        assert!(text.contains(&title), "{title}: {text:?}");
    }

    let cpu = json!({
        "cpu": "CPU X", "threads": 2, "date": "2026-01-02", "commit": "abc1234", "model": "m", "read_gb_per_s": 40.4, "of_read": 0.8,
        "tokens_per_s": {
            "aoji bf16": {"decode": {"0": 200.4, "512": 150.0}, "prefill": {"128": 2000.0}},
            "llama.cpp bf16": {"decode": {"0": 100.0, "512": 90.0}, "prefill": {"128": 1000.0}},
        },
        "times_llama_cpp_bf16": {"decode 0": 2.004, "prefill 128": 2.0},
        "kobest_copa": {"documents": 100, "seconds": {"aoji": 2.0, "lm-eval": 14.0}, "times_lm_eval": 7.0},
    });
    fs::create_dir_all(dir.path().join("benches/results/cpu")).unwrap();
    fs::write(dir.path().join("benches/results/cpu/x.json"), cpu.to_string()).unwrap();
    let text = made(dir.path());
    for line in [
        "**CPU X**, 2 threads, m, 2026-01-02, commit abc1234. In the same run a simple loop read memory at 40 GB/s, and decoding read weights at 32 GB/s",
        "| tokens a second | decode at depth 0 | decode at depth 512 | prefill of 128 |\n|---|---:|---:|---:|\n| **aoji bf16** | 200 | 150 | 2000 |\n",
        "| **aoji, times the faster llama.cpp bf16** | 2.00 | - | 2.00 |\n",
        "KoBEST copa, 100 documents, 0 shots: aoji 2.0 s, lm-eval 14.0 s; 7.0 times as fast\n",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }

    fs::write(dir.path().join("README.md"), "nothing").unwrap();
    let readme = dir.path().join("README.md");
    let (code, text) = failure(aoji(&["bench", "--readme", readme.to_str().unwrap()]));
    assert!(code == 1 && text.contains("has no <!-- speed -->"), "{text}");
}
