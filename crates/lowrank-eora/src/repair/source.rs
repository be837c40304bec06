//! Where compressed weights come from.

use super::sites::linears;
use super::{LayerId, StoredWeight};
use crate::compress::{
    Bits, BlockQuantise, BlockRounding, BlockTypes, Compressor, Grid, Group, Inputs, Needs, Place,
    Quantise, Rounding, SweepReport, Symmetry,
};
use crate::format::{Format, QuantisedCheckpoint, gguf_tensors};
use crate::matrix::to_tensor;
use crate::stats::InputStats;
use crate::{Error, Result};
use candle_core::{DType, Device};
use causal_lm::Decoder;
use causal_lm::gguf::Architecture;
use faer::MatRef;
use packed::BlockType;
use std::collections::BTreeMap;
use tensor_io::Checkpoint;

/// A linear that is to be compressed.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Linear<'a> {
    /// Which.
    pub layer: LayerId,
    /// W, `m × n`.
    pub weight: MatRef<'a, f64>,
    /// Dtype in which the dense checkpoint stores it.
    pub dtype: DType,
    /// Where it is in the model.
    pub place: Place,
    /// Its inputs on the calibration windows: what [`Source::needs`] asked for, and perhaps more.
    pub inputs: &'a InputStats,
}

/// W_c of a linear, and what compressing it met.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CompressedLinear {
    /// W_c.
    pub weight: StoredWeight,
    /// What the last sweep of SparseGPT or GPTQ met, where there was one.
    pub sweep: Option<SweepReport>,
}

impl From<StoredWeight> for CompressedLinear {
    fn from(weight: StoredWeight) -> Self {
        Self {
            weight,
            sweep: None,
        }
    }
}

/// Gives W_c for each linear of a decoder.
pub trait Source {
    /// What it is, for reports; a run is only resumed with a source of the same description, so that it must tell
    /// apart sources that give different weights.
    ///
    /// # Errors
    /// When the weights that it stands for cannot be read.
    fn describe(&self) -> Result<String>;

    /// The compressor that makes or made the weights, where it is known.
    fn compressor(&self) -> Option<Compressor> {
        None
    }

    /// What it must be told of the inputs of a linear to give W_c.
    ///
    /// Where that is not H, wide inputs do without it, which takes less memory.
    fn needs(&self) -> Needs {
        Needs::Gram
    }

    /// Checks that it fits a model, before anything is computed.
    ///
    /// # Errors
    /// What does not fit.
    fn check(&self, dense: &Decoder<'_>) -> Result<()>;

    /// W_c of a linear. An error need not name the linear.
    ///
    /// # Errors
    /// When there is none.
    fn compressed(&self, linear: &Linear<'_>) -> Result<CompressedLinear>;
}

/// Compresses the very weights that are repaired, on the inputs that the repair sees.
impl Source for Compressor {
    fn describe(&self) -> Result<String> {
        Ok(self.to_string())
    }

    fn compressor(&self) -> Option<Compressor> {
        Some(*self)
    }

    fn needs(&self) -> Needs {
        self.needs()
    }

    /// Every linear must fit the pattern and the groups.
    fn check(&self, dense: &Decoder<'_>) -> Result<()> {
        for (id, [_, inputs]) in linears(dense) {
            let fits = self.at(super::place(dense, id)).check_columns(inputs);
            fits.map_err(|source| Error::Layer {
                layer: id.to_string(),
                source: Box::new(source),
            })?;
        }
        Ok(())
    }

    fn compressed(&self, linear: &Linear<'_>) -> Result<CompressedLinear> {
        let compressor = self.at(linear.place);
        let compressed = compressor.compress(linear.weight, Some(linear.inputs.into()))?;
        Ok(CompressedLinear {
            sweep: compressed.sweep,
            weight: StoredWeight::of(compressed, linear.dtype)?,
        })
    }
}

impl<'a> From<&'a InputStats> for Inputs<'a> {
    /// The most that is known.
    fn from(stats: &'a InputStats) -> Self {
        match &stats.gram {
            Some(gram) => Self::Gram(gram.matrix()),
            None => Self::Diagonal(&stats.diagonal.square),
        }
    }
}

/// A checkpoint of the same model that another tool compressed: dense with zeros or rounded values, GPTQ,
/// compressed-tensors, or a GGUF file opened by [`causal_lm::gguf::open`].
///
/// Embeddings and head of a GGUF file are quantised as well; a repair of linears does not touch what that loses.
#[derive(Debug)]
pub struct CompressedModel<'a> {
    checkpoint: &'a Checkpoint,
    reader: QuantisedCheckpoint<'a>,
}

