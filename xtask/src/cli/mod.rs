//! The command line: flags become a typed description of the work, which is then run. No other module imports this one.

mod all;
mod chain;
mod experts;
mod frontier;
mod generate;
mod kv;
mod lattice;
mod lowrank;
mod names;
mod random_model;
mod report;
mod slurm;
mod structured;
mod tasks;
mod train_default;
mod values;
mod weights;

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use causal_lm::Arithmetic;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand};

use eval_report::cells::{Part, Shard};
use lm_eval::ProtocolKind;
use toy_lm::bundled::EVALUATION;

use crate::eval::{self, CellFolder, Run, Scope};
use crate::settings::{Device, Settings, Weights, one_line};
use crate::suite::Suite;
use crate::suites::perplexity;
use crate::{default_model, generate as generation, random_model as random};

/// The environment variable that says how many threads compute.
pub const THREADS: &str = "RAYON_NUM_THREADS";

/// Parses the command line; wrong usage ends the program with 2.
pub fn parse() -> Cli {
    Cli::parse()
}

impl Cli {
    /// The number of threads to compute with: `--threads`, or what [`THREADS`] says, or one for each core; not more than cores.
    pub fn threads(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let wanted = match &self.command {
            Command::Eval(args) => args.common.threads,
            Command::Generate(args) => args.threads,
            _ => None,
        };
        let from_environment = || -> Option<usize> { std::env::var(THREADS).ok()?.parse().ok() };
        let (threads, flag) = match wanted {
            Some(threads) => (threads.get(), "--threads"),
            None => (from_environment().unwrap_or(0), THREADS),
        };
        if threads > cores {
            eprintln!("{flag} {threads}: one for each core, {cores} here, compute as fast");
        }
        match threads {
            0 => cores,
            threads => threads.min(cores),
        }
    }

    /// Runs the command: 0 when done, 1 with one line on stderr when it failed.
    pub fn run(self) -> ExitCode {
        // A name that limits nothing would be found out by nobody.
        let level = causal_lm::Level::from_env().context(causal_lm::LEVEL_VARIABLE);
        let done = level.and_then(|_| match self.command {
            Command::Eval(args) => eval::run(args.run(words())),
            Command::Report(args) => args.run(),
            Command::Slurm(args) => args.run(),
            Command::Generate(args) => generation::run(&args.config()),
            Command::RandomModel(args) => random::run(&args.into()),
            Command::TrainDefault(args) => default_model::run(&args.into()),
        });
        match done {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("error: {}", one_line(&error));
                ExitCode::FAILURE
            }
        }
    }
}

/// Ends the process as the parser does on wrong usage: flags that do not go together.
fn wrong(what: &str) -> ! {
    Cli::command()
        .error(ErrorKind::ArgumentConflict, what)
        .exit()
}

/// The words of this process's command line.
fn words() -> Vec<String> {
    let words = std::env::args_os().skip(1);
    words
        .map(|word| word.to_string_lossy().into_owned())
        .collect()
}

/// The command line of a report.
fn command(words: Vec<String>) -> Vec<String> {
    let program = ["cargo", "xtask"].map(String::from).into_iter();
    program.chain(words).collect()
}

/// The words that all parts of an evaluation have alike: not where results go, nor which part is measured and how fast.
fn shared(words: &[String]) -> Vec<String> {
    const VALUES: [&str; 6] = [
        "--cells",
        "--shard",
        "--calib-shard",
        "--out",
        "--threads",
        "--save-statistics",
    ];
    let mut shared = Vec::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let name = word.split_once('=').map_or(word.as_str(), |(name, _)| name);
        if VALUES.contains(&name) {
            if name == word {
                words.next();
            }
        } else if word != "--json" {
            shared.push(word.clone());
        }
    }
    shared
}

