//! A training run, from its configuration to its adapter.

use super::{
    adapter::Adapter,
    checkpoint::{self, State},
    config::{LossMean, Resume, TuneConfig},
    data::{Data, Packing},
    pass::{MicroBatch, Pass, Sizes, Training},
    plan::{Summary, fits, plan, sizes},
    prompt::{self, Encoder, Kind},
};
use crate::{
    backend::train::TrainBackend,
    error::{Error, Result},
    files::{ModelFiles, config::Arch, json, output::Output},
    model::{Changes, Model},
    ops::train::{AdamW, GradNorm},
    text::{Tokenizer, TokenizerConfig},
};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    time::Instant,
};

/// A line of `train.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// Steps done.
    pub step: usize,
    /// Times that the data was gone through.
    pub epoch: f64,
    /// Mean loss of the steps since the last line, in nats a label.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Loss of the rows that are kept apart.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
    /// Learning rate of the last step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// Length of the last step's gradient, before clipping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grad_norm: Option<f64>,
    /// Tokens that went through the model since the run began.
    pub tokens: u64,
    /// Seconds since this part of the run began.
    pub seconds: f64,
}

/// What happens in a run.
#[derive(Debug)]
pub enum TuneEvent<'a> {
    /// A step is done: its number, and the line of the log where there is one.
    Step(usize, Option<&'a Line>),
    /// The loss of the rows kept apart was measured.
    Eval(&'a Line),
    /// A checkpoint was written.
    Saved(&'a Path),
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Steps done.
    pub step: usize,
    /// Whether all steps were done.
    pub finished: bool,
    /// The adapter, or the checkpoint to go on from.
    pub dir: PathBuf,
    /// Tokens a second in this part of the run, counting the time of steps only.
    pub tokens_per_second: f64,
}

/// A run that is ready to begin.
pub struct Tuner {
    config: TuneConfig,
    pub(crate) files: ModelFiles,
    pub(crate) adapter: Adapter,
    /// Rows that are learned.
    pub data: Data,
    /// Rows kept apart.
    pub eval: Data,
    pub(crate) packing: Packing,
    summary: Summary,
}

/// The tokenizer of a model, and the token that ends a response.
///
/// # Errors
/// `Input` when there is none.
pub fn tokens_of<'a>(files: &'a ModelFiles, eos_token: Option<&str>) -> Result<(&'a Tokenizer, u32)> {
    let none = || Error::Input("the model has no tokenizer.json: rows cannot become tokens".into());
    let tokenizer = files.tokenizer.as_ref().ok_or_else(none)?;
    let own = match &files.dir {
        Some(dir) if dir.is_dir() => TokenizerConfig::read(dir)?.named().get("eos_token").cloned(),
        _ => None,
    };
    let own = own.filter(|text| tokenizer.token_id(text).is_some());
    Ok((tokenizer, prompt::eos(tokenizer, eos_token.or(own.as_deref()), &files.config.eos)?))
}

/// What the architecture has that the backward pass has not.
fn untrained(arch: &Arch, sequence_len: usize) -> Option<String> {
    let window = arch.windows.iter().flatten().find(|window| **window < sequence_len);
    match (arch.qk_norm, window) {
        (true, _) => Some(format!("{arch}: an adapter is trained on models whose q and k heads are not normed")),
        (_, Some(window)) => Some(format!(
            "{arch}: an adapter is trained without windows; set sequence_len to {window} or less, where the window hides nothing"
        )),
        _ => None,
    }
}

impl Tuner {
    /// Reads model and data, and plans the run.
    ///
    /// # Errors
    /// Of the files; `Unsupported` for a quantized model and for an architecture with parts that have no backward pass here; `Input` for
    /// sizes that do not fit it and for data with nothing to learn.
    pub fn open(config: TuneConfig) -> Result<Tuner> {
        let files = ModelFiles::open(&config.base_model)?;
        if let Some(t) = files.weights.tensors().find(|t| t.format().is_quantized()) {
            let what = format!(
                "{} is {}; an adapter is trained on weights of bf16, f16 or f32: one for quantized weights would change when it is merged into \
                 others: use the model that this one was made from",
                t.name(),
                t.format()
            );
            return Err(Error::Unsupported { path: t.file().into(), what });
        }
        let model = &files.config;
        if config.sequence_len > model.max_seq {
            let what = format!("sequence_len is {}, the model was made for {}", config.sequence_len, model.max_seq);
            return Err(Error::Input(what));
        }
        if let Some(what) = untrained(&model.arch, config.sequence_len) {
            let path = files.dir.clone().unwrap_or_else(|| config.base_model.clone().into());
            return Err(Error::Unsupported { path, what });
        }
        let adapter = Adapter::new(config.shape.clone(), model)?;
        let text = match config.datasets.iter().all(|(_, kind)| *kind == Kind::Tokens) {
            true => None,
            false => Some(tokens_of(&files, config.eos_token.as_deref())?),
        };
        let &TuneConfig { sequence_len, train_on_inputs, .. } = &config;
        let encoder = Encoder { text, vocab: model.vocab, sequence_len, train_on_inputs };
        let mut data = Data::read(&config.datasets, &encoder)?;
        let eval = data.split(config.val_set_size, config.seed)?;
        let packing = Packing {
            seed: config.seed,
            shuffle: config.shuffle,
            capacity: config.sample_packing.then(|| config.capacity()),
            rows: config.micro_batch_size,
        };
        let summary = plan(&config, &files, &adapter, &data, &eval, packing);
        Ok(Tuner { config, files, adapter, data, eval, packing, summary })
    }

    /// What the run will do.
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// Checks that the output directory is free, or that this run goes on with what is there.
    ///
    /// # Errors
    /// `Input` when another run is in it.
    pub fn ready(&self) -> Result<()> {
        if self.config.resume == Resume::No && in_use(&self.config.output_dir)? {
            let dir = self.config.output_dir.display();
            return Err(Error::Input(format!(
                "output_dir {dir} has a run already; name another one, or go on with resume_from_checkpoint: true"
            )));
        }
        Ok(())
    }

    /// The configuration.
    pub fn config(&self) -> &TuneConfig {
        &self.config
    }

    /// Checks that a backend takes the run: the sizes of the model, and its memory, where that is known.
    ///
    /// # Errors
    /// `Op` or `Input` for what the backend does not take; `Memory` with the numbers.
    pub fn fits<B: TrainBackend>(&self, b: &B) -> Result<()> {
        let Tuner { config, files, adapter, .. } = self;
        if B::IS_GPU && !config.bf16 {
            return Err(Error::Input(
                "bf16 is false, and a GPU trains in bf16: set bf16: true, or --device cpu".into(),
            ));
        }
        b.trains(&files.config, adapter.shape.rank)?;
        fits(b, files, adapter, self.sizes())
    }

    /// The sizes of the memory of a pass.
    pub(crate) fn sizes(&self) -> Sizes {
        sizes(&self.config, &self.data, &self.eval, self.packing)
    }

    /// Runs to the end on a backend, or until `event` returns `false`: then it writes a checkpoint from which the run can go on.
    ///
    /// # Errors
    /// As [`Tuner::run`].
    pub fn run_on<B: TrainBackend>(self, b: B, event: &mut dyn FnMut(TuneEvent<'_>) -> bool) -> Result<Outcome> {
        self.fits(&b)?;
        let mut run = Run::begin(&b, &self)?;
        run.finish(event)
    }
}

/// Whether the directory has files of a run.
fn in_use(dir: &Path) -> Result<bool> {
    Ok(checkpoint::last(dir)?.is_some()
        || ["train.jsonl", "adapter_model.safetensors"].iter().any(|file| dir.join(file).exists()))
}

/// A run on its backend.
struct Run<'a, B: TrainBackend> {
    b: &'a B,
    t: &'a Tuner,
    pass: Pass<B>,
    params: B::Buf<f32>,
    m: B::Buf<f32>,
    v: B::Buf<f32>,
    grads: B::Buf<f32>,
    norm: B::Buf<f32>,
    step: usize,
    micro: u32,
    tokens: u64,
    window: (usize, f64),
    log: File,
    log_path: PathBuf,
    began: Instant,
    /// The current epoch, and its micro-batches.
    epoch: Option<(usize, Vec<Vec<usize>>)>,
    fingerprint: u64,
}

impl<'a, B: TrainBackend> Run<'a, B> {
    fn begin(b: &'a B, t: &'a Tuner) -> Result<Run<'a, B>> {
        t.ready()?;
        let (config, dir) = (&t.config, &t.config.output_dir);
        let fingerprint = t.data.fingerprint();
        let from = match &config.resume {
            Resume::No => None,
            Resume::From(dir) => Some(dir.clone()),
            Resume::Last => checkpoint::last(dir)?,
        };
        let zeros = || vec![0f32; t.adapter.len];
        let state = match (from, &config.lora_model_dir) {
            (Some(from), _) => checkpoint::load(&from, &t.adapter, config, &t.files.config, fingerprint)?,
            (None, start) => {
                let params = match start {
                    Some(start) => t.adapter.load(start, &t.files.config)?,
                    None => t.adapter.init(config.seed),
                };
                State { params, m: zeros(), v: zeros(), step: 0, micro: 0, tokens: 0, window: (0, 0.0) }
            }
        };
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let log_path = dir.join("train.jsonl");
        let log = log_until(&log_path, state.step)?;
        let sizes = t.sizes();
        b.expect_rows(&t.files.config, sizes.rows)?;
        let positions = t.summary.longest.max(1);
        let changes = Changes { widen: true, ..Changes::default() };
        let model = Model::load(b, &t.files.config, &t.files.weights, changes, positions, &mut |_| {})?;
        Ok(Run {
            pass: Pass::new(b, model, t.adapter.clone(), sizes)?,
            params: b.upload(&state.params)?,
            m: b.upload(&state.m)?,
            v: b.upload(&state.v)?,
            grads: b.alloc(t.adapter.len)?,
            norm: b.alloc(1)?,
            step: state.step,
            micro: state.micro,
            tokens: state.tokens,
            window: state.window,
            log,
            log_path,
            began: Instant::now(),
            epoch: None,
            fingerprint,
            b,
            t,
        })
    }

    fn finish(&mut self, event: &mut dyn FnMut(TuneEvent<'_>) -> bool) -> Result<Outcome> {
        let t = self.t;
        let (config, total) = (&t.config, t.summary.steps);
        let (mut spent, before) = (0.0, self.tokens);
        while self.step < total {
            let started = Instant::now();
            let line = self.one_step()?;
            spent += started.elapsed().as_secs_f64();
            if let Some(line) = &line {
                self.write(line)?;
            }
            let mut go_on = event(TuneEvent::Step(self.step, line.as_ref()));
            let step = self.step;
            let every = |n: Option<usize>| n.is_some_and(|n| step.is_multiple_of(n));
            if !t.eval.examples.is_empty() && (every(config.eval_steps) || self.step == total) {
                let line = self.evaluate()?;
                self.write(&line)?;
                go_on &= event(TuneEvent::Eval(&line));
            }
            if every(config.save_steps) || !go_on && self.step < total {
                let dir = self.save()?;
                event(TuneEvent::Saved(&dir));
                if !go_on && self.step < total {
                    let tokens_per_second = (self.tokens - before) as f64 / f64::max(spent, 1e-9);
                    return Ok(Outcome { step: self.step, finished: false, dir, tokens_per_second });
                }
            }
        }
        let mut out = Output::beside(&config.output_dir);
        t.adapter.save(&self.b.download(&self.params)?, &config.base_model, &mut out)?;
        out.finish()?;
        let tokens_per_second = (self.tokens - before) as f64 / f64::max(spent, 1e-9);
        Ok(Outcome { step: self.step, finished: true, dir: config.output_dir.clone(), tokens_per_second })
    }

    /// The micro-batches of a step.
    fn batches(&mut self, step: usize) -> Vec<MicroBatch> {
        let each = self.t.config.gradient_accumulation_steps;
        let of_epoch = self.t.summary.micro_batches.div_ceil(each);
        let (epoch, at) = (step / of_epoch, step % of_epoch);
        if self.epoch.as_ref().is_none_or(|(e, _)| *e != epoch) {
            self.epoch = Some((epoch, self.t.data.epoch(epoch, self.t.packing)));
        }
        let all = self.epoch.as_ref().map_or(&[][..], |(_, batches)| &batches[..]);
        all.iter().skip(at * each).take(each).map(|rows| self.t.data.micro_batch(rows)).collect()
    }

    fn one_step(&mut self) -> Result<Option<Line>> {
        let t = self.t;
        let config = &t.config;
        let batches = self.batches(self.step);
        let labels: usize = batches.iter().map(|batch| batch.at.len()).sum();
        let parts = config.gradient_accumulation_steps as f64;
        let mut loss = 0.0;
        for batch in &batches {
            let weight = match config.loss_mean {
                LossMean::Global => 1.0 / labels as f64,
                LossMean::Micro => 1.0 / batch.at.len() as f64 / parts,
            };
            let training = Training { seed: config.seed, step: self.micro, scale: weight as f32 };
            let losses = self.pass.run(self.b, batch, &self.params, &mut self.grads, Some(training))?;
            if let Some(i) = losses.iter().position(|l| !l.is_finite()) {
                return Err(self.not_finite("the loss", losses[i], batch, Some(batch.at[i])));
            }
            loss += weight * losses.iter().map(|l| f64::from(*l)).sum::<f64>();
            self.micro += 1;
            self.tokens += batch.rows() as u64;
        }
        let len = t.adapter.len;
        self.b.grad_norm(&GradNorm { len }, &mut self.norm, &self.grads)?;
        let mut norm = [0f32];
        self.b.read(&mut norm, &self.norm, 0)?;
        if !norm[0].is_finite() {
            let last = batches.last().cloned().unwrap_or_default();
            return Err(self.not_finite("the length of the gradient", norm[0], &last, None));
        }
        let lr = config.rate(self.step, t.summary.steps);
        self.step += 1;
        let op = AdamW {
            len,
            lr,
            beta1: config.beta1,
            beta2: config.beta2,
            eps: config.epsilon,
            decay: config.weight_decay,
            max_norm: config.max_grad_norm,
            step: self.step as u32,
        };
        self.b.adamw(&op, &mut self.params, &mut self.m, &mut self.v, &mut self.grads, &self.norm)?;
        self.window = (self.window.0 + 1, self.window.1 + loss);
        let due = self.step.is_multiple_of(config.logging_steps) || self.step == t.summary.steps;
        Ok(due.then(|| {
            let (n, sum) = std::mem::take(&mut self.window);
            let line = self.line();
            Line { loss: Some(sum / n as f64), learning_rate: Some(lr), grad_norm: Some(f64::from(norm[0])), ..line }
        }))
    }

    fn line(&self) -> Line {
        let of_epoch = self.t.summary.micro_batches.div_ceil(self.t.config.gradient_accumulation_steps);
        Line {
            step: self.step,
            epoch: self.step as f64 / of_epoch as f64,
            loss: None,
            eval_loss: None,
            learning_rate: None,
            grad_norm: None,
            tokens: self.tokens,
            seconds: self.began.elapsed().as_secs_f64(),
        }
    }

    /// The mean loss of the labels kept apart.
    fn evaluate(&mut self) -> Result<Line> {
        let packing = Packing { shuffle: false, ..self.t.packing };
        let (mut sum, mut labels) = (0.0, 0);
        for rows in self.t.eval.epoch(0, packing) {
            let batch = self.t.eval.micro_batch(&rows);
            let losses = self.pass.run(self.b, &batch, &self.params, &mut self.grads, None)?;
            sum += losses.iter().map(|l| f64::from(*l)).sum::<f64>();
            labels += losses.len();
        }
        Ok(Line { eval_loss: Some(sum / labels.max(1) as f64), ..self.line() })
    }

    fn write(&mut self, line: &Line) -> Result<()> {
        let text = serde_json::to_string(line).map_err(|e| Error::Input(format!("a line of the log: {e}")))?;
        self.log.write_all(format!("{text}\n").as_bytes()).map_err(Error::io(&self.log_path))
    }

    fn save(&self) -> Result<PathBuf> {
        let state = State {
            params: self.b.download(&self.params)?,
            m: self.b.download(&self.m)?,
            v: self.b.download(&self.v)?,
            step: self.step,
            micro: self.micro,
            tokens: self.tokens,
            window: self.window,
        };
        checkpoint::save(&self.t.adapter, &state, &self.t.config, self.fingerprint)
    }

    /// An error that says where it happened; `row` is a row of the micro-batch.
    fn not_finite(&self, what: &str, value: f32, batch: &MicroBatch, row: Option<u32>) -> Error {
        let layer = match self.pass.first_not_finite(self.b, batch.rows()) {
            Ok(Some(0)) => "the embedding has a number that is not finite".into(),
            Ok(Some(l)) => format!("the first number that is not finite is in layer {}", l - 1),
            _ => "all activations are finite".into(),
        };
        let of = |r: u32| batch.starts.iter().take_while(|s| **s <= r).count() - 1;
        let documents = match row {
            Some(row) => &batch.documents[of(row)..][..1],
            None => &batch.documents[..],
        };
        let places: Vec<String> = documents
            .iter()
            .take(3)
            .map(|&i| format!("{}:{}", self.t.data.places[i].0.display(), self.t.data.places[i].1))
            .collect();
        Error::Input(format!(
            "{what} is {value} in step {}: {layer}; rows {}{}. A smaller learning_rate may help; the last checkpoint is as it was",
            self.step + 1,
            places.join(", "),
            if documents.len() > 3 { ", ..." } else { "" }
        ))
    }
}

/// Opens the log for appending, without the lines of steps after `step`.
fn log_until(path: &Path, step: usize) -> Result<File> {
    let text = json::read_optional(path)?.unwrap_or_default();
    let keep = |line: &&str| serde_json::from_str::<Line>(line).is_ok_and(|l| l.step <= step);
    let kept: String = text.lines().filter(keep).map(|line| format!("{line}\n")).collect();
    if kept != text {
        fs::write(path, kept).map_err(Error::io(path))?;
    }
    File::options().append(true).create(true).open(path).map_err(Error::io(path))
}
