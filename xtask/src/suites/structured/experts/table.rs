//! How rows of mixtures are described and shown.

use causal_lm::Decoder;
use eval_report::{Axis, Column, DENSE, Plot, Reference, Row, Section, Series};
use prune_structured::experts::{Aim, ExpertPlan, ExpertRecipe, Outcome};
use serde_json::{Value, json};

pub(super) fn ids(cluster: &[usize]) -> String {
    let ids: Vec<String> = cluster.iter().map(usize::to_string).collect();
    ids.join(" ")
}

/// Experts of a layer and how many of them are chosen: one number where all layers have as many.
pub(super) fn counts(decoder: &Decoder<'_>, plan: &ExpertPlan) -> String {
    let mixtures = plan.mixtures(decoder);
    let list = |of: fn(&causal_lm::config::Mixture) -> usize| {
        let (least, most) = mixtures
            .iter()
            .flatten()
            .map(of)
            .fold((usize::MAX, 0), |(a, b), x| (a.min(x), b.max(x)));
        match least == most {
            true => most.to_string(),
            false => format!("{least} to {most}"),
        }
    };
    let of_rows = of_rows(plan);
    format!(
        "{} of {}{of_rows}, {} chosen",
        list(|m| m.experts),
        list(|m| m.width),
        list(|m| m.chosen)
    )
}

/// What router rows share, or stand for, where all stay.
fn of_rows(plan: &ExpertPlan) -> &'static str {
    let layers = plan.layers.iter().flatten();
    let mut layers = layers.filter(|layer| layer.keeps_rows());
    match layers.next() {
        None => "",
        Some(layer) if layer.novices.is_empty() => " for all rows",
        Some(_) => " and constants for all rows",
    }
}

/// What a row says of each layer.
pub(super) fn layers(decoder: &Decoder<'_>, outcome: &Outcome) -> Vec<Value> {
    let mixtures = outcome.plan.mixtures(decoder);
    let layers = outcome.plan.layers.iter().zip(&mixtures).enumerate();
    let described = |(layer, (plan, mixture)): (usize, (&Option<_>, &Option<_>))| {
        let plan: &prune_structured::experts::LayerExperts = plan.as_ref()?;
        let mixture: &causal_lm::config::Mixture = mixture.as_ref()?;
        let seen = outcome.layers.iter().find(|seen| seen.layer == layer);
        let tokens = seen.map(|seen| {
            let experts = seen.statistics.experts.iter();
            experts.map(|expert| expert.count).collect::<Vec<_>>()
        });
        Some(json!({
            "layer": layer,
            "experts": mixture.experts,
            "width": mixture.width,
            "kept": plan.kept,
            "tokens": tokens,
            "scores": seen.map(|seen| &seen.scores),
            "clusters": seen.map(|seen| &seen.clusters),
            "promoted": seen.map(|seen| seen.promoted),
        }))
    };
    layers.filter_map(described).collect()
}

/// What the files of a cell are called.
pub(super) fn cell_name(recipe: &ExpertRecipe, seed: Option<u64>, aim: Aim) -> String {
    let aim = match aim {
        Aim::Ratio(ratio) => ratio.to_string(),
        Aim::Chosen(chosen) => format!("top{chosen}"),
        _ => String::new(),
    };
    match seed {
        Some(seed) => format!("{}-{aim}-seed{seed}", recipe.name),
        None => format!("{}-{aim}", recipe.name),
    }
}

/// The share of the experts' bytes that a row has less.
fn removed(row: &Row) -> Option<f64> {
    row.extra.get("removed").and_then(Value::as_f64)
}

pub(super) fn section(is_dry_run: bool, rows: Vec<Row>, mut plots: Vec<Plot>) -> Section {
    let dense = rows.iter().find(|row| row.method == DENSE);
    let reference = dense.and_then(|row| row.perplexity).map(|y| Reference {
        name: DENSE.into(),
        y,
    });
    let quality = Plot {
        title: "Perplexity over the share of the experts' bytes removed".into(),
        x: Axis::linear("share of the experts' bytes removed"),
        y: Axis::log("perplexity"),
        series: Series::by_method(&rows, removed, "perplexity", |row| row.perplexity),
        reference,
    };
    plots.insert(0, quality);
    let prose = if is_dry_run {
        "Plans only: nothing is written or measured. A ratio counts the weights of routed experts."
    } else {
        "Each row is a checkpoint, written, loaded again and evaluated on text not used for calibration. A ratio counts the \
         bytes of routed experts: that which was asked for, and beside it the share that was removed, for experts and blocks of \
         neurons are whole; routers, shared experts, attention and embeddings are not pruned. Merged rows keep one \
         router row for each merged expert, tied ones all of them, and novice ones all of them with a constant for each expert that \
         is gone, whose bytes count. topk rows send each token to fewer experts: they cost less work and as many \
         bytes; topk-lowrank, a control, adds a linear term to each layer in memory, which no format holds. Quantised rows are all experts compressed, with the bytes that their format needs; their ratio is that of \
         bytes. random is a mean over seeds. Promoted is the share of choices that went to experts which are gone. Time and \
         memory are those of planning and writing; speed is that of the blocks on a batch of windows, in alternation with \
         the dense model's."
    };
    Section {
        title: "Experts of a mixture".into(),
        prose: prose.into(),
        columns: vec![
            Column::Method,
            Column::Ratio,
            Column::Extra("removed".into()),
            Column::Perplexity,
            Column::PerplexityOverDense,
            Column::Extra("experts".into()),
            Column::Extra("params_active".into()),
            Column::Bytes,
            Column::BytesOverDense,
            Column::Speedup,
            Column::TokensPerSecond,
            Column::Seconds,
            Column::PeakRss,
            Column::Extra("promoted".into()),
            Column::Extra("compensation".into()),
            Column::Extra("loads_in".into()),
        ],
        plots: if is_dry_run { vec![] } else { plots },
        print_layers: is_dry_run,
        rows,
        ..Section::default()
    }
}
