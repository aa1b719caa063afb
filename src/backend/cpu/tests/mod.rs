//! Compares the CPU backend with the definitions, and with itself on other instructions and threads.

mod definition;
mod memory;
mod ops;
mod pool;
mod quantized;
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
