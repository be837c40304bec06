//! Which types the tensors of a GGUF file have, said before it is written.

use super::gguf_model::{architecture_for, placed, tensors_of};
use crate::compress::{BlockQuantise, BlockTypes, Compressor, Quantise, Rounding};
use crate::format::gguf::place as place_codes;
use crate::format::gguf_tensors;
use crate::repair::{LayerId, StoredWeight, float_type, linears, place};
use crate::{Error, Result};
use candle_core::DType;
use causal_lm::Decoder;
use causal_lm::gguf::names::{EMBEDDING, HEAD};
use faer::Mat;
use packed::BlockType;
use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};
use tensor_io::gguf::{BlockLayout, Gguf, TensorSpec};

/// Tensors, values and bytes of one type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TypeCount {
    /// Tensors.
    pub tensors: usize,
    /// Their values.
    pub values: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// The tensors of a GGUF file by type; shown as `30 Q4_K, 180 Q5_0, 1 Q8_0, 61 F32; 5.83 bits per weight`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TypeTable {
    /// By the names of the types.
    pub types: BTreeMap<&'static str, TypeCount>,
    /// Bytes of what is stored in the place of linears.
    pub linear_bytes: u64,
}

/// Linears whose rows are no whole blocks of the type that was asked for; shown as a sentence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fallback {
    /// What was asked for.
    pub wanted: BlockType,
    /// What they are stored in.
    pub instead: BlockType,
    /// Values in their rows.
    pub columns: usize,
    /// How many there are.
    pub linears: usize,
}

impl TypeTable {
    /// That of a file with these tensors.
    pub fn of<'a>(tensors: impl IntoIterator<Item = &'a TensorSpec>) -> Self {
        let mut table = Self::default();
        for tensor in tensors {
            table.add(tensor.layout, &tensor.shape);
        }
        table
    }

    /// That of a file of `decoder` in which linears have these types and `others` stand in the place of matrices beside
    /// them: made from `template`, or as an export of the decoder would be. `None` for a type of model that GGUF files do
    /// not have.
    ///
    /// # Errors
    /// What reading the sizes of tensors reports.
    pub fn predicted(
        decoder: &Decoder<'_>,
        template: Option<&Gguf>,
        linears: &BTreeMap<LayerId, BlockType>,
        others: &[(String, StoredWeight)],
    ) -> Result<Option<Self>> {
        let Some(architecture) = architecture_for(decoder) else {
            return Ok(None);
        };
        let checkpoint = decoder.checkpoint();
        let files = tensors_of(decoder, architecture);
        let own = gguf_tensors(checkpoint).map(|tensors| tensors.file());
        let mut specs = match template.or(own) {
            Some(file) => {
                let tensors = file.tensors().iter();
                let spec = |info: &tensor_io::gguf::TensorInfo| {
                    TensorSpec::new(&info.name, info.layout, info.shape.clone())
                };
                tensors.map(spec).collect::<Vec<_>>()
            }
            None => {
                let embedding = checkpoint.info(&decoder.config().names.embedding())?;
                let dtype = embedding.candle_dtype().unwrap_or(DType::F32);
                let exists = |name: &String| checkpoint.contains(name);
                let kept = files.iter().filter(|file| {
                    !file.optional || file.parts.iter().all(|part| exists(&part.tensor))
                });
                kept.map(|file| {
                    let ty = match file.float {
                        true => BlockType::F32,
                        false => float_type(dtype),
                    };
                    let layout = block_layout(ty)?;
                    Ok(TensorSpec::new(&file.name, layout, file.shape.clone()))
                })
                .collect::<Result<_>>()?
            }
        };
        let mut types = types_beside(decoder, others)?;
        let mut of_linears = Vec::new();
        for (&id, &ty) in linears {
            for (name, ..) in placed(&files, id)? {
                of_linears.push(name.clone());
                types.insert(name, ty);
            }
        }
        for spec in &mut specs {
            if let Some(&ty) = types.get(&spec.name) {
                spec.layout = block_layout(ty)?;
            }
        }
        let linears = specs.iter().filter(|spec| of_linears.contains(&spec.name));
        Ok(Some(Self {
            linear_bytes: Self::of(linears).bytes(),
            ..Self::of(&specs)
        }))
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        self.types.values().map(|count| count.bytes).sum()
    }

    /// Bits of a value, on average.
    pub fn bits_per_weight(&self) -> f64 {
        let values: u64 = self.types.values().map(|count| count.values).sum();
        8.0 * self.bytes() as f64 / values.max(1) as f64
    }

    fn add(&mut self, layout: BlockLayout, shape: &[usize]) {
        let values: usize = shape.iter().product();
        let count = self.types.entry(layout.name).or_default();
        count.tensors += 1;
        count.values += values as u64;
        count.bytes += (values / layout.values * layout.bytes) as u64;
    }
}

