//! Evaluation runs and reports: `cargo xtask eval`, `cargo xtask report` to compare two of them or to merge the parts of one,
//! `cargo xtask slurm` to measure parts on a cluster, and `cargo xtask generate` to see what a model writes.
//!
//! [`cli`] turns flags into a typed description of the work. A suite in [`suites`] calls the crates and returns
//! [`eval_report::Section`]s of measured rows, [`all`] runs several suites on one model, and [`eval`] makes the report.
//! [`settings`] is what all suites share.

#![forbid(unsafe_code)]

pub mod all;
pub mod bar;
mod chat;
pub mod cli;
pub mod default_model;
mod estimate;
pub mod eval;
pub mod generate;
mod hub;
pub mod model;
pub mod random_model;
mod report;
mod scratch;
pub mod settings;
mod slurm;
mod stdout;
pub mod suite;
pub mod suites;
