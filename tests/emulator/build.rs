//! Builds two shared objects into `OUT_DIR/lib`: `libcuda.so` (the emulator with the kernels linked in) and
//! `libcublas.so`.
//!
//! Kernels: the `.cu` files directly in the workspace's `kernels/` and in `kernels/lab/`, or in the directories of
//! `CUDA_EMULATOR_KERNELS` (separated by `:`, relative to the workspace); and always this crate's own `tests/kernels`,
//! which nvcc, where there is one, also compiles to PTX in `OUT_DIR/ptx`.
#[path = "../../build/nvcc.rs"]
mod nvcc;

use std::{
    collections::hash_map::DefaultHasher,
    env, fs,
    hash::{Hash, Hasher},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

/// A C++ compilation of the emulator itself, or of kernels.
fn compiler(kernels: bool) -> cc::Build {
    let mut b = cc::Build::new();
    b.cpp(true)
        .std(if kernels { "c++17" } else { "c++20" })
        .opt_level(2)
        .debug(false)
        .pic(true)
        .force_frame_pointer(false);
    b.cargo_metadata(false).warnings(!kernels);
    // -ffp-contract=off: explicitly rounded arithmetic must give the same bits as on the device
    b.flags(["-fvisibility=hidden", "-Wno-psabi", "-ffp-contract=off"]);
    b.flag("-ftls-model=initial-exec"); // what a thread runs is looked at in each access: two moves, not a call
    if kernels {
        // only the compiler's half of ThreadSanitizer: it reports each access to checker.cpp, libtsan is not linked; -g1 tells
        // lines and inlined calls, which reports name
        b.flags(["-fsanitize=thread", "-Wno-unknown-pragmas", "-g1"]);
    }
    b
}

/// The files of `dir` with one of the extensions, sorted; nothing if there is no such directory.
fn files(dir: &Path, extensions: &[&str]) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return vec![] };
    let wanted = |f: &PathBuf| f.extension().is_some_and(|e| extensions.iter().any(|x| e == *x));
    let mut v: Vec<_> = entries.map(|f| f.unwrap().path()).filter(wanted).collect();
    v.sort();
    v
}

/// A kernel's source as the compiler gets it: in a namespace of its own, because nvcc too keeps each file's device
/// functions apart, while C++ would silently merge inline functions of the same name from two files.
fn wrap(out: &Path, kernel: &Path) -> PathBuf {
    let text = kernel.to_str().expect("the kernel's path is UTF-8");
    let name: String = text.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    let path = out.join(format!("{name}.cpp"));
    let source = format!("#include \"emulated_device.h\"\nnamespace file_{name} {{\n#include \"{text}\"\n}}\n");
    if fs::read_to_string(&path).ok().as_deref() != Some(&source) {
        fs::write(&path, source).unwrap();
    }
    path
}

/// Objects of `sources` (what to compile, and the file whose text counts); compiles only where that text, the flags or
/// a header changed since the last run.
fn compile(b: &cc::Build, sources: &[(PathBuf, PathBuf)], headers: &[PathBuf], what: &str) -> Vec<PathBuf> {
    let command = b.get_compiler().to_command();
    let command = format!("{what} {:?} {:?}", command.get_program(), command.get_args().collect::<Vec<_>>());
    let key = |text: &PathBuf| {
        let mut h = DefaultHasher::new();
        (&command, text).hash(&mut h);
        headers.iter().chain([text]).for_each(|f| fs::read(f).unwrap_or_default().hash(&mut h));
        h.finish().to_string()
    };
    // a stamp holds the key, the object's size and time (nobody has replaced it), and its path
    let stamps = PathBuf::from(env::var_os("OUT_DIR").unwrap());
    let stamp = |f: &PathBuf| stamps.join(format!("{what}-{}.stamp", f.to_str().unwrap().replace('/', "_")));
    let state = |object: &Path| fs::metadata(object).map(|m| format!("{} {:?}", m.len(), m.modified())).ok();
    let known = |text: &PathBuf| {
        let s = fs::read_to_string(stamp(text)).ok()?;
        let [k, size_and_time, object] = s.lines().collect::<Vec<_>>().try_into().ok()?;
        let object = PathBuf::from(object);
        (k == key(text) && state(&object)? == size_and_time).then_some(object)
    };
    let stale: Vec<_> = sources.iter().filter(|(_, text)| known(text).is_none()).collect();
    let next = AtomicUsize::new(0);
    let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some((source, text)) = stale.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let key = key(text); // before compiling: an edit meanwhile is not built
                    let object = &b.clone().file(source).compile_intermediates()[0];
                    let state = state(object).unwrap();
                    fs::write(stamp(text), format!("{key}\n{state}\n{}", object.display())).unwrap();
                }
            });
        }
    });
    let object = |(_, t): &(PathBuf, PathBuf)| {
        known(t).unwrap_or_else(|| panic!("{} changed while it was compiled; build again", t.display()))
    };
    sources.iter().map(object).collect()
}

fn link(out: &Path, name: &str, objects: &[PathBuf], libraries: &[&Path]) {
    // only the API: a library loaded with RTLD_GLOBAL must not offer its C++ templates to others
    let script = out.join("../exports.map");
    fs::write(&script, "{ global: cu*; local: *; };").unwrap();
    let mut c = compiler(false).get_compiler().to_command();
    c.args(["-shared", "-Wl,-z,defs", &format!("-Wl,-soname,{name}"), "-Wl,-rpath,$ORIGIN"]);
    c.arg(format!("-Wl,--version-script,{}", script.display())).arg("-o").arg(out.join(name));
    c.args(objects).args(libraries).args(["-ldl", "-lpthread"]);
    let status = c.status().unwrap_or_else(|e| panic!("cannot run the C++ compiler: {e}"));
    assert!(status.success(), "linking {name} failed");
}

