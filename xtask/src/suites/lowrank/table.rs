//! How the rows of `eval lowrank` are shown.

use eval_report::{
    Axis, Column, DENSE, Plot, Point, Reference, Role, Row, Section, Series, format,
};
use lowrank_eora::compress::Compressor;
use serde_json::Value;

use super::config::Config;
use super::verdict::verdict;

/// The table with its explanation and plots.
pub(super) fn section(config: &Config, starts: &[&str], rows: Vec<Row>) -> Section {
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
            "Output error is the relative error of all linears on held-out windows of the calibration text, with the inputs of \
             the repaired model. Perplexity is computed in f32 with the weights W_c + B A. {} Baselines spend the bytes of the \
             factors on more bits, smaller groups or fewer zeros. Sizes are those of the whole model's tensors in a file: \
             weights in groups as GPTQ, weights in blocks as GGUF with embedding and head rounded as --rest says, factors in their \
             own dtype. Where a GGUF file of weights in groups is written, they are counted and measured as it holds them. Pruned weights count as the kept \
             values and one bit for each weight (for 2:4, two bits for each kept value); a file that stores the zeros is as \
             large as the uncompressed one. bytes_saved in the JSON has the tensors of each file that --save wrote. Time and \
             memory are those of the repair.",
            match (&config.compressed, config.one_pass) {
                (Some(_), _) =>
                    "The compressed model was given; what it quantised besides linears is measured too where it is a GGUF file.",
                (None, true) =>
                    "Each block was compressed after the blocks before it were repaired, so W_c differs between rows.",
                (None, false) =>
                    "The model was compressed once; all methods and ranks repair the same W_c.",
            }
        ),
        columns,
        remarks: verdict(&rows)
            .into_iter()
            .chain(with_zeros(config, &rows))
            .collect(),
        plots: plots(starts, &rows),
        rows,
        ..Section::default()
    }
}

/// Of weights that are pruned and not quantised: what the files take that are written, which store the zeros.
fn with_zeros(config: &Config, rows: &[Row]) -> Option<String> {
    let pruned = |compressor: &&Compressor| {
        compressor.prune.is_some() && compressor.quantise.is_none() && compressor.blocks.is_none()
    };
    let names: Vec<String> = (config.compressors.iter().filter(pruned))
        .map(ToString::to_string)
        .collect();
    let bytes = rows.iter().find_map(|row| row.bytes_dense)?;
    (!names.is_empty()).then(|| {
        format!(
            "Sizes of {} are those of kept values and their places; the files that --save writes store the zeros too and take {}.",
            names.join(", "),
            format::bytes(bytes)
        )
    })
}

/// For each compressed model perplexity over bytes, and loss by layer at the largest rank.
fn plots(starts: &[&str], rows: &[Row]) -> Vec<Plot> {
    let dense = rows
        .iter()
        .find(|row| row.method == DENSE)
        .and_then(|row| row.perplexity);
    let mut plots = Vec::new();
    for &compressor in starts {
        let own: Vec<&Row> = (rows.iter())
            .filter(|row| row.compress.as_deref() == Some(compressor) && row.role != Role::Control)
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
