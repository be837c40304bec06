//! What `--save` writes of a repaired model.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use causal_lm::Decoder;
use clap::ValueEnum;
use lowrank_eora::compress::Compressor;
use lowrank_eora::output::gptq::Version;
use lowrank_eora::output::{
    Adapter, AdapterOptions, CheckpointOptions, Layout, Probe, Weights, write_checkpoint,
};
use lowrank_eora::repair::{Method, Repaired};
use tensor_io::NoProgress;

use super::{Config, cell_name};

/// Inputs of each linear in a probe.
const PROBE_TOKENS: usize = 4;

/// Something to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// LoRA adapter folder for PEFT and vLLM
    Adapter,
    /// Compressed model with weights as floats
    Compressed,
    /// Compressed model packed as GPTQ
    Gptq,
    /// The same with zero points stored unchanged, which most runtimes call gptq_v2
    GptqV2,
    /// Dense model with the factors merged into the weights
    Merged,
    /// The merged model packed as GPTQ again; needs --requantise
    Requantised,
    /// Inputs and expected outputs of each linear, to check a runtime with
    Probe,
}

impl Output {
    /// What is written by default.
    pub const DEFAULT: [Output; 3] = [Output::Adapter, Output::Compressed, Output::Probe];

    fn file_name(self) -> &'static str {
        match self {
            Self::Adapter => "adapter",
            Self::Compressed => "compressed",
            Self::Gptq => "gptq",
            Self::GptqV2 => "gptq-v2",
            Self::Merged => "merged",
            Self::Requantised => "requantised",
            Self::Probe => "probe.safetensors",
        }
    }
}

/// Where the results of a cell go: `--save` itself for a single cell, a folder of its own for each of several. `None`
/// for one that was not asked for.
pub(super) fn folder(
    config: &Config,
    compressor: &Compressor,
    repair: Option<(Method, usize)>,
) -> Option<PathBuf> {
    let save = config.save.as_ref()?;
    if !config.methods.contains(&repair.map(|(method, _)| method)) {
        return None;
    }
    let single = config.compressors.len() == 1
        && config.methods.len() == 1
        && (config.ranks.len() == 1 || repair.is_none());
    Some(match single {
        true => save.clone(),
        false => save.join(cell_name(compressor, repair)),
    })
}

/// Sees before anything is computed that the results can be written.
pub(super) fn check(config: &Config) -> Result<()> {
    if config.save.is_none() {
        return Ok(());
    }
    let wants = |outputs: &[Output]| config.outputs.iter().any(|output| outputs.contains(output));
    for compressor in &config.compressors {
        ensure!(
            !wants(&[Output::Gptq, Output::GptqV2]) || compressor.quantise.is_some(),
            "--save-as gptq: {compressor} does not quantise; write it as compressed"
        );
        let repairs = config.methods.iter().flat_map(|&method| {
            let ranks = config.ranks.iter();
            let cells: Vec<_> = match method {
                Some(method) => ranks.map(|&rank| Some((method, rank))).collect(),
                None => vec![None],
            };
            cells
        });
        for folder in repairs.filter_map(|repair| folder(config, compressor, repair)) {
            for output in &config.outputs {
                let path = folder.join(output.file_name());
                ensure!(
                    config.write.overwrite || !path.exists(),
                    "{} exists already and --overwrite was not given",
                    path.display()
                );
            }
        }
    }
    let requantise = config.repair.requantise.as_ref();
    ensure!(
        !wants(&[Output::Requantised]) || requantise.is_some_and(|c| c.quantise.is_some()),
        "--save-as requantised needs --requantise with a compressor that quantises"
    );
    Ok(())
}

/// Writes what the run asks for into `folder`.
pub(super) fn write(
    config: &Config,
    decoder: &Decoder<'_>,
    repaired: &Repaired,
    folder: &Path,
) -> Result<()> {
    let dense = Layout::Dense { dtype: None };
    let gptq = |version| Layout::Gptq { version };
    let checkpoint = |output: &Output, weights, layout| -> Result<()> {
        let dst = folder.join(output.file_name());
        let options = CheckpointOptions::new(weights, layout).with_write(config.write.clone());
        write_checkpoint(decoder, repaired, dst, &options, &NoProgress)?;
        Ok(())
    };
    let has_factors = repaired.reports().any(|report| report.rank > 0);
    for output in &config.outputs {
        match output {
            Output::Adapter if has_factors => {
                let models = [Output::Gptq, Output::GptqV2, Output::Compressed];
                let base = models
                    .into_iter()
                    .find(|model| config.outputs.contains(model));
                let base = base.map(|model| folder.join(model.file_name()));
                let options = AdapterOptions::default()
                    .with_dtype(config.repair.factors.dtype())
                    .with_base_model(
                        base.as_deref()
                            .unwrap_or(&config.perplexity.model)
                            .display()
                            .to_string(),
                    )
                    .with_overwrite(config.write.overwrite);
                Adapter::write(repaired, &options, folder.join(output.file_name()))?;
            }
            Output::Adapter => {}
            Output::Compressed => checkpoint(output, Weights::Compressed, dense)?,
            Output::Gptq => checkpoint(output, Weights::Compressed, gptq(Version::V1))?,
            Output::GptqV2 => checkpoint(output, Weights::Compressed, gptq(Version::V2))?,
            Output::Merged => checkpoint(output, Weights::Merged, dense)?,
            Output::Requantised if has_factors => {
                checkpoint(output, Weights::Requantised, gptq(Version::V2))?;
            }
            Output::Requantised => {}
            Output::Probe => {
                std::fs::create_dir_all(folder)?;
                Probe::write(repaired, PROBE_TOKENS, 0, folder.join(output.file_name()))?;
            }
        }
    }
    Ok(())
}
