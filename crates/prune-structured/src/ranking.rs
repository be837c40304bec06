//! What can be removed from each half of a block, in which order, and what each step saves.
//!
//! An allocation only decides how many steps of each ranking to keep. Everything that restricts
//! shapes is settled before: whole KV groups, equal numbers of query heads in every group, widths
//! that are multiples of an alignment, minimum widths.

use crate::score::standardise;
use crate::stats::Part;
use crate::{Calibration, Error, Result, Score};
use causal_lm::{Decoder, LinearName};
use serde::{Deserialize, Serialize};

/// The unit that attention is pruned in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
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
pub struct Shape {
    /// Unit of attention; `None` chooses by [`AttentionUnit::suggested`].
    pub attention_unit: Option<AttentionUnit>,
    /// Attention units that every layer keeps; 0 allows attention to go altogether.
    pub min_attention: usize,
    /// Neurons that every layer keeps; 0 allows the MLP to go altogether.
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

/// One step of a ranking: units that go together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// Units (KV heads, query heads or neurons) in the step.
    pub units: usize,
    /// Mean standardised score of the step's columns.
    pub score: f64,
    /// Parameters that removing it saves.
    pub cost: u64,
}

/// The units of one half of a block, best first.
#[derive(Clone, Debug)]
pub struct Ranking {
    /// The block.
    pub layer: usize,
    /// Which half.
    pub part: Part,
    /// Ids of the units, best first: KV heads, query heads or neurons.
    pub order: Vec<usize>,
    /// The order cut into steps; their scores never rise.
    pub steps: Vec<Step>,
    /// Steps at the front that must stay.
    pub protected: usize,
    /// Score of the whole half, not standardised, per parameter.
    pub energy: f64,
    /// Squared output error when the first k steps stay, for k = 0 ..= steps, where an allocation
    /// asked for it.
    pub errors: Option<Vec<f64>>,
}

impl Ranking {
    /// Parameters of the first `steps` steps.
    pub fn cost(&self, steps: usize) -> u64 {
        self.steps[..steps].iter().map(|step| step.cost).sum()
    }

    /// Ids of the units in the first `steps` steps, ascending.
    pub fn kept(&self, steps: usize) -> Vec<usize> {
        let units = self.steps[..steps].iter().map(|step| step.units).sum();
        let mut kept = self.order[..units].to_vec();
        kept.sort_unstable();
        kept
    }

    /// Ranks the units of every sublayer of a model.
    ///
    /// # Errors
    /// [`Error::Width`] for a minimum or alignment that a layer cannot satisfy, and what the
    /// score reports.
    pub fn all(
        decoder: &Decoder<'_>,
        calibration: &Calibration,
        score: Score,
        shape: &Shape,
    ) -> Result<Vec<Self>> {
        if let Score::Obs { rounds } = score {
            return crate::obs::rank(decoder, calibration, rounds, shape);
        }
        Self::by_columns(decoder, shape, |layer, part| {
            score.columns(layer, part, calibration.part(layer, part)?)
        })
    }

    /// The units of every sublayer in the order of their ids: costs and steps without a score.
    pub(crate) fn unscored(decoder: &Decoder<'_>, shape: &Shape) -> Result<Vec<Self>> {
        Self::by_columns(decoder, shape, |layer, part| {
            let widths = decoder.config().widths[layer];
            Ok(vec![
                0.0;
                match part {
                    Part::Attention => widths.heads * decoder.config().head_dim,
                    Part::Mlp => widths.neurons,
                }
            ])
        })
    }

    fn by_columns(
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
            let rows = |name| rows_cost(decoder, layer, name);
            if widths.heads > 0 {
                let (scores, sum) = columns(Part::Attention)?;
                let scores = means(&scores, decoder.config().head_dim);
                // Per head: rows of q and columns of o, or rows of k and of v.
                let query = (rows(LinearName::Q) + decoder.config().hidden as u64)
                    * decoder.config().head_dim as u64;
                let key_value =
                    (rows(LinearName::K) + rows(LinearName::V)) * decoder.config().head_dim as u64;
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
                let cost =
                    rows(LinearName::Gate) + rows(LinearName::Up) + decoder.config().hidden as u64;
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
        Self {
            layer,
            part,
            order,
            steps,
            protected: 0,
            energy: 0.0,
            errors: None,
        }
    }

    /// Query heads in steps of one from every group; the last step to go takes keys and values.
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
        Self {
            layer,
            part: Part::Attention,
            order,
            steps,
            protected: 0,
            energy: 0.0,
            errors: None,
        }
    }

    fn with_energy(self, score: f64) -> Self {
        let energy = score / self.cost(self.steps.len()) as f64;
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

/// Parameters of one output row of a linear: its weights, and its bias where it has one.
fn rows_cost(decoder: &Decoder<'_>, layer: usize, name: LinearName) -> u64 {
    decoder.config().hidden as u64 + u64::from(decoder.checkpoint().contains(&name.bias(layer)))
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
