//! Reads tensors for a device that has its own memory. Several threads read the files from front to back into a few
//! buffers, which are page-locked for a GPU.
//!
//! The files are read by position, not through their memory map: if a file is cut short meanwhile, that gives an error
//! instead of `SIGBUS`. Copying from the map was not faster. `O_DIRECT` was tried with a cold page cache and left out:
//! it was sometimes faster and sometimes slower, and it leaves the cache cold for the next start.

use crate::{Tensor, error::Result, files::config::Dtype};
use half::{bf16, f16, slice::HalfFloatSliceExt};
use std::{
    ops::Range,
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
};

/// Most bytes of a buffer. It is large enough that copying it over PCIe (36 us at 58 GB/s) takes much longer than
/// starting the copy, and small enough that what was read is still in the CPU's cache by then.
pub const CHUNK: usize = 2 << 20;
/// Buffers of a reader: one is filled while the other is copied.
pub const BUFFERS: usize = 2;
/// Most readers. That many are faster than PCIe 5.0 (63 GB/s) where each gets 4 GB/s out of the page cache.
pub const MAX_READERS: usize = 16;

/// Where the readers put what they read. A buffer belongs to one reader; dropping it waits until the data sent from it
/// has arrived.
pub trait Sink: Sync {
    /// Memory that the device can take data from.
    type Buffer: Send;
    /// A buffer of `len` bytes.
    fn buffer(&self, len: usize) -> Result<Self::Buffer>;
    /// The buffer's bytes, once the data last sent from it has arrived.
    fn bytes<'b>(&self, buffer: &'b mut Self::Buffer) -> Result<&'b mut [u8]>;
    /// Starts copying parts of the buffer, all of them bf16, to the device.
    fn send(&self, buffer: &mut Self::Buffer, parts: &[Part]) -> Result<()>;
}

/// A part of a buffer, and where on the device it belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Bytes of the buffer.
    pub from: Range<usize>,
    /// Where the first of them goes, in the unit of the target given with the tensor.
    pub to: u64,
}

/// What is read at once: a range of a file, with pieces of one or more tensors that lie there one after the other.
struct Chunk<'a> {
    /// One of the file's tensors.
    file: &'a Tensor,
    /// Where the range begins.
    at: usize,
    len: usize,
    pieces: Vec<(Dtype, Part)>,
}

/// How many threads are worth using to read on this machine.
pub fn readers() -> usize {
    thread::available_parallelism().map_or(1, |n| n.get()).min(MAX_READERS)
}

/// Reads every tensor, as bf16, to the target given with it; `progress` gets the number of bytes of the files, each
/// time some are done.
///
/// # Errors
/// The first in the order of the readers: [`crate::error::Error::Io`] and [`crate::error::Error::File`] name the file and the
/// position, all others are the sink's. The readers have ended when it returns.
pub fn read_all<S: Sink>(targets: Vec<(&Tensor, u64)>, sink: &S, progress: &mut dyn FnMut(u64)) -> Result<()> {
    let chunks = plan(targets);
    let len = chunks.iter().map(|c| c.len).max().unwrap_or(0);
    let next = AtomicUsize::new(0);
    let (done, news) = mpsc::channel();
    let reader = |done: mpsc::Sender<u64>| {
        let result = read_some(&chunks, len, &next, sink, &done);
        if result.is_err() {
            next.store(chunks.len(), Ordering::Relaxed); // the others end after the chunk that they are at
        }
        result
    };
    thread::scope(|scope| {
        let spawn = |_| {
            let (reader, done) = (&reader, done.clone());
            thread::Builder::new().spawn_scoped(scope, move || reader(done)).ok()
        };
        // where the system gives no more threads, fewer read; without any, this one does
        let threads: Vec<_> = (0..readers().min(chunks.len())).map_while(spawn).collect();
        let here = threads.is_empty().then(|| reader(done.clone()));
        drop(done);
        news.iter().for_each(progress); // until the last reader has ended
        // If a reader ends early, its buffers are kept until all have ended: dropping one may wait for the others'
        // copies
        let ended = threads.into_iter().map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        here.into_iter().chain(ended).collect::<Result<Vec<Vec<S::Buffer>>>>().map(drop)
    })
}

