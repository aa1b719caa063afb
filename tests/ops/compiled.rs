//! Every small case of every op, and each variant of the lab, with the kernels as nvcc compiled them.

use super::{device, is_of, outputs, ptx};
use aoji::{
    Result,
    backend::{Backend, Out},
    cuda::{
        kernels::{IMAGES, MODULES},
        lab::{LAB, Variant},
    },
    ops::{self, Op, Visitor, noise},
};
use half::bf16;
use std::{cell::LazyCell, collections::BTreeSet};

/// Ops where compiled code may give other bits than its source on the host, and why. Everywhere else the bits are the same.
const OTHER_BITS: [(&str, &str); 4] = [
    (
        "norm_head",
        "1 / sqrt(x) is rounded once for rsqrt.approx.f32, which a GPU may miss by an ulp, and twice on the host",
    ),
    (
        "attn_packed",
        "log2 and exp2 of the host may miss by an ulp what lg2.approx.f32 and ex2.approx.f32 round once: lse is f32",
    ),
    ("attn_bwd", "it begins with lse of attn_packed"),
    ("linear_ce", "as attn_packed: loss is f32"),
];

/// Runs all small cases of an op, or those that a variant is in, as PTX of each compute capability, and compares the results, bit for
/// bit, with those of the kernel's source on the host.
fn check<O: Op>(capabilities: &[u32], variant: Option<&'static Variant>) {
    if ptx::is_gpu() {
        return println!("skipped: a GPU runs machine code");
    }
    let open = || match variant {
        Some(v) => device().0.with_variant(v).unwrap(),
        None => device().0,
    };
    let stem = variant.map_or(O::STEM, |v| v.module.stem);
    let capabilities = different(capabilities, stem);
    let wanted = |op: &O| op.is_small() && variant.is_none_or(|v| is_of(&open(), op, v));
    for (seed, op) in (0u64..).zip(O::cases()).filter(|(_, op)| wanted(op)) {
        let source = LazyCell::new(|| outputs(&open(), &op, seed).unwrap_or_else(|e| panic!("{e}")));
        let mut sources = Vec::new();
        for capability in &capabilities {
            ptx::with_ptx(*capability, || {
                let got = outputs(&open(), &op, seed).unwrap_or_else(|e| panic!("sm_{capability}: {e}"));
                sources.push((*capability, got));
            });
        }
        for (capability, got) in sources {
            op.kernel_tolerance().compare(&got, &source).unwrap_or_else(|e| panic!("sm_{capability}: {op:?}: {e}"));
            let other = got.iter().zip(&**source).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
            assert!(
                other == 0 || OTHER_BITS.iter().any(|(stem, _)| *stem == O::STEM),
                "sm_{capability}: {op:?}: {other} of {} outputs have other bits than the source on the host: if .approx or a \
                 contraction explains it, list it",
                got.len()
            );
        }
    }
}

/// Of capabilities that run the same code with the same ring, only the first.
fn different(capabilities: &[u32], stem: &str) -> Vec<u32> {
    let mut kinds = BTreeSet::new();
    capabilities.iter().copied().filter(|c| !ptx::is_built(*c) || kinds.insert(kind(*c, stem))).collect()
}

/// Identifies the code that a kernel's file runs on a capability: its text without the architecture's name, and the
/// ring, if it has two.
fn kind(capability: u32, stem: &str) -> (String, Option<String>) {
    let text = ptx::text(capability, stem);
    let code = text.lines().filter(|l| !l.starts_with(".target") && !l.starts_with("//"));
    let code = code.collect::<Vec<_>>().join("\n");
    let mut ring = None;
    if code.contains("_deep") {
        ptx::with_ptx(capability, || ring = Some(format!("{:?}", device().0.ring())));
    }
    (code, ring)
}

/// Products that are added to a residual or stored in f32, in sizes that use each kernel. They are not ops of their
/// own, so no op has cases for them.
fn other_epilogues(stem: &str) -> Vec<Vec<f32>> {
    let cuda = device().0;
    let values = |n, seed| noise(n, seed).into_iter().map(bf16::from_f32).collect::<Vec<_>>();
    let run = |rows: usize, n: usize, k: usize| -> Result<[Vec<f32>; 2]> {
        let (x, w) = (cuda.upload(&values(rows * k, 1))?, cuda.weight_from(n, k, &values(n * k, 2))?);
        let (mut add, mut wide) = (cuda.upload(&values(rows * n, 3))?, cuda.alloc::<f32>(rows * n)?);
        match stem {
            "gemv" => {
                cuda.gemv(&ops::Gemv { rows, n, k }, Out::Add(&mut add), &x, &w)?;
                cuda.gemv(&ops::Gemv { rows, n, k }, Out::F32(&mut wide), &x, &w)?;
            }
            _ => {
                cuda.gemm(&ops::Gemm { rows, n, k }, Out::Add(&mut add), &x, &w)?;
                cuda.gemm(&ops::Gemm { rows, n, k }, Out::F32(&mut wide), &x, &w)?;
            }
        }
        Ok([cuda.download(&add)?.into_iter().map(bf16::to_f32).collect(), cuda.download(&wide)?])
    };
    let sizes =
        if stem == "gemv" { vec![(1, 33, 80), (8, 17, 80), (16, 17, 80)] } else { vec![(200, 201, 24), (70, 121, 24)] };
    let said = |e| panic!("the epilogues of {stem}: {e}: {:?}", cuda_emulator::last_fault());
    sizes.into_iter().flat_map(|(rows, n, k)| run(rows, n, k).unwrap_or_else(said)).collect()
}

