//! Named f32 parameters. Weights, gradients and the moments of the optimiser are all sets of the same names and shapes, so
//! that a mask applies to each of them in the same way.

use crate::{
    cell::values,
    error::{Error, Result, check_finite},
};
use candle_core::{Device, Tensor};
use std::collections::HashMap;

/// One parameter, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Param {
    /// Its name in a checkpoint.
    pub name: String,
    /// Its shape: `[rows, cols]`, or `[n]` for a bias.
    pub shape: Vec<usize>,
    /// Its values.
    pub data: Vec<f32>,
}

/// An ordered set of parameters with distinct names.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ParamSet {
    params: Vec<Param>,
}

impl ParamSet {
    /// From parameters whose data fit their shapes.
    pub(crate) fn new(params: Vec<Param>) -> Self {
        debug_assert!(
            params
                .iter()
                .all(|p| p.data.len() == p.shape.iter().product::<usize>())
        );
        Self { params }
    }

    /// The same names and shapes, all zero.
    pub fn zeros_like(&self) -> Self {
        let zero = |p: &Param| Param {
            name: p.name.clone(),
            shape: p.shape.clone(),
            data: vec![0.0; p.data.len()],
        };
        Self {
            params: self.params.iter().map(zero).collect(),
        }
    }

    /// Number of values in all parameters.
    pub fn count(&self) -> usize {
        self.params.iter().map(|p| p.data.len()).sum()
    }

    /// Number of nonzero values.
    pub fn count_nonzero(&self) -> usize {
        self.iter()
            .map(|p| p.data.iter().filter(|v| **v != 0.0).count())
            .sum()
    }

    /// The parameters in order.
    pub fn iter(&self) -> impl Iterator<Item = &Param> {
        self.params.iter()
    }

    /// The parameters in order, to change.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Param> {
        self.params.iter_mut()
    }

    /// The parameter of that name.
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    pub fn get(&self, name: &str) -> Result<&Param> {
        self.params
            .iter()
            .find(|p| p.name == name)
            .ok_or_else(|| Error::MissingTensor { name: name.into() })
    }

    pub(crate) fn slot(&self, index: usize) -> &[f32] {
        &self.params[index].data
    }

    #[cfg(feature = "train")]
    pub(crate) fn slot_mut(&mut self, index: usize) -> &mut [f32] {
        &mut self.params[index].data
    }

    /// Sets all values to zero.
    #[cfg(feature = "train")]
    pub(crate) fn clear(&mut self) {
        self.params.iter_mut().for_each(|p| p.data.fill(0.0));
    }

    /// Adds the values of a set of the same shapes.
    #[cfg(feature = "train")]
    pub(crate) fn add(&mut self, other: &ParamSet) {
        for (p, o) in self.params.iter_mut().zip(&other.params) {
            p.data.iter_mut().zip(&o.data).for_each(|(p, o)| *p += o);
        }
    }

    /// As candle tensors on the CPU.
    ///
    /// # Errors
    /// Those of candle.
    pub fn to_tensors(&self) -> Result<HashMap<String, Tensor>> {
        self.params
            .iter()
            .map(|p| {
                Ok((
                    p.name.clone(),
                    Tensor::from_slice(&p.data, p.shape.as_slice(), &Device::Cpu)?,
                ))
            })
            .collect()
    }
}

/// Takes one tensor out of a checkpoint and checks its shape and values.
pub(crate) fn take(
    tensors: &HashMap<String, Tensor>,
    name: &str,
    shape: &[usize],
) -> Result<Vec<f32>> {
    let t = tensors
        .get(name)
        .ok_or_else(|| Error::MissingTensor { name: name.into() })?;
    if t.dims() != shape {
        return Err(Error::Shape {
            tensor: name.into(),
            expected: format!("{shape:?}"),
            found: t.dims().to_vec(),
        });
    }
    let data = values(t)?;
    check_finite(name, &data)?;
    Ok(data)
}

/// Takes one tensor of any shape out of a file and checks its values.
#[cfg(feature = "experiment")]
pub(crate) fn take_any(
    tensors: &HashMap<String, Tensor>,
    name: &str,
) -> Result<(Vec<usize>, Vec<f32>)> {
    let t = tensors
        .get(name)
        .ok_or_else(|| Error::MissingTensor { name: name.into() })?;
    let data = take(tensors, name, t.dims())?;
    Ok((t.dims().to_vec(), data))
}
