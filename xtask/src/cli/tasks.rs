//! The flags of `eval tasks`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;

use super::models;
use super::weights::WeightArgs;
use crate::suites::tasks::{Config, Shots};

const MODEL: &str = "Checkpoint folders in Hugging Face layout, or GGUF files, separated by commas; the others are compared with the first; an adapter is added to each";

#[derive(Args)]
pub(super) struct TasksArgs {
    #[command(flatten)]
    pub(super) weights: WeightArgs,
    #[arg(
        long,
        required = true,
        value_delimiter = ',',
        value_name = "DIR[,DIR..]",
        help = models(MODEL)
    )]
    model: Vec<PathBuf>,
    /// Files of questions, one JSON object a line, separated by commas; ARC, PIQA, HellaSwag, BoolQ, MathQA or GSM8K, told
    /// by their fields
    #[arg(
        long,
        required = true,
        value_delimiter = ',',
        value_name = "FILE[,FILE..]"
    )]
    data: Vec<PathBuf>,
    /// Do not begin with the tokenizer's BOS token
    #[arg(long)]
    no_bos: bool,
    /// Number of example questions with answers before each question
    #[arg(long, value_name = "K", default_value_t = 0)]
    shots: usize,
    /// File to take the K examples from [default: the same file, without the question itself]
    #[arg(long, value_name = "FILE", requires = "shots")]
    shots_from: Option<PathBuf>,
    /// Maximum number of tokens generated per answer
    #[arg(long, value_name = "N", default_value = "256", value_parser = super::values::positive)]
    max_new_tokens: NonZeroUsize,
    /// Write scores or generated text per question to MODEL-TASK.jsonl in this folder
    #[arg(long, value_name = "DIR")]
    log_samples: Option<PathBuf>,
}

impl From<TasksArgs> for Config {
    fn from(args: TasksArgs) -> Self {
        Config {
            models: super::names::paths(args.model),
            data: super::names::paths(args.data),
            bos: !args.no_bos,
            shots: Shots {
                count: args.shots,
                from: args.shots_from,
            },
            max_new_tokens: args.max_new_tokens.get(),
            log_samples: args.log_samples,
        }
    }
}
