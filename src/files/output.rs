//! Directories that are being written: files have temporary names until all of them are complete.
//!
//! A file `NAME` is written as `NAME.incomplete` and gets its name when all files of the directory are complete and on
//! the disk. A run that fails leaves nothing behind. A run that is killed leaves no file that looks complete, and the
//! next run clears away the rest. A directory that is refused stays as it was. Files get the modes that the process
//! gives to new files, even when they are copies, and errors of writing name the file that was to be.

use super::model_files;
use crate::error::{Error, Result};
use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{Read, Write},
    path::{Path, PathBuf},
};

const SUFFIX: &str = ".incomplete";
/// Bytes that are copied at once.
const BLOCK: usize = 4 << 20;

/// A directory that is being written. Dropped before [`Output::finish`], it removes what it has written.
pub struct Output {
    dir: PathBuf,
    /// Whether this run made the directory.
    created: bool,
    /// Keeps other processes from clearing away what is being written.
    lock: Option<File>,
    /// Files of the model that is being replaced.
    old: Vec<PathBuf>,
    /// The name of the file, when only one is written, into a directory that may have others.
    single: Option<String>,
    names: Vec<String>,
    finished: bool,
}

/// A file that is being written.
pub struct Target {
    /// Its final name.
    path: PathBuf,
    file: File,
}

impl Output {
    /// Begins a directory, which must be absent, or empty except for what a killed run has left.
    ///
    /// # Errors
    /// [`Error::Input`] when it is in use or has other files, [`Error::Io`] when it cannot be made.
    pub fn begin(dir: &Path) -> Result<Output> {
        let output = Output::open(dir)?;
        match output.old.first() {
            None => output.cleared(),
            Some(_) => Err(Error::Input(format!("{} is not empty; name a new directory", dir.display()))),
        }
    }

    /// Begins a directory that may have a model, which stays until the new one is whole.
    ///
    /// # Errors
    /// Those of [`Output::begin`]; [`Error::Input`] when it has a file that is none of a model.
    pub fn replace(dir: &Path) -> Result<Output> {
        let output = Output::open(dir)?;
        let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match output.old.iter().find(|path| !path.is_file() || !model_files::belongs(&name(path))) {
            None => output.cleared(),
            Some(other) => Err(Error::Input(format!(
                "{} is not a file of a model; a directory with other files is not replaced: name another one",
                other.display()
            ))),
        }
    }

    /// Begins one file, in a directory that may have others.
    ///
    /// # Errors
    /// [`Error::Input`] when there is such a file and it is not to be replaced, [`Error::Io`] when its directory cannot be made.
    pub fn file(path: &Path, replace: bool) -> Result<Output> {
        let Some(name) = path.file_name().and_then(|name| name.to_str()).filter(|_| !path.is_dir()) else {
            return Err(Error::Input(format!("{} is not the name of a file", path.display())));
        };
        if path.exists() && !replace {
            return Err(Error::Input(format!("{} is there already; name a new file", path.display())));
        }
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_path_buf();
        fs::create_dir_all(&dir).map_err(Error::io(&dir))?;
        let (single, names) = (Some(name.to_string()), Vec::new());
        Ok(Output { dir, created: false, lock: None, old: Vec::new(), single, names, finished: false })
    }

    /// Begins files that are added to those of a directory, and replace files of the same names.
    pub fn beside(dir: &Path) -> Output {
        let dir = dir.to_path_buf();
        Output { dir, created: false, lock: None, old: Vec::new(), single: None, names: Vec::new(), finished: false }
    }

    /// Finds what is in a directory, and keeps others from writing it.
    fn open(dir: &Path) -> Result<Output> {
        let created = !dir.exists();
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let dir = dir.to_path_buf();
        let mut output =
            Output { dir, created, lock: None, old: Vec::new(), single: None, names: Vec::new(), finished: false };
        let dir = &output.dir;
        // Some file systems have no locks; then nothing warns of a second writer.
        if let Ok(lock) = File::open(dir) {
            if matches!(lock.try_lock(), Err(TryLockError::WouldBlock)) {
                output.created = false;
                return Err(Error::Input(format!("another process is writing {}", output.dir.display())));
            }
            output.lock = Some(lock);
        }
        output.old = entries(dir)?.into_iter().filter(|path| !is_unfinished(path)).collect();
        Ok(output)
    }

    /// Clears away what a killed run has left.
    fn cleared(self) -> Result<Output> {
        discard(&self.dir)?;
        Ok(self)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The file that [`Output::file`] writes.
    pub(super) fn single(&self) -> Option<&str> {
        self.single.as_deref()
    }

    /// Returns what a program calls when it has to end in the middle: it removes the unfinished files.
    pub fn abandon(&self) -> impl Fn() + Send + 'static {
        let (dir, created) = (self.dir.clone(), self.created);
        let single = self.single.as_ref().map(|name| self.unfinished(name));
        move || {
            // The program ends; there is nobody to tell.
            let _ =
                single.as_ref().map_or_else(|| discard(&dir), |path| fs::remove_file(path).map_err(Error::io(path)));
            if created {
                let _ = fs::remove_dir(&dir);
            }
        }
    }

