//! A compressed weight in the form in which it is stored.

use crate::compress::{Bits, Compressed, Mask, Quantised, Storage};
use crate::format::gguf::place;
use crate::matrix::{from_tensor, to_tensor};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use faer::{Mat, MatRef};
use packed::{BlockType, QuantRows, quantise};
use tensor_io::Checkpoint;

/// The block type that holds floats of a dtype.
pub(crate) fn float_type(dtype: DType) -> BlockType {
    match dtype {
        DType::F16 => BlockType::F16,
        DType::BF16 => BlockType::BF16,
        _ => BlockType::F32,
    }
}

/// W_c as it is stored: what a reader of the file computes with.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum StoredWeight {
    /// Floats `[m, n]` in their stored dtype, on the CPU; pruned weights are exact zeros.
    Dense(Tensor),
    /// Codes with scales and zero points.
    Quantised {
        /// The weight.
        weight: Quantised,
        /// Weights that were pruned before.
        pruned: usize,
    },
    /// Blocks of a GGUF file.
    Blocks(QuantRows<'static>),
}

impl StoredWeight {
    /// What a compressor made; floats are rounded to `dtype`.
    ///
    /// # Errors
    /// What candle reports.
    pub fn of(compressed: Compressed, dtype: DType) -> Result<Self> {
        let pruned = compressed.mask.as_ref().map_or(0, Mask::count);
        if let Some(weight) = compressed.quantised {
            return Ok(Self::Quantised { weight, pruned });
        }
        if let Some(blocks) = compressed.blocks {
            return Ok(Self::Blocks(blocks));
        }
        Ok(Self::Dense(compressed.to_tensor(dtype, &Device::Cpu)?))
    }

    /// Outputs and inputs.
    pub fn shape(&self) -> (usize, usize) {
        match self {
            Self::Dense(tensor) => (tensor.dims()[0], tensor.dims()[1]),
            Self::Quantised { weight, .. } => (weight.rows, weight.cols),
            Self::Blocks(weight) => (weight.rows(), weight.cols()),
        }
    }

    /// W_c, exactly.
    ///
    /// # Errors
    /// When a value is not finite.
    pub fn matrix(&self) -> Result<Mat<f64>> {
        match self {
            Self::Dense(tensor) => from_tensor(tensor, "compressed weight"),
            Self::Quantised { weight, .. } => Ok(weight.dequantise()),
            Self::Blocks(weight) => {
                weight.check()?;
                let (rows, cols) = (weight.rows(), weight.cols());
                let values = weight.dequantise();
                let values = MatRef::from_row_major_slice(&values, rows, cols);
                Ok(Mat::from_fn(rows, cols, |i, j| f64::from(values[(i, j)])))
            }
        }
    }

