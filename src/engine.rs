//! An engine: a model, loaded and ready. Immutable, cheap to clone, shared by sessions and threads.

use crate::{
    backend::Backend,
    config::Config,
    cpu::Cpu,
    error::{Error, Result},
    hub,
    lora::{Lora, LoraSpec},
    model::Model,
    plan::Plan,
    score::Scores,
    session::Session,
    startup::Startup,
    text::{Template, Tokenizer},
    timeline::{AnyLoaded, AnyTimeline, Loaded},
    token_ids,
    weights::Weights,
};
use half::bf16;
use std::{
    fs,
    panic::resume_unwind,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
    thread::{self, ScopedJoinHandle},
};

/// Where the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// The first GPU where there is one, else the CPU.
    #[default]
    Auto,
    /// The reference.
    Cpu,
    /// GPU of this number.
    Cuda(usize),
}

impl FromStr for Device {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s.split_once(':').unwrap_or((s, "0")) {
            ("auto", "0") => Ok(Device::Auto),
            ("cpu", "0") => Ok(Device::Cpu),
            ("cuda", n) => n.parse().map(Device::Cuda).map_err(|_| format!("{n:?} is not the number of a GPU")),
            _ => Err(format!("{s:?}: expected auto, cpu, cuda or cuda:N")),
        }
    }
}

/// Type of activations on the CPU. A GPU always computes with bf16 activations and f32 sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activations {
    /// As on a GPU.
    #[default]
    Bf16,
    /// As Hugging Face's float32.
    F32,
}

impl FromStr for Activations {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "bf16" => Ok(Activations::Bf16),
            "f32" => Ok(Activations::F32),
            _ => Err(format!("{s:?}: expected bf16 or f32")),
        }
    }
}

/// How to open a model.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where it runs.
    pub device: Device,
    /// Type of activations, on the CPU.
    pub activations: Activations,
    /// Most tokens of a sequence; the model's own maximum when absent, or as much of it as fits the GPU.
    pub context: Option<usize>,
    /// Sequences for which the GPU must have room: 1 for a session, those of a [batch](crate::Batch).
    pub sequences: usize,
}

impl Default for Options {
    fn default() -> Self {
        let (device, activations) = (Device::default(), Activations::default());
        Options { device, activations, context: None, sequences: 1 }
    }
}

/// A loaded model. Clones share it.
#[derive(Clone)]
pub struct Engine(Arc<Inner>);

struct Inner {
    config: Config,
    tokenizer: Option<Tokenizer>,
    template: Template,
    loaded: Arc<dyn AnyLoaded>,
    device: String,
    is_gpu: bool,
    plan: Plan,
    startup: Startup,
}

/// The embedded demo model.
mod demo {
    pub const CONFIG: &str = include_str!("../assets/demo/config.json");
    pub const GENERATION: &str = include_str!("../assets/demo/generation_config.json");
    pub const TOKENIZER: &[u8] = include_bytes!("../assets/demo/tokenizer.json");
    pub const WEIGHTS: &[u8] = include_bytes!("../assets/demo/model.safetensors");
}

/// The files of a model, read and checked but not yet on a device.
pub struct ModelFiles {
    /// Its directory; `None` for the embedded model.
    pub dir: Option<PathBuf>,
    /// Sizes.
    pub config: Config,
    /// Mapped weights.
    pub weights: Weights,
    /// Absent when the directory has none: token ids can still be used.
    pub tokenizer: Option<Tokenizer>,
    /// How it is spoken to.
    pub template: Template,
    /// Adapters that are added to the weights on their way to the device.
    pub lora: Vec<Lora>,
}

impl ModelFiles {
    /// Finds and checks a model: a directory in Hugging Face layout, the name of a repository in the local Hugging Face cache,
    /// or `demo` for the embedded one.
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
    pub fn add_lora(&mut self, spec: &LoraSpec) -> Result<()> {
        self.lora.push(Lora::open(spec, &self.config)?);
        Ok(())
    }
}

/// A model that was found: what of its files is read first, and how the others are read, each in a thread of its own.
struct Source {
    /// `None` for the embedded model.
    dir: Option<PathBuf>,
    config: Config,
}

impl Source {
    fn find(model: &str, startup: &Startup) -> Result<Source> {
        startup.time("config", 0, || {
            if model == "demo" {
                let path = Path::new("(embedded)/config.json");
                let config = Config::from_json(path, demo::CONFIG, Some(demo::GENERATION))?;
                return Ok(Source { dir: None, config });
            }
            let dir = hub::resolve(model)?;
            Ok(Source { config: Config::from_dir(&dir)?, dir: Some(dir) })
        })
    }

    /// All but the tokenizer.
    fn files(&self, startup: &Startup) -> Result<ModelFiles> {
        let (dir, config) = (self.dir.clone(), self.config.clone());
        startup.time("files", 0, || {
            let (weights, template) = match &dir {
                None => (Weights::embedded(demo::WEIGHTS, &config)?, Template::Aog),
                Some(dir) => (Weights::open(dir, &config)?, Template::for_model(Some(dir))?),
            };
            Ok(ModelFiles { dir, config, weights, tokenizer: None, template, lora: Vec::new() })
        })
    }

