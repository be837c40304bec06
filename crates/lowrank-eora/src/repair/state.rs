//! The folder in which a repair lives: one file per block, and what the run was asked to do.
//!
//! `repair.json` says what was run on what; `block-00003.safetensors` holds W_c, B and A of the
//! linears of block 3 and, in its metadata, their reports. Each file appears when it is complete, so
//! that a run which was killed goes on behind the last whole block.

use super::{LayerId, LayerReport, StoredWeight};
use crate::compress::{Compressor, Needs};
use crate::solve::LowRank;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use causal_lm::{Decoder, Windows};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use tensor_io::Checkpoint;

/// Version of the layout of the folder.
const VERSION: u64 = 1;
const FILE: &str = "repair.json";
const REPORT: &str = "report";

/// A finished repair: where compressed weights, factors and reports are read from.
#[derive(Debug)]
pub struct Repaired {
    folder: PathBuf,
    facts: Map<String, Value>,
    reports: Vec<Vec<LayerReport>>,
}

/// A linear of a finished repair.
#[derive(Clone, Debug)]
pub struct RepairedLayer {
    /// What was done to it.
    pub report: LayerReport,
    /// W_c.
    pub weight: StoredWeight,
    /// B and A as they are stored; `None` at rank 0.
    pub factors: Option<LowRank>,
    /// W_c' of a merge by requantisation, where one was asked for.
    pub requantised: Option<StoredWeight>,
}

impl RepairedLayer {
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
    /// Opens a finished repair.
    ///
    /// # Errors
    /// When the folder holds none, or one that stopped before its last block.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let facts = read_facts(folder)?.ok_or_else(|| Error::Malformed {
            path: folder.join(FILE),
            reason: "there is no repair in this folder".into(),
        })?;
        let blocks = facts.get("blocks").and_then(Value::as_u64).unwrap_or(0) as usize;
        let reports = (0..blocks)
            .map(|block| {
                read_report(folder, block)?.ok_or_else(|| Error::Malformed {
                    path: block_file(folder, block),
                    reason: "this block was not repaired yet; run the repair again".into(),
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            folder: folder.to_owned(),
            facts,
            reports,
        })
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
        read_block(&self.folder, block)?.ok_or_else(|| Error::Malformed {
            path: block_file(&self.folder, block),
            reason: "there is no such block".into(),
        })
    }
}

/// Begins a repair in `folder` or takes up the one that is there.
///
/// # Errors
/// [`Error::OtherRun`] when it was asked for something else.
pub(super) fn begin(folder: &Path, facts: &Map<String, Value>) -> Result<()> {
    let io = |action, path: &Path| {
        let path = path.to_owned();
        move |source| tensor_io::Error::Io {
            action,
            path,
            source,
        }
    };
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
    fs::create_dir_all(folder).map_err(io("create", folder))?;
    let (path, partial) = (folder.join(FILE), folder.join(".repair.json.partial"));
    let mut text = serde_json::to_vec_pretty(facts).map_err(|error| malformed(&path, &error))?;
    text.push(b'\n');
    fs::write(&partial, text).map_err(io("write", &partial))?;
    fs::rename(&partial, &path).map_err(io("rename", &partial))?;
    Ok(())
}

/// What makes two runs the same.
pub(super) fn facts(
    repair: &super::Repair,
    source: &dyn super::Source,
    decoder: &Decoder<'_>,
    (calibration, held_out): (&Windows, Option<&Windows>),
) -> Result<Map<String, Value>> {
    let hash = |hash: u64| Value::from(format!("{hash:016x}"));
    let repair = serde_json::to_value(repair).map_err(|error| Error::Malformed {
        path: FILE.into(),
        reason: error.to_string(),
    })?;
    let mut facts = Map::new();
    facts.insert("version".into(), VERSION.into());
    facts.insert("blocks".into(), decoder.config().layers().into());
    facts.insert("model".into(), hash(hash_checkpoint(decoder.checkpoint())));
    facts.insert("computed_in".into(), decoder.dtype().as_str().into());
    facts.insert("source".into(), source.describe().into());
    let compressor = source.compressor().map(|compressor| compressor.to_string());
    facts.insert("compressor".into(), compressor.into());
    facts.insert("calibration".into(), hash(hash_windows(calibration)));
    facts.insert(
        "held_out".into(),
        held_out.map_or(Value::Null, |w| hash(hash_windows(w))),
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
    let path = folder.join(FILE);
    if !path.exists() {
        return Ok(None);
    }
    let text = fs::read(&path).map_err(|source| tensor_io::Error::Io {
        action: "read",
        path: path.clone(),
        source,
    })?;
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|error| malformed(&path, &error))
}

