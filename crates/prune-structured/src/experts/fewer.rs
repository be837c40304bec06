//! Fewer experts for each token: less work, the same bytes.
//!
//! With normalised gates the k' that are left sum to 1 again, so that the output is too large; factors take that back.
//! All are fitted to the dense output of the layer in one pass.

use super::collect::Collector;
use super::compensation::Moments;
use super::layer::{Batch, Layer};
use super::plan::{ExpertPlan, LayerExperts};
use super::regression::Regression;
use super::routing::restricted;
use crate::{Error, Result};
use causal_lm::mixture::{LinearTerm, RoutingRule};
use causal_lm::{Decoder, Hidden, NoTap, Progress, Windows};
use serde::{Deserialize, Serialize};

/// What makes up for experts that a token is no longer sent to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum FewerExperts {
    /// Nothing.
    #[default]
    Plain,
    /// One factor for each layer.
    Scale,
    /// One factor for each expert.
    ExpertScale,
    /// One factor for each expert and output channel.
    ChannelScale,
}

/// A linear term beside the experts of a layer, and what it is good for: Σ over tokens of squared norms.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct FittedTerm {
    /// B A.
    pub term: LinearTerm,
    /// Of the dense output y.
    pub output: f64,
    /// Of y − αŷ: what fewer experts leave of it, with the best factor.
    pub scaled: f64,
    /// Of y − αŷ − B A x.
    pub left: f64,
}

/// How strongly factors are drawn to 1.
const RIDGE: f64 = 0.01;

/// Sends each token to `chosen` experts; a step of `progress` is a layer.
///
/// # Errors
/// [`Error::Option`] for no experts or more than now, [`Error::Unsupported`] for a model without experts,
/// [`Error::Cancelled`], and what running the model reports.
pub fn fewer(
    decoder: &Decoder<'_>,
    windows: &Windows,
    chosen: usize,
    factors: FewerExperts,
    progress: &dyn Progress,
) -> Result<ExpertPlan> {
    let fit = |layer: Layer<'_>, rule: RoutingRule| of_layer(&layer, rule, factors);
    planned(decoder, windows, chosen, fit, progress)
}

/// The same with one factor for each layer, and beside its experts a linear term of rank `rank` at most, fitted to what is
/// left of the dense output. It is there to be compared with, for it shows what a linear repair could give: no stock format
/// holds the terms, which [`Decoder::with_terms`] adds to the model that the plan leaves. One for each layer, `None` for those
/// without experts and where nothing changes.
///
/// # Errors
/// As [`fewer`], and [`Error::Option`] for a rank of 0.
pub fn fewer_with_terms(
    decoder: &Decoder<'_>,
    windows: &Windows,
    chosen: usize,
    rank: usize,
    progress: &dyn Progress,
) -> Result<(ExpertPlan, Vec<Option<FittedTerm>>)> {
    let hidden = decoder.config().hidden;
    check_rank(rank, hidden)?;
    let mut terms = vec![None; decoder.config().layers()];
    let fit = |layer: Layer<'_>, rule: RoutingRule| {
        let sums = Regression::of(&layer, rule, hidden)?;
        if let Some(fit) = sums.solve(rank, layer.index)? {
            terms[layer.index] = Some(FittedTerm {
                term: fit.term()?,
                output: sums.output(),
                scaled: sums.residual(),
                left: fit.error,
            });
        }
        Ok(vec![vec![sums.factor()]; layer.experts()])
    };
    let plan = planned(decoder, windows, chosen, fit, progress)?;
    Ok((plan, terms))
}

/// Refuses ranks that a product of a layer's width cannot have.
pub(crate) fn check_rank(rank: usize, hidden: usize) -> Result<()> {
    match (1..=hidden).contains(&rank) {
        true => Ok(()),
        false => Err(Error::Option {
            option: "rank",
            value: rank as f64,
            expected: "at least 1 and no more than the hidden size are expected",
        }),
    }
}

