//! Decides which elements of a matrix dropout keeps. That is a function of the element's position in the run, so no
//! mask is stored, and the backward pass has the mask of the forward pass.

use crate::ops::sample::philox;

/// The mask of the input of one adapted matrix in one micro-batch.
///
/// Element `i` (row times columns plus column) is kept where word `i % 4` of Philox4x32-10 (Salmon et al. 2011) of the counter
/// `[i / 4, 0, step, site]` and the key `seed` is at least `p * 2^32`; what is kept is divided by `1 - p`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Share that is dropped, from 0 to below 1.
    pub p: f32,
    /// Seed of the run.
    pub seed: u64,
    /// Micro-batch of the run, from 0.
    pub step: u32,
    /// Number of the matrix in the model.
    pub site: u32,
}

impl Dropout {
    /// Keeps all.
    pub const NONE: Dropout = Dropout { p: 0.0, seed: 0, step: 0, site: 0 };

    /// Words below this are dropped.
    pub fn threshold(&self) -> u32 {
        (f64::from(self.p) * 4_294_967_296.0) as u32
    }

    /// What element `i` is multiplied by: 0, or `1 / (1 - p)` in f32.
    pub fn factor(&self, i: usize) -> f32 {
        if self.p == 0.0 {
            return 1.0;
        }
        let words = philox([(i / 4) as u32, 0, self.step, self.site], [self.seed as u32, (self.seed >> 32) as u32]);
        if words[i % 4] >= self.threshold() { self.scale() } else { 0.0 }
    }

    /// `1 / (1 - p)`
    pub fn scale(&self) -> f32 {
        1.0 / (1.0 - self.p)
    }

    /// What the kernels take: threshold, seed, step and site.
    #[cfg(feature = "cuda")]
    pub(super) fn args(&self) -> [crate::backend::cuda::Arg; 4] {
        [self.threshold().into(), self.seed.into(), self.step.into(), self.site.into()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_its_share_and_another_one_elsewhere() {
        let at = |step, site| Dropout { p: 0.05, seed: 7, step, site };
        let dropped = |d: Dropout| (0..40_000).filter(|i| d.factor(*i) == 0.0).collect::<Vec<_>>();
        let (a, b, c) = (dropped(at(0, 0)), dropped(at(1, 0)), dropped(at(0, 1)));
        for d in [&a, &b, &c] {
            assert!((1850..2150).contains(&d.len()), "{} of 40000 dropped at 0.05", d.len()); // 2000 +- 44
        }
        assert!(a != b && a != c && b != c);
        assert_eq!(a, dropped(at(0, 0)));
        assert_eq!(at(0, 0).factor((0..).find(|i| !a.contains(i)).unwrap()), 1.0 / 0.95);
        assert_eq!(Dropout::NONE.factor(3), 1.0);
    }
}
