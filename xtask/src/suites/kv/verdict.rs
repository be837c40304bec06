//! The rows in words: which policy is best at a budget, which lose to random, and where bytes are not equal.

use super::peak;
use eval_report::{Column, Role, Row, format};

/// Rows whose bytes are within this factor of one another count as equal in bytes.
const EQUAL_BYTES: f64 = 1.1;

/// The quantity that decides.
pub(crate) struct Metric {
    /// Its field in the row and in `spread`.
    pub(crate) field: &'static str,
    /// Whether less is better.
    pub(crate) falls: bool,
    /// Reads it.
    pub(crate) value: fn(&Row) -> Option<f64>,
    /// Shows it.
    pub(crate) show: fn(f64) -> String,
}

impl Metric {
    /// Whether `a` is better than `b`.
    fn better(&self, a: f64, b: f64) -> bool {
        if self.falls { a < b } else { a > b }
    }

    /// The worst and the best of the runs of a row.
    fn range(&self, row: &Row) -> Option<(f64, f64)> {
        let value = (self.value)(row)?;
        let (min, max) = match row.spread.get(self.field) {
            Some(spread) => (spread.min, spread.max),
            None => (value, value),
        };
        Some(if self.falls { (max, min) } else { (min, max) })
    }
}

/// Sentences on every budget of `rows`, in the order of the rows.
pub(crate) fn verdict(rows: &[Row], metric: &Metric) -> String {
    let mut budgets = Vec::new();
    for row in rows {
        if row.budget.is_some() && !budgets.contains(&row.budget) {
            budgets.push(row.budget);
        }
    }
    let full = rows
        .iter()
        .find(|row| row.role == Role::Reference)
        .and_then(metric.value);
    let at = |budget| {
        let rows: Vec<&Row> = rows.iter().filter(|row| row.budget == budget).collect();
        at_budget(&rows, full, metric)
    };
    budgets.into_iter().map(at).collect::<Vec<_>>().join(" ")
}