/// One reader: takes the next chunk until there is none. Returns its buffers.
fn read_some<S: Sink>(
    chunks: &[Chunk],
    len: usize,
    next: &AtomicUsize,
    sink: &S,
    done: &mpsc::Sender<u64>,
) -> Result<Vec<S::Buffer>> {
    let mut buffers = Vec::with_capacity(BUFFERS);
    for turn in 0.. {
        let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
        if turn < BUFFERS {
            buffers.push(sink.buffer(len)?); // by each reader its own, and the second while the first is on its way
        }
        let buffer = &mut buffers[turn % BUFFERS];
        let bytes = &mut sink.bytes(buffer)?[..chunk.len];
        chunk.file.read_file(chunk.at, bytes)?;
        let parts = chunk.pieces.iter().map(|(dtype, part)| {
            let len = to_bf16(*dtype, &mut bytes[part.from.clone()]);
            Part { from: part.from.start..part.from.start + len, to: part.to }
        });
        let parts: Vec<Part> = parts.collect();
        sink.send(buffer, &parts)?;
        if done.send(chunk.len as u64).is_err() {
            break; // nobody waits for it any more
        }
    }
    Ok(buffers)
}

/// Cuts the tensors into chunks in the order in which they lie in the files. An element is never cut.
fn plan(mut targets: Vec<(&Tensor, u64)>) -> Vec<Chunk<'_>> {
    targets.sort_by_key(|(tensor, _)| (tensor.shard(), tensor.offset()));
    let mut chunks: Vec<Chunk> = Vec::new();
    for (tensor, mut to) in targets {
        let element = tensor.dtype().bytes();
        let mut at = tensor.offset();
        let end = at + tensor.bytes().len();
        while at < end {
            let follows = |c: &&mut Chunk| c.file.same_file(tensor) && c.at + c.len == at && CHUNK - c.len >= element;
            let chunk = match chunks.last_mut().filter(follows) {
                Some(_) => chunks.last_mut(),
                None => {
                    chunks.push(Chunk { file: tensor, at, len: 0, pieces: Vec::new() });
                    chunks.last_mut()
                }
            };
            let chunk = chunk.expect("one was pushed");
            let len = (end - at).min((CHUNK - chunk.len) / element * element);
            chunk.pieces.push((tensor.dtype(), Part { from: chunk.len..chunk.len + len, to }));
            chunk.len += len;
            at += len;
            to += (len / element * size_of::<bf16>()) as u64;
        }
    }
    chunks
}

/// Rounds elements to bf16 in place; their bytes are then the first of `bytes`. Returns how many.
fn to_bf16(dtype: Dtype, bytes: &mut [u8]) -> usize {
    match dtype {
        Dtype::Bf16 => bytes.len(),
        Dtype::F16 => convert(bytes, |from: &[[u8; 2]], to| {
            let mut halves = [f16::ZERO; BLOCK];
            halves.iter_mut().zip(from).for_each(|(h, b)| *h = f16::from_le_bytes(*b));
            halves[..from.len()].convert_to_f32_slice(to);
        }),
        Dtype::F32 => convert(bytes, |from: &[[u8; 4]], to| {
            to.iter_mut().zip(from).for_each(|(x, b)| *x = f32::from_le_bytes(*b));
        }),
    }
}

/// Elements that are converted at once: few enough for the first cache.
const BLOCK: usize = 1024;

fn convert<const N: usize>(bytes: &mut [u8], values: impl Fn(&[[u8; N]], &mut [f32])) -> usize {
    let elements = bytes.len() / N;
    let mut floats = [0f32; BLOCK];
    for first in (0..elements).step_by(BLOCK) {
        let n = BLOCK.min(elements - first);
        values(bytes[first * N..(first + n) * N].as_chunks().0, &mut floats[..n]);
        // never beyond what was read: an element takes as much room in bf16, or half
        let to = bytes[2 * first..2 * (first + n)].as_chunks_mut::<2>().0;
        to.iter_mut().zip(&floats).for_each(|(b, x)| *b = round(*x).to_le_bytes());
    }
    2 * elements
}

/// The bits of `bf16::from_f32`, without branches: the compiler makes vectors of it.
fn round(x: f32) -> u16 {
    let bits = x.to_bits();
    let to_even = bits.wrapping_add(0x7FFF + (bits >> 16 & 1));
    let nan = bits | 0x0040_0000; // a quiet one, whatever is cut off
    ((if x.is_nan() { nan } else { to_even }) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_as_half_does() {
        for high in 0..=u16::MAX {
            for low in [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF] {
                let x = f32::from_bits(u32::from(high) << 16 | low);
                assert_eq!(round(x), bf16::from_f32(x).to_bits(), "{:#x}", x.to_bits());
            }
        }
    }
}
