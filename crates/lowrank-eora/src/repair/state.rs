//! The state folder of a repair: one file per block, and a description of the run.
//!
//! `repair.json` describes the run: model, windows, source and options; `block-00003.safetensors` holds W_c, B and A
//! of the linears of block 3 and, in its metadata, their reports and a checksum of everything. Each file appears when
//! it is complete, so that a run that was killed continues after the last complete block. A damaged file is an error.

use super::{Bytes, Damping, Energy, LayerId, LayerReport, Seconds, StoredWeight};
use crate::compress::{Compressor, Needs};
use crate::solve::LowRank;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use causal_lm::{Decoder, Windows};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tensor_io::atomic::{read_sealed_json, write_sealed_json};
use tensor_io::{Checkpoint, ContentHash, Hasher};

/// Version of the layout of the folder.
const VERSION: u64 = 5;
const FILE: &str = "repair.json";
const REPORT: &str = "report";
/// Names of the matrices beside the linears, of a repair that was assembled.
const OTHERS: &str = "others.json";
/// The source of a repair that was assembled.
const ASSEMBLED: &str = "made linear by linear";

/// A finished repair: where compressed weights, factors and reports are read from.
#[derive(Debug)]
pub struct Repaired {
    folder: PathBuf,
    facts: Map<String, Value>,
    reports: Vec<Vec<LayerReport>>,
    others: Others,
}

/// Matrices beside the linears.
#[derive(Debug)]
enum Others {
    /// In the folder, by their modules.
    Stored(Vec<String>),
    /// Given instead, by their modules.
    Given(Arc<Vec<(String, StoredWeight)>>),
}

/// A linear of a finished repair.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RepairedLayer {
    /// What was done to it.
    pub report: LayerReport,
    /// W_c.
    pub weight: StoredWeight,
    /// B and A as they are stored; `None` at rank 0.
    pub factors: Option<LowRank>,
    /// W_c' of a merge by requantisation, where one was asked for.
    pub requantised: Option<StoredWeight>,
    /// Mean of x² of each input over the calibration tokens.
    pub mean_square: Vec<f64>,
}

impl RepairedLayer {
    /// A linear of `decoder` whose weight and factors were made elsewhere; `mean_square` is the mean of x² of each input.
    /// Its report has shapes and bytes alone.
    ///
    /// # Errors
    /// What reading the decoder's tensor or counting reports.
    pub fn made(
        decoder: &Decoder<'_>,
        layer: LayerId,
        weight: StoredWeight,
        factors: Option<LowRank>,
        mean_square: Vec<f64>,
    ) -> Result<Self> {
        let (outputs, inputs) = weight.shape();
        let rank = factors.as_ref().map_or(0, LowRank::rank);
        let bytes = Bytes {
            dense: decoder.checkpoint().info(&layer.weight())?.bytes as u64,
            compressed: weight.bytes()?,
            factors: ((outputs + inputs) * rank * DType::F16.size_in_bytes()) as u64,
        };
        Ok(Self {
            report: LayerReport {
                layer,
                outputs,
                inputs,
                rank,
                tokens: 0,
                calibration: Energy::default(),
                held_out: None,
                held_out_drift: None,
                requantised: None,
                sweep: None,
                spectrum: None,
                seconds: Seconds::default(),
                bytes,
                statistics_bytes: 0,
            },
            weight,
            factors,
            requantised: None,
            mean_square,
        })
    }

    /// W_c + B A.
    ///
    /// # Errors
    /// When a value is not finite.
    pub fn merged(&self) -> Result<faer::Mat<f64>> {
        let mut weight = self.weight.matrix()?;
        if let Some(factors) = &self.factors {
            weight += factors.product();
        }
        Ok(weight)
    }
}

