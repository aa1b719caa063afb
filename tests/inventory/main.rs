//! Checks that things which must fit together do: kernel sources, ops, loaded kernels, and what ptxas reported about them.

mod compiled;
mod library;
mod machine_code;
mod sass;

use aoji::{
    KvDtype, Result,
    cuda::{
        Cuda,
        kernels::{IMAGES, MODULES},
        lab::LAB,
        occupancy::occupancy,
    },
    ops::{self, Grid, Op, Ring, Visitor},
    tiles,
};
use std::{collections::BTreeSet, fs, path::Path};

/// `(stem, text)` of each kernels/*.cu.
fn sources() -> Vec<(String, String)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let files = fs::read_dir(dir).unwrap().map(|f| f.unwrap().path());
    let mut v: Vec<_> = files
        .filter(|f| f.extension().is_some_and(|e| e == "cu"))
        .map(|f| (f.file_stem().unwrap().to_str().unwrap().to_owned(), fs::read_to_string(&f).unwrap()))
        .collect();
    v.sort();
    v
}

/// The text of src/ops/<stem>.rs, or of src/ops/train/<stem>.rs.
fn op_text(stem: &str) -> String {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/ops");
    let files = ["", "train/"].map(|dir| src.join(format!("{dir}{stem}.rs")));
    files.iter().find_map(|f| fs::read_to_string(f).ok()).unwrap_or_else(|| panic!("none of {files:?}"))
}

#[test]
fn each_op_has_its_kernel_and_its_cases() {
    struct Stems(BTreeSet<String>);
    impl Visitor for Stems {
        fn op<O: Op>(&mut self) -> Result<()> {
            assert!(self.0.insert(O::STEM.into()), "{} is listed twice", O::STEM);
            assert!(O::cases().len() >= 3, "{} has {} cases", O::STEM, O::cases().len());
            op_text(O::STEM);
            Ok(())
        }
    }
    let mut stems = Stems(BTreeSet::new());
    ops::each(&mut stems).unwrap();
    assert_eq!(stems.0, sources().into_iter().map(|(stem, _)| stem).collect(), "ops and kernels/*.cu");
}

#[test]
fn the_readme_lists_each_kernel() {
    let readme = include_str!("../../README.md");
    let table =
        readme.split_once("\n## Kernels\n").and_then(|(_, s)| s.split("\n## ").next()).expect("a section Kernels");
    let rows = table.lines().filter_map(|l| l.strip_prefix("| `")?.split('`').next());
    assert_eq!(rows.map(String::from).collect::<BTreeSet<_>>(), sources().into_iter().map(|(stem, _)| stem).collect());
}

#[test]
fn each_kernel_says_what_it_is() {
    for (stem, text) in sources() {
        let header: Vec<&str> = text.lines().take_while(|l| l.starts_with("//")).collect();
        assert!(header[0].starts_with(&format!("// {stem}:")), "kernels/{stem}.cu: its first line is not its formula");
        for field in ["shapes:", "mapping:", "traffic:", "requires:", "source:"] {
            let found = header.iter().any(|l| l.trim_start_matches("// ").starts_with(field));
            assert!(found, "kernels/{stem}.cu: its header has no `{field}`");
        }
    }
}

/// The kernels of a decode step, and only they, note when they ran, in the way that `aoji bench --timeline` expects.
#[test]
fn kernels_of_a_decode_step_note_when_they_ran() {
    // of prompts, of none, or of training; those of linear_dx are made by a macro of common/gemm.cuh
    let without = [
        "adamw",
        "attn_bwd",
        "attn_packed",
        "attn_prefill",
        "gemm",
        "grad_norm",
        "linear_ce",
        "lora_down",
        "lora_dx",
        "lora_grad",
        "lora_up",
        "rms_norm_bwd",
        "stream_read",
        "swiglu_bwd",
    ];
    let mut found = BTreeSet::new();
    for (stem, text) in sources() {
        let text = text.replace('\\', " "); // of macros that name kernels
        let kernels = text.split("extern \"C\" __global__").skip(1);
        for (_, kernel) in kernels.filter_map(|k| k.split_once('(')).filter(|(before, _)| !before.contains('{')) {
            let (head, body) = kernel.split_once(") {").expect("a body");
            if !head.ends_with("Span* trace") {
                found.insert(stem.clone());
                continue;
            }
            assert!(
                body.trim_start().starts_with("Traced traced(trace);"),
                "kernels/{stem}.cu: not its first statement"
            );
            for after in body.split("grid_dependency_wait();").skip(1) {
                assert!(
                    after.trim_start().starts_with("traced.ready();"),
                    "kernels/{stem}.cu: waits and does not say so"
                );
            }
        }
    }
    assert_eq!(found, without.into_iter().map(String::from).collect(), "kernels/*.cu without `Span* trace`");
}

