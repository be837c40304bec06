//! One pass through the model that chooses the experts of each layer.

use super::collect::Collector;
use super::compensation::{Moments, Novice};
use super::layer::Layer;
use super::merge;
use super::method::Choice;
use super::plan::{ExpertPlan, LayerExperts};
use super::{ExpertOptions, ExpertRefits, FittedTerm, Keep, LayerStatistics};
use crate::{Error, Result};
use causal_lm::mixture::{MappedRows, RoutingRule};
use causal_lm::{Decoder, Hidden, NoTap, Progress, Tap, Windows};
use serde::Serialize;

/// A plan, and what was seen on the way to it.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Outcome {
    /// The experts that stay.
    pub plan: ExpertPlan,
    /// Every layer with experts.
    pub layers: Vec<LayerOutcome>,
    /// KL divergence of the predictions from the dense model's, in nats per position, where it decided.
    pub divergence: Option<f64>,
    /// What the plan adds to the output of each layer's experts, for [`Decoder::with_terms`] of the model that it leaves; nothing
    /// for plans that checkpoints hold whole.
    #[serde(skip)]
    pub terms: Vec<Option<FittedTerm>>,
}

/// What was seen of a layer's experts.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct LayerOutcome {
    /// The layer.
    pub layer: usize,
    /// Statistics of its experts.
    pub statistics: LayerStatistics,
    /// The score of each expert, where the method has one.
    pub scores: Vec<f64>,
    /// Clusters of experts of which one stays, where the method makes them.
    pub clusters: Vec<Vec<usize>>,
    /// Change of the layer's output, where it was asked for.
    pub error: Option<LayerError>,
    /// Share of the choices of tokens that went to experts that do not stay: there the next best expert steps in. 0 where the
    /// rows of all experts stay.
    pub promoted: f64,
}

/// Σ over tokens of the squared change of a layer's output, the layer reading what it reads in the dense model.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LayerError {
    /// Of the dense output.
    pub output: f64,
    /// With the experts that stay.
    pub dropped: f64,
    /// The same with the factors or constants of the compensation.
    pub compensated: f64,
}

/// Chooses the experts of each layer that stay, on what the model makes of `windows`; a step of `progress` is a layer.
///
/// # Errors
/// [`Error::Experts`] when fewer stay than a token needs, [`Error::Unsupported`] for a model without experts and for
/// methods that it is too large for, [`Error::Cancelled`], and what running the model reports.
pub fn plan(
    decoder: &Decoder<'_>,
    windows: &Windows,
    options: &ExpertOptions,
    progress: &dyn Progress,
) -> Result<Outcome> {
    decoder.config().refuse_expert_map("pruning experts")?;
    let mixtures = decoder.config().mixtures.iter().enumerate();
    let counts = mixtures.map(|(layer, mixture)| match mixture {
        Some(mixture) => options.kept(layer, *mixture),
        None => Ok(0),
    });
    let counts: Vec<usize> = counts.collect::<Result<_>>()?;
    plan_by_layer(decoder, windows, options, &counts, progress)
}

/// The same with a number of experts for each layer, which is not read for layers without experts.
///
/// # Errors
/// As [`plan`], and [`Error::Option`] for another number of layers.
pub fn plan_by_layer(
    decoder: &Decoder<'_>,
    windows: &Windows,
    options: &ExpertOptions,
    counts: &[usize],
    progress: &dyn Progress,
) -> Result<Outcome> {
    let config = decoder.config();
    let mixtures = &config.mixtures;
    if mixtures.iter().all(Option::is_none) {
        return Err(Error::Unsupported {
            method: "dropping experts",
            model_type: config.model_type,
            reason: "it has no experts",
        });
    }
    config.refuse_expert_map("pruning experts")?;
    if counts.len() != mixtures.len() {
        return Err(Error::Option {
            option: "experts",
            value: counts.len() as f64,
            expected: "a number for each layer is expected",
        });
    }
    for (layer, (mixture, &kept)) in mixtures.iter().zip(counts).enumerate() {
        let Some(mixture) = mixture else { continue };
        Keep::Experts(kept).of(mixture.experts)?;
        options.check_kept(layer, kept, *mixture)?;
    }
    progress.begin("choosing experts", mixtures.len() as u64);
    let mut hidden = Hidden::embed(decoder, windows)?;
    let mut outcome = Outcome {
        plan: ExpertPlan {
            method: Some(options.method),
            compensation: options.compensation,
            ..ExpertPlan::default()
        },
        layers: vec![],
        divergence: None,
        terms: vec![],
    };
    for (layer, mixture) in mixtures.iter().enumerate() {
        let Some(mixture) = mixture else {
            hidden.advance_stored(decoder, layer, &mut NoTap)?;
            outcome.plan.layers.push(None);
            progress.advance(1)?;
            continue;
        };
        let before = options.progressive.then(|| hidden.clone());
        let mut collector = Collector::default();
        hidden.advance_stored(decoder, layer, &mut collector)?;
        let rule = RoutingRule {
            chosen: mixture.chosen,
            normalise: mixture.normalise,
        };
        let seen = Layer::new((decoder, layer), rule, collector, progress);
        let (experts, found) = choose(seen, options, counts[layer])?;
        outcome.layers.push(found);
        if let Some(before) = before {
            hidden = before;
            advance_pruned(
                &mut hidden,
                (decoder, layer),
                (&experts, None, None),
                &mut NoTap,
            )?;
        }
        outcome.plan.layers.push(Some(experts));
        progress.advance(1)?;
    }
    Ok(outcome)
}

