//! Directories that are being written: every file has another name until all are whole.
//!
//! A file `NAME` is written as `NAME.incomplete` and takes its name when all files of the directory are there. What fails leaves
//! nothing behind, and what is killed leaves no file that looks whole; the next run clears it away. Files get the modes that the
//! process gives new files, whatever they are copied from, and errors of writing name the file that was to be.

use crate::error::{Error, Result};
use std::{
    fs::{self, File, TryLockError},
    io::{Read, Write},
    path::{Path, PathBuf},
};

const SUFFIX: &str = ".incomplete";
/// Bytes that are copied at once.
const BLOCK: usize = 4 << 20;

/// A directory that is being written. Dropped before [`Output::finish`], it removes what it has written.
pub struct Output {
    dir: PathBuf,
    /// The directory itself is new.
    created: bool,
    /// Keeps others from clearing away what is being written.
    lock: Option<File>,
    names: Vec<String>,
    finished: bool,
}

/// A file that is being written.
pub struct Target {
    /// Its name in the end.
    path: PathBuf,
    file: File,
}

impl Output {
    /// Begins a directory, which must be absent or empty but for what a run that was killed has left.
    ///
    /// # Errors
    /// [`Error::Input`] when it is in use, [`Error::Io`] when it cannot be made.
    pub fn begin(dir: &Path) -> Result<Output> {
        let created = !dir.exists();
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let mut output = Output::beside(dir);
        output.created = created;
        // Some file systems have no locks; then nothing warns of a second writer.
        if let Ok(lock) = File::open(dir) {
            if matches!(lock.try_lock(), Err(TryLockError::WouldBlock)) {
                output.created = false;
                return Err(Error::Input(format!("another process is writing {}", dir.display())));
            }
            output.lock = Some(lock);
        }
        discard(dir)?;
        match fs::read_dir(dir).map_err(Error::io(dir))?.next() {
            Some(_) => Err(Error::Input(format!("{} is not empty; name a new directory", dir.display()))),
            None => Ok(output),
        }
    }

    /// Files that come to the others of a directory, and replace those of the same names.
    pub fn beside(dir: &Path) -> Output {
        Output { dir: dir.into(), created: false, lock: None, names: Vec::new(), finished: false }
    }

    fn unfinished(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}{SUFFIX}"))
    }

    /// Begins a file of the directory.
    pub fn create(&mut self, name: &str) -> Result<Target> {
        let path = self.dir.join(name);
        let file = File::create(self.unfinished(name)).map_err(Error::io(&path))?;
        self.names.push(name.into());
        Ok(Target { path, file })
    }

    /// Writes a file of the directory.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.create(name)?.write(bytes)
    }

    /// Copies a file into the directory, under its own name.
    pub fn copy(&mut self, from: &Path) -> Result<()> {
        let name = from.file_name().and_then(|n| n.to_str()).ok_or_else(|| Error::file(from, "has no name"))?;
        let mut file = File::open(from).map_err(Error::io(from))?;
        self.create(name)?.copy(from, &mut file, u64::MAX)
    }

    /// Gives all files their names, in the order in which they were begun.
    pub fn finish(mut self) -> Result<()> {
        for name in &self.names {
            let path = self.dir.join(name);
            fs::rename(self.unfinished(name), &path).map_err(Error::io(&path))?;
        }
        self.finished = true;
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        // The error that led here is the one to tell.
        for name in &self.names {
            let _ = fs::remove_file(self.unfinished(name));
        }
        if self.created {
            let _ = fs::remove_dir(&self.dir);
        }
    }
}

impl Target {
    /// Writes on.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::io(&self.path))
    }

    /// Writes up to `len` bytes of `file`, from where it is; `from` is its name.
    pub fn copy(&mut self, from: &Path, file: &mut File, len: u64) -> Result<()> {
        let mut rest = file.take(len);
        let mut block = vec![0; BLOCK.min(len.min(BLOCK as u64) as usize)];
        loop {
            match rest.read(&mut block).map_err(Error::io(from))? {
                0 => return Ok(()),
                n => self.write(&block[..n])?,
            }
        }
    }
}

/// Removes the unfinished files of a directory: what a run that was killed has left, or, just before it ends, this process itself.
///
/// # Errors
/// [`Error::Io`] for a file that cannot be removed.
pub fn discard(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        if path.to_string_lossy().ends_with(SUFFIX) {
            fs::remove_file(&path).map_err(Error::io(&path))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let name = |e: std::io::Result<fs::DirEntry>| e.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<String> = fs::read_dir(dir).unwrap().map(name).collect();
        names.sort();
        names
    }

    #[test]
    fn files_have_their_names_when_all_are_there() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("new/out");
        let mut output = Output::begin(&out).unwrap();
        output.write("b", b"one").unwrap();
        let mut target = output.create("a").unwrap();
        target.write(b"two").unwrap();
        assert_eq!(names(&out), ["a.incomplete", "b.incomplete"]);
        let second = Output::begin(&out).err().unwrap().to_string();
        assert!(second.contains("another process is writing"), "{second}");
        assert_eq!(names(&out).len(), 2, "the second writer leaves them alone");
        output.finish().unwrap();
        assert_eq!((names(&out), fs::read(out.join("a")).unwrap()), (vec!["a".into(), "b".into()], b"two".to_vec()));
    }

    #[test]
    fn what_fails_leaves_nothing_and_what_was_there_before() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let mut output = Output::begin(&out).unwrap();
        output.write("a", b"one").unwrap();
        let error = output.copy(&dir.path().join("absent")).unwrap_err();
        assert!(matches!(&error, Error::Io { path, .. } if path.ends_with("absent")), "{error}");
        drop(output);
        assert!(!out.exists());

        fs::create_dir(&out).unwrap(); // an empty one of the user's stays
        fs::write(out.join("left.incomplete"), "of a run that was killed").unwrap();
        drop(Output::begin(&out).unwrap());
        assert_eq!(names(&out), [""; 0]);
        fs::write(out.join("mine"), "").unwrap();
        assert!(Output::begin(&out).err().unwrap().to_string().contains("is not empty"));
        assert_eq!(names(&out), ["mine"]);
    }

    #[cfg(unix)]
    #[test]
    fn a_copy_has_a_mode_of_its_own_and_a_full_disk_names_the_target() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        fs::write(&from, vec![7; 3 << 20]).unwrap();
        fs::set_permissions(&from, fs::Permissions::from_mode(0o444)).unwrap();
        let out = dir.path().join("out");
        let mut output = Output::begin(&out).unwrap();
        output.copy(&from).unwrap();
        output.finish().unwrap();
        let copy = out.join("from");
        assert_ne!(fs::metadata(&copy).unwrap().permissions().mode() & 0o200, 0, "its owner may write");
        assert_eq!(fs::read(&copy).unwrap().len(), 3 << 20);

        let Ok(_) = File::options().write(true).open("/dev/full") else { return };
        let full = dir.path().join("full");
        fs::create_dir(&full).unwrap();
        symlink("/dev/full", full.join("from.incomplete")).unwrap();
        let error = Output::beside(&full).copy(&from).unwrap_err();
        assert!(matches!(&error, Error::Io { path, .. } if *path == full.join("from")), "{error}");
        assert_eq!(names(&full), [""; 0]);
    }
}
