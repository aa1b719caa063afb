//! The CUDA compiler, for the build scripts of aoji and of its emulated device.

use std::{
    env,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

pub struct Nvcc {
    pub path: PathBuf,
    /// `13.0`
    pub version: String,
}

fn probe(path: &Path) -> Result<Nvcc, String> {
    let o = Command::new(path).arg("--version").output().map_err(|e| format!("{}: {e}", path.display()))?;
    let text = String::from_utf8_lossy(&o.stdout);
    let version = text.split("release ").nth(1).and_then(|s| s.split(',').next());
    let number = version.and_then(|v| v.split_once('.')).and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    // The first that knows sm_120 and compresses machine code when it is told to.
    match version.filter(|_| number.is_some_and(|n| n >= (12u32, 9u32))) {
        Some(version) => Ok(Nvcc { path: path.into(), version: version.into() }),
        None => Err(format!("{}: CUDA {} is older than 12.9", path.display(), version.unwrap_or("of no version"))),
    }
}

/// Where $NVCC says, else the first usable one of the usual places; `root` is the workspace.
pub fn find(root: &Path) -> Result<Nvcc, String> {
    if let Some(p) = env::var_os("NVCC") {
        return probe(Path::new(&p)).map_err(|e| format!("error: $NVCC is set but unusable: {e}"));
    }
    let mut candidates: Vec<PathBuf> = Vec::new();
    let homes = ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(env::var_os);
    candidates.extend(homes.map(|d| Path::new(&d).join("bin/nvcc")));
    // Wheels before PATH: pinned beats whatever the distribution has.
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
    let mut message = String::from("error: no usable CUDA compiler (nvcc 12.9 or newer) was found\n");
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
  or without a GPU: cargo build --release --no-default-features --features cli,server",
    );
    Err(message)
}

/// What is in a directory, sorted.
pub fn children(d: &Path) -> Vec<PathBuf> {
    let mut v: Vec<_> = fs::read_dir(d).into_iter().flatten().flatten().map(|e| e.path()).collect();
    v.sort();
    v
}

/// `nvidia/cu13/bin/nvcc`, the newest first.
fn wheels(nvidia: &Path) -> Vec<PathBuf> {
    let is_cuda = |p: &PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("cu"));
    children(nvidia).into_iter().filter(is_cuda).map(|p| p.join("bin/nvcc")).rev().collect()
}
