//! Evaluation runs and reports: `cargo xtask eval`.
//!
//! The command line ([`cli`]) is turned once into a typed description of the run; a suite in [`eval`] measures
//! [`row::Row`]s and hands them over in [`report::Section`]s; [`report::Report`] shows them on the terminal and writes
//! them as JSON, Markdown and HTML. [`plot`], [`progress`] and [`machine`] are what suites need beside that.

#![forbid(unsafe_code)]

pub mod cli;
pub mod column;
pub mod eval;
mod format;
mod html;
pub mod machine;
mod markdown;
pub mod plot;
pub mod progress;
pub mod random_model;
pub mod report;
pub mod row;
pub mod table;

use std::process::ExitCode;

/// Run the command line: 0 when done, 1 with one line on stderr when the run failed, 2 on wrong usage.
pub fn main() -> ExitCode {
    let done = match cli::parse() {
        cli::Task::Eval(run) => eval::run(&run),
        cli::Task::RandomModel(config) => random_model::run(&config),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The causes on one line, also where a library's message has several.
            let chain = format!("{error:#}");
            eprintln!(
                "error: {}",
                chain.lines().map(str::trim).collect::<Vec<_>>().join(" ")
            );
            ExitCode::FAILURE
        }
    }
}
