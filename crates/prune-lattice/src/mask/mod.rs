//! Masks as values of their own: one bit per weight, kept apart from the weights.
//!
//! A [`MaskSet`] maps parameter names to masks. It is applied in one place to whatever has those names: weights, gradients,
//! moments of the optimiser, candle tensors. It can be saved, loaded and dropped without a trace.

mod blocks;
mod neurons;
mod picture;
mod select;

pub use blocks::Block;
pub use neurons::{hard_remove, neuron_masks, restrict_masks};
pub use picture::mask_svg;
pub use select::{MaskRule, Rank, keep_top, tile};

use crate::{
    cell::values,
    error::{Error, Result},
    io,
    order::bits::BitMatrix,
    params::ParamSet,
};
use candle_core::{DType, Device, Tensor};
use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

/// Which entries of a parameter are kept: a bit per entry, in the parameter's own shape (a bias is one row).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mask {
    keep: BitMatrix,
    dims: Vec<usize>,
}

impl Mask {
    /// The mask of a matrix.
    pub fn of_matrix(keep: BitMatrix) -> Self {
        let dims = vec![keep.rows(), keep.cols()];
        Self { keep, dims }
    }

    /// The mask of a bias.
    pub fn of_bias(keep: &[bool]) -> Self {
        Self {
            keep: BitMatrix::from_fn(1, keep.len(), |_, j| keep[j]),
            dims: vec![keep.len()],
        }
    }

    /// The bits, one row per row of the matrix.
    pub fn keep(&self) -> &BitMatrix {
        &self.keep
    }

    /// Shape of the parameter.
    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.keep.rows() * self.keep.cols()
    }

    /// Whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of entries pruned.
    pub fn pruned(&self) -> usize {
        self.len() - self.keep.count()
    }

    /// Zeroes the pruned entries of a row-major buffer.
    ///
    /// # Panics
    /// The buffer has another length than the mask.
    pub fn apply(&self, data: &mut [f32]) {
        assert_eq!(data.len(), self.len(), "mask of {:?}", self.dims);
        for (i, row) in data.chunks_exact_mut(self.keep.cols()).enumerate() {
            for (values, &word) in row.chunks_mut(64).zip(self.keep.row(i)) {
                if word == u64::MAX {
                    continue;
                }
                for (k, v) in values.iter_mut().enumerate() {
                    *v = if word >> k & 1 == 1 { *v } else { 0.0 };
                }
            }
        }
    }
}

impl Mask {
    /// Copies the kept entries of `from` into `to`.
    #[cfg(feature = "train")]
    pub(crate) fn merge_kept(&self, to: &mut [f32], from: &[f32]) {
        let cols = self.keep.cols();
        for i in 0..self.keep.rows() {
            for j in self.keep.row_ones(i) {
                to[i * cols + j] = from[i * cols + j];
            }
        }
    }
}

/// Masks by parameter name. A parameter without a mask is kept whole.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MaskSet {
    masks: BTreeMap<String, Mask>,
}

impl MaskSet {
    /// Adds or replaces the mask of a parameter.
    pub fn insert(&mut self, name: impl Into<String>, mask: Mask) {
        self.masks.insert(name.into(), mask);
    }

    /// The mask of a parameter.
    pub fn get(&self, name: &str) -> Option<&Mask> {
        self.masks.get(name)
    }