    /// Its rows as a GGUF file holds them: codes in the blocks that hold them exactly, floats in their dtype. `module` is for
    /// errors.
    ///
    /// # Errors
    /// [`Error::NotStorable`] where no block type holds the codes, and values beyond the range of the dtype.
    pub fn blocks(&self, module: &str) -> Result<QuantRows<'static>> {
        Ok(match self {
            Self::Blocks(rows) => rows.clone(),
            Self::Quantised { weight, .. } => place(module, weight)?,
            Self::Dense(tensor) => {
                let cols = self.shape().1;
                let values: Vec<f32> = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
                quantise(float_type(tensor.dtype()), &values, cols, None)?
            }
        })
    }

    /// The block type of [`StoredWeight::blocks`].
    ///
    /// # Errors
    /// [`Error::NotStorable`] where no block type holds the codes.
    pub fn block_type(&self, module: &str) -> Result<BlockType> {
        Ok(match self {
            Self::Blocks(rows) => rows.block_type(),
            Self::Quantised { weight, .. } => place(module, weight)?.block_type(),
            Self::Dense(tensor) => float_type(tensor.dtype()),
        })
    }

    /// Its values as floats on the CPU, exactly where 32 bits hold them.
    ///
    /// # Errors
    /// When a scale is not finite.
    pub fn floats(&self) -> Result<Tensor> {
        Ok(match self {
            Self::Dense(tensor) => tensor.clone(),
            Self::Quantised { weight, .. } => {
                to_tensor(weight.dequantise().as_ref(), DType::F64, &Device::Cpu)?
            }
            Self::Blocks(rows) => {
                rows.check()?;
                Tensor::from_vec(rows.dequantise(), (rows.rows(), rows.cols()), &Device::Cpu)?
            }
        })
    }

    /// The bytes that it takes, part by part.
    ///
    /// # Errors
    /// What candle reports.
    pub fn storage(&self) -> Result<Storage> {
        Ok(match self {
            Self::Dense(tensor) => {
                let kept = tensor.ne(0f64)?.to_dtype(DType::U32)?.sum_all()?;
                let kept = kept.to_scalar::<u32>()? as usize;
                Storage::floats(tensor.elem_count(), kept, tensor.dtype().size_in_bytes())
            }
            Self::Quantised { weight, pruned } => Storage::quantised(weight, *pruned),
            Self::Blocks(weight) => Storage::blocks(weight),
        })
    }

    /// All bytes of [`StoredWeight::storage`].
    ///
    /// # Errors
    /// What candle reports.
    pub fn bytes(&self) -> Result<u64> {
        Ok(self.storage()?.bytes() as u64)
    }

    /// Tensors that hold it, by names that begin with `prefix`.
    ///
    /// # Errors
    /// What candle reports.
    pub fn tensors(&self, prefix: &str) -> Result<Vec<(String, Tensor)>> {
        let named = |name: &str, tensor| (format!("{prefix}.{name}"), tensor);
        Ok(match self {
            Self::Dense(tensor) => vec![named("weight", tensor.clone())],
            Self::Blocks(weight) => {
                let shape = (weight.rows(), weight.row_bytes());
                let grid = [i64::from(weight.block_type().id()), weight.cols() as i64];
                vec![
                    named(
                        "blocks",
                        Tensor::from_slice(weight.bytes(), shape, &Device::Cpu)?,
                    ),
                    named("grid", Tensor::from_slice(&grid, 2, &Device::Cpu)?),
                ]
            }
            Self::Quantised { weight, pruned } => {
                let (rows, cols, groups) = (weight.rows, weight.cols, weight.groups());
                let cpu = &Device::Cpu;
                let grid = [weight.bits.get(), weight.group_width, *pruned].map(|v| v as i64);
                let mut tensors = vec![
                    named(
                        "codes",
                        Tensor::from_slice(&weight.codes, (rows, cols), cpu)?,
                    ),
                    named(
                        "scales",
                        Tensor::from_slice(&weight.scales, (rows, groups), cpu)?,
                    ),
                    named(
                        "zeros",
                        Tensor::from_slice(&weight.zeros, (rows, groups), cpu)?,
                    ),
                    named(
                        "group_index",
                        Tensor::from_slice(&weight.group_index, cols, cpu)?,
                    ),
                    named("grid", Tensor::from_slice(&grid, 3, cpu)?),
                ];
                if !weight.offsets.is_empty() {
                    let offsets = Tensor::from_slice(&weight.offsets, (rows, groups), cpu)?;
                    tensors.push(named("offsets", offsets));
                }
                tensors
            }
        })
    }

    /// Reads what [`StoredWeight::tensors`] gave, from a file that holds it.
    ///
    /// # Errors
    /// Tensors that are missing or do not fit each other.
    pub fn read(file: &Checkpoint, prefix: &str) -> Result<Self> {
        let tensor = |name: &str| file.tensor(&format!("{prefix}.{name}"), &Device::Cpu);
        if file.contains(&format!("{prefix}.weight")) {
            return Ok(Self::Dense(tensor("weight")?));
        }
        if file.contains(&format!("{prefix}.blocks")) {
            return Self::read_blocks(file, prefix);
        }
        let codes = tensor("codes")?;
        let (rows, cols) = codes.dims2()?;
        let grid = tensor("grid")?.to_vec1::<i64>()?;
        let malformed = || Error::Malformed {
            path: file.dir().to_owned(),
            reason: format!("{prefix}: bits, groups and codes do not fit each other"),
        };
        let &[bits, group_width, pruned] = grid.as_slice() else {
            return Err(malformed());
        };
        let bits = u8::try_from(bits)
            .ok()
            .and_then(Bits::new)
            .ok_or_else(malformed)?;
        let group_width = usize::try_from(group_width).ok().filter(|&w| w > 0);
        let weight = Quantised {
            bits,
            rows,
            cols,
            group_width: group_width.ok_or_else(malformed)?,
            codes: codes.flatten_all()?.to_vec1()?,
            scales: tensor("scales")?.flatten_all()?.to_vec1()?,
            zeros: tensor("zeros")?.flatten_all()?.to_vec1()?,
            offsets: match file.contains(&format!("{prefix}.offsets")) {
                true => tensor("offsets")?.flatten_all()?.to_vec1()?,
                false => Vec::new(),
            },
            group_index: tensor("group_index")?.to_vec1()?,
        };
        let groups = weight.groups();
        let fits = weight.scales.len() == rows * groups
            && weight.zeros.len() == rows * groups
            && (weight.offsets.is_empty() || weight.offsets.len() == rows * groups)
            && weight.group_index.len() == cols
            && weight
                .group_index
                .iter()
                .all(|&group| (group as usize) < groups);
        if !fits {
            return Err(malformed());
        }
        Ok(Self::Quantised {
            weight,
            pruned: usize::try_from(pruned).map_err(|_| malformed())?,
        })
    }

    fn read_blocks(file: &Checkpoint, prefix: &str) -> Result<Self> {
        let tensor = |name: &str| file.tensor(&format!("{prefix}.{name}"), &Device::Cpu);
        let blocks = tensor("blocks")?;
        let (rows, _) = blocks.dims2()?;
        let grid = tensor("grid")?.to_vec1::<i64>()?;
        let ty = |id: &i64| BlockType::from_id(u32::try_from(*id).ok()?);
        let (Some(ty), Some(cols)) = (
            grid.first().and_then(ty),
            grid.get(1).and_then(|&cols| usize::try_from(cols).ok()),
        ) else {
            return Err(Error::Malformed {
                path: file.dir().to_owned(),
                reason: format!("{prefix}: {grid:?} is no block type with a number of columns"),
            });
        };
        let bytes: Vec<u8> = blocks.flatten_all()?.to_vec1()?;
        Ok(Self::Blocks(QuantRows::new(ty, rows, cols, bytes)?))
    }
}
