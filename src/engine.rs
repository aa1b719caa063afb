//! An engine: a model, loaded and ready. Immutable, cheap to clone, shared by sessions and threads.

use crate::{
    backend::Backend,
    config::Config,
    cpu::Cpu,
    error::{Error, Result},
    hub,
    kv::Kv,
    model::{Model, Scratch},
    session::Session,
    text::{Template, Tokenizer},
    timeline::{AnyLoaded, LOGIT_ROWS, Loaded},
    weights::Weights,
};
use half::bf16;
use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
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
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Where it runs.
    pub device: Device,
    /// Type of activations, on the CPU.
    pub activations: Activations,
    /// Most tokens of a session; the model's own maximum when absent, or as much of it as fits the GPU.
    pub context: Option<usize>,
}

/// Bytes that a model needs on its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Plan {
    /// Tokens of context that the other numbers are for.
    pub context: usize,
    /// Weights, once.
    pub weights: u64,
    /// KV cache of one session.
    pub kv: u64,
    /// Activations, logits and sampler of one session.
    pub scratch: u64,
    /// Free memory of the device, where it is limited.
    pub free: Option<u64>,
}

impl Plan {
    /// What `context` tokens need. Computed before anything is allocated.
    pub fn new<B: Backend>(config: &Config, weights: u64, context: usize, free: Option<u64>) -> Plan {
        let table = (context * config.head_dim * 4) as u64;
        let sampler = 3 * 4 * config.vocab as u64;
        let scratch = Scratch::<B>::bytes(config, B::CHUNK.min(context), LOGIT_ROWS, context) + table + sampler;
        Plan { context, weights, kv: Kv::<B>::bytes(config, context), scratch, free }
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights + self.kv + self.scratch
    }

    /// Whether the device has room, with a margin for the driver's own use.
    pub fn fits(&self) -> bool {
        self.free.is_none_or(|free| self.total() + (256 << 20).min(free / 16) <= free)
    }

