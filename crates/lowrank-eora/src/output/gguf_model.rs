//! GGUF files of the compressed model.
//!
//! A GGUF file of the uncompressed model is the template, as for llama.cpp's own quantiser: metadata, tokenizer and all
//! tensors but the repaired linears are copied from it. Linears that were quantised in blocks are stored as those blocks,
//! codes in groups in the blocks that hold them exactly ([`gguf::place`](crate::output::gguf::place)), floats as floats.

use super::Weights;
use super::checkpoint::requantised;
use super::gguf_others::Others;
use super::types::{TypeTable, block_layout};
use crate::compress::Compressor;
use crate::format::gguf_tensors;
use crate::repair::{LayerId, Repaired, RepairedLayer, float_type};
use crate::{Error, Result};
use candle_core::DType;
use causal_lm::Decoder;
use causal_lm::gguf::Architecture;
use causal_lm::gguf::layout::{self, Experts, FileTensor, Rows, holders};
use causal_lm::gguf::names::{EMBEDDING, HEAD};
use packed::{BlockType, QuantRows, quantise};
use serde_json::Value as Json;
use std::collections::BTreeMap;
use std::path::Path;
use tensor_io::Progress;
use tensor_io::gguf::{Gguf, GgufError, Metadata, TensorSpec, Value, Writer};

/// What errors call the format.
pub(super) const NAME: &str = "gguf";
const FILE_TYPE: &str = "general.file_type";
const QUANTISATION_VERSION: &str = "general.quantization_version";
/// Keys that only a part of a split model has.
const SPLIT: &str = "split.";
/// What weighted the rounding.
const IMATRIX: &str = "quantize.imatrix.";
/// What was done here.
pub(super) const OWN: &str = "eora.";

/// How the compressed model is written as GGUF.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct GgufModelOptions<'a> {
    /// Which weights.
    pub weights: Weights,
    /// A GGUF file of the uncompressed model.
    pub template: &'a Gguf,
    /// Where the importance comes from that weighted the rounding.
    pub imatrix: ImatrixOrigin,
}

impl<'a> GgufModelOptions<'a> {
    /// These weights in the place of those of `template`.
    pub fn new(weights: Weights, template: &'a Gguf) -> Self {
        Self {
            weights,
            template,
            imatrix: ImatrixOrigin::default(),
        }
    }

    /// Where the importance comes from, for compressors that weight by it.
    pub fn with_imatrix(self, imatrix: ImatrixOrigin) -> Self {
        Self { imatrix, ..self }
    }
}

/// The importance matrix that weighted the rounding, as GGUF files state it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImatrixOrigin {
    /// The file, where there is one.
    pub file: Option<String>,
    /// The text that it was measured on.
    pub dataset: Option<String>,
    /// Its entries; without it, the tensors that were weighted.
    pub entries: Option<u32>,
    /// Chunks of the text.
    pub chunks: Option<u32>,
}

/// What a GGUF file declares itself to be.
///
/// # Errors
/// A file without an architecture, or with one that is not supported.
pub(super) fn architecture_of(file: &Gguf) -> Result<Architecture> {
    let metadata = file.metadata();
    let name = metadata.required("general.architecture", Metadata::get_str)?;
    Architecture::named(name).ok_or_else(|| {
        let what = format!("architecture {name} is not supported");
        metadata.error(GgufError::Content(what)).into()
    })
}

/// What a GGUF file of a decoder declares itself to be; `None` for a type of model that is not mapped.
pub(super) fn architecture_for(decoder: &Decoder<'_>) -> Option<Architecture> {
    match gguf_tensors(decoder.checkpoint()) {
        Some(file) => Some(file.architecture()),
        None => Architecture::of(decoder.config()),
    }
}

/// What files of this decoder hold.
pub(super) fn tensors_of(decoder: &Decoder<'_>, architecture: Architecture) -> Vec<FileTensor> {
    layout::tensors(decoder.config(), architecture, Experts::Stacked)
}

/// Rows of a linear that a tensor of a file is made of.
pub(super) struct Placed {
    layer: LayerId,
    rows: Rows,
}

/// The tensors of a file that a linear is stored in.
///
/// # Errors
/// [`Error::NotStorable`] for a linear that the file has with other values.
pub(super) fn placed(
    tensors: &[FileTensor],
    layer: LayerId,
) -> Result<Vec<(String, Vec<usize>, Placed)>> {
    let weight = layer.weight();
    holders(tensors, &weight)
        .map(|tensor| match &tensor.parts[..] {
            [part] if (tensor.offset, tensor.factor) == (0.0, 1.0) => {
                let rows = part.rows.clone();
                let placed = Placed { layer, rows };
                Ok((tensor.name.clone(), tensor.shape.clone(), placed))
            }
            _ => Err(Error::NotStorable {
                module: layer.to_string(),
                format: "gguf",
                reason: "the file has it multiplied by the factor of attention logits".into(),
            }),
        })
        .collect()
}

