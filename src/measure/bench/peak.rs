//! The best rates of this machine, measured: reading memory, copying memory, multiplying matrices.

use super::Running;
use crate::{
    backend::cpu::Cpu,
    ops::{Act, Cost},
};
#[cfg(feature = "cuda")]
use crate::{
    backend::cuda::Cuda,
    backend::{Backend, Out},
    error::Result,
    measure::bench::Times,
    ops::{Gemm, StreamRead, noise},
};
use serde::Serialize;
use std::{hint::black_box, time::Instant};

/// Best rates of a machine.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Peak {
    /// Reading much more than a cache holds, and nothing else.
    pub read_gb_per_s: f64,
    /// A large copy, counting both reads and writes.
    pub copy_gb_per_s: f64,
    /// A large bf16 matrix product on noise, by the implementation that the engine uses.
    pub matmul_tflops: Option<f64>,
    /// The GPU while its memory was read at that rate.
    pub running: Option<Running>,
}

/// Bytes that are read at a time, on a GPU with room for them.
#[cfg(feature = "cuda")]
const READ_BYTES: u64 = 4 << 30;

/// Pieces of memory that a thread reads side by side.
const STREAMS: usize = 4;

impl Peak {
    /// The least possible time in milliseconds: all bytes at the measured rate of reading, all operations at the
    /// measured rate of the product.
    pub fn floor_ms(&self, cost: Cost) -> f64 {
        let bytes = (cost.read + cost.write) as f64 / (self.read_gb_per_s * 1e6);
        self.matmul_tflops.map_or(bytes, |t| bytes.max(cost.flops as f64 / (t * 1e9)))
    }

    /// Measures this machine's CPU and memory with the threads of `cpu`: the best of five passes over `bytes`.
    pub fn of_host<A: Act>(cpu: &Cpu<A>, bytes: usize) -> Peak {
        const PART: usize = 1 << 17;
        let src: Vec<u64> = (0..bytes.div_ceil(8) as u64).collect();
        let (mut dst, mut sums) = (vec![1u64; src.len()], vec![0u64; src.len().div_ceil(PART)]);
        let rate = |moved: usize, pass: &mut dyn FnMut()| {
            let seconds = (0..5).map(|_| {
                let begin = Instant::now();
                pass();
                begin.elapsed().as_secs_f64()
            });
            moved as f64 / seconds.fold(f64::INFINITY, f64::min) / 1e9
        };
        let part = |at: usize| &src[at..src.len().min(at + PART)];
        let read_gb_per_s = rate(8 * src.len(), &mut || {
            cpu.chunks(&mut sums, 1, |i, sum| sum[0] = sum_of(part(i * PART)));
            black_box(&mut sums);
        });
        let copy_gb_per_s = rate(16 * src.len(), &mut || {
            cpu.chunks(&mut dst, PART, |at, dst| dst.copy_from_slice(part(at)));
            black_box(&mut dst);
        });
        Peak { read_gb_per_s, copy_gb_per_s, matmul_tflops: None, running: None }
    }

    /// Measures a GPU; takes a few seconds.
    #[cfg(feature = "cuda")]
    pub fn measure(cuda: &Cuda) -> Result<Peak> {
        let emulated = cuda.info().is_emulated();
        let free = cuda.free_memory()?.unwrap_or(u64::MAX);
        let bytes = if emulated { 1 << 20 } else { (free / 4).min(READ_BYTES) as usize };
        let (read_gb_per_s, running) = read_bandwidth(cuda, bytes)?;
        let copy_gb_per_s = cuda.copy_bandwidth(bytes / 2)?;
        let matmul_tflops = if emulated { None } else { Some(matmul_tflops(cuda, 8192)?) };
        Ok(Peak { read_gb_per_s, copy_gb_per_s, matmul_tflops, running })
    }
}

/// The sum of `x`, read as [`STREAMS`] pieces side by side: within a single piece, a CPU prefetches only to the end of
/// a page.
fn sum_of(x: &[u64]) -> u64 {
    let piece = x.len() / STREAMS / 8 * 8;
    let mut sums = [0u64; 8];
    for at in (0..piece).step_by(8) {
        for s in 0..STREAMS {
            sums.iter_mut().zip(&x[s * piece + at..][..8]).for_each(|(sum, x)| *sum = sum.wrapping_add(*x));
        }
    }
    sums.iter().chain(&x[STREAMS * piece..]).fold(0u64, |a, b| a.wrapping_add(*b))
}

/// GB/s of [`StreamRead`] over about `bytes`, the median of ten, and what the GPU runs at meanwhile.
#[cfg(feature = "cuda")]
fn read_bandwidth(cuda: &Cuda, bytes: usize) -> Result<(f64, Option<Running>)> {
    let op = StreamRead { blocks: StreamRead::blocks(cuda.info().sm_count), words: bytes / 16 * 4 };
    let (mut out, mut x) = (cuda.alloc(op.blocks)?, cuda.alloc(op.words)?);
    // not zeros, for which memory takes less power
    let block: Vec<u32> = (0..op.words.min(1 << 24) as u32).map(|i| i.wrapping_mul(0x9E37_79B9)).collect();
    for at in (0..op.words).step_by(block.len()) {
        cuda.write(&mut x, at, &block[..block.len().min(op.words - at)])?;
    }
    let mut read = || cuda.time(|| cuda.stream_read(&op, &mut out, &x)).map(f64::from);
    let mut ms = Vec::new();
    for run in 0..12 {
        let time = read()?;
        if run >= 2 {
            ms.push(time); // the first ones load the kernel and wake the clocks
        }
    }
    let running = match cuda.info().is_emulated() {
        true => None,
        false => Running::during(&cuda.info().pci, || read().map(drop))?,
    };
    Ok(((4 * op.words) as f64 / (Times::new(ms).p50_ms * 1e6), running))
}

/// TFLOP/s of a product of `n` by `n` matrices of noise, the median of five.
#[cfg(feature = "cuda")]
fn matmul_tflops(cuda: &Cuda, n: usize) -> Result<f64> {
    let act: Vec<half::bf16> = noise(n * n, 1).into_iter().map(half::bf16::from_f32).collect();
    let (x, w, mut out) = (cuda.upload(&act)?, cuda.weight_from(n, n, &act)?, cuda.alloc(n * n)?);
    let mut ms = Vec::new();
    for run in 0..8 {
        let time = cuda.time(|| cuda.gemm(&Gemm { rows: n, n, k: n }, Out::Store(&mut out), &x, &w))?;
        if run >= 3 {
            ms.push(f64::from(time));
        }
    }
    Ok(2.0 * (n as f64).powi(3) / (Times::new(ms).p50_ms * 1e9))
}
