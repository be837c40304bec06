//! How experts are chosen.

use super::{ExpertCompensation, ExpertMethod};
use crate::{Error, Result};
use causal_lm::config::Mixture;
use serde::{Deserialize, Serialize};

/// How many experts of each layer stay.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keep {
    /// So many.
    Experts(usize),
    /// All but this share, rounded to the nearest number.
    Without(f64),
}

/// How experts are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ExpertOptions {
    /// The method.
    pub method: ExpertMethod,
    /// How many of each layer stay.
    pub keep: Keep,
    /// What makes up for the others.
    pub compensation: ExpertCompensation,
    /// Whether a layer sees what the layers before it put out with the experts that they keep, not with all.
    pub progressive: bool,
    /// Whether to measure the change of each layer's output, which runs its experts once more.
    pub measure_errors: bool,
}

impl ExpertOptions {
    /// This method, so many experts, no compensation.
    pub fn new(method: impl Into<ExpertMethod>, keep: Keep) -> Self {
        Self {
            method: method.into(),
            keep,
            compensation: super::compensation::NoExpertCompensation.into(),
            progressive: false,
            measure_errors: false,
        }
    }

    /// The same with a compensation.
    pub fn compensation(self, compensation: impl Into<ExpertCompensation>) -> Self {
        Self {
            compensation: compensation.into(),
            ..self
        }
    }

    /// The same with or without measuring the change of each layer's output.
    pub fn measure_errors(self, measure_errors: bool) -> Self {
        Self {
            measure_errors,
            ..self
        }
    }

    /// The same behind the pruned layers, or the dense ones.
    pub fn progressive(self, progressive: bool) -> Self {
        Self {
            progressive,
            ..self
        }
    }
}

impl ExpertOptions {
    /// Whether all router rows stay, so that a layer may keep fewer experts than a token goes to.
    pub(crate) fn keeps_rows(&self) -> bool {
        self.method.method().ties() || self.compensation.method().keeps_rows()
    }

    /// How many experts of a layer stay. A share of weights to remove counts the constants that take the place of experts.
    ///
    /// # Errors
    /// As [`Keep::of`], and [`Error::Experts`] for fewer than a token needs.
    pub(crate) fn kept(&self, layer: usize, mixture: Mixture) -> Result<usize> {
        let kept = match self.keep {
            Keep::Without(ratio) if ratio > 0.0 && self.compensation.method().keeps_rows() => {
                // In units of the channels an expert is 3 w numbers and its constant 1.
                self.keep.of(mixture.experts)?;
                let (experts, of_expert) = (mixture.experts as f64, 3.0 * mixture.width as f64);
                let wanted = experts * (of_expert * (1.0 - ratio) - 1.0) / (of_expert - 1.0);
                (wanted.round().max(1.0) as usize).min(mixture.experts)
            }
            keep => keep.of(mixture.experts)?,
        };
        self.check_kept(layer, kept, mixture)?;
        Ok(kept)
    }

    /// Refuses fewer experts than a token needs.
    pub(crate) fn check_kept(&self, layer: usize, kept: usize, mixture: Mixture) -> Result<()> {
        match kept < mixture.chosen && !self.keeps_rows() {
            false => Ok(()),
            true => Err(Error::Experts {
                layer,
                kept,
                chosen: mixture.chosen,
            }),
        }
    }
}

impl Keep {
    /// How many of `experts` stay.
    ///
    /// # Errors
    /// [`Error::Option`] for more than there are, or none; [`Error::Ratio`] for a share outside `[0, 1)`.
    pub fn of(self, experts: usize) -> Result<usize> {
        match self {
            Self::Experts(keep) if (1..=experts).contains(&keep) => Ok(keep),
            Self::Experts(keep) => Err(Error::Option {
                option: "experts",
                value: keep as f64,
                expected: "at least 1 and no more than the model has are expected",
            }),
            Self::Without(ratio) if (0.0..1.0).contains(&ratio) => {
                Ok(((experts as f64 * (1.0 - ratio)).round() as usize).max(1))
            }
            Self::Without(ratio) => Err(Error::Ratio(ratio)),
        }
    }
}
