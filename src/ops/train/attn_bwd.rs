//! The gradients of q, k and v from `dout`, that of [`AttnPacked`]'s `out`, as FlashAttention-2 computes them (Dao 2023): with
//! `p = exp(q k^T / sqrt(head_dim) - lse)`, `delta = sum_i out_i dout_i` and `ds = p (dout v^T - delta) / sqrt(head_dim)`,
//! `dq = ds k`, `dk = ds^T q` and `dv = p^T dout`; a key head sums over its query heads.
//!
//! Shapes: `dqkv` and `qkv` [rows, (n_heads + 2 n_kv_heads) * head_dim], `dout` and `out` [rows, n_heads * head_dim], `lse` [rows, n_heads]
//! f32, `starts` [documents + 1]. q and k, and their gradients, are those after rotation.

use super::{AttnPacked, Real};
use crate::{
    backend::train::TrainBackend,
    error::Result,
    ops::{Cost, Grid, Op, Tolerance, download, expect, noise_buf, poison},
    tiles,
};

/// Sizes of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct AttnBwd(
    /// Those of the forward pass.
    pub AttnPacked,
);

impl AttnBwd {
    /// Buffer lengths fit the sizes.
    ///
    /// # Errors
    /// `Op` names what does not.
    pub fn check(&self, dqkv: usize, dout: usize, out: usize, qkv: usize, lse: usize, starts: usize) -> Result<()> {
        self.0.check(out.min(dout), lse, qkv.min(dqkv), starts)?;
        expect(Self::STEM, self.0.rows > 0, || format!("{self:?}: no rows"))
    }

    /// The definition.
    pub fn reference<X: Real>(&self, dqkv: &mut [X], dout: &[X], out: &[X], qkv: &[X], starts: &[u32]) {
        let op = &self.0;
        let (d, n, q_dim) = (op.head_dim, op.qkv_dim(), op.q_dim());
        let (group, scale) = (op.n_heads / op.n_kv_heads, 1.0 / (d as f64).sqrt());
        let mut sums = vec![0f64; op.rows * n];
        for document in starts[..=op.documents].windows(2) {
            let (start, end) = (document[0] as usize, document[1] as usize);
            for (r, h) in (start..end).flat_map(|r| (0..op.n_heads).map(move |h| (r, h))) {
                let (p, _) = op.weights(qkv, start, r, h);
                let (dout, out) = (&dout[r * q_dim + h * d..][..d], &out[r * q_dim + h * d..][..d]);
                let delta: f64 = dout.iter().zip(out).map(|(a, b)| a.get() * b.get()).sum();
                let [q, k, v] = [h, op.n_heads + h / group, op.n_heads + op.n_kv_heads + h / group].map(|h| h * d);
                for (t, p) in (start..).zip(p) {
                    let value = &qkv[t * n + v..][..d];
                    let dp: f64 = dout.iter().zip(value).map(|(a, b)| a.get() * b.get()).sum();
                    let ds = p * (dp - delta) * scale;
                    for i in 0..d {
                        sums[r * n + q + i] += ds * qkv[t * n + k + i].get();
                        sums[t * n + k + i] += ds * qkv[r * n + q + i].get();
                        sums[t * n + v + i] += p * dout[i].get();
                    }
                }
            }
        }
        dqkv.iter_mut().zip(sums).for_each(|(to, sum)| *to = X::put(sum));
    }

    /// Blocks over query heads and rows, for the gradients of q, and over key heads and rows, for those of k and v.
    pub fn grids(&self) -> [Grid; 2] {
        let held = if self.0.head_dim <= 64 { 0 } else { tiles::PACKED_ROWS };
        [self.0.grid_of(self.0.n_heads, 0), self.0.grid_of(self.0.n_kv_heads, held)]
    }

