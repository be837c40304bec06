//! Flags of `cargo xtask report`.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser};
use eval_report::Cells;
use eval_report::cells::Part;

use super::{Cli, Command};
use crate::eval::{self, CellFolder};
use crate::report::{self, Config};

#[derive(Args)]
pub(super) struct ReportArgs {
    /// A report.json
    #[arg(value_name = "BEFORE", required_unless_present = "merge")]
    before: Option<PathBuf>,
    /// The report.json of another run
    #[arg(value_name = "AFTER", required_unless_present = "merge")]
    after: Option<PathBuf>,
    /// Make the report of the evaluation whose cells are in this folder
    #[arg(long, value_name = "DIR", conflicts_with_all = ["before", "after"])]
    merge: Option<PathBuf>,
    /// Folder for report.json, report.md and report.html of a merge
    #[arg(long, value_name = "DIR", requires = "merge")]
    out: Option<PathBuf>,
    /// Print only JSON on stdout
    #[arg(long)]
    json: bool,
}

impl ReportArgs {
    pub(super) fn run(self) -> Result<()> {
        match (self.before, self.after, self.merge) {
            (Some(before), Some(after), None) => report::run(&Config {
                before,
                after,
                json: self.json,
            }),
            (_, _, Some(cells)) => merge(cells, self.out, self.json),
            // The parser lets nothing else through.
            _ => bail!("two reports or --merge are needed"),
        }
    }
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
        dir,
        part: Part::Nothing,
        command: words,
    });
    eval::run(run)
}
