//! What is shown of one network: speeds, the spectrum of its states, its masks and its order.

use anyhow::Result;
use eval_report::{Axis, Column, Figure, Plot, Point, ROUNDS, Rounds, Row, Section, Series};
use prune_lattice::NoProgress;
use prune_lattice::calibration::{RecordConfig, record};
use prune_lattice::experiment::{Trained, measure_blocks, measure_speed};
use prune_lattice::hasse::Diagram;
use prune_lattice::mask::mask_svg;
use prune_lattice::order::{Cut, Poset, thresholds};
use prune_lattice::prune::{Method, PruneConfig, influence_of, layers_of, prune};
use prune_lattice::rnn::Rnn;
use serde_json::json;
use std::time::Duration;

/// Mean out-degree of the order that is drawn: about one class of several neurons and many of one.
const PICTURE_DEGREE: f64 = 1.0;
/// Classes of an order that a picture can show.
const PICTURE_CLASSES: usize = 200;
/// Seconds for each network in each round of the speed comparison.
const SPEED_SECONDS: f64 = 0.1;
/// The same for block kernels, of which there are more.
const BLOCK_SECONDS: f64 = 0.02;
/// Sparsities at which speed is measured.
const SPEED_SPARSITIES: [f64; 3] = [0.5, 0.75, 0.9];
/// The method and sparsity of the picture of blocks.
const PICTURE_BLOCKS: (Method, f64) = (Method::Block8x4, 0.75);

/// What is shown of one network: speeds, the spectrum of its states, its masks.
pub(super) fn pictures(trained: &Trained, name: &str) -> Result<Vec<Section>> {
    let mut sections = vec![
        speed_section(&trained.rnn, name)?,
        block_speed_section(&trained.rnn, name)?,
        spectrum(trained, name)?,
    ];
    sections.extend(picture(&trained.rnn, name)?);
    Ok(sections)
}

/// Steps per second of the dense network, of the block that a mask leaves, and of the network without the neurons.
fn speed_section(rnn: &Rnn, name: &str) -> Result<Section> {
    let mut rows = Vec::new();
    for batch in [1, 32] {
        for sparsity in SPEED_SPARSITIES {
            let config = PruneConfig::new(Method::Strength, sparsity);
            let second = Duration::from_secs(1);
            let (mut dense, mut compact) = (Rounds::default(), Rounds::default());
            let mut removed = Rounds::default();
            let mut counts = (0, 0, 0);
            for _ in 0..ROUNDS {
                let speed = measure_speed(rnn, &config, batch, SPEED_SECONDS)?;
                dense.add(speed.dense, second);
                compact.add(speed.compact, second);
                removed.add(speed.removed, second);
                counts = speed.params;
            }
            for (method, times, params) in [
                ("masked, on its block", compact, counts.1),
                ("neurons removed", removed, counts.2),
            ] {
                let mut row = Row {
                    model: Some(name.into()),
                    sparsity: Some(sparsity),
                    params: Some(params as u64),
                    params_dense: Some(counts.0 as u64),
                    ..Row::new("lattice", method)
                };
                times.fill_beside(&dense, &mut row);
                row.extra.insert("batch".into(), json!(batch));
                rows.push(row);
            }
        }
    }
    Ok(Section {
        title: "Speed of smaller networks".into(),
        prose: format!(
            "Steps per second of {name} on one thread, all sequences of a batch together, read-out included. Neurons are \
             ranked by strength; the speed depends on how many stay, not on which."
        ),
        columns: vec![
            Column::Method,
            Column::Extra("batch".into()),
            Column::Sparsity,
            Column::ParamsOverDense,
            Column::TokensPerSecond,
            Column::Speedup,
        ],
        rows,
        ..Section::default()
    })
}

