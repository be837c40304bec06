//! Rows, intervals and words of the long-context task.

use causal_lm::CacheSet;
use eval_report::{
    Axis, Budget, Column, Plot, Reference, Role, Row, Section, Series, Spread, SpreadOver,
    Stopwatch, format,
};
use lm_eval::long_context::Questions;
use serde_json::json;

use super::super::bootstrap;
use super::super::policy::Choice;
use super::super::rows::{FULL, SUITE};

/// The control that keeps the first token alone.
pub(super) const NOTHING: &str = "first token";

/// Nats a token by which the full cache must beat the first token alone for a task to be admitted.
const ADMITTED_NATS: f64 = 0.5;
/// The same in exact answers: a share, and how many times those of the first token alone.
const ADMITTED_EXACT: (f64, f64) = (0.25, 2.0);

/// Share of the full cache's bytes from which a row counts as having evicted nothing.
const UNEVICTED: f64 = 0.95;

/// The questions of one context.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Outcome {
    pub(super) exact: f64,
    pub(super) nats: f64,
    pub(super) tokens: usize,
    context: usize,
    kv_bytes: usize,
    peak_bytes: usize,
    state_bytes: usize,
    position_bytes: usize,
    held: usize,
}

impl Outcome {
    /// What a cache holds after a context.
    pub(super) fn of(cache: &CacheSet, context: usize) -> Self {
        let layers = cache.shapes().len();
        let held = (0..layers).map(|layer| cache.physical_len(layer)).max();
        Self {
            context,
            kv_bytes: cache.bytes(),
            peak_bytes: cache.peak_bytes(),
            state_bytes: cache.state_bytes(),
            position_bytes: cache.position_bytes(),
            held: held.unwrap_or(0),
            ..Self::default()
        }
    }

    /// Everything that stays in memory.
    fn bytes(&self) -> usize {
        self.kv_bytes + self.state_bytes + self.position_bytes
    }
}

/// A policy, storage and budget on all contexts.
pub(super) struct Cell {
    name: String,
    budget: Option<Budget>,
    evicts: &'static str,
    control: bool,
    outcomes: Vec<Outcome>,
    timed: Row,
}

impl Cell {
    pub(super) fn new(name: &str, budget: Option<Budget>, evicts: &'static str) -> Self {
        Self {
            name: name.into(),
            budget,
            evicts,
            control: false,
            outcomes: Vec::new(),
            timed: Row::default(),
        }
    }

    pub(super) fn of(choice: &Choice, budget: Option<Budget>) -> Self {
        Self {
            control: choice.is_random(),
            ..Self::new(&choice.name, budget, choice.evicts())
        }
    }

    pub(super) fn push(&mut self, outcome: Outcome) {
        self.outcomes.push(outcome);
    }

    /// Adds the time that a context took.
    pub(super) fn took(&mut self, watch: Stopwatch) {
        let seconds = self.timed.seconds;
        watch.stop(&mut self.timed);
        self.timed.seconds += seconds;
    }

    fn mean(&self, of: impl Fn(&Outcome) -> usize) -> u64 {
        let sum: usize = self.outcomes.iter().map(of).sum();
        (sum / self.outcomes.len().max(1)) as u64
    }

    fn exact(&self, drawn: &[usize]) -> f64 {
        let sum: f64 = drawn.iter().map(|&i| self.outcomes[i].exact).sum();
        sum / drawn.len().max(1) as f64
    }

    /// Nats a token.
    fn nll(&self, drawn: &[usize]) -> f64 {
        let own = || drawn.iter().map(|&i| self.outcomes[i]);
        let tokens: usize = own().map(|o| o.tokens).sum();
        own().map(|o| o.nats).sum::<f64>() / tokens.max(1) as f64
    }
}

/// One kind of questions at one length.
pub(super) struct Task {
    pub(super) kind: Questions,
    /// The first token alone, the full cache, the others.
    pub(super) cells: Vec<Cell>,
}

