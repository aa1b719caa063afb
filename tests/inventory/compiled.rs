//! Compares PTX, which the emulated device executes in the tests, with machine code, which only a GPU can execute: instructions that
//! ptxas must not drop are counted in each kernel for each architecture. (It may copy some: for sm_100 it peels a round off a loop.)

#[path = "../../build/arch.rs"]
mod arch;

use super::machine_code::{self, Instruction};
use aoji::cuda::{
    kernels::{IMAGES, MODULES, Module},
    lab::LAB,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

/// How often each instruction is in a kernel's code, by its name.
type Counts = BTreeMap<String, usize>;

/// The counts of a PTX file, for each kernel.
fn ptx(text: &str) -> BTreeMap<String, Counts> {
    let mut all = BTreeMap::new();
    for kernel in text.split(".entry ").skip(1) {
        let (name, rest) = kernel.split_once('(').expect("parameters");
        let body = rest.split_once("\n{\n").expect("a body").1;
        let body = body.split("\n}\n").next().unwrap_or(body);
        let counts: &mut Counts = all.entry(name.to_owned()).or_default();
        let code = body.lines().map(|l| l.split("//").next().unwrap_or_default());
        for statement in code.collect::<Vec<_>>().join("\n").split([';', '{', '}']) {
            let words = statement.split_whitespace().filter(|w| !w.starts_with('@') && !w.ends_with(':'));
            if let Some(name) = words.into_iter().next() {
                *counts.entry(name.to_owned()).or_default() += 1;
            }
        }
    }
    all
}

/// The counts of a kernel's machine code: `HMMA.16816.F32.BF16` and so on.
fn sass(code: &[Instruction]) -> Counts {
    let mut counts = Counts::new();
    for i in code {
        *counts.entry(i.name().to_owned()).or_default() += 1;
    }
    counts
}

/// How many instructions have names for which `fits` is true.
fn count(counts: &Counts, fits: impl Fn(&str) -> bool) -> usize {
    counts.iter().filter(|(name, _)| fits(name)).map(|(_, n)| n).sum()
}

/// Instructions of a kernel's PTX that are missing in its machine code.
fn lost(ptx: &Counts, sass: &Counts) -> Vec<String> {
    let starts = |counts: &Counts, names: &[&str]| {
        count(counts, |i| {
            names.iter().any(|n| i.strip_prefix(n).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
        })
    };
    let part = |name: &str, parts: &[&str]| name.split('.').any(|p| parts.contains(&p));
    // what orders memory for others of a scope: reads, writes and read-modify-writes
    let strong = |scope: &str| {
        count(ptx, |i| {
            part(i, &["relaxed", "acquire", "release", "acq_rel"]) && part(i, &[scope]) && !i.starts_with("fence")
        })
    };
    let releasing =
        count(ptx, |i| part(i, &["release", "acq_rel"]) && !i.starts_with("fence") && !i.contains("mbarrier"));
    let fences = count(ptx, |i| {
        ["membar.gl", "membar.sys", "fence.acq_rel.gpu", "fence.acq_rel.sys", "fence.sc.gpu"].contains(&i)
    });
    let mut wrong = Vec::new();
    let mut compare = |what: &str, want: usize, got: usize| {
        // a copied loop has all its products again
        if got < want || (what == "HMMA" && !got.is_multiple_of(want.max(1))) {
            wrong.push(format!("{what}: {want} in the PTX, {got} in the machine code"));
        }
    };
    compare("HMMA", starts(ptx, &["mma.sync"]), starts(sass, &["HMMA"]));
    compare("LDSM", starts(ptx, &["ldmatrix"]), starts(sass, &["LDSM"]));
    compare("LDGSTS", starts(ptx, &["cp.async.ca", "cp.async.cg"]), starts(sass, &["LDGSTS"]));
    compare(
        "BAR",
        starts(ptx, &["bar.sync", "bar.arrive", "bar.red", "barrier.sync", "barrier.arrive"]),
        starts(sass, &["BAR"]),
    );
    compare("ACQBULK", starts(ptx, &["griddepcontrol.wait"]), starts(sass, &["ACQBULK"]));
    compare("PREEXIT", starts(ptx, &["griddepcontrol.launch_dependents"]), starts(sass, &["PREEXIT"]));
    compare("MEMBAR", fences + releasing, starts(sass, &["MEMBAR"]));
    compare("STRONG.GPU", strong("gpu"), count(sass, |i| i.contains("STRONG.GPU")));
    compare("STRONG.SYS", strong("sys"), count(sass, |i| i.contains("STRONG.SYS")));
    wrong
}

/// The build has kept the PTX of each file for each architecture, even if there is only one architecture.
fn kept() -> Vec<PathBuf> {
    let modules = MODULES.iter().chain(LAB.iter().map(|v| &v.module));
    let of = |stem: &'static str| IMAGES.split(',').filter(|i| !i.is_empty()).map(move |i| ptx_file(i, stem));
    modules.flat_map(|m| of(m.stem)).collect()
}

/// The PTX that machine code was made from, or that an image is.
fn ptx_file(image: &str, stem: &str) -> PathBuf {
    Path::new(env!("OUT_DIR")).join(format!("ptx/{}/{stem}.ptx", arch::of_ptx(image)))
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn machine_code_has_what_its_ptx_has() {
    if machine_code::cuobjdump().is_none() {
        return;
    }
    let archs: Vec<&str> = IMAGES.split(',').filter(|i| !i.is_empty() && !i.starts_with("ptx")).collect();
    assert_eq!(archs.is_empty(), MODULES.is_empty(), "a build with kernels has machine code of {IMAGES}");
    // what is shipped for each architecture; variants, which are for trying, for one
    let shipped = archs.iter().flat_map(|a| MODULES.iter().map(move |m| (*a, m)));
    let lab = archs.iter().filter(|a| **a == "90").flat_map(|a| LAB.iter().map(move |v| (*a, &v.module)));
    let jobs: Vec<(&str, &Module)> = shipped.chain(lab).collect();
    let check = |(arch, module): &(&str, &Module)| -> Vec<String> {
        let ptx = ptx(&read(&ptx_file(arch, module.stem)));
        let code = machine_code::of(module, arch).expect("the disassembler is there");
        assert_eq!(
            ptx.keys().collect::<Vec<_>>(),
            code.keys().collect::<Vec<_>>(),
            "kernels of {} for sm_{arch}",
            module.stem
        );
        ptx.iter()
            .flat_map(|(name, counts)| {
                lost(counts, &sass(&code[name])).into_iter().map(move |l| format!("{name} for sm_{arch}: {l}"))
            })
            .collect()
    };
    let half = jobs.len().div_ceil(2).max(1);
    let wrong: Vec<String> = std::thread::scope(|s| {
        let threads: Vec<_> =
            jobs.chunks(half).map(|jobs| s.spawn(|| jobs.iter().flat_map(check).collect::<Vec<_>>())).collect();
        threads.into_iter().flat_map(|t| t.join().unwrap()).collect()
    });
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Whether a test's text `pattern` is the name, with one of `values` or a number in the place of each `{...}`.
fn names(pattern: &str, name: &str, values: &BTreeSet<&str>) -> bool {
    let Some((before, rest)) = pattern.split_once('{') else { return pattern == name };
    let Some(name) = name.strip_prefix(before) else { return false };
    let after = rest.split_once('}').map_or("", |(_, after)| after);
    let digits = name.len() - name.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let number = Some(&name[..digits]);
    values.iter().copied().chain(number).any(|v| name.strip_prefix(v).is_some_and(|rest| names(after, rest, values)))
}

#[test]
fn a_name_is_of_what_its_test_goes_through() {
    let values = BTreeSet::from(["lt", "s32", "", ".rn"]);
    for (pattern, name, fits) in [
        ("setp.{c}.{t}", "setp.lt.s32", true),
        ("setp.{c}.{t}", "setp.gt.s32", false),
        ("add{rn}.f32", "add.rn.f32", true),
        ("add{rn}.f32", "add.f32", true),
        ("add{rn}.f32", "add.rz.f32", false),
        ("ldmatrix.x{n}{t}.b16", "ldmatrix.x4.b16", true),
        ("ldmatrix.x{n}{t}.b16", "ldmatrix.x4.trans.b16", false),
        ("bar.sync", "bar.sync", true),
    ] {
        assert_eq!(names(pattern, name, &values), fits, "{pattern} {name}");
    }
}

/// The interpreter's instructions have tests of their own, written from the PTX ISA: all that occur in kernels.
#[test]
fn each_instruction_of_a_kernel_has_its_own_test() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulator/tests/ptx");
    let sources: String =
        std::fs::read_dir(dir).unwrap().map(|f| std::fs::read_to_string(f.unwrap().path()).unwrap()).collect();
    let sources = sources.replace("\\n", " ");
    let patterns: Vec<&str> = sources.split([' ', '"', ';', '\n', '(', ',']).filter(|w| w.contains('.')).collect();
    // what a test's text may have in the place of {...}: any short string of the tests
    let values: BTreeSet<&str> = sources.split('"').filter(|v| v.len() < 16 && !v.contains(' ')).collect();
    let (mut seen, mut without) = (0, BTreeSet::new());
    for file in kept() {
        let kernels = ptx(&read(&file));
        let instructions = kernels.into_values().flatten().map(|(name, _)| name);
        for i in instructions.filter(|i| i.contains('.') && !i.starts_with('.')) {
            seen += 1;
            if !patterns.iter().any(|p| names(p, &i, &values)) {
                without.insert(i);
            }
        }
    }
    assert!(without.is_empty(), "tests/emulator/tests/ptx has no test of {without:?}");
    assert!(seen > 1000 || MODULES.is_empty(), "only {seen} instructions were looked at");
}

/// Tests the counting itself.
#[test]
fn what_is_lost_is_named() {
    let text = ".visible .entry a(\n.param .u64 p\n)\n{\n\t.reg .b32 %r<3>;\n$L:\n\t@%p1 bra $L;\n\tbar.sync \t0;\n\t// begin inline asm\n\
                \tatom.acq_rel.gpu.global.add.u32 %r1, [%rd1], %r2; mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r2}, {%f1};\n\tret;\n\n}\n";
    let code = |lines: &[&str]| {
        format!(
            "\t\tFunction : a\n{}",
            lines
                .iter()
                .map(|l| format!("        /*0010*/                   {l} ;    /* 0x0 */\n"))
                .collect::<String>()
        )
    };
    let whole = [
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "MEMBAR.ALL.GPU",
        "@P0 ATOMG.E.ADD.STRONG.GPU PT, R2, R4, R5",
        "HMMA.16816.F32.BF16 R8, R8, R36, R8",
        "EXIT",
    ];
    let lost_of = |lines: &[&str]| lost(&ptx(text)["a"], &sass(&machine_code::parse(&code(lines))["a"]));
    assert_eq!(lost_of(&whole), [""; 0]);
    for (i, name) in ["BAR", "MEMBAR", "STRONG.GPU", "HMMA"].iter().enumerate() {
        let rest: Vec<&str> = whole.iter().enumerate().filter(|(k, _)| *k != i).map(|(_, l)| *l).collect();
        assert_eq!(lost_of(&rest), [format!("{name}: 1 in the PTX, 0 in the machine code")]);
    }
    let twice = text.replace("ret;", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r2}, {%f1};");
    let copied = [&whole[..], &["HMMA.16816.F32.BF16 R8, R8, R36, R8"; 2]].concat();
    assert_eq!(
        lost(&ptx(&twice)["a"], &sass(&machine_code::parse(&code(&copied))["a"])),
        ["HMMA: 2 in the PTX, 3 in the machine code"]
    );
}
