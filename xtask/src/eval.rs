//! `cargo xtask eval`: run a suite or all of them, print and write the report.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use eval_report::{Machine, Report};

use crate::settings::Settings;
use crate::stdout::print;
use crate::suite::Suite;
use crate::{all, hub};

/// One evaluation.
#[derive(Debug)]
pub struct Run {
    /// Command line, one argument each, as it goes into the report.
    pub command: Vec<String>,
    /// What all suites share.
    pub settings: Settings,
    /// What to measure.
    pub scope: Scope,
    /// Folder for the report files.
    pub out: Option<PathBuf>,
    /// Whether stdout gets the report as JSON.
    pub json: bool,
}

/// What to measure.
#[derive(Debug)]
pub enum Scope {
    /// All suites, on the bundled model or another.
    All(all::Config),
    /// One suite.
    One(Box<Suite>),
}

/// Measure, print, and write the report.
///
/// # Errors
/// Whatever stopped the run, naming the file, tensor or flag.
pub(crate) fn run(mut run: Run) -> Result<()> {
    if let (Scope::All(_), None) = (&run.scope, &run.out) {
        run.out = Some(all::report_folder());
    }
    let settings = &run.settings;
    if let Some(dir) = &run.out {
        eval_report::prepare(dir).context("--out")?;
    }
    let models = match &mut run.scope {
        Scope::All(config) => config.models(),
        Scope::One(suite) => suite.models(),
    };
    for model in models {
        *model = hub::open_model(model, settings)?;
    }
    let mut report = Report {
        command: run.command,
        version: version(),
        machine: Machine::detect(),
        device: settings.device.name().into(),
        threads: rayon::current_num_threads(),
        seed: settings.seed,
        sections: Vec::new(),
    };
    let sections = match &run.scope {
        Scope::All(config) => all::run(settings, config)?,
        Scope::One(suite) => suite.run(settings)?,
    };
    let failures: Vec<String> = (sections.iter())
        .flat_map(|section| section.failures.clone())
        .collect();
    for section in sections {
        report.push(section)?;
    }
    if let Some(dir) = &run.out {
        report.write(dir).context("--out")?;
    }
    print(&match &run.scope {
        _ if run.json => report.to_json()?,
        Scope::All(_) => report.summary_text(),
        Scope::One(_) => report.to_text(),
    })?;
    if let (Some(dir), false) = (&run.out, run.json) {
        eprintln!("report: {}", dir.join("report.html").display());
    }
    match failures.split_first() {
        None => Ok(()),
        Some((first, [])) => bail!("{first}; the report has the rest"),
        Some((first, others)) => bail!(
            "{first}; {} more failed; the report has the rest",
            others.len()
        ),
    }
}

/// Version of this program, and the commit of the sources where they are in a git checkout.
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
