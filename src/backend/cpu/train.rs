//! The ops of training on the CPU: threads take rows, products are in [`super::sums`], attention is in
//! [`super::packed`].

use super::{
    Cpu, Weight,
    packed::turn,
    rows as each, scratch,
    sums::{Factor, WIDTH},
    train_rows as rows, weight,
};
use crate::{
    backend::{Shaped, train::TrainBackend},
    error::Result,
    ops::{
        Act,
        train::{
            AdamW, AttnBwd, AttnPacked, GradNorm, LinearCe, LinearDx, LoraDown, LoraDx, LoraGrad, LoraUp, RmsNormBwd,
            SwigluBwd,
        },
    },
};

/// Elements of the logits that are there at once.
const LOGITS: usize = 8 << 20;
impl<A: Act> Cpu<A> {
    /// For rows of `out` [rows, stride]: `finish(row, column of the block, part of the row, sums)`, where the sums are of `u` [rows, rank] and of
    /// `v` [rank, n], and the part is of the `n` columns from `at` on.
    fn low_rank(
        &self,
        out: &mut [A],
        [rows, stride]: [usize; 2],
        [at, n]: [usize; 2],
        u: &[f32],
        v: &[f32],
        finish: impl Fn(usize, usize, &mut [A], &mut [f32]) + Sync,
    ) {
        let rank = v.len() / n;
        let height = rows.div_ceil(4 * self.pool.threads()).clamp(16, 128);
        self.pool.tiles(out, [rows, stride], [height, stride], |first, _, mut tile| {
            for j in (0..n).step_by(WIDTH) {
                let width = WIDTH.min(n - j);
                let fill = |t: usize, n_rows: usize, to: &mut [f32]| {
                    for (to, v) in to.chunks_exact_mut(width).zip(v[t * n..].chunks_exact(n)).take(n_rows) {
                        to.copy_from_slice(&v[j..][..width]);
                    }
                };
                let mut own = [0f32; WIDTH];
                let factor = Factor { p: u, stride: rank, terms: rank };
                self.panel(first, tile.rows(), width, factor, fill, |r, sums| {
                    let own = &mut own[..width];
                    own.copy_from_slice(sums);
                    finish(first + r, j, &mut tile.row(r)[at + j..][..width], own);
                });
            }
        });
    }

    /// `grads` [rank, n] `+= scale * sum_r p[t, r] x[r, j]`, where `row(r, first column, to)` makes a part of a row of `x`.
    fn factor_grad(
        &self,
        grads: &mut [f32],
        [rank, n, rows]: [usize; 3],
        p: &[f32],
        scale: f32,
        row: impl Fn(usize, usize, &mut [f32]) + Sync,
    ) {
        let fill = |r: usize, _: usize, j: usize, width: usize, to: &mut [f32]| {
            to.chunks_exact_mut(width).enumerate().for_each(|(i, to)| row(r + i, j, to));
        };
        let factor = Factor { p, stride: rows, terms: rows };
        self.sums(grads, [rank, n], factor, fill, |_, _, to, sums| rows::add_scaled(self.level, to, sums, scale));
    }

    /// Losses and, where `dx` is to be written, its rows, of some labels.
    fn cross_entropy(
        &self,
        op: &LinearCe,
        loss: &mut [f32],
        dx: &mut [A],
        x: &[A],
        labels: (&[u32], &[u32]),
        w: &Weight,
    ) {
        let (level, (at, target), vocab, dim) = (self.f32s(), labels, op.vocab, op.dim);
        let n = at.len();
        let gathered: Vec<A> = at.iter().flat_map(|r| &x[*r as usize * dim..][..dim]).copied().collect();
        scratch::with(&scratch::LOGITS, n * vocab, |logits| {
            self.product_to(n, logits, &gathered, w, |to, y| to.copy_from_slice(y));
            let mut lse = vec![0f64; n];
            self.pool.tiles(&mut lse, [n, 1], [1, 1], |i, _, mut to| {
                let x = &logits[i * vocab..][..vocab];
                let max = each::max_of(level, x);
                to.row(0)[0] = f64::from(max) + each::sum_exp(level, x, max).ln();
            });
            for i in 0..n {
                loss[i] = (lse[i] - f64::from(logits[i * vocab + target[i] as usize])) as f32;
            }
            if !op.backward {
                return;
            }
            self.pool.tiles(logits, [n, vocab], [1, vocab], |i, _, mut to| {
                let to = to.row(0);
                rows::exp_scaled(level, to, 1.0, lse[i] as f32, op.scale);
                to[target[i] as usize] -= op.scale;
            });
            let mut sums = vec![A::from_f32(0.0); n * dim];
            let fill = |t: usize, n: usize, j: usize, width: usize, to: &mut [f32]| {
                self.fill_from(w, [t, n], [j, width], to);
            };
            let factor = Factor { p: logits, stride: vocab, terms: vocab };
            self.sums(&mut sums, [n, dim], factor, fill, |_, _, to, sums| each::store(level, to, sums));
            for (r, from) in at.iter().zip(sums.chunks_exact(dim)) {
                dx[*r as usize * dim..][..dim].copy_from_slice(from);
            }
        });
    }
}

