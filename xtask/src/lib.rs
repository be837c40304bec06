//! Evaluation runs and reports: `cargo xtask eval`, and `cargo xtask report` to compare two of them.
//!
//! [`cli`] turns flags into a typed description of the work. A suite in [`suites`] calls the crates and returns
//! [`eval_report::Section`]s of measured rows, [`all`] runs several suites on one model, and [`eval`] makes the report.
//! [`settings`] is what all suites share.

#![forbid(unsafe_code)]

pub mod all;
pub mod bar;
pub mod cli;
pub mod default_model;
pub mod eval;
mod hub;
pub mod random_model;
mod report;
mod scratch;
pub mod settings;
mod stdout;
pub mod suite;
pub mod suites;
