//! A decode step on the CPU allocates nothing: neither in the sampler nor in attention as the text grows, on any thread.

use aoji::{Device, Engine, Options, Sampling};
use std::{
    alloc::{GlobalAlloc, Layout, System},
    num::NonZeroUsize,
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
};

/// The system's allocator, which counts.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all is the system allocator's; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, SeqCst);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_decode_step_allocates_nothing() {
    let threads = NonZeroUsize::new(2);
    let engine = Engine::open("demo", &Options { device: Device::Cpu, threads, ..Options::default() }).unwrap();
    let prompt: Vec<u32> = (0..115).map(|i| i * 37 % engine.config().vocab as u32).collect();
    let drawn = Sampling { temperature: 1.0, top_k: 40, top_p: 0.9, min_p: 0.01, ..Sampling::default() };
    let free = Sampling { temperature: 1.5, top_p: 0.95, repetition_penalty: 1.1, ..Sampling::default() };
    for sampling in [Sampling::default(), drawn, free] {
        let mut session = engine.session(200).unwrap();
        session.sync(&prompt).unwrap();
        let mut decode = session.decode(&sampling, &[]).unwrap();
        decode.by_ref().take(16).for_each(|token| assert!(token.is_ok())); // past the first part of attention's keys
        let before = ALLOCATIONS.load(SeqCst);
        decode.take(60).for_each(|token| assert!(token.is_ok()));
        assert_eq!(ALLOCATIONS.load(SeqCst) - before, 0, "allocations of 60 steps, {sampling:?}");
    }
}
