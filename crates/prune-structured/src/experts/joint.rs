//! One budget for the number of experts and their width.
//!
//! A layer of e experts of width μ has e·3hμ weights and e router rows of h. The product is not additive in the two, so a
//! layer has one list of options. [`Joint::Uniform`] gives all layers the same pair, which stock runtimes open: few pairs
//! exhaust a budget, and the divergence of the model's predictions tells which is best. [`Joint::ByLayer`] measures the
//! divergence with one layer alone at each option and solves a knapsack, never above the budget.

use super::divergence::Reference;
use super::neurons::narrow;
use super::select::{Outcome, plan, plan_by_layer};
use super::{ExpertOptions, ExpertPlan, ExpertRefits, Keep, LayerExperts, NeuronOptions};
use crate::rate_distortion::{Point, knapsack};
use crate::{Error, Result};
use causal_lm::config::Mixture;
use causal_lm::{Decoder, Progress, Windows};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Which layers share a number of experts and a width.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Joint {
    /// All.
    #[default]
    Uniform,
    /// None: each has its own.
    ByLayer,
}

/// How a budget is divided.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct JointOptions {
    /// How experts are dropped; its number of experts is not read.
    pub experts: ExpertOptions,
    /// How those that stay are narrowed.
    pub neurons: NeuronOptions,
    /// The share of the experts' weights and router rows to remove.
    pub ratio: f64,
    /// Which layers share a pair.
    pub joint: Joint,
}

impl JointOptions {
    /// All layers alike.
    pub fn new(experts: ExpertOptions, neurons: NeuronOptions, ratio: f64) -> Self {
        Self {
            experts,
            neurons,
            ratio,
            joint: Joint::Uniform,
        }
    }

    /// The same with other layers sharing a pair.
    pub fn joint(self, joint: Joint) -> Self {
        Self { joint, ..self }
    }
}

/// Windows that a budget is divided by, and where weights are kept.
#[derive(Clone, Copy, Debug)]
pub struct JointData<'a> {
    /// Experts and neurons are scored on these.
    pub calibration: &'a Windows,
    /// Predictions are compared on these.
    pub search: &'a Windows,
    /// A folder for fitted weights, which must exist and outlive what is returned.
    pub dir: &'a Path,
}

/// Pairs that are compared at most in all layers together.
const PAIRS: usize = 8;
/// Options of a layer of its own are these shares of experts and of neurons.
const SHARES: [f64; 5] = [1.0, 0.875, 0.75, 0.625, 0.5];

/// A number of experts and their width.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pair {
    /// Experts that stay.
    pub experts: usize,
    /// Neurons of each.
    pub width: usize,
}

impl Pair {
    /// Weights of experts and of their router rows.
    pub fn cost(self, hidden: usize) -> u64 {
        self.experts as u64 * (3 * hidden as u64 * self.width as u64 + hidden as u64)
    }
}

/// Divides a budget over experts and their widths.
///
/// # Errors
/// [`Error::Ratio`], [`Error::Unreachable`] where no option is small enough, [`Error::NotUniform`] for one pair in all
/// layers of a model whose layers differ, and what planning and narrowing report.
pub fn joint(
    decoder: &Decoder<'_>,
    data: JointData<'_>,
    options: &JointOptions,
    progress: &dyn Progress,
) -> Result<(Outcome, ExpertRefits)> {
    if !(0.0..1.0).contains(&options.ratio) {
        return Err(Error::Ratio(options.ratio));
    }
    decoder.config().refuse_expert_map("pruning experts")?;
    if options.experts.keeps_rows() {
        return Err(Error::Unsupported {
            method: "one budget with ties or constants",
            model_type: decoder.config().model_type,
            reason: "all router rows stay then, and the options of the budget count one for each expert",
        });
    }
    let search = Search {
        decoder,
        data,
        options,
        progress,
    };
    match options.joint {
        Joint::Uniform => search.uniform(),
        Joint::ByLayer => search.by_layer(),
    }
}

struct Search<'a> {
    decoder: &'a Decoder<'a>,
    data: JointData<'a>,
    options: &'a JointOptions,
    progress: &'a dyn Progress,
}

