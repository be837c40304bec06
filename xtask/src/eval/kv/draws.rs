//! Several runs of one cell as one row.

use anyhow::{Context, Result};
use serde_json::Value;

use crate::row::{Row, Spread};

/// The mean of `rows` over `fields`, each with its range; everything else is the first row's, the time that of all.
pub(crate) fn mean(rows: &[Row], fields: &[&str]) -> Result<Row> {
    let first = rows.first().context("a cell without runs")?;
    if rows.len() == 1 {
        return Ok(first.clone());
    }
    let values = rows
        .iter()
        .map(serde_json::to_value)
        .collect::<Result<Vec<Value>, _>>()
        .context("row to JSON")?;
    let mut mean = serde_json::to_value(first).context("row to JSON")?;
    let mut spreads = Vec::new();
    for &field in fields {
        let measured: Vec<f64> = values
            .iter()
            .filter_map(|row| row[field].as_f64())
            .collect();
        if measured.len() < rows.len() {
            // Means over fewer runs would not be comparable.
            if let Some(object) = mean.as_object_mut() {
                object.remove(field);
            }
            continue;
        }
        mean[field] = (measured.iter().sum::<f64>() / rows.len() as f64).into();
        let spread = Spread {
            runs: rows.len(),
            min: measured.iter().copied().fold(f64::INFINITY, f64::min),
            max: measured.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        };
        spreads.push((field.to_owned(), spread));
    }
    let mut mean: Row = serde_json::from_value(mean).context("row from JSON")?;
    mean.spread.extend(spreads);
    mean.seconds = rows.iter().map(|row| row.seconds).sum();
    mean.peak_rss_bytes = rows.iter().filter_map(|row| row.peak_rss_bytes).max();
    Ok(mean)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_has_its_range_and_leaves_out_what_not_all_runs_measured() {
        let run = |perplexity, nll| Row {
            perplexity: Some(perplexity),
            nll,
            seconds: 1.0,
            ..Row::new("kv", "random")
        };
        let row = mean(
            &[run(2.0, Some(1.0)), run(4.0, None)],
            &["perplexity", "nll"],
        )
        .unwrap();
        assert_eq!(
            (row.perplexity, row.nll, row.seconds),
            (Some(3.0), None, 2.0)
        );
        let spread = row.spread["perplexity"];
        assert_eq!((spread.runs, spread.min, spread.max), (2, 2.0, 4.0));
    }
}
