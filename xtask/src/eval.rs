//! `cargo xtask eval`: run a suite or all of them, print and write the report.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use eval_report::cells::{Part, RunFacts};
use eval_report::{Cells, Machine, Report, command_line, part_file};
use tensor_io::ContentHash;

use crate::scratch::Scratch;
use crate::settings::Settings;
use crate::stdout::print;
use crate::suite::Suite;
use crate::{all, default_model, hub};

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
    /// Where finished cells are kept.
    pub cells: Option<CellFolder>,
}

/// A folder of finished cells.
#[derive(Debug)]
pub struct CellFolder {
    /// The folder; for the time of the run alone, where the report of a part keeps the cells.
    pub dir: Option<PathBuf>,
    /// Which cells this process measures.
    pub part: Part,
    /// The words that all processes with the same folder have alike.
    pub command: Vec<String>,
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
    if let Some(dir) = &run.out {
        eval_report::prepare(dir).context("--out")?;
    }
    let models = match &mut run.scope {
        Scope::All(config) => config.models(),
        Scope::One(suite) => suite.models(),
    };
    let mut opened = Vec::new();
    for model in models {
        let path = hub::open_model(model, &run.settings)?;
        opened.push((model.display().to_string(), path.clone()));
        *model = path;
    }
    if let Scope::All(all::Config { inputs: None }) = &run.scope {
        opened.push(("bundled model".into(), default_model::folder()));
    }
    if let Some(adapter) = &run.settings.weights.adapter {
        opened.push((adapter.display().to_string(), adapter.clone()));
    }
    let scratch = Scratch::new()?;
    let mut facts = None;
    if let Some(folder) = &run.cells {
        let of_run = folder.facts(opened)?;
        let dir = folder.dir.as_deref().unwrap_or(scratch.path());
        run.settings.cells = Cells::open(dir, &of_run, folder.part).context("--cells")?;
        facts = Some(of_run);
    }
    let settings = &run.settings;
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
    if let Scope::One(suite) = &run.scope
        && suite.only_calibrates()
    {
        return Ok(());
    }
    let whole = match &run.cells {
        Some(folder) => folder.is_whole(&settings.cells)?,
        None => true,
    };
    if let (
        Some(CellFolder {
            dir: None,
            part: Part::Shard(shard),
            ..
        }),
        Some(facts),
    ) = (&run.cells, &facts)
    {
        // The report of a part has its cells.
        let json = part_file::to_json(&report, &settings.cells, facts, *shard)?;
        if let Some(dir) = &run.out {
            let path = dir.join("report.json");
            tensor_io::atomic::write(path, json.as_bytes()).context("--out")?;
        }
        if run.json {
            print(&json)?;
        }
    }
    let failures: Vec<String> = (sections.iter())
        .flat_map(|section| section.failures.clone())
        .collect();
    if whole {
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
    }
    match failures.split_first() {
        None => Ok(()),
        _ if !whole => bail!("{}", failures.join("; ")),
        Some((first, [])) => bail!("{first}; the report has the rest"),
        Some((first, others)) => bail!(
            "{first}; {} more failed; the report has the rest",
            others.len()
        ),
    }
}

impl CellFolder {
    /// What the cells are measured by: the contents of `models` and of every file that the command names.
    fn facts(&self, models: Vec<(String, PathBuf)>) -> Result<RunFacts> {
        let mut inputs = BTreeMap::new();
        for (name, path) in models {
            inputs.insert(name, ContentHash::of_path(&path)?);
        }
        let words = self.command.iter().flat_map(|word| {
            let value = word
                .split_once('=')
                .map_or(word.as_str(), |(_, value)| value);
            list_items(value)
        });
        for word in words {
            // Of a part of a text, FILE[0..80%], all of it counts.
            let whole = word.split_once('[').map_or(word, |(file, _)| file);
            let file = [word, whole]
                .into_iter()
                .find(|path| Path::new(path).is_file());
            if let Some(file) = file.filter(|file| !inputs.contains_key(*file)) {
                inputs.insert(file.to_owned(), ContentHash::of_path(file)?);
            }
        }
        Ok(RunFacts {
            command: self.command.clone(),
            version: version(),
            inputs,
        })
    }

    /// Whether the report can be made; where it is not this process that makes it, says on stderr what is left.
    fn is_whole(&self, cells: &Cells) -> Result<bool> {
        let missing = cells.missing();
        let count = cells.count();
        match self.part {
            Part::Shard(shard) => {
                let parts = match &self.dir {
                    Some(dir) => command_line(&[dir.display().to_string()]),
                    None => "with the report.json of every part".into(),
                };
                eprintln!(
                    "part {shard}: {} of all {count} cells are done; `cargo xtask report --merge {parts}` makes the report",
                    count - missing.len(),
                );
                Ok(false)
            }
            _ if missing.is_empty() => Ok(true),
            _ => bail!(
                "--merge: {} of {count} cells are missing: {}",
                missing.len(),
                missing.join("; ")
            ),
        }
    }
}

/// What a word may name as a list of paths, which may have commas too: every run of its parts.
fn list_items(word: &str) -> impl Iterator<Item = &str> {
    let commas = word.match_indices(',').map(|(at, _)| at);
    let ends: Vec<usize> = commas.chain([word.len()]).collect();
    let starts: Vec<usize> = [0]
        .into_iter()
        .chain(ends.iter().map(|end| end + 1))
        .collect();
    let items = (0..ends.len()).flat_map(move |first| {
        let (start, ends) = (starts[first], ends.clone());
        (first..ends.len()).map(move |last| (start, ends[last]))
    });
    items.map(|(start, end)| &word[start..end])
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_run_of_parts_may_be_a_path() {
        let items: Vec<&str> = list_items("a,b,c").collect();
        assert_eq!(items, ["a", "a,b", "a,b,c", "b", "b,c", "c"]);
        assert_eq!(list_items("one").collect::<Vec<_>>(), ["one"]);
    }
}