/// The PTX of this crate's own kernels, in `ptx/90a`; that of aoji's kernels is made when aoji is built. Without nvcc
/// there is none.
fn compile_ptx(ptx: &Path, kernels: &Path, include: &Path, workspace: &Path) {
    let dir = ptx.join("90a");
    let nvcc = match nvcc::find(workspace) {
        Ok(nvcc) => nvcc,
        _ => {
            let _ = fs::remove_dir_all(ptx);
            println!("cargo:warning=no nvcc: the emulator's own tests of PTX are skipped");
            return;
        }
    };
    fs::create_dir_all(&dir).unwrap();
    for kernel in files(kernels, &["cu"]) {
        let path = dir.join(kernel.with_extension("ptx").file_name().unwrap());
        let mut c = Command::new(&nvcc.path);
        c.args(["-std=c++17", "-O3", "-ptx", "-lineinfo", "-arch=compute_90a", "-I"]).arg(include);
        let mut h = DefaultHasher::new();
        format!("{c:?} {:?}", nvcc.version).hash(&mut h);
        let headers = files(&include.join("common"), &["h", "cuh"]);
        headers.iter().chain([&kernel]).for_each(|f| fs::read(f).unwrap_or_default().hash(&mut h));
        let (key, stamp) = (h.finish().to_string(), path.with_extension("stamp"));
        if path.is_file() && fs::read_to_string(&stamp).is_ok_and(|s| s == key) {
            continue;
        }
        let o = c.arg("-o").arg(&path).arg(&kernel).output().unwrap();
        assert!(o.status.success(), "nvcc failed on {}:\n{}", kernel.display(), String::from_utf8_lossy(&o.stderr));
        fs::write(&stamp, key).unwrap();
    }
}

fn main() {
    println!("cargo:rerun-if-env-changed=DOCS_RS");
    if env::var_os("DOCS_RS").is_some() {
        // documentation and lints run nothing
        ["LIB", "PTX"].iter().for_each(|name| println!("cargo:rustc-env=CUDA_EMULATOR_{name}="));
        return;
    }
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap());
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap());
    let lib = out.join("lib");
    fs::create_dir_all(&lib).unwrap();
    let workspace = here.join("../..").canonicalize().unwrap();
    let shared = workspace.join("kernels"); // device.cuh is in its common/

    println!("cargo:rerun-if-env-changed=CUDA_EMULATOR_KERNELS");
    println!("cargo:rerun-if-changed={}", workspace.join("build/nvcc.rs").display());
    let mut dirs = match env::var("CUDA_EMULATOR_KERNELS") {
        Ok(list) => list.split(':').filter(|d| !d.is_empty()).map(|d| workspace.join(d)).collect(),
        Err(_) => vec![shared.clone(), shared.join("lab")],
    };
    dirs.push(here.join("tests/kernels"));
    let own = ["emulator", "include", "build.rs"].map(|d| here.join(d));
    for path in dirs.iter().chain(&own).chain([&shared]) {
        if path.exists() {
            println!("cargo:rerun-if-changed={}", path.display()); // a directory counts with all that is in it
        }
    }

    let interface = files(&here.join("include"), &["h"]);
    let internal = interface.iter().cloned().chain(files(&here.join("emulator"), &["h"]));
    let internal: Vec<_> = internal.chain(files(&here.join("emulator/ptx"), &["h"])).collect();
    let source = |f: PathBuf| (f.clone(), f);
    let (blas, engine): (Vec<_>, Vec<_>) =
        files(&here.join("emulator"), &["cpp"]).into_iter().map(source).partition(|(f, _)| f.ends_with("cublas.cpp"));
    let mut own = compiler(false);
    own.include(here.join("include")).include(here.join("emulator"));
    let mut objects = compile(&own, &engine, &internal, "emulator");
    let interpreter: Vec<_> = files(&here.join("emulator/ptx"), &["cpp"]).into_iter().map(source).collect();
    objects.extend(compile(own.opt_level(3), &interpreter, &internal, "ptx"));
    let blas = compile(compiler(false).opt_level(3), &blas, &internal, "cublas");
    for dir in &dirs {
        let mut headers = interface.clone();
        headers.extend([dir, &shared.join("common")].into_iter().flat_map(|d| files(d, &["h", "cuh"])));
        if *dir != shared {
            headers.extend(files(&shared, &["cu"])); // a variant may include the shipped kernel
        }
        let kernels: Vec<_> = files(dir, &["cu"]).into_iter().map(|f| (wrap(&out, &f), f)).collect();
        let mut b = compiler(true);
        b.include(dir).include(&shared).include(here.join("include"));
        objects.extend(compile(&b, &kernels, &headers, "kernels"));
    }
    link(&lib, "libcuda.so", &objects, &[]);
    link(&lib, "libcublas.so", &blas, &[&lib.join("libcuda.so")]);
    println!("cargo:rustc-env=CUDA_EMULATOR_LIB={}", lib.display());
    compile_ptx(&out.join("ptx"), &here.join("tests/kernels"), &shared, &workspace);
    println!("cargo:rustc-env=CUDA_EMULATOR_PTX={}", out.join("ptx").display());
}
