//! Scores: how much each column of an output projection matters.
//!
//! A column is one input feature of o_proj or down_proj. x is that feature over the calibration tokens, W the
//! projection's weight, `[outputs, columns]`. A score is a file of this folder and a line of [`Score`].

mod flap_compat;
mod ifv;
mod magnitude;
mod obs;
mod random;
mod wanda_sp;
mod wifn;
mod wifv;

use crate::methods::methods;
use crate::ranking::{Ranking, Shape};
use crate::stats::{ColumnStats, Needs, Part};
use crate::{Calibration, Result};
use causal_lm::{Decoder, Progress};

pub use flap_compat::FlapCompat;
pub use ifv::Ifv;
pub use magnitude::Magnitude;
pub use obs::Obs;
pub use random::Random;
pub use wanda_sp::WandaSp;
pub use wifn::Wifn;
pub use wifv::Wifv;

methods! {
    /// A score of columns; higher is kept.
    pub enum Score: Scoring {
        /// `Var(x) · ‖W[:,c]‖²` (FLAP, arXiv 2312.11983, eq. 5).
        "wifv" => Wifv(Wifv),
        /// Var(x): the fluctuation alone (FLAP's ablation).
        "ifv" => Ifv(Ifv),
        /// `mean over outputs of |W[o,c]| · √(Σ x² / windows)` (FLAP's ablation).
        "wifn" => Wifn(Wifn),
        /// `Σ over outputs of |W[o,c]| · ‖x‖₂` (Wanda, arXiv 2306.11695, summed over a column).
        "wanda-sp" => WandaSp(WandaSp),
        /// `‖W[:,c]‖₂`, without activations.
        "magnitude" => Magnitude(Magnitude),
        /// Uniform random numbers.
        "random" => Random(Random),
        /// WIFV with the arithmetic of FLAP's published implementation.
        "flap-compat" => FlapCompat(FlapCompat),
        /// The order in which optimal brain surgeon eliminates units, by Týr-the-Pruner's score (arXiv 2503.09657).
        "obs" => Obs(Obs),
    }
}

/// What a score has to say.
pub(crate) trait Scoring {
    /// Scores of all columns of one half of a block.
    fn columns(&self, layer: usize, part: Part, stats: &ColumnStats) -> Result<Vec<f64>>;

    /// Statistics that it reads beside moments and weight norms.
    fn needs(&self) -> Needs {
        Needs::default()
    }

    /// The power with which it grows with the sublayer's output: scores of sublayers whose output is normalised are
    /// divided by that power of the output's root mean square before sublayers are compared.
    fn degree(&self) -> i32 {
        0
    }

    /// Ranks the units of every sublayer; by the mean of their columns' scores unless the score ranks whole units.
    fn rank(
        &self,
        decoder: &Decoder<'_>,
        calibration: &Calibration,
        shape: &Shape,
        _progress: &dyn Progress,
    ) -> Result<Vec<Ranking>> {
        Ranking::by_columns(decoder, shape, |layer, part| {
            let stats = calibration.part(layer, part)?;
            let mut scores = self.columns(layer, part, stats)?;
            if let Some(square) = stats.output_square.filter(|&square| square > 0.0) {
                let scale = square.sqrt().powi(self.degree());
                scores.iter_mut().for_each(|score| *score /= scale);
            }
            Ok(scores)
        })
    }
}

impl Score {
    /// Scores of all columns of one half of a block.
    ///
    /// # Errors
    /// [`Error::Missing`](crate::Error::Missing) when calibration did not collect what the score reads, and for
    /// [`Obs`], which has no scores of single columns.
    pub fn columns(&self, layer: usize, part: Part, stats: &ColumnStats) -> Result<Vec<f64>> {
        self.method().columns(layer, part, stats)
    }

