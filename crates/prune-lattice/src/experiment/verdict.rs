//! Does order matter, and what does? Said in words, from the rows alone.

use super::{Metric, Repair, Row, Stage, Treatment};
use crate::prune::Method;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// How a method stands to a control.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Better on every network, of two at least.
    Better,
    /// Worse on every network, of two at least.
    Worse,
    /// Better on some networks and not on others, the same, or a single network.
    Unclear,
}

/// A method against a control at the same sparsity, network by network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// Task.
    pub task: String,
    /// Cell, by name.
    pub cell: String,
    /// Sparsity asked for.
    pub sparsity: f64,
    /// One-shot or fine-tuned.
    pub stage: Stage,
    /// The method, and its repair.
    pub treatment: Treatment,
    /// The control, and its repair.
    pub control: Treatment,
    /// What is compared.
    pub metric: Metric,
    /// Mean advantage over the networks, positive where the method is better.
    pub advantage: f64,
    /// Smallest and largest advantage over the networks.
    pub range: (f64, f64),
    /// Networks compared: trained independently of each other. Several draws of a method on one network are averaged.
    pub networks: usize,
    /// The outcome.
    pub outcome: Outcome,
}

/// What the score of a lattice method must beat without repair: the same ranking of neurons without order, by chance, and
/// reversed; single weights by chance, by size, by joined size.
const AGAINST: [Method; 6] = [
    Method::Strength,
    Method::RandomNeurons,
    Method::Reducible,
    Method::Random,
    Method::Threshold,
    Method::Magnitude,
];
const RANDOM_REFIT: Treatment = Treatment::new(Method::Random, Repair::Refit);
const SPAN_MERGE: Treatment = Treatment::new(Method::Span, Repair::Merge);
const MAGNITUDE_REFIT: Treatment = Treatment::new(Method::Magnitude, Repair::Refit);
const RANDOM_MERGE: Treatment = Treatment::new(Method::RandomNeurons, Repair::Merge);

/// The claims that are checked against repaired baselines, each with those that it must beat: least squares lifts a random mask
/// further than a ranking does.
fn claims(methods: &BTreeSet<Method>) -> Vec<(Treatment, Vec<Treatment>)> {
    let mut claims = vec![
        (MAGNITUDE_REFIT, vec![RANDOM_REFIT, SPAN_MERGE]),
        (SPAN_MERGE, vec![RANDOM_REFIT, RANDOM_MERGE]),
    ];
    for &method in methods.iter().filter(|m| m.is_lattice()) {
        for &repair in Repair::ALL {
            let mut controls = vec![RANDOM_REFIT, SPAN_MERGE];
            if repair == Repair::Merge {
                controls.push(RANDOM_MERGE);
            }
            claims.push((Treatment::new(method, repair), controls));
        }
    }
    claims
}

/// All comparisons of methods with their controls that the rows allow.
pub fn compare(rows: &[Row]) -> Vec<Comparison> {
    let mut out = Vec::new();
    for place in places(rows) {
        let methods: BTreeSet<Method> = place.values.keys().map(|t| t.method).collect();
        let plain = methods.iter().filter(|m| m.is_lattice()).map(|&m| {
            let controls = AGAINST.map(|c| Treatment::new(c, Repair::None));
            (Treatment::new(m, Repair::None), controls.to_vec())
        });
        for (treatment, controls) in plain.chain(claims(&methods)) {
            out.extend(
                controls
                    .into_iter()
                    .filter_map(|control| place.compare(treatment, control)),
            );
        }
    }
    out
}

/// Rows of one task, cell, sparsity and stage.
struct Place {
    task: String,
    cell: String,
    sparsity: f64,
    stage: Stage,
    metric: Metric,
    /// Of each network, the mean over the draws of a method.
    values: BTreeMap<Treatment, BTreeMap<Option<u64>, f64>>,
}

