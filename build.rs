//! Compiles kernels/*.cu and kernels/lab/*.cu to one fatbin each, to be embedded, and turns kernels/common/tiles.h into Rust
//! constants.
//!
//! Environment: NVCC, CUDA_HOME or CUDA_PATH, NVCC_CCBIN, AOJI_CUDA_ARCHS ("80,90a,ptx80"), AOJI_LINEINFO=1 (for profilers;
//! triples the size), AOJI_SKIP_KERNELS=1 (no kernels: for checks and documentation).
use std::{
    collections::BTreeSet,
    collections::hash_map::DefaultHasher,
    env,
    fmt::Write as _,
    fs,
    hash::{Hash, Hasher},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

/// First with sm_100 and sm_120.
const MIN_NVCC: (u32, u32) = (12, 8);
/// SASS for each generation from Ampere on, and PTX for those to come.
const ARCHS: &str = "80,86,89,90a,100,120,ptx80";
const VARIABLES: [&str; 9] = [
    "NVCC",
    "CUDA_HOME",
    "CUDA_PATH",
    "VIRTUAL_ENV",
    "NVCC_CCBIN",
    "AOJI_CUDA_ARCHS",
    "AOJI_LINEINFO",
    "AOJI_SKIP_KERNELS",
    "DOCS_RS",
];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels"); // a directory: cargo looks at every file in it
    VARIABLES.iter().for_each(|v| println!("cargo:rerun-if-env-changed={v}"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    write(&out.join("tiles.rs"), &tiles());
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let skip = ["DOCS_RS", "AOJI_SKIP_KERNELS"].iter().any(|v| env::var_os(v).is_some_and(|v| !v.is_empty()));
    let (mut shipped, mut lab) = (Vec::new(), Vec::new());
    if !skip {
        (shipped, lab) = (sources("kernels"), sources("kernels/lab"));
        let nvcc = find_nvcc().unwrap_or_else(|e| fail(&e));
        compile_all(&nvcc, &[&shipped[..], &lab].concat(), &out);
    }
    write_list(&out.join("modules.rs"), shipped.iter().map(|f| module(f)));
    write_list(&out.join("lab.rs"), lab.iter().map(|f| variant(f, &shipped)));
}

/// A slice for `include!`.
fn write_list(path: &Path, items: impl Iterator<Item = String>) {
    write(path, &format!("&[\n{}]\n", items.map(|i| i + ",\n").collect::<String>()));
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
    let text = fs::read_to_string(f).unwrap_or_else(|e| fail(&format!("error: {}: {e}", f.display())));
    let launch = text.lines().find_map(|l| l.strip_prefix("// launch:")).unwrap_or("").trim();
    format!("Variant {{ op: {op:?}, name: {name:?}, launch: {launch:?}, module: {} }}", module(f))
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap_or_else(|e| fail(&format!("error: {}: {e}", path.display())));
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
    let text = fs::read_to_string(f).unwrap_or_else(|e| fail(&format!("error: {}: {e}", f.display())));
    let included = text.lines().filter_map(|l| l.strip_prefix("#include \"")?.strip_suffix(".cu\""));
    let included = included.map(|stem| PathBuf::from(format!("kernels/{stem}.cu")));
    let files = std::iter::once(f.to_path_buf()).chain(included).chain(children(Path::new("kernels/common")));
    let hash = files.fold(0xcbf2_9ce4_8422_2325u64, |h, p| {
        let text = fs::read(&p).unwrap_or_else(|e| fail(&format!("error: {}: {e}", p.display())));
        text.iter().fold(h, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3))
    });
    format!("{hash:016x}")
}

/// `#define NAME 1 // why` becomes `/// why` `pub const NAME: u32 = 1;`.
fn tiles() -> String {
    let path = "kernels/common/tiles.h";
    let text = fs::read_to_string(path).unwrap_or_else(|e| fail(&format!("error: {path}: {e}")));
    let mut rs = String::new();
    for l in text.lines().filter_map(|l| l.strip_prefix("#define ")) {
        let (value, why) = l.split_once("//").unwrap_or((l, ""));
        let (name, value) = value.split_once(' ').unwrap_or_else(|| fail(&format!("error: {path}: {l}: no value")));
        writeln!(rs, "///{why}\npub const {name}: u32 = {};", value.trim()).unwrap();
    }
    rs
}

struct Nvcc {
    path: PathBuf,
    version: (u32, u32),
    /// Of `--list-gpu-code`: "80", "90", ...
    archs: BTreeSet<String>,
}

fn probe(path: &Path) -> Result<Nvcc, String> {
    let run = |arg: &str| {
        let o = Command::new(path).arg(arg).output().map_err(|e| format!("{}: {e}", path.display()))?;
        Ok::<_, String>(String::from_utf8_lossy(&o.stdout).into_owned())
    };
    let text = run("--version")?;
    let number = text.split("release ").nth(1).and_then(|s| s.split(',').next()).and_then(|s| s.trim().split_once('.'));
    let version = number
        .and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)))
        .ok_or_else(|| format!("{}: `--version` not understood", path.display()))?;
    if version < MIN_NVCC {
        let ((a, b), (c, d)) = (version, MIN_NVCC);
        return Err(format!("{}: CUDA {a}.{b} is older than {c}.{d}", path.display()));
    }
    let archs = run("--list-gpu-code")?.split_whitespace().map(|s| s.trim_start_matches("sm_").to_owned()).collect();
    Ok(Nvcc { path: path.into(), version, archs })
}

