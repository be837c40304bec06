//! Evaluation runs and reports.

fn main() -> std::process::ExitCode {
    xtask::cli::main()
}