impl Task {
    fn count(&self) -> usize {
        self.cells[0].outcomes.len()
    }

    /// The share that a cell recovers of what the context is worth in nats.
    fn recovery(&self, cell: &Cell, drawn: &[usize]) -> f64 {
        let (nothing, full) = (self.cells[0].nll(drawn), self.cells[1].nll(drawn));
        (nothing - cell.nll(drawn)) / (nothing - full)
    }

    /// Whether the full cache is clearly better than no context, in nats and in exact answers.
    fn is_admitted(&self) -> bool {
        let all: Vec<usize> = (0..self.count()).collect();
        let [nothing, full] = [&self.cells[0], &self.cells[1]];
        let (least, times) = ADMITTED_EXACT;
        nothing.nll(&all) - full.nll(&all) >= ADMITTED_NATS
            && full.exact(&all) >= least.max(times * nothing.exact(&all))
    }

    /// The control of a cell: random eviction at its budget in the same storage, or in the first.
    fn control(&self, cell: &Cell) -> Option<&Cell> {
        let storage = |cell: &Cell| cell.name.split_once('+').map(|(_, s)| s.to_owned());
        let own = |c: &&Cell| c.control && c.budget == cell.budget;
        let same = |c: &&Cell| own(c) && storage(c) == storage(cell);
        self.cells
            .iter()
            .find(same)
            .or_else(|| self.cells.iter().find(own))
    }

    fn rows(&self, seed: u64) -> Vec<Row> {
        let count = self.count();
        let all: Vec<usize> = (0..count).collect();
        let full = &self.cells[1];
        let full_bytes = full.mean(|o| o.bytes()) as f64;
        let row = |cell: &Cell| {
            let mut row = Row {
                budget: cell.budget,
                accuracy: Some(cell.exact(&all)),
                accuracy_dense: Some(full.exact(&all)),
                nll: Some(cell.nll(&all)),
                kv_bytes: Some(cell.mean(|o| o.kv_bytes)),
                kv_bytes_full: Some(full.mean(|o| o.kv_bytes)),
                state_bytes: Some(cell.mean(|o| o.state_bytes)),
                seconds: cell.timed.seconds,
                peak_rss_bytes: cell.timed.peak_rss_bytes,
                ..Row::new(SUITE, &cell.name)
            };
            row.role = match cell.name.as_str() {
                FULL => Role::Reference,
                NOTHING => Role::Control,
                _ if cell.control => Role::Control,
                _ => Role::Method,
            };
            let (low, high) = bootstrap::interval(count, seed, |drawn| cell.exact(drawn));
            let recovery = |drawn: &[usize]| self.recovery(cell, drawn);
            let (least, most) = bootstrap::interval(count, seed, recovery);
            let extra = &mut row.extra;
            extra.insert("evicts".into(), json!(cell.evicts));
            extra.insert("exact_low".into(), json!(low));
            extra.insert("exact_high".into(), json!(high));
            extra.insert("recovery".into(), json!(recovery(&all)));
            extra.insert("recovery_low".into(), json!(least));
            extra.insert("recovery_high".into(), json!(most));
            let share = cell.mean(|o| o.bytes()) as f64 / full_bytes;
            extra.insert("bytes_over_full".into(), json!(share));
            extra.insert("kv_bytes_peak".into(), json!(cell.mean(|o| o.peak_bytes)));
            extra.insert("tokens_held".into(), json!(cell.mean(|o| o.held)));
            if let Some(control) = self.control(cell).filter(|c| c.name != cell.name) {
                let gain =
                    |drawn: &[usize]| self.recovery(cell, drawn) - self.recovery(control, drawn);
                let (low, high) = bootstrap::interval(count, seed, gain);
                extra.insert("over_random_low".into(), json!(low));
                extra.insert("over_random_high".into(), json!(high));
            }
            let spread = Spread {
                runs: count,
                min: least,
                max: most,
                over: SpreadOver::default(),
            };
            row.spread.insert("recovery".into(), spread);
            row
        };
        self.cells.iter().map(row).collect()
    }
}

