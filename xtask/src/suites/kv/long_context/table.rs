//! Rows, intervals and words of the long-context task.

use eval_report::{
    Axis, Budget, Column, Plot, Reference, Role, Row, Section, Series, Spread, SpreadOver, format,
};
use lm_eval::long_context::Questions;
use serde_json::json;

use super::super::bootstrap;
use super::super::policy::Choice;
use super::super::rows::{FULL, SUITE};
use super::outcome::{Answered, Outcome};

/// The control that keeps the first token alone.
pub(super) const NOTHING: &str = "first token";

/// Nats a token by which the full cache must beat the first token alone for a task to be admitted.
const ADMITTED_NATS: f64 = 0.5;
/// The same in exact answers: a share, and how many times those of the first token alone.
const ADMITTED_EXACT: (f64, f64) = (0.25, 2.0);

/// Share of the full cache's bytes from which a row counts as having evicted nothing.
const UNEVICTED: f64 = 0.95;
/// Rows that a sentence names.
const NAMED: usize = 5;

/// A policy, storage and budget on all contexts.
pub(super) struct Cell {
    name: String,
    budget: Option<Budget>,
    evicts: &'static str,
    control: bool,
    outcomes: Vec<Outcome>,
    seconds: f64,
    peak_rss_bytes: Option<u64>,
}

impl Cell {
    pub(super) fn new(name: &str, budget: Option<Budget>, evicts: &'static str) -> Self {
        Self {
            name: name.into(),
            budget,
            evicts,
            control: false,
            outcomes: Vec::new(),
            seconds: 0.0,
            peak_rss_bytes: None,
        }
    }

    pub(super) fn of(choice: &Choice, budget: Option<Budget>) -> Self {
        Self {
            control: choice.is_random(),
            ..Self::new(&choice.name, budget, choice.evicts())
        }
    }

    /// Adds what a context was answered like.
    pub(super) fn push(&mut self, answered: Answered) {
        self.outcomes.push(answered.outcome);
        self.seconds += answered.seconds;
        self.peak_rss_bytes = self.peak_rss_bytes.max(answered.peak_rss_bytes);
    }

    fn mean(&self, of: impl Fn(&Outcome) -> usize) -> u64 {
        let sum: usize = self.outcomes.iter().map(of).sum();
        (sum / self.outcomes.len().max(1)) as u64
    }

    fn exact(&self, drawn: &[usize]) -> f64 {
        let sum: f64 = drawn.iter().map(|&i| self.outcomes[i].exact).sum();
        sum / drawn.len().max(1) as f64
    }

    /// Share of answers chosen among the candidates; none where there are none.
    fn choice(&self) -> Option<f64> {
        let chosen: Option<Vec<f64>> = self.outcomes.iter().map(|o| o.choice).collect();
        let chosen = chosen.filter(|chosen| !chosen.is_empty())?;
        Some(chosen.iter().sum::<f64>() / chosen.len() as f64)
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

    /// The place of another cell's control.
    fn control_of(&self, at: usize) -> Option<usize> {
        let own = self.control(&self.cells[at])?;
        let place = self.cells.iter().position(|cell| std::ptr::eq(cell, own));
        place.filter(|&place| place != at)
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
                seconds: cell.seconds,
                peak_rss_bytes: cell.peak_rss_bytes,
                ..Row::new(SUITE, &cell.name)
            };
            row.role = role(cell);
            let exact = bootstrap::interval(count, seed, |drawn| cell.exact(drawn));
            let recovery = |drawn: &[usize]| self.recovery(cell, drawn);
            let interval = bootstrap::interval(count, seed, recovery);
            let extra = &mut row.extra;
            extra.insert("evicts".into(), json!(cell.evicts));
            extra.insert("recovery".into(), json!(recovery(&all)));
            if let Some(choice) = cell.choice() {
                extra.insert("choice".into(), json!(choice));
            }
            let share = cell.mean(|o| o.bytes()) as f64 / full_bytes;
            extra.insert("bytes_over_full".into(), json!(share));
            let peak = cell.mean(|o| o.peak_bytes);
            extra.insert("kv_bytes_peak".into(), json!(peak));
            let peak_share = peak as f64 / full.mean(|o| o.peak_bytes).max(1) as f64;
            extra.insert("peak_over_full".into(), json!(peak_share));
            extra.insert("tokens_held".into(), json!(cell.mean(|o| o.held)));
            bootstrap::note(&mut row, "exact", exact);
            bootstrap::note(&mut row, "recovery", interval);
            if let Some(control) = self.control(cell).filter(|c| c.name != cell.name) {
                let gain =
                    |drawn: &[usize]| self.recovery(cell, drawn) - self.recovery(control, drawn);
                let interval = bootstrap::interval(count, seed, gain);
                bootstrap::note(&mut row, "over_random", interval);
            }
            spread(&mut row, count, interval);
            row
        };
        self.cells.iter().map(row).collect()
    }
}

