//! The `aoji` command.
fn main() {}