/// Largest difference of the other tensors, relative to their largest entry: one rounding to bf16.
const ROUNDING: f64 = 1.0 / 128.0;

impl<'a> CompressedModel<'a> {
    /// Finds out how the checkpoint stores its linears.
    ///
    /// # Errors
    /// A form that cannot be read ([`causal_lm::Error::UnsupportedFormat`]) and what reading the configuration reports.
    pub fn open(checkpoint: &'a Checkpoint) -> Result<Self> {
        let reader = QuantisedCheckpoint::open(checkpoint)?;
        let checkpoint = reader.checkpoint();
        Ok(Self { checkpoint, reader })
    }

    /// How it stores its linears.
    pub fn format(&self) -> &Format {
        self.reader.format()
    }

    /// What a GGUF file says it is: the architecture that an adapter for it has to name.
    pub fn architecture(&self) -> Option<Architecture> {
        Some(gguf_tensors(self.checkpoint)?.architecture())
    }

    /// A compressor that spends bytes in the same way, to compare with at other sizes: rounding to the block type of most
    /// weights, or in groups of as many bits and inputs. `None` where weights are floats.
    pub fn alike(&self) -> Option<Compressor> {
        let in_groups = |bits, group_size: Option<usize>, symmetric| {
            let mut grid = Grid::new(Bits::new(u8::try_from(bits).ok()?)?);
            grid.group = group_size.map_or(Group::Channel, Group::Columns);
            grid.symmetry = match symmetric {
                true => Symmetry::Symmetric,
                false => Symmetry::Asymmetric,
            };
            Some(Compressor {
                quantise: Some(Quantise {
                    grid,
                    rounding: Rounding::Nearest,
                }),
                ..Compressor::NONE
            })
        };
        match *self.reader.format() {
            // Symmetric or not takes the same bytes there.
            Format::Gptq {
                bits, group_size, ..
            } => in_groups(bits, group_size, false),
            Format::PackQuantized {
                bits,
                group_size,
                symmetric,
            } => in_groups(bits, group_size, symmetric),
            Format::Gguf => {
                let mut weights: Vec<(BlockType, usize)> = Vec::new();
                for name in self.checkpoint.names() {
                    let linear = name.strip_suffix(".weight").and_then(LayerId::parse);
                    let (Some(_), Some(ty)) = (linear, self.reader.blocks_of(name)) else {
                        continue;
                    };
                    let count = self.checkpoint.info(name).ok()?.shape.iter().product();
                    match weights.iter_mut().find(|(other, _)| *other == ty) {
                        Some((_, sum)) => *sum += count,
                        None => weights.push((ty, count)),
                    }
                }
                let (ty, _) = weights.into_iter().max_by_key(|(_, count)| *count)?;
                Some(Compressor {
                    blocks: Some(BlockQuantise {
                        types: BlockTypes::One(ty),
                        rounding: BlockRounding::Nearest { importance: false },
                    }),
                    ..Compressor::NONE
                })
            }
            _ => None,
        }
    }
}

