//! Compiles kernels/*.cu and kernels/lab/*.cu to one fatbin each, to be embedded, and turns kernels/common/tiles.h into Rust
//! constants.
//!
//! Environment: NVCC, CUDA_HOME or CUDA_PATH, NVCC_CCBIN, AOJI_CUDA_ARCHS ("80,90,ptx90"), AOJI_LINEINFO=1 (for profilers;
//! triples the size), AOJI_SKIP_KERNELS=1 or DOCS_RS=1 (no kernels: for checks and documentation), AOJI_KERNEL_CACHE=DIR (keeps what
//! the compiler has made, for other profiles and branches).
#[path = "build/arch.rs"]
mod arch;
#[path = "build/cache.rs"]
mod cache;
#[path = "build/nvcc.rs"]
mod nvcc;
#[path = "build/ptx.rs"]
mod ptx;

use cache::{Cache, fnv1a};
use nvcc::{Nvcc, children};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs, process::Command, thread};

/// SASS for each generation from Ampere on, and PTX for those to come. (Not `90a`: no kernel has instructions that only it has.)
const ARCHS: &str = "80,86,89,90,100,120,ptx90";
/// Variants, which are for trying: each generation runs them, Blackwell by the driver's compiler.
const LAB_ARCHS: &str = "80,90,ptx90";
const VARIABLES: &str =
    "NVCC CUDA_HOME CUDA_PATH VIRTUAL_ENV NVCC_CCBIN AOJI_CUDA_ARCHS AOJI_LINEINFO AOJI_SKIP_KERNELS DOCS_RS";

fn main() {
    ["build.rs", "build"].iter().for_each(|f| println!("cargo:rerun-if-changed={f}"));
    println!("cargo:rerun-if-changed=kernels"); // a directory: cargo looks at every file in it
    VARIABLES.split(' ').for_each(|v| println!("cargo:rerun-if-env-changed={v}"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    fs::write(out.join("tiles.rs"), tiles()).expect("OUT_DIR is writable");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let skip = ["DOCS_RS", "AOJI_SKIP_KERNELS"].iter().any(|v| env::var_os(v).is_some_and(|v| !v.is_empty()));
    let [shipped, lab] = ["kernels", "kernels/lab"].map(|dir| if skip { Vec::new() } else { sources(dir) });
    if !skip {
        let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
        compile_all(&nvcc::find(&root).unwrap_or_else(|e| fail(&e)), &shipped, &lab, &out);
    }
    write_list(&out.join("modules.rs"), shipped.iter().map(|f| module(f)));
    write_list(&out.join("lab.rs"), lab.iter().map(|f| variant(f, &shipped)));
}

/// A slice for `include!`.
fn write_list(path: &Path, items: impl Iterator<Item = String>) {
    fs::write(path, format!("&[{}]", items.map(|i| i + ",").collect::<String>())).expect("OUT_DIR is writable");
}

/// `Module { ... }` of a compiled file.
fn module(f: &Path) -> String {
    let (stem, hash) = (stem(f), source_hash(f));
    let file = |extension: &str| format!("concat!(env!(\"OUT_DIR\"), \"/{stem}.{extension}\")");
    let (image, log) = (file("fatbin"), file("ptxas"));
    format!("Module {{ stem: {stem:?}, hash: {hash:?}, image: include_bytes!({image}), ptxas: include_str!({log}) }}")
}

/// `Variant { ... }` of a compiled kernels/lab/<op>_<name>.cu: the op is the longest stem of kernels/*.cu that fits.
fn variant(f: &Path, shipped: &[PathBuf]) -> String {
    let full = stem(f);
    let name = |op: &str| full.strip_prefix(op)?.strip_prefix('_').filter(|name| !name.is_empty()).map(String::from);
    let ops = shipped.iter().map(|s| stem(s));
    let (op, name) = ops.filter_map(|op| Some((op, name(op)?))).max_by_key(|(op, _)| op.len()).unwrap_or_else(|| {
        let stems = shipped.iter().map(|s| stem(s)).collect::<Vec<_>>().join(", ");
        fail(&format!("error: {}: expected <op>_<name>.cu, where <op> is one of {stems}", f.display()))
    });
    let text = read(f);
    let launch = text.lines().find_map(|l| l.strip_prefix("// launch:")).unwrap_or("").trim();
    format!("Variant {{ op: {op:?}, name: {name:?}, launch: {launch:?}, module: {} }}", module(f))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| fail(&format!("error: {}: {e}", path.display())))
}

fn fail(message: &str) -> ! {
    eprintln!("{message}"); // cargo shows it under "--- stderr"
    std::process::exit(1) // no panic: a backtrace would hide the message
}

fn stem(f: &Path) -> &str {
    f.file_stem().and_then(|s| s.to_str()).unwrap_or_else(|| fail("error: a kernel's file name is not UTF-8"))
}

fn sources(dir: &str) -> Vec<PathBuf> {
    children(Path::new(dir)).into_iter().filter(|p| p.extension().is_some_and(|e| e == "cu")).collect()
}

/// FNV-1a of a kernel's text, of the kernel that a variant includes, and of all common headers: the same on every machine and
/// with every compiler.
fn source_hash(f: &Path) -> String {
    let text = read(f);
    let included = text.lines().filter_map(|l| l.strip_prefix("#include \"")?.strip_suffix(".cu\""));
    let included = included.map(|stem| PathBuf::from(format!("kernels/{stem}.cu")));
    let files = std::iter::once(f.to_path_buf()).chain(included).chain(children(Path::new("kernels/common")));
    format!("{:016x}", fnv1a(files.flat_map(|p| read(&p).into_bytes())))
}

/// `#define NAME 1 // why` becomes `/// why` `pub const NAME: u32 = 1;`.
fn tiles() -> String {
    let mut rs = String::new();
    for l in read(Path::new("kernels/common/tiles.h")).lines().filter_map(|l| l.strip_prefix("#define ")) {
        let (value, why) = l.split_once("//").unwrap_or((l, ""));
        let (name, value) = value.split_once(' ').unwrap_or_else(|| fail(&format!("error: tiles.h: {l}: no value")));
        writeln!(rs, "///{why}\npub const {name}: u32 = {};", value.trim()).unwrap();
    }
    rs
}

fn compile_all(nvcc: &Nvcc, shipped: &[PathBuf], lab: &[PathBuf], out: &Path) {
    let mut args = ["-std=c++17", "-O3", "-fatbin", "-Ikernels", "-Xptxas=-v", "-compress-mode=size", "-keep"]
        .map(String::from)
        .to_vec();
    args.extend(env::var_os("AOJI_LINEINFO").map(|_| "-lineinfo".into()));
    args.extend(env::var("NVCC_CCBIN").map(|compiler| format!("-ccbin={compiler}")));
    let archs = env::var("AOJI_CUDA_ARCHS").unwrap_or_else(|_| ARCHS.into()).replace(' ', "");
    let lab_archs = if archs == ARCHS { LAB_ARCHS } else { &archs };
    println!("cargo:rustc-env=AOJI_KERNEL_IMAGES={archs}");
    println!("cargo:rustc-env=AOJI_NVCC_VERSION={}", nvcc.version);
    println!("cargo:rustc-env=AOJI_NVCC={}", nvcc.path.display()); // for tests: the disassembler is beside it
    let sources: Vec<_> = shipped.iter().map(|f| (f, &*archs)).chain(lab.iter().map(|f| (f, lab_archs))).collect();
    ptx::forget(&out.join("ptx"), &archs, &[shipped, lab].concat());
    let jobs: usize = env::var("NUM_JOBS").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some((f, archs)) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
            compile(nvcc, f, out, &args, archs);
        }
    };
    thread::scope(|s| (0..jobs).for_each(|_| drop(s.spawn(work))));
}

