//! The command line, turned once into a [`Run`]; nothing behind this module looks at flags.

mod all;
mod kv;
mod lattice;
mod lowrank;
mod random_model;
mod structured;
mod tasks;
mod train_default;

use std::io::IsTerminal;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

use crate::eval::{self, perplexity};
use crate::progress::Progress;

pub(crate) use all::{Part, parts};

/// What was asked for.
#[derive(Debug)]
pub enum Job {
    /// Evaluate.
    Eval(Box<Run>),
    /// Compare two reports.
    Report(crate::report::Config),
    /// Make a checkpoint of random weights.
    RandomModel(crate::random_model::Config),
    /// Train the embedded default model from nothing.
    TrainDefault(crate::default_model::Config),
}

/// One evaluation, as meant.
#[derive(Debug)]
pub struct Run {
    /// Command line, one argument each, as it goes into the report.
    pub command: Vec<String>,
    /// What every suite is told.
    pub common: Common,
    /// What is to be measured.
    pub suite: Suite,
}

/// The suite with what it alone is told.
#[derive(Debug)]
pub enum Suite {
    /// Every suite, on the embedded default model or a given one.
    All(eval::all::Config),
    /// Perplexity of a checkpoint.
    Perplexity {
        /// Model, text and protocol.
        config: perplexity::Config,
        /// Whether to measure the hidden states too.
        hidden_metrics: bool,
    },
    /// Structured pruning.
    Structured(eval::structured::Config),
    /// Low-rank repair.
    Lowrank(Box<eval::lowrank::Config>),
    /// Pruning of recurrent networks by order.
    Lattice(eval::lattice::Config),
    /// KV-cache eviction.
    Kv(eval::kv::Config),
    /// Multiple choice and generation.
    Tasks(eval::tasks::Config),
}

/// What every suite is told.
#[derive(Debug, Clone)]
pub struct Common {
    /// Window in tokens, where asked for.
    pub window: Option<usize>,
    /// Number of windows or questions to evaluate; all where not asked for.
    pub samples: Option<usize>,
    /// Seed of everything random.
    pub seed: u64,
    /// Threads of the pool; all cores where not asked for.
    pub threads: Option<usize>,
    /// Where tensors live.
    pub device: Device,
    /// Folder for the report files.
    pub out: Option<PathBuf>,
    /// Whether stdout carries the report as JSON and stderr no progress.
    pub json: bool,
}

impl Common {
    /// A progress bar on stderr, or a hidden one where the run is to be quiet.
    pub fn progress(&self, label: impl Into<String>, total: u64) -> Progress {
        if self.json {
            Progress::hidden()
        } else {
            Progress::new(label, total)
        }
    }

    /// Says on stderr what is done, where progress is shown.
    pub fn note(&self, text: &str) {
        if !self.json && std::io::stderr().is_terminal() {
            eprintln!("{text}");
        }
    }
}

/// Where tensors live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// Processor.
    Cpu,
    /// NVIDIA GPU; needs the `cuda` feature.
    Cuda,
    /// Apple GPU; needs the `metal` feature.
    Metal,
}

impl Device {
    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Device::Cpu => "cpu",
            Device::Cuda => "cuda",
            Device::Metal => "metal",
        }
    }

    /// The first device of this kind.
    ///
    /// # Errors
    /// No such device, or a program built without the feature of the same name.
    pub fn open(self) -> Result<candle_core::Device> {
        match self {
            Device::Cpu => Ok(candle_core::Device::Cpu),
            Device::Cuda => candle_core::Device::new_cuda(0),
            Device::Metal => candle_core::Device::new_metal(0),
        }
        .with_context(|| {
            format!(
                "--device {0} (needs the hardware and a build with --features {0})",
                self.name()
            )
        })
    }
}

/// Post-training compression, measured.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Evaluate models before and after compression; without a suite, all of them on the embedded model, on 16 windows
    /// unless --samples says otherwise
    Eval(Box<EvalArgs>),
    /// Compare two reports, row by row
    Report(ReportArgs),
    /// Write a checkpoint with random weights for a config.json, to measure memory and speed on
    RandomModel(random_model::RandomModelArgs),
    /// Train the embedded default model from nothing, on text that the project generates
    TrainDefault(train_default::TrainDefaultArgs),
}

#[derive(Args)]
struct EvalArgs {
    #[command(flatten)]
    all: all::AllArgs,
    #[command(flatten)]
    common: CommonArgs,
    #[command(subcommand)]
    suite: Option<SuiteArgs>,
}

