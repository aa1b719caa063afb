//! Finds, reads and checks the files of a model, before any device is touched.

use super::{
    config::Config,
    gguf::Gguf,
    hub, json,
    lora::{Lora, LoraSpec},
    model_files,
    startup::Startup,
    token_ids,
    weights::Weights,
};
use crate::{
    error::{Error, Result},
    text::{Template, Tokenizer},
};
use std::{
    fs,
    panic::resume_unwind,
    path::{Path, PathBuf},
    thread::{self, ScopedJoinHandle},
};

/// The embedded demo model.
mod demo {
    pub const CONFIG: &str = include_str!("../../assets/demo/config.json");
    pub const GENERATION: &str = include_str!("../../assets/demo/generation_config.json");
    pub const TOKENIZER: &[u8] = include_bytes!("../../assets/demo/tokenizer.json");
    pub const WEIGHTS: &[u8] = include_bytes!("../../assets/demo/model.safetensors");
}

/// The files of a model, read and checked but not yet on a device.
pub struct ModelFiles {
    /// Its directory, or its GGUF file; `None` for the embedded model.
    pub dir: Option<PathBuf>,
    /// Sizes.
    pub config: Config,
    /// Mapped weights.
    pub weights: Weights,
    /// Absent when the directory has none: token ids can still be used.
    pub tokenizer: Option<Tokenizer>,
    /// How a conversation becomes a prompt for this model.
    pub template: Template,
    /// Adapters that are added to the weights on their way to the device.
    pub lora: Vec<Lora>,
}

impl ModelFiles {
    /// Finds and checks a model: a directory in Hugging Face layout, a GGUF file or a directory with one, the name of a
    /// repository with either in the local Hugging Face cache, or `demo` for the embedded one.
    pub fn open(model: &str) -> Result<ModelFiles> {
        let startup = Startup::begin();
        let source = Source::find(model, &startup)?;
        thread::scope(|scope| {
            let tokenizer = scope.spawn(|| source.tokenizer(&startup));
            let files = source.files(&startup)?;
            let mut config = files.config;
            let tokenizer = source.settled(&mut config, join(tokenizer)?)?;
            Ok(ModelFiles { config, tokenizer, ..files })
        })
    }

    /// Adds an adapter, after checking that it fits the model. Several add up.
    ///
    /// # Errors
    /// Those of [`Lora::open`]; [`Error::Unsupported`] for a model whose files are quantized.
    pub fn add_lora(&mut self, spec: &LoraSpec) -> Result<()> {
        if let Some(t) = self.weights.tensors().find(|t| t.format().is_quantized()) {
            let what = format!(
                "{} is {}; an adapter can only be added to weights of bf16, f16 or f32: the sum of a quantized matrix and an adapter \
                 is not a matrix of that format. Use the model that this one was made from",
                t.name(),
                t.format()
            );
            return Err(Error::Unsupported { path: t.file().into(), what });
        }
        self.lora.push(Lora::open(spec, &self.config)?);
        Ok(())
    }
}

/// A model that was found. Its configuration has been read; its other files are read by two methods, each of which may
/// run in a thread of its own.
pub(crate) struct Source {
    place: Place,
    config: Config,
}

/// Where a model's files are.
enum Place {
    Embedded,
    Dir(PathBuf),
    /// The file, opened once: configuration, weights and tokenizer all come from it.
    Gguf(Gguf),
}

impl Place {
    fn path(&self) -> Option<&Path> {
        match self {
            Place::Embedded => None,
            Place::Dir(dir) => Some(dir),
            Place::Gguf(gguf) => Some(gguf.path()),
        }
    }
}

