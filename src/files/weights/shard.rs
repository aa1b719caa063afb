//! A file with tensors, as it is mapped into memory.

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::{Error, Result};

/// One file with tensors.
pub(in crate::files) struct Shard {
    pub(super) path: PathBuf,
    pub(super) index: usize,
    data: Data,
}

enum Data {
    Mapped {
        map: Mmap,
        #[cfg_attr(not(unix), expect(dead_code))]
        file: File,
    },
    Static(&'static [u8]),
    Owned(Vec<u8>),
}

impl Shard {
    pub(in crate::files) fn map(path: PathBuf, index: usize) -> Result<Shard> {
        // Opening a pipe would block, and a directory opens but does not map.
        if !std::fs::metadata(&path).map_err(Error::io(&path))?.is_file() {
            return Err(Error::file(path, "is not a regular file"));
        }
        let file = File::open(&path).map_err(Error::io(&path))?;
        // SAFETY: the mapping is read-only and private to this struct. That nobody changes the file while it lives
        // cannot be enforced on any system; it is the documented contract of `Weights::open`, and the file is one
        // that the user named as the model to run.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(&path))?;
        Ok(Shard { path, index, data: Data::Mapped { map, file } })
    }

    /// Bytes that are part of the program, under a name for errors.
    pub(super) fn embedded(path: PathBuf, bytes: &'static [u8]) -> Shard {
        Shard { path, index: 0, data: Data::Static(bytes) }
    }

    /// Bytes in the place of those of the file.
    pub(super) fn owned(&self, bytes: Vec<u8>) -> Shard {
        Shard { path: self.path.clone(), index: self.index, data: Data::Owned(bytes) }
    }

    pub(in crate::files) fn bytes(&self) -> &[u8] {
        match &self.data {
            Data::Mapped { map, .. } => map,
            Data::Static(bytes) => bytes,
            Data::Owned(bytes) => bytes,
        }
    }

    pub(in crate::files) fn path(&self) -> &Path {
        &self.path
    }

    #[cfg(unix)]
    pub(super) fn read(&self, at: usize, buf: &mut [u8]) -> Result<()> {
        use std::{io, os::unix::fs::FileExt};
        let file = match &self.data {
            Data::Mapped { file, .. } => file,
            Data::Static(_) | Data::Owned(_) => {
                buf.copy_from_slice(&self.bytes()[at..at + buf.len()]);
                return Ok(());
            }
        };
        let end = at + buf.len();
        let mut from = at;
        while from < end {
            match file.read_at(&mut buf[from - at..], from as u64) {
                Ok(0) => {
                    // not `from`: this part may begin beyond the end
                    let len = file.metadata().map_err(Error::io(&self.path))?.len();
                    let what =
                        format!("ends at byte {len}, data was expected up to {end}: cut short since it was opened");
                    return Err(Error::file(&self.path, what));
                }
                Ok(n) => from += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    let e = io::Error::new(e.kind(), format!("reading at byte {from}: {e}"));
                    return Err(Error::io(&self.path)(e));
                }
            }
        }
        Ok(())
    }
}