/// The emulated device knows a kernel by its EXPORT_KERNEL, so opening it fails where that is missing.
#[test]
fn each_kernel_is_loaded_under_its_stem() {
    cuda_emulator::install();
    let cuda = Cuda::open(0).unwrap();
    let mut loaded: BTreeSet<String> = cuda.kernel_names().unwrap().map(String::from).collect();
    assert_eq!(MODULES.len(), sources().len(), "a module for each kernels/*.cu");
    for m in MODULES {
        let names: BTreeSet<String> = m.usage().into_iter().map(|u| u.kernel).collect();
        assert!(!names.is_empty(), "kernels/{}.cu has no kernel", m.stem);
        for name in names {
            assert!(name.starts_with(&format!("{}_", m.stem)), "kernels/{}.cu has {name}, of another stem", m.stem);
            assert!(loaded.remove(&name), "{name} is not loaded");
        }
    }
    assert_eq!(loaded, BTreeSet::new(), "loaded, of no module");
}

/// Kernels that ask for different divisions of a multiprocessor's memory would wait for each other.
#[test]
fn all_kernels_ask_for_the_same_shared_memory() {
    cuda_emulator::install();
    let cuda = Cuda::open_with(0, &LAB.iter().take(1).collect::<Vec<_>>()).unwrap();
    let asked = cuda.carveouts().unwrap();
    assert!(asked.len() >= MODULES.len() && asked.iter().all(|(_, percent)| *percent == 100), "{asked:?}");
}

/// Each file of the lab is in the binary. Whether its kernels are right is tested by `tests/ops`.
#[test]
fn each_variant_is_in_the_binary() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/lab");
    let files = fs::read_dir(dir).into_iter().flatten().map(|f| f.unwrap().file_name().into_string().unwrap());
    let files: BTreeSet<String> = files.filter(|f| f.ends_with(".cu")).collect();
    assert_eq!(files, LAB.iter().map(|v| format!("{}_{}.cu", v.op, v.name)).collect());
}

/// The worked example in docs/kernel-lab.md is the file of the lab, to the letter.
#[test]
fn the_page_of_the_lab_shows_its_example() {
    let page = include_str!("../../docs/kernel-lab.md");
    let shown = page.split_once("\n```cuda\n").and_then(|(_, rest)| rest.split("```").next()).expect("a block of CUDA");
    assert_eq!(shown, include_str!("../../kernels/lab/rms_norm_onepass.cu"));
}

