//! Allocation: how many parameters each half of each block gives up.
//!
//! A ratio counts the parameters that belong to removable units: the linears of the blocks, not
//! embeddings, head and norms. All allocations work on standardised scores and true unit costs.

use crate::flap::compat;
use crate::ranking::{Ranking, Step, pool};
use crate::rate_distortion::{self, Distortion};
use crate::stats::Part;
use crate::structprune;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// How a budget is spread.
///
/// FLAP's four strategies: AL compares scores across layers, UL gives every layer the same share;
/// AM compares attention with MLP, MM gives both the same share.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Allocation {
    /// One cut through all units of the model.
    AlAm,
    /// One cut through all attention units, one through all neurons.
    AlMm,
    /// The same share of every layer: attention rounded to whole units, the MLP making up for it.
    UlMm,
    /// The same share of every sublayer, each rounded to whole units.
    UlUm,
    /// AL-AM as FLAP's published implementation cuts it: see [`crate::flap::compat`].
    FlapCompat,
    /// Each sublayer's share of its own parameters falls with its energy: see
    /// [`crate::structprune`].
    ClosedForm {
        /// No sublayer loses more than this share of its parameters.
        max_ratio: f64,
    },
    /// A softmax over the energies shares out what is removed: see [`crate::structprune`].
    Softmax {
        /// Above 0: small takes all from the weakest sublayers, large the same from each.
        temperature: f64,
        /// No sublayer loses more than this share of its parameters.
        max_ratio: f64,
    },
    /// The least sum of the sublayers' output errors: see [`crate::rate_distortion`].
    RdDp {
        /// What is added up; [`rate_distortion::measure`] replaces it by a measurement.
        distortion: Distortion,
        /// Whether error curves are replaced by their convex hulls.
        convex: bool,
    },
    /// What a search over whole models has found: see [`crate::tyr`].
    Searched,
}

impl Allocation {
    /// Steps that each ranking keeps when `ratio` of the prunable parameters goes, `added`
    /// parameters (of a compensation) being counted against what is removed.
    ///
    /// AL-AM and AL-MM end within one step of the ratio, UL-MM within one step of every MLP, UL-UM
    /// within one step of every sublayer, RD-DP never above the budget, unless protected steps
    /// stand in the way.
    ///
    /// # Errors
    /// [`Error::Ratio`] outside `[0, 1)`; [`Error::Unreachable`] when protected steps alone exceed
    /// the budget; [`Error::Option`] for a temperature or largest share that means nothing;
    /// [`Error::Missing`] for what rankings alone do not tell.
    pub fn keep(self, rankings: &[Ranking], ratio: f64, added: u64) -> Result<Vec<usize>> {
        if !(0.0..1.0).contains(&ratio) {
            return Err(Error::Ratio(ratio));
        }
        let total = total(rankings);
        let kept: u64 = rankings.iter().map(|r| r.cost(r.protected)).sum();
        let largest = rankings
            .iter()
            .flat_map(|r| &r.steps)
            .map(|s| s.cost)
            .max()
            .unwrap_or(0);
        if ratio == 0.0 {
            return Ok(rankings.iter().map(|r| r.steps.len()).collect());
        }
        let budget = budget(rankings, ratio, added);
        // The share that each ranking may keep of its own cost.
        let share = budget / total as f64;
        if kept as f64 > budget + largest as f64 {
            return Err(Error::Unreachable { ratio, kept, total });
        }
        let mut keep: Vec<usize> = rankings.iter().map(|r| r.protected).collect();
        match self {
            Self::FlapCompat => keep = compat::keep(rankings, ratio),
            Self::RdDp { convex, .. } => keep = rate_distortion::keep(rankings, budget, convex)?,
            Self::Searched => {
                return Err(Error::Missing {
                    layer: 0,
                    what: "the result of a search",
                    need: "tyr::search makes the plan",
                });
            }
            Self::AlAm => cut(rankings, None, budget, &mut keep),
            Self::AlMm => {
                let attention = |steps: &dyn Fn(usize, &Ranking) -> usize| -> u64 {
                    let of_part = rankings
                        .iter()
                        .enumerate()
                        .filter(|(_, r)| r.part == Part::Attention);
                    of_part.map(|(i, r)| r.cost(steps(i, r))).sum()
                };
                let whole = attention(&|_, r| r.steps.len());
                cut(
                    rankings,
                    Some(Part::Attention),
                    whole as f64 * share,
                    &mut keep,
                );
                let spent = attention(&|i, _| keep[i]);
                cut(rankings, Some(Part::Mlp), budget - spent as f64, &mut keep);
            }
            Self::UlMm => {
                // Rankings are in layer order, attention first: what it missed, its MLP makes up.
                let mut owed = (usize::MAX, 0.0);
                for (i, ranking) in rankings.iter().enumerate() {
                    let due = ranking.cost(ranking.steps.len()) as f64 * share;
                    let owed_here = if owed.0 == ranking.layer { owed.1 } else { 0.0 };
                    keep[i] = nearest(ranking, due + owed_here);
                    owed = (
                        ranking.layer,
                        due + owed_here - ranking.cost(keep[i]) as f64,
                    );
                }
            }
            Self::UlUm => {
                for (i, ranking) in rankings.iter().enumerate() {
                    keep[i] = nearest(ranking, ranking.cost(ranking.steps.len()) as f64 * share);
                }
            }
            Self::ClosedForm { max_ratio } => {
                let weights = structprune::closed_form(rankings);
                keep = structprune::keep(rankings, &weights, max_ratio, (ratio, budget))?;
            }
            Self::Softmax {
                temperature,
                max_ratio,
            } => {
                let weights = structprune::softmax(rankings, temperature)?;
                keep = structprune::keep(rankings, &weights, max_ratio, (ratio, budget))?;
            }
        }
        Ok(keep)
    }
}

