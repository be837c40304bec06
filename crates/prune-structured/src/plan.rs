//! Plans: what is kept of every block, as plain data.
//!
//! A plan is made from calibration statistics alone and can be printed, saved and compared before
//! any weight is touched. Writing it does not depend on the method that made it.

use crate::allocation::{Budget, equalise};
use crate::compensation::Compensation;
use crate::ranking::Ranking;
use crate::recipe::Recipe;
use crate::stats::Part;
use crate::{Calibration, Error, Result};
use causal_lm::config::QkNorm;
use causal_lm::{Decoder, Progress, Widths};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// What one block keeps: ids in the dense model, ascending.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerPlan {
    /// Query heads.
    pub heads: Vec<usize>,
    /// Key/value heads.
    pub kv_heads: Vec<usize>,
    /// MLP neurons.
    pub neurons: Vec<usize>,
}

impl LayerPlan {
    /// Everything that a block of these widths has.
    pub fn whole(widths: Widths) -> Self {
        Self {
            heads: (0..widths.heads).collect(),
            kv_heads: (0..widths.kv_heads).collect(),
            neurons: (0..widths.neurons).collect(),
        }
    }

    /// The widths that result.
    pub fn widths(&self) -> Widths {
        Widths {
            heads: self.heads.len(),
            kv_heads: self.kv_heads.len(),
            neurons: self.neurons.len(),
        }
    }

    /// Keeps the ascending units `kept` of a ranking over a half of a block of `dense` widths.
    pub fn keep(&mut self, dense: Widths, ranking: &Ranking, kept: Vec<usize>) {
        match ranking.part {
            Part::Mlp => self.neurons = kept,
            // Whole groups: the units are key/value heads.
            Part::Attention if ranking.order().len() == dense.kv_heads => {
                let group = dense.heads / dense.kv_heads;
                self.heads = kept
                    .iter()
                    .flat_map(|kv| kv * group..(kv + 1) * group)
                    .collect();
                self.kv_heads = kept;
            }
            Part::Attention => {
                self.kv_heads = if kept.is_empty() {
                    vec![]
                } else {
                    (0..dense.kv_heads).collect()
                };
                self.heads = kept;
            }
        }
    }
}

/// What is kept of a model, and what compensates for the rest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The method that made it.
    pub recipe: Recipe,
    /// The ratio to remove.
    pub ratio: f64,
    /// What compensates for the removed units.
    pub compensation: Compensation,
    /// One entry per block.
    pub layers: Vec<LayerPlan>,
}

impl Plan {
    /// Scores, ranks and allocates; a step of `progress` is a sublayer, where the method takes long.
    ///
    /// # Errors
    /// [`Error::Ratio`], [`Error::Unreachable`] and [`Error::Width`] for what cannot be asked of
    /// this model; [`Error::Missing`] when the score reads statistics that were not collected;
    /// [`Error::Cancelled`].
    pub fn make(
        decoder: &Decoder<'_>,
        calibration: &Calibration,
        recipe: &Recipe,
        ratio: f64,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let (score, shape) = (&recipe.score, &recipe.shape);
        let mut rankings = score.rank(decoder, calibration, shape, progress)?;
        recipe.allocation.method().prepare(
            decoder,
            calibration,
            recipe.compensation(decoder),
            &mut rankings,
            progress,
        )?;
        Self::allocate(decoder, &rankings, recipe, ratio)
    }

    /// Allocates the budget over given rankings.
    ///
    /// # Errors
    /// As [`Allocation::keep`](crate::Allocation::keep), and [`Error::Unsupported`] where nothing can be pruned.
    pub fn allocate(
        decoder: &Decoder<'_>,
        rankings: &[Ranking],
        recipe: &Recipe,
        ratio: f64,
    ) -> Result<Self> {
        prunable(decoder, rankings, ratio)?;
        let compensation = recipe.compensation(decoder);
        let added = compensation.added(decoder);
        let mut keep = recipe.allocation.keep(rankings, ratio, added)?;
        if recipe.shape.uniform && ratio > 0.0 {
            let budget = Budget::new(rankings, ratio, added);
            keep = equalise(decoder, rankings, &keep, budget)?;
        }
        let dense = &decoder.config().widths;
        let mut layers: Vec<LayerPlan> = dense.iter().map(|&w| LayerPlan::whole(w)).collect();
        for (ranking, steps) in rankings.iter().zip(keep) {
            let layer = ranking.layer;
            layers[layer].keep(dense[layer], ranking, ranking.kept(steps));
        }
        Ok(Self {
            recipe: recipe.clone(),
            ratio,
            compensation,
            layers,
        })
    }

