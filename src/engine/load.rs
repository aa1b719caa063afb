//! An engine: a model, loaded and ready. Immutable, cheap to clone, shared by sessions and threads.

use crate::{
    backend::{Backend, cpu::Cpu},
    engine::{
        batch::BatchOptions,
        timeline::{AnyLoaded, AnyTimeline, Loaded},
    },
    error::{Error, Result},
    files::{ModelFiles, Source, Startup, config::Config, join},
    model::{Kept, Model, plan::Plan},
    text::{Template, Tokenizer},
};
use half::bf16;
use std::{num::NonZeroUsize, str::FromStr, sync::Arc, thread};

/// Where the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// The first GPU where there is one, else the CPU.
    #[default]
    Auto,
    /// The processor.
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
    /// Threads that compute on the CPU, of this engine alone; when absent one a physical core, which all such engines of the process
    /// share. The results are the same.
    pub threads: Option<NonZeroUsize>,
    /// Quantized weights become bf16 on a GPU too: as much memory and time as without quantization. Without it they stay what
    /// they are where kernels take them; the values are the same, sums are rounded elsewhere.
    pub widen: bool,
}

impl Default for Options {
    fn default() -> Self {
        let (device, activations) = (Device::default(), Activations::default());
        Options { device, activations, context: None, sequences: 1, threads: None, widen: false }
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
    kept: Kept,
    startup: Startup,
}

/// A device that was opened.
enum Opened {
    Cpu(Activations),
    #[cfg(feature = "cuda")]
    Cuda(Box<crate::backend::cuda::Cuda>),
}

impl Opened {
    fn open(options: &Options, startup: &Startup) -> Result<Opened> {
        let cpu = Ok(Opened::Cpu(options.activations));
        #[cfg(feature = "cuda")]
        let cuda = |n| crate::backend::cuda::Cuda::begin(n, startup.clone()).map(|cuda| Opened::Cuda(Box::new(cuda)));
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
                Engine::load_on(Cpu::<bf16>::open(options.threads)?, files, tokenizer, options, startup, progress)
            }
            Opened::Cpu(Activations::F32) => {
                Engine::load_on(Cpu::<f32>::open(options.threads)?, files, tokenizer, options, startup, progress)
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
        let kept = Kept::of::<B>(&config, &weights, options.widen);
        let plan =
            Plan::choose::<B>(&config, kept.bytes(&config), options.context, options.sequences, b.free_memory()?)?;
        tracing::info!("{}: {plan}", b.name());
        // a batch's parts of a prompt are smaller than the chunks of a session's
        let most = if options.sequences == 1 { B::CHUNK } else { *BatchOptions::CHUNK.end() };
        b.expect_rows(&config, plan.context.min(most))?;
        let (mut done, total) = (0, weights.bytes());
        let mut add = |bytes| {
            done += bytes;
            progress(done, total);
        };
        let load = || Model::load(&b, &config, &weights, &lora, plan.context, options.widen, &mut add);
        if plan.context > config.rope_fixed_until() {
            let trained = config.rope_fixed_until();
            tracing::info!(
                "beyond {trained} tokens rotary frequencies change with the length; earlier keys stay as they were"
            );
        }
        let model = startup.time("weights", total, load)?;
        let tokenizer = tokenizer(&mut config)?;
        b.synchronize()?;
        let (device, is_gpu) = (b.name(), B::IS_GPU);
        let (loaded, startup) = (Arc::new(Loaded { b, model }), startup.clone());
        Ok(Engine(Arc::new(Inner { config, tokenizer, template, loaded, device, is_gpu, plan, kept, startup })))
    }

    /// So many empty sequences with room for `max_tokens` tokens each.
    pub(crate) fn timeline(&self, sequences: usize, max_tokens: usize) -> Result<Box<dyn AnyTimeline>> {
        if max_tokens == 0 || max_tokens > self.max_context() {
            return Err(Error::Context { needed: max_tokens, max: self.max_context() });
        }
        self.0.loaded.clone().timeline(sequences, max_tokens)
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

    /// What its quantized weights change, where they stay so.
    pub fn kept(&self) -> Kept {
        self.0.kept
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
    pub fn cuda(&self) -> Option<&crate::backend::cuda::Cuda> {
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