/// Steps per second of the block kernels.
fn block_speed_section(rnn: &Rnn, name: &str) -> Result<Section> {
    let mut rows = Vec::new();
    let second = Duration::from_secs(1);
    for method in [Method::Block8x4, Method::Block8x1] {
        for sparsity in SPEED_SPARSITIES {
            let mut times = [Rounds::default(), Rounds::default(), Rounds::default()];
            let mut bytes = [0; 3];
            for _ in 0..ROUNDS {
                let config = PruneConfig::new(method, sparsity);
                let speed = measure_blocks(rnn, &config, BLOCK_SECONDS)?;
                let rates = [speed.dense, speed.floats, speed.integers];
                for (times, rate) in times.iter_mut().zip(rates) {
                    times.add(rate, second);
                }
                bytes = speed.bytes;
            }
            let [dense, floats, integers] = times;
            let dense_bytes = bytes[0];
            for (kind, times, bytes) in [("f32", floats, bytes[1]), ("int8", integers, bytes[2])] {
                let mut row = Row {
                    model: Some(name.into()),
                    sparsity: Some(sparsity),
                    ..Row::new("lattice", format!("{method} {kind}"))
                };
                times.fill_beside(&dense, &mut row);
                let rate = |steps: Option<f64>, bytes: usize| {
                    steps.map(|s| format!("{:.1} GB/s", s * bytes as f64 / 1e9))
                };
                let both = rate(row.tokens_per_second, bytes)
                    .zip(rate(row.tokens_per_second_dense, dense_bytes));
                if let Some((own, dense)) = both {
                    row.extra.insert("read".into(), json!(own));
                    row.extra.insert("dense reads".into(), json!(dense));
                }
                rows.push(row);
            }
        }
    }
    Ok(Section {
        title: "Speed of blocks".into(),
        prose: format!(
            "Steps per second of one sequence of {name} on one thread, W_hh kept in whole blocks, beside the dense network by the \
             same kernels in f32. GB/s are those of the matrices that a step reads."
        ),
        columns: vec![
            Column::Method,
            Column::Sparsity,
            Column::TokensPerSecond,
            Column::Speedup,
            Column::Extra("read".into()),
            Column::Extra("dense reads".into()),
        ],
        rows,
        ..Section::default()
    })
}

/// How many directions the states of the top layer span, and the blocks that a mask keeps.
fn spectrum(trained: &Trained, name: &str) -> Result<Section> {
    let Trained { rnn, data, .. } = trained;
    let calibration = record(rnn, &data.train, &RecordConfig::default(), &NoProgress)?;
    let series = calibration
        .layers
        .iter()
        .enumerate()
        .map(|(l, layer)| {
            let values = layer.after.spectrum()?;
            let total: f64 = values.iter().sum::<f64>().max(f64::MIN_POSITIVE);
            let mut left = total;
            let points = values.iter().enumerate().map(|(k, v)| {
                left -= v;
                Point {
                    x: (k + 1) as f64,
                    y: (left / total).max(1e-9),
                    band: None,
                }
            });
            Ok(Series {
                name: format!("layer {l}"),
                points: points.collect(),
                control: false,
            })
        })
        .collect::<Result<Vec<Series>>>()?;
    let plot = Plot {
        title: format!("{name}, variance of the states outside the first directions"),
        x: Axis::linear("directions"),
        y: Axis::log("share of the variance"),
        series,
        reference: None,
    };
    let (method, sparsity) = PICTURE_BLOCKS;
    let (masks, _) = prune(rnn, &PruneConfig::new(method, sparsity))?;
    let gates = rnn.config().cell.gate_names();
    let figures = masks.iter().filter_map(|(matrix, mask)| {
        let svg = mask_svg(mask.keep(), gates, method.block()?)?;
        let caption = format!(
            "Blocks of {matrix} that {method} keeps at a sparsity of {sparsity}, gate by gate. Rows are targets, columns are \
             sources."
        );
        Some(Figure { caption, svg })
    });
    Ok(Section {
        title: "States and blocks".into(),
        prose: "The fewer directions the states span, the fewer neurons are needed: span chooses neurons that span them, merge \
            predicts the others."
            .into(),
        plots: vec![plot],
        figures: figures.collect(),
        ..Section::default()
    })
}

/// The order of a network at one cut, where it is small enough to be seen.
fn picture(rnn: &Rnn, name: &str) -> Result<Option<Section>> {
    let base = PruneConfig::new(Method::LatticeReachability, 0.5);
    let influence = influence_of(&layers_of(rnn), rnn.config().cell, &base.lattice)?;
    let threshold = thresholds(&influence, &[Cut::Degree(PICTURE_DEGREE)])?[0];
    let poset = Poset::of_digraph(&influence.digraph(threshold));
    if poset.len() > PICTURE_CLASSES {
        return Ok(None);
    }
    let caption = format!(
        "Hasse diagram of {name} at a mean out-degree of {PICTURE_DEGREE}: {} neurons in {} classes. A class below another \
         drives it. Filled: meet-irreducible; dashed outline: not join-irreducible; larger: several neurons that drive each \
         other.",
        influence.len(),
        poset.len()
    );
    let svg = Diagram::of(&poset).svg();
    Ok(Some(Section {
        title: "The order".into(),
        figures: vec![Figure { caption, svg }],
        ..Section::default()
    }))
}
