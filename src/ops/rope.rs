//! Rotary position embedding, *half-split* (Hugging Face's layout, not the interleaved one of the paper, Su et al. 2021):
//! for `i < head_dim / 2`, the pair `(a, b) = (h[i], h[i + head_dim / 2])` of a head becomes `(a c - b s, b c + a s)` with
//! `c, s = cos, sin` of `t * inv_freq[i]`, where `t = pos[r] % max_seq` is the row's position.
//!
//! Shapes: `qkv` [rows, (n_heads + 2 n_kv_heads) * head_dim], of which the q and k heads are rotated in place; `pos`
//! [at least rows], [places](crate::model::kv) (sequence and position in one number); `table` [positions, head_dim]
//! f32, in which a row holds the cosines and then the sines of a position.
//! Rounding: f32 arithmetic, one rounding at the store.

use super::{Act, Cost, Grid, Op, Tolerance, download, expect, noise, noise_buf};
use crate::{backend::train::TrainBackend, error::Result, files::config::Config};

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Tokens.
    pub rows: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key heads, as many as value heads.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Positions of a sequence, which turn a place into a position.
    pub max_seq: usize,
    /// Positions in the table. The caller ensures that each position is below.
    pub positions: usize,
}

impl Rope {
    /// Elements of a row of `qkv`.
    pub fn qkv_dim(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
    }

    /// Buffer lengths fit the sizes.
    pub fn check(&self, qkv: usize, pos: usize, table: usize) -> Result<()> {
        expect(Self::STEM, self.head_dim.is_multiple_of(2) && self.max_seq > 0, || {
            format!("{self:?}: head_dim must be even and max_seq positive")
        })?;
        expect(Self::STEM, self.rows > 0 && qkv >= self.rows * self.qkv_dim() && pos >= self.rows, || {
            format!("qkv has {qkv} elements and pos {pos}, {self:?}")
        })?;
        expect(Self::STEM, table >= self.positions * self.head_dim, || format!("table has {table} elements, {self:?}"))
    }

    /// The table for `inv_freq` [head_dim / 2]: angles in f32 as Hugging Face computes them, cosines and sines exact to f32.
    pub fn table(inv_freq: &[f32], max_seq: usize) -> Vec<f32> {
        let mut table = Vec::with_capacity(max_seq * inv_freq.len() * 2);
        (0..max_seq).for_each(|t| row(&mut table, t, inv_freq));
        table
    }

    /// The table of a model: by its frequencies, which may differ from position to position beyond the trained length,
    /// and its attention factor.
    pub fn table_of(config: &Config, max_seq: usize) -> Vec<f32> {
        let fixed = config.rope_fixed_until().min(max_seq);
        let mut table = Rope::table(&config.rope_inv_freq(), fixed);
        (fixed..max_seq).for_each(|t| row(&mut table, t, &config.rope_inv_freq_at(t)));
        let factor = config.rope_attention_factor();
        table.iter_mut().for_each(|x| *x *= factor);
        table
    }

    /// Blocks over rows and pairs, 8 pairs a thread.
    pub fn grid(&self) -> Grid {
        Grid::of_vectors(self.rows, (self.n_heads + self.n_kv_heads) * self.head_dim / 2)
    }

    /// The definition.
    pub fn reference<A: Act>(&self, qkv: &mut [A], pos: &[u32], table: &[f32]) {
        let half = self.head_dim / 2;
        for (row, &t) in qkv.chunks_exact_mut(self.qkv_dim()).zip(&pos[..self.rows]) {
            let (cos, sin) = table[t as usize % self.max_seq * self.head_dim..][..self.head_dim].split_at(half);
            for head in row.chunks_exact_mut(self.head_dim).take(self.n_heads + self.n_kv_heads) {
                for i in 0..half {
                    let (a, b) = (head[i].to_f32(), head[i + half].to_f32());
                    head[i] = A::from_f32(a * cos[i] - b * sin[i]);
                    head[i + half] = A::from_f32(b * cos[i] + a * sin[i]);
                }
            }
        }
    }

    /// The kernel.
    #[cfg(feature = "cuda")]
    pub fn launch(
        &self,
        cu: &crate::backend::cuda::Cuda,
        qkv: &mut crate::backend::cuda::Buffer<half::bf16>,
        pos: &crate::backend::cuda::Buffer<u32>,
        table: &crate::backend::cuda::Buffer<f32>,
    ) -> Result<()> {
        self.check(qkv.len(), pos.len(), table.len())?;
        expect(Self::STEM, self.head_dim.is_multiple_of(16), || {
            format!("{self:?}: the kernel needs head_dim % 16 == 0; the CPU runs any even head_dim")
        })?;
        super::expect_ints(Self::STEM, &[self.rows, self.qkv_dim(), self.max_seq])?;
        let rotated = self.n_heads + self.n_kv_heads;
        // SAFETY: check() proved that rows rows of qkv, rows places and `positions` rows of the table exist; each position
        // is one of these by the caller's promise. The arguments are those of the kernel, in order.
        unsafe {
            cu.launch(
                "rope_bf16",
                self,
                self.grid(),
                &[
                    qkv.into(),
                    pos.into(),
                    table.into(),
                    self.qkv_dim().into(),
                    rotated.into(),
                    self.head_dim.into(),
                    self.max_seq.into(),
                    cu.trace(self, self.grid()),
                ],
            )
        }
    }
}