fn places(rows: &[Row]) -> Vec<Place> {
    // Sparsities as bits, which order like the positive numbers they are.
    let mut groups: BTreeMap<(&str, &str, u64, Stage), Vec<&Row>> = BTreeMap::new();
    for row in rows {
        let place = (
            row.task.as_str(),
            row.cell.name(),
            row.sparsity.to_bits(),
            row.stage,
        );
        groups.entry(place).or_default().push(row);
    }
    groups
        .into_iter()
        .map(|((task, cell, sparsity, stage), rows)| {
            let metric = Metric::of_rows(rows.iter().copied());
            let mut draws: BTreeMap<_, BTreeMap<_, Vec<f64>>> = BTreeMap::new();
            for row in rows {
                if let Some(value) = metric.of(row) {
                    let networks = draws.entry(row.treatment()).or_default();
                    networks.entry(row.network).or_default().push(value);
                }
            }
            let values = draws.into_iter().map(|(treatment, networks)| {
                let means = networks.into_iter().map(|(n, v)| (n, mean(&v)));
                (treatment, means.collect())
            });
            Place {
                task: task.into(),
                cell: cell.into(),
                sparsity: f64::from_bits(sparsity),
                stage,
                metric,
                values: values.collect(),
            }
        })
        .collect()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

impl Place {
    fn compare(&self, treatment: Treatment, control: Treatment) -> Option<Comparison> {
        let (own, other) = (self.values.get(&treatment)?, self.values.get(&control)?);
        let sign = if self.metric.more_is_better() {
            1.0
        } else {
            -1.0
        };
        let differences: Vec<f64> = own
            .iter()
            .filter_map(|(network, value)| Some(sign * (value - other.get(network)?)))
            .collect();
        if differences.is_empty() {
            return None;
        }
        let low = differences.iter().copied().fold(f64::INFINITY, f64::min);
        let high = differences
            .iter()
            .copied()
            .fold(f64::NEG_INFINITY, f64::max);
        Some(Comparison {
            task: self.task.clone(),
            cell: self.cell.clone(),
            sparsity: self.sparsity,
            stage: self.stage,
            treatment,
            control,
            metric: self.metric,
            advantage: mean(&differences),
            range: (low, high),
            networks: differences.len(),
            outcome: match () {
                () if differences.len() < 2 => Outcome::Unclear,
                () if low > 0.0 => Outcome::Better,
                () if high < 0.0 => Outcome::Worse,
                () => Outcome::Unclear,
            },
        })
    }
}

/// Comparisons of one method and repair at one stage.
struct Tally<'a>(Vec<&'a Comparison>);

impl<'a> Tally<'a> {
    fn of(comparisons: &'a [Comparison], treatment: Treatment, stage: Stage) -> Self {
        let same = |c: &&Comparison| c.treatment == treatment && c.stage == stage;
        Self(comparisons.iter().filter(same).collect())
    }

    fn against(&self, controls: &[Treatment]) -> Self {
        let of = self.0.iter().copied();
        Self(of.filter(|c| controls.contains(&c.control)).collect())
    }

    fn single(&self) -> bool {
        self.0.iter().all(|c| c.networks == 1)
    }

    /// Places where it is better, where it is worse, and all.
    fn counts(&self, control: Treatment) -> (usize, usize, usize) {
        let of: Vec<_> = self.0.iter().filter(|c| c.control == control).collect();
        let count = |o: Outcome| of.iter().filter(|c| c.outcome == o).count();
        (count(Outcome::Better), count(Outcome::Worse), of.len())
    }

    fn beats(&self, control: Treatment) -> bool {
        let (better, worse, of) = self.counts(control);
        of > 0 && better > worse && 2 * better > of
    }

    /// The counts in words.
    fn words(&self, controls: &[Treatment]) -> String {
        let known = controls.iter().filter(|c| self.counts(**c).2 > 0);
        let words = known.map(|&control| {
            let (better, worse, of) = self.counts(control);
            match self.single() {
                false => format!("{control}: better in {better}, worse in {worse} of {of}"),
                true => {
                    let of_control = self.0.iter().filter(|c| c.control == control);
                    let ahead = of_control.filter(|c| c.advantage > 0.0).count();
                    format!("{control} in {ahead} of {of}")
                }
            }
        });
        words.collect::<Vec<_>>().join("; ")
    }
}

const STAGES: [(Stage, &str); 2] = [
    (Stage::OneShot, "one-shot"),
    (Stage::FineTuned, "after fine-tuning"),
];
const COUNTED: &str = "counted over tasks, cells and sparsities, where every network agrees";

