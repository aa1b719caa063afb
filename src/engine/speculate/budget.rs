//! Decides how many guesses a step tries: as many as are worth their rows, judged by how long steps with that many rows
//! have taken.

use super::Draft;
use crate::backend::DECODE_ROWS;

/// After this many steps a measured time no longer counts: texts grow, and another program may have slowed the step
/// down.
const STALE: u64 = 256;
/// A cost is known after this many measurements. The shortest time counts, since another program may have slowed down the others.
const FIRST: u64 = 3;
/// Where nothing was measured, a row is assumed to cost at least this share of the step.
const ROW: f64 = 0.03;

#[derive(Debug, Clone, Copy, Default)]
struct Time {
    seconds: f64,
    /// Number of the step at which it was measured last.
    at: u64,
    /// How many steps were counted since the time was last forgotten.
    count: u64,
}

/// How long steps take, by their number of rows, as measured.
#[derive(Debug, Default)]
pub(crate) struct Costs {
    times: [Time; DECODE_ROWS + 1],
    steps: u64,
    /// Only while speculation is being verified: the state of a generator that chooses the number of guesses at random.
    /// Nothing is measured then.
    trial: Option<u64>,
}

impl Costs {
    /// For verifying speculation, with random numbers of guesses.
    pub fn trial(seed: u64) -> Costs {
        Costs { trial: Some(seed), ..Costs::default() }
    }

    /// Records how long a step of this many rows took.
    pub fn observe(&mut self, rows: usize, seconds: f64) {
        self.steps += 1;
        let (steps, time) = (self.steps, &mut self.times[rows]);
        if time.count > 1 && steps - time.at > STALE {
            time.count = 1;
        }
        time.count += 1;
        time.at = steps;
        match time.count {
            1 => {} // the first step of its kind also records the CUDA graph, so it does not count
            2 => time.seconds = seconds,
            n if n <= 1 + FIRST => time.seconds = time.seconds.min(seconds),
            _ => {
                // an unusual time is too long, never too short
                let weight = if seconds < time.seconds { 0.5 } else { 0.125 };
                time.seconds += weight * (seconds - time.seconds);
            }
        }
    }

    /// All measurements, however old: rows and seconds.
    pub fn measured(&self) -> impl Iterator<Item = (usize, f64)> {
        self.times.iter().enumerate().filter(|(_, t)| t.count > 1).map(|(rows, t)| (rows, t.seconds))
    }

    fn known(&self, rows: usize) -> Option<f64> {
        let time = self.times[rows];
        (time.count > FIRST && self.steps - time.at <= STALE).then_some(time.seconds)
    }

    /// How long a step of this many rows takes: measured, or estimated from its neighbours. `None` when nothing is
    /// known.
    fn of(&self, rows: usize) -> Option<f64> {
        if let Some(seconds) = self.known(rows) {
            return Some(seconds);
        }
        let at = |rows: usize| Some((rows, self.known(rows)?));
        let mut below = (1..rows).rev().filter_map(at);
        match (below.next(), (rows + 1..=DECODE_ROWS).find_map(at)) {
            (Some((r0, t0)), Some((r1, t1))) => Some(t0 + (t1 - t0) * (rows - r0) as f64 / (r1 - r0) as f64),
            (Some((r0, t0)), None) => {
                // assume the same slope as so far
                let slope = below.next_back().map_or(0.0, |(r, t)| (t0 - t) / (r0 - r) as f64).max(ROW * t0);
                Some(t0 + slope * (rows - r0) as f64)
            }
            (None, above) => above.map(|(_, t)| t),
        }
    }
}

/// The guesses that a step may try for one sequence.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Offer<'a> {
    /// The likeliest first.
    pub drafts: &'a [Draft],
    /// Seconds that it takes to make each of them; several sequences make theirs together in the same time.
    pub seconds: f64,
}