fn choose(
    layer: Layer<'_>,
    options: &ExpertOptions,
    keep: usize,
) -> Result<(LayerExperts, LayerOutcome)> {
    let experts = layer.experts();
    let all = keep == experts;
    let choice = match all {
        true => Choice::from((0..experts).collect::<Vec<_>>()),
        false => options.method.method().choose(&layer, keep)?,
    };
    let compensation = options.compensation.method();
    let (factors, novices) = match all {
        true => (vec![vec![]; keep], vec![]),
        false => (
            compensation.factors(&layer, &choice)?,
            compensation.novices(&layer, &choice)?,
        ),
    };
    let rows = match novices.is_empty() {
        true => choice.rows,
        false => rows_with_novices(experts, &choice.kept),
    };
    let own = choice.members.iter().all(Vec::is_empty);
    let error = match options.measure_errors && own {
        true => Some(LayerError::of(&layer, &choice.kept, &factors, &novices)?),
        false => None,
    };
    let statistics = layer.statistics;
    let chosen: usize = statistics.experts.iter().map(|expert| expert.count).sum();
    let stay = choice.kept.iter().map(|&e| statistics.experts[e].count);
    let gone = chosen - stay.sum::<usize>();
    // Where all rows stay nobody steps in.
    let promoted = match rows.is_empty() {
        true => gone as f64 / chosen.max(1) as f64,
        false => 0.0,
    };
    let found = LayerOutcome {
        layer: layer.index,
        statistics,
        scores: choice.scores,
        clusters: choice.clusters,
        error,
        promoted,
    };
    let experts = LayerExperts {
        experts,
        neurons: vec![vec![]; choice.kept.len()],
        kept: choice.kept,
        members: choice.members,
        factors,
        rows,
        novices,
    };
    Ok((experts, found))
}

/// What the rows of all experts stand for where those that go become constants.
fn rows_with_novices(experts: usize, kept: &[usize]) -> Vec<usize> {
    let mut novices = kept.len()..;
    let place = |expert: usize| kept.binary_search(&expert).ok().or_else(|| novices.next());
    (0..experts).filter_map(place).collect()
}

impl LayerError {
    fn of(
        layer: &Layer<'_>,
        kept: &[usize],
        factors: &[Vec<f64>],
        novices: &[Vec<f32>],
    ) -> Result<Self> {
        let moments = Moments::of(layer, layer.rule, kept)?;
        let factor = |factors: &Vec<f64>| factors.first().copied().unwrap_or(1.0);
        let factors: Vec<f64> = factors.iter().map(factor).collect();
        Ok(Self {
            output: moments.energy,
            dropped: moments.error(&vec![1.0; kept.len()]),
            compensated: match novices.is_empty() {
                true => moments.error(&factors),
                false => Novice::error(layer, kept, novices)?,
            },
        })
    }
}

/// What a plan makes of a layer's experts: the experts, weights that were fitted anew, and how many are chosen where that
/// changes.
pub(crate) type Pruned<'a> = (&'a LayerExperts, Option<&'a ExpertRefits>, Option<usize>);

/// Sends windows through a layer with the experts that it keeps.
pub(crate) fn advance_pruned(
    hidden: &mut Hidden,
    (decoder, layer): (&Decoder<'_>, usize),
    (experts, refits, chosen): Pruned<'_>,
    tap: &mut dyn Tap,
) -> Result<()> {
    let mut block = decoder.frame(layer)?;
    if let Some(moe) = &mut block.experts {
        match experts.map()? {
            Some(map) => {
                moe.mapped = Some(MappedRows {
                    map,
                    novices: experts.constants(decoder)?,
                });
            }
            None => moe.router = merge::router(&moe.router, experts)?,
        }
        moe.rule.chosen = chosen.unwrap_or(moe.rule.chosen);
    }
    let mut expert = |at: usize| {
        experts
            .expert(decoder, layer, at, refits)
            .map_err(|source| causal_lm::Error::Tap {
                layer,
                source: Box::new(source),
            })
    };
    let moved = hidden.advance_experts(&block, &mut expert, tap);
    decoder.release(layer);
    Ok(moved?)
}

/// What windows become after all blocks of the model that a plan leaves; a step of `progress` is a layer.
pub(crate) fn run_pruned(
    decoder: &Decoder<'_>,
    windows: &Windows,
    (plan, refits): (&ExpertPlan, Option<&ExpertRefits>),
    progress: &dyn Progress,
) -> Result<Hidden> {
    let mut hidden = Hidden::embed(decoder, windows)?;
    for (layer, experts) in plan.layers.iter().enumerate() {
        match experts {
            Some(experts) => {
                let pruned = (experts, refits, plan.chosen);
                advance_pruned(&mut hidden, (decoder, layer), pruned, &mut NoTap)?;
            }
            None => hidden.advance_stored(decoder, layer, &mut NoTap)?,
        }
        progress.advance(1)?;
    }
    Ok(hidden)
}
