//! Rate-distortion allocation by dynamic programming (arXiv 2308.10438).

use super::knapsack::{Point, convexify, keep};
use super::{Allocate, Budget};
use crate::ranking::Ranking;
use crate::stats::Needs;
use crate::{Calibration, Compensation, Error, Result, obs};
use causal_lm::{Decoder, Progress};
use serde::{Deserialize, Serialize};

/// What is added up over sublayers, each pruned by itself and compensated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Distortion {
    /// Squared error of the sublayer's output.
    Output,
    /// The same as a share of the sublayer's squared output.
    Relative,
    /// The same as a share of the squared hidden states that leave the block: what the norm of the next block sees.
    #[default]
    Hidden,
}

/// The least sum of the sublayers' output errors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RdDp {
    /// What is added up; [`crate::rate_distortion::measure`] replaces it by a measurement.
    pub distortion: Distortion,
    /// Whether error curves are replaced by their convex hulls.
    pub convex: bool,
}

impl Allocate for RdDp {
    fn keep(&self, rankings: &[Ranking], budget: Budget) -> Result<Vec<usize>> {
        let curve = |ranking: &Ranking| -> Result<Vec<Point>> {
            let errors = ranking.errors.as_ref().ok_or(Error::Missing {
                layer: ranking.layer,
                what: "the error curve of a sublayer",
                need: "rd-dp reads it; collect Gram matrices",
            })?;
            let mut curve: Vec<Point> = (ranking.protected..=ranking.steps().len())
                .map(|steps| Point {
                    cost: ranking.cost(steps),
                    distortion: errors[steps],
                })
                .collect();
            if self.convex {
                convexify(&mut curve);
            }
            Ok(curve)
        };
        let curves = rankings.iter().map(curve).collect::<Result<Vec<_>>>()?;
        let kept = keep(&curves, budget.parameters.max(0.0) as u64);
        let kept = kept.ok_or_else(|| Error::Unreachable {
            ratio: budget.ratio,
            kept: curves.iter().map(|curve| curve[0].cost).sum(),
            total: super::total(rankings),
        })?;
        let steps = |(at, ranking): (usize, &Ranking)| ranking.protected + at;
        Ok(kept.into_iter().zip(rankings).map(steps).collect())
    }

    fn check_budget(&self, rankings: &[Ranking], budget: Budget) -> Result<()> {
        let kept: u64 = rankings.iter().map(|r| r.cost(r.protected)).sum();
        match kept > budget.parameters.max(0.0) as u64 {
            false => Ok(()),
            true => Err(Error::Unreachable {
                ratio: budget.ratio,
                kept,
                total: super::total(rankings),
            }),
        }
    }

    fn needs(&self) -> Needs {
        Needs {
            gram: true,
            ..Needs::default()
        }
    }

    fn prepare(
        &self,
        decoder: &Decoder<'_>,
        calibration: &Calibration,
        compensation: Compensation,
        rankings: &mut [Ranking],
        progress: &dyn Progress,
    ) -> Result<()> {
        progress.begin("error curves", rankings.len() as u64);
        for ranking in rankings {
            let mut errors = obs::step_errors(decoder, calibration, compensation, ranking)?;
            let scale = match self.distortion {
                Distortion::Output => 1.0,
                Distortion::Relative => errors[0],
                Distortion::Hidden => calibration.layers[ranking.layer].hidden_square,
            };
            // Behind a norm an error counts relative to the output's mean square; relative errors do already.
            let part = calibration.part(ranking.layer, ranking.part)?;
            let scale = match (part.output_square, self.distortion) {
                (Some(square), Distortion::Output | Distortion::Hidden) => scale * square,
                _ => scale,
            };
            // Where the output is zero, nothing can be lost.
            if scale > 0.0 {
                errors.iter_mut().for_each(|error| *error /= scale);
            }
            ranking.errors = Some(errors);
            progress.advance(1)?;
        }
        Ok(())
    }
}
