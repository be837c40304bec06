//! What can be removed from each half of a block, in which order, and what each step saves.
//!
//! An allocation only decides how many steps of each ranking to keep. Everything that restricts shapes is settled
//! before: whole KV groups, equal numbers of query heads in every group, widths that are multiples of an alignment,
//! minimum widths.

use crate::stats::{Part, standardise};
use crate::{Error, Result};
use causal_lm::config::QkNorm;
use causal_lm::{Decoder, LinearName};
use serde::{Deserialize, Serialize};

/// The unit that attention is pruned in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum AttentionUnit {
    /// A key/value head with all query heads that read it.
    KvGroup,
    /// One query head from every group (not the same index in each); keys and values stay.
    QueryHead,
}

impl AttentionUnit {
    /// KV groups where there are enough of them to choose from, else query heads.
    pub fn suggested(heads: usize, kv_heads: usize) -> Self {
        if kv_heads >= 4 || heads == kv_heads {
            Self::KvGroup
        } else {
            Self::QueryHead
        }
    }
}

/// Restrictions on the widths that may result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Shape {
    /// Unit of attention; `None` chooses by [`AttentionUnit::suggested`].
    pub attention_unit: Option<AttentionUnit>,
    /// Attention units that every layer keeps; 0 allows attention to be removed altogether.
    pub min_attention: usize,
    /// Neurons that every layer keeps; 0 allows the MLP to be removed altogether.
    pub min_neurons: usize,
    /// Neurons are removed so that their number stays a multiple of this.
    pub align_neurons: usize,
    /// The same widths in every layer: the nearest to the allocation.
    #[serde(default)]
    pub uniform: bool,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            attention_unit: None,
            min_attention: 1,
            min_neurons: 1,
            align_neurons: 1,
            uniform: false,
        }
    }
}

/// One step of a ranking: units that are removed together.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Units (KV heads, query heads or neurons) in the step.
    pub units: usize,
    /// Mean standardised score of the step's columns.
    pub score: f64,
    /// Parameters that removing it saves.
    pub cost: u64,
}

/// The units of one half of a block, best first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ranking {
    /// The block.
    pub layer: usize,
    /// Which half.
    pub part: Part,
    /// Steps at the front that must stay.
    pub protected: usize,
    /// Score of the whole half, not standardised, per parameter.
    pub energy: f64,
    /// Squared output error when the first k steps stay, for k = 0 ..= steps, where an allocation asked for it.
    pub errors: Option<Vec<f64>>,
    order: Vec<usize>,
    steps: Vec<Step>,
    /// Units and parameters of the first k steps, for k = 0 ..= steps.
    kept: Vec<(usize, u64)>,
}

impl Ranking {
    fn new(layer: usize, part: Part, order: Vec<usize>, steps: Vec<Step>) -> Self {
        let mut kept = Vec::with_capacity(steps.len() + 1);
        let mut sum = (0, 0);
        kept.push(sum);
        for step in &steps {
            sum = (sum.0 + step.units, sum.1 + step.cost);
            kept.push(sum);
        }
        Self {
            layer,
            part,
            protected: 0,
            energy: 0.0,
            errors: None,
            order,
            steps,
            kept,
        }
    }

    /// Ids of the units, best first: KV heads, query heads or neurons.
    pub fn order(&self) -> &[usize] {
        &self.order
    }

    /// The order cut into steps; their scores never rise.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Parameters of the first `steps` steps.
    pub fn cost(&self, steps: usize) -> u64 {
        self.kept[steps].1
    }

    /// Parameters of all steps.
    pub fn total(&self) -> u64 {
        self.cost(self.steps.len())
    }

    /// Number of units in the first `steps` steps.
    pub fn units_in(&self, steps: usize) -> usize {
        self.kept[steps].0
    }

    /// The number of steps that hold exactly `units` units, if there is one.
    pub fn steps_of(&self, units: usize) -> Option<usize> {
        self.kept
            .binary_search_by_key(&units, |&(units, _)| units)
            .ok()
    }

    /// The number of steps, `protected` ones at least, whose parameters are closest to `budget`; the fewer on a tie.
    pub fn nearest(&self, budget: f64) -> usize {
        let gap = |steps: usize| (self.cost(steps) as f64 - budget).abs();
        let above = self
            .kept
            .partition_point(|&(_, cost)| (cost as f64) < budget)
            .clamp(self.protected, self.steps.len());
        let below = above.saturating_sub(1).max(self.protected);
        // Steps without parameters of their own tie with the one before.
        let best = if gap(below) <= gap(above) {
            below
        } else {
            above
        };
        self.kept
            .partition_point(|&(_, cost)| cost < self.cost(best))
            .max(self.protected)
    }

