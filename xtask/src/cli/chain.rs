//! The flags of `eval chain`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;
use clap::builder::PossibleValuesParser;
use eval_report::Budget;
use frontier::{TARGETS, Target};
use lowrank_eora::compress::Compressor;
use lowrank_eora::repair::Method;
use prune_structured::Recipe;
use toy_lm::bundled::CALIBRATION;

use super::values::{positive, ratio, target};
use super::{TextArgs, bundled, names};
use crate::suites::chain::Config;
use crate::suites::kv::policy::Choice;

#[derive(Args)]
pub(super) struct ChainArgs {
    #[command(flatten)]
    text: TextArgs,
    /// Text to calibrate on, or a part of one, such as FILE[0..80%]; must differ from --text
    #[arg(long, value_name = "FILE", default_value_os_t = bundled(CALIBRATION))]
    calib: PathBuf,
    /// Windows to calibrate on, sampled with --seed
    #[arg(long, value_name = "N", default_value = "32", value_parser = positive)]
    calib_samples: NonZeroUsize,
    /// Structured pruning method, with a least-squares refit; the paper's is flap
    #[arg(long, value_name = "M", default_value = "rd-dp", value_parser = PossibleValuesParser::new(Recipe::NAMES))]
    prune: String,
    /// Fraction of the blocks' parameters that is pruned
    #[arg(long, value_name = "X", default_value = "0.25", value_parser = ratio)]
    ratio: f64,
    /// Compressor of the remaining linears, as for lowrank [default: gptq-int4-g32, gptq-q4_0 for gguf, gptq-int4-g128-sym for
    /// vllm]
    #[arg(long, value_name = "C", value_parser = compressor)]
    compress: Option<Compressor>,
    /// Method of the low-rank repair
    #[arg(long, value_name = "M", default_value = "eora", value_parser = method)]
    method: Method,
    /// Rank of the repair
    #[arg(long, value_name = "R", default_value = "8", value_parser = positive)]
    rank: NonZeroUsize,
    /// KV-cache policy
    #[arg(long, value_name = "P", default_value = "lazy", value_parser = policies())]
    policy: String,
    /// Tokens of the cache: a number, or a fraction of the window
    #[arg(long, value_name = "B", default_value = "0.5", value_parser = super::values::budget)]
    budget: Budget,
    #[arg(
        long = "for",
        value_name = "TARGET",
        default_value = "here",
        value_parser = target,
        help = format!("Runtime whose files are written and measured: {}", TARGETS.join(", "))
    )]
    target: Target,
    /// Write the files of the whole chain to this new folder: model and adapter
    #[arg(long, value_name = "DIR")]
    save: Option<PathBuf>,
}

fn policies() -> PossibleValuesParser {
    PossibleValuesParser::new(Choice::known().iter().map(String::as_str))
}

fn compressor(name: &str) -> Result<Compressor, String> {
    names::parse(name, Compressor::WORDS)
}

fn method(name: &str) -> Result<Method, String> {
    names::parse(name, Method::NAMES)
}

impl From<ChainArgs> for Config {
    fn from(args: ChainArgs) -> Self {
        Self {
            calib_samples: args.calib_samples.get(),
            prune: args.prune,
            ratio: args.ratio,
            compress: args.compress,
            method: args.method,
            rank: args.rank.get(),
            policy: args.policy,
            budget: args.budget,
            target: args.target,
            save: args.save,
            ..Self::new(args.text.into(), args.calib)
        }
    }
}