/// Parameters of all units.
pub(crate) fn total(rankings: &[Ranking]) -> u64 {
    rankings.iter().map(|r| r.cost(r.steps.len())).sum()
}

/// Parameters that stay at a ratio, `added` ones of a compensation counted against it.
pub(crate) fn budget(rankings: &[Ranking], ratio: f64, added: u64) -> f64 {
    total(rankings) as f64 * (1.0 - ratio) - added as f64
}

/// Keeps the best steps of one part, or of all, up to the cumulated cost closest to `budget`.
fn cut(rankings: &[Ranking], part: Option<Part>, budget: f64, keep: &mut [usize]) {
    let of_part = |r: &&Ranking| part.is_none_or(|part| r.part == part);
    let protected: u64 = rankings
        .iter()
        .filter(of_part)
        .map(|r| r.cost(r.protected))
        .sum();
    let pool = pool(rankings, part);
    let mut spent = protected;
    let mut best = ((protected as f64 - budget).abs(), 0);
    for (count, &(i, step)) in pool.iter().enumerate() {
        spent += rankings[i].steps[step].cost;
        let gap = (spent as f64 - budget).abs();
        if gap < best.0 {
            best = (gap, count + 1);
        }
    }
    for &(i, _) in &pool[..best.1] {
        keep[i] += 1;
    }
}

/// Steps of one ranking whose cost is closest to `budget`, the fewer on a tie.
fn nearest(ranking: &Ranking, budget: f64) -> usize {
    let mut spent = ranking.cost(ranking.protected);
    let mut best = ((spent as f64 - budget).abs(), ranking.protected);
    for (step, Step { cost, .. }) in ranking.steps.iter().enumerate().skip(ranking.protected) {
        spent += cost;
        let gap = (spent as f64 - budget).abs();
        if gap < best.0 {
            best = (gap, step + 1);
        }
    }
    best.1
}
