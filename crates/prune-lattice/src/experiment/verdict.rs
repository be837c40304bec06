//! Does order matter? Said in words, from the rows alone.

use super::{Repair, Row, Stage};
use crate::prune::Method;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// How a lattice method stands to a control.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Better with every seed, of two at least.
    Better,
    /// Worse with every seed, of two at least.
    Worse,
    /// Better with some seeds and not with others, the same, or a single seed.
    Unclear,
}

/// A lattice method against a control at the same sparsity, seed by seed on the same trained networks.
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
    /// The lattice method.
    pub method: Method,
    /// The control.
    pub control: Method,
    /// Mean advantage over the seeds: accuracy (as a share), or loss (nats, squared error) for texts and regression.
    pub advantage: f64,
    /// Smallest and largest advantage over the seeds.
    pub range: (f64, f64),
    /// Seeds compared.
    pub seeds: usize,
    /// The outcome.
    pub outcome: Outcome,
}

/// What a lattice method must beat: the same ranking of neurons without order, by chance, and reversed; single weights by
/// chance, by size, by joined size.
const AGAINST: [Method; 6] = [
    Method::Strength,
    Method::RandomNeurons,
    Method::Reducible,
    Method::Random,
    Method::Threshold,
    Method::Magnitude,
];

/// Larger is better.
fn quality(row: &Row) -> Option<f64> {
    match (row.accuracy, row.bits, row.loss) {
        (Some(accuracy), None, _) => Some(accuracy),
        (_, _, Some(loss)) => Some(-loss),
        _ => None,
    }
}

/// All comparisons of the lattice methods with the controls that the rows allow.
pub fn compare(rows: &[Row]) -> Vec<Comparison> {
    // Sparsities as bits, which order like the positive numbers they are.
    type Place = (String, String, u64, Stage);
    let mut cells: BTreeMap<Place, BTreeMap<(Method, u64), f64>> = BTreeMap::new();
    for row in rows {
        if let (Repair::None, Some(q)) = (row.repair, quality(row)) {
            let place = (
                row.task.clone(),
                row.cell.to_string(),
                row.sparsity.to_bits(),
                row.stage,
            );
            cells
                .entry(place)
                .or_default()
                .insert((row.method, row.seed), q);
        }
    }
    let mut out = Vec::new();
    for ((task, cell, sparsity, stage), values) in cells {
        let methods: BTreeSet<Method> = values
            .keys()
            .map(|k| k.0)
            .filter(|m| m.is_lattice())
            .collect();
        for method in methods {
            for control in AGAINST {
                let differences: Vec<f64> = values
                    .iter()
                    .filter(|((m, _), _)| *m == method)
                    .filter_map(|((_, seed), q)| Some(q - values.get(&(control, *seed))?))
                    .collect();
                if differences.is_empty() {
                    continue;
                }
                let low = differences.iter().copied().fold(f64::INFINITY, f64::min);
                let high = differences
                    .iter()
                    .copied()
                    .fold(f64::NEG_INFINITY, f64::max);
                out.push(Comparison {
                    task: task.clone(),
                    cell: cell.clone(),
                    sparsity: f64::from_bits(sparsity),
                    stage,
                    method,
                    control,
                    advantage: differences.iter().sum::<f64>() / differences.len() as f64,
                    range: (low, high),
                    seeds: differences.len(),
                    outcome: match () {
                        () if differences.len() < 2 => Outcome::Unclear,
                        () if low > 0.0 => Outcome::Better,
                        () if high < 0.0 => Outcome::Worse,
                        () => Outcome::Unclear,
                    },
                });
            }
        }
    }
    out
}

