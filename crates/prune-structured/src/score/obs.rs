//! The order in which optimal brain surgeon eliminates units: see [`crate::obs`].

use super::Scoring;
use crate::obs::{self, Rounds};
use crate::ranking::{Ranking, Shape};
use crate::stats::{ColumnStats, Needs, Part};
use crate::{Calibration, Error, Result};
use causal_lm::{Decoder, Progress};
use serde::{Deserialize, Serialize};

/// Týr-the-Pruner's elimination order (arXiv 2503.09657).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Obs {
    /// Units eliminated between two scorings; `None` chooses by [`Rounds::suggested`].
    pub rounds: Option<Rounds>,
}

impl Scoring for Obs {
    fn columns(&self, layer: usize, _part: Part, _stats: &ColumnStats) -> Result<Vec<f64>> {
        Err(Error::Missing {
            layer,
            what: "a score of single columns",
            need: "obs ranks whole units",
        })
    }

    fn needs(&self) -> Needs {
        Needs {
            gram: true,
            ..Needs::default()
        }
    }

    fn rank(
        &self,
        decoder: &Decoder<'_>,
        calibration: &Calibration,
        shape: &Shape,
        progress: &dyn Progress,
    ) -> Result<Vec<Ranking>> {
        obs::rank(decoder, calibration, self.rounds, shape, progress)
    }
}