    /// Ids of the units in the first `steps` steps, ascending.
    pub fn kept(&self, steps: usize) -> Vec<usize> {
        let mut kept = self.order[..self.units_in(steps)].to_vec();
        kept.sort_unstable();
        kept
    }

    /// Puts the units into another order and gives every step a score.
    pub(crate) fn reorder(&mut self, order: Vec<usize>, scores: impl IntoIterator<Item = f64>) {
        self.order = order;
        for (step, score) in self.steps.iter_mut().zip(scores) {
            step.score = score;
        }
    }

    /// The units of every sublayer in the order of their ids: costs and steps without a score.
    pub(crate) fn unscored(decoder: &Decoder<'_>, shape: &Shape) -> Result<Vec<Self>> {
        Self::by_columns(decoder, shape, |layer, part| {
            let widths = decoder.config().widths[layer];
            Ok(vec![
                0.0;
                match part {
                    Part::Attention => widths.heads * decoder.config().head_dim(layer),
                    Part::Mlp => widths.neurons,
                }
            ])
        })
    }

    /// Ranks the units of every sublayer by the mean score of their columns.
    pub(crate) fn by_columns(
        decoder: &Decoder<'_>,
        shape: &Shape,
        columns: impl Fn(usize, Part) -> Result<Vec<f64>>,
    ) -> Result<Vec<Self>> {
        let mut rankings = Vec::new();
        for (layer, widths) in decoder.config().widths.iter().enumerate() {
            let columns = |part| -> Result<(Vec<f64>, f64)> {
                let mut columns = columns(layer, part)?;
                let sum = columns.iter().sum();
                standardise(&mut columns);
                Ok((columns, sum))
            };
            let config = decoder.config();
            let hidden = config.hidden as u64;
            let rows = |name| rows_cost(decoder, layer, name);
            if widths.heads > 0 && prunes_attention(decoder, shape)? {
                let (scores, sum) = columns(Part::Attention)?;
                let d = config.head_dim(layer);
                let scores = means(&scores, d);
                // Per head: rows of q and columns of o, or rows of k and of v.
                let query = rows(LinearName::Q) / widths.heads as u64 + hidden * d as u64;
                let key_value =
                    (rows(LinearName::K) + rows(LinearName::V)) / widths.kv_heads as u64;
                let unit = shape
                    .attention_unit
                    .unwrap_or_else(|| AttentionUnit::suggested(widths.heads, widths.kv_heads));
                let ranking = match unit {
                    AttentionUnit::KvGroup => {
                        let group = widths.heads / widths.kv_heads;
                        Self::units(
                            layer,
                            Part::Attention,
                            &means(&scores, group),
                            group as u64 * query + key_value,
                            1,
                        )
                    }
                    AttentionUnit::QueryHead => {
                        Self::query_heads(layer, &scores, widths.kv_heads, query, key_value)
                    }
                };
                let ranking = ranking.protect("min_attention", shape.min_attention, 1)?;
                rankings.push(ranking.with_energy(sum));
            }
            if widths.neurons > 0 {
                let align = shape.align_neurons.max(1);
                if align > widths.neurons {
                    let width = widths.neurons;
                    return Err(Error::Width {
                        option: "align_neurons",
                        value: align,
                        layer,
                        width,
                    });
                }
                let neurons = widths.neurons as u64;
                let cost = (rows(LinearName::Gate) + rows(LinearName::Up)) / neurons + hidden;
                let (scores, sum) = columns(Part::Mlp)?;
                let ranking = Self::units(layer, Part::Mlp, &scores, cost, align);
                let ranking = ranking.protect("min_neurons", shape.min_neurons, align)?;
                rankings.push(ranking.with_energy(sum));
            }
        }
        Ok(rankings)
    }

    /// Units of equal cost in steps of `align`.
    pub fn units(layer: usize, part: Part, scores: &[f64], cost: u64, align: usize) -> Self {
        let order = best_first((0..scores.len()).collect(), scores);
        let steps = order
            .chunks(align)
            .map(|ids| Step {
                units: ids.len(),
                score: mean_of(ids, scores),
                cost: cost * ids.len() as u64,
            })
            .collect();
        Self::new(layer, part, order, steps)
    }

    /// Query heads in steps of one from every group; the last step to be removed takes keys and values.
    fn query_heads(
        layer: usize,
        scores: &[f64],
        kv_heads: usize,
        query: u64,
        key_value: u64,
    ) -> Self {
        let group = scores.len() / kv_heads;
        let groups: Vec<Vec<usize>> = (0..kv_heads)
            .map(|g| best_first((g * group..(g + 1) * group).collect(), scores))
            .collect();
        let mut order = Vec::with_capacity(scores.len());
        let mut steps = Vec::with_capacity(group);
        for slot in 0..group {
            let ids: Vec<usize> = groups.iter().map(|g| g[slot]).collect();
            let key_value = if slot == 0 { key_value } else { 0 };
            let cost = (query + key_value) * kv_heads as u64;
            steps.push(Step {
                units: kv_heads,
                score: mean_of(&ids, scores),
                cost,
            });
            order.extend(ids);
        }
        Self::new(layer, Part::Attention, order, steps)
    }

