//! Flags of `cargo xtask slurm`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, Parser};
use eval_report::cells::Shard;

use super::values::{positive, single_line, up_to};
use super::{Cli, Command, CommonArgs, SuiteArgs};
use crate::slurm::{self, Config};

/// The most parts.
const PARTS: u64 = Shard::MAX as u64;

#[derive(Args)]
pub(super) struct SlurmArgs {
    /// Folder for the scripts, the cells, the logs and the report; all nodes have to reach it under this name
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Number of parts
    #[arg(long, value_name = "N", default_value = "4", value_parser = up_to::<NonZeroUsize>(PARTS))]
    parts: NonZeroUsize,
    /// Before the parts, compute the calibration statistics of `eval structured` in N parts of their own [default: each part
    /// calibrates by itself]
    #[arg(long, value_name = "N", value_parser = up_to::<NonZeroUsize>(PARTS))]
    calib_parts: Option<NonZeroUsize>,
    /// Partition of the jobs [default: the cluster's]
    #[arg(long, value_name = "NAME", value_parser = single_line)]
    partition: Option<String>,
    /// Time limit of a part, as sbatch takes it
    #[arg(long, value_name = "TIME", default_value = "04:00:00", value_parser = single_line)]
    time: String,
    /// Memory of a part, as sbatch takes it
    #[arg(long, value_name = "SIZE", default_value = "8G", value_parser = single_line)]
    memory: String,
    /// Cores of a part
    #[arg(long, value_name = "N", default_value = "4", value_parser = positive)]
    cores: NonZeroUsize,
    /// The evaluation, behind `--`: `eval SUITE ...`, or `eval --model DIR ...` for all suites
    #[arg(last = true, required = true, value_name = "EVALUATION")]
    evaluation: Vec<String>,
}

impl SlurmArgs {
    pub(super) fn run(self) -> Result<()> {
        let has_threads = self.check()?;
        slurm::run(&Config {
            out: self.out,
            parts: self.parts,
            calib_parts: self.calib_parts,
            partition: self.partition,
            time: self.time,
            memory: self.memory,
            cores: self.cores,
            threads: (!has_threads).then_some(self.cores),
            evaluation: self.evaluation,
        })
    }

    /// Whether the evaluation, which is one that can be run in parts, says how many threads compute. Wrong usage of its own ends
    /// the program, as it would end every job.
    pub(super) fn check(&self) -> Result<bool> {
        match self.evaluation.as_slice() {
            [eval, _, ..] if eval == "eval" => {}
            words => bail!(
                "expected `eval SUITE ...`, or `eval --model ..` for all suites, behind `--`, found {:?}",
                words.join(" ")
            ),
        }
        let words = self.evaluation.iter().map(String::as_str);
        let cli = Cli::try_parse_from(["cargo xtask"].into_iter().chain(words));
        let Command::Eval(mut args) = cli.unwrap_or_else(|error| error.exit()).command else {
            bail!("expected `eval` behind `--`");
        };
        let calib_shard = match &args.suite {
            Some(SuiteArgs::Structured(structured)) => structured.calib_shard,
            _ if self.calib_parts.is_some() => {
                bail!("--calib-parts: only `eval structured` calibrates in parts")
            }
            _ => None,
        };
        let CommonArgs {
            cells, shard, out, ..
        } = &args.common;
        for (is_given, flag) in [
            (cells.is_some(), "--cells"),
            (shard.is_some(), "--shard"),
            (calib_shard.is_some(), "--calib-shard"),
            (out.is_some(), "--out"),
        ] {
            if is_given {
                bail!("{flag}: the scripts set it");
            }
        }
        if args.common.json {
            bail!("--json: the merged report is a file in --out");
        }
        let has_threads = args.common.threads.is_some();
        // As every job runs it.
        args.common.cells = Some(slurm::cells(&self.out));
        let first = format!("1/{}", self.parts);
        args.common.shard = first.parse().ok();
        args.run(self.evaluation.clone());
        Ok(has_threads)
    }
}