impl Source for CompressedModel<'_> {
    fn describe(&self) -> Result<String> {
        let hash = self.checkpoint.content_hash()?;
        Ok(format!("{} checkpoint {hash}", self.reader.format()))
    }

    fn needs(&self) -> Needs {
        Needs::Nothing
    }

    /// Everything but the linears must be that of the dense model, up to a rounding: a model whose
    /// norms were scaled or trained cannot be repaired against another one's activations.
    fn check(&self, dense: &Decoder<'_>) -> Result<()> {
        let original = dense.checkpoint();
        for name in original.names() {
            let is_linear = name
                .strip_suffix(".weight")
                .and_then(LayerId::parse)
                .is_some();
            if is_linear || !self.checkpoint.contains(name) {
                continue;
            }
            let (expected, found) = (original.info(name)?, self.checkpoint.info(name)?);
            if expected.shape != found.shape {
                return Err(Error::OtherTensor {
                    tensor: name.into(),
                    reason: format!("its shape is {:?}, not {:?}", found.shape, expected.shape),
                });
            }
            // What was quantised beside the linears differs, and is not repaired.
            if self.reader.blocks_of(name).is_some() {
                continue;
            }
            let values = |checkpoint: &Checkpoint| -> Result<Vec<f32>> {
                let tensor = checkpoint.tensor_as(name, DType::F32, &Device::Cpu)?;
                checkpoint.release([name]);
                Ok(tensor.flatten_all()?.to_vec1()?)
            };
            let (expected, found) = (values(original)?, values(self.checkpoint)?);
            let largest = expected.iter().fold(0f32, |max, v| max.max(v.abs()));
            let pairs = expected.iter().zip(&found);
            let difference = pairs.fold(0f32, |max, (a, b)| max.max((a - b).abs()));
            if f64::from(difference) > ROUNDING * f64::from(largest) {
                return Err(Error::OtherTensor {
                    tensor: name.into(),
                    reason: format!("values differ by up to {difference}"),
                });
            }
        }
        Ok(())
    }

    fn compressed(&self, linear: &Linear<'_>) -> Result<CompressedLinear> {
        Ok(self.stored(linear.layer, linear.dtype)?.into())
    }
}

impl CompressedModel<'_> {
    /// The block type that each linear has in a GGUF file: codes are placed as they are. Reads all of them.
    ///
    /// # Errors
    /// [`Error::NotStorable`] with the linear whose codes no block type holds, and what reading reports.
    pub fn gguf_types(&self, dense: &Decoder<'_>) -> Result<BTreeMap<LayerId, BlockType>> {
        let of = |(id, _): (LayerId, _)| {
            let dtype = dense.checkpoint().info(&id.weight())?.candle_dtype();
            let stored = self.stored(id, dtype.unwrap_or(DType::F32))?;
            Ok((id, stored.block_type(&id.to_string())?))
        };
        linears(dense).into_iter().map(of).collect()
    }

    /// W_c of a linear in the form in which the checkpoint holds it; floats in `dtype` where they come from another form.
    fn stored(&self, layer: LayerId, dtype: DType) -> Result<StoredWeight> {
        let module = layer.to_string();
        if let Some(weight) = self.reader.quantised(&module)? {
            return Ok(StoredWeight::Quantised { weight, pruned: 0 });
        }
        if let Some(blocks) = self.reader.blocks(&module)? {
            return Ok(StoredWeight::Blocks(blocks));
        }
        let name = layer.weight();
        if self.checkpoint.contains(&name) {
            let tensor = self.checkpoint.tensor(&name, &Device::Cpu)?;
            self.checkpoint.release([name.as_str()]);
            return Ok(StoredWeight::Dense(tensor));
        }
        // Unpacked sparse weights: the dense model's dtype where it holds them exactly.
        let weight = self.reader.weight(&module)?;
        let narrow = to_tensor(weight.as_ref(), dtype, &Device::Cpu)?;
        let exact = crate::matrix::from_tensor(&narrow, "compressed weight")? == weight;
        Ok(StoredWeight::Dense(match exact {
            true => narrow,
            false => to_tensor(weight.as_ref(), DType::F32, &Device::Cpu)?,
        }))
    }
}