    fn with_energy(self, score: f64) -> Self {
        let energy = score / self.total() as f64;
        Self { energy, ..self }
    }

    fn protect(mut self, option: &'static str, minimum: usize, align: usize) -> Result<Self> {
        self.protected = minimum.div_ceil(align);
        if self.protected > self.steps.len() {
            let width = self.steps.len() * align;
            return Err(Error::Width {
                option,
                value: minimum,
                layer: self.layer,
                width,
            });
        }
        Ok(self)
    }
}

/// Parameters of all rows of a linear: its weights, and its bias where it has one.
fn rows_cost(decoder: &Decoder<'_>, layer: usize, name: LinearName) -> u64 {
    let Some([rows, inputs]) = decoder.config().linear_shape(layer, name) else {
        return 0;
    };
    rows as u64 * (inputs as u64 + u64::from(decoder.has_bias(layer, name)))
}

/// Whether heads can be removed: not where queries and keys of all heads are normalised together, because removing some
/// would change the others.
fn prunes_attention(decoder: &Decoder<'_>, shape: &Shape) -> Result<bool> {
    match (decoder.config().qk_norm, shape.attention_unit) {
        (QkNorm::Projection, Some(_)) => Err(Error::Attention {
            model_type: decoder.config().model_type,
        }),
        (QkNorm::Projection, None) => Ok(false),
        _ => Ok(true),
    }
}

/// Means of consecutive runs of `width`.
fn means(values: &[f64], width: usize) -> Vec<f64> {
    values
        .chunks_exact(width)
        .map(|run| run.iter().sum::<f64>() / width as f64)
        .collect()
}

fn mean_of(ids: &[usize], scores: &[f64]) -> f64 {
    ids.iter().map(|&id| scores[id]).sum::<f64>() / ids.len() as f64
}

/// Equal scores go by id, so that results never depend on the sort.
fn best_first(mut ids: Vec<usize>, scores: &[f64]) -> Vec<usize> {
    ids.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    ids
}

/// Sorts `(ranking, step)` pairs best first: by score, then layer, part and step.
pub(crate) fn pool(rankings: &[Ranking], part: Option<Part>) -> Vec<(usize, usize)> {
    let mut pool: Vec<(usize, usize)> = rankings
        .iter()
        .enumerate()
        .filter(|(_, r)| part.is_none_or(|part| r.part == part))
        .flat_map(|(i, r)| (r.protected..r.steps.len()).map(move |step| (i, step)))
        .collect();
    let score = |&(i, step): &(usize, usize)| rankings[i].steps[step].score;
    let place = |&(i, step): &(usize, usize)| (rankings[i].layer, rankings[i].part, step);
    pool.sort_by(|a, b| {
        score(b)
            .total_cmp(&score(a))
            .then_with(|| place(a).cmp(&place(b)))
    });
    pool
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_nearest_number_of_steps_is_the_one_that_a_search_of_all_finds(
            units in 1usize..40,
            align in 1usize..5,
            protected in 0usize..5,
            budget in -5.0f64..500.0,
        ) {
            let mut ranking = Ranking::units(0, Part::Mlp, &vec![0.0; units], 7, align);
            ranking.protected = protected.min(ranking.steps().len());
            let mut best = ranking.protected;
            for steps in ranking.protected..=ranking.steps().len() {
                let gap = |steps| (ranking.cost(steps) as f64 - budget).abs();
                if gap(steps) < gap(best) {
                    best = steps;
                }
            }
            prop_assert_eq!(ranking.nearest(budget), best);
        }

        #[test]
        fn units_and_costs_of_the_first_steps_are_sums(units in 1usize..40, align in 1usize..5) {
            let ranking = Ranking::units(0, Part::Mlp, &vec![0.0; units], 7, align);
            for steps in 0..=ranking.steps().len() {
                let first = &ranking.steps()[..steps];
                prop_assert_eq!(ranking.cost(steps), first.iter().map(|s| s.cost).sum::<u64>());
                prop_assert_eq!(ranking.units_in(steps), first.iter().map(|s| s.units).sum::<usize>());
                prop_assert_eq!(ranking.steps_of(ranking.units_in(steps)), Some(steps));
            }
            prop_assert_eq!(ranking.steps_of(units + 1), None);
        }
    }
}