    fn unfinished(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}{SUFFIX}"))
    }

    /// Begins a file of the directory.
    pub fn create(&mut self, name: &str) -> Result<Target> {
        let path = self.dir.join(name);
        let open = OpenOptions::new().write(true).create(true).truncate(false).open(self.unfinished(name));
        let file = open.map_err(Error::io(&path))?;
        if matches!(file.try_lock(), Err(TryLockError::WouldBlock)) {
            return Err(Error::Input(format!("another process is writing {}", path.display())));
        }
        if file.metadata().is_ok_and(|m| m.is_file()) {
            file.set_len(0).map_err(Error::io(&path))?; // left by a run that was killed
        }
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

    /// Gives all files their names, in the order in which they were begun, once their bytes are on the disk. If the
    /// machine stops meanwhile, either the whole model is found or none.
    pub fn finish(mut self) -> Result<()> {
        for name in &self.names {
            let file = OpenOptions::new().write(true).open(self.unfinished(name));
            file.and_then(|file| file.sync_all()).map_err(Error::io(self.dir.join(name)))?;
        }
        // A mixture of the old model and the new one must not open: so config.json is removed first and comes back
        // last.
        self.old.sort_by_key(|path| !path.ends_with(model_files::CONFIG));
        for path in &self.old {
            fs::remove_file(path).map_err(Error::io(path))?;
        }
        for name in &self.names {
            let path = self.dir.join(name);
            fs::rename(self.unfinished(name), &path).map_err(Error::io(&path))?;
        }
        self.finished = true;
        #[cfg(unix)] // elsewhere a directory cannot be opened
        File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(Error::io(&self.dir))?;
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        // The error that led here is the one to report.
        for name in &self.names {
            let _ = fs::remove_file(self.unfinished(name));
        }
        if self.created {
            let _ = fs::remove_dir(&self.dir);
        }
    }
}

impl Target {
    /// Appends bytes.
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

/// Removes the unfinished files of a directory.
fn discard(dir: &Path) -> Result<()> {
    for path in entries(dir)?.iter().filter(|path| is_unfinished(path)) {
        fs::remove_file(path).map_err(Error::io(path))?;
    }
    Ok(())
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).map_err(Error::io(dir))?;
    entries.map(|entry| entry.map(|entry| entry.path()).map_err(Error::io(dir))).collect()
}

fn is_unfinished(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().ends_with(SUFFIX.as_bytes())
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

        fs::create_dir(&out).unwrap(); // an empty directory that the user made stays
        fs::write(out.join("left.incomplete"), "of a run that was killed").unwrap();
        drop(Output::begin(&out).unwrap());
        assert_eq!(names(&out), [""; 0]);
        // a directory that is refused stays as it was, also unfinished files of other programs
        fs::write(out.join("mine"), "").unwrap();
        fs::write(out.join("film.incomplete"), "of another program").unwrap();
        assert!(Output::begin(&out).err().unwrap().to_string().contains("is not empty"));
        assert!(Output::replace(&out).err().unwrap().to_string().contains("mine is not a file of a model"));
        assert_eq!(names(&out), ["film.incomplete", "mine"]);
    }

    #[test]
    fn a_model_is_replaced_when_the_new_one_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path();
        let old = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"];
        old.iter().for_each(|name| fs::write(out.join(name), "old").unwrap());
        let write = || {
            let mut output = Output::replace(out).unwrap();
            output.write("model.safetensors", b"new").unwrap();
            output.write("config.json", b"new").unwrap();
            output
        };
        drop(write());
        assert_eq!(names(out), old, "what fails leaves the old one");
        write().finish().unwrap();
        assert_eq!(names(out), ["config.json", "model.safetensors"]);
        assert_eq!(fs::read(out.join("config.json")).unwrap(), b"new");

        // one file among others
        let file = out.join("m.gguf");
        let mut one = Output::file(&file, false).unwrap();
        let mut target = one.create("m.gguf").unwrap();
        target.write(b"gguf").unwrap();
        let second = Output::file(&file, false).unwrap().create("m.gguf").err().unwrap().to_string();
        assert!(second.contains("another process is writing"), "{second}");
        assert_eq!(names(out), ["config.json", "m.gguf.incomplete", "model.safetensors"]);
        one.abandon()();
        assert_eq!(names(out), ["config.json", "model.safetensors"]);
        drop((target, one));
        let mut one = Output::file(&file, false).unwrap();
        one.write("m.gguf", b"gguf").unwrap();
        one.finish().unwrap();
        assert!(Output::file(&file, false).err().unwrap().to_string().contains("is there already"));
        assert!(Output::file(out, false).err().unwrap().to_string().contains("not the name of a file"));
        Output::file(&file, true).unwrap();
        fs::remove_file(&file).unwrap();

        // a program that ends in the middle
        let output = write();
        output.abandon()();
        std::mem::forget(output);
        assert_eq!(names(out), ["config.json", "model.safetensors"]);
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
        let mut output = Output::begin(&full).unwrap();
        symlink("/dev/full", full.join("from.incomplete")).unwrap();
        let error = output.copy(&from).unwrap_err();
        assert!(matches!(&error, Error::Io { path, .. } if *path == full.join("from")), "{error}");
        drop(output);
        assert_eq!(names(&full), [""; 0]);
    }
}
