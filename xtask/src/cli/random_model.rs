//! The flags of `random-model`.

use std::path::PathBuf;

use candle_core::DType;
use clap::{Args, ValueEnum};
use tensor_io::WriteOptions;

use crate::random_model;

#[derive(Args)]
pub(super) struct RandomModelArgs {
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
    /// Replace existing output at --out
    #[arg(long)]
    overwrite: bool,
    /// Maximum shard size in bytes
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
            write: WriteOptions::default()
                .with_overwrite(args.overwrite)
                .with_max_shard_bytes(args.max_shard_bytes),
        }
    }
}
