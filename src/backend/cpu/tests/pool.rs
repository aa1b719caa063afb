//! The threads do every part exactly once, whatever happens.

use crate::backend::cpu::simd::pool::{AWAKE, Pool};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
    thread,
    time::{Duration, Instant},
};

#[test]
fn every_part_is_done_once_awake_or_asleep() {
    for threads in [1, 2, 5] {
        let pool = Pool::new(threads);
        assert_eq!(pool.threads(), threads);
        for round in 0..200 {
            let done: Vec<AtomicUsize> = (0..round % 23).map(|_| AtomicUsize::new(0)).collect();
            pool.run(done.len(), &|i| {
                done[i].fetch_add(1, SeqCst);
            });
            assert!(done.iter().all(|n| n.load(SeqCst) == 1), "{threads} threads, round {round}");
            if round % 50 == 0 {
                thread::sleep(3 * AWAKE);
            }
        }
    }
}

#[test]
fn callers_at_once_and_calls_within_calls_end() {
    let (pool, sum) = (Pool::new(3), AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    pool.run(4, &|_| pool.run(3, &|i| _ = sum.fetch_add(i, SeqCst)));
                }
            });
        }
    });
    assert_eq!(sum.load(SeqCst), 4 * 50 * 4 * 3);
}

#[test]
fn a_panic_is_the_callers() {
    let pool = Pool::new(3);
    let run = || pool.run(40, &|i| assert!(i != 17, "part {i}"));
    let panic = catch_unwind(AssertUnwindSafe(run)).unwrap_err();
    assert!(panic.downcast_ref::<String>().is_some_and(|s| s.starts_with("part 17")));
    // and it works as before, with all threads: the parts meet
    let (here, since) = (AtomicUsize::new(0), Instant::now());
    pool.run(3, &|_| {
        here.fetch_add(1, SeqCst);
        while here.load(SeqCst) < 3 && since.elapsed() < Duration::from_secs(20) {
            thread::yield_now();
        }
        assert_eq!(here.load(SeqCst), 3, "a thread did not come");
    });
}

#[test]
fn tiles_cover_a_matrix() {
    let pool = Pool::new(2);
    for (rows, cols, size) in [(1, 1, [1, 1]), (5, 7, [2, 3]), (6, 4, [9, 4]), (3, 10, [1, 16])] {
        let mut out = vec![0; rows * cols + 2];
        pool.tiles(&mut out, [rows, cols], size, |r, c, mut tile| {
            for i in 0..tile.rows() {
                tile.row(i).iter_mut().enumerate().for_each(|(j, x)| *x += 100 * (r + i) + c + j + 1);
            }
        });
        let want: Vec<usize> = (0..rows * cols).map(|i| i / cols * 100 + i % cols + 1).collect();
        assert_eq!(out[..rows * cols], want, "{rows} x {cols} by {size:?}");
        assert_eq!(out[rows * cols..], [0, 0]);
    }
}
