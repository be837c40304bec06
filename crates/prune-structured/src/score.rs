//! Scores: how much each column of an output projection matters.
//!
//! A column is one input feature of o_proj or down_proj. x is that feature over the calibration
//! tokens, W the projection's weight, `[outputs, columns]`.

use crate::obs::Rounds;
use crate::stats::{ColumnStats, Part};
use crate::{Error, Result};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// A score of columns; higher is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Score {
    /// `Var(x) · ‖W[:,c]‖²` (FLAP, arXiv 2312.11983, eq. 5).
    Wifv,
    /// Var(x): the fluctuation alone (FLAP's ablation).
    Ifv,
    /// `mean over outputs of |W[o,c]| · √(Σ x² / windows)` (FLAP's ablation).
    Wifn,
    /// `Σ over outputs of |W[o,c]| · ‖x‖₂` (Wanda, arXiv 2306.11695, summed over a column).
    WandaSp,
    /// `‖W[:,c]‖₂`; looks at no activation.
    Magnitude,
    /// Uniform random numbers; looks at nothing.
    Random {
        /// Seed of the draw.
        seed: u64,
    },
    /// WIFV with the arithmetic of FLAP's published implementation.
    FlapCompat,
    /// The order in which optimal brain surgeon eliminates units, by Týr-the-Pruner's score (arXiv
    /// 2503.09657): see [`crate::obs`]. Ranks units together, so it has no scores of columns.
    Obs {
        /// Units between two scorings; `None` chooses by [`Rounds::suggested`].
        rounds: Option<Rounds>,
    },
}

impl Score {
    /// Scores of all columns of one half of a block.
    ///
    /// # Errors
    /// [`Error::Missing`] when calibration did not collect what the score reads, and for
    /// [`Score::Obs`], which [`crate::Ranking::all`] computes from whole sublayers.
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
            Self::Obs { .. } => {
                return Err(Error::Missing {
                    layer,
                    what: "a score of single columns",
                    need: "this score ranks whole units",
                });
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flap::compat::{Fluctuation, tests::samples};
    use crate::stats::Moments;

    /// Statistics of four samples of three tokens with four features, and a weight with three rows.
    fn stats() -> ColumnStats {
        let weight = |o: usize, c: usize| (((3 * o + 2 * c) % 7) as f64 - 3.0) / 2.0;
        let column = |f: fn(f64) -> f64| -> Vec<f64> {
            (0..4)
                .map(|c| (0..3).map(|o| f(weight(o, c))).sum())
                .collect()
        };
        let mut stats = ColumnStats {
            moments: Moments::new(4),
            samples: 4,
            fluctuation: Some(Fluctuation::new(4)),
            weight_square: column(|w| w * w),
            weight_abs: column(f64::abs),
            outputs: 3,
        };
        for sample in samples() {
            stats.moments.update(&sample);
            stats.fluctuation.as_mut().unwrap().update(&sample);
        }
        stats
    }

    fn check(score: Score, part: Part, golden: [f64; 4]) {
        let scores = score.columns(0, part, &stats()).unwrap();
        for (ours, golden) in scores.iter().zip(golden) {
            // The implementation computes in f32.
            let close = (ours - golden).abs() < 5e-7 * golden.abs().max(1.0);
            assert!(close, "{score:?}: {ours} is not {golden}");
        }
    }

    #[test]
    fn scores_are_those_of_the_published_implementation() {
        use Part::{Attention, Mlp};
        check(
            Score::FlapCompat,
            Mlp,
            [5.5285192, 2.8965569, 2.2997143, 4.4277892],
        );
        let squared = [30.564524, 8.3900414, 5.2886858, 19.605318];
        check(Score::FlapCompat, Attention, squared);
        check(
            Score::Wifn,
            Mlp,
            [1.3863169, 1.1876828, 0.8936505, 1.4086785],
        );
        let norms = [1.3863169, 1.1876828, 0.8936505, 1.4086785].map(|wifn| wifn * 3.0 * 2.0);
        check(Score::WandaSp, Mlp, norms);
    }

    #[test]
    fn the_default_score_is_exact_variance_times_squared_weight() {
        let variance = [0.6367188, 0.6701389, 0.5881076, 0.6506076];
        check(Score::Ifv, Part::Mlp, variance);
        let weight = [4.5, 2.25, 2.5, 3.5];
        let wifv = std::array::from_fn(|c| variance[c] * weight[c]);
        check(Score::Wifv, Part::Mlp, wifv);
        check(Score::Wifv, Part::Attention, wifv);
        check(Score::Magnitude, Part::Mlp, weight.map(f64::sqrt));
    }

    #[test]
    fn random_scores_depend_on_seed_and_sublayer_alone() {
        let draw = |seed, layer, part| {
            Score::Random { seed }
                .columns(layer, part, &stats())
                .unwrap()
        };
        assert_eq!(draw(1, 0, Part::Mlp), draw(1, 0, Part::Mlp));
        assert_ne!(draw(1, 0, Part::Mlp), draw(2, 0, Part::Mlp));
        assert_ne!(draw(1, 0, Part::Mlp), draw(1, 1, Part::Mlp));
        assert_ne!(draw(1, 0, Part::Mlp), draw(1, 0, Part::Attention));
    }

    #[test]
    fn standard_scores_have_mean_0_and_unbiased_variance_1() {
        let mut scores = [1.0, 2.0, 4.0, 9.0];
        standardise(&mut scores);
        assert!(scores.iter().sum::<f64>().abs() < 1e-12);
        assert!((scores.iter().map(|s| s * s).sum::<f64>() / 3.0 - 1.0).abs() < 1e-12);
        let mut equal = [5.0; 3];
        standardise(&mut equal);
        assert_eq!(equal, [0.0; 3]);
    }
}
