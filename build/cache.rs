//! Keeps what the CUDA compiler has made, for other profiles and branches.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

pub fn fnv1a(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}

/// What the compiler made of one file by one command, in `$AOJI_KERNEL_CACHE`: a directory of numbered files, and the key that they
/// were made for.
pub struct Cache<'a> {
    dir: PathBuf,
    key: &'a str,
}

impl<'a> Cache<'a> {
    pub fn of(stem: &str, key: &'a str) -> Option<Cache<'a>> {
        let root = env::var_os("AOJI_KERNEL_CACHE").filter(|v| !v.is_empty())?;
        Some(Cache { dir: Path::new(&root).join(format!("{stem}-{:016x}", fnv1a(key.bytes()))), key })
    }

    /// Copies what is kept to `files`; false where it is not there.
    pub fn take(&self, files: &[PathBuf]) -> bool {
        let copy = |(i, to): (usize, &PathBuf)| {
            to.parent().is_some_and(|dir| fs::create_dir_all(dir).is_ok())
                && fs::copy(self.dir.join(i.to_string()), to).is_ok()
        };
        fs::read_to_string(self.dir.join("key")).is_ok_and(|key| key == self.key) && files.iter().enumerate().all(copy)
    }

    pub fn keep(&self, files: &[PathBuf]) -> std::io::Result<()> {
        let new = self.dir.with_extension(std::process::id().to_string()); // whole or not at all, also beside another build
        fs::create_dir_all(&new)?;
        for (i, from) in files.iter().enumerate() {
            fs::copy(from, new.join(i.to_string()))?;
        }
        fs::write(new.join("key"), self.key)?;
        let _ = fs::remove_dir_all(&self.dir);
        fs::rename(new, &self.dir)
    }
}