/// The finding in words: for each lattice method and stage, how often it was better or worse than each control on every
/// network, and whether that supports pruning by order; the same for repaired methods against random weights refitted and
/// span merged, the baselines that any claim must beat.
pub fn verdict(rows: &[Row]) -> Vec<String> {
    let comparisons = compare(rows);
    let mut lines = Vec::new();
    for &method in Method::ALL.iter().filter(|m| m.is_lattice()) {
        for (stage, when) in STAGES {
            let plain = Treatment::new(method, Repair::None);
            let controls = AGAINST.map(|c| Treatment::new(c, Repair::None));
            let tally = Tally::of(&comparisons, plain, stage).against(&controls);
            if !tally.0.is_empty() {
                lines.push(order_line(method, when, &tally, &controls));
            }
        }
    }
    let methods: BTreeSet<Method> = rows.iter().map(|r| r.method).collect();
    for (treatment, controls) in claims(&methods) {
        for (stage, when) in STAGES {
            let tally = Tally::of(&comparisons, treatment, stage).against(&controls);
            lines.extend(claim_line(treatment, when, &tally, &controls));
        }
    }
    for row in rows.iter().filter(|r| r.error.is_some()) {
        let reason = row.error.as_deref().unwrap_or_default();
        lines.push(format!(
            "{} on {} (seed {}) at {}: {reason}",
            row.method, row.task, row.seed, row.sparsity
        ));
    }
    lines.extend(repairs(rows));
    lines.extend(worse_when_refitted(rows));
    lines.extend(empty_layers(rows));
    lines.extend(weak_tasks(rows));
    lines
}

fn order_line(method: Method, when: &str, tally: &Tally<'_>, controls: &[Treatment]) -> String {
    let list = tally.words(controls);
    if tally.single() {
        return format!(
            "{method}, {when}: a single network supports no verdict; it is ahead of {list}"
        );
    }
    let plain = |m: Method| Treatment::new(m, Repair::None);
    let chance = match tally.counts(plain(Method::RandomNeurons)).2 {
        0 => Method::Random,
        _ => Method::RandomNeurons,
    };
    let beats = |m: Method| tally.beats(plain(m));
    let finding = match (beats(chance), beats(Method::Strength)) {
        (true, true) => "order beats both chance and plain neuron strength here",
        (true, false) => {
            "it beats chance but not plain neuron strength, so the gain cannot be credited to order"
        }
        (false, true) => {
            "it beats plain neuron strength but not chance; neither ranking is worth its cost here"
        }
        (false, false) => "order does not beat chance or plain neuron strength here",
    };
    format!("{method}, {when}: {finding} ({list}; {COUNTED})")
}

/// A method, perhaps repaired, against repaired baselines.
fn claim_line(
    treatment: Treatment,
    when: &str,
    tally: &Tally<'_>,
    controls: &[Treatment],
) -> Option<String> {
    let known: Vec<Treatment> = controls
        .iter()
        .copied()
        .filter(|c| tally.counts(*c).2 > 0)
        .collect();
    if known.is_empty() {
        return None;
    }
    let list = tally.words(&known);
    if tally.single() {
        return Some(format!(
            "{treatment}, {when}: a single network supports no verdict; it is ahead of {list}"
        ));
    }
    let names = |beaten: bool| -> Option<String> {
        let of = known.iter().filter(|c| tally.beats(**c) == beaten);
        let names: Vec<String> = of.map(Treatment::to_string).collect();
        (!names.is_empty()).then(|| names.join(if beaten { " and " } else { " or " }))
    };
    let finding = match (names(true), names(false)) {
        (Some(beaten), Some(others)) => format!("it beats {beaten}, but not {others}"),
        (Some(beaten), None) => format!("it beats {beaten}"),
        (None, others) => format!("it does not beat {}", others.unwrap_or_default()),
    };
    Some(format!(
        "{treatment}, {when}: {finding} ({list}; {COUNTED})"
    ))
}

/// How far least squares gets without training, beside the baselines.
fn repairs(rows: &[Row]) -> Vec<String> {
    let shown = [
        Treatment::new(Method::Magnitude, Repair::None),
        MAGNITUDE_REFIT,
        RANDOM_REFIT,
        SPAN_MERGE,
        Treatment::new(Method::LatticeContext, Repair::None),
        Treatment::new(Method::LatticeContext, Repair::Merge),
    ];
    let line = |place: Place| {
        let known: Vec<(Treatment, f64)> = shown
            .into_iter()
            .filter_map(|t| {
                let networks = place.values.get(&t)?;
                Some((t, mean(&networks.values().copied().collect::<Vec<_>>())))
            })
            .collect();
        let repaired = known.iter().any(|(t, _)| t.repair != Repair::None);
        let texts: Vec<String> = known
            .iter()
            .map(|(t, v)| format!("{t} {}", place.metric.text(*v)))
            .collect();
        repaired.then(|| {
            format!(
                "{} with {} at {:.0} %, without training ({}): {}",
                place.task,
                place.cell,
                100.0 * place.sparsity,
                place.metric,
                texts.join(", ")
            )
        })
    };
    let one_shot = places(rows).into_iter();
    one_shot
        .filter(|p| p.stage == Stage::OneShot)
        .filter_map(line)
        .collect()
}