#[derive(Args)]
struct ReportArgs {
    /// A report.json
    #[arg(value_name = "BEFORE")]
    before: PathBuf,
    /// The report.json of another run
    #[arg(value_name = "AFTER")]
    after: PathBuf,
    /// Print the comparison as JSON on stdout and nothing else there
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum SuiteArgs {
    /// Perplexity of a checkpoint on a text
    Perplexity(PerplexityArgs),
    /// Structured pruning: quality, size and speed by method and ratio
    Structured(Box<structured::StructuredArgs>),
    /// Low-rank repair of compressed models: output error, quality and size by compressor, method and rank
    Lowrank(Box<lowrank::LowrankArgs>),
    /// Pruning of recurrent networks by order, with the controls that tell whether order matters
    Lattice(Box<lattice::LatticeArgs>),
    /// KV-cache eviction: perplexity, attention on traces, or recall, by policy and budget
    Kv(Box<kv::KvArgs>),
    /// Zero-shot and few-shot tasks: multiple choice by log-likelihood, and generation with exact match
    Tasks(Box<tasks::TasksArgs>),
}

#[derive(Args)]
#[command(next_help_heading = "Common options")]
struct CommonArgs {
    /// Tokens in a window
    #[arg(long, global = true, value_name = "N", value_parser = window)]
    window: Option<usize>,
    /// Evaluate the first N windows or questions only
    #[arg(long, global = true, value_name = "N")]
    samples: Option<NonZeroUsize>,
    /// Seed of everything random
    #[arg(long, global = true, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Threads to compute with [default: all cores]
    #[arg(long, global = true, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Where to compute
    #[arg(long, global = true, value_enum, default_value_t = Device::Cpu)]
    device: Device,
    /// Folder for report.json, report.md and report.html
    #[arg(long, global = true, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print the report as JSON on stdout and nothing else there
    #[arg(long, global = true)]
    json: bool,
}

/// Model and text to measure perplexity with.
#[derive(Args)]
struct TextArgs {
    /// Checkpoint folder in Hugging Face layout, or hf:OWNER/NAME
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Text to evaluate on
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Begin windows with text, not with the tokenizer's BOS token
    #[arg(long)]
    no_bos: bool,
}

impl From<TextArgs> for perplexity::Config {
    fn from(
        TextArgs {
            model,
            text,
            no_bos,
        }: TextArgs,
    ) -> Self {
        perplexity::Config {
            model,
            text,
            bos: !no_bos,
        }
    }
}

#[derive(Args)]
struct PerplexityArgs {
    #[command(flatten)]
    text: TextArgs,
    /// Also measure nuclear norm and entropy of the hidden states
    #[arg(long)]
    hidden_metrics: bool,
}

fn window(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(tokens) if tokens >= 2 => Ok(tokens),
        _ => Err("expected a number of tokens, at least 2 (the first is never a target)".into()),
    }
}

fn ratio(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..1.0).contains(&share) => Ok(share),
        _ => Err("expected a share, at least 0 and below 1".into()),
    }
}

/// Read the command line of this process; on wrong usage or a call for help this ends the process as clap does.
pub(crate) fn parse() -> Job {
    match Cli::parse().command {
        Command::Eval(args) => Job::Eval(Box::new(args.run())),
        Command::Report(ReportArgs {
            before,
            after,
            json,
        }) => Job::Report(crate::report::Config {
            before,
            after,
            json,
        }),
        Command::RandomModel(args) => Job::RandomModel(args.into()),
        Command::TrainDefault(args) => Job::TrainDefault(args.into()),
    }
}

impl EvalArgs {
    fn run(self) -> Run {
        let Self { all, common, suite } = self;
        if suite.is_some() && all.is_given() {
            let what = "--model, --text and --calib of a suite go behind its name";
            Cli::command()
                .error(ErrorKind::ArgumentConflict, what)
                .exit()
        }
        let words = std::env::args_os()
            .skip(1)
            .map(|word| word.to_string_lossy().into_owned());
        let CommonArgs {
            window,
            samples,
            seed,
            threads,
            device,
            out,
            json,
        } = common;
        Run {
            command: ["cargo", "xtask"]
                .map(String::from)
                .into_iter()
                .chain(words)
                .collect(),
            common: Common {
                window,
                samples: samples.map(NonZeroUsize::get),
                seed,
                threads: threads.map(NonZeroUsize::get),
                device,
                out,
                json,
            },
            suite: suite.map_or_else(|| Suite::All(all.into()), |suite| suite.suite(seed)),
        }
    }
}

impl SuiteArgs {
    fn suite(self, seed: u64) -> Suite {
        match self {
            SuiteArgs::Perplexity(args) => Suite::Perplexity {
                config: args.text.into(),
                hidden_metrics: args.hidden_metrics,
            },
            SuiteArgs::Structured(args) => Suite::Structured(args.config(seed)),
            SuiteArgs::Lowrank(args) => Suite::Lowrank(Box::new(args.config(seed))),
            SuiteArgs::Lattice(args) => Suite::Lattice(args.config(seed)),
            SuiteArgs::Kv(args) => Suite::Kv(args.config()),
            SuiteArgs::Tasks(args) => Suite::Tasks((*args).into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
