//! Measures steps of a run without making anything of them: `aoji tune --bench`.

use super::Peak;
use crate::{
    backend::{
        Backend,
        count::{Costs, Count},
        train::{KernelTime, TrainBackend},
    },
    error::Result,
    model::{Changes, Model},
    ops::train::{AdamW, GradNorm},
    train::{On, Pass, Place, Sizes, Training, Tuner},
};
use serde::Serialize;
use std::time::Instant;

/// How fast steps are.
#[derive(Debug, Clone, Serialize)]
pub struct Speed {
    /// Name of the device.
    pub device: String,
    /// Tokens of the micro-batch that was measured, the first of the run, and its documents and labels.
    pub tokens: usize,
    /// See `tokens`.
    pub documents: usize,
    /// See `tokens`.
    pub labels: usize,
    /// Milliseconds of forward and backward pass of the micro-batch, the median.
    pub pass_ms: f64,
    /// Milliseconds of the update of the parameters, the median.
    pub update_ms: f64,
    /// Tokens a second in a step of the run.
    pub tokens_per_second: f64,
    /// What a step must read, write and compute, and the same without what `gradient_checkpointing` computes again.
    #[serde(skip)]
    pub costs: [Costs; 2],
    /// Micro-batches of a step.
    pub micro_batches: usize,
    /// How long each kernel takes in a micro-batch and an update; on a GPU.
    pub kernels: Vec<KernelTime>,
}

/// Bytes that are read to measure a CPU's memory.
const HOST_BYTES: usize = 256 << 20;

/// Measures a micro-batch and an update `runs` times, after one that is not counted, and the best rates of the device. Nothing is
/// written.
///
/// # Errors
/// Those of [`Tuner::fits`] and of the backend.
pub fn tune(place: &Place, tuner: &Tuner, runs: usize) -> Result<(Speed, Peak)> {
    match &place.0 {
        On::Bf16(b) => Ok((speed(tuner, b, runs)?, Peak::of_host(b, HOST_BYTES))),
        On::F32(b) => Ok((speed(tuner, b, runs)?, Peak::of_host(b, HOST_BYTES))),
        #[cfg(feature = "cuda")]
        On::Cuda(b) => Ok((speed(tuner, &**b, runs)?, Peak::measure(b)?)),
    }
}

fn speed<B: TrainBackend>(tuner: &Tuner, b: &B, runs: usize) -> Result<Speed> {
    tuner.fits(b)?;
    let (config, c) = (tuner.config(), &tuner.files.config);
    let sizes = tuner.sizes();
    let rows = tuner.data.epoch(0, tuner.packing).into_iter().next().unwrap_or_default();
    let batch = tuner.data.micro_batch(&rows);
    let parts = config.gradient_accumulation_steps;
    let training = Some(Training { seed: config.seed, step: 0, scale: 1.0 / batch.at.len().max(1) as f32 });
    let len = tuner.adapter.len;
    // rate 0: parameters stay where they began
    let (beta1, beta2, decay) = (config.beta1, config.beta2, config.weight_decay);
    let update =
        AdamW { len, lr: 0.0, beta1, beta2, eps: config.epsilon, decay, max_norm: config.max_grad_norm, step: 1 };

    let count = |recompute| -> Result<Costs> {
        let b = Count::new();
        let model = b.model(c, tuner.summary().longest.max(1))?;
        let sizes = Sizes { recompute, ..sizes };
        let mut pass = Pass::new(&b, model, tuner.adapter.clone(), sizes)?;
        let f32s = || b.alloc::<f32>(len);
        for _ in 0..parts {
            pass.run(&b, &batch, &f32s()?, &mut f32s()?, training)?;
        }
        b.grad_norm(&GradNorm { len }, &mut f32s()?, &f32s()?)?;
        b.adamw(&update, &mut f32s()?, &mut f32s()?, &mut f32s()?, &mut f32s()?, &f32s()?)?;
        Ok(b.costs())
    };
    let costs = [count(sizes.recompute)?, count(false)?];

    b.expect_rows(c, sizes.rows)?;
    let changes = Changes { widen: true, ..Changes::default() };
    let model = Model::load(b, c, &tuner.files.weights, changes, tuner.summary().longest.max(1), &mut |_| {})?;
    let mut pass = Pass::new(b, model, tuner.adapter.clone(), sizes)?;
    let mut params = b.upload(&tuner.adapter.init(config.seed))?;
    let (mut m, mut v, mut grads) = (b.alloc(len)?, b.alloc(len)?, b.alloc(len)?);
    let mut norm = b.alloc(1)?;
    let mut times = [Vec::new(), Vec::new()];
    for run in 0..=runs {
        let mut clock = Instant::now();
        let mut lap = |times: &mut Vec<f64>| -> Result<()> {
            b.synchronize()?;
            if run > 0 {
                times.push(clock.elapsed().as_secs_f64() * 1e3);
            }
            clock = Instant::now();
            Ok(())
        };
        pass.run(b, &batch, &params, &mut grads, training)?;
        lap(&mut times[0])?;
        b.grad_norm(&GradNorm { len }, &mut norm, &grads)?;
        b.adamw(&update, &mut params, &mut m, &mut v, &mut grads, &norm)?;
        lap(&mut times[1])?;
    }
    let kernels = b.times(|| {
        pass.run(b, &batch, &params, &mut grads, training)?;
        b.grad_norm(&GradNorm { len }, &mut norm, &grads)?;
        b.adamw(&update, &mut params, &mut m, &mut v, &mut grads, &norm)
    })?;
    let [pass_ms, update_ms] = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
    });
    Ok(Speed {
        device: b.name(),
        tokens: batch.rows(),
        documents: batch.documents.len(),
        labels: batch.at.len(),
        pass_ms,
        update_ms,
        tokens_per_second: (parts * batch.rows()) as f64 / (parts as f64 * pass_ms + update_ms) * 1e3,
        costs,
        micro_batches: parts,
        kernels,
    })
}