    /// The plan for the context asked for; without one, for the longest that fits up to the model's maximum.
    fn choose<B: Backend>(config: &Config, weights: u64, asked: Option<usize>, free: Option<u64>) -> Result<Plan> {
        if let Some(n) = asked.filter(|n| *n == 0 || *n > config.max_seq) {
            return Err(Error::Input(format!("a context of {n} tokens: the model allows 1 to {}", config.max_seq)));
        }
        let plan = |context| Plan::new::<B>(config, weights, context, free);
        let wanted = plan(asked.unwrap_or(config.max_seq));
        if wanted.fits() {
            return Ok(wanted);
        }
        // bisect for the longest context that fits
        let (mut low, mut high) = (0, wanted.context);
        while high - low > 1 {
            let middle = (low + high) / 2;
            if plan(middle).fits() { low = middle } else { high = middle }
        }
        match asked {
            None if low >= 512.min(config.max_seq) => Ok(plan(low)),
            _ => Err(Error::Memory(format!(
                "{wanted}; {}",
                if low > 0 {
                    format!("a context of {low} tokens would fit")
                } else {
                    "not even the weights fit".into()
                }
            ))),
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gib = |b: u64| format!("{:.2} GiB", b as f64 / (1u64 << 30) as f64);
        write!(
            f,
            "weights {} + KV cache {} for {} tokens + scratch {} = {}",
            gib(self.weights),
            gib(self.kv),
            self.context,
            gib(self.scratch),
            gib(self.total())
        )?;
        self.free.map_or(Ok(()), |free| write!(f, ", free {}", gib(free)))
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
}

impl ModelFiles {
    /// Finds and checks a model: a directory in Hugging Face layout, the name of a repository in the local Hugging Face cache,
    /// or `demo` for the embedded one.
    pub fn open(model: &str) -> Result<ModelFiles> {
        if model == "demo" {
            let path = Path::new("(embedded)/config.json");
            let config = Config::from_json(path, demo::CONFIG, Some(demo::GENERATION))?;
            let weights = Weights::embedded(demo::WEIGHTS, &config)?;
            let tokenizer = Tokenizer::from_bytes("(embedded)/tokenizer.json", demo::TOKENIZER)?;
            return Ok(ModelFiles { dir: None, config, weights, tokenizer: Some(tokenizer), template: Template::Aog });
        }
        let dir = hub::resolve(model)?;
        let config = Config::from_dir(&dir)?;
        let weights = Weights::open(&dir, &config)?;
        let tokenizer = Tokenizer::from_dir(&dir)?;
        if let Some(t) = tokenizer.as_ref().filter(|t| t.vocab() > config.vocab) {
            return Err(Error::file(
                dir.join("tokenizer.json"),
                format!("has {} tokens, config.json says vocab_size {}", t.vocab(), config.vocab),
            ));
        }
        let template = Template::for_model(Some(&dir))?;
        Ok(ModelFiles { dir: Some(dir), config, weights, tokenizer, template })
    }
}

impl Engine {
    /// Opens a model; see [`ModelFiles::open`] for its name.
    pub fn open(model: &str, options: &Options) -> Result<Engine> {
        Engine::load(ModelFiles::open(model)?, options, &mut |_, _| {})
    }

    /// Brings a model to its device; `progress` gets the bytes done and in all.
    pub fn load(files: ModelFiles, options: &Options, progress: &mut dyn FnMut(u64, u64)) -> Result<Engine> {
        match options.device {
            Device::Cpu => Engine::load_on_cpu(files, options, progress),
            #[cfg(feature = "cuda")]
            Device::Cuda(n) => Engine::load_on(crate::cuda::Cuda::open(n)?, files, options, progress),
            #[cfg(feature = "cuda")]
            Device::Auto => match crate::cuda::Cuda::open(0) {
                Ok(cuda) => Engine::load_on(cuda, files, options, progress),
                Err(Error::NoGpu(why)) => {
                    tracing::info!("running on the CPU: {why}");
                    Engine::load_on_cpu(files, options, progress)
                }
                Err(e) => Err(e),
            },
            #[cfg(not(feature = "cuda"))]
            Device::Auto => Engine::load_on_cpu(files, options, progress),
            #[cfg(not(feature = "cuda"))]
            Device::Cuda(_) => Err(Error::NoGpu("this binary was built without the feature `cuda`".into())),
        }
    }

    fn load_on_cpu(f: ModelFiles, options: &Options, progress: &mut dyn FnMut(u64, u64)) -> Result<Engine> {
        match options.activations {
            Activations::Bf16 => Engine::load_on(Cpu::<bf16>::new(), f, options, progress),
            Activations::F32 => Engine::load_on(Cpu::<f32>::new(), f, options, progress),
        }
    }

    /// Brings a model to a backend of whatever kind.
    pub(crate) fn load_on<B: Backend>(
        b: B,
        files: ModelFiles,
        options: &Options,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Engine> {
        let ModelFiles { config, weights, tokenizer, template, .. } = files;
        b.supports(&config)?;
        let plan = Plan::choose::<B>(&config, config.weight_bytes(), options.context, b.free_memory()?)?;
        tracing::info!("{}: {plan}", b.name());
        let (mut done, total) = (0, weights.bytes());
        let mut add = |bytes| {
            done += bytes;
            progress(done, total);
        };
        let model = Model::load(&b, &config, &weights, plan.context, &mut add)?;
        b.synchronize()?;
        let (device, is_gpu) = (b.name(), B::IS_GPU);
        let loaded = Arc::new(Loaded { b, model });
        Ok(Engine(Arc::new(Inner { config, tokenizer, template, loaded, device, is_gpu, plan })))
    }

    /// An empty session with room for `max_tokens` tokens, at most [`Engine::max_context`].
    pub fn session(&self, max_tokens: usize) -> Result<Session> {
        if max_tokens == 0 || max_tokens > self.max_context() {
            return Err(Error::Context { needed: max_tokens, max: self.max_context() });
        }
        Ok(Session::new(self.clone(), self.0.loaded.clone().timeline(max_tokens)?, max_tokens))
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

    /// How the model is spoken to.
    pub fn template(&self) -> &Template {
        &self.0.template
    }
}
