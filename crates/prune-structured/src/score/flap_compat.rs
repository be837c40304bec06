//! WIFV with the arithmetic of FLAP's published implementation: its fluctuation in place of the variance, and the score
//! of o_proj squared once more, that of down_proj not.

use super::{Scoring, weighted};
use crate::stats::{ColumnStats, Needs, Part};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// FLAP's score as its published implementation computes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlapCompat;

impl Scoring for FlapCompat {
    fn columns(&self, layer: usize, part: Part, stats: &ColumnStats) -> Result<Vec<f64>> {
        let fluctuation = stats.fluctuation.as_ref().ok_or(Error::Missing {
            layer,
            what: "the fluctuation of the published implementation",
            need: "ask for it when calibrating",
        })?;
        let weights = stats.plain_square.as_ref().unwrap_or(&stats.weight_square);
        let mut scores = weighted(fluctuation.value.iter().copied(), weights);
        if part == Part::Attention {
            scores.iter_mut().for_each(|score| *score *= *score);
        }
        Ok(scores)
    }

    fn needs(&self) -> Needs {
        Needs {
            fluctuation: true,
            ..Needs::default()
        }
    }
}