/// Writes the compressed model as the GGUF file `dst` and returns its size; an older file is replaced. `progress` counts
/// blocks. [`Repaired::others`] stand in the place of the template's embedding and head.
///
/// # Errors
/// [`Error::NotStorable`] where no block type holds the codes of a linear exactly, [`Error::Malformed`] for a template of
/// another model, and what reading and writing report. A failed run leaves `dst` as it was.
pub fn write_gguf(
    decoder: &Decoder<'_>,
    repaired: &Repaired,
    options: &GgufModelOptions<'_>,
    dst: impl AsRef<Path>,
    progress: &dyn Progress,
) -> Result<u64> {
    let GgufModelOptions {
        weights, template, ..
    } = *options;
    let architecture = architecture_of(template)?;
    let tensors = tensors_of(decoder, architecture);
    let mut layers: BTreeMap<String, Placed> = BTreeMap::new();
    for report in repaired.reports() {
        for (name, shape, placed) in placed(&tensors, report.layer)? {
            let found = template.info(&name).ok().map(|info| info.shape.clone());
            if found.as_ref() != Some(&shape) {
                return Err(Error::Malformed {
                    path: template.path().to_owned(),
                    reason: format!("{name} has shape {found:?}, the model's {:?}", Some(&shape)),
                });
            }
            layers.insert(name, placed);
        }
    }
    let stored = |layer: &RepairedLayer, placed: &Placed| -> Result<QuantRows<'static>> {
        let rows = rows(decoder, layer, weights)?;
        Ok(match &placed.rows {
            Rows::All => rows,
            Rows::Range(range) => rows.slice(range.clone())?.into_owned(),
            Rows::Order(order) => rows.select(&order.all_in_checkpoint())?,
        })
    };
    // Files of some architectures have a head in any case.
    let head_is_copy = decoder.config().tied && template.info(HEAD).is_ok();
    let others = Others::find(repaired, &tensors, head_is_copy)?;
    // Types are declared before the data, and some show only when the codes are placed.
    let mut types = BTreeMap::new();
    for block in 0..repaired.blocks() {
        for layer in repaired.block(block)? {
            let ty = rows(decoder, &layer, weights)?.block_type();
            types.insert(layer.report.layer, ty);
        }
    }
    let specs = template.tensors().iter().map(|info| {
        let layout = match layers.get(&info.name) {
            Some(placed) => block_layout(types[&placed.layer])?,
            None => match others.block_type(&info.name) {
                Some(ty) => block_layout(ty)?,
                None => info.layout,
            },
        };
        Ok(TensorSpec::new(&info.name, layout, info.shape.clone()))
    });
    let specs = specs.collect::<Result<Vec<_>>>()?;
    let metadata = metadata(repaired, options, &specs)?;

    let mut writer = Writer::create(dst.as_ref(), &metadata, &specs)?;
    progress.begin("write GGUF", repaired.blocks() as u64);
    let mut block: Option<(usize, Vec<RepairedLayer>)> = None;
    for info in template.tensors() {
        if let Some(bytes) = others.bytes(&info.name)? {
            writer.write(&info.name, &bytes)?;
            continue;
        }
        let Some(placed) = layers.get(&info.name) else {
            writer.write(&info.name, template.bytes(&info.name)?)?;
            template.release([info.name.as_str()]);
            continue;
        };
        let id = placed.layer;
        // Files list a block's tensors together, so that each block is read once.
        let loaded = match block.take() {
            Some((number, loaded)) if number == id.block() => loaded,
            _ => {
                progress.advance(1)?;
                repaired.block(id.block())?
            }
        };
        if let Some(layer) = loaded.iter().find(|layer| layer.report.layer == id) {
            writer.write(&info.name, stored(layer, placed)?.bytes())?;
        }
        block = Some((id.block(), loaded));
    }
    Ok(writer.finish()?)
}