impl Search<'_> {
    fn mixtures(&self) -> impl Iterator<Item = (usize, Mixture)> {
        let mixtures = self.decoder.config().mixtures.iter().enumerate();
        mixtures.filter_map(|(layer, mixture)| Some((layer, (*mixture)?)))
    }

    fn total(&self, mixtures: impl Iterator<Item = Mixture>) -> u64 {
        let hidden = self.decoder.config().hidden;
        let whole = |mixture: Mixture| Pair {
            experts: mixture.experts,
            width: mixture.width,
        };
        mixtures.map(|mixture| whole(mixture).cost(hidden)).sum()
    }

    fn budget(&self, mixtures: impl Iterator<Item = Mixture>) -> u64 {
        (self.total(mixtures) as f64 * (1.0 - self.options.ratio)).floor() as u64
    }

    fn unreachable(&self, kept: u64) -> Error {
        Error::Unreachable {
            ratio: self.options.ratio,
            kept,
            total: self.total(self.mixtures().map(|(_, mixture)| mixture)),
        }
    }

    fn uniform(&self) -> Result<(Outcome, ExpertRefits)> {
        let Some((_, mixture)) = self.mixtures().next() else {
            return Ok((
                plan(
                    self.decoder,
                    self.data.calibration,
                    &self.options.experts,
                    self.progress,
                )?,
                self.refits(0)?,
            ));
        };
        if let Some((layer, _)) = self.mixtures().find(|(_, other)| *other != mixture) {
            return Err(Error::NotUniform { layer });
        }
        let hidden = self.decoder.config().hidden;
        let budget = self.budget(std::iter::once(mixture));
        let pairs = uniform_pairs(mixture, self.options.neurons.align, hidden, budget);
        if pairs.is_empty() {
            let least = Pair {
                experts: mixture.chosen,
                width: mixture.width.min(self.options.neurons.align.max(1)),
            };
            return Err(self.unreachable(self.mixtures().count() as u64 * least.cost(hidden)));
        }
        self.progress.begin(
            "predictions of the dense model",
            self.decoder.config().layers() as u64,
        );
        let reference = Reference::new(self.decoder, self.data.search, self.progress)?;
        let mut best: Option<(f64, Outcome, ExpertRefits)> = None;
        for (at, &pair) in pairs.iter().enumerate() {
            let options = self.options.experts.keeping(Keep::Experts(pair.experts));
            let mut outcome = plan(self.decoder, self.data.calibration, &options, self.progress)?;
            let refits = self.refits(at)?;
            let layers = self.decoder.config().layers();
            let widths = vec![Some(pair.width); layers];
            outcome.plan = self.narrowed(&outcome.plan, &widths, &refits)?;
            self.progress.begin("comparing models", layers as u64);
            let divergence = reference.of((&outcome.plan, Some(&refits)), self.progress)?;
            if best.as_ref().is_none_or(|(least, ..)| divergence < *least) {
                best = Some((divergence, outcome, refits));
            }
        }
        // There is at least one pair.
        let (divergence, mut outcome, refits) = best.ok_or_else(|| self.unreachable(0))?;
        outcome.divergence = Some(divergence);
        Ok((outcome, refits))
    }

    fn by_layer(&self) -> Result<(Outcome, ExpertRefits)> {
        let config = self.decoder.config();
        let (layers, hidden) = (config.layers(), config.hidden);
        let counts: Vec<usize> = (0..layers)
            .map(|l| config.mixtures[l].map_or(0, |m| m.experts))
            .collect();
        let whole = ExpertPlan::whole(self.decoder);
        let budget = self.budget(self.mixtures().map(|(_, mixture)| mixture));
        self.progress
            .begin("predictions of the dense model", layers as u64);
        let reference = Reference::new(self.decoder, self.data.search, self.progress)?;
        let mut curves = Vec::new();
        let mut options_of = Vec::new();
        for (layer, mixture) in self.mixtures() {
            let pairs = pairs_of_layer(mixture, self.options.neurons.align, hidden);
            let mut curve = Vec::with_capacity(pairs.len());
            let mut of_layer: Option<(usize, LayerExperts)> = None;
            for &pair in &pairs {
                // Pairs come by the number of experts, which are chosen once for each.
                if of_layer
                    .as_ref()
                    .is_none_or(|(experts, _)| *experts != pair.experts)
                {
                    let mut counts = counts.clone();
                    counts[layer] = pair.experts;
                    let options = &self.options.experts;
                    let found = plan_by_layer(
                        self.decoder,
                        self.data.calibration,
                        options,
                        &counts,
                        self.progress,
                    )?;
                    let chosen = found.plan.layers.into_iter().nth(layer).flatten();
                    of_layer = chosen.map(|chosen| (pair.experts, chosen));
                }
                let mut plan = whole.clone();
                plan.layers[layer] = of_layer.as_ref().map(|(_, chosen)| chosen.clone());
                let mut widths = vec![None; layers];
                widths[layer] = Some(pair.width);
                let refits = self.refits(0)?;
                let plan = self.narrowed(&plan, &widths, &refits)?;
                self.progress.begin("comparing models", layers as u64);
                curve.push(Point {
                    cost: pair.cost(hidden),
                    distortion: reference.of((&plan, Some(&refits)), self.progress)?,
                });
            }
            // The knapsack wants costs that do not fall.
            let mut order: Vec<usize> = (0..pairs.len()).collect();
            order.sort_by_key(|&at| curve[at].cost);
            curves.push(order.iter().map(|&at| curve[at]).collect::<Vec<_>>());
            options_of.push((
                layer,
                order.into_iter().map(|at| pairs[at]).collect::<Vec<_>>(),
            ));
        }
        let least: u64 = curves.iter().map(|curve: &Vec<Point>| curve[0].cost).sum();
        let choice = knapsack(&curves, budget).ok_or_else(|| self.unreachable(least))?;
        let (mut counts, mut widths) = (counts, vec![None; layers]);
        for ((layer, pairs), at) in options_of.iter().zip(choice) {
            counts[*layer] = pairs[at].experts;
            widths[*layer] = Some(pairs[at].width);
        }
        let options = &self.options.experts;
        let mut outcome = plan_by_layer(
            self.decoder,
            self.data.calibration,
            options,
            &counts,
            self.progress,
        )?;
        let refits = self.refits(1)?;
        outcome.plan = self.narrowed(&outcome.plan, &widths, &refits)?;
        self.progress.begin("comparing models", layers as u64);
        let divergence = reference.of((&outcome.plan, Some(&refits)), self.progress)?;
        outcome.divergence = Some(divergence);
        Ok((outcome, refits))
    }

    fn refits(&self, at: usize) -> Result<ExpertRefits> {
        let dir = self.data.dir.join(format!("joint-{at}"));
        std::fs::create_dir_all(&dir).map_err(|error| crate::stored::damaged(&dir, error))?;
        Ok(ExpertRefits::new(dir))
    }

    fn narrowed(
        &self,
        plan: &ExpertPlan,
        widths: &[Option<usize>],
        refits: &ExpertRefits,
    ) -> Result<ExpertPlan> {
        let options = (&self.options.neurons, refits);
        let windows = self.data.calibration;
        narrow(
            self.decoder,
            windows,
            (plan, widths),
            options,
            self.progress,
        )
    }
}

