//! The flags of `eval lowrank`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use lowrank_eora::compress::Compressor;
use lowrank_eora::repair::layer::Importance;
use lowrank_eora::repair::{
    FactorStorage, InputSource, Method, Repair, Sampling, Spread, WithinBlock,
};
use tensor_io::WriteOptions;
use toy_lm::bundled::CALIBRATION;

use super::experts::ExpertArgs;
use super::values::{given, positive};
use super::weights::CalibrationArithmetic;
use super::{TextArgs, bundled, names};
use crate::suites::lowrank::{self, Output};

#[derive(Args)]
pub(super) struct LowrankArgs {
    #[command(flatten)]
    text: TextArgs,
    /// Text to calibrate on, or a part of one, such as FILE[0..80%]; must differ from --text
    #[arg(long, value_name = "FILE", default_value_os_t = bundled(CALIBRATION))]
    calib: PathBuf,
    /// Windows to calibrate on, sampled with --seed
    #[arg(long, value_name = "N", default_value = "128", value_parser = positive)]
    calib_samples: NonZeroUsize,
    /// Other windows of the same text, to measure the output error on
    #[arg(long, value_name = "N", default_value = "32", value_parser = positive)]
    held_out_samples: NonZeroUsize,
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "C[,C..]",
        value_parser = compressor,
        help = format!(
            "Compressors, separated by commas: {}; more by a grammar, which a wrong name prints [default: {COMPRESSOR}]",
            Compressor::COMMON.join(", ")
        )
    )]
    compress: Vec<Compressor>,
    /// Repair this model instead, which another tool compressed from --model: a GGUF file, or a folder with GPTQ,
    /// compressed-tensors or pruned weights
    #[arg(long, value_name = "DIR_OR_GGUF", conflicts_with = "compress")]
    compressed: Option<PathBuf>,
    /// Importance matrix of llama.cpp, in either form, for compressors that weight by importance (-imatrix, and gptq- with block
    /// types), instead of what calibration sees
    #[arg(long, value_name = "FILE", conflicts_with = "compressed")]
    imatrix: Option<PathBuf>,
    /// Embedding and output head of models in GGUF blocks [default: llama-cpp]
    #[arg(long, value_enum, value_name = "HOW")]
    rest: Option<lowrank::Rest>,
    #[arg(
        long,
        default_value = "eora",
        value_delimiter = ',',
        value_name = "M[,M..]",
        value_parser = method,
        help = format!(
            "Methods, separated by commas: {}, or {} to measure the compressed model as it is",
            Method::NAMES.join(", "),
            lowrank::NONE
        )
    )]
    method: Vec<MethodArg>,
    /// Ranks, separated by commas; limited by the smaller side of each linear [default: 16]
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "R[,R..]",
        value_parser = positive
    )]
    rank: Vec<NonZeroUsize>,
    /// Write the outputs of --save-as to this folder; several results go to subfolders COMPRESS-METHOD-RANK
    #[arg(long, value_name = "DIR")]
    save: Option<PathBuf>,
    /// Outputs to write, separated by commas [default: adapter,compressed,probe; with --experts adapter,compressed; for
    /// --compressed the adapter of its format and probe]
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        value_name = "O[,O..]",
        requires = "save"
    )]
    save_as: Option<Vec<Output>>,
    /// Replace existing output at --save
    #[arg(long, requires = "save")]
    overwrite: bool,
    /// Maximum shard size in bytes
    #[arg(
        long,
        value_name = "N",
        default_value = "5000000000",
        requires = "save"
    )]
    max_shard_bytes: u64,
    /// Save the state of each block in this folder and resume from it
    #[arg(long, value_name = "DIR")]
    resume: Option<PathBuf>,
    /// Also measure nuclear norm and entropy of the hidden states
    #[arg(long)]
    hidden_metrics: bool,
    /// Arithmetic of the original weights that calibration passes through; what is measured is computed in f32
    #[arg(long, value_enum, value_name = "NAME", default_value_t)]
    pub(super) arithmetic: CalibrationArithmetic,
    /// Compress and repair the routed experts of a mixture, one at a time, instead of its other linears; --save-as adapter writes
    /// the form that PEFT 0.19 and newer read
    #[arg(
        long,
        conflicts_with_all = ["compressed", "imatrix", "rest", "resume", "hidden_metrics", "inputs", "sequential", "one_pass",
            "allocate", "token_share", "factors", "requantise", "no_controls"]
    )]
    experts: bool,
    #[command(flatten)]
    of_experts: ExpertArgs,
    #[command(flatten)]
    change: RepairArgs,
}

