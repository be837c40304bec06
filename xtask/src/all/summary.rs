//! The rows that a reader looks for first.
//!
//! Which rows these are is fixed by the presets before anything is measured.

use eval_report::{Column, Role, Row, Section, format};
use serde_json::json;

use super::preset::{Shown, Verdict};

/// Sections of one run, and which of their rows the summary shows.
pub(super) struct Part {
    /// The crate whose methods were run.
    pub(super) name: &'static str,
    pub(super) shown: Vec<Shown>,
    pub(super) verdict: Verdict,
    pub(super) sections: Vec<Section>,
}

/// The summary of `parts`; `entropy` is the generator's own, in nats per token, where text was generated.
pub(super) fn section(parts: &[Part], model: &str, entropy: Option<f64>) -> Section {
    let rows = parts.iter().flat_map(|part| {
        let rows = || part.sections.iter().flat_map(|section| &section.rows);
        part.shown.iter().filter_map(move |shown| {
            let row = rows().find(|row| shown.is(row))?;
            Some(line(part.name, &shown.label, row))
        })
    });
    let rows: Vec<Row> = rows.collect();
    let verdicts = parts.iter().map(|part| part.verdict.line(part.name, &rows));
    let model = match entropy {
        Some(_) => "bundled model",
        None => model,
    };
    let mut prose = String::from(
        "For each crate the recommended method, that of its paper, and baselines at the same budget. Which rows appear here is fixed before \
         measuring; the report has all rows, protocols and plots. Speeds are medians, measured in alternation with the \
         dense model.",
    );
    if let Some(entropy) = entropy {
        prose += &format!(
            " The text is generated with known probabilities: no model can have a perplexity below {} on it.",
            format::real(entropy.exp(), 3)
        );
    }
    Section {
        title: format!("Summary: {model}"),
        prose,
        columns: vec![
            Column::Extra("crate".into()),
            Column::Method,
            Column::Perplexity,
            Column::Accuracy,
            Column::BytesOverDense,
            Column::KvOverFull,
            Column::Speedup,
        ],
        remarks: verdicts.collect(),
        rows,
        ..Section::default()
    }
}

/// A measured row as a line of the summary.
fn line(crate_name: &str, label: &str, row: &Row) -> Row {
    let mut line = Row {
        suite: "summary".into(),
        method: label.into(),
        // Lines keep their order: none is the reference of all.
        role: match row.role {
            Role::Control => Role::Control,
            _ => Role::Method,
        },
        layers: Vec::new(),
        notes: Vec::new(),
        compress: None,
        ratio: None,
        sparsity: None,
        rank: None,
        budget: None,
        ..row.clone()
    };
    line.spread.clear();
    line.extra.clear();
    line.extra.insert("crate".into(), json!(crate_name));
    line
}
