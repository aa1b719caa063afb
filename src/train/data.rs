//! The rows of a run, and how they are grouped into the micro-batches that go through the model.

use super::{
    pass::MicroBatch,
    prompt::{Encoder, Example, Kind},
};
use crate::{
    error::{Error, Result},
    ops::sample::philox,
};
use serde_json::Value;
use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
};

/// A word in the counter of the draws for the order of rows, which other draws do not have.
const ORDER: u32 = 2;

/// A row that is left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dropped {
    /// Its file.
    pub path: PathBuf,
    /// Its line, from 1.
    pub line: usize,
    /// Why.
    pub reason: String,
}

/// The rows of a run as tokens.
#[derive(Debug, Clone, Default)]
pub struct Data {
    /// Rows to learn.
    pub examples: Vec<Example>,
    /// File and line of each.
    pub places: Vec<(PathBuf, usize)>,
    /// Rows that are left out.
    pub dropped: Vec<Dropped>,
}

/// Calls `f` for each row of a JSONL file, with its line number from 1.
///
/// # Errors
/// `Io`, `File` for a line that is no JSON, and those of `f`.
pub fn rows(path: &Path, mut f: impl FnMut(usize, Value) -> Result<()>) -> Result<()> {
    let file = File::open(path).map_err(Error::io(path))?;
    for (i, line) in BufReader::new(file).lines().enumerate() {
        let line = line.map_err(Error::io(path))?;
        let line = line.trim_start_matches('\u{feff}').trim();
        if line.is_empty() {
            continue;
        }
        let row = serde_json::from_str(line).map_err(|e| {
            Error::file(path, format!("line {} is no JSON object: {e}; expected JSONL, one row a line", i + 1))
        })?;
        f(i + 1, row)?;
    }
    Ok(())
}

impl Data {
    /// Reads the files of a run. As in Axolotl, rows are left out that are longer than `sequence_len`, shorter than two
    /// tokens, or without anything to learn.
    ///
    /// # Errors
    /// `File` for a row that is not of its kind, by file and line; `Input` when nothing is left.
    pub fn read(files: &[(PathBuf, Kind)], encoder: &Encoder<'_>) -> Result<Data> {
        let mut data = Data::default();
        for (path, kind) in files {
            rows(path, |line, row| {
                let example =
                    encoder.row(kind, &row).map_err(|what| Error::file(path, format!("line {line}: {what}")))?;
                let n = example.ids.len();
                let reason = if n > encoder.sequence_len {
                    format!("{n} tokens, sequence_len is {}", encoder.sequence_len)
                } else if n < 2 {
                    format!("{n} tokens: too few to learn one from another")
                } else if example.labels() == 0 {
                    "no token of it is learned".into()
                } else {
                    data.examples.push(example);
                    data.places.push((path.clone(), line));
                    return Ok(());
                };
                data.dropped.push(Dropped { path: path.clone(), line, reason });
                Ok(())
            })?;
        }
        if data.examples.is_empty() {
            let why = data.dropped.first().map_or("the files have no rows".into(), |d| {
                format!(
                    "all {} rows are dropped, {}:{} for: {}",
                    data.dropped.len(),
                    d.path.display(),
                    d.line,
                    d.reason
                )
            });
            return Err(Error::Input(format!("there is nothing to learn: {why}")));
        }
        Ok(data)
    }

    /// Moves rows drawn by `seed` to a set of their own: `size` is a share if below 1, else a number of rows.
    ///
    /// # Errors
    /// `Input` when that is all of them.
    pub fn split(&mut self, size: f64, seed: u64) -> Result<Data> {
        let all = self.examples.len();
        let n = if size < 1.0 { (size * all as f64).ceil() as usize } else { size as usize };
        if n == 0 {
            return Ok(Data::default());
        }
        if n >= all {
            return Err(Error::Input(format!("val_set_size is {n} rows of {all}: none is left to learn")));
        }
        let mut chosen = vec![false; all];
        shuffled(all, seed, u32::MAX).into_iter().take(n).for_each(|i| chosen[i] = true);
        let mut kept = Data { dropped: std::mem::take(&mut self.dropped), ..Data::default() };
        let mut apart = Data::default();
        let rows = self.examples.drain(..).zip(self.places.drain(..)).zip(chosen);
        for ((example, place), chosen) in rows {
            let to = if chosen { &mut apart } else { &mut kept };
            to.examples.push(example);
            to.places.push(place);
        }
        *self = kept;
        Ok(apart)
    }

    /// Tokens of all rows.
    pub fn tokens(&self) -> usize {
        self.examples.iter().map(|e| e.ids.len()).sum()
    }

    /// Tokens that are learned.
    pub fn labels(&self) -> usize {
        self.examples.iter().map(Example::labels).sum()
    }

    /// The rows of each micro-batch of an epoch.
    pub fn epoch(&self, epoch: usize, packing: Packing) -> Vec<Vec<usize>> {
        let n = self.examples.len();
        let mut order = match packing.shuffle {
            true => shuffled(n, packing.seed, epoch as u32),
            false => (0..n).collect(),
        };
        let Some(capacity) = packing.capacity else {
            return order.chunks(packing.rows).map(<[usize]>::to_vec).collect();
        };
        let len = |i: usize| self.examples[i].ids.len();
        if packing.shuffle {
            order.sort_by_key(|&i| std::cmp::Reverse(len(i))); // stable: equals stay shuffled
        }
        let batches = first_fit(&order, len, capacity);
        match packing.shuffle {
            true => {
                let order = shuffled(batches.len(), packing.seed ^ (1 << 63), epoch as u32);
                order.into_iter().map(|i| batches[i].clone()).collect()
            }
            false => batches,
        }
    }