    /// Names and masks, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Mask)> {
        self.masks.iter().map(|(n, m)| (n.as_str(), m))
    }

    /// Whether nothing is masked.
    pub fn is_empty(&self) -> bool {
        self.masks.is_empty()
    }

    /// Number of entries pruned.
    pub fn pruned(&self) -> usize {
        self.masks.values().map(Mask::pruned).sum()
    }

    /// Keeps only what both sets keep.
    #[must_use]
    pub fn intersection(mut self, other: &MaskSet) -> Self {
        for (name, mask) in &other.masks {
            match self.masks.get_mut(name) {
                Some(own) => {
                    let (a, b) = (&own.keep, &mask.keep);
                    own.keep =
                        BitMatrix::from_fn(a.rows(), a.cols(), |i, j| a.get(i, j) && b.get(i, j));
                }
                None => {
                    self.masks.insert(name.clone(), mask.clone());
                }
            }
        }
        self
    }

    /// Zeroes the pruned entries of the parameters.
    ///
    /// # Errors
    /// A masked parameter is missing or has another shape.
    pub fn apply(&self, params: &mut ParamSet) -> Result<()> {
        self.check(|name| params.get(name).map(|p| p.shape.clone()))?;
        for p in params.iter_mut() {
            if let Some(mask) = self.masks.get(&p.name) {
                mask.apply(&mut p.data);
            }
        }
        Ok(())
    }

    /// Zeroes the pruned entries of candle tensors (weights, gradients, anything with these names).
    ///
    /// # Errors
    /// A masked tensor is missing or has another shape.
    pub fn apply_to_tensors(&self, tensors: &mut HashMap<String, Tensor>) -> Result<()> {
        self.check(|name| match tensors.get(name) {
            Some(t) => Ok(t.dims().to_vec()),
            None => Err(Error::MissingTensor { name: name.into() }),
        })?;
        for (name, mask) in &self.masks {
            if let Some(t) = tensors.get_mut(name) {
                let mut data = values(t)?;
                mask.apply(&mut data);
                *t = Tensor::from_vec(data, t.dims(), &Device::Cpu)?
                    .to_dtype(t.dtype())?
                    .to_device(t.device())?;
            }
        }
        Ok(())
    }

    fn check(&self, shape: impl Fn(&str) -> Result<Vec<usize>>) -> Result<()> {
        for (name, mask) in &self.masks {
            let found = shape(name)?;
            if found != mask.dims {
                return Err(Error::Shape {
                    tensor: name.clone(),
                    expected: format!("{:?} (its mask)", mask.dims),
                    found,
                });
            }
        }
        Ok(())
    }

    /// Writes the masks to a safetensors file, as u8 tensors of 0 and 1 under the names of their parameters.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, file: &Path) -> Result<()> {
        let tensor = |m: &Mask| {
            let bits = (0..m.keep.rows())
                .flat_map(|i| (0..m.keep.cols()).map(move |j| u8::from(m.keep.get(i, j))));
            Tensor::from_vec(bits.collect::<Vec<u8>>(), m.dims.as_slice(), &Device::Cpu)
        };
        let tensors = self
            .masks
            .iter()
            .map(|(n, m)| Ok((n.clone(), tensor(m)?)))
            .collect::<Result<_>>()?;
        io::save(&tensors, file)
    }

    /// Reads masks that [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// The file cannot be read, or a tensor is not a u8 vector or matrix of 0 and 1.
    pub fn load(file: &Path) -> Result<Self> {
        let mut set = Self::default();
        for (name, t) in io::load(file)? {
            let wrong = |reason: &str| Error::Data {
                file: file.into(),
                reason: format!("{name}: {reason}"),
            };
            if t.dtype() != DType::U8 {
                return Err(wrong("a mask must be u8"));
            }
            let (rows, cols) = match t.dims() {
                [n] => (1, *n),
                [r, c] => (*r, *c),
                _ => return Err(wrong("a mask must be a vector or a matrix")),
            };
            let bits: Vec<u8> = t.flatten_all()?.to_vec1()?;
            if bits.iter().any(|&b| b > 1) {
                return Err(wrong("a mask holds only 0 and 1"));
            }
            let keep = BitMatrix::from_fn(rows, cols, |i, j| bits[i * cols + j] == 1);
            let dims = t.dims().to_vec();
            set.masks.insert(name, Mask { keep, dims });
        }
        Ok(set)
    }
}