/// Post-training compression, measured.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version = eval::VERSION)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Evaluate models before and after compression; without a suite, run all suites on the bundled model (16 windows by
    /// default)
    Eval(Box<EvalArgs>),
    /// Compare two reports, row by row, or make the report of a run whose parts were measured apart
    Report(report::ReportArgs),
    /// Write the scripts of a Slurm job array that measures the parts of an evaluation and merges them
    Slurm(slurm::SlurmArgs),
    /// Generate text with a model, dense or compressed
    Generate(Box<generate::GenerateArgs>),
    /// Write a checkpoint with random weights for a config.json, to measure memory and speed
    RandomModel(random_model::RandomModelArgs),
    /// Train the bundled model from scratch on generated text
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

#[derive(Subcommand)]
enum SuiteArgs {
    /// Perplexity of a checkpoint on a text
    Perplexity(PerplexityArgs),
    /// Structured pruning: quality, size and speed by method and ratio
    Structured(Box<structured::StructuredArgs>),
    /// Low-rank repair of compressed models: output error, quality and size by compressor, method and rank
    Lowrank(Box<lowrank::LowrankArgs>),
    /// The best model that fits: one memory budget over width, bits and low-rank repair, with baselines at the same bytes
    Frontier(Box<frontier::FrontierArgs>),
    /// Pruning of recurrent networks by order, with baselines
    Lattice(Box<lattice::LatticeArgs>),
    /// KV-cache eviction: perplexity, attention on traces, recall or speed, by policy and budget
    Kv(Box<kv::KvArgs>),
    /// Zero-shot and few-shot tasks: multiple choice by log-likelihood, and generation with exact match
    Tasks(Box<tasks::TasksArgs>),
    /// Prune, quantise, repair and evict, one on top of the other, measured with weights as they are stored
    Chain(Box<chain::ChainArgs>),
}

#[derive(Args)]
#[command(next_help_heading = "Common options")]
struct CommonArgs {
    /// Window in tokens
    #[arg(long, global = true, value_name = "N", value_parser = values::window)]
    window: Option<usize>,
    /// Evaluate only the first N windows or questions
    #[arg(long, global = true, value_name = "N", value_parser = values::positive)]
    samples: Option<NonZeroUsize>,
    /// Seed of everything random
    #[arg(long, global = true, value_name = "N", default_value = "0", value_parser = values::seed)]
    seed: u64,
    /// Number of threads [default: all cores]
    #[arg(long, global = true, value_name = "N", value_parser = values::positive)]
    threads: Option<NonZeroUsize>,
    /// Device to compute on
    #[arg(long, global = true, value_enum, default_value_t = Device::Cpu)]
    device: Device,
    /// Folder for report.json, report.md and report.html
    #[arg(long, global = true, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print only the report as JSON on stdout
    #[arg(long, global = true)]
    json: bool,
    /// Folder of finished cells: those in it are not measured again, others are added, so that a stopped run goes on
    #[arg(long, global = true, value_name = "DIR")]
    cells: Option<PathBuf>,
    /// Measure only part I of N of the cells; `cargo xtask report --merge` makes the report of the folder of --cells, or of
    /// the report.json of every part, when all parts are done
    #[arg(long, global = true, value_name = "I/N")]
    shard: Option<Shard>,
}

/// What a model may be.
const MODEL: &str =
    "Checkpoint folder in Hugging Face layout (floats, GPTQ or compressed-tensors), or GGUF file";

/// The help of a flag that names models: names on a hub too, in a build that fetches them.
fn models(help: &str) -> String {
    match cfg!(feature = "hub") {
        true => format!("{help}. hf:OWNER/NAME is fetched from the Hugging Face hub"),
        false => help.to_owned(),
    }
}

/// Model and text to measure perplexity with.
#[derive(Args)]
struct TextArgs {
    #[arg(long, value_name = "PATH", help = models(MODEL))]
    model: PathBuf,
    /// Text to evaluate on, or a part of one, such as FILE[80..100%]
    #[arg(long, value_name = "FILE", default_value_os_t = bundled(EVALUATION))]
    text: PathBuf,
    #[command(flatten)]
    protocol: ProtocolArgs,
}

