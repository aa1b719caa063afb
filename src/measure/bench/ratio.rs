//! How one time compares with another: the median of paired ratios, with an interval.

use serde::Serialize;

/// A time as a multiple of another, from pairs of runs one right after the other. Drift, such as that of clocks and
/// temperature, affects both of a pair equally.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Ratio {
    /// Median over the pairs.
    pub p50: f64,
    /// Lower end of the interval that holds the true median with at least 95% confidence; with fewer than six pairs,
    /// the lowest ratio.
    pub low: f64,
    /// The other end.
    pub high: f64,
}

impl Ratio {
    /// From at least one pair `(this, other)`. The interval uses order statistics, so it assumes nothing about the
    /// distribution.
    pub fn new(pairs: &[(f64, f64)]) -> Ratio {
        let mut r: Vec<f64> = pairs.iter().map(|(this, other)| this / other).collect();
        r.sort_by(f64::total_cmp);
        let n = r.len();
        // how many of n pairs are below the median follows Binomial(n, 1/2), of which this half width holds 95%
        let width = 0.98 * (n as f64).sqrt();
        let low = ((n as f64 / 2.0 - width) as usize).saturating_sub(1);
        Ratio { p50: (r[(n - 1) / 2] + r[n / 2]) / 2.0, low: r[low], high: r[n - 1 - low] }
    }

    /// The verdict: `faster`, `slower`, or `no difference` when the interval holds 1.
    pub fn verdict(&self) -> &'static str {
        match () {
            () if self.high < 1.0 => "faster",
            () if self.low > 1.0 => "slower",
            () => "no difference",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_and_what_it_is_worth() {
        let pairs =
            |ratios: &[f64]| -> Ratio { Ratio::new(&ratios.iter().map(|r| (2.0 * r, 2.0)).collect::<Vec<_>>()) };
        assert_eq!(pairs(&[0.5]), Ratio { p50: 0.5, low: 0.5, high: 0.5 });
        assert_eq!(pairs(&[1.5, 0.5, 0.75]), Ratio { p50: 0.75, low: 0.5, high: 1.5 });
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        // Binomial(100, 1/2) is from 40 to 60 in 96.5% of all cases
        assert_eq!(pairs(&hundred), Ratio { p50: 50.5, low: 40.0, high: 61.0 });
        let verdict = |low, high| Ratio { p50: 1.0, low, high }.verdict();
        assert_eq!(verdict(0.8, 0.9), "faster");
        assert_eq!(verdict(1.1, 1.2), "slower");
        assert_eq!(verdict(0.9, 1.1), "no difference");
    }
}