fn role(cell: &Cell) -> Role {
    match cell.name.as_str() {
        FULL => Role::Reference,
        NOTHING => Role::Control,
        _ if cell.control => Role::Control,
        _ => Role::Method,
    }
}

/// Notes an interval of recovery where plots look for it.
fn spread(row: &mut Row, runs: usize, interval: Option<(f64, f64)>) {
    if let Some((min, max)) = interval {
        let over = SpreadOver::default();
        let spread = Spread {
            runs,
            min,
            max,
            over,
        };
        row.spread.insert("recovery".into(), spread);
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
         same budget.{} Choice: answers that greedy decoding gives which may only spell one of the candidates. Bytes are what is held when the question comes, with positions and the \
         policy's state; the peak is the most that keys and values took while the context was read.",
        task.kind.about(),
        few(task.count())
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
            Column::Extra("choice".into()),
            Column::Nll,
            Column::Extra("recovery".into()),
            Column::Extra("recovery_low".into()),
            Column::Extra("recovery_high".into()),
            Column::Extra("over_random_low".into()),
            Column::Extra("over_random_high".into()),
            Column::ExtraShare("bytes_over_full".into()),
            Column::ExtraShare("peak_over_full".into()),
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
    // What the row `a` recovers beyond the row `b` on the same contexts.
    let gain = |a: usize, b: usize, drawn: &[usize]| -> f64 {
        let of = |task: &&Task| {
            let [a, b] = [a, b].map(|at| task.recovery(&task.cells[at], drawn));
            share * (a - b)
        };
        admitted.iter().map(of).sum()
    };
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
            row.role = role(cell);
            let interval = bootstrap::interval(count, seed, recovery);
            row.extra.insert("evicts".into(), json!(cell.evicts));
            row.extra.insert("recovery".into(), json!(recovery(&all)));
            row.extra.insert("bytes_over_full".into(), json!(bytes));
            bootstrap::note(&mut row, "recovery", interval);
            if let Some(control) = admitted[0].control_of(at) {
                let gain = bootstrap::interval(count, seed, |drawn| gain(at, control, drawn));
                bootstrap::note(&mut row, "over_random", gain);
            }
            spread(&mut row, count, interval);
            row
        })
        .collect();
    let apart = |a: usize, b: usize| {
        let interval = bootstrap::interval(count, seed, |drawn| gain(a, b, drawn));
        interval.map(|(low, _)| low > 0.0)
    };
    let best: Vec<String> = ranking(&rows, apart);
    let names: Vec<&str> = admitted.iter().map(|task| task.kind.name()).collect();
    let prose = format!(
        "Means over {}.{} {} {}",
        if names.is_empty() {
            "no task".to_owned()
        } else {
            names.join(", ")
        },
        few(count),
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
            Column::Extra("over_random_low".into()),
            Column::Extra("over_random_high".into()),
            Column::Accuracy,
        ],
        plots: vec![plot("Recovery, mean over tasks", &rows)],
        rows,
        ..Section::default()
    }
}

/// What has to be said of intervals over few contexts.
fn few(contexts: usize) -> String {
    match contexts {
        0 | 1 => " One context has no interval.".into(),
        2..=9 => format!(" Intervals over {contexts} contexts are rough."),
        _ => String::new(),
    }
}

