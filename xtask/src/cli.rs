//! The command line, turned once into a [`Run`]; nothing behind this module looks at flags.

mod kv;

use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;

use anyhow::{Context, Result};
use candle_core::DType;
use clap::builder::PossibleValuesParser;
use clap::{Args, Parser, Subcommand, ValueEnum};
use prune_lattice::Cell;
use prune_lattice::experiment::ExperimentConfig;
use prune_lattice::prune::Method;
use prune_lattice::tasks::Task;
use prune_structured::{
    Allocation, AttentionUnit, Compensation, DEFAULT_RIDGE, Form, Recipe, Score,
};
use tensor_io::WriteOptions;

use crate::eval::{self, lattice, perplexity, structured};
use crate::progress::Progress;
use crate::random_model;

/// What was asked for.
#[derive(Debug)]
pub enum Job {
    /// Evaluate.
    Eval(Box<Run>),
    /// Make a checkpoint of random weights.
    RandomModel(random_model::Config),
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
    /// Every suite on the embedded default model.
    All,
    /// Perplexity of a checkpoint.
    Perplexity(perplexity::Config),
    /// Structured pruning.
    Structured(structured::Config),
    /// Pruning of recurrent networks by order.
    Lattice(lattice::Config),
    /// KV-cache eviction.
    Kv(eval::kv::Config),
}

/// What every suite is told.
#[derive(Debug, Clone)]
pub struct Common {
    /// Window in tokens, where asked for.
    pub window: Option<usize>,
    /// Number of windows to evaluate; all where not asked for.
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
    /// Evaluate models before and after compression; without a suite, all of them on the embedded default model
    Eval(Box<EvalArgs>),
    /// Write a checkpoint with random weights for a config.json, to measure memory and speed on
    RandomModel(RandomModelArgs),
}

#[derive(Args)]
struct EvalArgs {
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
    Structured(Box<StructuredArgs>),
    /// Pruning of recurrent networks by order, with the controls that tell whether order matters
    Lattice(Box<LatticeArgs>),
    /// KV-cache eviction: perplexity, attention on traces, or recall, by policy and budget
    Kv(Box<kv::KvArgs>),
}

#[derive(Args)]
#[command(next_help_heading = "Common options")]
struct CommonArgs {
    /// Tokens in a window
    #[arg(long, global = true, value_name = "N", value_parser = window)]
    window: Option<usize>,
    /// Evaluate the first N windows only
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

#[derive(Args)]
struct RandomModelArgs {
    /// The config.json of the model
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Stored type
    #[arg(long, value_enum, default_value_t = StoredType::Bf16)]
    dtype: StoredType,
    /// Seed of the weights
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Replace what is at --out
    #[arg(long)]
    overwrite: bool,
    /// Largest shard in bytes
    #[arg(long, value_name = "N", default_value = "5000000000")]
    max_shard_bytes: u64,
}

#[derive(Clone, Copy, ValueEnum)]
enum StoredType {
    F32,
    F16,
    Bf16,
}

impl From<RandomModelArgs> for random_model::Config {
    fn from(args: RandomModelArgs) -> Self {
        random_model::Config {
            config: args.config,
            out: args.out,
            dtype: match args.dtype {
                StoredType::F32 => DType::F32,
                StoredType::F16 => DType::F16,
                StoredType::Bf16 => DType::BF16,
            },
            seed: args.seed,
            write: WriteOptions {
                overwrite: args.overwrite,
                max_shard_bytes: args.max_shard_bytes,
            },
        }
    }
}

/// Model and text to measure perplexity with.
#[derive(Args)]
struct TextArgs {
    /// Checkpoint folder in Hugging Face layout
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
}

#[derive(Args)]
struct StructuredArgs {
    #[command(flatten)]
    text: TextArgs,
    /// Text to calibrate on, another one than --text
    #[arg(long, value_name = "FILE")]
    calib: PathBuf,
    /// Windows to calibrate on, drawn from the text with --seed
    #[arg(long, value_name = "N", default_value = "128")]
    calib_samples: NonZeroUsize,
    /// Methods, separated by commas
    #[arg(long, required = true, value_delimiter = ',', value_name = "M[,M..]", value_parser = PossibleValuesParser::new(Recipe::NAMES))]
    method: Vec<String>,
    /// Shares of the prunable parameters to remove, separated by commas
    #[arg(long, required = true, value_delimiter = ',', value_name = "R[,R..]", value_parser = ratio)]
    ratio: Vec<f64>,
    /// Write the compressed checkpoint to this folder; of several, each to a folder METHOD-RATIO in it
    #[arg(long, value_name = "DIR")]
    save: Option<PathBuf>,
    /// Replace what is at --save
    #[arg(long)]
    overwrite: bool,
    /// Write each plan, which units stay, as METHOD-RATIO.json to this folder
    #[arg(long, value_name = "DIR")]
    save_plans: Option<PathBuf>,
    /// Largest shard in bytes
    #[arg(long, value_name = "N", default_value = "5000000000")]
    max_shard_bytes: u64,
    /// Keep the dense shapes and write zeros for what is removed
    #[arg(long)]
    masked: bool,
    /// Make the plans and show them; write and evaluate nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    change: RecipeArgs,
}

/// Changes to every method of the run.
#[derive(Args)]
#[command(next_help_heading = "Changes to the methods")]
struct RecipeArgs {
    /// Score of units [default: the method's]
    #[arg(long, value_enum)]
    score: Option<ScoreArg>,
    /// How the budget is spread over layers [default: the method's]
    #[arg(long, value_enum)]
    allocation: Option<AllocationArg>,
    /// What makes up for removed units, several separated by commas; auto: the method's own, flap's being bias where the
    /// architecture can store one, else least squares
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        value_name = "C[,C..]",
        default_value = "auto"
    )]
    compensate: Vec<CompensateArg>,
    /// Damping of least squares, relative to the mean diagonal
    #[arg(long, value_name = "X", default_value_t = DEFAULT_RIDGE)]
    ridge: f64,
    /// Unit of attention [default: KV groups where there are at least 4, else query heads]
    #[arg(long, value_enum)]
    attention_unit: Option<AttentionUnitArg>,
    /// KV groups, or query heads of each group, that every layer keeps [default: 1; flap-compat: 0]
    #[arg(long, value_name = "N")]
    min_attention: Option<usize>,
    /// Neurons that every layer keeps [default: 1; flap-compat: 0]
    #[arg(long, value_name = "N")]
    min_neurons: Option<usize>,
    /// Keep the number of neurons a multiple of this
    #[arg(long, value_name = "N")]
    align: Option<usize>,
}

