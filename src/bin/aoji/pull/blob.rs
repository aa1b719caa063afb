//! Files of the cache: downloads them, continues interrupted downloads, checks them.

use super::{
    download, io_error,
    server::{Failure, Remote, Server, interrupted},
};
use aoji::{Error, Result};
use indicatif::ProgressBar;
use sha2::{Digest, Sha256};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    path::Path,
};
use ureq::http::header;

impl Server<'_> {
    /// Downloads a file to `blob`, unless it is there already.
    pub(super) fn fetch(&self, remote: &Remote, blob: &Path, bar: &ProgressBar) -> Result<()> {
        if blob.exists() {
            bar.inc(remote.size.unwrap_or(0));
            return Ok(());
        }
        let path = blob.with_file_name(format!("{}.incomplete", remote.etag));
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(io_error(&path))?;
        if file.try_lock().is_err() {
            let what = "another process is downloading this file; wait for it to end".into();
            return Err(Error::File { path, what });
        }
        let mut partial = Partial { file, hash: Sha256::new(), len: 0 };
        partial.take_over(remote.size, bar).map_err(io_error(&path))?;

        let (mut attempt, mut last_len) = (0, partial.len);
        while let Err(failure) = self.continue_download(remote, &mut partial, &path, bar) {
            attempt = if partial.len > last_len { 1 } else { attempt + 1 };
            last_len = partial.len;
            self.pause(failure, attempt)?;
        }

        let found: String = partial.hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        if let Some(expected) = remote.sha256.as_ref().filter(|expected| **expected != found) {
            fs::remove_file(&path).map_err(io_error(&path))?;
            let what = format!("sha256 is {found}, expected {expected}: damaged on the way; download it again");
            return Err(download(&remote.url, what));
        }
        partial.file.sync_all().map_err(io_error(&path))?; // the final name promises that the file is whole
        fs::rename(&path, blob).map_err(io_error(blob))
    }

    /// One attempt to get the rest of a file.
    fn continue_download(
        &self,
        remote: &Remote,
        partial: &mut Partial,
        path: &Path,
        bar: &ProgressBar,
    ) -> Result<(), Failure> {
        if Some(partial.len) == remote.size {
            return Ok(());
        }
        let mut response = self.request(&remote.url, false, partial.len)?;
        let resumed = format!("bytes {}-", partial.len);
        match response.status().as_u16() {
            206 if response
                .headers()
                .get(header::CONTENT_RANGE)
                .is_some_and(|r| r.to_str().is_ok_and(|r| r.starts_with(&resumed))) => {}
            // The server sent the whole file: it does not support ranges, or its file is not the one that we began
            // with.
            200 | 206 | 416 if partial.len > 0 => {
                bar.set_position(bar.position().saturating_sub(partial.len));
                partial.restart().map_err(io_error(path))?;
                if response.status() != 200 {
                    return Err(interrupted(&remote.url, "the server would not continue where the download stopped"));
                }
            }
            200 => {}
            _ => return Err(self.refusal(&remote.url, &response)),
        }

        let mut reader = response.body_mut().as_reader();
        let mut buffer = vec![0; 1 << 20];
        loop {
            let n = match reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) => return Err(interrupted(&remote.url, &e.to_string())),
            };
            partial.append(&buffer[..n]).map_err(io_error(path))?;
            bar.inc(n as u64);
        }
        match remote.size {
            Some(size) if size != partial.len => {
                let what = format!("it ended after {} of {size} bytes", partial.len);
                Err(interrupted(&remote.url, &what))
            }
            _ => Ok(()),
        }
    }
}

/// A file of which the first `len` bytes have arrived.
struct Partial {
    file: File,
    hash: Sha256,
    len: u64,
}

impl Partial {
    /// Continues with what an earlier run has left, unless it is longer than the file can be.
    fn take_over(&mut self, size: Option<u64>, bar: &ProgressBar) -> io::Result<()> {
        if self.file.metadata()?.len() > size.unwrap_or(0) {
            return self.restart();
        }
        let mut buffer = vec![0; 1 << 20];
        loop {
            match self.file.read(&mut buffer)? {
                0 => break,
                n => {
                    self.hash.update(&buffer[..n]);
                    self.len += n as u64;
                }
            }
        }
        bar.inc(self.len);
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.hash.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.hash.reset();
        self.len = 0;
        Ok(())
    }
}