/// Refitting minimises the error of each layer, not that of the network: where validation prefers the plain weights, they should
/// be kept.
fn worse_when_refitted(rows: &[Row]) -> Vec<String> {
    type Key<'a> = (&'a str, &'a str, Method, u64, u64, Option<u64>);
    let key = |r: &Row| (r.method, r.sparsity.to_bits(), r.seed, r.network);
    let one_shot = |repair: Repair| {
        let of = move |r: &&Row| r.stage == Stage::OneShot && r.repair == repair;
        rows.iter().filter(of)
    };
    let plain: BTreeMap<Key<'_>, f64> = one_shot(Repair::None)
        .filter_map(|r| {
            let (method, sparsity, seed, network) = key(r);
            let place = (&*r.task, r.cell.name(), method, sparsity, seed, network);
            Some((place, r.validation?))
        })
        .collect();
    let mut worse: BTreeMap<Method, (usize, usize)> = BTreeMap::new();
    for row in one_shot(Repair::Refit) {
        let (method, sparsity, seed, network) = key(row);
        let place = (&*row.task, row.cell.name(), method, sparsity, seed, network);
        if let (Some(plain), Some(refit)) = (plain.get(&place), row.validation) {
            let counts = worse.entry(method).or_default();
            counts.0 += usize::from(refit > *plain);
            counts.1 += 1;
        }
    }
    let list: Vec<String> = worse
        .iter()
        .filter(|(_, (count, _))| *count > 0)
        .map(|(method, (count, of))| format!("{method} in {count} of {of}"))
        .collect();
    match list.is_empty() {
        true => Vec::new(),
        false => vec![format!(
            "refitted weights have a larger validation loss than plain ones under the same mask, so that the plain ones should \
             be kept: {}",
            list.join(", ")
        )],
    }
}

/// Rankings that leave a layer of a wiring without neurons, so that nothing passes through it.
fn empty_layers(rows: &[Row]) -> Vec<String> {
    let mut found: BTreeMap<(&str, &str), BTreeSet<String>> = BTreeMap::new();
    for row in rows {
        let empty = row.neurons.as_ref().is_some_and(|n| n.contains(&0));
        if empty && row.stage == Stage::OneShot {
            let what = format!("{} at {:.0} %", row.method, 100.0 * row.sparsity);
            let place = (row.task.as_str(), row.cell.name());
            found.entry(place).or_default().insert(what);
        }
    }
    found
        .into_iter()
        .map(|((task, cell), what)| {
            let what: Vec<String> = what.into_iter().collect();
            format!(
                "{task} with {cell}: no neuron of a layer stays after merging by {}",
                what.join(", ")
            )
        })
        .collect()
}

/// Tasks on which the network without recurrent weights is nearly as good: they say nothing about recurrent pruning.
fn weak_tasks(rows: &[Row]) -> Vec<String> {
    let mut by_task: BTreeMap<(&str, String), Vec<(f64, f64)>> = BTreeMap::new();
    for row in rows.iter().filter(|r| {
        r.method == Method::ZeroWhh && r.stage == Stage::FromScratch && r.bits.is_none()
    }) {
        if let (Some(accuracy), Some(dense)) = (row.accuracy, row.accuracy_dense) {
            by_task
                .entry((&row.task, row.cell.to_string()))
                .or_default()
                .push((accuracy, dense));
        }
    }
    by_task
        .into_iter()
        .filter_map(|((task, cell), pairs)| {
            let n = pairs.len() as f64;
            let (zero, dense) = pairs.iter().fold((0.0, 0.0), |s, p| (s.0 + p.0 / n, s.1 + p.1 / n));
            (zero > 0.9 * dense).then(|| {
                format!(
                    "{task} with {cell}: a network trained without any recurrent weight reaches {:.1} % beside {:.1} %, so this \
                     task says little about recurrent pruning",
                    100.0 * zero,
                    100.0 * dense
                )
            })
        })
        .collect()
}
