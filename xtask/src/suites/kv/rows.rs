//! Names, plots and settings of the rows of all tasks.

use eval_report::{Axis, Budget, Plot, Reference, Role, Row, Series};

use super::peak;
use super::verdict::Metric;

/// Name of the suite in rows.
pub(super) const SUITE: &str = "kv";
/// Where statistics of queries come from where nothing is said.
pub(super) const OWN_QUERIES: &str = "the sequence's own";
/// Method of the row that keeps everything.
pub const FULL: &str = "full";

/// The share of the window that a row's budget is.
pub(super) fn share(row: &Row, window: usize) -> Option<f64> {
    Some(match row.budget? {
        Budget::Share(share) => share,
        Budget::Tokens(tokens) => tokens as f64 / window as f64,
    })
}

/// `metric` over the budget as a share of a window of `window`.
pub(super) fn over_budget(
    title: &str,
    axis: Axis,
    rows: &[Row],
    window: usize,
    metric: &Metric,
    reference: Option<Reference>,
) -> Plot {
    let budget = |row: &Row| share(row, window).map(|share| 100.0 * share);
    Plot {
        title: format!("{title} over budget"),
        x: Axis::linear("budget (% of the window)"),
        y: axis,
        series: Series::by_method(rows, budget, metric.field, metric.value),
        reference,
    }
}

/// `metric` over the bytes that were held, state included, which is what policies are to be compared at.
pub(super) fn over_bytes(
    title: &str,
    axis: Axis,
    rows: &[Row],
    metric: &Metric,
    reference: Option<Reference>,
) -> Plot {
    // To a tenth, which is what an axis has room for.
    let held = |row: &Row| {
        let share = peak::held(row)? as f64 / row.kv_bytes_full? as f64;
        Some((1e3 * share).round() / 10.0)
    };
    Plot {
        title: format!("{title} over bytes held"),
        x: Axis::linear("held, state included (% of the full cache's keys and values)"),
        y: axis,
        series: Series::by_method(rows, held, metric.field, metric.value),
        reference,
    }
}

/// Makes the full cache's row, which Row::new only does for the name of the dense model, the reference.
pub(super) fn reference(row: Row) -> Row {
    Row {
        role: Role::Reference,
        ..row
    }
}
