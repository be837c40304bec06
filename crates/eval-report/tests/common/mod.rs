//! A report with invented numbers, in the shape that suites make: what is under test is how reports are shown.

use eval_report::{
    Axis, Column, DENSE, Machine, Plot, Reference, Report, Row, Section, Series, Spread, SpreadOver,
};
use serde_json::json;

pub(crate) fn report() -> Report {
    let command = "cargo xtask eval structured --ratio 0.1,0.2,0.3,0.5 --model";
    let command = command.split(' ').chain(["checkpoints/my model"]);
    let mut report = Report {
        command: command.map(String::from).collect(),
        version: "0.1.0+abcdef0".into(),
        machine: Machine {
            cpu: "Example CPU 3000 <8-core>".into(),
            cores: 16,
            memory_bytes: 32 << 30,
        },
        device: "cpu".into(),
        threads: 8,
        seed: 42,
        sections: Vec::new(),
    };
    report.push(structured()).unwrap();
    report.push(kv()).unwrap();
    report
}

fn structured() -> Section {
    let dense = Row {
        perplexity: Some(12.3456),
        params: Some(134_515_008),
        bytes: Some(538_060_032),
        tokens_per_second: Some(812.5),
        seconds: 64.2,
        peak_rss_bytes: Some(812 << 20),
        ..Row::new("structured", DENSE)
    };
    let mut rows = Vec::new();
    let methods = [
        ("flap", 1.0),
        ("flap-compat", 1.06),
        ("wanda-sp", 1.4),
        ("magnitude", 9.0),
        ("tyr", 0.9),
    ];
    let more = [
        ("structprune", 1.2),
        ("structprune-softmax", 1.1),
        ("rd-dp", 0.95),
        ("random", 4.0),
    ];
    for (method, slope) in methods.into_iter().chain(more) {
        for ratio in [0.1, 0.2, 0.3, 0.5] {
            let perplexity = 12.3456 * (1.0 + 25.0 * slope * ratio * ratio);
            let mut row = Row {
                ratio: Some(ratio),
                perplexity: Some(perplexity),
                perplexity_dense: dense.perplexity,
                params: Some((134_515_008.0 * (1.0 - 0.8 * ratio)) as u64),
                bytes: Some((538_060_032.0 * (1.0 - 0.8 * ratio)) as u64),
                bytes_dense: dense.bytes,
                tokens_per_second: Some(812.5 / (1.0 - 0.7 * ratio)),
                seconds: 431.7,
                peak_rss_bytes: Some(1_912_602_624),
                ..Row::new("structured", method)
            };
            if method == "random" {
                let spread = Spread {
                    runs: 3,
                    min: 0.8 * perplexity,
                    max: 1.3 * perplexity,
                    over: SpreadOver::Seeds,
                };
                row.spread.insert("perplexity".into(), spread);
                row = row.control();
            }
            rows.push(row);
        }
    }
    let layer = |i: usize| json!({ "layer": i, "heads": 9 - i / 2, "score": 0.01234 * (i + 1) as f64, "kept": "attention" });
    rows[0].layers = (0..6).map(layer).collect();
    rows[1]
        .notes
        .push("two layers were left whole because of --min-groups".into());
    rows.push(dense);
    let x = Axis::linear("pruning ratio (share of prunable parameters)");
    let plots = vec![
        Plot {
            title: "Perplexity by pruning ratio".into(),
            x: x.clone(),
            y: Axis::log("perplexity"),
            series: Series::by_method(&rows, |r| r.ratio, "perplexity", |r| r.perplexity),
            reference: Some(Reference {
                name: DENSE.into(),
                y: 12.3456,
            }),
        },
        Plot {
            title: "Speed by pruning ratio".into(),
            x,
            y: Axis::linear("prefill (tokens/s)"),
            series: Series::by_method(
                &rows[..4],
                |r| r.ratio,
                "tokens_per_second",
                |r| r.tokens_per_second,
            ),
            reference: Some(Reference {
                name: DENSE.into(),
                y: 812.5,
            }),
        },
    ];
    use Column::*;
    Section {
        title: "Structured pruning".into(),
        prose: "Attention groups and MLP neurons are removed to the ratio given, after calibration on 128 windows; every method \
                sees the same windows. Random removes the same number of units, three seeds."
            .into(),
        columns: vec![Method, Ratio, Perplexity, PerplexityOverDense, Accuracy, Params, BytesOverDense, TokensPerSecond, Seconds, PeakRss],
        rows,
        plots,
        ..Section::default()
    }
    .fact("window", 256)
    .fact("BOS", "yes, in every window")
    .fact("windows", 412)
    .fact("targets", 105_060)
    .fact("text", "wikitext-2-test.txt")
    .fact("calibration", "c4-sample.txt")
}

fn kv() -> Section {
    const FULL: u64 = 18_874_368;
    let mut rows = vec![Row {
        kv_bytes: Some(FULL),
        perplexity: Some(14.2),
        ..Row::new("kv", DENSE)
    }];
    for (policy, cost) in [
        ("streaming", 0.9),
        ("h2o", 0.5),
        ("lazy", 0.2),
        ("random", 2.0),
    ] {
        for tokens in [32, 64, 128, 256, 512] {
            let mut row = Row {
                budget: Some(eval_report::Budget::Tokens(tokens)),
                perplexity: Some(14.2 * (1.0 + cost * 32.0 / tokens as f64)),
                kv_bytes: Some(FULL * tokens / 1024),
                kv_bytes_full: Some(FULL),
                retained_mass: Some(1.0 - cost * 8.0 / tokens as f64),
                seconds: 12.4,
                ..Row::new("kv", policy)
            };
            row.extra.insert("task".into(), json!("perplexity"));
            rows.push(if policy == "random" {
                row.control()
            } else {
                row
            });
        }
    }
    let tokens = |row: &Row| match row.budget? {
        eval_report::Budget::Tokens(tokens) => Some(tokens as f64),
        eval_report::Budget::Share(_) => None,
    };
    let plot = Plot {
        title: "Perplexity by budget".into(),
        x: Axis::log("budget (tokens)"),
        y: Axis::linear("perplexity"),
        series: Series::by_method(&rows, tokens, "perplexity", |r| r.perplexity),
        reference: Some(Reference {
            name: "full".into(),
            y: 14.2,
        }),
    };
    use Column::*;
    Section {
        title: "KV cache under eviction".into(),
        prose:
            "The first quarter of each window is prefilled, the rest decoded one token at a time."
                .into(),
        columns: vec![
            Method,
            Extra("task".into()),
            Budget,
            Perplexity,
            KvBytes,
            KvOverFull,
            RetainedMass,
            Seconds,
        ],
        rows,
        plots: vec![plot],
        ..Section::default()
    }
}
