//! What the compiler made of the kernels, read in their machine code.

use super::machine_code::{self, Instruction};
use aoji::cuda::kernels::{IMAGES, MODULES, Usage};
use std::{collections::BTreeSet, path::Path, process::Command};

/// The innermost loops that contain `name`; a loop goes from the target of a backward branch to the branch. Code for
/// the rare case of an instruction (BRA.DIV) is put behind the loop, and a branch from there back into it makes no
/// loop.
fn innermost<'a>(code: &'a [Instruction], name: &str) -> Vec<Vec<&'a Instruction>> {
    let spans: Vec<_> =
        code.iter().filter_map(|i| Some((i.target()?, i.address))).filter(|(first, last)| first < last).collect();
    let enters = |(c, d): &(u32, u32)| spans.iter().any(|(a, b)| a < c && c <= b && b < d);
    let body = |(first, last)| code.iter().filter(|i| (first..=last).contains(&i.address)).collect::<Vec<_>>();
    let loops: BTreeSet<_> =
        spans.iter().copied().filter(|s| !enters(s) && body(*s).iter().any(|i| i.is(name))).collect();
    let holds = |(a, b): &(u32, u32), (c, d): &(u32, u32)| (a, b) != (c, d) && a <= c && d <= b;
    loops.iter().filter(|span| !loops.iter().any(|other| holds(span, other))).map(|span| body(*span)).collect()
}

/// Whether a file's kernels are matrix-vector products: those of gemv, and whatever shares its inner loop.
fn is_product(stem: &str) -> bool {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("kernels/{stem}.cu"));
    stem.starts_with("gemv") || std::fs::read_to_string(file).unwrap().contains("#include \"common/gemv.cuh\"")
}

/// Decoding mostly reads weights: they are read 16 bytes at a time (or by bulk copies), and nothing goes through local memory.
#[test]
fn the_inner_loops_of_gemv_load_16_bytes_at_a_time() {
    let archs: Vec<&str> = ["90", "80"].into_iter().filter(|a| IMAGES.split(',').any(|i| i == *a)).collect();
    let mut read = 0;
    let products = MODULES.iter().filter(|m| is_product(m.stem));
    for (module, arch) in products.flat_map(|m| archs.iter().map(move |arch| (m, arch))) {
        let Some(all) = machine_code::of(module, arch) else { return };
        for (kernel, code) in all.iter() {
            let what = format!("{kernel} for sm_{arch}");
            for i in code {
                assert!(!i.is("LDL") && !i.is("STL"), "{what}: local memory: {}", i.text);
            }
            let bulk = code.iter().any(|i| i.is("UBLKCP"));
            let loops = innermost(code, "HMMA");
            assert!(!loops.is_empty(), "{what}: no loop with HMMA");
            for body in loops {
                let loads: Vec<_> = body.iter().filter(|i| i.is("LDG") || i.is("LDGSTS")).collect();
                assert!(bulk || !loads.is_empty(), "{what}: its inner loop loads nothing");
                for i in loads {
                    assert!(i.is_16_bytes(), "{what}: {}", i.text);
                }
            }
            read += 1;
        }
    }
    assert!(read >= archs.len(), "no kernel of a gemv for {archs:?}");
}

/// On Hopper a decode kernel asks for weights, or for keys and values, before it waits for its predecessor (ACQBULK),
/// and lets the next kernel start (PREEXIT) after that. The compiler must keep this order. (The emulated device checks
/// that nothing is written before the wait, except for the spans of a trace.)
#[test]
fn decode_kernels_load_before_they_wait() {
    if !IMAGES.split(',').any(|i| i == "90") {
        return println!("skipped: no machine code for sm_90 in this binary");
    }
    for module in MODULES.iter().filter(|m| is_product(m.stem) || m.stem == "attn_decode") {
        let Some(kernels) = machine_code::of(module, "90") else { return };
        for (what, code) in kernels.iter() {
            let all = |names: &[&str]| -> Vec<usize> {
                (0..code.len()).filter(|&i| names.iter().any(|n| code[i].is(n))).collect()
            };
            let (wait, start) = (all(&["ACQBULK"]), all(&["PREEXIT"]));
            let [wait] = &wait[..] else { panic!("{what}: waits {wait:?}") };
            // a loop that ptxas copies has the instruction in each copy; all times but the first mean nothing
            assert!(!start.is_empty(), "{what}: never lets the next kernel start");
            assert!(start.iter().all(|s| wait < s), "{what}: lets the next kernel start before it has waited");
            let early = all(&["LDG", "LDGSTS"]).into_iter().filter(|i| i < wait && code[*i].is_16_bytes()).count();
            let least = if what.contains("_bf16_") { 4 } else { 2 }; // in the code, of a stage of 2 or of 1.1 or 0.6 KB
            assert!(early >= least, "{what}: {early} wide loads before the wait");
        }
    }
}

/// Instructions that an SM of an H200 can issue while a stage of 2048 bytes arrives, and the share of them that is expected to be
/// used (kernels/common/gemv.cuh).
const SLOTS: f64 = 430.0;
const USED: f64 = 0.75;

