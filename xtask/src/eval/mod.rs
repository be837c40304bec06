//! What `cargo xtask eval` does: one module per suite, and the report around them.

pub mod all;
pub mod kv;
pub mod lattice;
pub mod lowrank;
pub mod perplexity;
pub mod structured;
pub mod tasks;

use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use eval_report::{Machine, Report, Section};

use crate::cli::{Common, Run, Suite};
use crate::hub;

/// Measure, print, and write the report.
///
/// # Errors
/// Whatever stopped the run, naming the file, tensor or flag.
pub fn run(mut run: Run) -> Result<()> {
    if let (Suite::All(_), None) = (&run.suite, &run.common.out) {
        run.common.out = Some(all::report_folder());
    }
    let common = &run.common;
    if let Some(dir) = &common.out {
        eval_report::prepare(dir).context("--out")?;
    }
    if let Some(threads) = common.threads {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build_global()
            .context("--threads")?;
    }
    for model in models(&mut run.suite) {
        *model = hub::open_model(model, common)?;
    }
    let sections = sections(common, &run.suite)?;
    let mut report = Report {
        command: run.command.clone(),
        version: version(),
        machine: Machine::detect(),
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
    } else if matches!(run.suite, Suite::All(_)) {
        report.summary_text()
    } else {
        report.to_text()
    })?;
    if let (Some(dir), false) = (&common.out, common.json) {
        eprintln!("report: {}", dir.join("report.html").display());
    }
    Ok(())
}

/// What a suite measures.
fn sections(common: &Common, suite: &Suite) -> Result<Vec<Section>> {
    match suite {
        Suite::All(config) => all::run(common, config),
        Suite::Perplexity {
            config,
            hidden_metrics,
        } => perplexity::run(common, config, *hidden_metrics),
        Suite::Structured(config) => structured::run(common, config),
        Suite::Lowrank(config) => lowrank::run(common, config),
        Suite::Lattice(config) => lattice::run(common, config),
        Suite::Kv(config) => kv::run(common, config),
        Suite::Tasks(config) => tasks::run(common, config),
    }
}

/// The models that a suite was told of.
fn models(suite: &mut Suite) -> Vec<&mut PathBuf> {
    match suite {
        Suite::All(config) => config.given.iter_mut().map(|g| &mut g.text.model).collect(),
        Suite::Lattice(_) => Vec::new(),
        Suite::Perplexity { config, .. } => vec![&mut config.model],
        Suite::Lowrank(config) => vec![&mut config.perplexity.model],
        Suite::Structured(config) => vec![&mut config.perplexity.model],
        Suite::Kv(config) => match &mut config.task {
            kv::Task::Perplexity(texts) => texts.iter_mut().map(|t| &mut t.text.model).collect(),
            kv::Task::Trace(traces) => traces.recorded.iter_mut().map(|t| &mut t.model).collect(),
            kv::Task::Recall(recall) => recall.model.iter_mut().collect(),
            kv::Task::Speed(speed) => speed.model.iter_mut().collect(),
        },
        Suite::Tasks(config) => config.models.iter_mut().collect(),
    }
}

/// Print to stdout; a reader that has seen enough, such as `head`, is no failure.
pub(crate) fn print(text: &str) -> Result<()> {
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