/// Appends the cosines and then the sines of position `t`.
fn row(table: &mut Vec<f32>, t: usize, inv_freq: &[f32]) {
    let angles = || inv_freq.iter().map(|f| f64::from(t as f32 * f));
    table.extend(angles().map(|a| a.cos() as f32));
    table.extend(angles().map(|a| a.sin() as f32));
}

impl Op for Rope {
    const STEM: &'static str = "rope";
    type Io<B: TrainBackend> = (B::Buf<B::Act>, B::Buf<u32>, B::Buf<f32>);

    fn cases() -> Vec<Self> {
        let case = |rows, n_heads, n_kv_heads, head_dim| Rope {
            rows,
            n_heads,
            n_kv_heads,
            head_dim,
            max_seq: 500,
            positions: 700,
        };
        vec![
            case(1, 1, 1, 16),
            case(3, 3, 1, 48),
            case(5, 9, 3, 64),
            case(2, 17, 1, 128),
            case(1, 32, 8, 128),
            case(512, 32, 8, 128),
        ]
    }

    fn cost(&self) -> Cost {
        let rotated = (self.rows * (self.n_heads + self.n_kv_heads) * self.head_dim) as u64;
        let (table, pos) = (4 * (self.rows * self.head_dim) as u64, 4 * self.rows as u64);
        Cost { read: 2 * rotated + table + pos, write: 2 * rotated, flops: 3 * rotated }
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance::EXACT // no fused multiply-add on either side
    }

    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>> {
        let pos: Vec<u32> =
            (0..self.rows as u32).map(|r| (r * 7 + seed as u32 * 31) % (3 * self.max_seq as u32)).collect();
        Ok((
            noise_buf(b, self.rows * self.qkv_dim(), seed, 3.0)?,
            b.upload(&pos)?,
            b.upload(&noise(self.positions * self.head_dim, seed + 1))?,
        ))
    }

    fn run<B: TrainBackend>(&self, b: &B, (qkv, pos, table): &mut Self::Io<B>) -> Result<()> {
        b.rope(self, qkv, pos, table)
    }

    fn outputs<B: TrainBackend>(&self, b: &B, (qkv, ..): &Self::Io<B>) -> Result<Vec<f32>> {
        download(b, qkv)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotates_pairs_half_a_head_apart_and_leaves_v() {
        let op = Rope { rows: 1, n_heads: 1, n_kv_heads: 1, head_dim: 4, max_seq: 2, positions: 2 };
        let quarter = std::f32::consts::FRAC_PI_2;
        let table = Rope::table(&[quarter, 0.0], 2); // position 1 turns the first pair by 90 degrees
        let mut qkv = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0f32];
        op.reference(&mut qkv, &[2 + 1], &table); // of the second sequence
        let want = [-3.0, 2.0, 1.0, 4.0, -7.0, 6.0, 5.0, 8.0, 9.0, 10.0, 11.0, 12.0];
        assert!(qkv.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-5), "{qkv:?}");
    }

    #[test]
    fn a_rotation_by_two_angles_is_one_by_their_sum() {
        let op = Rope { rows: 1, n_heads: 1, n_kv_heads: 0, head_dim: 8, max_seq: 50, positions: 50 };
        let table = Rope::table(&[1.0, 0.3, 0.1, 0.01], 50);
        let (mut twice, mut once) = (noise(8, 3), noise(8, 3));
        op.reference(&mut twice, &[19], &table);
        op.reference(&mut twice, &[23], &table);
        op.reference(&mut once, &[42], &table);
        assert!(twice.iter().zip(&once).all(|(a, b)| (a - b).abs() < 1e-5), "{twice:?} {once:?}");
    }

    #[test]
    fn check_and_grid() {
        let op = Rope { rows: 2, n_heads: 32, n_kv_heads: 8, head_dim: 128, max_seq: 9, positions: 9 };
        let n = 2 * op.qkv_dim();
        assert!(op.check(n, 2, 9 * 128).is_ok());
        assert!(op.check(n, 1, 9 * 128).unwrap_err().to_string().starts_with("rope: qkv has 12288 elements and pos 1"));
        assert!(op.check(n, 2, 9 * 128 - 1).unwrap_err().to_string().starts_with("rope: table has 1151"));
        assert_eq!(op.grid().blocks, [2, 3, 1]); // 40 heads of 64 pairs, 1024 pairs a block
    }
}
