//! A batch of activations.

use super::Pick;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use faer::MatRef;
use rayon::prelude::*;

/// Activations of a batch of tokens, f32, finite, each token with a weight.
#[derive(Clone, Debug)]
pub struct Rows {
    values: Vec<f32>,
    width: usize,
    weights: Option<Vec<f64>>,
}

impl Rows {
    /// Activations `[tokens, width]`, row-major; all weights are one.
    ///
    /// # Errors
    /// When the values do not fill whole rows or one is not finite.
    pub fn new(values: Vec<f32>, width: usize) -> Result<Self> {
        if width == 0 || !values.len().is_multiple_of(width) {
            return Err(Error::Shape {
                what: "activations",
                found: vec![values.len()],
                expected: vec![values.len() / width.max(1), width],
            });
        }
        match values.par_iter().position_first(|v| !v.is_finite()) {
            None => Ok(Self {
                values,
                width,
                weights: None,
            }),
            Some(at) => Err(Error::Activation {
                token: at / width,
                channel: at % width,
                value: f64::from(values[at]),
            }),
        }
    }

    /// Activations `[.., width]` of any float dtype; leading dimensions count tokens.
    ///
    /// # Errors
    /// When the tensor is a scalar or a value is not finite in f32.
    pub fn from_tensor(x: &Tensor) -> Result<Self> {
        let Some(&width) = x.dims().last() else {
            return Err(Error::Shape {
                what: "activations",
                found: Vec::new(),
                expected: vec![1, 1],
            });
        };
        let x = x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        Self::new(x.flatten_all()?.to_vec1()?, width)
    }

    /// The same tokens, each counted with its weight on top of the one it has.
    ///
    /// # Errors
    /// When there is not one finite weight ≥ 0 for each token.
    pub fn weighted(mut self, weights: &[f64]) -> Result<Self> {
        if weights.len() != self.tokens() {
            return Err(Error::Shape {
                what: "token weights",
                found: vec![weights.len()],
                expected: vec![self.tokens()],
            });
        }
        if let Some(bad) = weights.iter().find(|w| !(w.is_finite() && **w >= 0.0)) {
            return Err(Error::Setting {
                name: "token weight",
                value: bad.to_string(),
                expected: "a finite number ≥ 0",
            });
        }
        let weights = (weights.iter().enumerate())
            .map(|(token, w)| w * self.weight(token))
            .collect();
        self.weights = Some(weights);
        Ok(self)
    }

    /// Some of the tokens, each counted with the weight of its pick on top of its own. Picks of the
    /// student's batch serve for the teacher's as well.
    ///
    /// # Errors
    /// When a pick is not of this batch.
    pub fn picked(&self, picks: &[Pick]) -> Result<Self> {
        if let Some(bad) = picks.iter().find(|pick| pick.token >= self.tokens()) {
            return Err(Error::Setting {
                name: "picked token",
                value: bad.token.to_string(),
                expected: "a token of the batch",
            });
        }
        let values = (picks.iter())
            .flat_map(|pick| self.row(pick.token).iter().copied())
            .collect();
        let weights: Vec<f64> = picks.iter().map(|pick| pick.weight).collect();
        let tokens = picks.iter().map(|pick| self.weight(pick.token)).collect();
        let rows = Self {
            values,
            width: self.width,
            weights: Some(tokens),
        };
        rows.weighted(&weights)
    }

    /// Tokens.
    pub fn tokens(&self) -> usize {
        self.values.len() / self.width
    }

    /// Channels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Weight of a token.
    pub fn weight(&self, token: usize) -> f64 {
        self.weights.as_ref().map_or(1.0, |weights| weights[token])
    }

    /// Σ of all weights.
    pub fn total_weight(&self) -> f64 {
        match &self.weights {
            None => self.tokens() as f64,
            Some(weights) => weights.iter().sum(),
        }
    }

    /// Activations of one token.
    pub fn row(&self, token: usize) -> &[f32] {
        &self.values[token * self.width..(token + 1) * self.width]
    }

    /// X, `width × tokens`, without the weights.
    pub fn matrix(&self) -> MatRef<'_, f32> {
        MatRef::from_column_major_slice(&self.values, self.width, self.tokens())
    }

    /// Appends √w x of some tokens to `out`.
    pub(crate) fn scaled_into(&self, tokens: std::ops::Range<usize>, out: &mut Vec<f32>) {
        let values = &self.values[tokens.start * self.width..tokens.end * self.width];
        match &self.weights {
            None => out.extend_from_slice(values),
            Some(weights) => {
                for (row, weight) in values.chunks_exact(self.width).zip(&weights[tokens]) {
                    let scale = weight.sqrt();
                    out.extend(row.iter().map(|&x| (f64::from(x) * scale) as f32));
                }
            }
        }
    }

    pub(crate) fn expect_width(&self, width: usize) -> Result<()> {
        if self.width == width {
            return Ok(());
        }
        Err(Error::Shape {
            what: "activations",
            found: vec![self.tokens(), self.width],
            expected: vec![self.tokens(), width],
        })
    }
}
