//! How many guesses a step takes: as many as are worth their rows, by what steps of so many rows have cost.

use super::Draft;
use crate::backend::DECODE_ROWS;

/// Steps after which a time counts no more: texts grow, and a time may have been another program's.
const STALE: u64 = 256;
/// Least that a row is taken to cost where nothing was measured, as a share of the step.
const ROW: f64 = 0.03;

#[derive(Debug, Clone, Copy, Default)]
struct Time {
    seconds: f64,
    /// Number of the step that was measured last.
    at: u64,
    /// How many were.
    count: u64,
}

/// What steps cost by their rows, measured.
#[derive(Debug, Default)]
pub(crate) struct Costs {
    times: [Time; DECODE_ROWS + 1],
    steps: u64,
    /// In a trial nothing is measured, and chance says how many guesses a step takes: the state of its generator.
    trial: Option<u64>,
}

impl Costs {
    /// Of a trial.
    pub fn trial(seed: u64) -> Costs {
        Costs { trial: Some(seed), ..Costs::default() }
    }

    /// A step of so many rows took so long.
    pub fn observe(&mut self, rows: usize, seconds: f64) {
        self.steps += 1;
        let (steps, time) = (self.steps, &mut self.times[rows]);
        time.count += 1;
        // of the first of its kind a device makes a recording
        if time.count == 2 || steps - time.at > STALE {
            (time.seconds, time.at) = (seconds, steps);
        } else if time.count > 2 {
            // an outlier is too slow, never too fast
            let weight = if seconds < time.seconds { 0.5 } else { 0.125 };
            time.seconds += weight * (seconds - time.seconds);
            time.at = steps;
        }
    }

    /// What was measured, however long ago: rows and seconds.
    pub fn measured(&self) -> impl Iterator<Item = (usize, f64)> {
        self.times.iter().enumerate().filter(|(_, t)| t.count > 1).map(|(rows, t)| (rows, t.seconds))
    }

    fn known(&self, rows: usize) -> Option<f64> {
        let time = self.times[rows];
        (time.count > 1 && self.steps - time.at <= STALE).then_some(time.seconds)
    }

    /// What a step of so many rows costs; measured, or by its neighbours. `None` when nothing is known.
    fn of(&self, rows: usize) -> Option<f64> {
        if let Some(seconds) = self.known(rows) {
            return Some(seconds);
        }
        let at = |rows: usize| Some((rows, self.known(rows)?));
        let mut below = (1..rows).rev().filter_map(at);
        match (below.next(), (rows + 1..=DECODE_ROWS).find_map(at)) {
            (Some((r0, t0)), Some((r1, t1))) => Some(t0 + (t1 - t0) * (rows - r0) as f64 / (r1 - r0) as f64),
            (Some((r0, t0)), None) => {
                // as steep as it was so far
                let slope = below.next_back().map_or(0.0, |(r, t)| (t0 - t) / (r0 - r) as f64).max(ROW * t0);
                Some(t0 + slope * (rows - r0) as f64)
            }
            (None, above) => above.map(|(_, t)| t),
        }
    }
}

/// How many of each sequence's drafts a step takes, into `taken`, so that the tokens to be expected a second are the most.
/// Every sequence has a row of its own besides.
pub(crate) fn share(costs: &mut Costs, drafts: &[&[Draft]], taken: &mut Vec<usize>) {
    let own = drafts.len();
    let mut counts = [0; DECODE_ROWS];
    taken.clear();
    taken.resize(own, 0);
    if let Some(state) = &mut costs.trial {
        let mut left = DECODE_ROWS - own;
        for (taken, drafts) in taken.iter_mut().zip(drafts) {
            // Knuth's linear congruential generator
            *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *taken = (*state >> 33) as usize % (drafts.len().min(left) + 1);
            left -= *taken;
        }
        return;
    }
    let Some(alone) = costs.of(own).filter(|t| *t > 0.0) else { return };
    let (mut expected, mut best) = (own as f64, own as f64 / alone);
    for rows in own + 1..=DECODE_ROWS {
        // the likeliest of all that are left: those of a sequence become less likely one by one
        let next = |i: &usize| drafts[*i].get(counts[*i]).map_or(0.0, |d| d.chance);
        let Some(i) = (0..own).max_by(|a, b| next(a).total_cmp(&next(b))) else { return };
        let (chance, Some(cost)) = (next(&i), costs.of(rows)) else { return };
        if chance <= 0.0 {
            return;
        }
        counts[i] += 1;
        expected += f64::from(chance);
        if expected / cost > best {
            best = expected / cost;
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
        share(costs, &offers.iter().map(Vec::as_slice).collect::<Vec<_>>(), &mut taken);
        taken
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
        c.observe(5, 1.0);
        close(c.of(5), 1.0);
    }
}
