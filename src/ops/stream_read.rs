//! `out[b]` = the sum, modulo 2^32, of the words of `x` that block `b` reads: it reads memory as fast as possible.
//!
//! Not an op of the architecture, but the measure for those that are: a decode step reads each weight once, so no step
//! can be faster than this op reading as many bytes. The sums only keep the compiler from removing the loads.
//! Shapes: `out` [blocks], `x` [words]. Block `b` reads tiles `b`, `b + blocks`, ... of `TILE` words each.
//! Rounding: none.

use super::{Cost, Grid, Op, Tolerance, expect, noise};
use crate::{backend::train::TrainBackend, error::Result, tiles};

/// Words that a block reads at a time.
const TILE: usize = (tiles::STREAM_THREADS * tiles::STREAM_LOADS * 4) as usize;

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct StreamRead {
    /// Blocks, which share the tiles in turn.
    pub blocks: usize,
    /// 32-bit words read.
    pub words: usize,
}

impl StreamRead {
    /// Blocks that are on the device at the same time.
    pub fn blocks(sm_count: u32) -> usize {
        4 * sm_count as usize // __launch_bounds__ of the kernel
    }

    /// Buffer lengths fit the sizes.
    pub fn check(&self, out: usize, x: usize) -> Result<()> {
        expect(Self::STEM, self.blocks > 0 && self.words > 0, || format!("{self:?}: no blocks or no words"))?;
        expect(Self::STEM, out >= self.blocks && x >= self.words, || {
            format!("out has {out} elements and x {x}, {self:?}")
        })
    }

    /// The blocks of the call.
    pub fn grid(&self) -> Grid {
        Grid { blocks: [self.blocks as u32, 1, 1], threads: tiles::STREAM_THREADS, shared: 0 }
    }

    /// The definition.
    pub fn reference(&self, out: &mut [u32], x: &[u32]) {
        out[..self.blocks].fill(0);
        for (t, tile) in x[..self.words].chunks(TILE).enumerate() {
            let sum = &mut out[t % self.blocks];
            *sum = tile.iter().fold(*sum, |sum, w| sum.wrapping_add(*w));
        }
    }

    /// The kernel.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        cu: &crate::backend::cuda::Cuda,
        out: &mut crate::backend::cuda::Buffer<u32>,
        x: &crate::backend::cuda::Buffer<u32>,
    ) -> Result<()> {
        self.check(out.len(), x.len())?;
        expect(Self::STEM, self.words.is_multiple_of(4), || format!("{self:?}: the kernel needs words % 4 == 0"))?;
        super::expect_ints(Self::STEM, &[self.blocks, self.words / 4])?;
        // SAFETY: check() proved that blocks words of out and words of x exist; the arguments are those of the kernel, in
        // order.
        unsafe { cu.launch("stream_read_u32", self, self.grid(), &[out.into(), x.into(), (self.words / 4).into()]) }
    }
}

impl Op for StreamRead {
    const STEM: &'static str = "stream_read";
    type Io<B: TrainBackend> = (B::Buf<u32>, B::Buf<u32>);

    fn cases() -> Vec<Self> {
        let case = |(blocks, words)| StreamRead { blocks, words };
        // one load; just past a tile; fewer tiles than blocks; several rounds and a rest; and one that no cache holds
        let cases = [(1, 4), (2, TILE + 8), (3, 2 * TILE), (2, 7 * TILE + 1028), (528, 64 << 20)];
        cases.into_iter().map(case).collect()
    }

    fn cost(&self) -> Cost {
        Cost { read: 4 * self.words as u64, write: 4 * self.blocks as u64, flops: 0 }
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance::EXACT
    }

    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>> {
        let x: Vec<u32> = noise(self.words, seed).into_iter().map(|x| x.to_bits().rotate_left(9)).collect();
        Ok((b.upload(&vec![u32::MAX; self.blocks])?, b.upload(&x)?))
    }

    fn run<B: TrainBackend>(&self, b: &B, (out, x): &mut Self::Io<B>) -> Result<()> {
        b.stream_read(self, out, x)
    }

    /// Both halves of each sum.
    fn outputs<B: TrainBackend>(&self, b: &B, (out, _): &Self::Io<B>) -> Result<Vec<f32>> {
        Ok(b.download(out)?.into_iter().flat_map(|sum| [(sum >> 16) as f32, (sum & 0xffff) as f32]).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_take_tiles_in_turn() {
        let op = StreamRead { blocks: 2, words: 2 * TILE + 4 };
        let x: Vec<u32> = (0..op.words).map(|i| 1 << (8 * (i / TILE))).collect();
        let mut out = [7; 3];
        op.reference(&mut out, &x);
        assert_eq!(out, [TILE as u32 + (4 << 16), (TILE as u32) << 8, 7]);
    }

    #[test]
    fn check_names_the_sizes() {
        let op = StreamRead { blocks: 2, words: 8 };
        assert!(op.check(2, 8).is_ok());
        assert!(op.check(1, 8).unwrap_err().to_string().starts_with("stream_read: out has 1 elements and x 8"));
    }
}