    /// The kernels: `delta`, the gradients of q, and those of k and v.
    ///
    /// # Errors
    /// As `check`; sizes that the kernels do not take; those of the launches.
    #[cfg(feature = "cuda")]
    #[expect(clippy::too_many_arguments, reason = "one argument a buffer, named as in the kernel")]
    pub fn launch(
        &self,
        cu: &crate::backend::cuda::Cuda,
        dqkv: &mut crate::backend::cuda::Buffer<half::bf16>,
        dout: &crate::backend::cuda::Buffer<half::bf16>,
        out: &crate::backend::cuda::Buffer<half::bf16>,
        qkv: &crate::backend::cuda::Buffer<half::bf16>,
        lse: &crate::backend::cuda::Buffer<f32>,
        starts: &crate::backend::cuda::Buffer<u32>,
    ) -> Result<()> {
        use crate::backend::cuda::Arg;
        self.check(dqkv.len(), dout.len(), out.len(), qkv.len(), lse.len(), starts.len())?;
        let op = &self.0;
        op.check_kernel(Self::STEM)?;
        let (d, count) = (op.head_dim, op.rows * op.n_heads);
        let (warps, threads) = (tiles::PACKED_THREADS / 32, tiles::PACKED_THREADS);
        let of_delta = Grid { blocks: [count.div_ceil(warps as usize) as u32, 1, 1], threads, shared: 0 };
        let sizes = [op.rows, op.documents, op.n_heads, op.n_kv_heads].map(Arg::from);
        let scale = 1.0 / (d as f32).sqrt();
        let [of_q, of_kv] = self.grids();
        cu.with_workspace(count, 0, |delta, _| {
            let buffers: [Arg; 6] = [(&*dqkv).into(), dout.into(), qkv.into(), lse.into(), delta.into(), starts.into()];
            let args = [&buffers[..], &sizes, &[scale.into()]].concat();
            // SAFETY: check() proved that the buffers hold rows rows and starts documents + 1 elements; that these rise from 0 to rows
            // is the caller's promise. delta holds one element for each row and head, and no other kernel uses it at the same
            // time, since the stream runs one after the other. The arguments are those of the kernels, in order.
            unsafe {
                let args_of_delta: [Arg; 5] = [delta.into(), dout.into(), out.into(), count.into(), d.into()];
                cu.launch("attn_bwd_delta_f32", self, of_delta, &args_of_delta)?;
                cu.launch(&format!("attn_bwd_q_bf16_d{d}"), self, of_q, &args)?;
                cu.launch(&format!("attn_bwd_kv_bf16_d{d}"), self, of_kv, &args)
            }
        })
    }
}

impl Op for AttnBwd {
    const STEM: &'static str = "attn_bwd";
    /// `dqkv`, `dout`, `out`, `qkv`, `lse`, `starts`
    type Io<B: TrainBackend> =
        (B::Buf<B::Act>, B::Buf<B::Act>, B::Buf<B::Act>, B::Buf<B::Act>, B::Buf<f32>, B::Buf<u32>);

    fn cases() -> Vec<Self> {
        AttnPacked::cases().into_iter().map(AttnBwd).collect()
    }

    fn odd() -> Vec<Self> {
        AttnPacked::odd().into_iter().map(AttnBwd).collect()
    }

    fn cost(&self) -> Cost {
        let op = &self.0;
        let (out, qkv) = ((op.rows * op.q_dim()) as u64, (op.rows * op.qkv_dim()) as u64);
        let flops = 10 * op.pairs() * op.q_dim() as u64;
        Cost { read: 2 * qkv + 4 * out + 4 * (op.rows * op.n_heads) as u64, write: 2 * qkv, flops }
    }

    fn tolerance(&self) -> Tolerance {
        // dp - delta cancels, so what was rounded before counts for more
        Tolerance { l2: 2e-3, worst: 1.6e-2 }
    }

    /// The kernel rounds weights and gradients of scores to bf16: a relative L2 of 2.8e-3 over the small cases, the worst element
    /// 1.9e-2.
    fn kernel_tolerance(&self) -> Tolerance {
        Tolerance { l2: Tolerance::FUSED.l2, worst: 2.5e-2 }
    }

    fn setup<B: TrainBackend>(&self, b: &B, seed: u64) -> Result<Self::Io<B>> {
        let op = &self.0;
        let mut forward = op.setup(b, seed)?;
        op.run(b, &mut forward)?;
        let (out, lse, qkv, starts) = forward;
        let dout = noise_buf(b, op.rows * op.q_dim(), seed + 1, 1.0)?;
        Ok((poison(b, op.rows * op.qkv_dim())?, dout, out, qkv, lse, starts))
    }

    fn run<B: TrainBackend>(&self, b: &B, (dqkv, dout, out, qkv, lse, starts): &mut Self::Io<B>) -> Result<()> {
        b.attn_bwd(self, dqkv, dout, out, qkv, lse, starts)
    }

    fn outputs<B: TrainBackend>(&self, b: &B, (dqkv, ..): &Self::Io<B>) -> Result<Vec<f32>> {
        download(b, dqkv)
    }
}

#[cfg(test)]
mod tests {
    use super::super::checks::{dot, gradient, values};
    use super::*;

    #[test]
    fn is_the_gradient_of_attention() {
        for (rows, documents, n_heads, n_kv_heads) in [(4, 1, 1, 1), (7, 3, 4, 2)] {
            let op = AttnPacked { rows, documents, n_heads, n_kv_heads, head_dim: 4 };
            let (qkv, dout) = (values(rows * op.qkv_dim(), 1, 2.0), values(rows * op.q_dim(), 2, 1.0));
            let starts = op.starts();
            let forward = |qkv: &[f64]| {
                let (mut out, mut lse) = (vec![f64::NAN; rows * op.q_dim()], vec![f64::NAN; rows * n_heads]);
                op.reference(&mut out, &mut lse, qkv, &starts);
                out
            };
            let mut dqkv = vec![f64::NAN; qkv.len()];
            AttnBwd(op.clone()).reference(&mut dqkv, &dout, &forward(&qkv), &qkv, &starts);
            gradient("attn_bwd", |qkv| dot(&forward(qkv), &dout), &qkv, &dqkv);
        }
    }
}