/// As [`check`] on every capability. Then each kernel of the op's file (of either ring, and for every number of rows)
/// must have run as PTX on at least one, and the README's table must name this version of the source.
pub fn check_shipped<O: Op>() {
    check::<O>(&ptx::CAPABILITIES, None);
    if ptx::is_gpu() {
        return;
    }
    let Some(module) = MODULES.iter().find(|m| m.stem == O::STEM) else {
        return println!("skipped: built without kernels");
    };
    if ["gemv", "gemm"].contains(&O::STEM) {
        let source = other_epilogues(O::STEM);
        for capability in different(&ptx::CAPABILITIES, O::STEM) {
            ptx::with_ptx(capability, || {
                assert!(other_epilogues(O::STEM) == source, "sm_{capability}: other bits than the source")
            });
        }
    }
    let file = format!("/{}.ptx", O::STEM);
    let ran: BTreeSet<String> =
        cuda_emulator::executed().into_iter().filter(|i| i.file.ends_with(&file)).map(|i| i.kernel).collect();
    // tests/device/packed.rs runs those of quantized weights
    let shipped: BTreeSet<String> =
        module.usage().into_iter().filter(|u| !ptx::is_packed(&u.kernel)).map(|u| u.kernel).collect();
    let not: Vec<_> = shipped.difference(&ran).collect();
    if ptx::CAPABILITIES.into_iter().all(ptx::is_built) {
        assert!(
            !shipped.is_empty() && not.is_empty(),
            "no small case of {} runs {not:?} as PTX on any architecture",
            O::STEM
        );
        record::executed(module);
    } else {
        println!("not run as PTX, perhaps because this build is for {IMAGES} only: {not:?}");
    }
}

/// `benches/results/ptx.json`: the version of each kernel's source whose PTX was executed. The README's table shows it.
mod record {
    use aoji::cuda::kernels::Module;
    use std::{collections::BTreeMap, path::Path, sync::Mutex};

    static FILE: Mutex<()> = Mutex::new(());

    /// Compares that file with what has been executed; `AOJI_WRITE_PTX=1` writes it.
    pub fn executed(module: &Module) {
        let _one_at_a_time = FILE.lock().unwrap_or_else(|e| e.into_inner());
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/results/ptx.json");
        let text = std::fs::read_to_string(&path).unwrap_or_else(|_| "{}".into());
        let mut known: BTreeMap<String, String> = serde_json::from_str(&text).unwrap();
        if std::env::var_os("AOJI_WRITE_PTX").is_some_and(|v| v == "1") {
            known.insert(module.stem.into(), module.hash.into());
            std::fs::write(&path, serde_json::to_string_pretty(&known).unwrap() + "\n").unwrap();
        }
        assert_eq!(
            known.get(module.stem).map(String::as_str),
            Some(module.hash),
            "kernels/{}.cu is right as PTX, and {} knows another version of it: run scripts/readme-tables",
            module.stem,
            path.display()
        );
    }
}

