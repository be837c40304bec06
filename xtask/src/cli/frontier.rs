//! The flags of `eval frontier`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;
use frontier::{CACHE_FORMATS, CacheFormat, Format, Options, TARGETS, Target};
use lowrank_eora::compress::Compressor;
use toy_lm::bundled::CALIBRATION;

use super::values::{positive, target};
use super::{TextArgs, bundled, names};
use crate::suites::frontier::{self as suite, Memory};

#[derive(Args)]
pub(super) struct FrontierArgs {
    #[command(flatten)]
    text: TextArgs,
    /// Text to calibrate and to compare models on, or a part of one, such as FILE[0..80%]; must differ from --text
    #[arg(long, value_name = "FILE", default_value_os_t = bundled(CALIBRATION))]
    calib: PathBuf,
    /// Budgets, separated by commas: bytes (500000000, 500M, 1.5GiB) or percent of the model's in bf16 (35%)
    #[arg(long, required = true, value_delimiter = ',', value_name = "B[,B..]")]
    memory: Vec<Memory>,
    /// Tokens of context for which keys and values count in the budget, and each layer's cache gets a format; without it weights alone
    /// count
    #[arg(long, value_name = "N", value_parser = positive)]
    context: Option<NonZeroUsize>,
    /// Sequences for which they count
    #[arg(long, value_name = "N", default_value = "1", requires = "context", value_parser = positive)]
    batch: NonZeroUsize,
    /// Most parameters of the result, factors included
    #[arg(long, value_name = "N")]
    max_params: Option<u64>,
    /// Fewest tokens per second of decoding one sequence at a short context, by a table of what each treatment takes, which is
    /// measured on this machine with weights as they are stored
    #[arg(long, value_name = "X")]
    tokens_per_second: Option<f64>,
    #[arg(
        long = "for",
        value_name = "TARGET",
        default_value = "here",
        value_parser = target,
        help = format!("Runtime that loads the result: {}", TARGETS.join(", "))
    )]
    target: Target,
    /// Write the models to this new folder, each to a subfolder named after its budget in bytes
    #[arg(long, value_name = "DIR")]
    save: Option<PathBuf>,
    /// Also write the models of the baselines there, each to a subfolder named after its budget and its method
    #[arg(long, requires = "save", conflicts_with = "no_baselines")]
    save_baselines: bool,
    /// Keep what is made and measured in this folder and resume from it
    #[arg(long, value_name = "DIR")]
    resume: Option<PathBuf>,
    /// Do not measure what the same bytes buy along one axis
    #[arg(long)]
    no_baselines: bool,
    #[command(flatten)]
    search: SearchArgs,
}

/// What is chosen from, and how carefully it is measured.
#[derive(Args)]
#[command(next_help_heading = "What to choose from, and how carefully")]
struct SearchArgs {
    /// Windows to calibrate on, sampled with --seed
    #[arg(long, value_name = "N", default_value = "64", value_parser = positive)]
    calib_samples: NonZeroUsize,
    /// Other windows of the same text, to compare models with the dense one on
    #[arg(long, value_name = "N", default_value = "32", value_parser = positive)]
    compare_samples: NonZeroUsize,
    /// Fractions of heads and neurons that may stay [default: 0.25,0.5,0.75]
    #[arg(long, value_delimiter = ',', value_name = "W[,W..]")]
    widths: Option<Vec<f64>>,
    /// Formats besides that of the model: compressors as for lowrank [default: those of the target]
    #[arg(long, value_delimiter = ',', value_name = "F[,F..]", value_parser = format)]
    formats: Option<Vec<Format>>,
    /// What keys and values may be stored as, with --context and --for here: f16, int8, k8v4 (8-bit keys, 4-bit values), int4
    /// [default: all]
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "T[,T..]",
        requires = "context",
        value_parser = cache_format
    )]
    cache_formats: Option<Vec<CacheFormat>>,
    /// Fractions of the context's tokens that a layer's cache may keep, besides all; layers that keep fewer evict by keydiff
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "S[,S..]",
        requires = "context"
    )]
    cache_tokens: Option<Vec<f64>>,
    /// Ranks of corrections besides none [default: a 64th and a 16th of the hidden width]
    #[arg(long, value_delimiter = ',', value_name = "R[,R..]")]
    ranks: Option<Vec<usize>>,
    /// Tokens to measure single sites on
    #[arg(long, value_name = "N", default_value = "2048", value_parser = positive)]
    coarse_tokens: NonZeroUsize,
    /// Tokens to measure plans on
    #[arg(long, value_name = "N", default_value = "8192", value_parser = positive)]
    fine_tokens: NonZeroUsize,
    /// Most rounds of measuring around a plan
    #[arg(long, value_name = "N", default_value = "3")]
    rounds: usize,
    /// Generations of drawn exchanges between sites after the rounds, each of 12 plans; the better plan stays
    #[arg(long, value_name = "N", default_value = "0")]
    refine: usize,
}

fn cache_format(name: &str) -> Result<CacheFormat, String> {
    names::parse(name, &CACHE_FORMATS)
}

fn format(name: &str) -> Result<Format, String> {
    names::parse(name, Compressor::WORDS)
}

impl FrontierArgs {
    pub(super) fn config(self) -> suite::Config {
        let Self {
            text,
            calib,
            memory,
            context,
            batch,
            max_params,
            tokens_per_second,
            target,
            save,
            save_baselines,
            resume,
            no_baselines,
            search,
        } = self;
        let mut options = Options::new(target);
        if let Some(context) = context {
            options.context = context.get();
            options.batch = batch.get();
        }
        if let Some(formats) = search.cache_formats {
            options.cache_formats = formats;
        }
        if let Some(shares) = search.cache_tokens {
            options.cache_shares = shares;
        }
        options.max_parameters = max_params;
        options.tokens_per_second = tokens_per_second;
        if let Some(widths) = search.widths {
            options.widths = widths;
        }
        options.formats = search.formats;
        options.ranks = search.ranks;
        options.coarse_tokens = search.coarse_tokens.get();
        options.fine_tokens = search.fine_tokens.get();
        options.rounds = search.rounds;
        options.refine = search.refine;
        suite::Config {
            calib_samples: search.calib_samples.get(),
            compare_samples: search.compare_samples.get(),
            memory,
            options,
            baselines: !no_baselines,
            save,
            save_baselines,
            resume,
            ..suite::Config::new(text.into(), calib)
        }
    }
}
