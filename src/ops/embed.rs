//! `x[r, i] = table[tokens[r], i]`
//!
//! Shapes: `x` [rows, dim], `tokens` [at least rows], `table` [vocab, dim]. Exact.

use super::{Act, Cost, Grid, Op, Tolerance, download, expect, noise_ids, noise_weight, poison};
use crate::{backend::train::TrainBackend, error::Result};

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct Embed {
    /// Tokens.
    pub rows: usize,
    /// Width.
    pub dim: usize,
    /// Rows of the table; the caller proves that each token is below.
    pub vocab: usize,
}

impl Embed {
    /// Buffer lengths fit the sizes.
    pub fn check(&self, x: usize, tokens: usize, table: (usize, usize)) -> Result<()> {
        expect(Self::STEM, table == (self.vocab, self.dim), || format!("table is {table:?}, {self:?}"))?;
        expect(Self::STEM, self.rows > 0 && tokens >= self.rows && x >= self.rows * self.dim, || {
            format!("x has {x} elements and tokens {tokens}, {self:?}")
        })
    }

    /// Blocks over rows and columns, 8 elements a thread.
    pub fn grid(&self) -> Grid {
        Grid::of_vectors(self.rows, self.dim)
    }

    /// The definition.
    pub fn reference<A: Act, W: Act>(&self, x: &mut [A], tokens: &[u32], table: &[W]) {
        for (x, &t) in x.chunks_exact_mut(self.dim).zip(&tokens[..self.rows]) {
            for (x, w) in x.iter_mut().zip(&table[t as usize * self.dim..][..self.dim]) {
                *x = A::from_f32(w.to_f32());
            }
        }
    }

    /// The kernel.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        cu: &crate::backend::cuda::Cuda,
        x: &mut crate::backend::cuda::Buffer<half::bf16>,
        tokens: &crate::backend::cuda::Buffer<u32>,
        table: &crate::backend::cuda::Weight,
    ) -> Result<()> {
        self.check(x.len(), tokens.len(), (table.rows, table.cols))?;
        expect(Self::STEM, self.dim.is_multiple_of(8), || format!("{self:?}: the kernel needs dim % 8 == 0"))?;
        super::expect_ints(Self::STEM, &[self.rows, self.dim])?;
        // SAFETY: check() proved that rows rows of x and rows tokens exist and that the table is [vocab, dim]; each token is
        // below vocab by the caller's promise. The arguments are those of the kernel, in order.
        unsafe {
            cu.launch_dependent(
                "embed_bf16",
                self,
                self.grid(),
                &[x.into(), tokens.into(), (&table.data).into(), self.dim.into(), cu.trace(self, self.grid())],
            )
        }
    }
}

impl Op for Embed {
    const STEM: &'static str = "embed";
    type Io<B: TrainBackend> = (B::Buf<B::Act>, B::Buf<u32>, B::Weight);

    fn cases() -> Vec<Self> {
        let case = |rows, dim, vocab| Embed { rows, dim, vocab };
        // the vocabulary of Llama-3-8B is 128256; what counts are the rows read, and 4096 keep the table at 32 MiB
        vec![
            case(1, 8, 2),
            case(3, 64, 7),
            case(5, 576, 100),
            case(2, 1032, 33),
            case(1, 4096, 4096),
            case(512, 4096, 4096),
        ]
    }

    fn is_small(&self) -> bool {
        self.vocab * self.dim < 1 << 20
    }

    fn cost(&self) -> Cost {
        let n = (self.rows * self.dim) as u64;
        Cost { read: 2 * n + 4 * self.rows as u64, write: 2 * n, flops: 0 }
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance::EXACT
    }

    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>> {
        Ok((
            poison(b, self.rows * self.dim)?,
            b.upload(&noise_ids(self.rows, self.vocab, seed))?,
            noise_weight(b, self.vocab, self.dim, seed + 1, 1.0)?,
        ))
    }

    fn run<B: TrainBackend>(&self, b: &B, (x, tokens, table): &mut Self::Io<B>) -> Result<()> {
        b.embed(self, x, tokens, table)
    }

    fn outputs<B: TrainBackend>(&self, b: &B, (x, ..): &Self::Io<B>) -> Result<Vec<f32>> {
        download(b, x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_gets_its_row() {
        let op = Embed { rows: 2, dim: 2, vocab: 3 };
        let mut x = [0f32; 4];
        op.reference(&mut x, &[2, 0], &[0.0, 1.0, 10.0, 11.0, 20.0, 21.0f32]);
        assert_eq!(x, [20.0, 21.0, 0.0, 1.0]);
    }

    #[test]
    fn check_and_grid() {
        let op = Embed { rows: 2, dim: 1032, vocab: 3 };
        assert!(op.check(2064, 2, (3, 1032)).is_ok());
        assert!(op.check(2063, 2, (3, 1032)).unwrap_err().to_string().starts_with("embed: x has 2063 elements"));
        assert!(op.check(2064, 2, (1032, 3)).unwrap_err().to_string().starts_with("embed: table is (1032, 3)"));
        assert_eq!(op.grid().blocks, [2, 2, 1]); // 1024 columns a block
    }
}
