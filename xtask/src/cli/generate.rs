//! The flags of `generate`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use causal_lm::{Arithmetic, Sampling};
use clap::Args;
use clap::builder::PossibleValuesParser;

use super::values::policy;
use super::weights::WeightArgs;
use crate::generate;
use crate::settings::{Device, Settings};
use crate::suites::kv::policy::{ALPHA, Choice, PromptRule};

/// Tokens that caches of bounded policies keep by default.
const BUDGET: usize = 512;

#[derive(Args)]
pub(super) struct GenerateArgs {
    #[arg(long, value_name = "PATH", help = super::models(super::MODEL))]
    model: PathBuf,
    /// Text to continue, or to answer where the model has a chat template
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// Continue the prompt as it is, without the chat template
    #[arg(long)]
    raw: bool,
    #[command(flatten)]
    weights: WeightArgs,
    /// KV-cache policy
    #[arg(long, value_name = "P", default_value = "full", value_parser = PossibleValuesParser::new(Choice::known().iter().map(String::as_str)))]
    policy: String,
    /// Tokens that the cache keeps per layer and KV head, for all policies but full [default: 512]
    #[arg(long, value_name = "N", value_parser = super::values::positive)]
    budget: Option<NonZeroUsize>,
    /// What keys and values are stored as: f32, f16, bf16, int8, k8v4 (8-bit keys, 4-bit values), int4 or int4-per-channel (with --policy full alone)
    /// [default: int8; as the model computes where its heads are no multiple of 8]
    #[arg(long, value_name = "T", value_parser = PossibleValuesParser::new(kv_lazy::StorageConfig::PRESETS))]
    kv_dtype: Option<String>,
    /// Statistics of the model's queries for --policy tri-attention, as eval kv --save-statistics makes them [default: the sequence itself]
    #[arg(long, value_name = "FILE")]
    statistics: Option<PathBuf>,
    /// JSON file with a configuration of caches, in place of --policy, --budget and --kv-dtype: such as the cache.json that eval frontier saves
    #[arg(long, value_name = "FILE", conflicts_with_all = ["policy", "budget", "kv_dtype"])]
    cache: Option<PathBuf>,
    /// Maximum number of tokens generated
    #[arg(long, value_name = "N", default_value = "256", value_parser = super::values::positive)]
    max_new_tokens: NonZeroUsize,
    /// Temperature of sampling; 0 takes the most likely token
    #[arg(long, value_name = "X", default_value = "0", value_parser = super::values::temperature)]
    temperature: f64,
    /// Sample from the K most likely tokens only
    #[arg(long, value_name = "K", requires = "temperature", value_parser = super::values::positive)]
    top_k: Option<NonZeroUsize>,
    /// Sample from the fewest most likely tokens that reach this probability
    #[arg(long, value_name = "X", requires = "temperature", value_parser = super::values::probability)]
    top_p: Option<f64>,
    /// Seed of sampling and of random policies
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Number of threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = super::values::positive)]
    pub(super) threads: Option<NonZeroUsize>,
    /// Device to compute on
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    device: Device,
}

impl GenerateArgs {
    /// Why a flag would do nothing.
    fn refused(&self) -> Option<String> {
        let greedy = self.temperature == 0.0;
        let refused = [
            (
                self.budget.is_some() && policy(&self.policy, PromptRule::Own, ALPHA).is_full(),
                "--budget: --policy full keeps all tokens",
            ),
            (
                greedy && self.top_k.is_some(),
                "--top-k: --temperature 0 takes the most likely token",
            ),
            (
                greedy && self.top_p.is_some(),
                "--top-p: --temperature 0 takes the most likely token",
            ),
        ];
        let mut reasons = refused.iter().filter(|(is_refused, _)| *is_refused);
        reasons.next().map(|(_, reason)| (*reason).to_owned())
    }

    pub(super) fn config(self) -> generate::Config {
        if let Some(reason) = self.refused() {
            super::wrong(&reason)
        }
        generate::Config {
            model: self.model,
            prompt: self.prompt,
            raw: self.raw,
            policy: policy(&self.policy, PromptRule::Own, ALPHA),
            kv_dtype: self.kv_dtype,
            cache: self.cache,
            statistics: self.statistics,
            budget: self.budget.map_or(BUDGET, NonZeroUsize::get),
            max_new_tokens: self.max_new_tokens.get(),
            sampling: match self.temperature == 0.0 {
                true => Sampling::Greedy,
                false => Sampling::Random {
                    temperature: self.temperature,
                    top_k: self.top_k.map(NonZeroUsize::get),
                    top_p: self.top_p,
                    seed: self.seed,
                },
            },
            settings: Settings {
                seed: self.seed,
                device: self.device,
                weights: self.weights.or(Arithmetic::Int8),
                ..Settings::default()
            },
        }
    }
}
