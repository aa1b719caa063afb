//! An engine is a model, loaded and ready: immutable, cheap to clone, shared by sessions and threads.

use crate::{
    backend::{Backend, DECODE_ROWS, cpu::Cpu},
    engine::{
        batch::BatchOptions,
        speculate,
        timeline::{AnyLoaded, AnyTimeline, Loaded},
    },
    error::{Error, Result},
    files::{ModelFiles, Source, Startup, config::Config, quantize, session_file, threads, weights::Weights},
    model::{
        Changes, Kept, Model,
        plan::{Plan, Wanted},
    },
    ops::KvDtype,
    text::{Template, Tokenizer},
};
use half::bf16;
use std::{
    fmt,
    num::NonZeroUsize,
    str::FromStr,
    sync::{Arc, OnceLock},
    thread,
};

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
    /// bf16, as on a GPU.
    #[default]
    Bf16,
    /// f32, as in Hugging Face's float32.
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
    /// Most tokens of a sequence. When absent: the model's own maximum, or as much of it as fits the memory. On a
    /// CPU more than that can be asked for: the cache takes memory only as it is used.
    pub context: Option<usize>,
    /// How many sequences there must be room for: 1 for a session, or those of a [batch](crate::Batch), up to 64.
    pub sequences: usize,
    /// Tokens whose keys and values it must have room for, of all sequences together. When absent: a whole context for each sequence, but
    /// for no more than 16, or as much of that as fits the memory.
    pub cache_tokens: Option<usize>,
    /// How keys and values are stored. [`KvDtype::Fp8`] takes half the memory of bf16 and loses some precision.
    pub kv: KvDtype,
    /// Threads that compute on the CPU, used by this engine alone. When absent there is one for each physical core,
    /// shared by all such engines of the process. The results are the same.
    pub threads: Option<NonZeroUsize>,
    /// Whether quantized weights become bf16 (with f32 activations f32) when they are loaded, which takes as much memory
    /// and time as a model that is not quantized. Otherwise they stay quantized where products support it; the weights'
    /// values are the same, but sums are rounded at other points.
    pub widen: bool,
    /// The format in which weights are quantized while they are loaded, with the same result as
    /// [`quantize`](crate::quantize) writes. Absent: they stay as they are.
    pub quantize: Option<quantize::Options>,
    /// A smaller model with the same vocabulary, already opened on the same device: it guesses the next tokens for
    /// [`Speculate::Model`](crate::Speculate::Model). On a GPU, memory for its sequences is left free.
    pub draft: Option<Engine>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            device: Device::default(),
            activations: Activations::default(),
            context: None,
            sequences: 1,
            cache_tokens: None,
            kv: KvDtype::default(),
            threads: None,
            widen: false,
            quantize: None,
            draft: None,
        }
    }
}

impl Options {
    /// Opens a smaller model as [`Options::draft`] of `model`: on the same device, with as much context as both have, as its
    /// files have it.
    ///
    /// # Errors
    /// Those of [`Engine::open`], for the smaller one.
    pub fn with_draft(self, draft: &str, model: &str) -> Result<Options> {
        let (files, most) = (ModelFiles::open(draft)?, ModelFiles::open(model)?.config.max_seq);
        let context = Some(self.context.unwrap_or(most).min(files.config.max_seq));
        // as many as a batch asks guesses for; each has a whole context
        let sequences = self.sequences.min(DECODE_ROWS);
        let options = Options { context, sequences, cache_tokens: None, quantize: None, ..self.clone() };
        let draft = Engine::load(files, &options, &mut |_, _| {})?;
        Ok(Options { draft: Some(draft), ..self })
    }
}

/// A loaded model. Clones share it.
#[derive(Clone)]
pub struct Engine(Arc<Inner>);

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a model of {} layers on {}", self.config().n_layers, self.device())
    }
}

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
    draft: Option<Engine>,
    /// Of which model its sessions are; see [`Engine::fingerprint`].
    source: ModelSource,
}

/// What tells a model apart, until somebody asks.
struct ModelSource {
    weights: Weights,
    widened: bool,
    lora: u64,
    fingerprint: OnceLock<String>,
}

/// A device that was opened.
pub(crate) enum Opened {
    Cpu(Activations),
    #[cfg(feature = "cuda")]
    Cuda(Box<crate::backend::cuda::Cuda>),
}

