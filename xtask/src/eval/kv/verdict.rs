//! The rows in words: which policy is best at a budget, which lose to random, and where bytes are not equal.

use crate::column::Column;
use crate::row::{Role, Row};

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
    let mut text = format!("At budget {}", budget.unwrap_or_default());
    let random = rows.iter().copied().find(|row| row.method == "random");
    let least = rows.iter().filter_map(|row| row.kv_bytes).min();
    let base = random.and_then(|row| row.kv_bytes).or(least).unwrap_or(0) as f64;
    let times = |row: &Row| {
        row.kv_bytes
            .map_or(1.0, |bytes| bytes as f64 / base.max(1.0))
    };
    let is_equal = |row: &Row| (1.0 / EQUAL_BYTES..=EQUAL_BYTES).contains(&times(row));

    let best = rows
        .iter()
        .filter(|row| row.method != "oracle" && is_equal(row))
        .filter_map(|row| Some((row.method.as_str(), (metric.value)(row)?)))
        .reduce(|a, b| if metric.better(b.1, a.1) { b } else { a });
    if let Some((name, value)) = best {
        text += &format!(
            " {name} is best among equal bytes ({}",
            (metric.show)(value)
        );
        if let Some(full) = full {
            text += &format!("; full cache {}", (metric.show)(full));
        }
        text += ")";
    }
    if let Some((random, (worst, best))) = random.and_then(|r| Some((r, metric.range(r)?))) {
        let against = |test: &dyn Fn(f64) -> bool| -> Vec<&str> {
            rows.iter()
                .filter(|row| row.role == Role::Method && row.method != "oracle")
                .filter(|row| (metric.value)(row).is_some_and(test))
                .map(|row| row.method.as_str())
                .collect()
        };
        let value = (metric.value)(random).map(metric.show).unwrap_or_default();
        let losers = against(&|value| metric.better(worst, value));
        let ties = against(&|value| !metric.better(worst, value) && !metric.better(value, best));
        text += &match losers[..] {
            [] => format!("; nothing loses to random ({value})"),
            [one] => format!("; {one} loses to random ({value})"),
            _ => format!("; {} lose to random ({value})", losers.join(", ")),
        };
        if !ties.is_empty() {
            text += &format!("; within random's own range: {}", ties.join(", "));
        }
    }
    let unequal: Vec<String> = rows
        .iter()
        .filter(|row| !is_equal(row))
        .map(|row| format!("{} {:.2}×", row.method, times(row)))
        .collect();
    if unequal.is_empty() {
        text += ". All hold equal bytes within a tenth.";
    } else {
        let than = random.map_or("the smallest", |_| "random");
        text += &format!(
            ". Not at equal bytes, as multiples of {than}: {}.",
            unequal.join(", ")
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row::{Budget, Spread};

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
        };
        random.spread.insert("perplexity".into(), spread);
        let rows = [
            random,
            row("lazy", 9.0, 105),
            row("h2o", 6.5, 100),
            row("tova", 7.0, 95),
            row("snapkv", 6.0, 300),
        ];
        assert_eq!(
            verdict(&rows, &PERPLEXITY),
            "At budget 32 h2o is best among equal bytes (6.5); lazy loses to random (7.0); within random's own range: tova. \
             Not at equal bytes, as multiples of random: snapkv 3.00×."
        );
    }
}
