//! The outbox: chosen tokens on their way to the host, in one queue for each sequence. A kernel writes a token to
//! page-locked memory, and the host polls that memory; so the stream has neither a copy nor an event.

use super::{Arg, Buffer, Cuda, failed};
use crate::{
    backend::Backend,
    error::{Error, Result},
    tiles::OUTBOX,
};
use cudarc::driver::{CudaStream, PinnedHostSlice, sys};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// How often the driver is asked whether the device still works, while the host waits for a token.
const LOOK_AGAIN: Duration = Duration::from_micros(50);

/// See `kernels/common/outbox.cuh`.
pub struct Outbox {
    /// For each sequence a queue of words: the token in the low half, its number (from 1 on) in the high half.
    /// [sequences, OUTBOX]
    ring: PinnedHostSlice<u64>,
    /// Address of the ring, for both the device and this process.
    address: *mut u64,
    /// How many tokens each sequence has posted.
    serial: Buffer<u32>,
    /// How many tokens of each sequence were taken or skipped.
    next: Vec<u32>,
    stream: Arc<CudaStream>,
}

// SAFETY: `address` is that of `ring`, which is owned and may be used by any thread.
unsafe impl Send for Outbox {}

impl Drop for Outbox {
    fn drop(&mut self) {
        let _ = self.stream.synchronize(); // a kernel must not write to freed memory
    }
}

impl Outbox {
    /// The kernel's arguments `serial` and `ring`.
    pub fn args(&mut self) -> [Arg; 2] {
        [(&mut self.serial).into(), Arg(self.address as u64)]
    }
}

impl Cuda {
    pub(super) fn new_outbox(&self, sequences: usize) -> Result<Outbox> {
        let what = || failed(|| "allocating the outbox of tokens".into());
        let words = sequences * OUTBOX as usize;
        // SAFETY: a u64 has no invalid values, and all words are written below. Flags 0 is cached memory, which the CPU reads
        // fast; with unified addressing, which every GPU that the kernels run on has, its address is the device's too.
        let mut ring = unsafe { self.context.alloc_pinned_with_flags::<u64>(words, 0) }.map_err(what())?;
        ring.as_mut_slice().map_err(what())?.fill(0);
        let address = ring.as_mut_ptr().map_err(what())?;
        Ok(Outbox {
            ring,
            address,
            serial: self.alloc(sequences)?,
            next: vec![0; sequences],
            stream: self.stream.clone(),
        })
    }

    pub(super) fn take_token(&self, outbox: &mut Outbox, sequence: usize) -> Result<u32> {
        let next = outbox.next[sequence];
        let at = sequence * OUTBOX as usize + (next % OUTBOX) as usize;
        debug_assert!(at < outbox.ring.len());
        // SAFETY: the word is in the ring, which lives as long as the outbox; host and device both access it as a whole.
        let word = unsafe { AtomicU64::from_ptr(outbox.address.add(at)) };
        let number = next.wrapping_add(1);
        let there = || Some(word.load(Ordering::Acquire)).filter(|w| (w >> 32) as u32 == number).map(|w| w as u32);
        let (mut looked, mut spins) = (Instant::now(), 0u32);
        loop {
            if let Some(token) = there() {
                outbox.next[sequence] = number;
                return Ok(token);
            }
            spins = spins.wrapping_add(1);
            if spins % 64 == 0 && looked.elapsed() > LOOK_AGAIN {
                // SAFETY: a live stream of this context, which is bound below.
                let said = || unsafe { sys::cuStreamQuery(self.stream.cu_stream()) };
                self.context.bind_to_thread().map_err(failed(|| "waiting for a token".into()))?;
                match said() {
                    sys::CUresult::CUDA_ERROR_NOT_READY => {}
                    sys::CUresult::CUDA_SUCCESS if there().is_some() => continue,
                    sys::CUresult::CUDA_SUCCESS => {
                        let cause = format!("the GPU has nothing left to do, and token {number} did not come");
                        return Err(Error::Cuda { what: "waiting for a token".into(), cause });
                    }
                    e => e.result().map_err(failed(|| "waiting for a token".into()))?,
                }
                std::thread::yield_now(); // where cores are scarce, others get theirs
                looked = Instant::now();
            }
            std::hint::spin_loop();
        }
    }

    pub(super) fn skip_tokens(outbox: &mut Outbox, sequence: usize, n: usize) {
        outbox.next[sequence] = outbox.next[sequence].wrapping_add(n as u32);
    }
}