/// As [`check`], for the op of a variant of the lab.
struct VariantAsPtx(&'static Variant);

impl Visitor for VariantAsPtx {
    fn op<O: Op>(&mut self) -> Result<()> {
        if O::STEM == self.0.op {
            check::<O>(&[90, 80], Some(self.0));
        }
        Ok(())
    }
}

#[test]
fn lab_as_ptx() {
    LAB.iter().for_each(|v| ops::each(&mut VariantAsPtx(v)).unwrap());
}

/// The strings of inline PTX in a source; neighbouring string literals are joined.
fn inline_strings(source: &str) -> Vec<String> {
    let code: Vec<&str> = source.lines().filter(|l| !l.trim_start().starts_with("//")).collect();
    let code = code.join("\n");
    let mut strings = Vec::new();
    for (at, _) in code.match_indices("asm") {
        let rest = code[at + 3..].trim_start();
        let rest = rest.strip_prefix("volatile").unwrap_or(rest).trim_start();
        let Some(mut rest) = rest.strip_prefix('(') else { continue };
        let mut string = String::new();
        while let Some((literal, after)) = rest.trim_start().strip_prefix('"').and_then(|r| r.split_once('"')) {
            string += literal;
            rest = after;
        }
        strings.push(string);
    }
    strings.retain(|s| !s.is_empty());
    strings
}

/// The statements of a text in PTX, without spaces.
fn statements(text: &str) -> impl Iterator<Item = String> {
    let bare = |s: &str| s.chars().filter(|c| !c.is_whitespace()).collect::<String>();
    text.split(';').map(bare).filter(|s| !s.is_empty() && s != "}")
}

/// A pattern for the statements of inline PTX in compiled text: an operand matches anything, and `%%smid` becomes `%smid`.
fn patterns(string: &str) -> Vec<fancy_regex::Regex> {
    let pattern = |statement: String| {
        let parts = fancy_regex::Regex::new("%%|%[0-9]+").unwrap();
        let mut regex = String::from("^");
        let mut from = 0;
        for part in parts.find_iter(&statement).map(|p| p.unwrap()) {
            regex += &fancy_regex::escape(&statement[from..part.start()]);
            regex += if part.as_str() == "%%" { "%" } else { r"[^,;\[\]{}]+" };
            from = part.end();
        }
        regex += &fancy_regex::escape(&statement[from..]);
        fancy_regex::Regex::new(&(regex + "$")).unwrap()
    };
    statements(string).map(pattern).collect()
}

/// The host's compiler sees another text in place of inline PTX. Here the inline PTX itself is executed: every string
/// that any kernel uses.
#[test]
fn each_inline_string_is_executed() {
    struct Run<'a>(&'a dyn Fn(&str) -> bool, Option<&'static Variant>);
    impl Visitor for Run<'_> {
        fn op<O: Op>(&mut self) -> Result<()> {
            if self.1.map_or_else(|| !(self.0)(O::STEM), |v| v.op != O::STEM || !(self.0)(v.module.stem)) {
                return Ok(());
            }
            let cuda = match self.1 {
                Some(v) => device().0.with_variant(v)?,
                None => device().0,
            };
            for (seed, op) in (0u64..).zip(O::cases()).filter(|(_, op)| op.is_small()) {
                cuda.trace_start(1 << 14)?; // blocks then note when and where they ran
                outputs(&cuda, &op, seed).unwrap_or_else(|e| panic!("{e}"));
                cuda.trace_stop()?;
            }
            Ok(())
        }
    }
    if ptx::is_gpu() {
        return println!("skipped: a GPU runs machine code");
    }
    let path = format!("{}/kernels/common/device.cuh", env!("CARGO_MANIFEST_DIR"));
    let strings = inline_strings(&std::fs::read_to_string(&path).unwrap());
    let every = |wanted: &str, has: &dyn Fn(&fancy_regex::Regex) -> bool| patterns(wanted).iter().all(has);
    let among = |wanted: &str, texts: &[String]| every(wanted, &|p| texts.iter().any(|t| p.is_match(t).unwrap()));
    assert!(strings.len() > 35 && strings.contains(&"mov.u32 %0, %%smid;".to_string()), "{strings:?}");
    assert!(
        among("mov.u32 %0, %%smid;", &["mov.u32%r1,%smid".into()])
            && !among("mov.u32 %0, %%smid;", &["mov.u32%r1,%r2".into()])
    );

    ptx::with_ptx(90, || {
        let compiled = |stem: &str| -> Vec<String> {
            let text = ptx::text(90, stem);
            let inline = text.split("// begin inline asm").skip(1).filter_map(|t| t.split("// end inline asm").next());
            inline.flat_map(statements).collect::<BTreeSet<_>>().into_iter().collect()
        };
        let executed = || -> Vec<String> {
            let inline = cuda_emulator::executed().into_iter().filter(|i| i.inlined && i.file.starts_with("90/"));
            inline.flat_map(|i| statements(&i.text).collect::<Vec<_>>()).collect::<BTreeSet<_>>().into_iter().collect()
        };
        let left = || -> Vec<&String> {
            let ran = executed();
            strings.iter().filter(|s| !among(s, &ran)).collect()
        };
        let stems = MODULES.iter().chain(LAB.iter().map(|v| &v.module)).map(|m| m.stem);
        let used: Vec<String> = stems.flat_map(&compiled).collect();
        // the ops whose kernels have what none before has executed
        let has_more = |stem: &str| {
            let text = compiled(stem);
            left().iter().any(|s| among(s, &text))
        };
        ops::each(&mut Run(&has_more, None)).unwrap();
        LAB.iter().for_each(|v| ops::each(&mut Run(&has_more, Some(v))).unwrap());
        // what is in the kernels of quantized weights alone: tests/device/packed.rs
        let of_packed = |s: &str| ["lop3", "ld.shared.v4", "{ .reg .b16"].iter().any(|first| s.starts_with(first));
        let not: Vec<_> = left().into_iter().filter(|s| !of_packed(s) && among(s, &used)).collect();
        let of_no_kernel: Vec<_> = left().into_iter().filter(|s| !among(s, &used)).collect();
        println!("{} strings, of which no kernel has {of_no_kernel:?}", strings.len());
        assert!(not.is_empty() && strings.len() - of_no_kernel.len() >= 20, "no small case of any op executes {not:?}");
    });
}
