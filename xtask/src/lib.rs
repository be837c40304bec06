//! Evaluation runs and reports: `cargo xtask eval`, and `cargo xtask report` to compare two of them.
//!
//! The command line ([`cli`]) is turned once into a typed description of the run. A suite in [`eval`] measures
//! [`eval_report::Row`]s and returns them in [`eval_report::Section`]s of one [`eval_report::Report`].

#![forbid(unsafe_code)]

pub mod cli;
pub mod default_model;
pub mod eval;
mod hub;
pub mod progress;
pub mod random_model;
mod report;
mod scratch;

use std::process::ExitCode;

/// Run the command line: 0 when done, 1 with one line on stderr when the run failed, 2 on wrong usage.
pub fn main() -> ExitCode {
    let done = match cli::parse() {
        cli::Job::Eval(run) => eval::run(*run),
        cli::Job::Report(config) => report::run(&config),
        cli::Job::RandomModel(config) => random_model::run(&config),
        cli::Job::TrainDefault(config) => default_model::run(&config),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", one_line(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error and its causes on one line. A cause that the text before it already ends with is not said twice, and line
/// breaks of a library's message become spaces.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        let text = text.lines().map(str::trim).collect::<Vec<_>>().join(" ");
        if !line.ends_with(&text) {
            if !line.is_empty() {
                line += ": ";
            }
            line += &text;
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_and_says_nothing_twice() {
        let cause = std::io::Error::other("no\nspace");
        let error = anyhow::Error::new(cause)
            .context("cannot write x: no space")
            .context("flap");
        assert_eq!(one_line(&error), "flap: cannot write x: no space");
    }
}
