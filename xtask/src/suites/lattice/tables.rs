//! Tables of what methods cost, an overview and one for each task and cell.

use anyhow::Result;
use eval_report::{Axis, Column, DENSE, Plot, Reference, Row, Section, Series, mean_over_seeds};
use prune_lattice::experiment::{self, Metric, OrderSummary, Repair, Stage, Treatment, verdict};
use prune_lattice::prune::{Method, Sparsity};
use serde_json::json;

use super::Config;

/// Columns of the tables of tasks.
const INT8: &str = "int8";
const REMOVABLE: &str = "removed exactly";
const UNFED: &str = "unfed";
const EQUAL: &str = "equal neurons";

/// What the first table shows, in this order: what is recommended, what the paper proposes, what both must beat.
const SHOWN: [Treatment; 7] = [
    Treatment::new(Method::Magnitude, Repair::Refit),
    Treatment::new(Method::Span, Repair::Merge),
    Treatment::new(Method::LatticeContext, Repair::None),
    Treatment::new(Method::LatticeContext, Repair::Merge),
    Treatment::new(Method::Magnitude, Repair::None),
    Treatment::new(Method::Random, Repair::Refit),
    Treatment::new(Method::ZeroWhh, Repair::None),
];

/// The rows that answer the first questions, and what all rows say in words.
pub(super) fn overview(rows: &[experiment::Row], sections: &[Section], config: &Config) -> Section {
    let experiment = &config.experiment;
    let prose = "Every method prunes the same trained network of each task, cell and seed. Accuracy is measured on test data \
        right after pruning and again after fine-tuning under the mask; test data decide nothing. Refit solves the weights \
        under a mask again by least squares on states of the training split. Merge removes neurons and folds a linear \
        prediction of their states into the weights that read them. Neither needs training. This table shows the recommended \
        methods first (magnitude with refit for masks, span with merge for smaller networks), then the method of \
        arXiv 2502.16525 (lattice-context), then baselines; the tables of the tasks have all rows. A scattered mask does not \
        make a network faster: see the tables of speeds.";
    let is = |row: &Row, key: &str, value: &str| row.extra.get(key).is_some_and(|v| v == value);
    let mut lines: Vec<Row> = Vec::new();
    for section in sections {
        let one_shot = |row: &&Row| is(row, "stage", "one-shot");
        lines.extend(
            section
                .rows
                .iter()
                .filter(|row| row.method == DENSE && one_shot(row) && is(row, "repair", "none"))
                .cloned(),
        );
        let metric = metric_of(&section.rows);
        for treatment in SHOWN {
            let Treatment { method, repair } = treatment;
            let same = |row: &&Row| row.method == method.name() && is(row, "repair", repair.name());
            for row in section.rows.iter().filter(same).filter(one_shot) {
                let tuned = section.rows.iter().filter(same).find(|other| {
                    is(other, "stage", "fine-tuned") && other.sparsity == row.sparsity
                });
                let mut line = row.clone();
                line.method = treatment.to_string();
                if let Some(value) = tuned.and_then(|tuned| value_of(metric, tuned)) {
                    let text = match metric {
                        Metric::Accuracy => format!("{:.2} %", 100.0 * value),
                        _ => format!("{value:.4}"),
                    };
                    line.extra.insert("after fine-tuning".into(), json!(text));
                }
                lines.push(line);
            }
        }
    }
    let mut qualities: Vec<Column> = Vec::new();
    for section in sections {
        let column = column_of(metric_of(&section.rows));
        if !qualities.contains(&column) {
            qualities.push(column);
        }
    }
    let head = [Column::Model, Column::Method, Column::Sparsity];
    let tail = [Column::Extra("after fine-tuning".into())];
    Section {
        title: "Pruning of recurrent networks".into(),
        prose: prose.into(),
        columns: head.into_iter().chain(qualities).chain(tail).collect(),
        rows: lines,
        remarks: verdict(rows),
        ..Section::default()
    }
    .fact("seeds", json!(experiment.seeds))
    .fact("fine-tuning epochs", experiment.finetune_epochs)
    .fact("pruned", json!(experiment.scope))
    .fact("device", "cpu")
}

/// The metric of a table, by what its rows have.
fn metric_of(rows: &[Row]) -> Metric {
    let has = |key: &str| rows.iter().any(|row| row.extra.contains_key(key));
    match () {
        () if has("bits") => Metric::Bits,
        () if has("AUC") => Metric::Auc,
        () if rows.iter().any(|row| row.accuracy.is_some()) => Metric::Accuracy,
        () => Metric::Loss,
    }
}