impl Repaired {
    /// Opens a finished repair. Reads all of it and compares it with its checksums.
    ///
    /// # Errors
    /// When the folder holds none, or one that stopped before its last block; [`Error::Checkpoint`] with
    /// [`tensor_io::Error::Checksum`] for a damaged file.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let facts = read_facts(folder)?.ok_or_else(|| Error::Malformed {
            path: folder.join(FILE),
            reason: "there is no repair in this folder".into(),
        })?;
        let blocks = facts.get("blocks").and_then(Value::as_u64).unwrap_or(0) as usize;
        let reports = (0..blocks)
            .map(|block| {
                let found = open_checked(folder, block)?;
                let (_, reports) = found.ok_or_else(|| Error::Malformed {
                    path: block_file(folder, block),
                    reason: "this block was not repaired yet; run the repair again".into(),
                })?;
                Ok(reports)
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            folder: folder.to_owned(),
            others: Others::Stored(read_sealed_json(folder.join(OTHERS))?.unwrap_or_default()),
            facts,
            reports,
        })
    }

    /// Puts linears that were made elsewhere into `folder`, as a finished repair that can be written out: the linears of
    /// each block, all blocks in their order, and matrices beside them by the path of their module
    /// (`model.embed_tokens`), of which one at a time is in memory. They may differ in form from one linear to the next.
    ///
    /// # Errors
    /// [`Error::OtherRun`] where the folder holds a repair, and what writing reports.
    pub fn assemble<E: From<Error>>(
        folder: impl AsRef<Path>,
        decoder: &Decoder<'_>,
        blocks: impl IntoIterator<Item = std::result::Result<Vec<RepairedLayer>, E>>,
        others: impl IntoIterator<Item = std::result::Result<(String, StoredWeight), E>>,
    ) -> std::result::Result<Self, E> {
        let folder = folder.as_ref();
        create_empty(folder)?;
        let mut count = 0;
        for layers in blocks {
            write_block(folder, count, &layers?)?;
            count += 1;
        }
        let mut modules = Vec::new();
        for other in others {
            let (module, weight) = other?;
            write_other(folder, modules.len(), (&module, &weight))?;
            modules.push(module);
        }
        Ok(finish_assembly(folder, decoder, count, &modules)?)
    }

    /// Whether it was assembled from linears that may differ in form.
    pub fn is_assembled(&self) -> bool {
        self.facts.get("source").and_then(Value::as_str) == Some(ASSEMBLED)
    }

    /// Matrices beside the linears, each with the path of its module; each is read when it is asked for.
    pub fn others(&self) -> impl Iterator<Item = Result<(&str, StoredWeight)>> {
        let modules = self.other_modules().into_iter().enumerate();
        modules.map(|(at, module)| Ok((module, self.other(at)?)))
    }

    /// Paths of the modules of [`Repaired::others`].
    pub(crate) fn other_modules(&self) -> Vec<&str> {
        match &self.others {
            Others::Stored(modules) => modules.iter().map(String::as_str).collect(),
            Others::Given(given) => given.iter().map(|(module, _)| module.as_str()).collect(),
        }
    }

    /// The matrix at this place of [`Repaired::other_modules`].
    pub(crate) fn other(&self, at: usize) -> Result<StoredWeight> {
        match &self.others {
            Others::Stored(modules) => {
                let file = Checkpoint::open_checked_file(other_file(&self.folder, at))?;
                StoredWeight::read(&file, &modules[at])
            }
            Others::Given(given) => Ok(given[at].1.clone()),
        }
    }

    /// The same with other matrices beside the linears, such as those of [`rest`](crate::output::rest): written into folders of
    /// floats and GGUF files. The state folder stays as it is.
    pub fn with_others(self, others: Arc<Vec<(String, StoredWeight)>>) -> Self {
        Self {
            others: Others::Given(others),
            ..self
        }
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What was run on what.
    pub fn facts(&self) -> &Map<String, Value> {
        &self.facts
    }

    /// What compressed the weights, unless they were given.
    pub fn compressor(&self) -> Option<Compressor> {
        self.facts.get("compressor")?.as_str()?.parse().ok()
    }

    /// The damping that SparseGPT or GPTQ ended with when W was compressed; `None` where nothing swept.
    pub fn damping(&self) -> Option<Damping> {
        Damping::of(self.reports().filter_map(|report| report.sweep))
    }

    /// The same of the merge by requantisation.
    pub fn requantised_damping(&self) -> Option<Damping> {
        let requantised = self.reports().filter_map(|r| r.requantised.as_ref());
        Damping::of(requantised.filter_map(|requantised| requantised.sweep))
    }

    /// What compressed them again after a merge by requantisation.
    pub fn requantiser(&self) -> Option<Compressor> {
        self.facts.get("requantise")?.as_str()?.parse().ok()
    }

    /// Reports of all linears, in the order of the data.
    pub fn reports(&self) -> impl Iterator<Item = &LayerReport> {
        self.reports.iter().flatten()
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.reports.len()
    }

    /// Reads the linears of a block.
    ///
    /// # Errors
    /// When the file cannot be read or does not hold what its report says.
    pub fn block(&self, block: usize) -> Result<Vec<RepairedLayer>> {
        let (file, reports) = self.file(block)?;
        read_layers(&file, reports.clone())
    }

    /// The file of a block, which was checked when the repair was opened.
    fn file(&self, block: usize) -> Result<(Checkpoint, &Vec<LayerReport>)> {
        let path = block_file(&self.folder, block);
        match self.reports.get(block) {
            Some(reports) => Ok((Checkpoint::open_file(path)?, reports)),
            None => Err(Error::Malformed {
                path,
                reason: format!("the model has {} blocks", self.reports.len()),
            }),
        }
    }
}