/// A text that is bundled with the repository.
fn bundled(name: &str) -> PathBuf {
    default_model::folder().join(name)
}

/// How a text becomes windows and targets.
#[derive(Args)]
struct ProtocolArgs {
    /// How the text becomes windows and targets: consecutive windows that each begin with BOS; gptq, windows of the text with
    /// the tokenizer's own special tokens as in published tables; or rolling, every token once, with perplexity per word and
    /// byte (lm-evaluation-harness)
    #[arg(long, value_name = "NAME", default_value = "windows", value_parser = protocol(&["windows", "gptq", "rolling"]))]
    protocol: ProtocolKind,
    /// Do not begin windows with the tokenizer's BOS token
    #[arg(long, conflicts_with = "protocol")]
    no_bos: bool,
}

impl From<ProtocolArgs> for ProtocolKind {
    fn from(args: ProtocolArgs) -> Self {
        with_bos(args.protocol, !args.no_bos)
    }
}

/// The protocol by the flags `--protocol` and `--no-bos`.
fn with_bos(kind: ProtocolKind, bos: bool) -> ProtocolKind {
    match kind {
        ProtocolKind::Windows if !bos => ProtocolKind::WindowsWithoutBos,
        kind => kind,
    }
}

fn protocol(names: &'static [&'static str]) -> impl TypedValueParser<Value = ProtocolKind> {
    PossibleValuesParser::new(names).try_map(|name| name.parse::<ProtocolKind>())
}

/// Protocols whose windows are decoded token by token.
const DECODED: &[&str] = &["windows", "gptq"];

impl From<TextArgs> for perplexity::Config {
    fn from(
        TextArgs {
            model,
            text,
            protocol,
        }: TextArgs,
    ) -> Self {
        perplexity::Config {
            model,
            text,
            protocol: protocol.into(),
        }
    }
}

#[derive(Args)]
struct PerplexityArgs {
    #[command(flatten)]
    text: TextArgs,
    #[command(flatten)]
    weights: weights::WeightArgs,
    /// Also measure nuclear norm and entropy of the hidden states
    #[arg(long)]
    hidden_metrics: bool,
}

impl EvalArgs {
    /// Why the flags cannot be used together.
    fn refused(&self) -> Option<String> {
        let Self { all, common, suite } = self;
        let has_report = common.out.is_some() || common.json;
        let calib_shard = match suite {
            Some(SuiteArgs::Structured(args)) => args.calib_shard,
            _ => None,
        };
        let refused = [
            (
                suite.is_some() && all.is_given(),
                "--model, --text and --calib of a suite go behind its name",
            ),
            (
                common.cells.is_none() && common.shard.is_some() && !has_report,
                "--shard: needs --cells, the folder that all parts share, or --out or --json for the report of the part",
            ),
            (
                calib_shard.is_some() && common.cells.is_none(),
                "--calib-shard: needs --cells, the folder that all parts share",
            ),
            (
                calib_shard.is_some() && common.shard.is_some(),
                "--calib-shard computes statistics and --shard measures cells: one at a time",
            ),
            (
                calib_shard.is_some() && has_report,
                "--calib-shard: a part of the statistics goes to --cells and has no report for --out or --json",
            ),
        ];
        let mut reasons = refused.iter().filter(|(is_refused, _)| *is_refused);
        let reason = reasons.next().map(|(_, reason)| (*reason).to_owned());
        reason.or_else(|| match suite {
            Some(SuiteArgs::Lattice(args)) => args.refused(common),
            _ => None,
        })
    }