/// The plan with the factors that `fit` gives each layer, for which it is called with the rule of fewer experts.
fn planned(
    decoder: &Decoder<'_>,
    windows: &Windows,
    chosen: usize,
    mut fit: impl FnMut(Layer<'_>, RoutingRule) -> Result<Vec<Vec<f64>>>,
    progress: &dyn Progress,
) -> Result<ExpertPlan> {
    let mixtures = &decoder.config().mixtures;
    let Some(now) = mixtures
        .iter()
        .flatten()
        .map(|mixture| mixture.chosen)
        .min()
    else {
        return Err(Error::Unsupported {
            method: "fewer experts for each token",
            model_type: decoder.config().model_type,
            reason: "it has no experts",
        });
    };
    decoder
        .config()
        .refuse_expert_map("sending tokens to fewer experts")?;
    if chosen == 0 || chosen > now {
        return Err(Error::Option {
            option: "chosen",
            value: chosen as f64,
            expected: "at least 1 and no more than the model's own number are expected",
        });
    }
    progress.begin("fewer experts", mixtures.len() as u64);
    let mut hidden = Hidden::embed(decoder, windows)?;
    let mut plan = ExpertPlan {
        chosen: (chosen < now).then_some(chosen),
        ..ExpertPlan::default()
    };
    for (layer, mixture) in mixtures.iter().enumerate() {
        let Some(mixture) = mixture else {
            hidden.advance_stored(decoder, layer, &mut NoTap)?;
            plan.layers.push(None);
            progress.advance(1)?;
            continue;
        };
        let mut collector = Collector::default();
        hidden.advance_stored(decoder, layer, &mut collector)?;
        let rule = RoutingRule {
            chosen: mixture.chosen,
            normalise: mixture.normalise,
        };
        let seen = Layer::new((decoder, layer), rule, collector, progress);
        let mut experts = LayerExperts::keep(mixture.experts, (0..mixture.experts).collect());
        if chosen < mixture.chosen {
            experts.factors = fit(seen, RoutingRule { chosen, ..rule })?;
        }
        plan.layers.push(Some(experts));
        progress.advance(1)?;
    }
    Ok(plan)
}

fn of_layer(layer: &Layer<'_>, rule: RoutingRule, factors: FewerExperts) -> Result<Vec<Vec<f64>>> {
    let all: Vec<usize> = (0..layer.experts()).collect();
    Ok(match factors {
        FewerExperts::Plain => vec![vec![]; all.len()],
        FewerExperts::Scale => {
            let factor = Moments::of(layer, rule, &all)?.one_factor();
            vec![vec![factor]; all.len()]
        }
        FewerExperts::ExpertScale => {
            let factors = Moments::of(layer, rule, &all)?.solve(RIDGE, layer.index)?;
            factors.into_iter().map(|factor| vec![factor]).collect()
        }
        FewerExperts::ChannelScale => {
            let mut channels = Channels::new(all.len());
            layer.for_each_rerouted(&all, |batch| {
                channels.add(batch, rule);
                Ok(())
            })?;
            channels.solve(layer.index)?
        }
    })
}

/// Second moments of what experts add, channel by channel.
struct Channels {
    experts: usize,
    width: usize,
    /// For each channel Σ v_e v_f, row by row.
    products: Vec<f64>,
    /// For each channel Σ v_e y.
    targets: Vec<f64>,
}

impl Channels {
    fn new(experts: usize) -> Self {
        Self {
            experts,
            width: 0,
            products: vec![],
            targets: vec![],
        }
    }

    fn add(&mut self, batch: Batch<'_>, rule: RoutingRule) {
        let (experts, width) = (self.experts, batch.outputs.width);
        self.width = width;
        self.products.resize(width * experts * experts, 0.0);
        self.targets.resize(width * experts, 0.0);
        for token in 0..batch.outputs.tokens {
            let y = batch.sum(token, batch.gates(token));
            let gates = restricted(rule, batch.logits(token), |_| true);
            for &(a, gate) in &gates {
                let v = batch.outputs.row(token, a);
                for (channel, (&x, y)) in v.iter().zip(&y).enumerate() {
                    self.targets[channel * experts + a] += gate * f64::from(x) * y;
                }
                for &(b, other) in &gates {
                    let w = batch.outputs.row(token, b);
                    for (channel, (&x, &z)) in v.iter().zip(w).enumerate() {
                        self.products[(channel * experts + a) * experts + b] +=
                            gate * other * f64::from(x) * f64::from(z);
                    }
                }
            }
        }
    }

    /// For each expert its factors.
    fn solve(&self, layer: usize) -> Result<Vec<Vec<f64>>> {
        let (experts, size) = (self.experts, self.experts * self.experts);
        let of_channel = |channel: usize| {
            let moments = Moments {
                products: self.products[channel * size..][..size].to_vec(),
                targets: self.targets[channel * experts..][..experts].to_vec(),
                energy: 0.0,
            };
            moments.solve(RIDGE, layer)
        };
        let channels: Vec<Vec<f64>> = (0..self.width).map(of_channel).collect::<Result<_>>()?;
        let of_expert = |expert: usize| channels.iter().map(|channel| channel[expert]).collect();
        Ok((0..experts).map(of_expert).collect())
    }
}
