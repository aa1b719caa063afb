//! Vector instructions and threads: all that is `unsafe` on the CPU.
//!
//! One loop for all instruction sets ([`dot`]), whose registers are a trait ([`lanes`]); loops over rows that the compiler makes vectors
//! of ([`rows`]); threads that wait for the next op awake ([`pool`]). The same bits on every CPU: the order of all sums is written
//! down, and nothing is left to a mathematical library.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod dot;
mod lanes;
pub mod pool;
mod portable;
pub mod rows;

pub use dot::{PACK_ROWS, Product};
pub use rows::Weighted;

use crate::error::{Error, Result};
use std::{fmt, sync::OnceLock};

/// A set of instructions that this CPU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "the others are of x86-64"))]
pub enum Level {
    /// What every CPU has.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F and BW.
    Avx512,
    /// The same, and products of bf16.
    Avx512Bf16,
}

impl Level {
    const ALL: [Level; 4] = [Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Bf16];

    /// As `AOJI_CPU` names it.
    fn name(self) -> &'static str {
        ["portable", "avx2", "avx512", "avx512bf16"][self as usize]
    }

    /// The CPU has it.
    fn is_here(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        let here = match self {
            Level::Portable => true,
            Level::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            Level::Avx512 => {
                Level::Avx2.is_here() && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw")
            }
            Level::Avx512Bf16 => Level::Avx512.is_here() && is_x86_feature_detected!("avx512bf16"),
        };
        #[cfg(not(target_arch = "x86_64"))]
        let here = self == Level::Portable;
        here
    }

    /// Those that this CPU has, the best last.
    pub fn here() -> impl Iterator<Item = Level> {
        Level::ALL.into_iter().filter(|level| level.is_here())
    }

    /// The best that this CPU has.
    pub fn best() -> Level {
        static BEST: OnceLock<Level> = OnceLock::new();
        *BEST.get_or_init(|| Level::here().max().unwrap_or(Level::Portable))
    }

    /// The one that `AOJI_CPU` names, else the best.
    ///
    /// # Errors
    /// `Input` for what is no level or one that this CPU does not have.
    pub fn chosen() -> Result<Level> {
        match std::env::var("AOJI_CPU") {
            Err(_) => Ok(Level::best()),
            Ok(name) => Level::named(&name),
        }
    }

    fn named(name: &str) -> Result<Level> {
        Level::here().find(|level| level.name() == name).ok_or_else(|| {
            let here: Vec<&str> = Level::here().map(Level::name).collect();
            Error::Input(format!("AOJI_CPU is {name:?}; this CPU has {}", here.join(", ")))
        })
    }

    /// The level whose products are those of f32 activations: there is no instruction of more.
    pub fn of_f32(self) -> Level {
        self.min(Level::Avx512)
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Level::Portable => "portable",
            Level::Avx2 => "AVX2",
            Level::Avx512 => "AVX-512",
            Level::Avx512Bf16 => "AVX512-BF16",
        })
    }
}

/// A line of the cache: what prepared rows are whole numbers of.
#[derive(Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub struct Line([u32; 16]);

/// Lines of a prepared row of `k` values: in bf16 or in f32, filled up to 32.
pub fn lines(level: Level, k: usize) -> usize {
    k.div_ceil(32) * if level == Level::Avx512Bf16 { 1 } else { 2 }
}