impl Source {
    pub fn find(model: &str, startup: &Startup) -> Result<Source> {
        startup.time("config", 0, || {
            if model == "demo" {
                let path = Path::new("(embedded)/config.json");
                let config = Config::from_json(path, demo::CONFIG, Some(demo::GENERATION))?;
                return Ok(Source { place: Place::Embedded, config });
            }
            let dir = hub::resolve(model)?;
            if dir.is_file() {
                let gguf = Gguf::open(&dir)?;
                return Ok(Source { config: gguf.config()?, place: Place::Gguf(gguf) });
            }
            // Most of these files may be absent, but a link that leads nowhere is an error.
            model_files::SMALL.iter().try_for_each(|file| json::exists(&dir.join(file)).map(drop))?;
            Ok(Source { config: Config::from_dir(&dir)?, place: Place::Dir(dir) })
        })
    }

    /// Everything but the tokenizer.
    pub fn files(&self, startup: &Startup) -> Result<ModelFiles> {
        let (dir, config) = (self.place.path().map(PathBuf::from), self.config.clone());
        startup.time("files", 0, || {
            let (weights, template) = match &self.place {
                Place::Embedded => (Weights::embedded(demo::WEIGHTS, &config)?, Template::Aog),
                Place::Dir(dir) => (Weights::open(dir, &config)?, Template::for_model(Some(dir))?),
                Place::Gguf(gguf) => (gguf.weights(&config)?, Template::of_gguf(gguf)?),
            };
            Ok(ModelFiles { dir, config, weights, tokenizer: None, template, lora: Vec::new() })
        })
    }

    /// The tokenizer. Of the small files it takes the longest to read: Llama 3's is 9 MB of JSON.
    pub fn tokenizer(&self, startup: &Startup) -> Result<Option<Tokenizer>> {
        let path = match &self.place {
            Place::Embedded => PathBuf::from("(embedded)/tokenizer.json"),
            Place::Dir(dir) => dir.join("tokenizer.json"),
            Place::Gguf(gguf) => gguf.path().into(),
        };
        let bytes = match &self.place {
            Place::Embedded => demo::TOKENIZER.len() as u64,
            Place::Dir(_) => fs::metadata(&path).map_or(0, |m| m.len()),
            Place::Gguf(gguf) => gguf.header_bytes(),
        };
        startup.time("tokenizer", bytes, || {
            let tokenizer = match &self.place {
                Place::Embedded => Some(Tokenizer::from_bytes(&path, demo::TOKENIZER)?),
                Place::Dir(dir) => Tokenizer::from_dir(dir)?,
                Place::Gguf(gguf) => Tokenizer::of_gguf(gguf)?,
            };
            if let Some(tokenizer) = &tokenizer {
                warn_beyond(&path, tokenizer, self.config.vocab);
            }
            Ok(tokenizer)
        })
    }

    /// Gives the tokenizer back after setting the ids that begin and end a text, by the tokens that it knows. Only
    /// directories need this: the files of the demo model agree, and GGUF is a single file.
    pub fn settled(&self, config: &mut Config, tokenizer: Option<Tokenizer>) -> Result<Option<Tokenizer>> {
        if let (Place::Dir(dir), Some(tokenizer)) = (&self.place, &tokenizer) {
            token_ids::settle(config, dir, tokenizer)?;
        }
        Ok(tokenizer)
    }
}

/// Warns of tokens for which the model has no row in its embedding. A prompt that uses one is refused, and all others
/// are answered: such files are common. The published Llama 2 has a padding token that its model does not know.
fn warn_beyond(path: &Path, tokenizer: &Tokenizer, vocab: usize) {
    let beyond = vocab..tokenizer.vocab();
    if beyond.is_empty() {
        return;
    }
    let named: Vec<String> = beyond.clone().take(5).filter_map(|id| tokenizer.token(id as u32)).collect();
    tracing::warn!(
        "{}: {} tokens have ids from vocab_size {vocab} on ({}): a prompt with one of them is refused",
        path.display(),
        beyond.len(),
        named.join(", ")
    );
}

pub(crate) fn join<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| resume_unwind(panic))
}