impl<A: Act> TrainBackend for Cpu<A> {
    fn copy_from(&self, dst: &mut Vec<A>, src: &Vec<A>, len: usize) -> Result<()> {
        dst[..len].copy_from_slice(&src[..len]);
        Ok(())
    }

    fn lora_down(&self, op: &LoraDown, u: &mut Vec<f32>, x: &Vec<A>, params: &Vec<f32>) -> Result<()> {
        op.check(u.len(), x.len(), params.len())?;
        let LoraDown { rows, k, rank, a, dropout } = *op;
        self.dots(u, [rows, rank, k], &params[a..][..rank * k], 1.0, |r, to| {
            rows::widen(self.level, to, &x[r * k..][..k]);
            rows::drop(self.level, to, dropout, r * k);
        });
        Ok(())
    }

    fn lora_up(&self, op: &LoraUp, y: &mut Vec<A>, u: &Vec<f32>, params: &Vec<f32>) -> Result<()> {
        op.check(y.len(), u.len(), params.len())?;
        let LoraUp { rows, n, rank, b, stride, at, scale } = *op;
        self.low_rank(y, [rows, stride], [at, n], u, &params[b..][..rank * n], |_, _, y, sums| {
            rows::add_scaled(self.level, y, sums, scale);
        });
        Ok(())
    }

    fn attn_packed(
        &self,
        op: &AttnPacked,
        out: &mut Vec<A>,
        lse: &mut Vec<f32>,
        qkv: &Vec<A>,
        starts: &Vec<u32>,
    ) -> Result<()> {
        op.check(out.len(), lse.len(), qkv.len(), starts.len())?;
        self.packed(op, out, lse, qkv, starts);
        Ok(())
    }

    fn linear_ce(
        &self,
        op: &LinearCe,
        loss: &mut Vec<f32>,
        dx: &mut Vec<A>,
        x: &Vec<A>,
        at: &Vec<u32>,
        target: &Vec<u32>,
        w: &Weight,
    ) -> Result<()> {
        op.check(loss.len(), dx.len(), x.len(), at.len(), target.len(), w.shape())?;
        if op.backward {
            dx[..op.rows * op.dim].fill(A::from_f32(0.0));
        }
        let chunk = (LOGITS / op.vocab).clamp(16, 256);
        for first in (0..op.labels).step_by(chunk) {
            let some = first..op.labels.min(first + chunk);
            let labels = (&at[some.clone()], &target[some.clone()]);
            self.cross_entropy(op, &mut loss[some], dx, x, labels, w);
        }
        Ok(())
    }

    fn rms_norm_bwd(&self, op: &RmsNormBwd, dx: &mut Vec<A>, dy: &Vec<A>, x: &Vec<A>, w: &Weight) -> Result<()> {
        op.check(dx.len(), dy.len(), x.len(), w.len())?;
        let &RmsNormBwd { rows, dim, eps, add } = op;
        let part = |r: usize| r * dim..(r + 1) * dim;
        self.pool.tiles(dx, [rows, dim], [Self::height(rows, dim), dim], |first, _, mut tile| {
            for r in 0..tile.rows() {
                let (dx, dy, x) = (tile.row(r), &dy[part(first + r)], &x[part(first + r)]);
                match w.single() {
                    Ok(weight::Elements::Bf16(w)) => rows::norm_bwd(self.level, dx, dy, x, w, eps, add),
                    Ok(weight::Elements::F32(w)) => rows::norm_bwd(self.level, dx, dy, x, w, eps, add),
                    Err(_) => unreachable!("a norm's weight is one vector"),
                }
            }
        });
        Ok(())
    }

    fn linear_dx(&self, op: &LinearDx, dx: &mut Vec<A>, dy: &Vec<A>, w: &Weight) -> Result<()> {
        op.check(dx.len(), dy.len(), w.shape())?;
        let LinearDx { rows, n, k } = *op;
        self.wide(&dy[..rows * n], |p| {
            let fill = |t: usize, n: usize, j: usize, width: usize, to: &mut [f32]| {
                self.fill_from(w, [t, n], [j, width], to);
            };
            let factor = Factor { p, stride: n, terms: n };
            self.sums(dx, [rows, k], factor, fill, |_, _, to, sums| each::store(self.level, to, sums));
        });
        Ok(())
    }

