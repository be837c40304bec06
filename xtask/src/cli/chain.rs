//! The flags of `eval chain`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;
use clap::builder::PossibleValuesParser;
use eval_report::Budget;
use frontier::{TARGETS, Target};
use kv_lazy::StorageConfig;
use lm_eval::ProtocolKind;
use lowrank_eora::compress::Compressor;
use lowrank_eora::repair::Method;
use prune_structured::Recipe;
use toy_lm::bundled::{CALIBRATION, EVALUATION};

use super::names::Known;
use super::values::{positive, ratio, target};
use super::{DECODED, MODEL, bundled, models, names, protocol, with_bos};
use crate::suites::chain::{BUDGET, Config};
use crate::suites::kv::policy::{ALPHA, Choice, PromptRule};
use crate::suites::perplexity;

#[derive(Args)]
pub(super) struct ChainArgs {
    #[arg(long, value_name = "PATH", help = models(MODEL))]
    model: PathBuf,
    /// Text to evaluate on, or a part of one, such as FILE[80..100%]
    #[arg(long, value_name = "FILE", default_value_os_t = bundled(EVALUATION))]
    text: PathBuf,
    /// How the text becomes windows: each with BOS in front; or gptq, cut from the text with the tokenizer's own special tokens
    #[arg(long, value_name = "NAME", default_value = "windows", value_parser = protocol(DECODED))]
    protocol: ProtocolKind,
    /// Do not begin windows with the tokenizer's BOS token
    #[arg(long, conflicts_with = "protocol")]
    no_bos: bool,
    /// Text to calibrate on, or a part of one, such as FILE[0..80%]; must differ from --text
    #[arg(long, value_name = "FILE", default_value_os_t = bundled(CALIBRATION))]
    calib: PathBuf,
    /// Windows to calibrate on, sampled with --seed
    #[arg(long, value_name = "N", default_value = "32", value_parser = positive)]
    calib_samples: NonZeroUsize,
    /// Structured pruning method, with a least-squares refit; the paper's is flap
    #[arg(long, value_name = "M", default_value = "rd-dp", value_parser = Known::new(Recipe::NAMES))]
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
    /// KV-cache policy; the paper's is lazy
    #[arg(long, value_name = "P", default_value = "full", value_parser = policies())]
    policy: String,
    /// Tokens of the cache, for all policies but full: a number, or a fraction of the window [default: 0.5]
    #[arg(long, value_name = "B", value_parser = super::values::budget)]
    budget: Option<Budget>,
    /// What keys and values are stored as [default: int4; as the model computes where its heads are no multiple of 8]
    #[arg(long, value_name = "T", value_parser = PossibleValuesParser::new(StorageConfig::PRESETS))]
    kv_dtype: Option<String>,
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

/// All policies but the one that looks ahead, which only a trace lets it.
fn policies() -> Known {
    let known = Choice::known().iter().map(String::as_str);
    Known::new(known.filter(|name| !name.ends_with("oracle")))
}

fn compressor(name: &str) -> Result<Compressor, String> {
    names::parse(name, Compressor::WORDS)
}

fn method(name: &str) -> Result<Method, String> {
    names::parse(name, Method::NAMES)
}

impl ChainArgs {
    pub(super) fn config(self) -> Config {
        let policy = super::values::policy(&self.policy, PromptRule::Evict, ALPHA);
        if self.budget.is_some() && policy.is_full() {
            super::wrong("--budget: --policy full keeps all tokens")
        }
        Config {
            perplexity: perplexity::Config {
                model: self.model,
                text: self.text,
                protocol: with_bos(self.protocol, !self.no_bos),
            },
            calib: self.calib,
            calib_samples: self.calib_samples.get(),
            prune: self.prune,
            ratio: self.ratio,
            compress: self.compress,
            method: self.method,
            rank: self.rank.get(),
            policy,
            kv_dtype: self.kv_dtype,
            budget: self.budget.unwrap_or(BUDGET),
            target: self.target,
            save: self.save,
        }
    }
}
