//! What `--save` writes of a repaired model.

use std::path::{Path, PathBuf, absolute};

use anyhow::{Context, Result, ensure};
use candle_core::DType;
use causal_lm::Decoder;
use causal_lm::gguf::GgufTensors;
use clap::ValueEnum;
use eval_report::DENSE;
use lowrank_eora::output::{
    Adapter, AdapterOptions, AdapterRanks, CheckpointOptions, GgufAdapterOptions, GgufModelOptions,
    Probe, Weights, imatrix, write_checkpoint, write_gguf,
};
use lowrank_eora::repair::{Method, Repaired};
use prune_structured::gguf::{self, Precision};
use serde_json::{Map, Value};
use tensor_io::gguf::Gguf;
use tensor_io::{Checkpoint, NoProgress};

use super::config::{Config, NONE};
use super::gguf::{Imported, imatrix_origin};
use super::output::Output;
use super::start::GivenModel;
use crate::settings::{Settings, spares};
use crate::suites::perplexity::file_name;

/// Inputs of each linear in a probe.
const PROBE_TOKENS: usize = 4;

/// What is written: what was asked for, or what makes the methods' results usable.
pub(super) fn outputs(config: &Config, given: Option<&GivenModel<'_>>) -> Vec<Output> {
    if let Some(outputs) = &config.outputs {
        return outputs.clone();
    }
    let outputs = match given {
        None if config.experts.is_some() => vec![Output::Adapter, Output::Compressed],
        None => vec![Output::Adapter, Output::Compressed, Output::Probe],
        Some(given) if given.is_gguf() => vec![Output::LoraGguf, Output::Probe],
        Some(_) => vec![Output::Adapter, Output::Probe],
    };
    let repairs = config.methods.iter().any(Option::is_some);
    let made = |output: &Output| repairs || !output.needs_factors();
    outputs.into_iter().filter(made).collect()
}

/// Where the results of a cell go: `--save` itself for a single cell, a folder of its own for each of several. `None`
/// for one that was not asked for.
pub(super) fn folder(
    config: &Config,
    start: &str,
    repair: Option<(Method, usize)>,
) -> Option<PathBuf> {
    let save = config.save.as_ref()?;
    if !config.methods.contains(&repair.map(|(method, _)| method)) {
        return None;
    }
    let single = config.compressors.len() <= 1
        && config.methods.len() == 1
        && (config.ranks.len() == 1 || repair.is_none());
    Some(match single {
        true => save.clone(),
        false => save.join(cell_name(start, repair)),
    })
}

/// Sees that nothing is in the way of the results.
pub(super) fn check_paths(settings: &Settings, config: &Config) -> Result<()> {
    let given = config.compressed.as_deref().map(file_name);
    let starts = config.compressors.iter().map(ToString::to_string);
    let starts: Vec<String> = starts.chain(given).collect();
    // In the order in which the run asks for cells; what is finished is not written again.
    let cells = [DENSE.to_owned()].into_iter().chain(starts.iter().cloned());
    let ours = settings.cells.ours(&cells.collect::<Vec<_>>());
    for (start, ours) in starts.into_iter().zip(&ours[1..]) {
        for &method in &config.methods {
            let cells: Vec<_> = match method {
                Some(method) => config.ranks.iter().map(|&r| Some((method, r))).collect(),
                None => vec![None],
            };
            for folder in cells
                .iter()
                .filter_map(|cell| folder(config, &start, *cell))
            {
                settings.written(&start, "--save", &folder)?;
                let outputs = Output::value_variants().iter().filter(|_| *ours);
                for output in outputs.filter(|output| may_be_written(config, **output)) {
                    check_path(config, *output, &folder.join(output.file_name()))?;
                }
            }
        }
    }
    if let Some(resume) = &config.resume {
        std::fs::create_dir_all(resume)
            .with_context(|| format!("--resume {}", resume.display()))?;
    }
    Ok(())
}

/// Whether an output is written, as far as flags tell.
fn may_be_written(config: &Config, output: Output) -> bool {
    match &config.outputs {
        Some(outputs) => outputs.contains(&output),
        // Those of [`outputs`]; of a given model its adapter.
        None => match output {
            Output::Adapter => true,
            Output::Probe => config.experts.is_none(),
            Output::Compressed => config.compressed.is_none(),
            Output::LoraGguf => config.compressed.is_some(),
            _ => false,
        },
    }
}

/// Sees that an output may be written to `path`.
fn check_path(config: &Config, output: Output, path: &Path) -> Result<()> {
    let given = config.compressed.iter().map(|path| ("--compressed", path));
    let imatrix = config.imatrix.iter().map(|path| ("--imatrix", path));
    let model = [("--model", &config.perplexity.model)].into_iter();
    let inputs = model.chain(given).chain(imatrix);
    let inputs: Vec<(&str, &Path)> = inputs.map(|(flag, path)| (flag, path.as_path())).collect();
    spares("--save", path, &inputs)?;
    if !path.exists() {
        return Ok(());
    }
    ensure!(
        config.write.overwrite,
        "{} exists already and --overwrite was not given",
        path.display()
    );
    if output.layout().is_some() {
        return config.write.check(path).context("--save");
    }
    let is_adapter = path.join("adapter_config.json").is_file();
    let is_empty = || std::fs::read_dir(path).is_ok_and(|mut files| files.next().is_none());
    ensure!(
        match output {
            Output::Adapter => is_adapter || path.is_dir() && is_empty(),
            _ => !path.is_dir(),
        },
        "--save: {} is no {output}, and is not replaced by one",
        path.display()
    );
    Ok(())
}

/// Makes the folder of the results, so that one that cannot be made is found before anything is computed.
pub(super) fn make_folder(config: &Config) -> Result<()> {
    match &config.save {
        Some(save) => {
            std::fs::create_dir_all(save).with_context(|| format!("--save {}", save.display()))
        }
        None => Ok(()),
    }
}

