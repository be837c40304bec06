//! Flags of `cargo xtask report`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, Parser};
use eval_report::cells::Part;
use eval_report::{Cells, part_file};

use super::{Cli, Command};
use crate::eval::{self, CellFolder};
use crate::report::{self, Config};
use crate::scratch::Scratch;

#[derive(Args)]
pub(super) struct ReportArgs {
    /// A report.json
    #[arg(value_name = "BEFORE", required_unless_present = "merge")]
    before: Option<PathBuf>,
    /// The report.json of another run
    #[arg(value_name = "AFTER", required_unless_present = "merge")]
    after: Option<PathBuf>,
    /// Make the report of the evaluation whose cells are in this folder, or in the report.json of all its parts
    #[arg(long, value_name = "DIR|JSON..", num_args = 1.., conflicts_with_all = ["before", "after"])]
    merge: Vec<PathBuf>,
    /// Folder for report.json, report.md and report.html of a merge
    #[arg(long, value_name = "DIR", requires = "merge")]
    out: Option<PathBuf>,
    /// Print only JSON on stdout
    #[arg(long)]
    json: bool,
}

impl ReportArgs {
    pub(super) fn run(self) -> Result<()> {
        match (self.before, self.after, &self.merge[..]) {
            (Some(before), Some(after), []) => report::run(&Config {
                before,
                after,
                json: self.json,
            }),
            (_, _, [folder]) if folder.is_dir() || !is_json(folder) => {
                merge(folder.clone(), self.out, self.json)
            }
            (_, _, files) if !files.is_empty() => {
                let scratch = Scratch::new()?;
                part_file::collect(files, scratch.path()).context("--merge")?;
                merge(scratch.path().into(), self.out, self.json)
            }
            // The parser lets nothing else through.
            _ => bail!("two reports or --merge are needed"),
        }
    }
}

fn is_json(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| extension == "json")
}

/// The same evaluation again, with every cell out of the folder.
fn merge(dir: PathBuf, out: Option<PathBuf>, json: bool) -> Result<()> {
    let facts = Cells::facts(&dir).context("--merge")?;
    let words = facts.command;
    let program = [String::from("cargo xtask")].into_iter();
    let cli = Cli::try_parse_from(program.chain(words.iter().cloned()));
    let named = || format!("--merge {}", dir.display());
    let Command::Eval(args) = cli.with_context(named)?.command else {
        bail!("{}: not an evaluation", named());
    };
    let mut run = args.run(words.clone());
    run.out = out;
    run.json = json;
    run.settings.quiet = json;
    run.cells = Some(CellFolder {
        dir: Some(dir),
        part: Part::Nothing,
        command: words,
    });
    eval::run(run)
}