/// At most [`PAIRS`] pairs that exhaust a budget, from many narrow experts to few wide ones.
fn uniform_pairs(mixture: Mixture, align: usize, hidden: usize, budget: u64) -> Vec<Pair> {
    let step = (mixture.experts / 16).max(1);
    let counts = (mixture.chosen + 1..=mixture.experts).rev().step_by(step);
    // As few as a token goes to, whatever the steps are.
    let counts = counts.chain([mixture.chosen]);
    let of_count = |experts: usize| {
        let widths = (1..=mixture.width / align.max(1)).map(|steps| steps * align.max(1));
        // The dense width need not be a multiple.
        let widths = widths.chain([mixture.width]);
        let pairs = widths.map(|width| Pair { experts, width });
        pairs
            .filter(|pair| pair.cost(hidden) <= budget)
            .max_by_key(|pair| pair.width)
    };
    let mut pairs: Vec<Pair> = counts.filter_map(of_count).collect();
    // Of pairs of one width the one with the most experts contains the others.
    pairs.dedup_by_key(|pair| pair.width);
    let count = pairs.len();
    match count <= PAIRS {
        true => pairs,
        false => (0..PAIRS)
            .map(|i| pairs[i * (count - 1) / (PAIRS - 1)])
            .collect(),
    }
}

