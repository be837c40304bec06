//! The flags of `train-default`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;
use toy_lm::bundled::Architecture;

use crate::default_model;
use crate::settings::Device;

#[derive(Args)]
pub(super) struct TrainDefaultArgs {
    /// Train a mixture of sixteen experts on the same texts instead
    #[arg(long, requires = "out")]
    mixture: bool,
    /// Folder to write [default: the bundled model]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Replace existing output at --out
    #[arg(long)]
    overwrite: bool,
    /// Steps of 4,096 tokens
    #[arg(long, value_name = "N", default_value = "2500", value_parser = super::values::positive)]
    steps: NonZeroUsize,
    /// Seed of weights and text
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Device to compute on
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    device: Device,
}

impl From<TrainDefaultArgs> for default_model::Config {
    fn from(args: TrainDefaultArgs) -> Self {
        default_model::Config {
            architecture: match args.mixture {
                true => Architecture::Mixture,
                false => Architecture::Dense,
            },
            out: args.out.unwrap_or_else(default_model::folder),
            overwrite: args.overwrite,
            steps: args.steps.get(),
            seed: args.seed,
            device: args.device,
        }
    }
}
