//! Scores: how much each column of an output projection matters.
//!
//! A column is one input feature of o_proj or down_proj. x is that feature over the calibration
//! tokens, W the projection's weight, `[outputs, columns]`.

use crate::stats::{ColumnStats, Part};
use crate::{Error, Result};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// A score of columns; higher is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Score {
    /// Var(x) · ‖W[:,c]‖² (FLAP, arXiv 2312.11983, eq. 5).
    Wifv,
    /// Var(x): the fluctuation alone (FLAP's ablation).
    Ifv,
    /// mean over outputs of |W[o,c]| · √(Σ x² / windows) (FLAP's ablation).
    Wifn,
    /// Σ over outputs of |W[o,c]| · ‖x‖₂ (Wanda, arXiv 2306.11695, summed over a column).
    WandaSp,
    /// ‖W[:,c]‖₂; looks at no activation.
    Magnitude,
    /// Uniform random numbers; looks at nothing.
    Random {
        /// Seed of the draw.
        seed: u64,
    },
    /// WIFV with the arithmetic of FLAP's published implementation.
    FlapCompat,
}

impl Score {
    /// Scores of all columns of one half of a block.
    ///
    /// # Errors
    /// [`Error::Missing`] when calibration did not collect what the score reads.
    pub fn columns(self, layer: usize, part: Part, stats: &ColumnStats) -> Result<Vec<f64>> {
        let moments = &stats.moments;
        let weighted =
            |x: &mut dyn Iterator<Item = f64>, w: &[f64]| x.zip(w).map(|(x, w)| x * w).collect();
        Ok(match self {
            Self::Wifv => weighted(&mut moments.variance(), &stats.weight_square),
            Self::Ifv => moments.variance().collect(),
            Self::Wifn => {
                let (samples, outputs) = (stats.samples as f64, stats.outputs as f64);
                let norms = moments.square_sum().map(|s| (s / samples).sqrt() / outputs);
                weighted(&mut { norms }, &stats.weight_abs)
            }
            Self::WandaSp => weighted(&mut moments.square_sum().map(f64::sqrt), &stats.weight_abs),
            Self::Magnitude => stats.weight_square.iter().map(|w| w.sqrt()).collect(),
            Self::Random { seed } => {
                // A stream of its own for each sublayer, so that widths do not shift later draws.
                let mut rng = ChaCha8Rng::seed_from_u64(seed);
                rng.set_stream(2 * layer as u64 + u64::from(part == Part::Mlp));
                (0..moments.mean.len()).map(|_| rng.random()).collect()
            }
            Self::FlapCompat => {
                let fluctuation = stats.fluctuation.as_ref().ok_or(Error::Missing {
                    layer,
                    what: "the reference's fluctuation",
                    need: "ask for it when calibrating",
                })?;
                let score = fluctuation
                    .value
                    .iter()
                    .zip(&stats.weight_square)
                    .map(|(f, w)| f * w);
                match part {
                    Part::Attention => score.map(|s| s * s).collect(),
                    Part::Mlp => score.collect(),
                }
            }
        })
    }
}

/// (s − mean) / std with the unbiased standard deviation; all zero when the scores are equal.
pub fn standardise(scores: &mut [f64]) {
    let n = scores.len() as f64;
    let mean = scores.iter().sum::<f64>() / n;
    let variance = scores.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / (n - 1.0);
    let std = variance.sqrt();
    for score in scores {
        *score = if std > 0.0 {
            (*score - mean) / std
        } else {
            0.0
        };
    }
}