    /// The evaluation that `words` ask for.
    fn run(self, words: Vec<String>) -> Run {
        if let Some(reason) = self.refused() {
            wrong(&reason)
        }
        let Self { all, common, suite } = self;
        let CommonArgs {
            window,
            samples,
            seed,
            threads: _,
            device,
            out,
            json,
            cells,
            shard,
        } = common;
        let cells = (cells.is_some() || shard.is_some()).then(|| CellFolder {
            dir: cells,
            part: shard.map_or(Part::All, Part::Shard),
            command: shared(&words),
        });
        Run {
            command: command(words),
            settings: Settings {
                window,
                samples: samples.map(NonZeroUsize::get),
                seed,
                device,
                weights: suite
                    .as_ref()
                    .map_or_else(Weights::default, SuiteArgs::weights),
                quiet: json,
                ..Settings::default()
            },
            cells,
            scope: match suite {
                None => Scope::All(all.into()),
                Some(suite) => Scope::One(Box::new(suite.suite(seed))),
            },
            out,
            json,
        }
    }
}

impl SuiteArgs {
    /// How the weights of the models are run; quality is measured in f32 arithmetic unless another is asked for.
    fn weights(&self) -> Weights {
        let weights = match self {
            SuiteArgs::Perplexity(args) => &args.weights,
            SuiteArgs::Kv(args) => &args.weights,
            SuiteArgs::Tasks(args) => &args.weights,
            SuiteArgs::Structured(args) => return args.arithmetic.weights(),
            SuiteArgs::Lowrank(args) => return args.arithmetic.weights(),
            SuiteArgs::Frontier(_) | SuiteArgs::Lattice(_) | SuiteArgs::Chain(_) => {
                return Weights::default();
            }
        };
        weights.or(Arithmetic::F32)
    }

