//! The PTX that nvcc makes on its way to machine code: the emulated device of the tests runs it.

use crate::{arch, nvcc::children, stem};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Removes the PTX of earlier builds that this one does not make.
pub fn forget(ptx: &Path, archs: &str, sources: &[PathBuf]) {
    for dir in children(ptx) {
        let arch = dir.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if !archs.split(',').any(|i| arch::of_ptx(i) == arch) {
            let _ = fs::remove_dir_all(&dir);
        }
        for f in children(&dir).iter().filter(|f| sources.iter().all(|s| stem(s) != stem(f))) {
            let _ = fs::remove_file(f);
        }
    }
}

/// Of what nvcc left in `kept`, the PTX of each architecture: the emulated device of the tests runs what the machine code was
/// made from. Which architecture it is, the text says: the file's name does only where there are several.
pub fn keep(kept: &Path, out: &Path, stem: &str) -> std::io::Result<()> {
    for f in children(kept).into_iter().filter(|f| f.extension().is_some_and(|e| e == "ptx")) {
        let text = fs::read_to_string(&f)?;
        let arch = text.lines().find_map(|l| l.strip_prefix(".target sm_")).map(str::trim);
        let arch = arch.ok_or_else(|| std::io::Error::other(format!("{} has no .target", f.display())))?;
        let kept = file(out, arch, stem);
        fs::create_dir_all(kept.parent().expect("a directory of the architecture"))?;
        fs::rename(&f, kept)?;
    }
    fs::remove_dir_all(kept) // megabytes of preprocessed source
}

/// Where the PTX of a file is for an architecture.
pub fn file(out: &Path, arch: &str, stem: &str) -> PathBuf {
    out.join("ptx").join(arch).join(format!("{stem}.ptx"))
}