/// What recovers most at each budget, in a sentence: several where the differences between them may be chance. `apart` says whether one row recovers more than another on
/// the same contexts, beyond chance; none where one context cannot tell.
fn ranking(rows: &[Row], apart: impl Fn(usize, usize) -> Option<bool>) -> Vec<String> {
    let mut budgets: Vec<Option<Budget>> = Vec::new();
    for row in rows.iter().filter(|row| row.budget.is_some()) {
        if !budgets.contains(&row.budget) {
            budgets.push(row.budget);
        }
    }
    // What has not evicted, as policies that leave a prompt alone, is not compared.
    let evicted = |row: &Row| {
        let share = row.extra.get("bytes_over_full").and_then(|x| x.as_f64());
        share.is_some_and(|share| share < UNEVICTED)
    };
    let name = |&at: &usize| {
        let value = recovered(&rows[at]).map(|x| format::real(x, 2));
        format!("{} {}", rows[at].method, value.unwrap_or_default())
    };
    let sentence = |budget: Option<Budget>| {
        let at: Vec<usize> = (0..rows.len())
            .filter(|&at| rows[at].budget == budget)
            .collect();
        let whole = at.iter().filter(|&&at| !evicted(&rows[at]));
        let whole: Vec<&str> = whole.map(|&at| rows[at].method.as_str()).collect();
        let whole = match &whole[..] {
            [] => String::new(),
            names => format!(" Evicted nothing: {}.", names.join(", ")),
        };
        let mut own: Vec<usize> = at.into_iter().filter(|&at| evicted(&rows[at])).collect();
        own.sort_by(|&a, &b| {
            let [a, b] = [a, b].map(|at| recovered(&rows[at]).unwrap_or(f64::NEG_INFINITY));
            b.total_cmp(&a)
        });
        let Some(&first) = own.first() else {
            return whole.trim_start().to_owned();
        };
        let label = Column::Budget.cell(&rows[first]).unwrap_or_default();
        let alike: Vec<usize> = (own.iter().copied())
            .take_while(|&at| at == first || apart(first, at) != Some(true))
            .collect();
        let named = |from: usize, to: usize| {
            let names: Vec<String> = own[from..to.min(own.len())].iter().map(name).collect();
            names.join(", ")
        };
        let found = match alike.len() {
            1 if own.len() == 1 => named(0, 1),
            1 => format!(
                "most is recovered by {}, beyond chance; then {}",
                named(0, 1),
                named(1, 3)
            ),
            count => {
                let others = count.saturating_sub(NAMED);
                let others = match others {
                    0 => String::new(),
                    others => format!(" and {others} more"),
                };
                format!(
                    "{}{others} recover most, and what lies between them may be chance",
                    named(0, count.min(NAMED))
                )
            }
        };
        format!("Budget {label}: {found}.{whole}")
    };
    budgets.into_iter().map(sentence).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cell with exact answers and nats of each context, one token each.
    fn cell(name: &str, outcomes: &[(f64, f64)]) -> Cell {
        let mut cell = Cell::new(
            name,
            (name != NOTHING && name != FULL).then_some(Budget::Share(0.5)),
            "never",
        );
        cell.control = name == "random";
        for &(exact, nats) in outcomes {
            let bytes = if name == FULL { 100 } else { 50 };
            cell.push(Answered {
                outcome: Outcome {
                    exact,
                    choice: Some(exact),
                    nats,
                    tokens: 1,
                    kv_bytes: bytes,
                    peak_bytes: 2 * bytes,
                    ..Outcome::default()
                },
                seconds: 1.0,
                peak_rss_bytes: None,
            });
        }
        cell
    }

    fn task(cells: Vec<Cell>) -> Task {
        Task {
            kind: Questions::Needle4,
            cells,
        }
    }

    #[test]
    fn a_task_is_admitted_where_the_full_cache_beats_the_first_token_in_nats_and_in_exact_answers()
    {
        let admitted = |nothing: (f64, f64), full: (f64, f64)| {
            task(vec![cell(NOTHING, &[nothing; 3]), cell(FULL, &[full; 3])]).is_admitted()
        };
        assert!(admitted((0.1, 2.0), (0.5, 1.0)));
        assert!(!admitted((0.1, 2.0), (0.5, 1.6)), "0.4 nats");
        assert!(!admitted((0.1, 2.0), (0.24, 1.0)), "too few");
        assert!(!admitted((0.3, 2.0), (0.5, 1.0)), "not twice as many");
    }

    #[test]
    fn recovery_is_1_with_the_full_cache_0_with_the_first_token_and_between_in_proportion() {
        let task = task(vec![
            cell(NOTHING, &[(0.0, 4.0), (0.0, 6.0)]),
            cell(FULL, &[(1.0, 1.0), (1.0, 1.0)]),
            cell("keydiff", &[(0.5, 2.0), (0.5, 3.0)]),
            cell("random", &[(0.0, 3.0), (0.0, 4.0)]),
        ]);
        let rows = task.rows(0);
        let values: Vec<f64> = rows.iter().filter_map(recovered).collect();
        assert_eq!(values, [0.0, 1.0, 0.625, 0.375]);
        let number = |name: &str| rows[2].extra[name].as_f64().unwrap();
        assert_eq!(
            [
                number("choice"),
                number("bytes_over_full"),
                number("peak_over_full")
            ],
            [0.5, 0.5, 0.5]
        );
        // 2 of 3 and 3 of 5 nats: between the two contexts alone.
        assert!((number("recovery_low") - 0.6).abs() < 1e-9);
        assert!((number("recovery_high") - 2.0 / 3.0).abs() < 1e-9);
        // Each context gains more than random does.
        assert!(number("over_random_low") > 0.19 && number("over_random_high") < 0.34);
        assert!(!rows[3].extra.contains_key("over_random_low"));
    }

    #[test]
    fn one_context_has_no_intervals() {
        let task = task(vec![
            cell(NOTHING, &[(0.0, 4.0)]),
            cell(FULL, &[(1.0, 1.0)]),
        ]);
        let rows = task.rows(0);
        assert!(
            rows.iter()
                .all(|row| !row.extra.contains_key("recovery_low"))
        );
        assert!(rows.iter().all(|row| row.spread.is_empty()));
        let prose = section(&task, 100, 0).prose;
        assert!(prose.contains("One context has no interval"), "{prose}");
    }

    #[test]
    fn no_best_is_named_where_the_paired_difference_may_be_chance() {
        let nothing = cell(NOTHING, &[(0.0, 4.0); 6]);
        let full = cell(FULL, &[(1.0, 1.0); 6]);
        let steady = cell("keydiff", &[(0.5, 2.0); 6]);
        let worse = cell("random", &[(0.0, 3.0); 6]);
        let varying: Vec<(f64, f64)> = (0..6).map(|i| (0.5, [1.5, 2.7][i % 2])).collect();
        let of = |more: Cell| {
            let cells = vec![
                cell(NOTHING, &[(0.0, 4.0); 6]),
                cell(FULL, &[(1.0, 1.0); 6]),
                cell("keydiff", &[(0.5, 2.0); 6]),
                more,
            ];
            summary(&[task(cells)], 100, 0).prose
        };
        let clear = of(worse);
        assert!(
            clear.contains("most is recovered by keydiff 0.67, beyond chance; then random 0.33"),
            "{clear}"
        );
        let open = of(cell("vase-dkv", &varying));
        assert!(
            open.contains(
                "keydiff 0.67, vase-dkv 0.63 recover most, and what lies between them may be chance"
            ),
            "{open}"
        );
        let rows = summary(
            &[task(vec![
                nothing,
                full,
                steady,
                cell("random", &[(0.0, 3.0); 6]),
            ])],
            100,
            0,
        )
        .rows;
        assert!((rows[2].extra["over_random_low"].as_f64().unwrap() - 1.0 / 3.0).abs() < 1e-9);
    }
}