    /// Ranks the units of every sublayer of a model; a step of `progress` is a sublayer, where the score takes long.
    ///
    /// # Errors
    /// [`Error::Width`](crate::Error::Width) for a minimum or alignment that a layer cannot satisfy, and
    /// [`Error::Missing`](crate::Error::Missing) for statistics that calibration did not collect;
    /// [`Error::Cancelled`](crate::Error::Cancelled).
    pub fn rank(
        &self,
        decoder: &Decoder<'_>,
        calibration: &Calibration,
        shape: &Shape,
        progress: &dyn Progress,
    ) -> Result<Vec<Ranking>> {
        self.method().rank(decoder, calibration, shape, progress)
    }

    /// Statistics that it reads beside moments and weight norms.
    pub fn needs(&self) -> Needs {
        self.method().needs()
    }
}

/// Values times weights, column by column.
fn weighted(values: impl Iterator<Item = f64>, weights: &[f64]) -> Vec<f64> {
    values.zip(weights).map(|(x, w)| x * w).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::Moments;
    use crate::stats::fluctuation::{Fluctuation, tests::samples};

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
            plain_square: None,
            output_square: None,
            outputs: 3,
        };
        for sample in samples() {
            stats.moments.update(&sample);
            stats.fluctuation.as_mut().unwrap().update(&sample);
        }
        stats
    }

    fn check(name: &str, part: Part, golden: [f64; 4]) {
        let score = Score::named(name).unwrap();
        let scores = score.columns(0, part, &stats()).unwrap();
        for (ours, golden) in scores.iter().zip(golden) {
            // The implementation computes in f32.
            let close = (ours - golden).abs() < 5e-7 * golden.abs().max(1.0);
            assert!(close, "{name}: {ours} is not {golden}");
        }
    }

    #[test]
    fn scores_are_those_of_the_published_implementation() {
        use Part::{Attention, Mlp};
        check(
            "flap-compat",
            Mlp,
            [5.5285192, 2.8965569, 2.2997143, 4.4277892],
        );
        let squared = [30.564524, 8.3900414, 5.2886858, 19.605318];
        check("flap-compat", Attention, squared);
        check("wifn", Mlp, [1.3863169, 1.1876828, 0.8936505, 1.4086785]);
        let norms = [1.3863169, 1.1876828, 0.8936505, 1.4086785].map(|wifn| wifn * 3.0 * 2.0);
        check("wanda-sp", Mlp, norms);
    }

    #[test]
    fn the_default_score_is_exact_variance_times_squared_weight() {
        let variance = [0.6367188, 0.6701389, 0.5881076, 0.6506076];
        check("ifv", Part::Mlp, variance);
        let weight = [4.5, 2.25, 2.5, 3.5];
        let wifv = std::array::from_fn(|c| variance[c] * weight[c]);
        check("wifv", Part::Mlp, wifv);
        check("wifv", Part::Attention, wifv);
        check("magnitude", Part::Mlp, weight.map(f64::sqrt));
    }

    #[test]
    fn random_scores_depend_on_seed_and_sublayer_alone() {
        let draw = |seed, layer, part| {
            Score::from(Random { seed })
                .columns(layer, part, &stats())
                .unwrap()
        };
        assert_eq!(draw(1, 0, Part::Mlp), draw(1, 0, Part::Mlp));
        assert_ne!(draw(1, 0, Part::Mlp), draw(2, 0, Part::Mlp));
        assert_ne!(draw(1, 0, Part::Mlp), draw(1, 1, Part::Mlp));
        assert_ne!(draw(1, 0, Part::Mlp), draw(1, 0, Part::Attention));
    }

    #[test]
    fn a_name_finds_its_score_and_json_keeps_the_parameters() {
        for &name in Score::NAMES {
            assert_eq!(Score::named(name).unwrap().name(), name);
        }
        let score = Score::from(Random { seed: 7 });
        let json = serde_json::to_string(&score).unwrap();
        assert_eq!(json, r#"{"name":"random","seed":7}"#);
        assert_eq!(serde_json::from_str::<Score>(&json).unwrap(), score);
    }
}