impl Opened {
    pub(crate) fn open(options: &Options, startup: &Startup) -> Result<Opened> {
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

    /// As [`Engine::open`]; `progress` gets the bytes of weights that are on the device, and their total.
    ///
    /// Opening the device and loading its kernels, reading the tokenizer, and sending weights to the device happen at
    /// the same time; [`Engine::startup`] says when each did.
    pub fn open_with(model: &str, options: &Options, progress: &mut dyn FnMut(u64, u64)) -> Result<Engine> {
        let startup = Startup::begin();
        let source = Source::find(model, &startup)?; // first, so that a mistyped name is reported at once
        thread::scope(|scope| {
            let device = threads::beside(scope, || Opened::open(options, &startup));
            let tokenizer = threads::beside(scope, || source.tokenizer(&startup));
            let files = source.files(&startup)?;
            let tokenizer = |config: &mut Config| source.settled(config, tokenizer()?);
            Engine::load_opened(device()?, files, tokenizer, options, &startup, progress)
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

    /// Brings a model to any kind of backend. `tokenizer` returns the tokenizer (it may have to wait for it) and sets
    /// what in the configuration depends on it; the tokenizer in `files` is not looked at.
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
        if let Some(draft) = &options.draft {
            speculate::fits(draft, config.vocab, None)?;
        }
        let changes = Changes { lora: &lora, quantize: options.quantize.as_ref(), widen: options.widen };
        let kept = match &options.quantize {
            Some(_) if options.widen => {
                let what =
                    "quantizing and widening at once: weights would be rounded to few bits and take the memory of 16";
                return Err(Error::Input(what.into()));
            }
            Some(quantize) => Kept::of::<B>(&config, &quantize.planned(&weights)?, changes),
            None => Kept::of::<B>(&config, &weights, changes),
        };
        let promised = options.draft.as_ref().map_or(0, |draft| draft.plan().of_sequences());
        let free = b.free_memory()?.map(|free| free.saturating_sub(promised));
        let &Options { context, sequences, cache_tokens, kv, .. } = options;
        let wanted = Wanted { context, sequences, cache_tokens, kv };
        let plan = Plan::choose::<B>(&config, kept, wanted, free)?;
        tracing::info!("{}: {plan}", b.name());
        if !plan.fits() {
            tracing::warn!(
                "{plan}: the system may end the process when the cache fills; a shorter context (`--context`) needs less"
            );
        }
        // the parts of a prompt in a batch are smaller than the chunks of a session's
        let most = if options.sequences == 1 { B::CHUNK } else { *BatchOptions::CHUNK.end() };
        b.expect_rows(&config, plan.context.min(most))?;
        let (mut done, total) = (0, weights.bytes());
        let mut add = |bytes| {
            done += bytes;
            progress(done, total);
        };
        let load = || Model::load(&b, &config, &weights, changes, plan.context, &mut add);
        if plan.context > config.rope_fixed_until() {
            let trained = config.rope_fixed_until();
            tracing::info!(
                "beyond {trained} tokens rotary frequencies change with the length; earlier keys stay as they were"
            );
        }
        let model = startup.time("weights", total, load)?;
        let tokenizer = tokenizer(&mut config)?;
        if let Some(draft) = &options.draft {
            speculate::fits(draft, config.vocab, tokenizer.as_ref())?;
        }
        b.synchronize()?;
        let (device, is_gpu) = (b.name(), B::IS_GPU);
        let (loaded, startup, draft) =
            (Arc::new(Loaded { b, model, kv: plan.kv_dtype }), startup.clone(), options.draft.clone());
        let lora = session_file::lora_fingerprint(&weights, &lora);
        let source = ModelSource { weights, widened: options.widen, lora, fingerprint: OnceLock::new() };
        let inner = Inner { config, tokenizer, template, loaded, device, is_gpu, plan, kept, startup, draft, source };
        Ok(Engine(Arc::new(inner)))
    }

    /// Creates this many empty sequences with room for `max_tokens` tokens each.
    pub(crate) fn timeline(&self, sequences: usize, max_tokens: usize) -> Result<Box<dyn AnyTimeline>> {
        self.any_timeline(sequences, max_tokens, None)
    }

    /// The same for sequences that take their pages from a pool of this many.
    pub(crate) fn paged_timeline(
        &self,
        sequences: usize,
        max_tokens: usize,
        pages: usize,
    ) -> Result<Box<dyn AnyTimeline>> {
        self.any_timeline(sequences, max_tokens, Some(pages))
    }

    fn any_timeline(&self, sequences: usize, max_tokens: usize, pool: Option<usize>) -> Result<Box<dyn AnyTimeline>> {
        if max_tokens == 0 || max_tokens > self.max_context() {
            return Err(Error::Context { needed: max_tokens, max: self.max_context() });
        }
        self.0.loaded.clone().timeline(sequences, max_tokens, pool)
    }

    /// The smaller model that guesses for it, if there is one.
    pub fn draft(&self) -> Option<&Engine> {
        self.0.draft.as_ref()
    }

    /// Sizes of the model.
    pub fn config(&self) -> &Config {
        &self.0.config
    }

    /// By which the model's sessions are told from those of others: a hash of its configuration and of samples of its weights.
    pub(crate) fn fingerprint(&self) -> String {
        let ModelSource { weights, widened, lora, fingerprint } = &self.0.source;
        let compute = || session_file::fingerprint(&self.0.config, weights, *widened, *lora);
        fingerprint.get_or_init(compute).clone()
    }

    /// Tokens that a session can have.
    pub fn max_context(&self) -> usize {
        self.0.plan.context
    }

    /// Memory that the model and its sequences take.
    pub fn plan(&self) -> &Plan {
        &self.0.plan
    }

    /// What its quantized weights change in memory, where they stay quantized.
    pub fn kept(&self) -> Kept {
        self.0.kept
    }

    /// Name of the device, for people.
    pub fn device(&self) -> &str {
        &self.0.device
    }

    /// Whether it runs on a GPU.
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

    /// How a conversation becomes a prompt for this model.
    pub fn template(&self) -> &Template {
        &self.0.template
    }
}