#[derive(Clone, Copy, ValueEnum)]
enum ScoreArg {
    Wifv,
    Ifv,
    Wifn,
    WandaSp,
    Magnitude,
    Random,
}

#[derive(Clone, Copy, ValueEnum)]
enum AllocationArg {
    AlAm,
    AlMm,
    UlMm,
    UlUm,
}

#[derive(Clone, Copy, ValueEnum)]
enum CompensateArg {
    Auto,
    None,
    Bias,
    LeastSquares,
}

#[derive(Clone, Copy, ValueEnum)]
enum AttentionUnitArg {
    KvGroup,
    QueryHead,
}

impl RecipeArgs {
    /// The variants of one method: one for each compensation, named after it where there are several.
    fn variants(&self, name: &str, seed: u64) -> Vec<Recipe> {
        let several = self.compensate.len() > 1;
        let variant = |&compensate: &CompensateArg| {
            // clap has admitted no other name.
            let mut recipe = Recipe::named(name, seed).expect("the parser knows the same names");
            self.change(&mut recipe, seed);
            let (compensation, label) = match compensate {
                CompensateArg::Auto => (recipe.compensation, "auto"),
                CompensateArg::None => (Some(Compensation::None), "none"),
                CompensateArg::Bias => (Some(Compensation::Bias), "bias"),
                CompensateArg::LeastSquares => {
                    let ridge = self.ridge;
                    (Some(Compensation::LeastSquares { ridge }), "least-squares")
                }
            };
            recipe.compensation = compensation;
            if several {
                recipe.name = format!("{name}+{label}");
            }
            recipe
        };
        self.compensate.iter().map(variant).collect()
    }

    fn change(&self, recipe: &mut Recipe, seed: u64) {
        if let Some(score) = self.score {
            recipe.score = match score {
                ScoreArg::Wifv => Score::Wifv,
                ScoreArg::Ifv => Score::Ifv,
                ScoreArg::Wifn => Score::Wifn,
                ScoreArg::WandaSp => Score::WandaSp,
                ScoreArg::Magnitude => Score::Magnitude,
                ScoreArg::Random => Score::Random { seed },
            };
        }
        if let Some(allocation) = self.allocation {
            recipe.allocation = match allocation {
                AllocationArg::AlAm => Allocation::AlAm,
                AllocationArg::AlMm => Allocation::AlMm,
                AllocationArg::UlMm => Allocation::UlMm,
                AllocationArg::UlUm => Allocation::UlUm,
            };
        }
        if let Some(unit) = self.attention_unit {
            recipe.shape.attention_unit = Some(match unit {
                AttentionUnitArg::KvGroup => AttentionUnit::KvGroup,
                AttentionUnitArg::QueryHead => AttentionUnit::QueryHead,
            });
        }
        let shape = &mut recipe.shape;
        shape.min_attention = self.min_attention.unwrap_or(shape.min_attention);
        shape.min_neurons = self.min_neurons.unwrap_or(shape.min_neurons);
        shape.align_neurons = self.align.unwrap_or(shape.align_neurons);
    }
}