/// Begins a repair in `folder` or takes up the one that is there.
///
/// # Errors
/// [`Error::OtherRun`] when it was asked for something else.
pub(super) fn begin(folder: &Path, facts: &Map<String, Value>) -> Result<()> {
    if let Some(found) = read_facts(folder)? {
        let differs = facts
            .iter()
            .find(|(key, value)| found.get(*key) != Some(value));
        return match differs {
            None => Ok(()),
            Some((key, value)) => {
                let found = found.get(key).unwrap_or(&Value::Null);
                Err(other_run(folder, key, found, value))
            }
        };
    }
    fs::create_dir_all(folder).map_err(tensor_io::Error::io("create", folder))?;
    Ok(write_sealed_json(folder.join(FILE), facts)?)
}

/// What makes two runs the same.
pub(super) fn facts(
    repair: &super::Repair,
    source: &dyn super::Source,
    decoder: &Decoder<'_>,
    texts: super::Texts<'_>,
) -> Result<Map<String, Value>> {
    let hash = |hash: ContentHash| Value::from(hash.to_string());
    let repair = serde_json::to_value(repair).map_err(|error| Error::Malformed {
        path: FILE.into(),
        reason: error.to_string(),
    })?;
    let mut facts = Map::new();
    facts.insert("version".into(), VERSION.into());
    facts.insert("blocks".into(), decoder.config().layers().into());
    facts.insert("model".into(), hash(decoder.checkpoint().content_hash()?));
    let dtype = decoder.dtype().as_str();
    let computed_in = match decoder.execution() {
        None => dtype.to_string(),
        Some(execution) => format!("{dtype}, weights as stored, {:?}", execution.arithmetic),
    };
    facts.insert("computed_in".into(), computed_in.into());
    facts.insert("source".into(), source.describe()?.into());
    let compressor = source.compressor().map(|compressor| compressor.to_string());
    facts.insert("compressor".into(), compressor.into());
    facts.insert("calibration".into(), hash(hash_windows(texts.calibration)));
    facts.insert(
        "held_out".into(),
        (texts.held_out).map_or(Value::Null, |w| hash(hash_windows(w))),
    );
    if let Value::Object(fields) = repair {
        facts.extend(fields);
    }
    // As a file gives them back: floats in their shortest form.
    let text = serde_json::to_string(&facts).map_err(|error| malformed(Path::new(FILE), &error))?;
    serde_json::from_str(&text).map_err(|error| malformed(Path::new(FILE), &error))
}

fn other_run(folder: &Path, what: &str, found: &Value, expected: &Value) -> Error {
    Error::OtherRun {
        folder: folder.to_owned(),
        difference: format!("{what} {found} instead of {expected}"),
    }
}

fn malformed(path: &Path, error: &dyn std::error::Error) -> Error {
    Error::Malformed {
        path: path.to_owned(),
        reason: error.to_string(),
    }
}

fn read_facts(folder: &Path) -> Result<Option<Map<String, Value>>> {
    Ok(read_sealed_json(folder.join(FILE))?)
}

fn block_file(folder: &Path, block: usize) -> PathBuf {
    folder.join(format!("block-{block:05}.safetensors"))
}

/// A folder without a repair.
fn create_empty(folder: &Path) -> Result<()> {
    if let Some(found) = read_facts(folder)? {
        let found = found.get("source").cloned().unwrap_or_default();
        return Err(other_run(folder, "source", &found, &ASSEMBLED.into()));
    }
    Ok(fs::create_dir_all(folder).map_err(tensor_io::Error::io("create", folder))?)
}

/// Writes a matrix beside the linears.
fn write_other(folder: &Path, at: usize, (module, weight): (&str, &StoredWeight)) -> Result<()> {
    let tensors = weight.tensors(module)?;
    let named = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
    let path = other_file(folder, at);
    Ok(tensor_io::write_checked_file(
        path,
        named,
        &BTreeMap::new(),
    )?)
}

fn other_file(folder: &Path, at: usize) -> PathBuf {
    folder.join(format!("other-{at:06}.safetensors"))
}

/// Describes an assembled repair that is written otherwise.
fn finish_assembly(
    folder: &Path,
    decoder: &Decoder<'_>,
    blocks: usize,
    others: &[String],
) -> Result<Repaired> {
    write_sealed_json(folder.join(OTHERS), &others)?;
    let mut facts = Map::new();
    facts.insert("version".into(), VERSION.into());
    facts.insert("blocks".into(), blocks.into());
    let model = decoder.checkpoint().content_hash()?.to_string();
    facts.insert("model".into(), model.into());
    facts.insert("source".into(), ASSEMBLED.into());
    write_sealed_json(folder.join(FILE), &facts)?;
    Repaired::open(folder)
}

