//! Computes how many blocks of a kernel a streaming multiprocessor (SM) holds at once.
//!
//! The limits of each compute capability are from the CUDA C++ programming guide, "Technical Specifications per Compute
//! Capability". How registers and shared memory are handed out is from `cuda_occupancy.h` of the CUDA toolkit.

use crate::{
    ops::{Ring, product},
    tiles,
};

/// Registers of an SM, of every capability here.
const REGISTERS: u32 = 64 << 10;
/// A warp gets registers in units of this many.
const REGISTER_UNIT: u32 = 256;
/// An SM has this many parts, each with registers and a scheduler of its own; a warp lives in one of them.
const PARTS: u32 = 4;
/// A block gets shared memory in units of this many bytes, including what the system keeps for itself.
const SHARED_UNIT: u32 = 128;
const SHARED_OF_SYSTEM: u32 = 1 << 10;
/// Most threads of a block.
const BLOCK_THREADS: u32 = 1024;

/// The ring (see `kernels/common/gemv.cuh`) for products of one row, on a device whose multiprocessors have this much
/// shared memory: the deep one if `GEMV_DEEP_BLOCKS` blocks with it fit.
pub fn ring(shared_per_sm: u32) -> Ring {
    let (largest, _) = product(tiles::GEMV_TILE as usize, 1, true, Ring::Deep);
    match blocks_by_shared(shared_per_sm, largest.shared) >= tiles::GEMV_DEEP_BLOCKS {
        true => Ring::Deep,
        false => Ring::Short,
    }
}

/// How many blocks of `shared` bytes fit the shared memory of a multiprocessor.
fn blocks_by_shared(shared_per_sm: u32, shared: u32) -> u32 {
    shared_per_sm / (shared + SHARED_OF_SYSTEM).next_multiple_of(SHARED_UNIT)
}

/// What an SM holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sm {
    /// Threads of all its blocks.
    pub threads: u32,
    /// Blocks.
    pub blocks: u32,
    /// Bytes of shared memory.
    pub shared: u32,
}

impl Sm {
    /// The SM of a compute capability; `None` for one that is not known.
    pub fn of((major, minor): (i32, i32)) -> Option<Sm> {
        let (threads, blocks, kilobytes) = match (major, minor) {
            (8, 0) => (2048, 32, 164),
            (8, 7) => (1536, 16, 164),
            (8, 9) => (1536, 24, 100),
            (8, _) => (1536, 16, 100),
            (9 | 10, _) => (2048, 32, 228),
            (11, _) => (1536, 24, 228),
            (12, _) => (1536, 24, 100),
            _ => return None,
        };
        Some(Sm { threads, blocks, shared: kilobytes << 10 })
    }
}

/// What an SM holds of one kernel.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Occupancy {
    /// Blocks at once; 0 if it cannot be launched like this.
    pub blocks_per_sm: u32,
    /// Their warps, as a share of the most that an SM holds.
    pub occupancy: f64,
    /// What there would have to be more of to hold another block: `registers`, `shared memory`, `threads` or `blocks`.
    pub limit: &'static str,
}