fn find_nvcc() -> Result<Nvcc, String> {
    if let Some(p) = env::var_os("NVCC") {
        return probe(Path::new(&p)).map_err(|e| format!("error: $NVCC is set but unusable: {e}"));
    }
    let mut candidates: Vec<PathBuf> = Vec::new();
    let homes = ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(env::var_os);
    candidates.extend(homes.map(|d| Path::new(&d).join("bin/nvcc")));
    // Wheels before PATH: pinned beats whatever the distribution has.
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let venvs =
        env::var_os("VIRTUAL_ENV").map(PathBuf::from).into_iter().chain([root.join(".venv"), root.join("venv")]);
    candidates
        .extend(venvs.flat_map(|v| children(&v.join("lib"))).flat_map(|p| wheels(&p.join("site-packages/nvidia"))));
    let path = env::var_os("PATH").unwrap_or_default();
    candidates.extend(env::split_paths(&path).map(|d| d.join("nvcc")));
    candidates.extend(["/usr/local/cuda/bin/nvcc", "/opt/cuda/bin/nvcc"].map(PathBuf::from));
    let site = Command::new("python3").args(["-c", "import nvidia\nfor p in nvidia.__path__: print(p)"]).output();
    let site = site.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    candidates.extend(site.lines().flat_map(|l| wheels(Path::new(l))));
    let mut message = String::from("error: no usable CUDA compiler (nvcc 12.8 or newer) was found\n");
    for c in candidates.into_iter().filter(|c| c.is_file()) {
        match probe(&c) {
            Ok(n) => return Ok(n),
            Err(e) => writeln!(message, "  rejected: {e}").unwrap(),
        }
    }
    message.push_str(
        "  looked in: $NVCC, $CUDA_HOME, $CUDA_PATH, $VIRTUAL_ENV, ./.venv, $PATH, /usr/local/cuda, /opt/cuda, python3's packages
  fix (no root, seconds, 280 MB on disk):
    python3 -m venv .venv && .venv/bin/pip install -r requirements-cuda.txt
  or name one:      NVCC=/path/to/nvcc cargo build --release
  or without a GPU: cargo build --release --no-default-features --features cli",
    );
    Err(message)
}

fn children(d: &Path) -> Vec<PathBuf> {
    let mut v: Vec<_> = fs::read_dir(d).into_iter().flatten().flatten().map(|e| e.path()).collect();
    v.sort();
    v
}

/// `nvidia/cu13/bin/nvcc`, the newest first.
fn wheels(nvidia: &Path) -> Vec<PathBuf> {
    let is_cuda = |p: &PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("cu"));
    children(nvidia).into_iter().filter(is_cuda).map(|p| p.join("bin/nvcc")).rev().collect()
}

