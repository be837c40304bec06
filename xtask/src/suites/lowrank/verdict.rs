//! The rows in one line: in how many cells EoRA loses at most as much as SVD, and SVD less than nothing.

use eval_report::{Role, Row};
use lowrank_eora::repair::Method;

use super::config::NONE;

/// Rows at one compressor and rank: left alone, by plain singular value decomposition, by EoRA.
struct Cell<'a> {
    compress: &'a str,
    rank: u64,
    rows: [&'a Row; 3],
}

impl Cell<'_> {
    /// Whether EoRA ≤ SVD < none.
    fn is_ordered(&self, value: fn(&Row) -> Option<f64>) -> bool {
        match self.rows.map(value) {
            [Some(none), Some(svd), Some(eora)] => eora <= svd && svd < none,
            _ => false,
        }
    }
}

/// One line, or none where no cell has all three.
pub(super) fn verdict(rows: &[Row]) -> Option<String> {
    let cells = cells(rows);
    if cells.is_empty() {
        return None;
    }
    let all = cells.len();
    let loss = |row: &Row| row.loss;
    let (ordered, others): (Vec<_>, Vec<_>) = cells.iter().partition(|cell| cell.is_ordered(loss));
    let perplexity = cells
        .iter()
        .filter(|cell| cell.is_ordered(|row| row.perplexity));
    let mut text = format!(
        "Held-out output error: EoRA <= SVD < none in {} of {all} cells (compression and rank); perplexity: in {} of {all}.",
        ordered.len(),
        perplexity.count(),
    );
    if !others.is_empty() {
        let name = |cell: &&Cell<'_>| format!("{} at rank {}", cell.compress, cell.rank);
        let names: Vec<String> = others.iter().map(name).collect();
        text += &format!(" The error is otherwise in {}.", names.join(", "));
    }
    Some(text)
}

fn cells(rows: &[Row]) -> Vec<Cell<'_>> {
    let find = |compress: &str, method: &str, rank: Option<u64>| {
        rows.iter().find(|row| {
            row.role == Role::Method
                && row.method == method
                && row.rank == rank
                && row.compress.as_deref() == Some(compress)
        })
    };
    let eora = (rows.iter()).filter(|row| row.method == Method::Eora.name());
    eora.filter_map(|row| {
        let (compress, rank) = (row.compress.as_deref()?, row.rank?);
        let (none, svd) = (
            find(compress, NONE, None)?,
            find(compress, Method::Svd.name(), row.rank)?,
        );
        Some(Cell {
            compress,
            rank,
            rows: [none, svd, row],
        })
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(method: &str, rank: Option<u64>, loss: f64, perplexity: f64) -> Row {
        Row {
            compress: Some("rtn-int3".into()),
            rank,
            loss: Some(loss),
            perplexity: Some(perplexity),
            ..Row::new("lowrank", method)
        }
    }

    #[test]
    fn cells_are_counted_and_those_in_another_order_named() {
        let mut rows = vec![
            Row::new("lowrank", "dense"),
            row("none", None, 0.5, 9.0),
            row("svd", Some(4), 0.4, 8.0),
            row("eora", Some(4), 0.4, 8.5),
            row("svd", Some(8), 0.3, 7.0),
            row("eora", Some(8), 0.2, 6.0),
            row("svd", Some(16), 0.2, 6.0),
            row("eora", Some(16), 0.25, 5.0),
            row("eora", Some(32), 0.1, 4.0),
        ];
        // No cell of its own: a control, and a rank that SVD was not run at.
        rows.push(row("none", None, 0.1, 4.0).control());
        assert_eq!(
            verdict(&rows).unwrap(),
            "Held-out output error: EoRA <= SVD < none in 2 of 3 cells (compression and rank); perplexity: in 2 of 3. \
             The error is otherwise in rtn-int3 at rank 16."
        );
    }

    #[test]
    fn a_repair_that_gains_nothing_is_not_less_than_none() {
        let mut rows = vec![
            row("none", None, 0.4, 9.0),
            row("svd", Some(4), 0.4, 9.0),
            row("eora", Some(4), 0.3, 8.0),
        ];
        assert!(verdict(&rows).unwrap().contains(" in 0 of 1 cells"));
        rows.remove(1);
        assert_eq!(verdict(&rows), None);
    }
}