fn value_of(metric: Metric, row: &Row) -> Option<f64> {
    match metric {
        Metric::Accuracy => row.accuracy,
        Metric::Loss => row.nll,
        other => row.extra.get(other.name())?.as_f64(),
    }
}

fn column_of(metric: Metric) -> Column {
    match metric {
        Metric::Accuracy => Column::Accuracy,
        Metric::Loss => Column::Nll,
        other => Column::Extra(other.name().into()),
    }
}

pub(super) fn task_section(task: &str, cell: &str, rows: &[&experiment::Row]) -> Result<Section> {
    let mut cells: Vec<(Method, Repair, u64, Stage)> = Vec::new();
    for row in rows {
        let cell = (row.method, row.repair, row.sparsity.to_bits(), row.stage);
        if !cells.contains(&cell) {
            cells.push(cell);
        }
    }
    let of_cell = |(method, repair, sparsity, stage): (Method, Repair, u64, Stage)| {
        let same = |r: &&experiment::Row| {
            (r.method, r.repair, r.sparsity.to_bits(), r.stage) == (method, repair, sparsity, stage)
        };
        let runs: Vec<&experiment::Row> = rows.iter().copied().filter(same).collect();
        cell_row(&runs, task, cell)
    };
    let rows = cells
        .into_iter()
        .map(of_cell)
        .collect::<Result<Vec<Row>>>()?;
    let metric = metric_of(&rows);
    let dense = rows
        .iter()
        .find(|row| row.method == DENSE)
        .and_then(|row| value_of(metric, row))
        .map(|y| Reference {
            name: DENSE.into(),
            y,
        });
    let plot = |stage: &'static str, title: &str| {
        let of_stage = |row: &Row| row.extra.get("stage").is_some_and(|s| s == stage);
        let rows: Vec<Row> = rows
            .iter()
            .filter(|row| of_stage(row) && row.sparsity.is_some_and(|s| s > 0.0))
            .cloned()
            .map(|mut row| {
                // A curve for each method and repair.
                if let Some(repair) = row.extra.get("repair").and_then(|r| r.as_str())
                    && repair != Repair::None.name()
                {
                    row.method = format!("{} + {repair}", row.method);
                }
                row
            })
            .collect();
        let (y, field) = match metric {
            Metric::Auc => (Axis::linear("area under the ROC curve"), "AUC"),
            Metric::Bits => (Axis::linear("bits per character"), "bits"),
            Metric::Loss => (Axis::log("loss"), "nll"),
            _ => (Axis::linear("accuracy"), "accuracy"),
        };
        Plot {
            title: format!("{task}, {title}"),
            x: Axis::linear("sparsity of the pruned weights"),
            y,
            series: Series::by_method(
                &rows,
                |row| row.sparsity,
                field,
                |row| value_of(metric, row),
            ),
            reference: dense.clone(),
        }
    };
    let mut columns = vec![
        Column::Method,
        Column::Sparsity,
        Column::Extra("repair".into()),
        Column::Extra("stage".into()),
        column_of(metric),
    ];
    if metric == Metric::Auc {
        columns.extend([Column::Accuracy, Column::Nll]);
    }
    let extra = |name: &str| Column::Extra(name.into());
    if rows.iter().any(|row| row.extra.contains_key(INT8)) {
        columns.push(extra(INT8));
    }
    columns.extend([
        Column::FinetuneEpochs,
        extra("of W_hh"),
        extra("of W_hh and W_ih"),
        extra("of all"),
        extra("neurons"),
        extra("FC r"),
        extra("FC r of kept"),
        extra("reach kept"),
        extra("reach kept (2)"),
        extra(REMOVABLE),
        extra(UNFED),
        extra(EQUAL),
        extra("order"),
        Column::Seconds,
    ]);
    let prose = "FC r is Pearson's r between the correlations of states before and after pruning, over all pairs of neurons and \
        over pairs of kept neurons. Reach kept is the share of the ordered pairs of neurons (at a mean out-degree of 1; 2 in \
        the second column) that can still be reached. Neurons are those that a merged network still has, by layers. Removed exactly counts neurons that no output hears and \
        ReLU neurons that are zero for every input in the range of the data: removing them changes nothing. Unfed neurons are \
        reached by no input. Equal neurons have the same states as another one for ever, which trained networks hardly have.";
    Ok(Section {
        title: format!("{task}, {cell}"),
        prose: prose.into(),
        columns,
        plots: vec![
            plot("one-shot", "right after pruning"),
            plot("fine-tuned", "after fine-tuning"),
        ],
        rows,
        ..Section::default()
    })
}

