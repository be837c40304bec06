//! Evaluation runs and reports.
fn main() {}