/// The occupancy of blocks of `threads` threads, with `registers` for each thread and `shared` bytes (static and
/// dynamic) for each block, when as much of the SM's memory as possible is shared memory. `None` for a capability that
/// is not known.
pub fn occupancy(capability: (i32, i32), threads: u32, registers: u32, shared: u32) -> Option<Occupancy> {
    let sm = Sm::of(capability)?;
    let warps = threads.div_ceil(32).max(1);
    let of_warp = (registers * 32).next_multiple_of(REGISTER_UNIT).max(1);
    // whether a single block fits is checked as if its warps were spread evenly over the parts
    let fits = threads <= BLOCK_THREADS && of_warp * warps.next_multiple_of(PARTS) <= REGISTERS;
    let limits = [
        ("registers", REGISTERS / PARTS / of_warp * PARTS / warps),
        ("shared memory", blocks_by_shared(sm.shared, shared)),
        ("threads", sm.threads / 32 / warps),
        ("blocks", sm.blocks),
    ];
    let (limit, blocks) = limits.into_iter().min_by_key(|(_, n)| *n)?;
    let blocks_per_sm = if fits { blocks } else { 0 };
    let limit = if !fits && threads > BLOCK_THREADS { "threads" } else { limit };
    Some(Occupancy { blocks_per_sm, occupancy: f64::from(blocks_per_sm * warps * 32) / f64::from(sm.threads), limit })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `cudaOccMaxActiveBlocksPerMultiprocessor` of CUDA 13.0's `cuda_occupancy.h` answers, with the largest carveout.
    #[test]
    fn blocks_as_nvidia_counts_them() {
        let capabilities = [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (11, 0), (12, 0)];
        for (threads, registers, shared, expected) in [
            (128, 122, 2048, [4, 4, 4, 4, 4, 4, 4, 4]), // gemv in its first form
            (32, 16, 0, [32, 16, 16, 24, 32, 32, 24, 24]),
            (256, 255, 0, [1; 8]),
            (96, 40, 0, [16; 8]),
            (1024, 64, 0, [1; 8]),
            (1024, 65, 0, [0; 8]),
            (128, 32, 101_376, [1, 1, 1, 1, 2, 2, 2, 1]),
            (256, 90, 49_152, [2; 8]),
            (64, 33, 24_000, [6, 4, 6, 4, 9, 9, 9, 4]),
            (32, 255, 0, [8; 8]),
            (128, 128, 57_344, [2, 1, 2, 1, 4, 4, 4, 1]),
            (100, 72, 100, [7; 8]),
            (128, 24, 232_448, [0, 0, 0, 0, 1, 1, 1, 0]),
            (192, 170, 0, [1; 8]),
            (288, 112, 0, [1; 8]),
            (64, 200, 7000, [4; 8]),
        ] {
            let got = capabilities.map(|c| occupancy(c, threads, registers, shared).unwrap().blocks_per_sm);
            assert_eq!(got, expected, "{threads} threads, {registers} registers, {shared} bytes");
        }
    }

    /// Blocks of the products that an SM of each generation holds, by shared memory, with the ring that it gets.
    #[test]
    fn rings_fit_the_generation() {
        for (capability, expected_ring, expected) in [
            // rows of x:                1  8  9  16
            ((8, 0), Ring::Short, [4, 3, 3, 2]),
            ((8, 6), Ring::Short, [2, 1, 1, 1]),
            ((8, 7), Ring::Short, [4, 3, 3, 2]),
            ((8, 9), Ring::Short, [2, 1, 1, 1]),
            ((9, 0), Ring::Deep, [3, 4, 4, 3]),
            ((10, 0), Ring::Deep, [3, 4, 4, 3]),
            ((11, 0), Ring::Deep, [3, 4, 4, 3]),
            ((12, 0), Ring::Short, [2, 1, 1, 1]),
        ] {
            let sm = Sm::of(capability).unwrap();
            assert_eq!(ring(sm.shared), expected_ring, "{capability:?}");
            let blocks = |rows| blocks_by_shared(sm.shared, product(4096, rows, true, ring(sm.shared)).0.shared);
            assert_eq!([1, 8, 9, 16].map(blocks), expected, "{capability:?}");
        }
        let of_h100 = |norm, ring| blocks_by_shared(228 << 10, product(4096, 1, norm, ring).0.shared);
        assert_eq!([of_h100(true, Ring::Short), of_h100(false, Ring::Short)], [6, 6]);
    }

    #[test]
    fn what_limits() {
        let limit = |threads, registers, shared| occupancy((9, 0), threads, registers, shared).unwrap().limit;
        assert_eq!(limit(128, 122, 2048), "registers");
        assert_eq!(limit(128, 32, 100 << 10), "shared memory");
        assert_eq!(limit(1024, 16, 0), "threads");
        assert_eq!(limit(32, 16, 0), "blocks");
        assert_eq!((limit(2048, 16, 0), limit(1024, 65, 0)), ("threads", "registers"));
        assert_eq!(occupancy((9, 0), 128, 122, 2048).unwrap().occupancy, 0.25);
        assert_eq!(occupancy((7, 5), 128, 16, 0), None);
    }
}
