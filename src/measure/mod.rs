//! Measurements: how fast a model runs, and whether what it computes is right.
pub mod bench;
pub mod divergence;
pub mod eval;
pub mod invariance;
pub mod verify;
