//! Measurements: how fast a model runs, whether what it computes is right, and what its matrices are given.
pub mod bench;
pub mod calibration;
pub mod divergence;
pub mod eval;
pub mod invariance;
pub mod verify;
