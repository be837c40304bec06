//! `cargo xtask eval`: run a suite or all of them, print and write the report.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use eval_report::cells::{Part, RunFacts};
use eval_report::{Cells, Machine, Report, command_line, part_file};
use tensor_io::ContentHash;

use crate::scratch::Scratch;
use crate::settings::Settings;
use crate::stdout::print;
use crate::suite::Suite;
use crate::{all, default_model, hub};

/// Version of this program, with the commit that it was built from where that was a git checkout.
pub const VERSION: &str = env!("XTASK_VERSION");

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
    let part = run.cells.as_ref().map(|folder| folder.part);
    // Only the whole has a place of its own.
    if let (Scope::All(_), None) = (&run.scope, &run.out)
        && !matches!(part, Some(Part::Shard(_)))
    {
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
        version: VERSION.into(),
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
    if let (Some(Part::Shard(shard)), Some(facts)) = (part, &facts)
        && (run.out.is_some() || run.json)
    {
        // The report of a part has its cells.
        let json = part_file::to_json(&report, &settings.cells, facts, shard)?;
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
        for word in input_words(&self.command).flat_map(list_items) {
            let Some(path) = named_path(word) else {
                continue;
            };
            if !inputs.contains_key(path) {
                inputs.insert(path.to_owned(), ContentHash::of_path(path)?);
            }
        }
        Ok(RunFacts {
            command: self.command.clone(),
            version: VERSION.into(),
            inputs,
        })
    }

    /// Whether the report can be made; where it is not this process that makes it, says on stderr what is left.
    fn is_whole(&self, cells: &Cells) -> Result<bool> {
        let missing = cells.missing();
        let count = cells.count();
        match self.part {
            Part::Shard(shard) => {
                let how = match &self.dir {
                    Some(dir) => {
                        let dir = command_line(&[dir.display().to_string()]);
                        format!("`cargo xtask report --merge {dir}`")
                    }
                    None => {
                        "`cargo xtask report --merge` with the report.json of every part".into()
                    }
                };
                eprintln!(
                    "part {shard}: {} of all {count} cells are done; {how} makes the report",
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

/// Flags whose values are what a run writes, to be there or not when it goes on.
const OUTPUTS: [&str; 4] = ["--save", "--save-plans", "--log-samples", "--resume"];

/// The words that may name what is measured: all but the values of [`OUTPUTS`].
fn input_words(command: &[String]) -> impl Iterator<Item = &str> {
    let mut is_output = false;
    command.iter().filter_map(move |word| {
        let is_written = std::mem::take(&mut is_output);
        let (flag, value) = match word.split_once('=') {
            Some((flag, value)) if flag.starts_with("--") => (flag, value),
            _ => (word.as_str(), word.as_str()),
        };
        let writes = OUTPUTS.contains(&flag);
        is_output = writes && flag == word;
        (!writes && !is_written).then_some(value)
    })
}

/// The file that a word names, by itself or in front of a part, `FILE[0..80%]`, of which all counts; or the file or folder behind
/// the name of what it is, `vad:FOLDER`. A word alone is no folder: the models are known, and methods may be called like one.
fn named_path(word: &str) -> Option<&str> {
    let whole = word.rsplit_once('[').map_or(word, |(file, _)| file);
    let behind = [word, whole].map(|word| word.split_once(':').map_or("", |(_, path)| path));
    [word, whole]
        .into_iter()
        .find(|path| Path::new(path).is_file())
        .or_else(|| behind.into_iter().find(|path| Path::new(path).exists()))
}

/// The most parts of a list that are tried as one path with commas in it.
const COMMAS: usize = 16;

/// What a word may name as a list of paths, which may have commas too: runs of its parts.
fn list_items(word: &str) -> impl Iterator<Item = &str> {
    let commas = word.match_indices(',').map(|(at, _)| at);
    let ends: Vec<usize> = commas.chain([word.len()]).collect();
    (0..ends.len()).flat_map(move |first| {
        let start = match first {
            0 => 0,
            _ => ends[first - 1] + 1,
        };
        let last = ends.len().min(first + COMMAS);
        let ends = ends[first..last].to_vec();
        ends.into_iter().map(move |end| &word[start..end])
    })
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

    #[test]
    fn a_list_of_many_parts_takes_as_many_tries() {
        let list = "0.1,".repeat(10_000);
        assert!(list_items(&list).count() <= COMMAS * 10_001);
    }

    #[test]
    fn files_and_folders_are_inputs_whatever_names_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let (text, clips, out) = (path("a,text"), path("clips"), path("out"));
        std::fs::write(&text, "text").unwrap();
        for folder in [&clips, &out] {
            std::fs::create_dir(folder).unwrap();
            std::fs::write(Path::new(folder).join("train"), "1").unwrap();
        }
        let words = [
            "eval",
            "lattice",
            "--task",
            &format!("mod3,text:{text},vad:{clips}"),
            &format!("--text={text}[0..80%]"),
            "--save",
            &out,
            "--log-samples",
            &text,
        ];
        let folder = CellFolder {
            dir: None,
            part: Part::All,
            command: words.map(String::from).to_vec(),
        };
        let facts = folder.facts(Vec::new()).unwrap();
        let inputs: Vec<&String> = facts.inputs.keys().collect();
        assert_eq!(inputs, [&text, &clips]);
        std::fs::write(Path::new(&clips).join("train"), "2").unwrap();
        let changed = folder.facts(Vec::new()).unwrap();
        assert_eq!(changed.inputs[&text], facts.inputs[&text]);
        assert_ne!(changed.inputs[&clips], facts.inputs[&clips]);
    }
}
