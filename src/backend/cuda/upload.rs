//! Uploads weights: threads read the files into a small ring of page-locked buffers, and while one buffer is copied to the GPU the
//! next is being read.
//!
//! The ring is needed because only page-locked memory can be copied asynchronously, and mapped files are not page-locked. It takes a
//! few megabytes, whatever the size of the model.

use super::{Cuda, Kind, Weight, failed};
use crate::{
    error::{Error, Result},
    files::weights::{
        Tensor,
        reader::{self, Part, Sink},
    },
};
use cudarc::driver::{CudaEvent, CudaStream, DriverError, result, sys};
use half::bf16;
use std::{slice, sync::Arc};

impl Cuda {
    /// Uploads each stack of tensors as one matrix. All memory is allocated before anything is read.
    pub(super) fn upload_weights(&self, stacks: &[Vec<Tensor>], progress: &mut dyn FnMut(u64)) -> Result<Vec<Weight>> {
        let bytes = stacks.iter().flatten().map(|t| (t.rows() * t.cols() * size_of::<bf16>()) as u64).sum();
        let room = || stacks.iter().map(|parts| self.room_for(parts)).collect::<Result<Vec<_>>>();
        let weights = self.startup.time("memory", bytes, room)?;
        let (mut targets, mut read) = (Vec::new(), 0);
        for (parts, weight) in stacks.iter().zip(&weights) {
            let mut to = weight.data.address;
            for t in parts {
                targets.push((t, to));
                read += t.bytes().len() as u64;
                to += (t.rows() * t.cols() * size_of::<bf16>()) as u64;
            }
        }
        // In the stream that all work uses, so that whatever is asked of the device later comes after the copies.
        self.startup.time("copies", read, || reader::read_all(targets, &Ring(self), progress))?;
        Ok(weights)
    }

    /// Memory for a matrix of tensors stacked by rows. It is not zeroed, as that would write every byte twice.
    fn room_for(&self, parts: &[Tensor]) -> Result<Weight> {
        let (rows, cols) = (parts.iter().map(Tensor::rows).sum(), parts.first().map_or(0, Tensor::cols));
        if let Some(t) = parts.iter().find(|t| t.cols() != cols) {
            return Err(Error::Op { op: "weights", what: format!("{t:?} is below a tensor of {cols} columns") });
        }
        // SAFETY: upload_weights gives it out when the readers have written every byte of every part, and drops it when
        // not.
        let data = self.buffer(rows * cols, |bytes| unsafe { self.stream.alloc(bytes) })?;
        Ok(Weight { data, rows, cols, kind: Kind::Bf16, bias: None })
    }
}

/// The readers' buffers on their way to this GPU.
struct Ring<'a>(&'a Cuda);

/// Page-locked memory.
struct Pinned {
    memory: *mut u8,
    len: usize,
    /// Marks the end of the last copy from it.
    sent: CudaEvent,
    stream: Arc<CudaStream>,
}

// SAFETY: the memory belongs to this struct alone, and any thread may free it.
unsafe impl Send for Pinned {}

impl Pinned {
    fn new(cuda: &Cuda, len: usize) -> Result<Pinned, DriverError> {
        // waiting threads sleep: there is a tokenizer to read, and there may be a reader for each CPU
        let sent = cuda.context.new_event(Some(sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC))?;
        // SAFETY: `new_event` made the context current in this thread. Flags 0 is cached memory: write-combined memory
        // would be read slowly where elements are converted in place. It is written once, so that it is a slice of u8
        // from then on.
        let memory = unsafe {
            let memory = result::malloc_host(len, 0)?.cast::<u8>();
            memory.write_bytes(0, len);
            memory
        };
        Ok(Pinned { memory, len, sent, stream: cuda.stream.clone() })
    }

    fn send(&self, parts: &[Part]) -> Result<(), DriverError> {
        self.stream.context().bind_to_thread()?;
        for Part { from, to } in parts {
            assert!(from.end <= self.len, "a part beyond the buffer");
            // SAFETY: the slice is inside the memory, which is not written before `sent` is waited for and not freed
            // before the stream is; upload_weights and room_for made the target part of an allocation that the tensors
            // fill exactly, and the stream orders its release after this copy.
            unsafe {
                let bytes = slice::from_raw_parts(self.memory.add(from.start), from.len());
                result::memcpy_htod_async(*to, bytes, self.stream.cu_stream())?;
            }
        }
        self.sent.record(&self.stream)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // waits for the stream and not only for the event, which is out of date if `send` failed half-way
        let _ = self.stream.synchronize();
        // SAFETY: from malloc_host, and nothing that was enqueued reads it any more. `synchronize` made the context
        // current.
        let _ = unsafe { result::free_host(self.memory.cast()) };
    }
}

impl Sink for Ring<'_> {
    type Buffer = Pinned;

    fn buffer(&self, len: usize) -> Result<Pinned> {
        Pinned::new(self.0, len).map_err(failed(|| format!("page-locking {len} bytes")))
    }

    fn bytes<'b>(&self, buffer: &'b mut Pinned) -> Result<&'b mut [u8]> {
        buffer.sent.synchronize().map_err(failed(|| "waiting for a copy of weights".into()))?;
        // SAFETY: `len` bytes, written when they were allocated; the device reads them no more, and the borrow of the
        // buffer keeps them from being sent.
        Ok(unsafe { slice::from_raw_parts_mut(buffer.memory, buffer.len) })
    }

    fn send(&self, buffer: &mut Pinned, parts: &[Part]) -> Result<()> {
        let bytes = || parts.iter().map(|p| p.from.len()).sum::<usize>();
        buffer.send(parts).map_err(failed(|| format!("copying {} bytes of weights", bytes())))
    }
}
