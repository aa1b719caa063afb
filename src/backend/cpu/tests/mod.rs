//! The CPU backend against the definitions, and against itself on other instructions and threads.

mod definition;
mod ops;
mod pool;
mod sampler;
mod simd;

use super::level::Level;

/// The levels of this CPU other than the portable one; says which are skipped.
fn others() -> Vec<Level> {
    for level in Level::ALL.into_iter().filter(|l| !l.is_here()) {
        println!("skipped: this CPU has no {level}");
    }
    Level::here().skip(1).collect()
}
