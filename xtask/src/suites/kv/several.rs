//! One table and one plot over several models: what each policy costs at each budget, as a multiple of the full cache's perplexity.

use eval_report::{Axis, Column, Plot, Reference, Role, Row, Section, Series};
use serde_json::json;

use super::rows::{FULL, SUITE, share};

/// Name of the mean over models.
const MEAN: &str = "mean";

/// The overview of `sections`, one a model, with the window each was run in.
pub(super) fn overview(sections: &[(Section, usize)]) -> Section {
    let models: Vec<String> = sections
        .iter()
        .filter_map(|(section, _)| section.rows.first()?.model.clone())
        .collect();
    let mut rows: Vec<Row> = Vec::new();
    if let Some((first, _)) = sections.first() {
        let evicting = first.rows.iter().filter(|row| row.role != Role::Reference);
        rows.extend(evicting.map(|row| over_models(row, sections, &models)));
    }
    let mean = |row: &Row| row.extra.get(MEAN)?.as_f64();
    // A number of tokens is another share of every window; the first model's stands for all.
    let window = sections.first().map_or(1, |(_, window)| *window);
    let budget = |row: &Row| share(row, window).map(|share| 100.0 * share);
    let plot = Plot {
        title: "Perplexity over that of the full cache, mean over models".into(),
        x: Axis::linear("budget (% of the window)"),
        y: Axis::log("perplexity / full cache's"),
        series: Series::by_method(&rows, budget, MEAN, mean),
        reference: Some(Reference {
            name: FULL.into(),
            y: 1.0,
        }),
    };
    let extras = models.iter().map(String::as_str).chain([MEAN, "held"]);
    let columns = extras.map(|name| Column::Extra(name.to_owned()));
    Section {
        title: "KV cache: perplexity under eviction, all models".into(),
        prose: "Perplexity of decoded tokens as a multiple of the same model's with the full cache; the mean is geometric. Held: bytes of keys and values as \
                a share of the full cache's, mean over models; policies are to be compared where they hold as much. Each model's own table follows."
            .into(),
        columns: [Column::Method, Column::Budget]
            .into_iter()
            .chain(columns)
            .collect(),
        plots: vec![plot],
        rows,
        ..Section::default()
    }
}

/// The row of one policy at one budget over all models.
fn over_models(of: &Row, sections: &[(Section, usize)], models: &[String]) -> Row {
    let mut row = Row {
        budget: of.budget,
        role: of.role,
        ..Row::new(SUITE, &of.method)
    };
    let (mut logs, mut held) = (0.0, 0.0);
    let mut found = 0;
    for ((section, _), model) in sections.iter().zip(models) {
        let same = |r: &&Row| r.method == of.method && r.budget == of.budget;
        let Some(one) = section.rows.iter().find(same) else {
            continue;
        };
        row.seconds += one.seconds;
        let ratio = one.perplexity.zip(one.perplexity_dense).map(|(p, d)| p / d);
        let bytes = one.kv_bytes.zip(one.kv_bytes_full);
        if let (Some(ratio), Some((bytes, full))) = (ratio, bytes) {
            row.extra.insert(model.clone(), json!(rounded(ratio)));
            logs += ratio.ln();
            held += bytes as f64 / full as f64;
            found += 1;
        }
    }
    if found == sections.len() {
        let count = found as f64;
        row.extra
            .insert(MEAN.into(), json!(rounded((logs / count).exp())));
        row.extra
            .insert("held".into(), json!(rounded(held / count)));
    }
    row
}

/// Four decimals: what differs beyond is noise.
fn rounded(x: f64) -> f64 {
    (1e4 * x).round() / 1e4
}

#[cfg(test)]
mod tests {
    use super::*;
    use eval_report::Budget;

    #[test]
    fn the_mean_over_models_is_geometric_and_needs_all_of_them() {
        let row = |model: &str, method: &str, perplexity: f64| Row {
            model: Some(model.into()),
            budget: Some(Budget::Share(0.5)),
            perplexity: Some(perplexity),
            perplexity_dense: Some(2.0),
            kv_bytes: Some(50),
            kv_bytes_full: Some(100),
            ..Row::new(SUITE, method)
        };
        let section = |rows: Vec<Row>| Section {
            rows,
            ..Section::default()
        };
        let sections = [
            (
                section(vec![row("a", "h2o", 4.0), row("a", "tova", 3.0)]),
                256,
            ),
            (section(vec![row("b", "h2o", 16.0)]), 128),
        ];
        let rows = overview(&sections).rows;
        assert_eq!(rows[0].extra["mean"], json!(4.0));
        assert_eq!(rows[0].extra["held"], json!(0.5));
        assert_eq!(
            (&rows[0].extra["a"], &rows[0].extra["b"]),
            (&json!(2.0), &json!(8.0))
        );
        assert!(!rows[1].extra.contains_key("mean"));
    }
}