/// One cell of the table: the mean over seeds.
pub(super) fn cell_row(runs: &[&experiment::Row], task: &str, cell: &str) -> Result<Row> {
    let rows: Vec<Row> = runs.iter().map(|run| seed_row(run, task, cell)).collect();
    let mut row = mean_over_seeds(&rows)?;
    let reached: Vec<Sparsity> = runs.iter().filter_map(|run| run.reached).collect();
    if !reached.is_empty() {
        let mut mean = |name: &str, share: fn(&Sparsity) -> f64| {
            let mean = reached.iter().map(share).sum::<f64>() / reached.len() as f64;
            let text = format!("{:.1} %", 100.0 * mean);
            row.extra.insert(name.into(), json!(text));
        };
        mean("of W_hh", |s| s.recurrent);
        mean("of W_hh and W_ih", |s| s.recurrent_and_input);
        mean("of all", |s| s.total);
    }
    let orders: Vec<&OrderSummary> = runs.iter().filter_map(|run| run.order.as_ref()).collect();
    if !orders.is_empty() {
        let range = |ends: fn(&OrderSummary) -> (usize, usize)| {
            let low = orders.iter().map(|order| ends(order).0).min();
            let high = orders.iter().map(|order| ends(order).1).max();
            match (low.unwrap_or(0), high.unwrap_or(0)) {
                (low, high) if low == high => low.to_string(),
                (low, high) => format!("{low}–{high}"),
            }
        };
        let text = format!(
            "{} of {} cuts, {} classes, {} irreducible",
            range(|order| {
                let counted = order.cuts - order.degenerate_cuts;
                (counted, counted)
            }),
            range(|order| (order.cuts, order.cuts)),
            range(|order| order.classes),
            range(|order| order.irreducible)
        );
        row.extra.insert("order".into(), json!(text));
    }
    Ok(row)
}

/// What one network gave.
fn seed_row(row: &experiment::Row, task: &str, cell: &str) -> Row {
    let stage = match row.stage {
        Stage::OneShot => "one-shot",
        Stage::FineTuned => "fine-tuned",
        Stage::Gradual => "gradual",
        Stage::FromScratch => "from scratch",
    };
    let mut out = Row {
        model: Some(format!("{task} {cell}")),
        sparsity: Some(row.sparsity),
        accuracy: row.accuracy,
        accuracy_dense: row.accuracy_dense,
        nll: row.loss,
        params: row.params.map(|n| n as u64),
        params_dense: Some(row.params_dense as u64),
        finetune_epochs: Some(row.finetune_epochs as u64),
        seconds: row.seconds,
        notes: row.error.iter().cloned().collect(),
        ..Row::new("lattice", row.method.name())
    };
    out.extra.insert("stage".into(), json!(stage));
    out.extra.insert("repair".into(), json!(row.repair));
    if let Some(auc) = row.auc {
        out.extra.insert("AUC".into(), json!(auc));
    }
    if let Some(kept) = row.connectivity {
        for (name, value) in [
            ("FC r", kept.functional),
            ("FC r of kept", kept.functional_kept),
            ("reach kept", kept.reach),
            ("reach kept (2)", kept.reach_2),
        ] {
            if let Some(value) = value {
                out.extra.insert(name.into(), json!(value));
            }
        }
    }
    if let Some(exact) = row.exact {
        let counts = exact.neurons;
        for (name, count) in [
            (REMOVABLE, counts.dead + counts.unheard),
            (UNFED, counts.unfed),
            (EQUAL, exact.equal),
        ] {
            out.extra.insert(name.into(), json!(count));
        }
    }
    let metric = Metric::of_rows([row]);
    if let Some(value) = row.int8.as_ref().and_then(|e| metric.of_evaluation(e)) {
        out.extra.insert(INT8.into(), json!(value));
    }
    if let Some(neurons) = &row.neurons {
        let neurons: Vec<String> = neurons.iter().map(usize::to_string).collect();
        out.extra.insert("neurons".into(), json!(neurons.join("+")));
    }
    if let Some(loss) = row.validation {
        out.extra.insert("validation loss".into(), json!(loss));
    }
    if let Some(bits) = row.bits {
        out.extra.insert("bits".into(), json!(bits));
    }
    match row.method {
        Method::Strength
        | Method::RandomNeurons
        | Method::Reducible
        | Method::Random
        | Method::Threshold
        | Method::ZeroWhh
        | Method::Ws
        | Method::Ba
        | Method::Er => out.control(),
        _ => out,
    }
}