/// A GGUF file of the uncompressed model, where an output needs one: the model's own, or an export.
pub(super) fn template(
    config: &Config,
    decoder: &Decoder<'_>,
    given: Option<&GivenModel<'_>>,
    scratch: &Path,
) -> Result<Option<Gguf>> {
    if config.save.is_none() || !outputs(config, given).contains(&Output::Gguf) {
        return Ok(None);
    }
    let checkpoint = decoder.checkpoint();
    let source = checkpoint.source();
    if let Some(file) = source.and_then(|source| source.as_any().downcast_ref::<GgufTensors>()) {
        return Ok(Some(Gguf::open(file.file().path())?));
    }
    let embedding = checkpoint.info(&decoder.config().names.embedding())?;
    let precision = match embedding.candle_dtype() {
        Some(DType::F16) => Precision::F16,
        Some(DType::BF16) => Precision::Bf16,
        _ => Precision::F32,
    };
    let path = scratch.join("uncompressed.gguf");
    let exported = gguf::export(decoder, precision, &path, &NoProgress);
    exported.with_context(|| format!("--save-as {}", Output::Gguf))?;
    Ok(Some(Gguf::open(path)?))
}

/// What the results of a cell are written from.
pub(super) struct Saving<'a> {
    pub(super) config: &'a Config,
    pub(super) decoder: &'a Decoder<'a>,
    pub(super) given: Option<&'a GivenModel<'a>>,
    pub(super) template: Option<&'a Gguf>,
    pub(super) imported: &'a Option<Imported>,
    pub(super) repaired: &'a Repaired,
}

impl Saving<'_> {
    /// Writes what the run asks for into `folder`; bytes of the tensors of each output.
    pub(super) fn write(&self, folder: &Path) -> Result<Map<String, Value>> {
        let outputs = outputs(self.config, self.given);
        let has_factors = self.repaired.reports().any(|report| report.rank > 0);
        let mut bytes = Map::new();
        std::fs::create_dir_all(folder)?;
        for &output in &outputs {
            if output.needs_factors() && !has_factors {
                continue;
            }
            let written = self.output(output, &outputs, folder)?;
            bytes.insert(output.to_string(), written.into());
        }
        Ok(bytes)
    }

    fn output(&self, output: Output, outputs: &[Output], folder: &Path) -> Result<u64> {
        let &Self {
            config,
            decoder,
            given,
            repaired,
            imported,
            ..
        } = self;
        let dst = folder.join(output.file_name());
        let weights = match output {
            Output::Merged => Weights::Merged,
            Output::Requantised => Weights::Requantised,
            _ => Weights::Compressed,
        };
        if let Some(layout) = output.layout() {
            let options = CheckpointOptions::new(weights, layout).with_write(config.write.clone());
            let rest = given.and_then(|given| given.decoder.as_ref());
            let rest = rest.unwrap_or(decoder);
            return Ok(write_checkpoint(rest, repaired, dst, &options, &NoProgress)?.bytes);
        }
        match output {
            Output::Adapter => {
                let base = output.bases().iter().find(|base| outputs.contains(base));
                let base = match (base, given) {
                    (Some(base), _) => folder.join(base.file_name()),
                    (None, Some(given)) => given.checkpoint.dir().to_path_buf(),
                    (None, None) => config.perplexity.model.clone(),
                };
                // Ranks as they are: the file has the bytes that the report counts.
                let options = AdapterOptions::new(absolute(base)?.display().to_string())
                    .with_dtype(config.repair.factors.dtype())
                    .with_ranks(AdapterRanks::Mixed)
                    .with_overwrite(config.write.overwrite);
                Adapter::write(repaired, &options, &dst)?;
                let file = Checkpoint::open_file(dst.join("adapter_model.safetensors"))?;
                return Ok(file.total_bytes());
            }
            Output::Gguf => {
                let template = self.template.context("no GGUF of the uncompressed model")?;
                let options = GgufModelOptions::new(weights, template)
                    .with_imatrix(imatrix_origin(config, imported, outputs));
                write_gguf(decoder, repaired, &options, &dst, &NoProgress)?;
            }
            Output::LoraGguf => {
                let named = given.and_then(|given| given.source.architecture());
                let mut options = match self.template {
                    Some(template) => GgufAdapterOptions::of_base(template)?,
                    None => GgufAdapterOptions::new(decoder),
                };
                if let Some(architecture) = named {
                    options = options.with_architecture(architecture);
                }
                // What was measured: in another type values would be rounded once more.
                options = options.with_dtype(config.repair.factors.block_type());
                Adapter::write_gguf(repaired, decoder, &options, &dst)?;
            }
            Output::Imatrix => {
                let text = file_name(&config.calib);
                imatrix(repaired, decoder, &text)?.write_gguf(&dst)?;
            }
            Output::ImatrixDat => {
                let text = file_name(&config.calib);
                imatrix(repaired, decoder, &text)?.write_legacy(&dst)?;
                return Ok(std::fs::metadata(&dst)?.len());
            }
            _ => {
                Probe::write(repaired, PROBE_TOKENS, 0, &dst)?;
                return Ok(Checkpoint::open_file(&dst)?.total_bytes());
            }
        }
        Ok(Gguf::open(&dst)?.total_bytes())
    }
}

/// What the files of a cell are called.
pub(super) fn cell_name(start: &str, repair: Option<(Method, usize)>) -> String {
    // A colon is no part of a file name everywhere.
    let start = start.replace(':', "of");
    match repair {
        None => format!("{start}-{NONE}"),
        Some((method, rank)) => format!("{start}-{method}-{rank}"),
    }
}