    /// Widths of every block.
    pub fn widths(&self) -> Vec<Widths> {
        self.layers.iter().map(LayerPlan::widths).collect()
    }

    /// Whether nothing is removed.
    pub fn is_identity(&self, decoder: &Decoder<'_>) -> bool {
        self.widths() == decoder.config().widths
    }

    /// Whether all blocks keep the same widths and none loses a half.
    pub fn is_uniform(&self) -> bool {
        let widths = self.widths();
        let whole = |w: &Widths| w.heads > 0 && w.neurons > 0;
        widths.iter().all(|w| whole(w) && *w == widths[0])
    }

    /// Checks that the plan is one for this model.
    ///
    /// # Errors
    /// [`Error::PlanMismatch`] with the first thing that does not fit.
    pub fn check(&self, decoder: &Decoder<'_>) -> Result<()> {
        let dense = &decoder.config().widths;
        let mismatch = |reason: String| Err(Error::PlanMismatch(reason));
        decoder
            .config()
            .refuse_expert_map("pruning attention and MLPs")?;
        if self.layers.len() != dense.len() {
            return mismatch(format!(
                "it has {} layers, the model {}",
                self.layers.len(),
                dense.len()
            ));
        }
        for (layer, (plan, dense)) in self.layers.iter().zip(dense).enumerate() {
            for (what, ids, width) in [
                ("query heads", &plan.heads, dense.heads),
                ("key/value heads", &plan.kv_heads, dense.kv_heads),
                ("neurons", &plan.neurons, dense.neurons),
            ] {
                if !ids.is_sorted_by(|a, b| a < b) || ids.last().is_some_and(|&id| id >= width) {
                    return mismatch(format!(
                        "layer {layer}: {what} must be ascending ids below {width}"
                    ));
                }
            }
            if decoder.config().qk_norm == QkNorm::Projection && plan.heads.len() != dense.heads {
                return Err(Error::Attention {
                    model_type: decoder.config().model_type,
                });
            }
            // Every kept key/value head must keep the same number of the query heads that read it.
            let group = dense.heads.checked_div(dense.kv_heads).unwrap_or(1);
            let readers = |kv: usize| {
                plan.heads
                    .iter()
                    .filter(|&&head| head / group == kv)
                    .count()
            };
            let each = plan
                .heads
                .len()
                .checked_div(plan.kv_heads.len())
                .unwrap_or(0);
            if each * plan.kv_heads.len() != plan.heads.len()
                || plan.kv_heads.iter().any(|&kv| readers(kv) != each)
            {
                return mismatch(format!(
                    "layer {layer}: key/value heads must keep equally many query heads"
                ));
            }
        }
        Ok(())
    }

    /// Reads a plan from JSON.
    ///
    /// # Errors
    /// [`Error::PlanFile`] when the file cannot be read or is not a plan.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|e| plan_file(path, e))?;
        serde_json::from_slice(&bytes).map_err(|e| plan_file(path, e))
    }

    /// Writes it as JSON, whole or not at all.
    ///
    /// # Errors
    /// [`Error::PlanFile`] when the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        tensor_io::atomic::write_json(path, self).map_err(|e| plan_file(path, e))
    }
}

/// Refuses to prune what has nothing that could be pruned.
pub(crate) fn prunable(decoder: &Decoder<'_>, rankings: &[Ranking], ratio: f64) -> Result<()> {
    match rankings.is_empty() && ratio > 0.0 {
        false => Ok(()),
        true => Err(Error::Unsupported {
            method: "structured pruning of heads and neurons",
            model_type: decoder.config().model_type,
            reason: "no layer has heads or an MLP that could be pruned; prune its experts",
        }),
    }
}

pub(crate) fn plan_file(path: &Path, reason: impl ToString) -> Error {
    Error::PlanFile {
        path: path.into(),
        reason: reason.to_string(),
    }
}