/// The finding in words: for each lattice method and stage, how often it was better or worse than each control with every
/// seed, and whether that supports pruning by order.
pub fn verdict(rows: &[Row]) -> Vec<String> {
    let comparisons = compare(rows);
    let mut lines = Vec::new();
    for &method in Method::ALL.iter().filter(|m| m.is_lattice()) {
        for stage in [Stage::OneShot, Stage::FineTuned] {
            let here: Vec<&Comparison> = comparisons
                .iter()
                .filter(|c| c.method == method && c.stage == stage)
                .collect();
            if here.is_empty() {
                continue;
            }
            let tally = |control: Method| {
                let of: Vec<_> = here.iter().filter(|c| c.control == control).collect();
                let count = |o: Outcome| of.iter().filter(|c| c.outcome == o).count();
                (count(Outcome::Better), count(Outcome::Worse), of.len())
            };
            let beats = |control: Method| {
                let (better, worse, of) = tally(control);
                of > 0 && better > worse && 2 * better > of
            };
            let when = if stage == Stage::OneShot {
                "one-shot"
            } else {
                "after fine-tuning"
            };
            if here.iter().all(|c| c.seeds == 1) {
                lines.push(single_seed(method, when, &here));
                continue;
            }
            let list: Vec<String> = AGAINST
                .into_iter()
                .map(|c| (c, tally(c)))
                .filter(|(_, (_, _, of))| *of > 0)
                .map(|(c, (better, worse, of))| {
                    format!("{c}: better in {better}, worse in {worse} of {of}")
                })
                .collect();
            let chance = if tally(Method::RandomNeurons).2 > 0 {
                Method::RandomNeurons
            } else {
                Method::Random
            };
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
            lines.push(format!(
                "{method}, {when}: {finding} ({}; counted where every seed agrees)",
                list.join("; ")
            ));
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
    lines.extend(weak_tasks(rows));
    lines
}

/// How far least squares gets without training, beside the baselines that any claim must beat: random weights refitted, and
/// span merged.
fn repairs(rows: &[Row]) -> Vec<String> {
    let mut by_place: BTreeMap<(&str, u64), Vec<&Row>> = BTreeMap::new();
    for row in rows.iter().filter(|r| r.stage == Stage::OneShot) {
        by_place
            .entry((&row.task, row.sparsity.to_bits()))
            .or_default()
            .push(row);
    }
    let mut lines = Vec::new();
    for ((task, sparsity), rows) in by_place {
        let mean = |method: Method, repair: Repair| {
            let of = rows
                .iter()
                .filter(|r| r.method == method && r.repair == repair);
            let values: Vec<f64> = of.filter_map(|r| r.auc.or(r.accuracy)).collect();
            (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
        };
        let shown: Vec<String> = [
            (Method::Magnitude, Repair::None),
            (Method::Magnitude, Repair::Refit),
            (Method::Random, Repair::Refit),
            (Method::Span, Repair::Merge),
            (Method::LatticeContext, Repair::None),
            (Method::LatticeContext, Repair::Merge),
        ]
        .into_iter()
        .filter_map(|(method, repair)| {
            let done = match repair {
                Repair::None => "alone",
                Repair::Refit => "refitted",
                Repair::Merge => "merged",
            };
            mean(method, repair).map(|v| format!("{method} {done} {:.1} %", 100.0 * v))
        })
        .collect();
        if shown
            .iter()
            .any(|s| s.contains("refitted") || s.contains("merged"))
        {
            lines.push(format!(
                "{task} at {:.0} %, without training: {}",
                100.0 * f64::from_bits(sparsity),
                shown.join(", ")
            ));
        }
    }
    lines
}

/// One seed shows no spread and so supports no claim; the counts are given all the same.
fn single_seed(method: Method, when: &str, here: &[&Comparison]) -> String {
    let list: Vec<String> = AGAINST
        .into_iter()
        .filter_map(|control| {
            let of: Vec<_> = here.iter().filter(|c| c.control == control).collect();
            let ahead = of.iter().filter(|c| c.advantage > 0.0).count();
            (!of.is_empty()).then(|| format!("{control} in {ahead} of {}", of.len()))
        })
        .collect();
    format!(
        "{method}, {when}: a single seed supports no verdict; it is ahead of {}",
        list.join(", ")
    )
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