impl StructuredArgs {
    fn config(self, seed: u64) -> structured::Config {
        let variants = |name: &String| self.change.variants(name, seed);
        let recipes = self.method.iter().flat_map(variants).collect();
        structured::Config {
            perplexity: self.text.into(),
            calib: self.calib,
            calib_samples: self.calib_samples.get(),
            recipes,
            ratios: self.ratio,
            save: self.save,
            form: if self.masked {
                Form::Masked
            } else {
                Form::Sliced
            },
            write: WriteOptions {
                overwrite: self.overwrite,
                max_shard_bytes: self.max_shard_bytes,
            },
            save_plans: self.save_plans,
            dry_run: self.dry_run,
        }
    }
}

#[derive(Args)]
struct LatticeArgs {
    /// Tasks, separated by commas: reber, embedded-reber, row-digits, mod2, mod3, tomita1 to tomita7, adding,
    /// char-grammar, text:FILE, mnist:FOLDER [default: reber, row-digits, mod3]
    #[arg(long, value_delimiter = ',', value_name = "T[,T..]")]
    task: Vec<Task>,
    /// Cells, separated by commas: lstm, gru, tanh, relu [default: lstm]
    #[arg(long, value_delimiter = ',', value_name = "C[,C..]")]
    cell: Vec<Cell>,
    /// Methods, separated by commas; dense, zero-whh, random and threshold always run besides [default: all]
    #[arg(long, value_delimiter = ',', value_name = "M[,M..]")]
    method: Vec<Method>,
    /// Shares of the recurrent weights to remove, separated by commas [default: 0.5, 0.75, 0.9]
    #[arg(long, value_delimiter = ',', value_name = "S[,S..]", value_parser = ratio)]
    sparsity: Vec<f64>,
    /// Networks of each task and cell, seeded from --seed on
    #[arg(long, value_name = "N", default_value = "3")]
    seeds: NonZeroU64,
    /// Passes of fine-tuning under the mask
    #[arg(long, value_name = "N", default_value_t = 1)]
    finetune_epochs: usize,
    /// A trained character network in place of the tasks
    #[arg(long, value_name = "FILE", requires_all = ["vocab", "text"], conflicts_with_all = ["task", "cell"])]
    weights: Option<PathBuf>,
    /// JSON with the id of each character of that network
    #[arg(long, value_name = "FILE", requires = "weights")]
    vocab: Option<PathBuf>,
    /// Text for that network: 90 % fine-tuning, 5 % validation, 5 % test
    #[arg(long, value_name = "FILE", requires = "weights")]
    text: Option<PathBuf>,
}

impl LatticeArgs {
    fn config(self, seed: u64) -> lattice::Config {
        let defaults = ExperimentConfig::default();
        lattice::Config {
            experiment: ExperimentConfig {
                tasks: if self.task.is_empty() {
                    defaults.tasks
                } else {
                    self.task
                },
                cells: if self.cell.is_empty() {
                    defaults.cells
                } else {
                    self.cell
                },
                // The dense network is always there to be compared with.
                methods: if self.method.is_empty() {
                    defaults.methods
                } else {
                    [vec![Method::Dense], self.method].concat()
                },
                sparsities: if self.sparsity.is_empty() {
                    defaults.sparsities
                } else {
                    self.sparsity
                },
                seeds: (seed..seed.saturating_add(self.seeds.get())).collect(),
                finetune_epochs: self.finetune_epochs,
                ..ExperimentConfig::default()
            },
            checkpoint: self.weights.zip(self.vocab).zip(self.text).map(
                |((weights, vocab), text)| lattice::CheckpointConfig {
                    weights,
                    vocab,
                    text,
                },
            ),
        }
    }
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
        Command::RandomModel(args) => Job::RandomModel(args.into()),
    }
}

impl EvalArgs {
    fn run(self) -> Run {
        let Self { common, suite } = self;
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
            suite: match suite {
                None => Suite::All,
                Some(SuiteArgs::Perplexity(PerplexityArgs { text })) => {
                    Suite::Perplexity(text.into())
                }
                Some(SuiteArgs::Structured(args)) => Suite::Structured(args.config(seed)),
                Some(SuiteArgs::Lattice(args)) => Suite::Lattice(args.config(seed)),
                Some(SuiteArgs::Kv(args)) => Suite::Kv(args.config()),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
