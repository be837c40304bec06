//! Networks on random graphs.

use anyhow::Result;
use eval_report::{Column, Row, Section};
use prune_lattice::experiment::{self, ExperimentConfig, StructureConfig};
use prune_lattice::tasks::Task;
use prune_lattice::{Cell, Progress};
use serde_json::json;

/// Networks on random graphs, trained from fresh weights: a section for each task and cell.
pub(super) fn structures(
    experiment: &ExperimentConfig,
    graphs: usize,
    progress: &dyn Progress,
) -> Result<Vec<Section>> {
    let mut sections = Vec::new();
    for task in &experiment.tasks {
        for &cell in &experiment.cells {
            sections.push(section(experiment, (task, cell), graphs, progress)?);
        }
    }
    Ok(sections)
}

fn section(
    experiment: &ExperimentConfig,
    (task, cell): (&Task, Cell),
    graphs: usize,
    progress: &dyn Progress,
) -> Result<Section> {
    let seed = experiment.seeds.first().copied().unwrap_or_default();
    let config = StructureConfig::new(task.clone(), cell).with(|c| {
        c.graphs = graphs;
        c.seed = seed;
        c.sizes = experiment.sizes;
        c.training = Some(experiment.training(task, cell));
    });
    let found = experiment::run_structures(&config, progress)?;
    let rows = found.iter().map(|network| {
        let mut row = Row {
            model: Some(format!("{task} {cell}")),
            accuracy: network.accuracy,
            nll: Some(network.loss),
            ..Row::new("lattice", network.structure.name())
        };
        row.extra.insert("graph".into(), json!(network.graph));
        row.extra.insert("neurons".into(), json!(network.neurons));
        row.extra
            .insert("connections".into(), json!(network.connections));
        row
    });
    let remarks = experiment::correlations(&found)
        .into_iter()
        .filter_map(|p| {
            let r = p.r?;
            Some(format!(
                "{}: r = {r:.2} with accuracy over {} networks",
                p.name, p.networks
            ))
        });
    Ok(Section {
        title: format!("Random structures, {task}, {cell}"),
        prose: "Networks whose recurrent connections are random graphs, trained from fresh weights (after arXiv 2407.20601): \
            er has as many edges as the ba graph of the same number, stack is a stack of equal layers with about as many \
            connections."
            .into(),
        columns: vec![
            Column::Method,
            Column::Extra("graph".into()),
            Column::Extra("neurons".into()),
            Column::Extra("connections".into()),
            Column::Accuracy,
            Column::Nll,
        ],
        rows: rows.collect(),
        remarks: remarks.collect(),
        ..Section::default()
    }
    .fact("graphs of each kind", graphs)
    .fact("seed", seed))
}
