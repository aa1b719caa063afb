//! The random choices of Python's `random.Random`, on which the harness's few-shot examples depend.

use rand_mt::Mt;
use std::collections::HashSet;

/// `random.Random(seed)` of CPython 3.
pub struct PythonRandom(Mt);

impl PythonRandom {
    /// Seeded with an integer: its 32-bit words, lowest first, without leading zeros, are the key.
    pub fn new(seed: u64) -> PythonRandom {
        let words = [seed as u32, (seed >> 32) as u32];
        let n = if words[1] == 0 { 1 } else { 2 };
        PythonRandom(Mt::new_with_key(words[..n].iter().copied()))
    }

    /// `randrange(n)` for `n` from 1 to 2^32 - 1: draws as many bits as `n` has, until the number is below `n`.
    fn below(&mut self, n: usize) -> usize {
        let bits = usize::BITS - n.leading_zeros();
        loop {
            let r = (self.0.next_u32() >> (32 - bits)) as usize;
            if r < n {
                return r;
            }
        }
    }

    /// `sample(range(n), k)`: `k` different numbers below `n`, at least as large as `k`, in the order in which they are drawn.
    pub fn sample(&mut self, n: usize, k: usize) -> Vec<usize> {
        assert!(k <= n, "a sample of {k} from {n}");
        // CPython copies the population when that takes less memory than a set of k would
        let mut set_size = 21;
        if k > 5 {
            let digits = ((k * 3) as f64).ln() / 4f64.ln();
            set_size += 4usize.pow(digits.ceil() as u32);
        }
        if n <= set_size {
            let mut pool: Vec<usize> = (0..n).collect();
            let take = |i: usize| {
                let j = self.below(n - i);
                let drawn = pool[j];
                pool[j] = pool[n - i - 1]; // the last one that is not drawn takes its place
                drawn
            };
            return (0..k).map(take).collect();
        }
        let mut seen = HashSet::new();
        let take = |_| {
            loop {
                let j = self.below(n);
                if seen.insert(j) {
                    return j;
                }
            }
        };
        (0..k).map(take).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected: CPython 3.11.
    #[test]
    fn samples_are_those_of_cpython() {
        let mut r = PythonRandom::new(1234);
        assert_eq!(r.sample(3665, 5), [3187, 1805, 478, 30, 371]);
        assert_eq!(r.sample(3665, 5), [3305, 2384, 143, 2750, 2838]);
        assert_eq!(PythonRandom::new(0).sample(10, 4), [6, 9, 0, 2]);
        assert_eq!(PythonRandom::new(1 << 40).sample(1000, 8), [106, 361, 686, 67, 436, 49, 397, 408]);
        assert_eq!(PythonRandom::new(7).sample(60, 6), [20, 9, 25, 41, 3, 4]);
    }
}