    /// The longest of them to read: Llama 3's is 9 MB of JSON.
    fn tokenizer(&self, startup: &Startup) -> Result<Option<Tokenizer>> {
        let path = self.dir.as_ref().map(|dir| dir.join("tokenizer.json"));
        let bytes = path.as_ref().and_then(|path| fs::metadata(path).ok());
        let bytes = bytes.map_or(demo::TOKENIZER.len() as u64, |m| m.len());
        startup.time("tokenizer", bytes, || {
            let (Some(dir), Some(path)) = (&self.dir, path) else {
                return Tokenizer::from_bytes("(embedded)/tokenizer.json", demo::TOKENIZER).map(Some);
            };
            let tokenizer = Tokenizer::from_dir(dir)?;
            match tokenizer.as_ref().map(Tokenizer::vocab).filter(|n| *n > self.config.vocab) {
                None => Ok(tokenizer),
                Some(n) => {
                    let what = format!("has {n} tokens, config.json says vocab_size {}", self.config.vocab);
                    Err(Error::file(path, what))
                }
            }
        })
    }

    /// The tokenizer again, after the ids that begin and end a text are set as it knows them. Our own files agree.
    fn settled(&self, config: &mut Config, tokenizer: Option<Tokenizer>) -> Result<Option<Tokenizer>> {
        if let (Some(dir), Some(tokenizer)) = (&self.dir, &tokenizer) {
            token_ids::settle(config, dir, tokenizer)?;
        }
        Ok(tokenizer)
    }
}

fn join<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| resume_unwind(panic))
}

/// A device that was opened.
enum Opened {
    Cpu(Activations),
    #[cfg(feature = "cuda")]
    Cuda(Box<crate::cuda::Cuda>),
}

impl Opened {
    fn open(options: &Options, startup: &Startup) -> Result<Opened> {
        let cpu = Ok(Opened::Cpu(options.activations));
        #[cfg(feature = "cuda")]
        let cuda = |n| crate::cuda::Cuda::begin(n, startup.clone()).map(|cuda| Opened::Cuda(Box::new(cuda)));
        #[cfg(not(feature = "cuda"))]
        let cuda = |_: usize| {
            let _ = startup;
            Err(Error::NoGpu("this binary was built without the feature `cuda`".into()))
        };
        match options.device {
            Device::Cpu => cpu,
            Device::Cuda(n) => cuda(n),
            Device::Auto => match cuda(0) {
                Err(Error::NoGpu(why)) => {
                    tracing::info!("running on the CPU: {why}");
                    cpu
                }
                opened => opened,
            },
        }
    }
}

impl Engine {
    /// Opens a model; see [`ModelFiles::open`] for its name.
    ///
    /// ```
    /// use aoji::{Device, Engine, Error, Options};
    ///
    /// let options = Options { device: Device::Cpu, context: Some(512), ..Options::default() };
    /// let engine = Engine::open("demo", &options)?;
    /// assert_eq!((engine.max_context(), engine.is_gpu()), (512, false));
    /// assert!(matches!(Engine::open("no/such-model", &options), Err(Error::NoModel { .. })));
    /// # Ok::<(), Error>(())
    /// ```
    pub fn open(model: &str, options: &Options) -> Result<Engine> {
        Engine::open_with(model, options, &mut |_, _| {})
    }

    /// As [`Engine::open`]; `progress` gets the bytes of the weights that are on the device, and all.
    ///
    /// The device is opened and its kernels are loaded, the tokenizer is read, and weights go to the device, all at the
    /// same time; [`Engine::startup`] says when.
    pub fn open_with(model: &str, options: &Options, progress: &mut dyn FnMut(u64, u64)) -> Result<Engine> {
        let startup = Startup::begin();
        let source = Source::find(model, &startup)?; // first: who mistyped a name hears it at once
        thread::scope(|scope| {
            let device = scope.spawn(|| Opened::open(options, &startup));
            let tokenizer = scope.spawn(|| source.tokenizer(&startup));
            let files = source.files(&startup)?;
            let tokenizer = |config: &mut Config| source.settled(config, join(tokenizer)?);
            Engine::load_opened(join(device)?, files, tokenizer, options, &startup, progress)
        })
    }

    /// Brings a model to its device; `progress` is that of [`Engine::open_with`].
    pub fn load(mut files: ModelFiles, options: &Options, progress: &mut dyn FnMut(u64, u64)) -> Result<Engine> {
        let startup = Startup::begin();
        let tokenizer = files.tokenizer.take();
        Engine::load_opened(Opened::open(options, &startup)?, files, |_| Ok(tokenizer), options, &startup, progress)
    }

