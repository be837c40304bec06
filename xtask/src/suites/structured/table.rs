//! The table of the suite: what a row says of a plan.

use causal_lm::Decoder;
use eval_report::{Axis, Column, DENSE, Plot, Reference, Row, Section, Series};
use prune_structured::{Cost, Plan, Recipe};
use serde_json::json;

use super::config::Config;

/// Whether a recipe is there to be compared with.
pub(super) fn is_control(recipe: &Recipe) -> bool {
    use prune_structured::Score::{Magnitude, Random, WandaSp};
    matches!(recipe.score, Random(_) | Magnitude(_) | WandaSp(_))
}

/// Widths and costs of each block.
pub(super) fn layers(plan: &Plan, cost: &Cost) -> Vec<serde_json::Value> {
    plan.widths()
        .iter()
        .zip(cost.before.iter().zip(&cost.after))
        .enumerate()
        .map(|(layer, (widths, (before, after)))| {
            json!({
                "layer": layer,
                "heads": widths.heads,
                "kv_heads": widths.kv_heads,
                "neurons": widths.neurons,
                "params": after.parameters,
                "params_dense": before.parameters,
                "bytes": after.bytes,
                "bytes_dense": before.bytes,
                "flops_per_token": after.flops_per_token,
                "flops_per_token_dense": before.flops_per_token,
            })
        })
        .collect()
}

pub(super) fn compare_with_dense(rows: &mut [Row], decoder: &Decoder<'_>, model: &str) {
    let dense = rows.iter().find(|row| row.method == DENSE).cloned();
    for row in rows {
        row.model = Some(model.into());
        row.params_dense = Some(decoder.checkpoint().parameters());
        row.bytes_dense = Some(decoder.checkpoint().total_bytes());
        if let Some(dense) = &dense {
            row.perplexity_dense = dense.perplexity;
            let speed = row.tokens_per_second_dense.or(dense.tokens_per_second);
            row.tokens_per_second_dense = speed;
        }
    }
}

pub(super) fn section(config: &Config, rows: Vec<Row>) -> Section {
    let dense = rows
        .iter()
        .find(|row| row.method == DENSE)
        .and_then(|row| row.perplexity);
    let plot = Plot {
        title: "Perplexity over ratio".into(),
        x: Axis::linear("ratio of prunable parameters removed"),
        y: Axis::log("perplexity"),
        series: Series::by_method(&rows, |row| row.ratio, "perplexity", |row| row.perplexity),
        reference: dense.map(|y| Reference {
            name: DENSE.into(),
            y,
        }),
    };
    let prose = if config.dry_run {
        "Plans only: nothing is written or measured. A ratio counts the parameters of the blocks' linears."
    } else {
        "Each row is a pruned checkpoint, written, loaded again and evaluated on text not used for calibration. \
         A ratio counts the parameters of the blocks' linears; embeddings, head and norms are not pruned. Baselines \
         remove the same fraction of every layer; random and tyr are means over seeds. Time and memory are those of \
         planning and writing; speed is that of the blocks on a batch of windows, in alternation with \
         the dense model's."
    };
    Section {
        title: "Structured pruning".into(),
        prose: prose.into(),
        columns: vec![
            Column::Method,
            Column::Ratio,
            Column::Perplexity,
            Column::PerplexityOverDense,
            Column::ParamsOverDense,
            Column::Bytes,
            Column::Speedup,
            Column::Seconds,
            Column::PeakRss,
            Column::Extra("compensation".into()),
            Column::Extra("loads_in".into()),
        ],
        plots: if config.dry_run { vec![] } else { vec![plot] },
        print_layers: config.dry_run,
        rows,
        ..Section::default()
    }
}