fn recovered(row: &Row) -> Option<f64> {
    row.extra.get("recovery")?.as_f64()
}

/// Recovery over bytes, a curve for each method; what keeps every token is a single point.
fn plot(title: &str, rows: &[Row]) -> Plot {
    let bytes = |row: &Row| {
        let share = row.extra.get("bytes_over_full")?.as_f64()?;
        Some((1e3 * share).round() / 10.0)
    };
    let shown: Vec<Row> = rows
        .iter()
        .filter(|row| row.method != NOTHING)
        .cloned()
        .collect();
    Plot {
        title: title.into(),
        x: Axis::linear("bytes, state and positions included (% of the full cache's)"),
        y: Axis::linear("recovery"),
        series: Series::by_method(&shown, bytes, "recovery", recovered),
        reference: Some(Reference {
            name: FULL.into(),
            y: 1.0,
        }),
    }
}

/// One task's table.
pub(super) fn section(task: &Task, length: usize, seed: u64) -> Section {
    let rows = task.rows(seed);
    let admitted = if task.is_admitted() {
        "Admitted: the full cache is clearly better than the first token alone."
    } else {
        "Not admitted: with the full cache the model answers too little for policies to be told apart."
    };
    let prose = format!(
        "{} {admitted} Exact: answers that greedy decoding would give. Recovery: how much of what the context is worth in nats per answer token is left, 0 with the \
         first token alone and 1 with the full cache. Intervals are 95 % by bootstrap over contexts; over random is the paired difference in recovery from random eviction at the \
         same budget. Bytes are what is held when the question comes, with positions and the policy's state.",
        task.kind.about()
    );
    let title = format!("KV cache: {} at {length} tokens", task.kind.name());
    Section {
        plots: vec![plot(&format!("Recovery, {}", task.kind.name()), &rows)],
        title,
        prose,
        columns: vec![
            Column::Method,
            Column::Budget,
            Column::Extra("evicts".into()),
            Column::Accuracy,
            Column::Extra("exact_low".into()),
            Column::Extra("exact_high".into()),
            Column::Nll,
            Column::Extra("recovery".into()),
            Column::Extra("recovery_low".into()),
            Column::Extra("recovery_high".into()),
            Column::Extra("over_random_low".into()),
            Column::Extra("over_random_high".into()),
            Column::ExtraShare("bytes_over_full".into()),
            Column::KvBytes,
            Column::StateBytes,
            Column::Extra("tokens_held".into()),
            Column::Seconds,
        ],
        rows,
        ..Section::default()
    }
    .fact("context tokens", task.cells[0].mean(|o| o.context))
}

