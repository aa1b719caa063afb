//! What says how fast and how right a model runs.
pub mod bench;
pub mod eval;
pub mod invariance;
pub mod verify;
