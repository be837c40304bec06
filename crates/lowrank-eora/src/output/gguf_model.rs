//! GGUF files of the compressed model.
//!
//! A GGUF file of the uncompressed model is the template, as for llama.cpp's own quantiser: metadata, tokenizer and all
//! tensors but the repaired linears are copied from it. Linears that were quantised in blocks are stored as those blocks,
//! codes in groups in the blocks that hold them exactly ([`gguf::place`](crate::output::gguf::place)), floats as floats.

use super::Weights;
use super::checkpoint::requantised;
use super::gguf_others::Others;
use crate::compress::{BlockTypes, Compressor, Quantise, Rounding};
use crate::format::gguf::place;
use crate::repair::{LayerId, Repaired, RepairedLayer, StoredWeight, linears};
use crate::{Error, Result};
use candle_core::DType;
use causal_lm::Decoder;
use causal_lm::gguf::Architecture;
use causal_lm::gguf::layout::{self, Experts, FileTensor, Rows, holders};
use causal_lm::gguf::names::HEAD;
use faer::Mat;
use packed::{BlockType, QuantRows, quantise};
use std::collections::BTreeMap;
use std::path::Path;
use tensor_io::Progress;
use tensor_io::gguf::{BlockLayout, Gguf, GgufError, Metadata, TensorSpec, Value, Writer};

/// What errors call the format.
pub(super) const NAME: &str = "gguf";
const FILE_TYPE: &str = "general.file_type";
const QUANTISATION_VERSION: &str = "general.quantization_version";
/// Keys that only a part of a split model has.
const SPLIT: &str = "split.";

/// How the compressed model is written as GGUF.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct GgufModelOptions<'a> {
    /// Which weights.
    pub weights: Weights,
    /// A GGUF file of the uncompressed model.
    pub template: &'a Gguf,
}

impl<'a> GgufModelOptions<'a> {
    /// These weights in the place of those of `template`.
    pub fn new(weights: Weights, template: &'a Gguf) -> Self {
        Self { weights, template }
    }
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

/// What files of this decoder hold.
pub(super) fn tensors_of(decoder: &Decoder<'_>, architecture: Architecture) -> Vec<FileTensor> {
    layout::tensors(decoder.config(), architecture, Experts::Stacked)
}

/// Rows of a linear that a tensor of a file is made of.
struct Placed {
    layer: LayerId,
    rows: Rows,
}

/// The tensors of a file that a linear is stored in.
///
/// # Errors
/// [`Error::NotStorable`] for a linear that the file has with other values.
fn placed(tensors: &[FileTensor], layer: LayerId) -> Result<Vec<(String, Vec<usize>, Placed)>> {
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
/// blocks.
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
    let GgufModelOptions { weights, template } = *options;
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
    let metadata = metadata(template, file_type(repaired, weights, &types))?;

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

/// Whether block types hold exactly what this compressor makes of the linears of a model, as far as grid and shapes
/// tell: one row of made-up weights of each width is compressed and placed.
///
/// # Errors
/// [`Error::NotStorable`] with the reason.
pub fn check_gguf(decoder: &Decoder<'_>, compressor: &Compressor) -> Result<()> {
    let Some(quantise) = compressor.quantise else {
        return Ok(());
    };
    let mut widths = Vec::new();
    for (id, [_, cols]) in linears(decoder) {
        if widths.contains(&cols) {
            continue;
        }
        widths.push(cols);
        if quantise.takes_groups_apart() {
            return Err(Error::NotStorable {
                module: id.to_string(),
                format: "gguf",
                reason: "its groups are not runs of neighbouring inputs; quantise without `-act`, or with `-static`"
                    .into(),
            });
        }
        let nearest = Compressor {
            quantise: Some(Quantise {
                rounding: Rounding::Nearest,
                ..quantise
            }),
            ..Compressor::NONE
        };
        let row = Mat::from_fn(1, cols, |_, j| {
            ((j * 7919 + 13) % 1009) as f64 / 504.5 - 1.0
        });
        if let Some(codes) = nearest.compress(row.as_ref(), None)?.quantised {
            place(&id.to_string(), &codes)?;
        }
    }
    Ok(())
}

fn block_layout(ty: BlockType) -> Result<BlockLayout> {
    BlockLayout::named(ty.name()).ok_or_else(|| Error::Setting {
        name: "block type",
        value: ty.name().into(),
        expected: "a type of GGUF files",
    })
}

/// A linear as blocks, rows in the order of Hugging Face.
fn rows(
    decoder: &Decoder<'_>,
    layer: &RepairedLayer,
    weights: Weights,
) -> Result<QuantRows<'static>> {
    let id = layer.report.layer;
    let float = |dtype: DType, matrix: &Mat<f64>| {
        let ty = match dtype {
            DType::F16 => BlockType::F16,
            DType::BF16 => BlockType::BF16,
            _ => BlockType::F32,
        };
        let cols = matrix.ncols();
        let values: Vec<f32> = (0..matrix.nrows())
            .flat_map(|i| (0..cols).map(move |j| matrix[(i, j)] as f32))
            .collect();
        quantise(ty, &values, cols, None)
    };
    let weight = match weights {
        Weights::Compressed => &layer.weight,
        Weights::Requantised => requantised(layer, "gguf")?,
        Weights::Merged => {
            let dtype = decoder.checkpoint().info(&id.weight())?.candle_dtype();
            return Ok(float(dtype.unwrap_or(DType::F32), &layer.merged()?)?);
        }
    };
    match weight {
        StoredWeight::Blocks(rows) => Ok(rows.clone()),
        StoredWeight::Quantised { weight, .. } => place(&id.to_string(), weight),
        StoredWeight::Dense(tensor) => Ok(float(tensor.dtype(), &weight.matrix()?)?),
    }
}

/// `general.file_type`: of the mix that was asked for, else of the type of most linears.
fn file_type(
    repaired: &Repaired,
    weights: Weights,
    types: &BTreeMap<LayerId, BlockType>,
) -> Option<u32> {
    let compressor = match weights {
        Weights::Compressed => repaired.compressor(),
        Weights::Requantised => repaired.requantiser(),
        Weights::Merged => None,
    };
    if let Some(Compressor {
        blocks: Some(blocks),
        ..
    }) = compressor
    {
        return Some(blocks.types.file_type());
    }
    let count = |ty: BlockType| types.values().filter(|other| **other == ty).count();
    let most = types.values().copied().max_by_key(|&ty| count(ty))?;
    Some(BlockTypes::One(most).file_type())
}

/// The template's metadata with the type of the file.
fn metadata(template: &Gguf, file_type: Option<u32>) -> Result<Vec<(String, Value)>> {
    let metadata = template.metadata();
    let own = |key: &str| key == FILE_TYPE || key == QUANTISATION_VERSION || key.starts_with(SPLIT);
    let mut entries = Vec::new();
    for key in metadata.keys().filter(|key| !own(key)) {
        if let Some(value) = metadata.get(key)? {
            entries.push((key.to_string(), value));
        }
    }
    if let Some(file_type) = file_type {
        entries.push((FILE_TYPE.into(), Value::U32(file_type)));
    }
    entries.push((QUANTISATION_VERSION.into(), Value::U32(2)));
    Ok(entries)
}