    /// Makes a micro-batch of some rows, one after the other.
    pub fn micro_batch(&self, rows: &[usize]) -> MicroBatch {
        let mut batch = MicroBatch::default();
        for &i in rows {
            let Example { ids, learned } = &self.examples[i];
            batch.push(ids, (0..ids.len()).filter(|&t| learned[t]), i);
        }
        batch
    }

    /// A hash of ids and labels (FNV-1a), by which a run that goes on recognises its data.
    pub fn fingerprint(&self) -> u64 {
        let words = self.examples.iter().flat_map(|e| {
            let ids = e.ids.iter().zip(&e.learned).map(|(id, l)| u64::from(*id) << 1 | u64::from(*l));
            ids.chain([u64::MAX])
        });
        words.fold(0xcbf2_9ce4_8422_2325, |h, w| (h ^ w).wrapping_mul(0x100_0000_01b3))
    }
}

/// How an epoch is divided into micro-batches.
#[derive(Debug, Clone, Copy)]
pub struct Packing {
    /// Seed of the order.
    pub seed: u64,
    /// Whether each epoch has another order.
    pub shuffle: bool,
    /// With packing, the most tokens of a micro-batch; without, a micro-batch is `rows` rows.
    pub capacity: Option<usize>,
    /// Rows of a micro-batch that is not packed.
    pub rows: usize,
}

/// First-fit (Johnson 1973): each row goes into the first batch that has room. If rows come from longest to shortest,
/// it is first-fit-decreasing, as Axolotl packs.
fn first_fit(order: &[usize], len: impl Fn(usize) -> usize, capacity: usize) -> Vec<Vec<usize>> {
    let mut batches: Vec<(usize, Vec<usize>)> = Vec::new();
    let mut open = 0; // batches before it are full
    for &i in order {
        let n = len(i);
        match batches[open..].iter_mut().find(|(used, _)| used + n <= capacity) {
            Some((used, rows)) => {
                *used += n;
                rows.push(i);
            }
            None => batches.push((n, vec![i])),
        }
        while open < batches.len() && batches[open].0 == capacity {
            open += 1;
        }
    }
    batches.into_iter().map(|(_, rows)| rows).collect()
}

/// The numbers below `n` in an order drawn with Philox (the shuffle of Fisher and Yates).
pub(super) fn shuffled(n: usize, seed: u64, round: u32) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        let [a, b, ..] = philox([i as u32, ORDER, round, 0], [seed as u32, (seed >> 32) as u32]);
        let draw = u64::from(a) | u64::from(b) << 32;
        order.swap(i, ((u128::from(draw) * (i as u128 + 1)) >> 64) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(lengths: &[usize]) -> Data {
        let example = |n: &usize| Example { ids: (0..*n as u32).collect(), learned: vec![true; *n] };
        let places = vec![(PathBuf::from("a"), 1); lengths.len()];
        Data { examples: lengths.iter().map(example).collect(), places, dropped: vec![] }
    }

    #[test]
    fn packs_first_fit_decreasing() {
        let data = data(&[5, 3, 8, 2, 4, 6, 2]);
        let packing = Packing { seed: 3, shuffle: true, capacity: Some(10), rows: 1 };
        let batches = data.epoch(0, packing);
        let lengths = |b: &Vec<usize>| b.iter().map(|&i| data.examples[i].ids.len()).collect::<Vec<_>>();
        let mut packed: Vec<Vec<usize>> = batches.iter().map(lengths).collect();
        packed.sort();
        assert_eq!(packed, [vec![5, 3, 2], vec![6, 4], vec![8, 2]]);
        assert_eq!(batches, data.epoch(0, packing));
        assert!((1..9).any(|epoch| data.epoch(epoch, packing) != batches), "every epoch has the same order");
        let in_order = Packing { shuffle: false, ..packing };
        assert_eq!(data.epoch(0, in_order), [vec![0, 1, 3], vec![2, 6], vec![4, 5]]);
        let plain = Packing { capacity: None, rows: 3, ..in_order };
        assert_eq!(data.epoch(1, plain), [vec![0, 1, 2], vec![3, 4, 5], vec![6]]);
    }

    #[test]
    fn shuffles_are_even() {
        let mut first = [0; 5];
        (0..5000).for_each(|seed| first[shuffled(5, seed, 0)[0]] += 1);
        assert!(first.iter().all(|n| (850..1150).contains(n)), "{first:?}"); // 1000 +- 28
    }

    #[test]
    fn documents_lie_one_after_the_other() {
        let data = data(&[3, 1, 2]);
        let batch = data.micro_batch(&[2, 0]);
        assert_eq!((batch.tokens, batch.pos), (vec![0, 1, 0, 1, 2], vec![0, 1, 0, 1, 2]));
        assert_eq!((batch.starts, batch.at, batch.target), (vec![0, 2, 5], vec![0, 2, 3], vec![1, 1, 2]));
    }

    #[test]
    fn some_rows_are_kept_apart() {
        let mut all = data(&[2; 10]);
        assert_eq!(all.split(0.25, 1).unwrap().examples.len(), 3);
        assert_eq!(all.examples.len(), 7);
        assert_eq!(all.split(2.0, 1).unwrap().examples.len(), 2);
        assert!(all.split(5.0, 1).unwrap_err().to_string().contains("none is left"));
    }
}