/// Writes the linears of a block.
pub(super) fn write_block(folder: &Path, block: usize, layers: &[RepairedLayer]) -> Result<()> {
    let path = block_file(folder, block);
    let mut tensors: Vec<(String, Tensor)> = Vec::new();
    for layer in layers {
        let name = layer.report.layer.to_string();
        tensors.extend(layer.weight.tensors(&name)?);
        let mean_square = Tensor::new(layer.mean_square.as_slice(), &Device::Cpu)?;
        tensors.push((format!("{name}.mean_square"), mean_square));
        if let Some(factors) = &layer.factors {
            // f64 holds what any storage of factors gives.
            let (a, b) = factors.to_tensors(DType::F64, &Device::Cpu)?;
            tensors.push((format!("{name}.lora_A"), a));
            tensors.push((format!("{name}.lora_B"), b));
        }
        if let Some(requantised) = &layer.requantised {
            tensors.extend(requantised.tensors(&format!("{name}.requantised"))?);
        }
    }
    let reports: Vec<&LayerReport> = layers.iter().map(|layer| &layer.report).collect();
    let reports = serde_json::to_string(&reports).map_err(|error| malformed(&path, &error))?;
    let metadata = BTreeMap::from([(REPORT.to_owned(), reports)]);
    let tensors = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
    Ok(tensor_io::write_checked_file(path, tensors, &metadata)?)
}

/// The file of a block, if it was repaired, and its reports. All of it is read and compared with its checksum.
fn open_checked(folder: &Path, block: usize) -> Result<Option<(Checkpoint, Vec<LayerReport>)>> {
    let path = block_file(folder, block);
    if !path.exists() {
        return Ok(None);
    }
    let file = Checkpoint::open_checked_file(&path)?;
    let reports = file.metadata().get(REPORT).map_or("", String::as_str);
    let reports = serde_json::from_str(reports).map_err(|error| malformed(&path, &error))?;
    Ok(Some((file, reports)))
}

/// Reads the linears of a block, if it was repaired.
pub(super) fn read_block(folder: &Path, block: usize) -> Result<Option<Vec<RepairedLayer>>> {
    match open_checked(folder, block)? {
        Some((file, reports)) => read_layers(&file, reports).map(Some),
        None => Ok(None),
    }
}

fn read_layers(file: &Checkpoint, reports: Vec<LayerReport>) -> Result<Vec<RepairedLayer>> {
    let layer = |report: LayerReport| -> Result<RepairedLayer> {
        let name = report.layer.to_string();
        let factors = match report.rank {
            0 => None,
            _ => Some(LowRank::from_tensors(
                &file.tensor(&format!("{name}.lora_A"), &Device::Cpu)?,
                &file.tensor(&format!("{name}.lora_B"), &Device::Cpu)?,
            )?),
        };
        let requantised = report.requantised.as_ref();
        let requantised =
            requantised.map(|_| StoredWeight::read(file, &format!("{name}.requantised")));
        Ok(RepairedLayer {
            weight: StoredWeight::read(file, &name)?,
            mean_square: file
                .tensor(&format!("{name}.mean_square"), &Device::Cpu)?
                .to_vec1()?,
            factors,
            requantised: requantised.transpose()?,
            report,
        })
    };
    reports.into_iter().map(layer).collect()
}

fn hash_windows(windows: &Windows) -> ContentHash {
    let mut hasher = Hasher::new();
    for window in windows.iter() {
        hasher.tokens(window);
    }
    hasher.finish()
}

/// The weights of an earlier repair, for another one that starts from the same W_c.
impl super::Source for Repaired {
    fn describe(&self) -> Result<String> {
        let mut hasher = Hasher::new();
        for (key, value) in &self.facts {
            hasher
                .part(key.as_bytes())
                .part(value.to_string().as_bytes());
        }
        let source = self.facts.get("source").and_then(Value::as_str);
        Ok(format!(
            "{}, as compressed by run {}",
            source.unwrap_or_default(),
            hasher.finish()
        ))
    }

    fn compressor(&self) -> Option<Compressor> {
        self.compressor()
    }

    fn needs(&self) -> Needs {
        Needs::Nothing
    }

    fn check(&self, dense: &Decoder<'_>) -> Result<()> {
        let found = Value::from(dense.checkpoint().content_hash()?.to_string());
        match self.facts.get("model") {
            Some(model) if *model == found => Ok(()),
            model => {
                let model = model.unwrap_or(&Value::Null);
                Err(other_run(&self.folder, "model", model, &found))
            }
        }
    }

    fn compressed(&self, linear: &super::Linear<'_>) -> Result<super::CompressedLinear> {
        let (file, reports) = self.file(linear.layer.block())?;
        let report = reports.iter().find(|report| report.layer == linear.layer);
        Ok(super::CompressedLinear {
            sweep: report.and_then(|report| report.sweep),
            weight: StoredWeight::read(&file, &linear.layer.to_string())?,
        })
    }
}