/// A linear as blocks, rows in the order of Hugging Face.
fn rows(
    decoder: &Decoder<'_>,
    layer: &RepairedLayer,
    weights: Weights,
) -> Result<QuantRows<'static>> {
    let id = layer.report.layer;
    let weight = match weights {
        Weights::Compressed => &layer.weight,
        Weights::Requantised => requantised(layer, "gguf")?,
        Weights::Merged => {
            let dtype = decoder.checkpoint().info(&id.weight())?.candle_dtype();
            let (matrix, ty) = (layer.merged()?, float_type(dtype.unwrap_or(DType::F32)));
            let cols = matrix.ncols();
            let values: Vec<f32> = (0..matrix.nrows())
                .flat_map(|i| (0..cols).map(move |j| (i, j)))
                .map(|at| matrix[at] as f32)
                .collect();
            return Ok(quantise(ty, &values, cols, None)?);
        }
    };
    weight.blocks(&id.to_string())
}

/// The compressor that made the weights, where it is known.
fn compressor(repaired: &Repaired, weights: Weights) -> Option<Compressor> {
    match weights {
        Weights::Compressed => repaired.compressor(),
        Weights::Requantised => repaired.requantiser(),
        Weights::Merged => None,
    }
}

/// `general.file_type`: of the mix that was asked for where most weights of the blocks have its type, else of that type.
fn file_type(compressor: Option<&Compressor>, specs: &[TensorSpec]) -> Option<u32> {
    let mut values: BTreeMap<BlockType, usize> = BTreeMap::new();
    let beside = |spec: &&TensorSpec| [EMBEDDING, HEAD].contains(&spec.name.as_str());
    for spec in specs
        .iter()
        .filter(|spec| !beside(spec) && spec.shape.len() > 1)
    {
        let ty = BlockType::from_id(spec.layout.id)?;
        *values.entry(ty).or_default() += spec.shape.iter().product::<usize>();
    }
    let (most, _) = values.into_iter().max_by_key(|(_, count)| *count)?;
    Some(match compressor.and_then(|compressor| compressor.blocks) {
        Some(blocks) => blocks.types.file_type(most),
        None => most.file_type(),
    })
}

/// The template's metadata with what the file is, and what was done.
fn metadata(
    repaired: &Repaired,
    options: &GgufModelOptions<'_>,
    specs: &[TensorSpec],
) -> Result<Vec<(String, Value)>> {
    let metadata = options.template.metadata();
    let replaced = |key: &str| {
        [FILE_TYPE, QUANTISATION_VERSION].contains(&key)
            || [SPLIT, IMATRIX, OWN]
                .iter()
                .any(|prefix| key.starts_with(prefix))
    };
    let mut entries = Vec::new();
    for key in metadata.keys().filter(|key| !replaced(key)) {
        if let Some(value) = metadata.get(key)? {
            entries.push((key.to_string(), value));
        }
    }
    let compressor = compressor(repaired, options.weights);
    if let Some(file_type) = file_type(compressor.as_ref(), specs) {
        entries.push((FILE_TYPE.into(), Value::U32(file_type)));
    }
    entries.push((QUANTISATION_VERSION.into(), Value::U32(2)));
    if compressor.is_some_and(|compressor| compressor.weights_by_importance()) {
        let origin = &options.imatrix;
        let mut put = |key: &str, value: Option<Value>| {
            entries.extend(value.map(|value| (format!("{IMATRIX}{key}"), value)));
        };
        let weighted = repaired.reports().count() as u32;
        put("file", origin.file.as_deref().map(Value::from));
        put("dataset", origin.dataset.as_deref().map(Value::from));
        put(
            "entries_count",
            Some(origin.entries.unwrap_or(weighted).into()),
        );
        put("chunks_count", origin.chunks.map(Value::from));
    }
    let table = TypeTable::of(specs);
    let weights = match options.weights {
        Weights::Compressed => "compressed",
        Weights::Merged => "merged",
        Weights::Requantised => "requantised",
    };
    entries.extend(provenance(
        repaired,
        compressor,
        &[
            ("weights", weights.to_string()),
            ("types", table.to_string()),
        ],
    ));
    Ok(entries)
}

/// What was done, for whoever finds the file: strings under keys of our own.
pub(super) fn provenance(
    repaired: &Repaired,
    compressor: Option<Compressor>,
    more: &[(&str, String)],
) -> Vec<(String, Value)> {
    let fact = |key: &str| repaired.facts().get(key).and_then(Json::as_str);
    let known = [
        ("version", Some(env!("CARGO_PKG_VERSION").to_string())),
        ("model", fact("model").map(String::from)),
        ("source", fact("source").map(String::from)),
        ("compressor", compressor.map(|c| c.to_string())),
    ];
    let known = known
        .into_iter()
        .filter_map(|(key, value)| Some((key, value?)));
    known
        .chain(more.iter().cloned())
        .map(|(key, value)| (format!("{OWN}{key}"), Value::from(value)))
        .collect()
}