    fn suite(self, seed: u64) -> Suite {
        match self {
            SuiteArgs::Perplexity(args) => Suite::Perplexity {
                config: args.text.into(),
                hidden_metrics: args.hidden_metrics,
            },
            SuiteArgs::Structured(args) => Suite::Structured(Box::new(args.config(seed))),
            SuiteArgs::Lowrank(args) => Suite::Lowrank(Box::new(args.config(seed))),
            SuiteArgs::Frontier(args) => Suite::Frontier(Box::new(args.config())),
            SuiteArgs::Lattice(args) => Suite::Lattice(Box::new(args.config(seed))),
            SuiteArgs::Kv(args) => Suite::Kv(args.config()),
            SuiteArgs::Tasks(args) => Suite::Tasks((*args).into()),
            SuiteArgs::Chain(args) => Suite::Chain(args.config()),
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

    /// All arguments of a command and of those below it, with the words that lead there.
    fn arguments(command: &clap::Command, words: &[&str]) -> Vec<(Vec<String>, String)> {
        let mut found = Vec::new();
        for argument in command
            .get_arguments()
            .filter(|a| a.get_action().takes_values())
        {
            let flag = argument.get_long().map(|name| format!("--{name}"));
            let words = words.iter().map(|word| word.to_string()).collect();
            found.extend(flag.map(|flag| (words, flag)));
        }
        for below in command.get_subcommands() {
            found.extend(arguments(below, &[words, &[below.get_name()]].concat()));
        }
        found
    }

    #[test]
    fn a_number_that_must_not_be_0_says_what_is_expected() {
        let mut refused = 0;
        for (words, flag) in arguments(&Cli::command(), &["cargo xtask"]) {
            let line = words.iter().map(String::as_str).chain([flag.as_str(), "0"]);
            let Err(error) = Cli::try_parse_from(line) else {
                continue;
            };
            let text = error.to_string();
            assert!(!text.contains("non-zero"), "{words:?} {flag}: {text}");
            refused += usize::from(text.contains("at least 1"));
        }
        assert!(refused > 20, "{refused}");
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_nearest() {
        for (words, near) in [
            ("eval lowrank --compress gtpq-int3", "gptq-int3"),
            (
                "eval lowrank --compress wanda-2:4+rtn-int4-smy",
                "wanda-2:4+rtn-int4-sym",
            ),
            ("eval lowrank --compress q4_k_n", "q4_k_m"),
            ("eval lowrank --requantise rtm-int4", "rtn-int4"),
            ("eval lowrank --method eara", "eora"),
            ("eval lowrank --save-as gptq-v3", "gptq-v2"),
            ("eval structured --method flop", "flap"),
            ("eval structured --method FLAP", "flap"),
            ("eval structured --compensate Bias", "bias"),
            ("eval chain --policy LAZY", "lazy"),
            ("eval chain --prune RD-dp", "rd-dp"),
            ("eval lowrank --compress GPTQ-int4", "gptq-int4"),
            ("eval frontier --cache-formats int44", "int4"),
            ("eval structured --then wadna-50", "wanda-50"),
            ("eval structured --export ggulf:q8_0", "gguf:q8_0"),
            ("eval frontier --for ggul", "gguf"),
            (
                "eval frontier --formats gptq-int4-g16-sim",
                "gptq-int4-g16-sym",
            ),
            ("eval kv --policy lzy", "lazy"),
            ("eval kv --kv-dtype int7", "int"),
            ("eval lattice --task rebr", "reber"),
            ("eval lattice --method spam", "span"),
            ("eval lattice --cell lstn", "lstm"),
            ("eval lattice --repair refat", "refit"),
            (
                "eval lattice --task vad:x --weights y --read-out-activation rely",
                "relu",
            ),
            ("eval perplexity --protocol gtpq", "gptq"),
            ("generate --policy stream", "streaming"),
        ] {
            let line = ["cargo xtask"].into_iter().chain(words.split(' '));
            let error = Cli::try_parse_from(line).err().expect(words).to_string();
            let tip = error.split_once("similar value");
            assert!(
                tip.is_some_and(|(_, tip)| tip.contains(&format!("'{near}"))),
                "{words}: {error}"
            );
        }
    }

    #[test]
    fn the_commands_of_the_page_about_parts_are_complete() {
        let page = include_str!("../../../docs/parts.md").replace("\\\n", " ");
        let lines = page.lines().filter(|line| line.starts_with("cargo xtask "));
        for line in lines.clone() {
            let words = line.split_whitespace().skip(1);
            let parsed = Cli::try_parse_from(words);
            let cli = parsed.unwrap_or_else(|error| panic!("{line}: {error}"));
            if let Command::Slurm(args) = cli.command {
                args.check().unwrap();
            }
        }
        assert!(lines.count() >= 5);
    }

    #[test]
    fn seeds_that_would_not_fit_beside_one_another_are_refused_with_what_is_expected() {
        for (words, expected) in [
            (
                "eval --seed 18446744073709551615",
                "at most 9223372036854775807",
            ),
            ("eval structured --model m --seeds 4294967295", "1 to 1000"),
            ("eval structured --model m --seeds 0", "at least 1"),
            ("eval kv --seeds 1001", "1 to 1000"),
            ("eval structured --model m --align 0", "at least 1"),
        ] {
            let line = ["cargo xtask"].into_iter().chain(words.split(' '));
            let error = Cli::try_parse_from(line).err().expect(words).to_string();
            assert!(error.contains(expected), "{words}: {error}");
        }
        let oracle = "eval chain --model m --policy oracle";
        let line = ["cargo xtask"].into_iter().chain(oracle.split(' '));
        assert!(Cli::try_parse_from(line).is_err());
        let words = "eval kv --seed 9223372036854775807 --seeds 1000";
        let line = ["cargo xtask"].into_iter().chain(words.split(' '));
        assert!(Cli::try_parse_from(line).is_ok());
    }

    #[test]
    fn what_is_decoded_is_offered_no_protocol_that_is_not() {
        for suite in ["chain", "kv"] {
            let line = ["cargo xtask", "eval", suite, "--protocol", "rolling"];
            let error = Cli::try_parse_from(line).err().unwrap().to_string();
            assert!(error.contains("possible values: windows, gptq"), "{error}");
        }
    }

    #[test]
    fn parts_of_a_run_share_all_but_where_results_go() {
        let words =
            "eval kv --shard 1/4 --cells=a --seed 3 --out b --json --threads=2 --policy lazy";
        let words: Vec<String> = words.split(' ').map(String::from).collect();
        assert_eq!(shared(&words).join(" "), "eval kv --seed 3 --policy lazy");
    }
}
