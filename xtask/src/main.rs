//! Evaluation runs and reports.

use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = xtask::cli::parse();
    // Rayon and candle read this variable. Without it candle reads /proc/cpuinfo at every matrix product, which takes up to a
    // fifth of the time of decoding with a small model.
    // SAFETY: no other thread has been started.
    unsafe { std::env::set_var(xtask::cli::THREADS, cli.threads().to_string()) };
    cli.run()
}