/// Changes to every repair of the run.
#[derive(Args)]
#[command(next_help_heading = "Changes to the repair")]
struct RepairArgs {
    /// Activations to calibrate on: after the repaired blocks, or of the dense model [default: repaired]
    #[arg(long, value_enum)]
    inputs: Option<InputsArg>,
    /// Within a block, calibrate each linear on the outputs of the repaired linears before it
    #[arg(long)]
    sequential: bool,
    /// Compress each block after the previous blocks were repaired, instead of the whole model first
    #[arg(long)]
    one_pass: bool,
    /// Allocate ranks to linears by their gain, in a second pass within the same bytes: gain relative to each linear's
    /// output, or absolute
    #[arg(long, value_enum, value_name = "SPREAD")]
    allocate: Option<SpreadArg>,
    /// Fraction of the calibration tokens to use, sampled by their norms
    #[arg(long, value_name = "S", value_parser = share)]
    token_share: Option<f64>,
    /// Storage of the factors; int: A in 4 bits, B refitted in 8 bits, groups of 64 [default: f16]
    #[arg(long, value_enum)]
    factors: Option<FactorsArg>,
    /// Merge each result into its weights, compress them again with this compressor and measure the loss
    #[arg(long, value_name = "C", value_parser = compressor)]
    requantise: Option<Compressor>,
    /// Skip the baselines that spend the bytes of the factors on the weights
    #[arg(long)]
    no_controls: bool,
}

/// What is repaired where nothing else is asked for, and the rank.
const COMPRESSOR: &str = "gptq-int4";
const RANK: usize = 16;

impl RepairArgs {
    /// The flags that were given and that change nothing by themselves.
    fn asked(&self) -> Vec<&'static str> {
        given([
            ("--inputs", self.inputs.is_some()),
            ("--sequential", self.sequential),
            ("--one-pass", self.one_pass),
            ("--allocate", self.allocate.is_some()),
            ("--token-share", self.token_share.is_some()),
            ("--factors", self.factors.is_some()),
            ("--requantise", self.requantise.is_some()),
        ])
    }
}

/// `none`, or a method.
#[derive(Clone, Copy)]
struct MethodArg(Option<Method>);

#[derive(Clone, Copy, ValueEnum)]
enum SpreadArg {
    Relative,
    Absolute,
}

#[derive(Clone, Copy, ValueEnum)]
enum InputsArg {
    Repaired,
    Dense,
}

#[derive(Clone, Copy, ValueEnum)]
enum FactorsArg {
    F16,
    Bf16,
    F32,
    Int,
}

fn compressor(name: &str) -> Result<Compressor, String> {
    names::parse(name, Compressor::WORDS)
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if share > 0.0 && share <= 1.0 => Ok(share),
        _ => Err("expected a share, above 0 and at most 1".into()),
    }
}

fn method(name: &str) -> Result<MethodArg, String> {
    if name == lowrank::NONE {
        return Ok(MethodArg(None));
    }
    Ok(MethodArg(Some(names::parse(name, Method::NAMES)?)))
}

impl LowrankArgs {
    pub(super) fn config(self, seed: u64) -> lowrank::Config {
        let methods: Vec<Option<Method>> = self.method.iter().map(|method| method.0).collect();
        let drifts = |method: &Option<Method>| method.is_some_and(|method| method.needs().cross);
        let mut asked = self.change.asked();
        asked.extend(given([("--rest", self.rest.is_some())]));
        asked.extend(self.of_experts.asked());
        let change = self.change;
        let ranks: Vec<usize> = self.rank.into_iter().map(NonZeroUsize::get).collect();
        let repairs = methods.iter().any(Option::is_some);
        let default = COMPRESSOR.parse().into_iter();
        let needs_one = self.compress.is_empty() && self.compressed.is_none();
        lowrank::Config {
            perplexity: self.text.into(),
            calib: self.calib,
            calib_samples: self.calib_samples.get(),
            held_out_samples: self.held_out_samples.get(),
            compressors: match needs_one {
                true => default.collect(),
                false => self.compress,
            },
            compressed: self.compressed,
            imatrix: self.imatrix,
            rest: self.rest.unwrap_or_default(),
            ranks: match ranks.is_empty() && repairs {
                true => vec![RANK],
                false => ranks,
            },
            repair: Repair::default()
                .with_inputs(match change.inputs {
                    None | Some(InputsArg::Repaired) => InputSource::Repaired,
                    Some(InputsArg::Dense) => InputSource::Dense,
                })
                .with_within_block(match change.sequential {
                    true => WithinBlock::Sequential,
                    false => WithinBlock::Original,
                })
                .with_factors(match change.factors {
                    None | Some(FactorsArg::F16) => FactorStorage::F16,
                    Some(FactorsArg::Bf16) => FactorStorage::Bf16,
                    Some(FactorsArg::F32) => FactorStorage::F32,
                    Some(FactorsArg::Int) => FactorStorage::integers(),
                })
                .with_requantise(change.requantise)
                .with_sampling(
                    change
                        .token_share
                        .map(|share| Sampling::new(Importance::Mixture, share, seed)),
                )
                .with_measure_drift(methods.iter().any(drifts)),
            methods,
            allocate: change.allocate.map(|spread| match spread {
                SpreadArg::Relative => Spread::Relative,
                SpreadArg::Absolute => Spread::Absolute,
            }),
            one_pass: change.one_pass,
            controls: !change.no_controls,
            save: self.save,
            outputs: self.save_as,
            write: WriteOptions::default()
                .with_overwrite(self.overwrite)
                .with_max_shard_bytes(self.max_shard_bytes),
            resume: self.resume,
            hidden_metrics: self.hidden_metrics,
            experts: self.experts.then(|| self.of_experts.grams()),
            asked,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compressor_by_default_is_one() {
        assert_eq!(compressor(COMPRESSOR).unwrap().to_string(), COMPRESSOR);
    }
}
