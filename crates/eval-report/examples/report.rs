//! Writes a report of invented numbers: `cargo run --example report -- DIR`.

use std::path::PathBuf;

use eval_report::{
    Axis, Column, DENSE, Machine, Plot, Reference, Report, Row, Section, Series, Stopwatch,
    mean_over_seeds,
};

/// A smooth curve in place of a measurement.
fn measure(method: &str, ratio: f64, seed: u64) -> Row {
    let watch = Stopwatch::start();
    let slope = match method {
        "flap" => 25.0,
        _ => 60.0 + 5.0 * seed as f64,
    };
    let mut row = Row {
        ratio: Some(ratio),
        perplexity: Some(6.32 * (1.0 + slope * ratio * ratio)),
        perplexity_dense: Some(6.32),
        ..Row::new("pruning", method)
    };
    watch.stop(&mut row);
    row
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = std::env::args()
        .nth(1)
        .map_or("report".into(), PathBuf::from);
    let mut rows = vec![Row {
        perplexity: Some(6.32),
        ..Row::new("pruning", DENSE)
    }];
    for ratio in [0.125, 0.25, 0.5] {
        rows.push(measure("flap", ratio, 0));
        let seeds: Vec<Row> = (0..3).map(|seed| measure("random", ratio, seed)).collect();
        rows.push(mean_over_seeds(&seeds)?.control());
    }
    let plot = Plot {
        title: "Perplexity by ratio".into(),
        x: Axis::linear("fraction of parameters removed"),
        y: Axis::log("perplexity"),
        series: Series::by_method(&rows, |row| row.ratio, "perplexity", |row| row.perplexity),
        reference: Some(Reference {
            name: DENSE.into(),
            y: 6.32,
        }),
    };
    let mut report = Report {
        command: std::env::args().collect(),
        version: env!("CARGO_PKG_VERSION").into(),
        machine: Machine::detect(),
        device: "cpu".into(),
        threads: 1,
        ..Report::default()
    };
    report.push(Section {
        title: "Structured pruning".into(),
        prose: "Invented numbers, to show what a report looks like.".into(),
        columns: vec![
            Column::Method,
            Column::Ratio,
            Column::Perplexity,
            Column::PerplexityOverDense,
            Column::PeakRss,
        ],
        rows,
        plots: vec![plot],
        ..Section::default()
    })?;
    report.write(&dir)?;
    print!("{}", report.to_text());
    println!("\n{}", dir.join("report.html").display());
    Ok(())
}