    fn lora_grad(
        &self,
        op: &LoraGrad,
        du: &mut Vec<f32>,
        grads: &mut Vec<f32>,
        dy: &Vec<A>,
        x: &Vec<A>,
        u: &Vec<f32>,
        params: &Vec<f32>,
    ) -> Result<()> {
        op.check(du.len(), grads.len(), dy.len(), x.len(), u.len(), params.len())?;
        let &LoraGrad { rows, k, n, rank, a, b, stride, at, scale, dropout } = op;
        let dy_part = |r: usize, j: usize, to: &mut [f32]| {
            rows::widen(self.level, to, &dy[r * stride + at + j..][..to.len()]);
        };
        self.dots(du, [rows, rank, n], &params[b..][..rank * n], scale, |r, to| dy_part(r, 0, to));
        let mut turned = vec![0f32; rows * rank];
        turn(&mut turned, du, rows, rank);
        self.factor_grad(&mut grads[a..][..rank * k], [rank, k, rows], &turned, 1.0, |r, j, to| {
            rows::widen(self.level, to, &x[r * k + j..][..to.len()]);
            rows::drop(self.level, to, dropout, r * k + j);
        });
        turn(&mut turned, u, rows, rank);
        self.factor_grad(&mut grads[b..][..rank * n], [rank, n, rows], &turned, scale, dy_part);
        Ok(())
    }

    fn lora_dx(&self, op: &LoraDx, dx: &mut Vec<A>, du: &Vec<f32>, params: &Vec<f32>) -> Result<()> {
        op.check(dx.len(), du.len(), params.len())?;
        let LoraDx { rows, k, rank, a, dropout } = *op;
        self.low_rank(dx, [rows, k], [0, k], du, &params[a..][..rank * k], |r, j, dx, sums| {
            rows::drop(self.level, sums, dropout, r * k + j);
            each::add(self.level, dx, sums);
        });
        Ok(())
    }

    fn swiglu_bwd(&self, op: &SwigluBwd, d_gate_up: &mut Vec<A>, dh: &Vec<A>, gate_up: &Vec<A>) -> Result<()> {
        op.check(d_gate_up.len(), dh.len(), gate_up.len())?;
        let (n, rows) = (op.ffn_dim, op.rows);
        self.pool.tiles(d_gate_up, [rows, 2 * n], [Self::height(rows, 2 * n), 2 * n], |first, _, mut tile| {
            for r in 0..tile.rows() {
                let (dh, gate_up) = (&dh[(first + r) * n..][..n], &gate_up[(first + r) * 2 * n..][..2 * n]);
                rows::swiglu_bwd(self.level, tile.row(r), dh, gate_up);
            }
        });
        Ok(())
    }

    fn attn_bwd(
        &self,
        op: &AttnBwd,
        dqkv: &mut Vec<A>,
        dout: &Vec<A>,
        out: &Vec<A>,
        qkv: &Vec<A>,
        lse: &Vec<f32>,
        starts: &Vec<u32>,
    ) -> Result<()> {
        op.check(dqkv.len(), dout.len(), out.len(), qkv.len(), lse.len(), starts.len())?;
        self.packed_bwd(&op.0, dqkv, dout, out, qkv, lse, starts);
        Ok(())
    }

    fn grad_norm(&self, op: &GradNorm, norm: &mut Vec<f32>, grads: &Vec<f32>) -> Result<()> {
        op.check(norm.len(), grads.len())?;
        let parts = grads[..op.len].chunks(GradNorm::PART);
        norm[0] = parts.map(|g| f64::from(rows::dot(self.level, g, g))).sum::<f64>().sqrt() as f32;
        Ok(())
    }

    fn adamw(
        &self,
        op: &AdamW,
        params: &mut Vec<f32>,
        m: &mut Vec<f32>,
        v: &mut Vec<f32>,
        grads: &mut Vec<f32>,
        norm: &Vec<f32>,
    ) -> Result<()> {
        op.check(params.len(), m.len(), v.len(), grads.len(), norm.len())?;
        let n = op.len;
        rows::adamw(
            self.level,
            &mut params[..n],
            &mut m[..n],
            &mut v[..n],
            &mut grads[..n],
            op.clip(norm[0]),
            op.factors(),
        );
        Ok(())
    }
}