fn block_file(folder: &Path, block: usize) -> PathBuf {
    folder.join(format!("block-{block:05}.safetensors"))
}

/// Writes the linears of a block.
pub(super) fn write_block(folder: &Path, block: usize, layers: &[RepairedLayer]) -> Result<()> {
    let path = block_file(folder, block);
    let mut tensors: Vec<(String, Tensor)> = Vec::new();
    for layer in layers {
        let name = layer.report.layer.to_string();
        tensors.extend(layer.weight.tensors(&name)?);
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
    Ok(tensor_io::write_file(path, tensors, &metadata)?)
}

fn open_block(folder: &Path, block: usize) -> Result<Option<(Checkpoint, Vec<LayerReport>)>> {
    let path = block_file(folder, block);
    if !path.exists() {
        return Ok(None);
    }
    let file = Checkpoint::open_file(&path)?;
    let reports = file.metadata().get(REPORT).map_or("", String::as_str);
    let reports = serde_json::from_str(reports).map_err(|error| malformed(&path, &error))?;
    Ok(Some((file, reports)))
}

fn read_report(folder: &Path, block: usize) -> Result<Option<Vec<LayerReport>>> {
    Ok(open_block(folder, block)?.map(|(_, reports)| reports))
}

/// Reads the linears of a block, if it was repaired.
pub(super) fn read_block(folder: &Path, block: usize) -> Result<Option<Vec<RepairedLayer>>> {
    let Some((file, reports)) = open_block(folder, block)? else {
        return Ok(None);
    };
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
            requantised.map(|_| StoredWeight::read(&file, &format!("{name}.requantised")));
        Ok(RepairedLayer {
            weight: StoredWeight::read(&file, &name)?,
            factors,
            requantised: requantised.transpose()?,
            report,
        })
    };
    reports
        .into_iter()
        .map(layer)
        .collect::<Result<_>>()
        .map(Some)
}

/// Bytes of each tensor that go into its hash.
const HASHED_BYTES: usize = 4096;

/// Tells checkpoints apart: names, dtypes, shapes and the first bytes of all tensors.
pub(super) fn hash_checkpoint(checkpoint: &Checkpoint) -> u64 {
    let mut hash = Fnv::default();
    for name in checkpoint.names() {
        hash.add(name.as_bytes());
        if let (Ok(info), Ok(bytes)) = (checkpoint.info(name), checkpoint.bytes(name)) {
            hash.add(format!("{} {:?}", info.dtype, info.shape).as_bytes());
            hash.add(&bytes[..bytes.len().min(HASHED_BYTES)]);
        }
    }
    hash.0
}

fn hash_windows(windows: &Windows) -> u64 {
    let mut hash = Fnv::default();
    for window in windows.iter() {
        for token in window {
            hash.add(&token.to_le_bytes());
        }
        hash.add(b"|");
    }
    hash.0
}

/// FNV-1a, 64 bits.
struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    fn add(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

/// The weights of an earlier repair, for another one that starts from the same W_c.
impl super::Source for Repaired {
    fn describe(&self) -> String {
        let mut hash = Fnv::default();
        for (key, value) in &self.facts {
            hash.add(format!("{key} {value}").as_bytes());
        }
        let source = self.facts.get("source").and_then(Value::as_str);
        format!(
            "{}, as compressed by run {:016x}",
            source.unwrap_or_default(),
            hash.0
        )
    }

    fn compressor(&self) -> Option<Compressor> {
        self.compressor()
    }

    fn needs(&self) -> Needs {
        Needs::Nothing
    }

    fn check(&self, dense: &Decoder<'_>) -> Result<()> {
        let found = Value::from(format!("{:016x}", hash_checkpoint(dense.checkpoint())));
        match self.facts.get("model") {
            Some(model) if *model == found => Ok(()),
            model => {
                let model = model.unwrap_or(&Value::Null);
                Err(other_run(&self.folder, "model", model, &found))
            }
        }
    }

    fn compressed(&self, linear: &super::Linear<'_>) -> Result<StoredWeight> {
        let LayerId { block, .. } = linear.layer;
        let (file, _) = open_block(&self.folder, block)?.ok_or_else(|| Error::Malformed {
            path: block_file(&self.folder, block),
            reason: "there is no such block".into(),
        })?;
        StoredWeight::read(&file, &linear.layer.to_string())
    }
}