/// The options of one layer, by the number of experts.
fn pairs_of_layer(mixture: Mixture, align: usize, hidden: usize) -> Vec<Pair> {
    let align = align.max(1);
    let mut pairs = Vec::new();
    for experts in SHARES.map(|share| (mixture.experts as f64 * share).round() as usize) {
        for share in SHARES {
            let steps = (mixture.width as f64 * share / align as f64).round() as usize;
            let width = match share < 1.0 {
                true => (steps * align).clamp(align.min(mixture.width), mixture.width),
                false => mixture.width,
            };
            let pair = Pair { experts, width };
            if experts >= mixture.chosen && !pairs.contains(&pair) {
                pairs.push(pair);
            }
        }
    }
    // At most a dozen: those nearest to equal shares of both, which lose least for their size.
    if pairs.len() > 12 {
        let balance = |pair: &Pair| {
            let e = pair.experts as f64 / mixture.experts as f64;
            let w = pair.width as f64 / mixture.width as f64;
            (e - w).abs()
        };
        let mut order: Vec<Pair> = pairs.clone();
        order.sort_by(|a, b| {
            balance(a)
                .total_cmp(&balance(b))
                .then(b.cost(hidden).cmp(&a.cost(hidden)))
        });
        order.truncate(12);
        pairs.retain(|pair| order.contains(pair));
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two layers with experts 2 to 4 and widths 2, 4, 6 of hidden size 8; the second weighs more.
    fn curves() -> (Vec<Vec<Pair>>, Vec<Vec<Point>>) {
        let mut pairs = Vec::new();
        for experts in 2..=4 {
            for width in [2, 4, 6] {
                pairs.push(Pair { experts, width });
            }
        }
        pairs.sort_by_key(|pair| pair.cost(8));
        let curve = |weight: f64| {
            let point = |pair: &Pair| {
                let (e, w) = (pair.experts as f64, pair.width as f64);
                Point {
                    cost: pair.cost(8),
                    distortion: weight * (3.0 * (4.0 - e).powi(2) + e * (6.0 - w).powi(2) / 4.0),
                }
            };
            pairs.iter().map(point).collect()
        };
        (
            vec![pairs.clone(), pairs.clone()],
            vec![curve(1.0), curve(2.5)],
        )
    }

    #[test]
    fn the_allocation_is_that_found_by_trying_all() {
        let (pairs, curves) = curves();
        for (budget, error, spent, chosen) in [
            (486, 30.0, 480, Some([(3, 2), (3, 4)])),
            (608, 25.0, 584, Some([(3, 2), (4, 4)])),
            (729, 16.0, 728, Some([(3, 4), (4, 4)])),
            (912, 10.5, 912, Some([(3, 6), (3, 6)])),
            (1094, 3.0, 1064, Some([(3, 6), (4, 6)])),
        ] {
            let choice = knapsack(&curves, budget).unwrap();
            let found: f64 = choice
                .iter()
                .zip(&curves)
                .map(|(&i, c)| c[i].distortion)
                .sum();
            let cost: u64 = choice.iter().zip(&curves).map(|(&i, c)| c[i].cost).sum();
            assert!((found - error).abs() < 1e-9, "{budget}: {found}");
            assert!(cost <= budget, "{budget}: {cost} is not {spent}");
            if let Some(chosen) = chosen.filter(|_| cost == spent) {
                let at = |layer: usize| pairs[layer][choice[layer]];
                for (layer, (experts, width)) in chosen.into_iter().enumerate() {
                    assert_eq!(at(layer), Pair { experts, width }, "{budget}");
                }
            }
            // No option of both layers alike is better.
            let alike = (0..pairs[0].len()).filter(|&i| 2 * curves[0][i].cost <= budget);
            let alike = alike.map(|i| curves[0][i].distortion + curves[1][i].distortion);
            assert!(alike.fold(f64::INFINITY, f64::min) >= found - 1e-9);
        }
    }

    fn mixture() -> Mixture {
        Mixture {
            experts: 16,
            width: 128,
            chosen: 2,
            normalise: true,
            shared: 0,
        }
    }

    #[test]
    fn pairs_exhaust_the_budget_and_no_wider_one_of_as_many_experts_fits() {
        let whole = Pair {
            experts: 16,
            width: 128,
        };
        let budget = whole.cost(128) / 2;
        let pairs = uniform_pairs(mixture(), 32, 128, budget);
        let second = Pair {
            experts: 15,
            width: 64,
        };
        assert_eq!(pairs[1], second);
        assert!(pairs.len() <= PAIRS);
        for pair in pairs {
            assert!(pair.cost(128) <= budget && pair.experts >= 2);
            let wider = Pair {
                width: pair.width + 32,
                ..pair
            };
            assert!(wider.width > 128 || wider.cost(128) > budget, "{pair:?}");
        }
    }

    #[test]
    fn as_few_experts_as_a_token_goes_to_are_tried_whatever_the_steps_are() {
        let mixture = Mixture {
            experts: 60,
            chosen: 4,
            ..mixture()
        };
        let least = Pair {
            experts: 4,
            width: 32,
        };
        let budget = least.cost(128);
        assert_eq!(uniform_pairs(mixture, 32, 128, budget), [least]);
        assert_eq!(uniform_pairs(mixture, 32, 128, budget - 1), []);
    }

    #[test]
    fn options_of_a_layer_are_at_most_a_dozen_and_one_of_them_is_the_layer_itself() {
        let pairs = pairs_of_layer(mixture(), 32, 128);
        assert!(pairs.len() <= 12, "{}", pairs.len());
        let whole = Pair {
            experts: 16,
            width: 128,
        };
        assert!(pairs.contains(&whole));
        assert!(
            pairs
                .iter()
                .all(|pair| pair.width % 32 == 0 && pair.experts >= 8)
        );
    }
}