impl Display for TypeTable {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut types: Vec<_> = self.types.iter().collect();
        // Most values first.
        types.sort_by_key(|(_, count)| std::cmp::Reverse(count.values));
        for (i, (name, count)) in types.into_iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{} {name}", count.tensors)?;
        }
        write!(f, "; {:.2} bits per weight", self.bits_per_weight())
    }
}

impl Display for Fallback {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self {
            wanted,
            instead,
            columns,
            linears,
        } = self;
        let linears = match linears {
            1 => "1 linear is".to_string(),
            more => format!("{more} linears are"),
        };
        let block = wanted.block_len();
        write!(
            f,
            "{linears} {instead} instead of {wanted}: rows of {columns} values are no whole blocks of {block}"
        )
    }
}

impl Fallback {
    /// The linears of `decoder` that `compressor` cannot store in the types that it names.
    pub fn all(decoder: &Decoder<'_>, compressor: &Compressor) -> Vec<Self> {
        let mut found: Vec<Self> = Vec::new();
        for (id, [_, columns]) in linears(decoder) {
            let Some(BlockTypes::One(wanted)) = blocks_at(decoder, compressor, id) else {
                continue;
            };
            let instead = wanted.for_rows(columns);
            if instead == wanted {
                continue;
            }
            let same =
                |fallback: &&mut Self| (fallback.wanted, fallback.columns) == (wanted, columns);
            match found.iter_mut().find(same) {
                Some(fallback) => fallback.linears += 1,
                None => found.push(Self {
                    wanted,
                    instead,
                    columns,
                    linears: 1,
                }),
            }
        }
        found
    }
}

fn blocks_at(decoder: &Decoder<'_>, compressor: &Compressor, id: LayerId) -> Option<BlockTypes> {
    let blocks: Option<BlockQuantise> = compressor.at(place(decoder, id)).blocks;
    blocks.map(|blocks| blocks.types)
}

/// The type that each linear of a model has in a GGUF file after this compressor: that of its blocks, or the one that holds its
/// codes exactly, as far as grid and shapes tell. One row of made-up weights of each width is compressed and placed.
///
/// # Errors
/// [`Error::NotStorable`] with the linear and the reason where no type holds the codes.
pub fn gguf_types(
    decoder: &Decoder<'_>,
    compressor: &Compressor,
) -> Result<BTreeMap<LayerId, BlockType>> {
    let mut of_widths: BTreeMap<usize, BlockType> = BTreeMap::new();
    let mut types = BTreeMap::new();
    for (id, [_, columns]) in linears(decoder) {
        let ty = match (blocks_at(decoder, compressor, id), compressor.quantise) {
            (Some(blocks), _) => blocks.of(place(decoder, id), columns),
            (None, Some(quantise)) => match of_widths.get(&columns) {
                Some(ty) => *ty,
                None => {
                    let ty = placed_type(&id.to_string(), quantise, columns)?;
                    of_widths.insert(columns, ty);
                    ty
                }
            },
            (None, None) => {
                let dtype = decoder.checkpoint().info(&id.weight())?.candle_dtype();
                float_type(dtype.unwrap_or(DType::F32))
            }
        };
        types.insert(id, ty);
    }
    Ok(types)
}

/// The type that holds the codes of a grid in rows of `columns`.
fn placed_type(module: &str, quantise: Quantise, columns: usize) -> Result<BlockType> {
    if quantise.takes_groups_apart() {
        return Err(Error::NotStorable {
            module: module.to_string(),
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
    let row = Mat::from_fn(1, columns, |_, j| {
        ((j * 7919 + 13) % 1009) as f64 / 504.5 - 1.0
    });
    match nearest.compress(row.as_ref(), None)?.quantised {
        Some(codes) => Ok(place_codes(module, &codes)?.block_type()),
        None => Ok(BlockType::F32),
    }
}

pub(super) fn block_layout(ty: BlockType) -> Result<BlockLayout> {
    BlockLayout::named(ty.name()).ok_or_else(|| Error::Setting {
        name: "block type",
        value: ty.name().into(),
        expected: "a type of GGUF files",
    })
}

/// The types of embedding and head by the names of their tensors. A tied embedding is the head as well, where files have one.
fn types_beside(
    decoder: &Decoder<'_>,
    others: &[(String, StoredWeight)],
) -> Result<BTreeMap<String, BlockType>> {
    let config = decoder.config();
    let head = config.names.head().trim_end_matches(".weight");
    let mut types = BTreeMap::new();
    for (module, weight) in others {
        let ty = weight.block_type(module)?;
        if module == head || config.tied {
            types.insert(HEAD.to_string(), ty);
        }
        if module != head {
            types.insert(EMBEDDING.to_string(), ty);
        }
    }
    Ok(types)
}
