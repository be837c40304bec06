//! A report with invented numbers, in the shape that suites make: what is under test is how reports are shown.

use serde_json::json;
use xtask::column::Column;
use xtask::machine::Machine;
use xtask::plot::{Axis, Plot, Point, Reference, Series};
use xtask::report::{Report, Section};
use xtask::row::{Budget, DENSE, Row, Spread};

pub(crate) fn report() -> Report {
    let mut report = Report {
        command: [
            "cargo",
            "xtask",
            "eval",
            "structured",
            "--model",
            "checkpoints/my model",
            "--ratio",
            "0.1,0.2,0.3",
        ]
        .map(String::from)
        .to_vec(),
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
    const METHODS: [(&str, f64); 9] = [
        ("flap", 1.0),
        ("flap-compat", 1.06),
        ("wanda-sp", 1.4),
        ("magnitude", 9.0),
        ("tyr", 0.9),
        ("structprune", 1.2),
        ("structprune-softmax", 1.1),
        ("rd-dp", 0.95),
        ("random", 4.0),
    ];
    const RATIOS: [f64; 4] = [0.1, 0.2, 0.3, 0.5];
    let dense = Row {
        model: Some("small-lm".into()),
        perplexity: Some(12.3456),
        params: Some(134_515_008),
        bytes: Some(538_060_032),
        tokens_per_second: Some(812.5),
        seconds: 64.2,
        peak_rss_bytes: Some(812 << 20),
        ..Row::new("structured", DENSE)
    };
    let perplexity = |slope: f64, ratio: f64| 12.3456 * (1.0 + slope * (5.0 * ratio).powi(2));
    let mut rows = Vec::new();
    for (method, slope) in METHODS {
        for ratio in RATIOS {
            let row = Row {
                model: dense.model.clone(),
                ratio: Some(ratio),
                perplexity: Some(perplexity(slope, ratio)),
                perplexity_dense: dense.perplexity,
                params: dense
                    .params
                    .map(|p| (p as f64 * (1.0 - 0.8 * ratio)) as u64),
                params_dense: dense.params,
                bytes: dense.bytes.map(|b| (b as f64 * (1.0 - 0.8 * ratio)) as u64),
                bytes_dense: dense.bytes,
                tokens_per_second: Some(812.5 / (1.0 - 0.7 * ratio)),
                tokens_per_second_dense: dense.tokens_per_second,
                seconds: 431.7,
                peak_rss_bytes: Some(1_912_602_624),
                ..Row::new("structured", method)
            };
            rows.push(row);
        }
    }
    for row in rows.iter_mut().filter(|row| row.method == "random") {
        let mean = row.perplexity.unwrap();
        *row = row.clone().control();
        row.spread.insert(
            "perplexity".into(),
            Spread {
                runs: 3,
                min: 0.8 * mean,
                max: 1.3 * mean,
            },
        );
    }
    rows[0].layers = (0..6)
        .map(|layer| json!({ "layer": layer, "heads": 9 - layer / 2, "neurons": 1536 - 97 * layer, "score": 0.01234 * (layer + 1) as f64, "kept": "attn+mlp" }))
        .collect();
    rows[1]
        .notes
        .push("two layers were left whole because of --min-groups".into());
    let series = |value: &dyn Fn(&Row) -> Option<f64>| -> Vec<Series> {
        let of = |method: &str| {
            rows.iter()
                .filter(|row| row.method == method)
                .filter_map(|row| {
                    let band = row.spread.get("perplexity").map(|s| (s.min, s.max));
                    Some(Point {
                        x: row.ratio?,
                        y: value(row)?,
                        band,
                    })
                })
                .collect()
        };
        METHODS
            .iter()
            .map(|(m, _)| Series {
                name: (*m).into(),
                points: of(m),
                control: *m == "random",
            })
            .collect()
    };
    let plots = vec![
        Plot {
            title: "Perplexity by pruning ratio".into(),
            x: Axis::linear("pruning ratio (share of prunable parameters)"),
            y: Axis::log("perplexity"),
            series: series(&|row| row.perplexity),
            reference: Some(Reference {
                name: DENSE.into(),
                y: 12.3456,
            }),
        },
        Plot {
            title: "Speed by pruning ratio".into(),
            x: Axis::linear("pruning ratio (share of prunable parameters)"),
            y: Axis::linear("prefill (tokens/s)"),
            series: series(&|row| row.tokens_per_second)[..1].to_vec(),
            reference: Some(Reference {
                name: DENSE.into(),
                y: 812.5,
            }),
        },
    ];
    rows.push(dense);
    let section = Section {
        title: "Structured pruning".into(),
        prose: "Attention groups and MLP neurons are removed to the ratio given, after calibration on 128 windows; every method \
                sees the same windows. Random removes the same number of units, three seeds."
            .into(),
        columns: vec![
            Column::Method,
            Column::Ratio,
            Column::Perplexity,
            Column::PerplexityOverDense,
            Column::Accuracy,
            Column::Params,
            Column::BytesOverDense,
            Column::TokensPerSecond,
            Column::Seconds,
            Column::PeakRss,
        ],
        rows,
        plots,
        ..Section::default()
    };
    section
        .fact("window", 256)
        .fact("BOS", "yes, in every window")
        .fact("windows", 412)
        .fact("targets", 105_060)
        .fact("text", "wikitext-2-test.txt")
        .fact("calibration", "c4-sample.txt")
}

fn kv() -> Section {
    let full = 18_874_368;
    let mut rows = vec![Row {
        kv_bytes: Some(full),
        perplexity: Some(14.2),
        ..Row::new("kv", DENSE)
    }];
    let mut series: Vec<Series> = Vec::new();
    for (policy, cost) in [
        ("streaming", 0.9),
        ("h2o", 0.5),
        ("lazy", 0.2),
        ("random", 2.0),
    ] {
        let mut points = Vec::new();
        for tokens in [32u64, 64, 128, 256, 512] {
            let perplexity = 14.2 * (1.0 + cost * 32.0 / tokens as f64);
            points.push(Point::from((tokens as f64, perplexity)));
            let mut row = Row {
                budget: Some(Budget::Tokens(tokens)),
                perplexity: Some(perplexity),
                kv_bytes: Some(full * tokens / 1024),
                kv_bytes_full: Some(full),
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
        series.push(Series {
            name: policy.into(),
            points,
            control: policy == "random",
        });
    }
    Section {
        title: "KV cache under eviction".into(),
        prose:
            "The first quarter of each window is prefilled, the rest decoded one token at a time."
                .into(),
        columns: vec![
            Column::Method,
            Column::Extra("task".into()),
            Column::Budget,
            Column::Perplexity,
            Column::KvBytes,
            Column::KvOverFull,
            Column::RetainedMass,
            Column::Seconds,
        ],
        rows,
        plots: vec![Plot {
            title: "Perplexity by budget".into(),
            x: Axis::log("budget (tokens)"),
            y: Axis::linear("perplexity"),
            series,
            reference: Some(Reference {
                name: "full".into(),
                y: 14.2,
            }),
        }],
        ..Section::default()
    }
}