fn compile_all(nvcc: &Nvcc, sources: &[PathBuf], out: &Path) {
    let mut args: Vec<String> = ["-std=c++17", "-O3", "-fatbin", "-Ikernels", "-Xptxas", "-v"].map(String::from).into();
    if env::var_os("AOJI_LINEINFO").is_some() {
        args.push("-lineinfo".into());
    }
    if nvcc.version >= (12, 9) {
        args.extend(["-compress-mode".into(), "size".into()]); // nvcc does not compress SASS by itself
    }
    let mut images = Vec::new();
    for a in env::var("AOJI_CUDA_ARCHS").unwrap_or_else(|_| ARCHS.into()).split(',').map(str::trim) {
        if let Some(p) = a.strip_prefix("ptx") {
            args.push(format!("-gencode=arch=compute_{p},code=compute_{p}"));
        } else if nvcc.archs.contains(a.trim_end_matches(['a', 'f'])) {
            args.push(format!("-gencode=arch=compute_{a},code=sm_{a}"));
        } else {
            println!("cargo:warning={} cannot target sm_{a}; left out", nvcc.path.display());
            continue;
        }
        images.push(a.to_string());
    }
    println!("cargo:rustc-env=AOJI_KERNEL_IMAGES={}", images.join(","));
    println!("cargo:rustc-env=AOJI_NVCC_VERSION={}.{}", nvcc.version.0, nvcc.version.1);
    println!("cargo:rustc-env=AOJI_NVCC={}", nvcc.path.display()); // for tests: the disassembler is beside it
    if let Some(c) = env::var_os("NVCC_CCBIN") {
        args.extend(["-ccbin".into(), c.to_string_lossy().into_owned()]);
    }
    let jobs: usize = env::var("NUM_JOBS").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let (next, errors) = (AtomicUsize::new(0), Mutex::new(String::new()));
    let worker = || {
        while let Some(f) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(e) = compile(nvcc, f, out, &args) {
                errors.lock().unwrap().push_str(&e);
            }
        }
    };
    std::thread::scope(|s| (0..jobs.min(sources.len())).for_each(|_| drop(s.spawn(worker))));
    let errors = errors.into_inner().unwrap();
    if !errors.is_empty() {
        fail(&errors);
    }
}

/// Compiles one file unless its stamp, a hash of the command and of the contents of the file and its own headers, is current.
fn compile(nvcc: &Nvcc, f: &Path, out: &Path, args: &[String]) -> Result<(), String> {
    let [image, headers, log, stamp] = ["fatbin", "d", "ptxas", "stamp"].map(|x| out.join(format!("{}.{x}", stem(f))));
    let toolkit = nvcc.path.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
    let key = || {
        let headers = fs::read_to_string(&headers).ok()?;
        let mut h = DefaultHasher::new();
        (args, nvcc.version, &nvcc.path).hash(&mut h);
        let files = headers.split_once(" : ")?.1.split_whitespace().filter(|t| *t != "\\").map(Path::new);
        for p in files.filter(|p| !p.starts_with(toolkit)) {
            fs::read(p).ok()?.hash(&mut h);
        }
        Some(format!("{:016x}", h.finish()))
    };
    if image.is_file() && log.is_file() && key().is_some_and(|k| fs::read_to_string(&stamp).is_ok_and(|s| s == k)) {
        return Ok(());
    }
    let _ = fs::remove_file(&stamp);
    let began = std::time::SystemTime::now();
    let mut command = Command::new(&nvcc.path);
    command.args(args).arg("-MMD").arg("-MF").arg(&headers).arg("-o").arg(&image).arg(f);
    let o = command.output().map_err(|e| format!("error: {}: {e}\n", nvcc.path.display()))?;
    let text = String::from_utf8_lossy(&o.stdout).into_owned() + &String::from_utf8_lossy(&o.stderr);
    if !o.status.success() {
        return Err(format!("error: nvcc failed on {}\n{text}\n", f.display()));
    }
    text.lines().filter(|l| l.contains("warning")).for_each(|l| println!("cargo:warning={l}"));
    fs::write(&log, &text).map_err(|e| e.to_string())?;
    // No stamp when an input was edited while nvcc ran: the hash would be the new text's, the code the old one's.
    let inputs = fs::read_to_string(&headers).unwrap_or_default();
    let edited = |p: &str| fs::metadata(p).and_then(|m| m.modified()).is_ok_and(|m| m >= began);
    let inputs = inputs.split_once(" : ").map_or("", |(_, files)| files);
    if !inputs.split_whitespace().any(edited)
        && let Some(k) = key()
    {
        let _ = fs::write(&stamp, k);
    }
    Ok(())
}