/// Means over the admitted tasks of one length, with intervals over contexts; a draw takes contexts of the same numbers for all tasks.
pub(super) fn summary(tasks: &[Task], length: usize, seed: u64) -> Section {
    let admitted: Vec<&Task> = tasks.iter().filter(|task| task.is_admitted()).collect();
    let refused: Vec<&str> = tasks
        .iter()
        .filter(|task| !task.is_admitted())
        .map(|task| task.kind.name())
        .collect();
    let count = tasks.first().map_or(0, Task::count);
    let cells = admitted.first().map_or(0, |task| task.cells.len());
    let share = 1.0 / admitted.len().max(1) as f64;
    let all: Vec<usize> = (0..count).collect();
    let rows: Vec<Row> = (0..cells)
        .map(|at| {
            let own = |of: &dyn Fn(&Task, &Cell) -> f64| -> f64 {
                admitted
                    .iter()
                    .map(|task| share * of(task, &task.cells[at]))
                    .sum()
            };
            let recovery = |drawn: &[usize]| own(&|task, cell| task.recovery(cell, drawn));
            let exact = |drawn: &[usize]| own(&|_, cell| cell.exact(drawn));
            let bytes = own(&|task, cell| {
                cell.mean(|o| o.bytes()) as f64 / task.cells[1].mean(|o| o.bytes()) as f64
            });
            let cell = &admitted[0].cells[at];
            let mut row = Row {
                budget: cell.budget,
                accuracy: Some(exact(&all)),
                accuracy_dense: Some(
                    admitted
                        .iter()
                        .map(|t| share * t.cells[1].exact(&all))
                        .sum(),
                ),
                ..Row::new(SUITE, &cell.name)
            };
            row.role = match cell.name.as_str() {
                FULL => Role::Reference,
                NOTHING => Role::Control,
                _ if cell.control => Role::Control,
                _ => Role::Method,
            };
            let (low, high) = bootstrap::interval(count, seed, recovery);
            row.extra.insert("evicts".into(), json!(cell.evicts));
            row.extra.insert("recovery".into(), json!(recovery(&all)));
            row.extra.insert("recovery_low".into(), json!(low));
            row.extra.insert("recovery_high".into(), json!(high));
            row.extra.insert("bytes_over_full".into(), json!(bytes));
            let spread = Spread {
                runs: count,
                min: low,
                max: high,
                over: SpreadOver::default(),
            };
            row.spread.insert("recovery".into(), spread);
            row
        })
        .collect();
    let best: Vec<String> = ranking(&rows);
    let names: Vec<&str> = admitted.iter().map(|task| task.kind.name()).collect();
    let prose = format!(
        "Means over {}. {} {}",
        if names.is_empty() {
            "no task".to_owned()
        } else {
            names.join(", ")
        },
        if refused.is_empty() {
            "All tasks were admitted.".to_owned()
        } else {
            format!(
                "Not admitted, because the full cache answers too little: {}.",
                refused.join(", ")
            )
        },
        best.join(" ")
    );
    Section {
        title: format!("KV cache: long contexts of {length} tokens"),
        prose,
        columns: vec![
            Column::Method,
            Column::Budget,
            Column::Extra("evicts".into()),
            Column::ExtraShare("bytes_over_full".into()),
            Column::Extra("recovery".into()),
            Column::Extra("recovery_low".into()),
            Column::Extra("recovery_high".into()),
            Column::Accuracy,
        ],
        plots: vec![plot("Recovery, mean over tasks", &rows)],
        rows,
        ..Section::default()
    }
}

/// The best method at each budget, in a sentence.
fn ranking(rows: &[Row]) -> Vec<String> {
    let mut budgets: Vec<Option<Budget>> = Vec::new();
    for row in rows.iter().filter(|row| row.budget.is_some()) {
        if !budgets.contains(&row.budget) {
            budgets.push(row.budget);
        }
    }
    // What has not evicted, as policies that leave a prompt alone, is not compared.
    let evicted = |row: &&Row| {
        let share = row.extra.get("bytes_over_full").and_then(|x| x.as_f64());
        share.is_some_and(|share| share < UNEVICTED)
    };
    let sentence = |budget: Option<Budget>| {
        let at = |row: &&Row| row.budget == budget;
        let mut own: Vec<&Row> = rows.iter().filter(at).filter(evicted).collect();
        let whole = rows.iter().filter(at).filter(|row| !evicted(row));
        let whole: Vec<&str> = whole.map(|row| row.method.as_str()).collect();
        let whole = match &whole[..] {
            [] => String::new(),
            names => format!(" Evicted nothing: {}.", names.join(", ")),
        };
        own.sort_by(|a, b| {
            recovered(b)
                .partial_cmp(&recovered(a))
                .unwrap_or(std::cmp::Ordering::Equal)
        });
        let name = |row: &&Row| {
            let value = recovered(row)
                .map(|x| format::real(x, 2))
                .unwrap_or_default();
            format!("{} {value}", row.method)
        };
        let best: Vec<String> = own.iter().take(3).map(name).collect();
        let budget = own
            .first()
            .and_then(|row| Column::Budget.cell(row))
            .unwrap_or_default();
        format!(
            "Budget {budget}: most is recovered by {}.{whole}",
            best.join(", ")
        )
    };
    budgets.into_iter().map(sentence).collect()
}