fn at_budget(rows: &[&Row], full: Option<f64>, metric: &Metric) -> String {
    let budget = rows.first().and_then(|row| Column::Budget.cell(row));
    let mut sentences = Vec::new();
    let policies = || rows.iter().copied().filter(|row| row.method != "oracle");
    let controls: Vec<&Row> = policies().filter(|row| row.role == Role::Control).collect();
    let control = |row: &Row| {
        let near = controls
            .iter()
            .copied()
            .filter(|c| ratio(row, c) <= EQUAL_BYTES);
        near.min_by(|a, b| ratio(row, a).total_cmp(&ratio(row, b)))
    };
    let score = |row: &Row| (metric.value)(row).map(metric.show).unwrap_or_default();
    let best = |rows: &mut dyn Iterator<Item = &Row>| {
        rows.filter_map(|row| Some((row.method.clone(), (metric.value)(row)?)))
            .reduce(|a, b| if metric.better(b.1, a.1) { b } else { a })
            .map(|(name, value)| format!("{name} is best ({})", (metric.show)(value)))
    };
    let held = |row: &Row| peak::held(row).map(format::bytes).unwrap_or_default();
    let oracle = rows.iter().copied().find(|row| row.method == "oracle");
    let oracle = oracle.map(|row| format!(", oracle {}", score(row)));
    // Where eviction helps, the model makes little of its context, and differences tell little of policies.
    let beyond: Vec<&str> = policies()
        .filter(|row| {
            full.zip((metric.value)(row))
                .is_some_and(|(full, value)| metric.better(value, full))
        })
        .map(|row| row.method.as_str())
        .collect();
    let full = full.map(|full| {
        let full = (metric.show)(full);
        format!(" (full cache {full}{})", oracle.unwrap_or_default())
    });
    let start = format!(
        "Budget {}{}",
        budget.unwrap_or_default(),
        full.unwrap_or_default()
    );
    if controls.is_empty() {
        sentences.extend(best(&mut policies()));
        sentences.push("no random control was run".into());
    }
    for own in controls.iter().copied() {
        let is_own = |row: &&Row| control(row).is_some_and(|c| std::ptr::eq(c, own));
        let members: Vec<&Row> = policies().filter(is_own).collect();
        let Some((worst, luckiest)) = metric.range(own) else {
            continue;
        };
        let named = |test: &dyn Fn(f64) -> bool| -> Vec<&str> {
            let methods = members.iter().filter(|row| row.role != Role::Control);
            methods
                .filter(|row| (metric.value)(row).is_some_and(test))
                .map(|row| row.method.as_str())
                .collect()
        };
        if members.len() > 1 {
            let best = best(&mut members.iter().copied()).unwrap_or_default();
            let mut text = format!("at the {} of {}, {best}", held(own), own.method);
            let losers = named(&|value| metric.better(worst, value));
            let ties =
                named(&|value| !metric.better(worst, value) && !metric.better(value, luckiest));
            let verb = if losers.len() == 1 { "loses" } else { "lose" };
            text += &match losers[..] {
                [] => format!(", none loses to {} ({})", own.method, score(own)),
                _ => format!(
                    ", {} {verb} to {} ({})",
                    losers.join(", "),
                    own.method,
                    score(own)
                ),
            };
            if !ties.is_empty() {
                text += &format!(", {} within its range", ties.join(", "));
            }
            sentences.push(text);
        }
    }
    let alone: Vec<String> = policies()
        .filter(|row| !controls.is_empty() && control(row).is_none())
        .map(|row| format!("{} ({} in {})", row.method, score(row), held(row)))
        .collect();
    if !alone.is_empty() {
        sentences.push(format!("no control has the bytes of {}", alone.join(", ")));
    }
    if !beyond.is_empty() {
        sentences.push(format!(
            "better than the full cache itself: {}",
            beyond.join(", ")
        ));
    }
    format!("{start}: {}.", sentences.join("; "))
}

/// How many times the bytes of one row the other holds, state included, at least 1; rows without bytes are alike.
fn ratio(a: &Row, b: &Row) -> f64 {
    match (peak::held(a), peak::held(b)) {
        (Some(a), Some(b)) => {
            let (a, b) = (a.max(1) as f64, b.max(1) as f64);
            (a / b).max(b / a)
        }
        _ => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use eval_report::{Budget, Spread, SpreadOver};

    const PERPLEXITY: Metric = Metric {
        field: "perplexity",
        falls: true,
        value: |row| row.perplexity,
        show: |value| format!("{value:.1}"),
    };

    fn row(method: &str, perplexity: f64, kv_bytes: u64) -> Row {
        Row {
            budget: Some(Budget::Tokens(32)),
            perplexity: Some(perplexity),
            kv_bytes: Some(kv_bytes),
            ..Row::new("kv", method)
        }
    }

    #[test]
    fn a_method_that_loses_to_random_is_named_and_so_are_unequal_bytes() {
        let mut random = row("random", 7.0, 100).control();
        let spread = Spread {
            runs: 3,
            min: 6.8,
            max: 7.1,
            over: SpreadOver::Seeds,
        };
        random.spread.insert("perplexity".into(), spread);
        let rows = [
            random,
            row("lazy", 9.0, 105),
            row("h2o", 6.5, 100),
            row("tova", 7.0, 95),
            row("snapkv", 6.0, 300),
            Row {
                role: Role::Reference,
                budget: None,
                ..row("full", 6.2, 400)
            },
        ];
        assert_eq!(
            verdict(&rows, &PERPLEXITY),
            "Budget 32 (full cache 6.2): at the 100 B of random, h2o is best (6.5), lazy loses to random (7.0), tova within its range; \
             no control has the bytes of snapkv (6.0 in 300 B); better than the full cache itself: snapkv."
        );
    }
}
