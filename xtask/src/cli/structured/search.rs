//! The flags of searched widths and of measured curves.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use prune_structured::obs::Rounds;
use prune_structured::rate_distortion::Distortion;
use prune_structured::tyr::{Accumulation, Options, Stage};
use prune_structured::{Allocation, Recipe};

use crate::suites::structured::search::Config;

/// Sizes of the search of tyr, and the curves of rd-dp.
#[derive(Args)]
#[command(next_help_heading = "Search of tyr, curves of rd-dp")]
pub(super) struct SearchArgs {
    /// Sizes to start from; the flags below change them
    #[arg(long, value_enum, default_value = "small")]
    search_size: Size,
    /// Supernets, each around the best of the one before
    #[arg(long, value_name = "N")]
    iterations: Option<usize>,
    /// Generations in each supernet
    #[arg(long, value_name = "N")]
    generations: Option<usize>,
    /// Candidates of a generation
    #[arg(long, value_name = "N")]
    offspring: Option<usize>,
    /// Tokens and survivors of each stage of selection, such as 2048:8,8192:3,32768:1
    #[arg(long, value_delimiter = ',', value_name = "T:S[,T:S..]", value_parser = stage)]
    stages: Vec<Stage>,
    /// Logits of the dense model that candidates are compared on
    #[arg(long, value_name = "N")]
    top_k: Option<usize>,
    /// Windows of the calibration text that candidates, or measured curves, are compared on
    #[arg(long, value_name = "N", default_value = "256")]
    search_samples: NonZeroUsize,
    /// What each block of a supernet is calibrated on [default: mixture]
    #[arg(long, value_enum)]
    accumulation: Option<AccumulationArg>,
    /// Prune the widths found once more, each block on what the pruned blocks before it put out
    #[arg(long)]
    settle: bool,
    /// Units between two scorings [default: the paper's, finer in narrow layers]
    #[arg(long, value_enum)]
    elimination: Option<RoundsArg>,
    /// Widths that the search starts from
    #[arg(long, value_enum, default_value = "uniform")]
    search_start: StartArg,
    /// Keep the state of searches in this folder, and go on with those that are there
    #[arg(long, value_name = "DIR")]
    resume: Option<PathBuf>,
    /// Distortion that rd-dp adds up, also where a search starts from it
    #[arg(long, value_enum, default_value = "hidden")]
    distortion: DistortionArg,
    /// Replace rd-dp's curves by their convex hulls
    #[arg(long)]
    convex: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum DistortionArg {
    /// Squared error of each sublayer's output
    Output,
    /// Its share of the sublayer's output
    Relative,
    /// Its share of the hidden states that leave the block
    Hidden,
    /// Divergence of the whole model's predictions when one sublayer is pruned, measured
    Kl,
}

#[derive(Clone, Copy, ValueEnum)]
enum StartArg {
    /// The same share of every sublayer, as in the paper
    Uniform,
    /// What rate-distortion allocation finds
    RdDp,
    /// FLAP's
    Flap,
}

#[derive(Clone, Copy, ValueEnum)]
enum Size {
    /// Minutes on a model of a few million parameters
    Small,
    /// The paper's, for models of billions
    Paper,
}

#[derive(Clone, Copy, ValueEnum)]
enum AccumulationArg {
    /// All levels, each by the share it keeps
    Mixture,
    /// The level in the middle
    Centre,
    /// The dense block, as the published implementation
    Dense,
}

#[derive(Clone, Copy, ValueEnum)]
enum RoundsArg {
    /// 16 neurons, or one unit of attention
    Paper,
    /// A sixteenth of the neurons, all of attention
    Released,
}

fn stage(text: &str) -> Result<Stage, String> {
    let numbers = text
        .split_once(':')
        .and_then(|(tokens, survivors)| Some((tokens.parse().ok()?, survivors.parse().ok()?)));
    match numbers {
        Some((tokens, survivors)) => Ok(Stage { tokens, survivors }),
        None => Err("expected tokens and survivors, such as 2048:8".into()),
    }
}

impl SearchArgs {
    /// Sets what rd-dp adds up where a recipe allocates by it.
    pub(super) fn change(&self, recipe: &mut Recipe) {
        if let Allocation::RdDp(rd_dp) = &mut recipe.allocation {
            rd_dp.convex = self.convex;
            rd_dp.distortion = match self.distortion {
                DistortionArg::Output => Distortion::Output,
                DistortionArg::Relative => Distortion::Relative,
                // A measurement replaces the curves.
                DistortionArg::Hidden | DistortionArg::Kl => Distortion::Hidden,
            };
        }
    }

    pub(super) fn config(self, seed: u64) -> Config {
        let start = match self.search_start {
            StartArg::Uniform => None,
            StartArg::RdDp => Recipe::named("rd-dp", seed),
            StartArg::Flap => Recipe::named("flap", seed),
        };
        let start = start.map(|mut recipe| {
            self.change(&mut recipe);
            recipe
        });
        let mut options = match self.search_size {
            Size::Small => Options::default(),
            Size::Paper => Options::paper(),
        };
        options.seed = seed;
        options.iterations = self.iterations.unwrap_or(options.iterations);
        options.generations = self.generations.unwrap_or(options.generations);
        options.offspring = self.offspring.unwrap_or(options.offspring);
        options.top_k = self.top_k.unwrap_or(options.top_k);
        options.settle = self.settle;
        if !self.stages.is_empty() {
            options.stages = self.stages;
        }
        if let Some(accumulation) = self.accumulation {
            options.accumulation = match accumulation {
                AccumulationArg::Mixture => Accumulation::Mixture,
                AccumulationArg::Centre => Accumulation::Centre,
                AccumulationArg::Dense => Accumulation::Dense,
            };
        }
        if let Some(rounds) = self.elimination {
            options.rounds = Some(match rounds {
                RoundsArg::Paper => Rounds::PAPER,
                RoundsArg::Released => Rounds::Released,
            });
        }
        Config {
            options,
            samples: self.search_samples.get(),
            start,
            resume: self.resume,
            measured: self.distortion == DistortionArg::Kl,
        }
    }
}
