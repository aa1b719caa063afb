//! Sessions that are saved and restored: a long prompt is paid for once.

use super::Session;
use crate::{
    error::{Error, Result},
    files::session_file::{self, Origin, SessionFile},
};
use std::path::Path;

impl Session {
    /// Writes the tokens of the timeline that are computed, their keys and values, and a note of the caller's. A session that
    /// [loads](Session::load) the file goes on with the same bits. What is at `path` stays until the new file is whole.
    ///
    /// The file takes as many bytes as the plan's KV cache for so many tokens: 128 KiB for each of Llama-3-8B.
    ///
    /// ```
    /// # use aoji::{Device, Engine, Options};
    /// # let engine = Engine::open("demo", &Options { device: Device::Cpu, ..Options::default() })?;
    /// # let dir = tempfile::tempdir().unwrap();
    /// let path = dir.path().join("begun.session");
    /// let mut session = engine.session(100)?;
    /// session.sync(&[2046, 70, 71])?;
    /// session.save(&path, "three tokens")?;
    ///
    /// let mut other = engine.session(100)?;
    /// assert_eq!(other.load(&path)?, "three tokens");
    /// assert_eq!(other.sync(&[2046, 70, 71, 72])?, 3); // only the last one is computed
    /// # Ok::<(), aoji::Error>(())
    /// ```
    ///
    /// # Errors
    /// `Input` when nothing is computed; those of writing.
    pub fn save(&mut self, path: &Path, note: &str) -> Result<()> {
        if self.computed == 0 {
            return Err(Error::Input("nothing is computed yet: there is no session to save".into()));
        }
        let (origin, config, n) = (self.origin(), self.engine.config(), self.computed);
        let (timeline, tokens) = (&mut self.timeline, &self.tokens[..n]);
        let kind = (self.engine.plan().kv_dtype, timeline.act_bytes());
        session_file::write(path, origin, note, config, tokens, kind, |to| timeline.save(n, to))
    }

    /// Makes the timeline that of a file of [`Session::save`], and gives the note in it.
    ///
    /// # Errors
    /// `File` or `Tensor` when the file is none, is cut short, or is of another model, device or version of aoji; `Context` when it has
    /// more tokens than fit. The session is then unchanged.
    pub fn load(&mut self, path: &Path) -> Result<String> {
        let kind = (self.engine.plan().kv_dtype, self.timeline.act_bytes());
        let file = SessionFile::open(path, &self.origin(), self.engine.config(), kind)?;
        let n = file.tokens.len();
        if n > self.max_tokens {
            return Err(Error::Context { needed: n, max: self.max_tokens });
        }
        self.tokens.clear(); // until all is there
        (self.computed, self.has_logits) = (0, false);
        self.timeline.load(n, file.cache())?;
        self.tokens.extend(&file.tokens);
        self.computed = n;
        Ok(file.note)
    }

    fn origin(&self) -> Origin {
        let engine = self.engine();
        let device = if engine.is_gpu() { engine.device().into() } else { "CPU".into() };
        Origin::new(engine.fingerprint(), device, engine.plan().kv_dtype)
    }
}