/// Decides how many of each sequence's drafts a step tries, so that the expected number of tokens a second is the largest; the
/// numbers go to `taken`. Every sequence also has a row for its last token.
pub(crate) fn share(costs: &mut Costs, offers: &[Offer<'_>], taken: &mut Vec<usize>) {
    let own = offers.len();
    let mut counts = [0; DECODE_ROWS];
    taken.clear();
    taken.resize(own, 0);
    if let Some(state) = &mut costs.trial {
        let mut left = DECODE_ROWS - own;
        for (taken, Offer { drafts, .. }) in taken.iter_mut().zip(offers) {
            // Knuth's linear congruential generator
            *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *taken = (*state >> 33) as usize % (drafts.len().min(left) + 1);
            left -= *taken;
        }
        return;
    }
    let Some(alone) = costs.of(own).filter(|t| *t > 0.0) else { return };
    let (mut expected, mut best, mut making) = (own as f64, own as f64 / alone, 0.0f64);
    for rows in own + 1..=DECODE_ROWS {
        // the most likely guess of all that remain; within a sequence they become less likely one by one
        let next = |i: &usize| offers[*i].drafts.get(counts[*i]).map_or(0.0, |d| d.chance);
        let Some(i) = (0..own).max_by(|a, b| next(a).total_cmp(&next(b))) else { return };
        let (chance, Some(cost)) = (next(&i), costs.of(rows)) else { return };
        if chance <= 0.0 {
            return;
        }
        counts[i] += 1;
        making = making.max(counts[i] as f64 * offers[i].seconds);
        expected += f64::from(chance);
        if expected / (cost + making) > best {
            best = expected / (cost + making);
            taken.copy_from_slice(&counts[..own]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drafts(chances: &[f32]) -> Vec<Draft> {
        chances.iter().map(|&chance| Draft { token: 0, chance }).collect()
    }

    fn costs(times: &[(usize, f64)]) -> Costs {
        let mut costs = Costs::default();
        for &(rows, seconds) in times {
            costs.observe(rows, 9.0); // does not count
            (0..3).for_each(|_| costs.observe(rows, seconds));
        }
        costs
    }

    fn taken(costs: &mut Costs, offers: &[&[f32]]) -> Vec<usize> {
        let offers: Vec<Vec<Draft>> = offers.iter().map(|chances| drafts(chances)).collect();
        let mut taken = Vec::new();
        let offers: Vec<Offer> = offers.iter().map(|drafts| Offer { drafts, seconds: 0.0 }).collect();
        share(costs, &offers, &mut taken);
        taken
    }

    #[test]
    fn what_takes_long_to_be_made_is_not_tried() {
        let mut c = costs(&[(1, 1.0), (16, 1.5)]);
        let drafts = drafts(&[0.8, 0.64, 0.51]);
        let mut taken = |seconds| {
            let mut taken = Vec::new();
            share(&mut c, &[Offer { drafts: &drafts, seconds }], &mut taken);
            taken[0]
        };
        assert_eq!([taken(0.0), taken(0.1), taken(0.6), taken(0.9)], [3, 3, 1, 0]);
    }

    #[test]
    fn likely_drafts_are_taken_and_unlikely_ones_are_not() {
        let mut c = costs(&[(1, 1.0), (16, 2.5)]); // 0.1 a row
        assert_eq!(taken(&mut c, &[&[0.9, 0.8, 0.7, 0.6, 0.01]]), [4]);
        assert_eq!(taken(&mut c, &[&[0.05, 0.04]]), [0]);
        assert_eq!(taken(&mut c, &[&[]]), [0]);
        assert_eq!(taken(&mut Costs::default(), &[&[0.9]]), [0], "nothing is known");
    }

    #[test]
    fn the_likeliest_of_several_sequences_come_first() {
        let mut c = costs(&[(1, 1.0), (16, 1.5)]);
        assert_eq!(taken(&mut c, &[&[0.9, 0.8, 0.1], &[0.95, 0.02], &[0.01]]), [2, 1, 0]);
        let many = vec![&[1.0f32; 15][..]; 14];
        assert_eq!(taken(&mut c, &many).iter().sum::<usize>(), 2, "16 rows and no more");
    }

    #[test]
    fn costs_are_measured_or_those_of_their_neighbours() {
        let mut c = costs(&[(1, 1.0), (5, 1.4)]);
        let close = |a: Option<f64>, b: f64| assert!((a.unwrap() - b).abs() < 1e-9, "{a:?} is not {b}");
        close(c.of(1), 1.0);
        close(c.of(3), 1.2);
        close(c.of(6), 1.5);
        for _ in 0..=STALE {
            c.observe(1, 2.0);
        }
        assert_eq!(c.known(5), None, "forgotten");
        assert!(c.of(1).unwrap() > 1.99);
        for seconds in [1.0, 9.0, 1.1] {
            assert_eq!(c.known(5), None, "not yet");
            c.observe(5, seconds);
        }
        close(c.of(5), 1.0);
    }
}
