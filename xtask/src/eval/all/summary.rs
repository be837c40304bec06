//! The rows that a reader looks for first, out of all that were measured.
//!
//! Which rows stand here is fixed and does not depend on what they show: for each crate the method that it is for and the
//! plain control at the same budget.

use eval_report::{Budget, Column, DENSE, Role, Row, Section, format};
use serde_json::json;

use super::{Given, chain};
use crate::eval::perplexity::file_name;

/// A row of the summary: which crate, what it is called here, and which measured row it is.
struct Line {
    crate_name: &'static str,
    label: &'static str,
    suite: &'static str,
    is: fn(&Row) -> bool,
}

fn at_budget(row: &Row, share: f64) -> bool {
    row.budget == Some(Budget::Share(share))
}

const LINES: [Line; 16] = [
    Line {
        crate_name: "",
        label: "the model as it is",
        suite: "structured",
        is: |row| row.method == DENSE,
    },
    Line {
        crate_name: "prune-structured",
        label: "flap, 25 % pruned",
        suite: "structured",
        is: |row| row.method == "flap" && row.ratio == Some(0.25),
    },
    Line {
        crate_name: "prune-structured",
        label: "magnitude, 25 % pruned",
        suite: "structured",
        is: |row| row.method == "magnitude" && row.ratio == Some(0.25),
    },
    Line {
        crate_name: "prune-structured",
        label: "random, 25 % pruned",
        suite: "structured",
        is: |row| row.method == "random" && row.ratio == Some(0.25),
    },
    Line {
        crate_name: "lowrank-eora",
        label: "wanda 2:4, not repaired",
        suite: "lowrank",
        is: |row| is_repair(row, "none"),
    },
    Line {
        crate_name: "lowrank-eora",
        label: "wanda 2:4, svd of rank 8",
        suite: "lowrank",
        is: |row| is_repair(row, "svd"),
    },
    Line {
        crate_name: "lowrank-eora",
        label: "wanda 2:4, eora of rank 8",
        suite: "lowrank",
        is: |row| is_repair(row, "eora"),
    },
    Line {
        crate_name: "kv-lazy",
        label: "full cache, decoding",
        suite: "kv",
        is: |row| row.method == "full",
    },
    Line {
        crate_name: "kv-lazy",
        label: "lazy, 25 % of the window",
        suite: "kv",
        is: |row| row.method == "lazy" && at_budget(row, 0.25),
    },
    Line {
        crate_name: "kv-lazy",
        label: "random, 25 % of the window",
        suite: "kv",
        is: |row| row.method == "random" && at_budget(row, 0.25),
    },
    Line {
        crate_name: "prune-lattice",
        label: "dense LSTM",
        suite: "lattice",
        is: |row| row.method == DENSE,
    },
    Line {
        crate_name: "prune-lattice",
        label: "lattice, 75 % pruned",
        suite: "lattice",
        is: |row| row.method == "lattice-context" && row.sparsity == Some(0.75),
    },
    Line {
        crate_name: "prune-lattice",
        label: "random, 75 % pruned",
        suite: "lattice",
        is: |row| row.method == "random" && row.sparsity == Some(0.75),
    },
    Line {
        crate_name: "all in a chain",
        label: "as it is, decoding",
        suite: chain::SUITE,
        is: |row| row.method == DENSE,
    },
    Line {
        crate_name: "all in a chain",
        label: "the four methods",
        suite: chain::SUITE,
        is: |row| row.role == Role::Method && row.budget.is_some(),
    },
    Line {
        crate_name: "all in a chain",
        label: "four controls",
        suite: chain::SUITE,
        is: |row| row.role == Role::Control && row.budget.is_some(),
    },
];

fn is_repair(row: &Row, method: &str) -> bool {
    row.compress.as_deref() == Some("wanda-2:4") && row.method == method
}

/// The summary of `sections`; `entropy` is the generator's own, in nats per token, where text was generated.
pub(super) fn section(sections: &[Section], given: &Given, entropy: Option<f64>) -> Section {
    let rows: Vec<&Row> = sections.iter().flat_map(|section| &section.rows).collect();
    let lines = LINES.iter().filter_map(|line| {
        let row = rows
            .iter()
            .find(|row| row.suite == line.suite && (line.is)(row))?;
        Some(shown(line, row))
    });
    let model = match entropy {
        Some(_) => "the model carried here".into(),
        None => file_name(&given.text.model),
    };
    let mut prose = String::from(
        "One row for the method that each crate is for, and the plain control that spends as much. Which rows stand here was fixed before they \
         were measured; everything else that was measured, protocols and plots stand below. Speeds are single measurements and swing with what else the machine does.",
    );
    if let Some(entropy) = entropy {
        prose += &format!(
            " The model's text comes from a generator that knows the probability of what it tells: no \
             model can have a perplexity below {} on this text.",
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
        rows: lines.collect(),
        ..Section::default()
    }
}

/// A measured row as a line of the summary.
fn shown(line: &Line, row: &Row) -> Row {
    let mut shown = Row {
        suite: "summary".into(),
        method: line.label.into(),
        // The order of the lines is the summary's own.
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
    shown.spread.clear();
    shown.extra.clear();
    shown.extra.insert("crate".into(), json!(line.crate_name));
    shown
}
