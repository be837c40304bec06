//! What `--save` writes of a repaired model.

use std::path::Path;

use anyhow::{Context, Result};
use causal_lm::Decoder;
use lowrank_eora::format::gptq::Version;
use lowrank_eora::output::{Adapter, AdapterOptions, Layout, Probe, Weights, write_checkpoint};
use lowrank_eora::repair::Repaired;

use super::Config;

/// Inputs of each linear in a probe.
const PROBE_TOKENS: usize = 4;

/// Something to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// LoRA adapter folder `adapter`.
    Adapter,
    /// Compressed model in floats, `compressed`.
    Compressed,
    /// Compressed model packed as GPTQ, `gptq`.
    Gptq,
    /// The same with zero points as they are, `gptq-v2`.
    GptqV2,
    /// Dense model with merged weights, `merged`.
    Merged,
    /// The merged model packed as GPTQ again, `requantised`.
    Requantised,
    /// `probe.safetensors`.
    Probe,
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
    let checkpoint = |name: &str, weights, layout| -> Result<()> {
        let (dst, options) = (folder.join(name), &config.write);
        write_checkpoint(decoder, repaired, weights, layout, dst, options, &mut || ())?;
        Ok(())
    };
    let has_factors = repaired.reports().any(|report| report.rank > 0);
    for output in &config.outputs {
        match output {
            Output::Adapter if has_factors => {
                let base = config.outputs.iter().find_map(|output| match output {
                    Output::Gptq => Some("gptq"),
                    Output::GptqV2 => Some("gptq-v2"),
                    Output::Compressed => Some("compressed"),
                    _ => None,
                });
                let base = base.map(|name| folder.join(name));
                let options = AdapterOptions {
                    dtype: config.repair.factors.dtype(),
                    base_model: base
                        .as_deref()
                        .unwrap_or(&config.perplexity.model)
                        .display()
                        .to_string(),
                    overwrite: config.write.overwrite,
                    ..AdapterOptions::default()
                };
                Adapter::write(repaired, &options, folder.join("adapter"))?;
            }
            Output::Adapter => {}
            Output::Compressed => checkpoint("compressed", Weights::Compressed, dense)?,
            Output::Gptq => checkpoint("gptq", Weights::Compressed, gptq(Version::V1))?,
            Output::GptqV2 => checkpoint("gptq-v2", Weights::Compressed, gptq(Version::V2))?,
            Output::Merged => checkpoint("merged", Weights::Merged, dense)?,
            Output::Requantised if has_factors => {
                checkpoint("requantised", Weights::Requantised, gptq(Version::V2))
                    .context("--save-as requantised needs --requantise")?;
            }
            Output::Requantised => {}
            Output::Probe => {
                std::fs::create_dir_all(folder)?;
                Probe::write(repaired, PROBE_TOKENS, 0, folder.join("probe.safetensors"))?;
            }
        }
    }
    Ok(())
}