/// How many instructions the inner loop of a product with one row executes for a stage. The limit is its warps' share
/// of the issue slots while the stage's bytes arrive. Its registers are
/// limited too, so that blocks of two kernels fit an SM.
#[test]
fn the_inner_loops_of_one_row_are_short() {
    if !IMAGES.split(',').any(|i| i == "90") {
        return println!("skipped: no machine code for sm_90 in this binary");
    }
    let mut read = 0;
    for module in MODULES.iter().filter(|m| is_product(m.stem)) {
        let Some(kernels) = machine_code::of(module, "90") else { return };
        let one_row = |u: &&Usage| u.arch == "sm_90" && (u.kernel.ends_with("_r1") || u.kernel.ends_with("_r1_deep"));
        for usage in module.usage().iter().filter(one_row) {
            let loops = innermost(&kernels[&usage.kernel], "HMMA");
            let [body] = &loops[..] else { panic!("{}: {} loops with HMMA", usage.kernel, loops.len()) };
            let is_kind = |kinds: &[&str]| usage.kernel.split('_').any(|part| kinds.contains(&part));
            let (plain, narrow) = (is_kind(&["bf16"]), is_kind(&["q4", "i4"]));
            let stages = if narrow { 2 } else { 1 };
            assert_eq!(body.iter().filter(|i| i.is("HMMA")).count(), 4 * stages, "{}: stages", usage.kernel);
            let each = body.len() as f64 / stages as f64;
            let bytes = if narrow { 576.0 } else { 1088.0 }; // of two records
            let slots = USED * SLOTS * bytes / 2048.0;
            let most = match (module.stem, plain, narrow) {
                ("gemv", true, _) => 80.0,
                (_, true, _) => 130.0,
                (_, _, true) => slots,
                ("gemv", ..) => 145.0,
                _ => slots,
            };
            println!(
                "{}: {each} instructions a stage, {:.2} of the time of its bytes, {} registers",
                usage.kernel,
                each / if plain { USED * SLOTS } else { slots },
                usage.registers
            );
            assert!(each <= most, "{}: {each} instructions a stage, at most {most}", usage.kernel);
            assert!(usage.registers <= if plain { 56 } else { 80 }, "{usage:?}");
            read += 1;
        }
    }
    assert_eq!(read, 2 * 7 + 5 * 5, "kernels of products with one row, of bf16 and of five packed kinds");
}

/// `scripts/sass` prints the same instructions.
#[test]
fn the_script_prints_a_kernel() {
    let (Some(module), true) = (MODULES.iter().find(|m| m.stem == "rms_norm"), IMAGES.split(',').any(|i| i == "80"))
    else {
        return println!("skipped: no machine code for sm_80 in this binary");
    };
    let Some(code) = machine_code::of(module, "80") else { return };
    let dir = tempfile::tempdir().unwrap();
    let fatbin = dir.path().join("fatbin");
    std::fs::write(&fatbin, module.image).unwrap();
    let mut script = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/sass"));
    script.args(["rms_norm_bf16", "sm_80"]).arg(&fatbin).envs(option_env!("AOJI_NVCC").map(|nvcc| ("NVCC", nvcc)));
    let o = script.output().expect("bash runs");
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    let printed = String::from_utf8(o.stdout).expect("UTF-8");
    let printed: Vec<&str> = printed.lines().map(|l| l.split_once("*/ ").expect("an address").1.trim()).collect();
    assert_eq!(printed, code["rms_norm_bf16"].iter().map(|i| i.text.as_str()).collect::<Vec<_>>());
}

/// Tests the reading itself.
#[test]
fn loops_are_found() {
    let code = |lines: &[&str]| -> Vec<Instruction> {
        lines.iter().enumerate().map(|(i, text)| Instruction { address: 16 * i as u32, text: (*text).into() }).collect()
    };
    let all = code(&[
        "MOV R1, R2",                            // 00
        "LDG.E.64 R4, desc[UR4][R2.64]",         // 10: the outer loop
        "@P6 LDG.E.NA.128.CONSTANT R8, [R2.64]", // 20: the inner one
        "LDGSTS.E.BYPASS.128 [R13], [R10.64]",   // 30: a loop in it, without HMMA
        "@P0 BRA 0x30",                          // 40
        "HMMA.16816.F32.BF16 R8, R8, R36, R100", // 50
        "@!P0 BRA 0x20",                         // 60
        "@P1 BRA !P2, 0x10",                     // 70
        "HMMA.16816.F32.BF16 R8, R8, R36, R100", // 80
        "BRA 0x40",                              // 90: from behind the loop back into it
        "BRA 0xa0",                              // a0: the padding
    ]);
    let loops = innermost(&all, "HMMA");
    assert_eq!(loops.len(), 1);
    assert_eq!(loops[0].iter().map(|i| i.address).collect::<Vec<_>>(), [0x20, 0x30, 0x40, 0x50, 0x60]);
    let wide = |i: &Instruction| (i.is("LDG"), i.is("LDGSTS"), i.is_16_bytes());
    assert_eq!(
        all[1..4].iter().map(wide).collect::<Vec<_>>(),
        [(true, false, false), (true, false, true), (false, true, true)]
    );
    assert!(innermost(&all[7..], "HMMA").is_empty() && innermost(&all, "FFMA").is_empty());
}
