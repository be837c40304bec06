//! The least-squares problem behind one output projection, in f64.

use crate::tensor::values;
use crate::{Error, Result};
use candle_core::Tensor;
use faer::Mat;
use std::collections::BTreeMap;

/// W and the damped Gram matrix H of its input.
///
/// H holds `columns²` f64, W `outputs · columns`; both are read from f32.
#[derive(Clone, Debug)]
pub struct Problem {
    /// `[outputs, columns]`; columns whose input was always zero are zero here.
    pub(crate) weight: Mat<f64>,
    /// `XᵀX + ridge · mean(diag XᵀX) · I`, `[columns, columns]`.
    pub(crate) gram: Mat<f64>,
    /// Columns whose input was always zero, with their weights, on which the loss does not depend.
    pub(crate) dead: BTreeMap<usize, Vec<f32>>,
    /// What each output of `weight` was multiplied by.
    pub(crate) gains: Option<Vec<f64>>,
    /// The block, for errors.
    pub(crate) layer: usize,
}

/// Least gain of an output, relative to the largest: outputs that a norm removes are refitted like the others.
const LEAST_GAIN: f64 = 1e-9;

impl Problem {
    /// From the weight of o_proj or down_proj of block `layer`, `[outputs, columns]`, and
    /// `gram = XᵀX`, `[columns, columns]`.
    ///
    /// # Errors
    /// When the shapes do not fit each other.
    pub fn new(weight: &Tensor, gram: &Tensor, ridge: f64, layer: usize) -> Result<Self> {
        let (outputs, columns) = weight.dims2()?;
        if gram.dims() != [columns, columns] {
            return Err(Error::PlanMismatch(format!(
                "layer {layer}: a Gram matrix of shape {:?} for {columns} columns",
                gram.dims()
            )));
        }
        let weight = values(weight)?;
        let gram = values(gram)?;
        let diagonal = gram.iter().step_by(columns + 1).map(|&d| f64::from(d));
        let damping = ridge * diagonal.clone().sum::<f64>() / columns as f64;
        let dead: BTreeMap<usize, Vec<f32>> = (0..columns)
            .zip(diagonal)
            .filter(|&(_, d)| d == 0.0)
            .map(|(c, _)| (c, (0..outputs).map(|o| weight[o * columns + c]).collect()))
            .collect();
        let alive: Vec<f64> = (0..columns)
            .map(|c| if dead.contains_key(&c) { 0.0 } else { 1.0 })
            .collect();
        Ok(Self {
            weight: Mat::from_fn(outputs, columns, |o, c| {
                f64::from(weight[o * columns + c]) * alive[c]
            }),
            gram: Mat::from_fn(columns, columns, |i, j| {
                f64::from(gram[j * columns + i]) + if i == j { damping } else { 0.0 }
            }),
            dead,
            gains: None,
            layer,
        })
    }

    /// The same with the error of each output counting as often as the square of its gain: for projections behind which
    /// a norm multiplies outputs by its weights. Refits are those without gains, because rows of the weight are
    /// independent.
    ///
    /// # Errors
    /// When there are not as many gains as outputs.
    pub fn with_gains(mut self, gains: Option<Vec<f64>>) -> Result<Self> {
        let Some(gains) = gains else {
            return Ok(self);
        };
        let outputs = self.weight.nrows();
        if gains.len() != outputs {
            return Err(Error::PlanMismatch(format!(
                "layer {}: {} gains for {outputs} outputs",
                self.layer,
                gains.len()
            )));
        }
        let largest = gains.iter().fold(0f64, |most, gain| most.max(gain.abs()));
        let least = (LEAST_GAIN * largest).max(f64::MIN_POSITIVE);
        let gains: Vec<f64> = gains.iter().map(|gain| gain.abs().max(least)).collect();
        for column in 0..self.columns() {
            for (output, gain) in gains.iter().enumerate() {
                self.weight[(output, column)] *= gain;
            }
        }
        self.gains = Some(gains);
        Ok(self)
    }

    /// Columns of the weight.
    pub fn columns(&self) -> usize {
        self.weight.ncols()
    }

    pub(crate) fn singular(&self) -> Error {
        Error::Singular { layer: self.layer }
    }
}