/// The kernels of a decode step of one row, by the beginnings of their names, with their launch for a token of
/// Llama-3-8B, and the number of blocks that a multiprocessor of an H100 or H200 must hold at once.
fn decode_chain(ring: Ring) -> [(&'static str, Grid, u32); 5] {
    let blocks = if ring == Ring::Deep { tiles::GEMV_DEEP_BLOCKS } else { tiles::GEMV_BLOCKS };
    let (rows, dim, eps) = (1, 4096, 1e-5);
    let (n_heads, n_kv_heads, head_dim, max_seq, positions) = (32, 8, 128, 8192, 8192);
    let (head_norm, kv, kv_len, window) = (true, KvDtype::Auto, 8192, max_seq);
    let qkv =
        ops::NormQkvRopeAppend { rows, dim, n_heads, n_kv_heads, head_dim, max_seq, positions, eps, head_norm, kv };
    let attention = ops::AttnDecode { rows, n_heads, n_kv_heads, head_dim, max_seq, kv_len, window, kv };
    [
        ("norm_qkv_rope_append_", qkv.grid(ring), blocks),
        ("attn_decode_", attention.grid(), 3),
        ("gemv_", ops::Gemv { rows, n: dim, k: dim }.grid(ring), blocks),
        ("norm_gate_up_", ops::NormGateUp { rows, dim, ffn_dim: 14_336, eps }.grid(ring), blocks),
        ("norm_head_", ops::NormHead { rows, first: 0, dim, vocab: 128_256, eps }.grid(ring), blocks),
    ]
}

#[test]
fn blocks_of_the_decode_chain_fit_together() {
    let arch = "sm_90";
    if !IMAGES.split(',').any(|i| arch.strip_prefix("sm_") == Some(i)) {
        return println!("skipped: no code for {arch} in this binary");
    }
    for (ring, kind) in [(Ring::Short, "_r1"), (Ring::Deep, "_r1_deep")] {
        for (prefix, grid, blocks) in decode_chain(ring) {
            let of_chain = |name: &str| name.starts_with(prefix) && (prefix == "attn_decode_" || name.ends_with(kind));
            let usage = MODULES.iter().flat_map(|m| m.usage());
            let kernels: Vec<_> = usage.filter(|u| of_chain(&u.kernel) && u.arch == arch).collect();
            assert!(!kernels.is_empty(), "no kernel {prefix}*{kind}");
            for u in kernels {
                let fits = occupancy((9, 0), grid.threads, u.registers, u.shared + grid.shared).expect("known");
                println!("{}: {fits:?}", u.kernel);
                assert!(fits.blocks_per_sm >= blocks, "expected {blocks} blocks of {u:?} with {grid:?}: {fits:?}");
            }
        }
    }
}

/// Two blocks of each kernel of a prompt share a multiprocessor, so that one computes while the other waits, on all
/// architectures: registers, and shared memory where there are only 100 KB.
#[test]
fn blocks_of_a_prompt_share_a_multiprocessor() {
    let (rows, dim) = (512, 4096);
    let gemm = ops::Gemm { rows, n: dim, k: dim };
    let attention = |head_dim, kv| {
        let (first, shared, n_heads, n_kv_heads, max_seq, kv_len, window) = (0, 0, 32, 8, 8192, 8192, 8192);
        ops::AttnPrefill { rows, first, shared, n_heads, n_kv_heads, head_dim, max_seq, kv_len, window, kv }.grid()
    };
    let formats = [("bf16", KvDtype::Auto), ("fp8", KvDtype::Fp8)];
    let [large, small] = [1, u32::MAX].map(|sm_count| gemm.grid(gemm.tile(sm_count)));
    let mut found = 0;
    for u in MODULES.iter().flat_map(|m| m.usage()) {
        let (grid, blocks) = match &*u.kernel {
            k if k.starts_with("gemm_bf16_large_") => (large, 2),
            k if k.starts_with("gemm_bf16_small_") => (small, 2),
            k => match k.strip_prefix("attn_prefill_").and_then(|rest| rest.split_once("_d")) {
                Some((format, head_dim)) => {
                    let kv = formats.iter().find(|(name, _)| *name == format).expect("a format").1;
                    let head_dim = head_dim.parse().expect("a number");
                    (attention(head_dim, kv), if head_dim == 64 { 3 } else { 2 })
                }
                None => continue,
            },
        };
        let number =
            u.arch.trim_start_matches("sm_").trim_end_matches(char::is_alphabetic).parse::<i32>().expect("sm_90");
        let fits = occupancy((number / 10, number % 10), grid.threads, u.registers, u.shared + grid.shared);
        let fits = fits.expect("a known architecture");
        println!("{} on {}: {fits:?}", u.kernel, u.arch);
        assert!(fits.blocks_per_sm >= blocks, "expected {blocks} blocks of {u:?} with {grid:?}: {fits:?}");
        found += 1;
    }
    assert_eq!(found, 14 * IMAGES.split(',').filter(|i| !i.starts_with("ptx")).count());
}

/// A kernel that may start before its predecessor is done waits for it, and only then lets the next one start. So two
/// kernels overlap and never three; reads before a wait rely on that. A product lets the next kernel start while it
/// works, in `Product::run`.
#[test]
fn dependent_kernels_wait_and_then_let_the_next_start() {
    let (wait, start) = ("grid_dependency_wait();\n  traced.ready();\n", "grid_launch_dependents();");
    for (stem, text) in sources() {
        let dependent = op_text(&stem).contains("launch_dependent(");
        let is_product = text.contains("#include \"common/gemv.cuh\"");
        let count = |what: &str| text.matches(what).count();
        let kernels = if dependent { count("EXPORT_KERNEL(") } else { 0 }; // a macro counts as one
        let expected = if is_product { [0, 1] } else { [kernels, 0] };
        assert_eq!(
            [count(start), count("p.run(")],
            expected,
            "kernels/{stem}.cu: starts the next kernel, once a kernel"
        );
        assert_eq!(count("grid_dependency_wait();"), kernels, "kernels/{stem}.cu: waits, once a kernel");
        if !dependent {
            continue;
        }
        let starts = |text: &str| text.contains(start) || text.contains("p.run(");
        for (n, part) in text.split(wait).enumerate() {
            let next = part.trim_start().starts_with(start);
            assert!(n > 0 || !starts(part), "kernels/{stem}.cu: lets the next kernel start before it has waited");
            assert!(n == 0 || is_product && starts(part) || next, "kernels/{stem}.cu: {start:?} is not next");
        }
    }
    let product = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/common/gemv.cuh")).unwrap();
    let code: Vec<_> = product.lines().filter(|l| !l.trim_start().starts_with("//")).collect();
    let (_, run) = code.join("\n").split_once("DEV void run(").map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
    let run = run.split("\n  }\n").next().unwrap();
    let starts = |text: &str| text.matches("grid_launch_dependents();").count();
    assert_eq!((starts(run), starts(&code.join("\n"))), (1, 1), "once, in Product::run");
}

/// A spill is traffic to memory that no cost counts; a stack is an array that was meant to be in registers.
#[test]
fn no_kernel_spills() {
    let mut seen = BTreeSet::new();
    for m in MODULES {
        let usage = m.usage();
        assert!(!usage.is_empty(), "kernels/{}.cu: ptxas reported nothing", m.stem);
        for u in usage {
            let what = format!("{} for {}: {u:?}", u.kernel, u.arch);
            assert!(u.registers > 0 && u.registers <= 255, "{what}");
            assert_eq!((u.spills, u.stack), (0, 0), "{what}");
            seen.insert((m.stem, u.arch));
        }
    }
    let archs: BTreeSet<&str> = seen.iter().map(|(_, arch)| arch.as_str()).collect();
    assert_eq!(seen.len(), archs.len() * MODULES.len(), "every module for every architecture: {seen:?}");
}
