//! The flags of searched widths and of measured curves.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use prune_structured::obs::Rounds;
use prune_structured::rate_distortion::Distortion;
use prune_structured::tyr::{Accumulation, Options, Stage};
use prune_structured::{Allocation, Recipe};

use crate::cli::values::{given, positive};
use crate::suites::structured::search::Config;

/// Sizes of the search of tyr, and the curves of rd-dp.
#[derive(Args)]
#[command(next_help_heading = "Search of tyr, curves of rd-dp")]
pub(super) struct SearchArgs {
    /// Preset of the search sizes; the flags below override it [default: small]
    #[arg(long, value_enum)]
    search_size: Option<Size>,
    /// Supernets, each built around the best candidate of the previous one
    #[arg(long, value_name = "N")]
    iterations: Option<usize>,
    /// Generations per supernet
    #[arg(long, value_name = "N")]
    generations: Option<usize>,
    /// Candidates per generation
    #[arg(long, value_name = "N")]
    offspring: Option<usize>,
    /// Tokens and survivors of each selection stage, such as 2048:8,8192:3,32768:1
    #[arg(long, value_delimiter = ',', value_name = "T:S[,T:S..]", value_parser = stage)]
    stages: Vec<Stage>,
    /// Number of largest dense logits that candidates are compared on
    #[arg(long, value_name = "N")]
    top_k: Option<usize>,
    /// Windows of the calibration text to compare candidates, or measure curves, on: first those that are not calibrated
    /// on [default: 256, or 8 without a search]
    #[arg(long, value_name = "N", value_parser = positive)]
    search_samples: Option<NonZeroUsize>,
    /// Activations to calibrate each block of a supernet on [default: mixture]
    #[arg(long, value_enum)]
    accumulation: Option<AccumulationArg>,
    /// Prune once more at the widths found, calibrating each block on the outputs of the pruned blocks before it
    #[arg(long)]
    settle: bool,
    /// Units removed between two scorings [default: the paper's, fewer in narrow layers]
    #[arg(long, value_enum)]
    elimination: Option<RoundsArg>,
    /// Widths to start the search from [default: uniform]
    #[arg(long, value_enum)]
    search_start: Option<StartArg>,
    /// Save the state of searches in this folder and resume from it
    #[arg(long, value_name = "DIR")]
    resume: Option<PathBuf>,
    /// Distortion that rd-dp minimises, also as the start of a search [default: kl]
    #[arg(long, value_enum)]
    distortion: Option<DistortionArg>,
    /// Replace rd-dp's curves by their convex hulls
    #[arg(long)]
    convex: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum DistortionArg {
    /// Squared error of each sublayer's output
    Output,
    /// Squared error relative to the sublayer's output
    Relative,
    /// Squared error relative to the hidden states after the block
    Hidden,
    /// Measured divergence of the model's predictions when one sublayer is pruned
    Kl,
}

#[derive(Clone, Copy, ValueEnum)]
enum StartArg {
    /// The same fraction of every sublayer, as in the paper
    Uniform,
    /// The widths of rd-dp
    RdDp,
    /// The widths of flap
    Flap,
}

#[derive(Clone, Copy, ValueEnum)]
enum Size {
    /// Minutes for a model of a few million parameters
    Small,
    /// The paper's sizes, for models of billions of parameters
    Paper,
}

#[derive(Clone, Copy, ValueEnum)]
enum AccumulationArg {
    /// All levels, weighted by the fraction they keep
    Mixture,
    /// The middle level
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
    /// The flags that were given, which some methods alone read.
    pub(super) fn asked(&self) -> Vec<&'static str> {
        given([
            ("--search-size", self.search_size.is_some()),
            ("--iterations", self.iterations.is_some()),
            ("--generations", self.generations.is_some()),
            ("--offspring", self.offspring.is_some()),
            ("--stages", !self.stages.is_empty()),
            ("--top-k", self.top_k.is_some()),
            ("--search-samples", self.search_samples.is_some()),
            ("--accumulation", self.accumulation.is_some()),
            ("--settle", self.settle),
            ("--elimination", self.elimination.is_some()),
            ("--search-start", self.search_start.is_some()),
            ("--resume", self.resume.is_some()),
            ("--distortion", self.distortion.is_some()),
            ("--convex", self.convex),
        ])
    }

    fn distortion(&self) -> DistortionArg {
        self.distortion.unwrap_or(DistortionArg::Kl)
    }

    /// Sets what rd-dp adds up where a recipe allocates by it.
    pub(super) fn change(&self, recipe: &mut Recipe) {
        if let Allocation::RdDp(rd_dp) = &mut recipe.allocation {
            rd_dp.convex = self.convex;
            rd_dp.distortion = match self.distortion() {
                DistortionArg::Output => Distortion::Output,
                DistortionArg::Relative => Distortion::Relative,
                // A measurement replaces the curves.
                DistortionArg::Hidden | DistortionArg::Kl => Distortion::Hidden,
            };
        }
    }

    pub(super) fn config(self, seed: u64) -> Config {
        let start = match self.search_start {
            None | Some(StartArg::Uniform) => None,
            Some(StartArg::RdDp) => Recipe::named("rd-dp", seed),
            Some(StartArg::Flap) => Recipe::named("flap", seed),
        };
        let start = start.map(|mut recipe| {
            self.change(&mut recipe);
            recipe
        });
        let measured = self.distortion() == DistortionArg::Kl;
        let mut options = match self.search_size {
            None | Some(Size::Small) => Options::default(),
            Some(Size::Paper) => Options::paper(),
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
            samples: self.search_samples.map(NonZeroUsize::get),
            start,
            resume: self.resume,
            measured,
        }
    }
}