/// Compiles one file for `archs` unless its stamp, which names the command and the text of its sources, is current.
fn compile(nvcc: &Nvcc, f: &Path, out: &Path, args: &[String], archs: &str) {
    let code = |a: &str| a.strip_prefix("ptx").map_or_else(|| format!("sm_{a}"), |p| format!("compute_{p}"));
    let image_of = |a: &str| format!("-gencode=arch=compute_{},code={}", arch::of_ptx(a), code(a));
    let args: Vec<_> = args.iter().cloned().chain(archs.split(',').map(image_of)).collect();
    let [image, log, stamp] = ["fatbin", "ptxas", "stamp"].map(|x| out.join(format!("{}.{x}", stem(f))));
    let key = || format!("{} {} {args:?} {}", nvcc.path.display(), nvcc.version, source_hash(f));
    let compiled = key();
    let ptx = archs.split(',').map(|a| ptx::file(out, arch::of_ptx(a), stem(f)));
    let there = ptx.clone().chain([image.clone(), log.clone()]).all(|f| f.is_file());
    if there && fs::read_to_string(&stamp).is_ok_and(|s| s == compiled) {
        return;
    }
    let _ = fs::remove_file(&stamp);
    let made: Vec<PathBuf> = ptx.chain([image.clone(), log.clone()]).collect();
    let cache = Cache::of(stem(f), &compiled);
    if cache.as_ref().is_some_and(|c| c.take(&made)) {
        return fs::write(&stamp, &compiled).expect("OUT_DIR is writable");
    }
    let kept = out.join(format!("kept-{}", stem(f)));
    fs::create_dir_all(&kept).expect("OUT_DIR is writable");
    let o = Command::new(&nvcc.path).args(&args).arg("-keep-dir").arg(&kept).arg("-o").arg(&image).arg(f).output();
    let o = o.unwrap_or_else(|e| fail(&format!("error: {}: {e}", nvcc.path.display())));
    let text = [o.stdout, o.stderr].map(|t| String::from_utf8_lossy(&t).into_owned()).concat();
    if !o.status.success() {
        fail(&format!("error: nvcc failed on {}\n{text}", f.display()));
    }
    text.lines().filter(|l| l.contains("warning")).for_each(|l| println!("cargo:warning={l}"));
    ptx::keep(&kept, out, stem(f)).unwrap_or_else(|e| fail(&format!("error: keeping the PTX of {}: {e}", f.display())));
    fs::write(&log, &text).expect("OUT_DIR is writable");
    // No stamp when a source was edited while nvcc ran: the stamp would be the new text's, the code the old one's.
    if key() == compiled {
        fs::write(&stamp, &compiled).expect("OUT_DIR is writable");
        if let Some(Err(e)) = cache.map(|c| c.keep(&made)) {
            println!("cargo:warning=AOJI_KERNEL_CACHE: kernels/{}.cu was not kept: {e}", stem(f));
        }
    }
}