/// Rows of weights, or of keys and values, by their format.
#[derive(Clone, Copy)]
pub enum Weights<'a> {
    /// bf16, as bits.
    Bf16(&'a [u16]),
    /// f32.
    F32(&'a [f32]),
}

impl<'a> Weights<'a> {
    /// Elements.
    pub fn len(self) -> usize {
        match self {
            Weights::Bf16(w) => w.len(),
            Weights::F32(w) => w.len(),
        }
    }

    /// Elements `at..at + len`.
    pub fn part(self, at: usize, len: usize) -> Weights<'a> {
        match self {
            Weights::Bf16(w) => Weights::Bf16(&w[at..at + len]),
            Weights::F32(w) => Weights::F32(&w[at..at + len]),
        }
    }

    /// Of activations.
    pub fn of<A: crate::ops::Act>(a: &'a [A]) -> Weights<'a> {
        match size_of::<A>() {
            2 => Weights::Bf16(bytemuck::cast_slice(a)),
            _ => Weights::F32(bytemuck::cast_slice(a)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{Act, noise};
    use half::bf16;

    /// The levels other than the portable one; says which are skipped.
    fn others() -> Vec<Level> {
        for level in Level::ALL.into_iter().filter(|l| !l.is_here()) {
            println!("skipped: this CPU has no {level}");
        }
        Level::here().skip(1).collect()
    }

    fn bits(y: &[f32]) -> Vec<u32> {
        y.iter().map(|y| y.to_bits()).collect()
    }

    /// bf16 of all sizes: with what is cut, with both zeros and with what cancels.
    fn wild(len: usize, seed: u64) -> Vec<bf16> {
        let scale = [1.0, 1e-3, 3e4, 1e-13, 1e-17, 1e-25, 1e-39, 0.0, -1.0];
        let values = noise(len, seed).into_iter().enumerate();
        values.map(|(i, x)| bf16::from_f32(x * scale[(i * 7 + i / 13) % scale.len()])).collect()
    }

    fn product<A: Act>(level: Level, x: &[A], w: Weights<'_>, [rows, cols, k]: [usize; 3]) -> Vec<f32> {
        let row = lines(level, k);
        let mut prepared = vec![Line([u32::MAX; 16]); rows * row];
        for (to, x) in prepared.chunks_exact_mut(row).zip(x.chunks_exact(k)) {
            rows::prepare(level, x, to);
        }
        let (mut y, mut packed) = (vec![f32::NAN; rows * (cols + 3)], vec![Line([u32::MAX; 16]); cols * row]);
        Product { x: &prepared, rows, w, cols, k, y: &mut y, y_stride: cols + 3, packed: &mut packed }.run(level);
        y.chunks_exact(cols + 3).flat_map(|y| y[..cols].to_vec()).collect()
    }

    const SIZES: [[usize; 3]; 12] = [
        [1, 1, 1],
        [1, 4, 32],
        [1, 5, 33],
        [2, 3, 31],
        [3, 4, 64],
        [4, 4, 576],
        [5, 9, 100],
        [7, 6, 8],
        [16, 8, 96],
        [17, 7, 72], // unpacked first
        [21, 10, 33],
        [33, 32, 256],
    ];

    #[test]
    fn every_level_has_the_same_bits_of_products() {
        let others = others();
        for (seed, size @ [rows, cols, k]) in SIZES.into_iter().enumerate() {
            let (x, w) = (wild(rows * k, seed as u64), wild(cols * k, 77 + seed as u64));
            let f32s = |v: &[bf16]| v.iter().map(|x| x.to_f32() * 1.000_123).collect::<Vec<f32>>();
            let (xf, wf) = (f32s(&x), f32s(&w));
            let bf16s = Weights::of(&w);
            let of = |level: Level| {
                let f = level.of_f32();
                let products = [
                    product(level, &x, bf16s, size),
                    product(f, &xf, bf16s, size),
                    product(f, &xf, Weights::F32(&wf), size),
                ];
                products.map(|y| bits(&y))
            };
            let want = of(Level::Portable);
            for &level in &others {
                assert_eq!(of(level), want, "{level}, {size:?}");
            }
            for (r, y) in want[0].chunks_exact(cols).enumerate() {
                for (c, y) in y.iter().enumerate() {
                    let exact = (0..k).map(|j| x[r * k + j].to_f64() * w[c * k + j].to_f64());
                    let size: f64 = exact.clone().map(f64::abs).sum();
                    let exact: f64 = exact.sum();
                    let off = (f64::from(f32::from_bits(*y)) - exact).abs();
                    assert!(
                        off <= 1e-6 * size + 1e-12,
                        "{y:x} is {off} from {exact}, row {r}, column {c} of {rows} x {cols} x {k}"
                    );
                }
            }
        }
    }

    #[test]
    fn every_level_has_the_same_bits_of_weighted_values() {
        let others = others();
        for [rows, n, d] in [[1, 1, 8], [3, 17, 64], [4, 5, 16], [5, 100, 24], [8, 128, 128], [29, 30, 72]] {
            let (p, v) =
                (noise(rows * (n + 2), 3), noise(n * d, 4).into_iter().map(bf16::from_f32).collect::<Vec<_>>());
            let vf: Vec<f32> = v.iter().map(|v| v.to_f32() * 1.01).collect();
            let o_stride = d.next_multiple_of(16) + 2;
            let of = |level: Level, v: Weights<'_>| {
                let mut o = vec![0.5; rows * o_stride];
                Weighted { p: &p, p_stride: n + 2, rows, v, n, d, o: &mut o, o_stride }.run(level);
                bits(&o)
            };
            let both = |level| [of(level, Weights::of(&v)), of(level, Weights::F32(&vf))];
            let want = both(Level::Portable);
            for &level in &others {
                assert_eq!(both(level), want, "{level}, {rows} rows, {n} values of {d}");
            }
            let (r, j) = (rows - 1, d - 1);
            let exact: f64 = (0..n).map(|t| f64::from(p[r * (n + 2) + t]) * v[t * d + j].to_f64()).sum();
            let got = f32::from_bits(want[0][r * o_stride + j]);
            assert!((f64::from(got) - 0.5 - exact).abs() < 1e-4, "{got} - 0.5 is not {exact}");
        }
    }

    #[test]
    fn every_level_has_the_same_bits_of_rows() {
        let others = others();
        for n in [1, 2, 15, 16, 33, 576, 1500] {
            let (x, w) = (wild(2 * n, 5), wild(n, 6));
            let of = |level: Level| {
                let mut out = vec![bf16::ZERO; n];
                rows::norm(level, &mut out, &x[..n], &w, 1e-5);
                let mut all: Vec<f32> = out.iter().map(|x| x.to_f32()).collect();
                rows::swiglu(level, &mut out, &x);
                all.extend(out.iter().map(|x| x.to_f32()));
                let mut s: Vec<f32> = noise(n, 8).iter().map(|x| x * 30.0).collect();
                let largest = rows::max_of(level, &s);
                assert_eq!(largest, s.iter().copied().fold(f32::MIN, f32::max));
                all.push(rows::sum_exp(level, &s, largest) as f32);
                let (m, sum) = rows::softmax(level, &mut s, 0.125);
                all.extend(s.iter().chain([&m, &sum]));
                bits(&all)
            };
            let want = of(Level::Portable);
            for &level in &others {
                assert_eq!(of(level), want, "{level}, {n} elements");
            }
        }
    }

    #[test]
    fn exp_is_close() {
        for i in -9000..9000 {
            let x = i as f32 / 100.0;
            let (got, want) = (f64::from(rows::exp_of(Level::best(), x)), f64::from(x).exp());
            let fits = match x {
                ..-87.305 => got == 0.0,
                88.305.. => got.is_infinite(),
                _ => (got / want - 1.0).abs() < 2.5e-7,
            };
            assert!(fits, "exp({x}) is {got}, expected {want}");
        }
        assert!(rows::exp_of(Level::best(), f32::NAN).is_nan());
        assert_eq!(rows::exp_of(Level::best(), 0.0), 1.0);
    }

    #[test]
    fn a_level_is_chosen_by_its_name() {
        assert_eq!(Level::named("portable").unwrap(), Level::Portable);
        assert_eq!(Level::named(Level::best().name()).unwrap(), Level::best());
        let error = Level::named("sse").unwrap_err().to_string();
        assert!(error.contains("AOJI_CPU is \"sse\"; this CPU has portable"), "{error}");
    }
}
