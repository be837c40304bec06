//! How the rows of `eval lowrank` are shown.

use eval_report::{Axis, Column, DENSE, Plot, Point, Reference, Role, Row, Section, Series};
use serde_json::Value;

use super::Config;
use super::verdict::verdict;

/// The table with its explanation and plots.
pub(super) fn section(config: &Config, rows: Vec<Row>) -> Section {
    let mut columns = vec![
        Column::Compress,
        Column::Method,
        Column::Rank,
        Column::LossUncompensated,
        Column::Loss,
        Column::Perplexity,
        Column::Bytes,
        Column::BytesOverDense,
        Column::Seconds,
        Column::PeakRss,
    ];
    let extra = [
        "loss_drift",
        "loss_requantised",
        "mnn",
        "nuclear",
        "entropy",
        "instead_of",
    ];
    columns.extend(extra.map(|name| Column::Extra(name.into())));
    Section {
        title: "Low-rank repair".into(),
        prose: format!(
            "Output error is the relative error of all repaired linears on held-out windows of the calibration text, behind \
             the repaired blocks; perplexity is of W_c + B A in f32. {} Rows of controls spend the bytes of the factors on \
             more bits, smaller groups or fewer zeros instead. Sizes count the whole model: quantised weights as a GPTQ file \
             holds them; pruned ones as the values that stay, in the stored dtype, and a bit for each weight (at 2:4 the \
             two-bit index of each kept value), where a dense file with zeros takes as much as the uncompressed model; \
             factors in the dtype they are stored in. Time and memory are those of the repair.",
            match config.one_pass {
                true =>
                    "Each block was compressed behind the repaired ones, so rows differ in W_c.",
                false =>
                    "The model was compressed once; all methods and ranks repair the same W_c.",
            }
        ),
        columns,
        remarks: verdict(&rows).into_iter().collect(),
        plots: plots(config, &rows),
        rows,
        ..Section::default()
    }
}

/// For each compressor perplexity over bytes, and loss by layer at the largest rank.
fn plots(config: &Config, rows: &[Row]) -> Vec<Plot> {
    let dense = rows
        .iter()
        .find(|row| row.method == DENSE)
        .and_then(|row| row.perplexity);
    let mut plots = Vec::new();
    for compressor in config.compressors.iter().map(ToString::to_string) {
        let own: Vec<&Row> = (rows.iter())
            .filter(|row| row.compress.as_ref() == Some(&compressor) && row.role != Role::Control)
            .collect();
        let controls = rows.iter().filter(|row| {
            let instead = row.extra.get("instead_of").and_then(Value::as_str);
            instead.is_some_and(|text| text.starts_with(&format!("{compressor} + ")))
        });
        let mut by_size: Vec<Series> = Vec::new();
        let named = own.iter().map(|row| (row.method.as_str(), *row));
        for (name, row) in named.chain(controls.map(|row| ("bytes on weights", row))) {
            let (Some(bytes), Some(perplexity)) = (row.bytes, row.perplexity) else {
                continue;
            };
            let point = Point::from((bytes as f64 / f64::from(1 << 20), perplexity));
            match by_size.iter_mut().find(|series| series.name == name) {
                Some(series) => series.points.push(point),
                None => by_size.push(Series {
                    name: name.into(),
                    points: vec![point],
                    control: row.role == Role::Control,
                }),
            }
        }
        plots.push(Plot {
            title: format!("{compressor}: perplexity over size"),
            x: Axis::linear("size of the model (MiB)"),
            y: Axis::log("perplexity"),
            series: by_size,
            reference: dense.map(|y| Reference {
                name: DENSE.into(),
                y,
            }),
        });
        let largest = own.iter().filter_map(|row| row.rank).max();
        let by_layer = own
            .iter()
            .filter(|row| row.rank.is_none() || row.rank == largest);
        plots.push(Plot {
            title: format!(
                "{compressor}: output error by linear, rank {}",
                largest.unwrap_or(0)
            ),
            x: Axis::linear("linear, in the order of the data (7 a block)"),
            y: Axis::linear("relative output error"),
            series: by_layer
                .map(|row| Series {
                    name: row.method.clone(),
                    points: (row.layers.iter().enumerate())
                        .filter_map(|(i, layer)| {
                            Some(Point::from((i as f64, layer["loss"].as_f64()?)))
                        })
                        .collect(),
                    control: false,
                })
                .collect(),
            reference: None,
        });
    }
    plots
}