    fn load_opened(
        device: Opened,
        files: ModelFiles,
        tokenizer: impl FnOnce(&mut Config) -> Result<Option<Tokenizer>>,
        options: &Options,
        startup: &Startup,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Engine> {
        match device {
            Opened::Cpu(Activations::Bf16) => {
                Engine::load_on(Cpu::<bf16>::new(), files, tokenizer, options, startup, progress)
            }
            Opened::Cpu(Activations::F32) => {
                Engine::load_on(Cpu::<f32>::new(), files, tokenizer, options, startup, progress)
            }
            #[cfg(feature = "cuda")]
            Opened::Cuda(cuda) => Engine::load_on(*cuda, files, tokenizer, options, startup, progress),
        }
    }

    /// Brings a model to a backend of whatever kind. `tokenizer` gives the tokenizer, for which it may have to wait, and sets
    /// what of the configuration depends on it; the one in `files` is not looked at.
    pub(crate) fn load_on<B: Backend>(
        b: B,
        files: ModelFiles,
        tokenizer: impl FnOnce(&mut Config) -> Result<Option<Tokenizer>>,
        options: &Options,
        startup: &Startup,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Engine> {
        let ModelFiles { mut config, weights, template, lora, .. } = files;
        b.supports(&config)?;
        let plan = Plan::choose::<B>(&config, config.weight_bytes(), options, b.free_memory()?)?;
        tracing::info!("{}: {plan}", b.name());
        let (mut done, total) = (0, weights.bytes());
        let mut add = |bytes| {
            done += bytes;
            progress(done, total);
        };
        let load = || Model::load(&b, &config, &weights, &lora, plan.context, &mut add);
        let model = startup.time("weights", total, load)?;
        let tokenizer = tokenizer(&mut config)?;
        b.synchronize()?;
        let (device, is_gpu) = (b.name(), B::IS_GPU);
        let (loaded, startup) = (Arc::new(Loaded { b, model }), startup.clone());
        Ok(Engine(Arc::new(Inner { config, tokenizer, template, loaded, device, is_gpu, plan, startup })))
    }

    /// An empty session with room for `max_tokens` tokens, at most [`Engine::max_context`].
    pub fn session(&self, max_tokens: usize) -> Result<Session> {
        self.session_with_branches(max_tokens, 1)
    }

    /// A session that scores up to `branches` continuations of a prefix in one pass over the weights; see [`Session::score`].
    /// It takes the memory of as many sequences.
    pub fn session_with_branches(&self, max_tokens: usize, branches: usize) -> Result<Session> {
        let branches = branches.max(1);
        Ok(Session::new(self.clone(), self.timeline(branches, max_tokens)?, max_tokens, branches))
    }

    /// So many empty sequences with room for `max_tokens` tokens each.
    pub(crate) fn timeline(&self, sequences: usize, max_tokens: usize) -> Result<Box<dyn AnyTimeline>> {
        if max_tokens == 0 || max_tokens > self.max_context() {
            return Err(Error::Context { needed: max_tokens, max: self.max_context() });
        }
        self.0.loaded.clone().timeline(sequences, max_tokens)
    }

    /// [`Session::score`] in a session of its own.
    ///
    /// ```
    /// # use aoji::{Device, Engine, Options};
    /// # let engine = Engine::open("demo", &Options { device: Device::Cpu, ..Options::default() })?;
    /// let scores = engine.score(&[2046, 70], &[[71, 72], [71, 73]])?;
    /// assert!(scores.continuations.iter().all(|c| c.sum() < 0.0));
    /// assert_eq!(scores.computed, 3); // the prefix and token 71, once
    /// # Ok::<(), aoji::Error>(())
    /// ```
    pub fn score<T: AsRef<[u32]>>(&self, prefix: &[u32], continuations: &[T]) -> Result<Scores> {
        let longest = continuations.iter().map(|c| c.as_ref().len()).max().unwrap_or(0);
        self.session((prefix.len() + longest.saturating_sub(1)).max(1))?.score(prefix, continuations)
    }

    /// Sizes of the model.
    pub fn config(&self) -> &Config {
        &self.0.config
    }

    /// Tokens that a session can have.
    pub fn max_context(&self) -> usize {
        self.0.plan.context
    }

    /// Memory that the model and one session take.
    pub fn plan(&self) -> &Plan {
        &self.0.plan
    }

    /// Name of the device, for people.
    pub fn device(&self) -> &str {
        &self.0.device
    }

    /// It runs on a GPU.
    pub fn is_gpu(&self) -> bool {
        self.0.is_gpu
    }

    /// The GPU that it runs on, if it does.
    #[cfg(feature = "cuda")]
    pub fn cuda(&self) -> Option<&crate::cuda::Cuda> {
        self.0.loaded.backend().downcast_ref()
    }

    /// The model's tokenizer.
    ///
    /// # Errors
    /// When its directory has no `tokenizer.json`.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        let none = || Error::Input("the model has no tokenizer.json: give token ids with --tokens".into());
        self.0.tokenizer.as_ref().ok_or_else(none)
    }

    /// The start of this engine, to which a program can add its own phases.
    pub fn startup(&self) -> &Startup {
        &self.0.startup
    }

    /// How the model is spoken to.
    pub fn template(&self) -> &Template {
        &self.0.template
    }
}
