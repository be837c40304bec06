//! What `cargo xtask eval` does: one module per suite, and the report around them.

pub mod kv;
pub mod lattice;
pub mod lowrank;
pub mod perplexity;
pub mod structured;

use std::io::{ErrorKind, Write};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cli::{Run, Suite};
use crate::machine::Machine;
use crate::report::{self, Report};

/// Measure, print, and write the report.
///
/// # Errors
/// Whatever stopped the run, naming the file, tensor or flag.
pub fn run(run: &Run) -> Result<()> {
    let common = &run.common;
    if let Some(dir) = &common.out {
        report::prepare(dir).context("--out")?;
    }
    if let Some(threads) = common.threads {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build_global()
            .context("--threads")?;
    }
    let sections = match &run.suite {
        Suite::All => bail!("the run of all suites is not built yet"),
        Suite::Perplexity {
            config,
            hidden_metrics,
        } => perplexity::run(common, config, *hidden_metrics)?,
        Suite::Structured(config) => structured::run(common, config)?,
        Suite::Lowrank(config) => lowrank::run(common, config)?,
        Suite::Lattice(config) => lattice::run(common, config)?,
        Suite::Kv(config) => kv::run(common, config)?,
    };
    let mut report = Report {
        command: run.command.clone(),
        version: version(),
        machine: Machine::detect()?,
        device: common.device.name().into(),
        threads: rayon::current_num_threads(),
        seed: common.seed,
        sections: Vec::new(),
    };
    for section in sections {
        report.push(section)?;
    }
    if let Some(dir) = &common.out {
        report.write(dir).context("--out")?;
    }
    print(&if common.json {
        report.to_json()?
    } else {
        report.to_text()
    })?;
    if let (Some(dir), false) = (&common.out, common.json) {
        eprintln!("report: {}", dir.join("report.html").display());
    }
    Ok(())
}

/// Print to stdout; a reader that has seen enough, such as `head`, is no failure.
fn print(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error).context("stdout"),
        _ => Ok(()),
    }
}

/// Version of this program, and the commit of the sources where they lie in a git checkout.
fn version() -> String {
    let version = env!("CARGO_PKG_VERSION");
    let git = Command::new("git")
        .args([
            "-C",
            env!("CARGO_MANIFEST_DIR"),
            "describe",
            "--always",
            "--dirty",
            "--exclude=*",
        ])
        .output();
    match git {
        Ok(output) if output.status.success() => format!(
            "{version}+{}",
            String::from_utf8_lossy(&output.stdout).trim()
        ),
        _ => version.to_owned(),
    }
}
