//! Flags of `cargo xtask slurm`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::values::positive;
use crate::slurm::{self, Config};

#[derive(Args)]
pub(super) struct SlurmArgs {
    /// Folder for the scripts, the cells, the logs and the report; all nodes have to reach it under this name
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Number of parts
    #[arg(long, value_name = "N", default_value = "4", value_parser = positive)]
    parts: NonZeroUsize,
    /// Before the parts, compute the calibration statistics of `eval structured` in N parts of their own [default: each part
    /// calibrates by itself]
    #[arg(long, value_name = "N", value_parser = positive)]
    calib_parts: Option<NonZeroUsize>,
    /// Partition of the jobs [default: the cluster's]
    #[arg(long, value_name = "NAME")]
    partition: Option<String>,
    /// Time limit of a part, as sbatch takes it
    #[arg(long, value_name = "TIME", default_value = "04:00:00")]
    time: String,
    /// Memory of a part, as sbatch takes it
    #[arg(long, value_name = "SIZE", default_value = "8G")]
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
        slurm::run(&Config {
            out: self.out,
            parts: self.parts,
            calib_parts: self.calib_parts,
            partition: self.partition,
            time: self.time,
            memory: self.memory,
            cores: self.cores,
            evaluation: self.evaluation,
        })
    }
}
